// cam_compare on CUDA. The pixels of a present class of an image are cut into chunks, a block each; the maps are resized
// where they are needed, so that no resized map exists. Absent classes are not read.
//
//   products  <M_s,S_t>, |M_s|^2 and |S_t|^2 of each chunk: what the attention is made of
//   loss      sums of |M_s - target_s| of each chunk; the chunk that comes last adds them up, in their order
//   gradient  a block for a tile of a map's cells, gathering over the pixels that touch them
//
// Forward and backward are two launches each. Nothing is added in an order that is not fixed.
#include <algorithm>
#include <tuple>

#include "cam_compare.h"
#include "common/cuda_resize.cuh"

namespace {

using namespace pssl;
using namespace pssl::PSSL_SIMD_NAMESPACE;

constexpr const char* kOp = "cam_compare";
constexpr int64_t kChunkTiles = 4, kMostChunks = 32;

// Cells of a block of the gradient: on a grid of the pixels' size, the pixels that touch them are one tile.
constexpr int kCellsWide = Tile::kWidth - 1, kCellsHigh = Tile::kHeight - 1;

struct Problem {
  MapList maps;  // the main maps, then the support maps
  int mains;
  AnyView<2> labels;  // [B,K]
  int64_t B, K, H, W;
  bool cosine;

  PSSL_HD int supports() const { return maps.count - mains; }
  PSSL_HD int quantities() const { return maps.count + mains * supports(); }
  PSSL_HD int64_t pairs() const { return B * K; }
  PSSL_HD int64_t tiles() const { return Tile::count(H, W); }
  // of a pair; by its size alone, so that sums do not depend on the device
  PSSL_HD int64_t chunks() const {
    const int64_t n = (tiles() + kChunkTiles - 1) / kChunkTiles;
    return n < kMostChunks ? n : kMostChunks;
  }
  PSSL_HD bool present(int64_t pair) const { return labels.truth(pair / K, pair % K); }
};

// A block's shared memory.
template <class T>
struct Scratch {
  TileTaps<T>* taps;  // [maps]
  T* values;          // [maps][threads] the cut maps at the tile's pixels
  T* more;            // what the kernel wants beside

  static int64_t bytes(const Problem& p, int64_t more) {
    return p.maps.count * int64_t(sizeof(TileTaps<T>) + Tile::kThreads * sizeof(T)) +
           more * int64_t(sizeof(T));
  }
  __device__ Scratch(void* memory, const Problem& p)
      : taps(static_cast<TileTaps<T>*>(memory)),
        values(reinterpret_cast<T*>(taps + p.maps.count)),
        more(values + p.maps.count * Tile::kThreads) {}
  // map i at this thread's pixel
  __device__ T& own(int i) const { return values[i * Tile::kThreads + block_thread()]; }

  // The maps of a pair at the tile's pixels, 0 outside. Others' values are there after a barrier.
  __device__ void read(const Problem& p, int64_t pair, const Tile& tile) const {
    find_taps(tile, p.maps.map, p.maps.count, taps);
    for (int i = 0; i < p.maps.count; ++i)
      own(i) = tile.inside() ? relu(resized_at_thread(p.maps.map[i], taps[i], pair / p.K, pair % p.K)) : T(0);
  }
  // M_s - target_s at this thread's pixel
  __device__ T difference(const Problem& p, const T* share, int s) const {
    T target = 0;
    for (int t = 0; t < p.supports(); ++t) target += share[s * p.supports() + t] * own(p.mains + t);
    return own(s) - target;
  }
};

// partial[pair, chunk, q] of the chunk's pixels: the squares of the maps, then the products [mains, supports].
template <class T>
__global__ void __launch_bounds__(Tile::kThreads)
    products(const __grid_constant__ Problem p, double* partial, int32_t* arrived) {
  PSSL_DYNAMIC_SHARED(unsigned char, memory);
  const Scratch<T> scratch(memory, p);
  T* sums = scratch.more;  // [quantities][lanes], each written by one thread
  const int64_t pair = blockIdx.x / p.chunks(), chunk = blockIdx.x % p.chunks();
  if (chunk == 0 && block_thread() == 0) arrived[pair] = 0;
  if (!p.cosine || !p.present(pair)) return;
  const int lane = block_thread() % kWarp, warp = block_thread() / kWarp;
  constexpr int kWarps = Tile::kThreads / kWarp;
  for (int q = warp; q < p.quantities(); q += kWarps) sums[q * kWarp + lane] = 0;
  for (int64_t t = chunk; t < p.tiles(); t += p.chunks()) {
    scratch.read(p, pair, Tile::at(t, p.H, p.W));
    __syncthreads();
    for (int q = warp; q < p.quantities(); q += kWarps) {
      const int of = q - p.maps.count;
      const int a = of < 0 ? q : of / p.supports(), b = of < 0 ? q : p.mains + of % p.supports();
      T sum = sums[q * kWarp + lane];
      for (int i = lane; i < Tile::kThreads; i += kWarp)
        sum += scratch.values[a * Tile::kThreads + i] * scratch.values[b * Tile::kThreads + i];
      sums[q * kWarp + lane] = sum;
    }
  }
  for (int q = warp; q < p.quantities(); q += kWarps) {
    const T sum = warp_reduce(sums[q * kWarp + lane], Plus{});
    if (lane == 0) partial[blockIdx.x * int64_t(p.quantities()) + q] = sum;
  }
}

// share[s, t] = w_st / T of a pair, for all threads of the block.
template <class T>
__device__ void find_share(const Problem& p, const double* partial, int64_t pair, T* share) {
  const int Q = p.quantities();
  partial += pair * p.chunks() * Q;
  auto total = [&](int q) {
    double sum = 0;
    for (int64_t chunk = 0; chunk < p.chunks(); ++chunk) sum += partial[chunk * Q + q];
    return sum;
  };
  for (int i = block_thread(); i < p.mains * p.supports(); i += Tile::kThreads) {
    const int s = i / p.supports(), t = i % p.supports();
    share[i] = p.cosine ? T(cam_share(total(p.maps.count + i), total(s), total(p.mains + t), p.supports()))
                        : T(1) / T(p.supports());
  }
  __syncthreads();
}

// out[b,k] = the sum over pixels and main maps of |M_s - target_s|; sums[pair, chunk] on the way.
template <class T>
__global__ void __launch_bounds__(Tile::kThreads)
    loss(const __grid_constant__ Problem p, const double* partial, double* sums, int32_t* arrived, T* out) {
  PSSL_DYNAMIC_SHARED(unsigned char, memory);
  PSSL_SHARED(warps, T[kWarp]);
  const Scratch<T> scratch(memory, p);
  const int64_t pair = blockIdx.x / p.chunks(), chunk = blockIdx.x % p.chunks();
  if (!p.present(pair)) {
    if (chunk == 0 && block_thread() == 0) out[pair] = 0;
    return;
  }
  T* share = scratch.more;
  find_share(p, partial, pair, share);
  T sum = 0;
  for (int64_t t = chunk; t < p.tiles(); t += p.chunks()) {
    scratch.read(p, pair, Tile::at(t, p.H, p.W));
    for (int s = 0; s < p.mains; ++s) sum += magnitude(scratch.difference(p, share, s));
  }
  sum = block_sum(sum, warps);
  if (block_thread() != 0) return;
  volatile double* of_pair = sums + pair * p.chunks();
  of_pair[chunk] = sum;
  __threadfence();  // the sum is there before the count says so
  if (atomicAdd(arrived + pair, 1) != p.chunks() - 1) return;
  __threadfence();
  double total = 0;
  for (int64_t i = 0; i < p.chunks(); ++i) total += of_pair[i];
  out[pair] = T(total);
}

// The gradients that are wanted, and how the blocks are shared among them.
struct Gradients {
  int count = 0;
  int map[kMostMaps];  // its number in Problem::maps
  AnyView<4> grad[kMostMaps];
  int64_t first_block[kMostMaps + 1] = {0};
  AnyView<2> of_sums;  // [B,K]; null where the loss has none

  static PSSL_HD int64_t tiles(const AnyView<4>& grad) {
    return (grad.size[2] + kCellsHigh - 1) / kCellsHigh * ((grad.size[3] + kCellsWide - 1) / kCellsWide);
  }
};

// The outputs [begin, end) of an axis that touch the inputs [first, last).
struct Touching {
  int64_t begin, end;
  __device__ Touching(int64_t first, int64_t last, int64_t in_size, int64_t out_size)
      : begin(first_output(first - 1, in_size, out_size, false)),
        end(first_output(last, in_size, out_size, false)) {}
};

// The weight with which input `index` enters an output.
template <class T>
__device__ T weight_of(const Tap<T>& tap, int64_t index) {
  return tap.index == index ? T(1) - tap.fraction : tap.fraction;
}

// d loss / d resized map at this thread's pixel
template <class T>
__device__ T pixel_gradient(const Problem& p, const Scratch<T>& scratch, const T* share, int map, T grad) {
  if (map < p.mains)
    return relu_gradient(scratch.own(map), magnitude_gradient(scratch.difference(p, share, map), grad));
  T sum = 0;
  for (int s = 0; s < p.mains; ++s)
    sum -=
        share[s * p.supports() + map - p.mains] * magnitude_gradient(scratch.difference(p, share, s), grad);
  return relu_gradient(scratch.own(map), sum);
}

template <class T>
__global__ void __launch_bounds__(Tile::kThreads)
    gradient(const __grid_constant__ Problem p, const __grid_constant__ Gradients g, const double* partial) {
  PSSL_DYNAMIC_SHARED(unsigned char, memory);
  PSSL_SHARED(pixels, T[Tile::kThreads]);
  const Scratch<T> scratch(memory, p);
  int i = 0;
  while (g.first_block[i + 1] <= blockIdx.x) ++i;
  const AnyView<4>& out = g.grad[i];
  const int map = g.map[i];
  const int64_t h = out.size[2], w = out.size[3], across = (w + kCellsWide - 1) / kCellsWide;
  const int64_t task = blockIdx.x - g.first_block[i], pair = task / Gradients::tiles(out);
  const int64_t cy0 = task % Gradients::tiles(out) / across * kCellsHigh, cx0 = task % across * kCellsWide;
  const int64_t b = pair / p.K, k = pair % p.K, cy = cy0 + threadIdx.y, cx = cx0 + threadIdx.x;
  const bool owner = threadIdx.y < kCellsHigh && threadIdx.x < kCellsWide && cy < h && cx < w;
  if (!g.of_sums.data || !p.present(pair)) {
    if (owner) out.store(T(0), b, k, cy, cx);
    return;
  }
  T* share = scratch.more;
  find_share(p, partial, pair, share);
  const T grad = g.of_sums.floating<T>(b, k);
  const Touching rows(cy0, cy0 + kCellsHigh, h, p.H), columns(cx0, cx0 + kCellsWide, w, p.W);
  const Touching own_rows(cy, cy + 1, h, p.H), own_columns(cx, cx + 1, w, p.W);
  T sum = 0;
  for (int64_t y0 = rows.begin; y0 < rows.end; y0 += Tile::kHeight)
    for (int64_t x0 = columns.begin; x0 < columns.end; x0 += Tile::kWidth) {
      const Tile tile{y0, x0, p.H, p.W};
      scratch.read(p, pair, tile);
      pixels[block_thread()] = pixel_gradient(p, scratch, share, map, grad);
      __syncthreads();  // the next tile's taps begin with another
      if (!owner) continue;
      const TileTaps<T>& taps = scratch.taps[map];
      const int64_t y_end = std::min(own_rows.end, y0 + Tile::kHeight),
                    x_end = std::min(own_columns.end, x0 + Tile::kWidth);
      for (int64_t y = std::max(own_rows.begin, y0); y < y_end; ++y) {
        const T wy = weight_of(taps.y[y - y0], cy);
        for (int64_t x = std::max(own_columns.begin, x0); x < x_end; ++x) {
          const T weight = wy * weight_of(taps.x[x - x0], cx);
          if (weight != T(0)) sum += weight * pixels[(y - y0) * Tile::kWidth + (x - x0)];
        }
      }
    }
  if (owner) out.store(sum, b, k, cy, cx);
}

// What the attention is made of, and the counters of `loss`, cleared.
struct Partials {
  Tensor products, arrived;

  Partials(const Tensor& on, const Problem& p)
      : products(
            new_on_device(on, {p.cosine ? p.pairs() * p.chunks() * p.quantities() : 0}, ScalarType::Double)),
        arrived(new_on_device(on, {p.pairs()}, ScalarType::Int)) {}
};

template <class T>
Partials find_products(const CudaCall& call, const Problem& p, const Tensor& on) {
  Partials found(on, p);
  const int64_t shared = Scratch<T>::bytes(p, p.quantities() * int64_t(kWarp));
  launch(call, products<T>, grid_of(p.pairs() * p.chunks()), Tile::block(), shared, p,
         found.products.mutable_data_ptr<double>(), found.arrived.mutable_data_ptr<int32_t>());
  return found;
}

Problem problem_of(const std::vector<Tensor>& main, const std::vector<Tensor>& support,
                   const Tensor& image_labels, int64_t height, int64_t width, bool cosine) {
  check_maps(kOp, "main", main, image_labels, height, width);
  check_maps(kOp, "support", support, image_labels, height, width);
  Problem p{{},
            int(main.size()),
            AnyView<2>::of(image_labels),
            image_labels.size(0),
            image_labels.size(1),
            height,
            width,
            cosine};
  p.maps.add(kOp, "main", main);
  p.maps.add(kOp, "support", support);
  return p;
}

template <class F>
void with_accumulation_of(const std::vector<Tensor>& main, const std::vector<Tensor>& support, const F& f) {
  with_accumulation({accumulation_of(main), accumulation_of(support)}, f);
}

Tensor cam_compare_cuda(const std::vector<Tensor>& main, const std::vector<Tensor>& support,
                        const Tensor& image_labels, int64_t height, int64_t width, bool cosine) {
  const Problem p = problem_of(main, support, image_labels, height, width, cosine);
  const CudaCall call(kOp, image_labels);
  Tensor out;
  with_accumulation_of(main, support, [&](auto zero) {
    using T = decltype(zero);
    out = new_on_device(image_labels, {p.B, p.K}, scalar_type_of<T>);
    Tensor sums = new_on_device(image_labels, {p.pairs() * p.chunks()}, ScalarType::Double);
    Partials found = find_products<T>(call, p, image_labels);
    launch(call, loss<T>, grid_of(p.pairs() * p.chunks()), Tile::block(),
           Scratch<T>::bytes(p, p.mains * p.supports()), p, found.products.mutable_data_ptr<double>(),
           sums.mutable_data_ptr<double>(), found.arrived.mutable_data_ptr<int32_t>(),
           out.mutable_data_ptr<T>());
  });
  return out;
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> cam_compare_backward_cuda(
    const std::optional<Tensor>& grad_sums, const std::vector<Tensor>& main,
    const std::vector<Tensor>& support, const Tensor& image_labels, int64_t height, int64_t width,
    bool cosine, const std::vector<bool>& needs) {
  const Problem p = problem_of(main, support, image_labels, height, width, cosine);
  const CudaCall call(kOp, image_labels);
  std::vector<Tensor> grad_main, grad_support;
  Gradients g;
  g.of_sums = AnyView<2>::of(grad_sums);
  auto allocate = [&](const std::vector<Tensor>& side, bool needed, int first, std::vector<Tensor>& grads) {
    for (size_t i = 0; i < side.size() && needed; ++i) {
      grads.push_back(torch::stable::empty_like(side[i]));
      const AnyView<4> view = AnyView<4>::of(grads.back());
      g.map[g.count] = first + int(i);
      g.grad[g.count] = view;
      g.first_block[g.count + 1] = g.first_block[g.count] + p.pairs() * Gradients::tiles(view);
      ++g.count;
    }
  };
  allocate(main, needs[0], 0, grad_main);
  allocate(support, needs[1], p.mains, grad_support);
  const int64_t blocks = g.first_block[g.count];
  if (blocks == 0) return {grad_main, grad_support};
  with_accumulation_of(main, support, [&](auto zero) {
    using T = decltype(zero);
    Partials found = find_products<T>(call, p, image_labels);
    launch(call, gradient<T>, grid_of(blocks), Tile::block(), Scratch<T>::bytes(p, p.mains * p.supports()), p,
           g, found.products.mutable_data_ptr<double>());
  });
  return {grad_main, grad_support};
}

}  // namespace

PSSL_REGISTER_CUDA(m) {
  m.impl("cam_compare", TORCH_BOX(&cam_compare_cuda));
  m.impl("cam_compare_backward", TORCH_BOX(&cam_compare_backward_cuda));
}
