// pixel_refine on CUDA: the affinities of all pixels once, then a launch for each iteration, a thread a pixel of some
// classes. Neighbours are read where they lie, with clamped rows and columns: nothing is padded or unfolded.
//
// Colours and masks lie in planes of packs, four maps side by side, the last pack filled up with the last map. Images
// are taken as few at a time as fill the device, so that the affinities, N·H·W numbers an image, are few enough to stay
// in its cache from one iteration to the next. Tiles of an iteration are as tall as a block can be: what neighbours a
// tile's pixels have in common comes to the processor once.
#include <limits>
#include <utility>

#include "common/cuda_four.cuh"
#include "common/cuda_table.cuh"
#include "common/cuda_tile.cuh"
#include "common/cuda_views.cuh"
#include "pixel_refine.h"

namespace {

using namespace pssl;
using namespace pssl::PSSL_SIMD_NAMESPACE;

constexpr const char* kOp = "pixel_refine";
constexpr int64_t kWaves = 2;  // blocks for each processor that a launch should make
constexpr int kMostPacks = 3;  // that a thread works on
template <class T>
constexpr int kTallest = 128 / int(sizeof(T));  // rows of a tile: registers allow no more

// The pixels of some images, and what a block of a launch over them works on: a tile, a thread a pixel, and one group of
// its packs. The groups of a tile are neighbouring blocks, so that its affinities come from memory once.
struct Pixels {
  int64_t H, W;
  unsigned images, height = Tile::kHeight, groups = 1;

  PSSL_HD unsigned across() const { return unsigned(Tile::across(W)); }
  PSSL_HD unsigned tiles() const { return across() * unsigned((H + height - 1) / height); }
  int64_t blocks() const { return int64_t(tiles()) * groups * images; }
  dim3 grid() const { return grid_of(blocks()); }
  dim3 block() const { return dim3(Tile::kWidth, height); }

  PSSL_HD int64_t plane() const { return H * W; }
  __device__ int64_t group() const { return blockIdx.x % groups; }
  __device__ int64_t image() const { return blockIdx.x / groups / tiles(); }
  __device__ Tile tile() const {
    const unsigned index = blockIdx.x / groups % tiles();
    return {int64_t(index / across()) * height, int64_t(index % across()) * Tile::kWidth, H, W};
  }
};

// Neighbours, in tables on the device.
template <class T>
struct Neighbours {
  int64_t count;             // of dilations
  const int64_t* dilations;  // [count]
  const T* position;         // [8 * count] affinity from the distance, weighted
  T colour_scale;

  PSSL_HD int64_t size() const { return kRefineDirections * count; }
};

// The 8 neighbours of a pixel at one dilation, as places in a plane [H,W].
struct Around {
  int64_t row[3], column[3];

  __device__ Around(int64_t dilation, int64_t y, int64_t x, int64_t H, int64_t W)
      : row{(y > dilation ? y - dilation : 0) * W, y * W, (y < H - dilation ? y + dilation : H - 1) * W},
        column{x > dilation ? x - dilation : 0, x, x < W - dilation ? x + dilation : W - 1} {}
  __device__ int64_t operator[](int64_t i) const {
    const int64_t cell = refine_cell(i);
    return row[cell / 3] + column[cell % 3];
  }
};

// planes [images,packs,H,W] of the batch's images from `first_image` on, resized where they are of another size.
template <class T>
__global__ void __launch_bounds__(Tile::kThreads)
    read_planes(const __grid_constant__ Pixels of, const __grid_constant__ AnyView<4> from,
                int64_t first_image, Four<T>* planes) {
  const Tile tile = of.tile();
  const int64_t y = tile.y(), x = tile.x(), image = of.image(), b = first_image + image;
  if (!tile.inside()) return;
  const int64_t maps = from.size[1], h = from.size[2], w = from.size[3];
  const AxisWeight wy = axis_weight(y, h, of.H, true), wx = axis_weight(x, w, of.W, true);
  const int64_t here = from.offset(b, 0, wy.index, wx.index);  // where no resizing is needed, (y,x)
  const int64_t below = wy.index + 1 < h ? from.stride[2] : 0, right = wx.index + 1 < w ? from.stride[3] : 0;
  const bool same = h == of.H && w == of.W;
  for (int64_t first = 0; first < maps; first += kFour) {
    const Four<T> value = Four<T>::of([&](int i) {
      const int64_t map = here + std::min(first + i, maps - 1) * from.stride[1];
      auto load = [&](int64_t at) { return load_floating<T>(from.data, from.type, map + at); };
      auto column = [&](int64_t at) { return refine_blend(load(at), load(at + below), T(wy.fraction)); };
      return same ? load(0) : refine_blend(column(0), column(right), T(wx.fraction));
    });
    store_pack(planes + ((image * packs_of(maps) + first / kFour) * of.H + y) * of.W + x, value);
  }
}

// affinity [images,N,H,W] from colours [images,1,H,W]
template <class T>
__global__ void __launch_bounds__(Tile::kThreads)
    find_affinities(const __grid_constant__ Pixels of, const __grid_constant__ Neighbours<T> near,
                    const Four<T>* colours, T* affinity) {
  const Tile tile = of.tile();
  const int64_t y = tile.y(), x = tile.x(), plane = of.plane(), here = y * of.W + x;
  if (!tile.inside()) return;
  colours += of.image() * plane;
  affinity += of.image() * near.size() * plane + here;
  const Four<T> own = load_pack(colours + here);
  auto difference = [&](int64_t j, int i) {
    return load_pack(colours + Around(near.dilations[j], y, x, of.H, of.W)[i]) - own;
  };
  const Four<T> squares = refine_squares<T, Four<T>>(near.count, difference);
  T factor[kRefineChannels];
  for (int c = 0; c < kRefineChannels; ++c)
    factor[c] = refine_colour_factor(squares.v[c], near.size(), near.colour_scale);
  auto each_logit = [&](auto f) {  // found again each time: less to bring than what would have been kept
    for (int64_t j = 0; j < near.count; ++j)
#pragma unroll
      for (int i = 0; i < kRefineDirections; ++i) {
        const Four<T> far = difference(j, i);
        f(j * kRefineDirections + i, refine_logit<T, T>(factor, [&](int c) { return far.v[c]; }));
      }
  };
  T largest = -std::numeric_limits<T>::infinity(), total = 0;
  each_logit([&](int64_t, T logit) { largest = logit > largest ? logit : largest; });
  each_logit([&](int64_t, T logit) { total += std::exp(logit - largest); });
  const T inverse = T(1) / total;
  each_logit([&](int64_t n, T logit) {
    affinity[n * plane] = std::exp(logit - largest) * inverse + near.position[n];
  });
}

// `to` [images,packs,H,W] from `from`, Q packs a thread; in the last iteration `out` [images,maps,H,W] instead.
template <class T, int Q>
__global__ void __launch_bounds__(kTallest<T>* Tile::kWidth)
    iterate(const __grid_constant__ Pixels of, const __grid_constant__ Neighbours<T> near, const T* affinity,
            const Four<T>* from, int64_t maps, Four<T>* to, T* out) {
  const Tile tile = of.tile();
  const int64_t y = tile.y(), x = tile.x(), plane = of.plane(), here = y * of.W + x;
  if (!tile.inside()) return;
  const int64_t first = of.group() * Q, packs = packs_of(maps), image = of.image();
  affinity += image * near.size() * plane + here;
  from += image * packs * plane;
  const Four<T>* pack[Q];
  Four<T> sum[Q] = {};
#pragma unroll
  for (int q = 0; q < Q; ++q) pack[q] = from + std::min(first + q, packs - 1) * plane;  // past the last: that
  T next[kRefineDirections], weight[kRefineDirections];
  auto take_next = [&] {
#pragma unroll
    for (int i = 0; i < kRefineDirections; ++i, affinity += plane)
      next[i] = __ldcg(affinity);  // read once: room in the processor's cache is for the maps
  };
  take_next();
  for (int64_t j = 0; j < near.count; ++j) {
    const Around around(near.dilations[j], y, x, of.H, of.W);
#pragma unroll
    for (int i = 0; i < kRefineDirections; ++i) weight[i] = next[i];
    if (j + 1 < near.count) take_next();
#pragma unroll
    for (int q = 0; q < Q; ++q)
#pragma unroll
      for (int i = 0; i < kRefineDirections; ++i) sum[q] += weight[i] * load_pack(pack[q] + around[i]);
  }
#pragma unroll
  for (int q = 0; q < Q; ++q) {
    if (first + q >= packs) break;
    if (!out) store_pack(to + (image * packs + first + q) * plane + here, sum[q]);
#pragma unroll
    for (int i = 0; i < kFour; ++i) {
      const int64_t map = (first + q) * kFour + i;
      if (out && map < maps) out[(image * maps + map) * plane + here] = sum[q].v[i];
    }
  }
}

// Calls f(pixels, Q) with the tiles and the packs a thread, as a constant, of an iteration: as many as leave the device
// filled. A pixel's result does not depend on it.
template <class T, class F>
void with_shape(const CudaCall& call, Pixels pixels, int64_t packs, const F& f) {
  auto fills = [&](int height, int64_t most) {
    pixels.height = unsigned(height);
    pixels.groups = unsigned((packs + most - 1) / most);
    return pixels.blocks() >= kWaves * call.limits.processors;
  };
  int64_t most = std::min<int64_t>(packs, kMostPacks);
  if (!fills(kTallest<T>, most))
    while (!fills(Tile::kHeight, most) && most > 1) --most;
  if (most == 1) return f(pixels, std::integral_constant<int, 1>{});
  if (most == 2) return f(pixels, std::integral_constant<int, 2>{});
  return f(pixels, std::integral_constant<int, kMostPacks>{});
}

template <class T>
Tensor refine(const CudaCall& call, const Tensor& images, const Tensor& masks,
              const std::vector<int64_t>& dilations, int64_t iterations, double colour_scale,
              double position_weight) {
  const int64_t B = images.size(0), k = masks.size(1), H = images.size(2), W = images.size(3);
  Tensor result = new_on_device(images, {B, k, H, W}, scalar_type_of<T>);
  if (B * k * H * W == 0) return result;
  const int64_t N = kRefineDirections * int64_t(dilations.size()), plane = H * W;
  std::vector<double> affinities(N);
  refine_position_affinities(dilations.data(), int64_t(dilations.size()), colour_scale, position_weight,
                             affinities.data());
  DeviceTable<int64_t> steps(call, images, dilations);
  DeviceTable<T> position(call, images, std::vector<T>(affinities.begin(), affinities.end()));
  const Neighbours<T> near{int64_t(dilations.size()), steps.get(), position.get(), T(colour_scale)};

  const int64_t fill = (kWaves * call.limits.processors + Tile::count(H, W) - 1) / Tile::count(H, W);
  const int64_t together = std::min(fill, B), packs = packs_of(k);
  auto numbers = [&](int64_t count) { return new_on_device(images, {together * count}, scalar_type_of<T>); };
  Tensor colour_numbers = numbers(kFour * plane), affinity = numbers(N * plane);
  Tensor first = numbers(packs * kFour * plane), second = numbers(packs * kFour * plane);
  Four<T>* const colours = packs_in<T>(colour_numbers);
  for (int64_t b = 0; b < B; b += together) {
    const Pixels pixels{H, W, unsigned(std::min(together, B - b))};
    Four<T>*from = packs_in<T>(first), *to = packs_in<T>(second);
    T* const out = result.mutable_data_ptr<T>() + b * k * plane;
    launch(call, read_planes<T>, pixels.grid(), pixels.block(), 0, pixels, AnyView<4>::of(images), b,
           colours);
    launch(call, find_affinities<T>, pixels.grid(), pixels.block(), 0, pixels, near, colours,
           affinity.mutable_data_ptr<T>());
    launch(call, read_planes<T>, pixels.grid(), pixels.block(), 0, pixels, AnyView<4>::of(masks), b, from);
    with_shape<T>(call, pixels, packs, [&](const Pixels& shaped, auto packs_a_thread) {
      for (int64_t i = 0; i < iterations; ++i) {
        launch(call, iterate<T, packs_a_thread()>, shaped.grid(), shaped.block(), 0, shaped, near,
               affinity.mutable_data_ptr<T>(), from, k, to, i + 1 < iterations ? nullptr : out);
        std::swap(from, to);
      }
    });
  }
  return result;
}

Tensor pixel_refine_cuda(const Tensor& images, const Tensor& masks, const std::vector<int64_t>& dilations,
                         int64_t iterations, double colour_scale, double position_weight) {
  check_refine(kOp, images, masks, dilations, iterations, colour_scale);
  const CudaCall call(kOp, images);
  Tensor result;
  with_accumulation({images.scalar_type(), masks.scalar_type()}, [&](auto zero) {
    result =
        refine<decltype(zero)>(call, images, masks, dilations, iterations, colour_scale, position_weight);
  });
  return result;
}

}  // namespace

PSSL_REGISTER_CUDA(m) { m.impl("pixel_refine", TORCH_BOX(&pixel_refine_cuda)); }
