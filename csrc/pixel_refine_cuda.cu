// pixel_refine on CUDA: the affinities of all pixels once, then a launch for each iteration, a thread a pixel of some
// classes. Neighbours are read where they lie, with clamped rows and columns: nothing is padded or unfolded.
//
// Images are taken as few at a time as fill the device, so that the affinities, N·H·W numbers an image, are few enough
// to stay in its cache from one iteration to the next.
#include <utility>

#include "common/cuda_table.cuh"
#include "common/cuda_tile.cuh"
#include "common/cuda_views.cuh"
#include "pixel_refine.h"

namespace {

using namespace pssl;
using namespace pssl::PSSL_SIMD_NAMESPACE;

constexpr const char* kOp = "pixel_refine";
constexpr int64_t kWaves = 2;  // blocks for each processor that images of one launch should make

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

// planes [images,maps,H,W] of the batch's images from `first_image` on, resized where they are of another size.
template <class T>
__global__ void __launch_bounds__(Tile::kThreads)
    read_planes(const __grid_constant__ TileOfMaps of, const __grid_constant__ AnyView<4> from,
                int64_t first_image, T* planes) {
  const Tile tile = of.tile();
  const int64_t y = tile.y(), x = tile.x(), c = of.first<1>(), image = of.image<1>(), b = first_image + image;
  if (!tile.inside()) return;
  const int64_t h = from.size[2], w = from.size[3];
  const AxisWeight wy = axis_weight(y, h, of.H, true), wx = axis_weight(x, w, of.W, true);
  const int64_t below = wy.index + 1 < h ? wy.index + 1 : wy.index;
  const int64_t right = wx.index + 1 < w ? wx.index + 1 : wx.index;
  auto column = [&](int64_t at) {
    return refine_blend(from.floating<T>(b, c, wy.index, at), from.floating<T>(b, c, below, at),
                        T(wy.fraction));
  };
  const bool same = h == of.H && w == of.W;
  const T value =
      same ? from.floating<T>(b, c, y, x) : refine_blend(column(wx.index), column(right), T(wx.fraction));
  planes[((image * of.maps + c) * of.H + y) * of.W + x] = value;
}

// affinity [images,N,H,W] from colours [images,3,H,W]
template <class T>
__global__ void __launch_bounds__(Tile::kThreads)
    find_affinities(const __grid_constant__ TileOfMaps of, const __grid_constant__ Neighbours<T> near,
                    const T* colours, T* affinity) {
  const Tile tile = of.tile();
  const int64_t y = tile.y(), x = tile.x(), plane = of.H * of.W, here = y * of.W + x;
  if (!tile.inside()) return;
  colours += of.image<1>() * kRefineChannels * plane;
  affinity += of.image<1>() * near.size() * plane + here;
  T own[kRefineChannels], factor[kRefineChannels];
  for (int c = 0; c < kRefineChannels; ++c) {
    const T* channel = colours + c * plane;
    own[c] = channel[here];
    const T squares = refine_squares<T, T>(near.count, [&](int64_t j, int i) {
      return channel[Around(near.dilations[j], y, x, of.H, of.W)[i]] - own[c];
    });
    factor[c] = refine_colour_factor(squares, near.size(), near.colour_scale);
  }
  T largest = 0, total = 0;
  for (int64_t j = 0; j < near.count; ++j) {
    const Around around(near.dilations[j], y, x, of.H, of.W);
    for (int i = 0; i < kRefineDirections; ++i) {
      const int64_t n = j * kRefineDirections + i;
      const T logit =
          refine_logit<T, T>(factor, [&](int c) { return colours[c * plane + around[i]] - own[c]; });
      affinity[n * plane] = logit;
      largest = n == 0 || logit > largest ? logit : largest;
    }
  }
  for (int64_t n = 0; n < near.size(); ++n) {
    const T e = std::exp(affinity[n * plane] - largest);
    affinity[n * plane] = e;
    total += e;
  }
  const T inverse = T(1) / total;
  for (int64_t n = 0; n < near.size(); ++n)
    affinity[n * plane] = affinity[n * plane] * inverse + near.position[n];
}

template <class T, int C>
__global__ void __launch_bounds__(Tile::kThreads)
    iterate(const __grid_constant__ TileOfMaps of, const __grid_constant__ Neighbours<T> near,
            const T* affinity, const T* from, T* to) {
  const Tile tile = of.tile();
  const int64_t y = tile.y(), x = tile.x(), plane = of.H * of.W, here = y * of.W + x;
  if (!tile.inside()) return;
  const int64_t first = of.first<C>(), image = of.image<C>();
  affinity += image * near.size() * plane + here;
  from += image * of.maps * plane;
  to += image * of.maps * plane + here;
  const T* map[C];
  T sum[C];
#pragma unroll
  for (int c = 0; c < C; ++c) {
    map[c] = from + (first + c < of.maps ? first + c : of.maps - 1) * plane;  // past the last: that again
    sum[c] = 0;
  }
  for (int64_t j = 0; j < near.count; ++j) {
    const Around around(near.dilations[j], y, x, of.H, of.W);
#pragma unroll
    for (int i = 0; i < kRefineDirections; ++i, affinity += plane) {
      const T weight = *affinity;
      const int64_t there = around[i];
#pragma unroll
      for (int c = 0; c < C; ++c) sum[c] += weight * map[c][there];
    }
  }
#pragma unroll
  for (int c = 0; c < C; ++c)
    if (first + c < of.maps) to[(first + c) * plane] = sum[c];
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
  const int64_t together = std::min(fill, B);
  Tensor colours = new_on_device(images, {together * kRefineChannels * plane}, scalar_type_of<T>);
  Tensor affinity = new_on_device(images, {together * N * plane}, scalar_type_of<T>);
  Tensor other = new_on_device(images, {together * k * plane}, scalar_type_of<T>);
  const AnyView<4> image_view = AnyView<4>::of(images), mask_view = AnyView<4>::of(masks);
  for (int64_t b = 0; b < B; b += together) {
    const int64_t n = std::min(together, B - b);
    const TileOfMaps channels{kRefineChannels, H, W, n}, pixels{1, H, W, n}, maps{k, H, W, n};
    launch(call, read_planes<T>, channels.grid<1>(), Tile::block(), 0, channels, image_view, b,
           colours.mutable_data_ptr<T>());
    launch(call, find_affinities<T>, pixels.grid<1>(), Tile::block(), 0, pixels, near,
           colours.mutable_data_ptr<T>(), affinity.mutable_data_ptr<T>());
    T *to = result.mutable_data_ptr<T>() + b * k * plane, *from = other.mutable_data_ptr<T>();
    if (iterations % 2 == 0) std::swap(from, to);  // so that the last one writes the result
    launch(call, read_planes<T>, maps.grid<1>(), Tile::block(), 0, maps, mask_view, b, from);
    with_maps_a_thread(call, maps.tiles() * n, k, [&](auto maps_a_thread) {
      constexpr int C = maps_a_thread();
      for (int64_t i = 0; i < iterations; ++i) {
        launch(call, iterate<T, C>, maps.grid<C>(), Tile::block(), 0, maps, near,
               affinity.mutable_data_ptr<T>(), from, to);
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
