// Feature grid and label grid the same, on CUDA: a block takes a tile of cells through all steps. What their pixels come to
// stays in shared memory; where the gradient of the features is wanted, its tile of the features is read a second time soon
// after the first, from the cache.
#pragma once

#include "common/cuda_combine.cuh"

namespace pssl::PSSL_SIMD_NAMESPACE {

template <class T>
struct SameGrid {
  AnyView<4> f, out;        // out: the features' gradient; no data: not wanted
  const T* q;               // as in CellProducts
  int64_t q_image, padded;  // padded = 0: no coefficients
  T* gradients;             // [B,padded,plane], or null
  int64_t products;         // padded, or 0: no products
  bool norms;
  CellTiles tiles;
  ProductWarps warps;  // where features are staged

  // elements beside what is staged: a row a class, and one for the norms
  static PSSL_HD int64_t rows(int64_t padded) { return (padded + 1) * kTilePlane; }
  int64_t shared() const {
    return (warps.template staged<Alone>(warps.log2_channels) + rows(padded)) * int64_t(sizeof(T));
  }
};

// value = body.pixel(pixel, |f|^2, column) for each pixel of a tile; column[c · kTilePlane] holds the product with class c
// and receives its gradient. Where Body::kForward, the values of the block go to body.finish(sum); else they are d loss /
// d|f|^2, and twice that takes the norm's place. Starts and ends with a barrier.
template <class T, class Body>
__device__ void tile_pixels(const SameGrid<T>& p, const Body& body, int64_t b, int64_t tile, T* rows) {
  PSSL_SHARED(scratch, double[kWarp]);
  T* norms = rows + p.padded * kTilePlane;
  const int thread = block_thread();
  __syncthreads();
  double sum = 0;
  for (int j = thread; j < kTileCells; j += block_threads()) {
    const int64_t cell = p.tiles.cell(tile, j / kTileColumns, j % kTileColumns);
    T value = 0;
    if (cell >= 0) {
      const Pixel pixel{b, cell / p.tiles.w, cell % p.tiles.w, true};
      value = body.pixel(pixel, p.norms ? norms[j] : T(1), rows + j);
    } else {
      for (int64_t c = 0; c < p.padded; ++c) rows[c * kTilePlane + j] = T(0);
    }
    if constexpr (Body::kForward) {
      sum += double(value);
    } else {
      norms[j] = T(2) * value;
    }
  }
  if constexpr (Body::kForward) {
    const double all = block_sum(sum, scratch);
    if (thread == 0) body.finish(all);
  }
  __syncthreads();
  if (!p.gradients) return;
  const int64_t plane = coefficient_plane(p.tiles.h * p.tiles.w), first = tile * kTileCells;
  T* out = p.gradients + b * p.padded * plane + first;
  for (int64_t i = thread; i < p.padded * (kTileCells / kFour); i += block_threads()) {
    const int64_t c = i / (kTileCells / kFour), j = i % (kTileCells / kFour) * kFour;
    if (first + j < plane) four(out + c * plane + j) = four(rows + c * kTilePlane + j);
  }
}

template <class T, class Body>
__global__ void __launch_bounds__(kThreads)
    same_grid(const __grid_constant__ SameGrid<T> p, const __grid_constant__ Body body) {
  PSSL_DYNAMIC_SHARED(T, staged);
  PSSL_SHARED(at, int64_t[kTileCells]);
  T* rows = staged + p.warps.template staged<Alone>(p.warps.log2_channels);
  T* norms = rows + p.padded * kTilePlane;
  const int64_t b = blockIdx.x / p.tiles.count(), tile = blockIdx.x % p.tiles.count();
  const int warp = block_thread() / kWarp, place = block_thread() % kWarp * kFour;
  find_offsets<Alone>(p.f, p.tiles, b, tile, at);
  if (p.warps.each() > 0)
    tile_products<T, Alone>(p.f, p.q + b * p.q_image, p.products, p.warps, at, staged,
                            [&](int64_t c, int first, const auto& sum) {
                              T* row = c < 0 ? norms : rows + c * kTilePlane;
#pragma unroll
                              for (int k = 0; k < kClassGroup; ++k)
                                if (c >= 0 || k == 0)
                                  four(row + k * kTilePlane + first) = {sum[k][0], sum[k][1], sum[k][2],
                                                                        sum[k][3]};
                            });
  tile_pixels(p, body, b, tile, rows);
  if constexpr (!Body::kForward) {
    if (!p.out.data) return;
    PSSL_SHARED(at_out, int64_t[kTileCells]);
    find_offsets<Alone>(p.out, p.tiles, b, tile, at_out);
    const Four<T> of_norm = four(norms + place);
    const int64_t D = p.f.size[1];
    for (int64_t d0 = 0; d0 < D; d0 += int64_t(1) << p.warps.log2_channels) {
      __syncthreads();
      if (p.norms) stage<T, Alone>(p.f, at, d0, p.warps.log2_channels, staged);
      __syncthreads();
      for (int k = warp * kFour; k < 1 << p.warps.log2_channels; k += block_threads() / kWarp * kFour) {
        const int channels = int(D - d0 - k < 0 ? 0 : D - d0 - k < kFour ? D - d0 - k : kFour);
        T of[kFour][kFour] = {};
        add_classes(p.q + b * p.q_image + (d0 + k) * p.padded, p.padded, channels, rows + place,
                    int(p.padded), of);
#pragma unroll
        for (int d = 0; d < kFour; ++d) {
          Four<T>& own = four(staged + (k + d) * kTilePlane + place);
#pragma unroll
          for (int i = 0; i < kFour; ++i)
            own.v[i] = p.norms ? of[d][i] + times_if(of_norm.v[i], own.v[i]) : of[d][i];
        }
      }
      __syncthreads();
      unstage<T, Alone>(p.out, at_out, d0, p.warps.log2_channels, staged);
    }
  }
}

// The same in quads.
template <class Body>
__global__ void __launch_bounds__(QuadTile::kMost* kWarp)
    same_grid_quads(const __grid_constant__ SameGrid<float> p, const __grid_constant__ QuadTile shape,
                    const __grid_constant__ Body body) {
  PSSL_DYNAMIC_SHARED(float, area);
  PSSL_SHARED(at, int64_t[kTileCells]);
  float *rows = area + shape.area(), *norms = rows + p.padded * kTilePlane;
  const int64_t b = blockIdx.x / p.tiles.count(), tile = blockIdx.x % p.tiles.count(), D = p.f.size[1];
  const float* q = p.q + b * p.q_image;
  const int place = block_thread() % kWarp * kFour;
  find_offsets<Alone>(p.f, p.tiles, b, tile, at);
  __syncthreads();
  with_element<float>(p.f.type, [&](auto zero) {
    const Quad<const decltype(zero)> quad(p.f, at + place);
    quad_products(quad, D, q, p.products, shape, area, rows, p.norms ? norms : nullptr);
  });
  tile_pixels(p, body, b, tile, rows);
  if constexpr (!Body::kForward) {
    if (!p.out.data) return;
    PSSL_SHARED(at_out, int64_t[kTileCells]);
    find_offsets<Alone>(p.out, p.tiles, b, tile, at_out);
    __syncthreads();
    with_element<float>(p.f.type, [&](auto zero) {
      using S = decltype(zero);
      quad_gradients(Quad<const S>(p.f, at + place), Quad<S>(p.out, at_out + place), D, q, p.padded, shape,
                     area, rows, p.norms ? norms : nullptr);
    });
  }
}

// Starts either where the grids are the same and a tile's pixels fit into the device's shared memory beside the features;
// else false: the steps of the label grid do the same.
template <class T, class Body>
bool run_same_grid(const CudaCall& call, const Tensor& features, const Tensor& labels, SameGrid<T> p,
                   const Body& body) {
  const int64_t n = labels.dim();
  if (labels.size(n - 2) != features.size(2) || labels.size(n - 1) != features.size(3)) return false;
  p.f = AnyView<4>::of(features);
  p.tiles = {features.size(2), features.size(3), true};
  const int64_t rows = SameGrid<T>::rows(p.padded);
  const dim3 grid = grid_of(features.size(0) * p.tiles.count());
  if constexpr (sizeof(T) == sizeof(float)) {
    const QuadTile shape = QuadTile::fitting(call.limits, rows);
    if (in_quads<T>(p.f) && (!p.out.data || in_quads<T>(p.out)) && shape.parts > 0 &&
        shape.channels(p.padded) >= QuadTile::kGradientChannels) {
      launch(call, same_grid_quads<Body>, grid, dim3(shape.threads()), shape.bytes(rows), p, shape, body);
      return true;
    }
  }
  p.warps = product_warps<T, Alone>(call.limits, p.products, p.norms, rows * int64_t(sizeof(T)));
  if (p.shared() > call.limits.shared_bytes) return false;
  launch(call, same_grid<T, Body>, grid, dim3(p.warps.threads()), p.shared(), p, body);
  return true;
}

}  // namespace pssl::PSSL_SIMD_NAMESPACE
