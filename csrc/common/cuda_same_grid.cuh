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
  int64_t q_image, padded;  // padded = 0: no products, no coefficients
  T* gradients;             // [B,h,w,padded], or null
  CellTiles tiles;
  ProductWarps warps;

  // bytes beside what is staged: a row a class, and one for the norms
  static int64_t rows(int64_t padded) { return (padded + 1) * kTilePlane * int64_t(sizeof(T)); }
  int64_t shared() const {
    return warps.template staged<Alone>(warps.log2_channels) * int64_t(sizeof(T)) + rows(padded);
  }
};

// value = body.pixel(pixel, |f|^2, column) for each pixel; column[c · kTilePlane] holds the product with class c and receives
// its gradient. Where Body::kForward, the values of the block go to body.finish(sum); else they are d loss / d|f|^2.
template <class T, class Body>
__global__ void __launch_bounds__(kThreads)
    same_grid(const __grid_constant__ SameGrid<T> p, const __grid_constant__ Body body) {
  PSSL_DYNAMIC_SHARED(T, staged);
  PSSL_SHARED(at, int64_t[kTileCells]);
  PSSL_SHARED(scratch, double[kWarp]);
  T* rows = staged + p.warps.template staged<Alone>(p.warps.log2_channels);
  T* norms = rows + p.padded * kTilePlane;
  const int64_t b = blockIdx.x / p.tiles.count(), tile = blockIdx.x % p.tiles.count();
  const int thread = block_thread(), warp = thread / kWarp, place = thread % kWarp * kFour;
  find_offsets<Alone>(p.f, p.tiles, b, tile, at);
  if (p.warps.each() > 0)
    tile_products<T, Alone>(p.f, p.q + b * p.q_image, p.warps.groups > 0 ? p.padded : 0, p.warps, at, staged,
                            [&](int64_t c, int first, const auto& sum) {
                              T* row = c < 0 ? norms : rows + c * kTilePlane;
#pragma unroll
                              for (int k = 0; k < kClassGroup; ++k)
                                if (c >= 0 || k == 0)
                                  four(row + k * kTilePlane + first) = {sum[k][0], sum[k][1], sum[k][2],
                                                                        sum[k][3]};
                            });
  __syncthreads();
  double sum = 0;
  for (int j = thread; j < kTileCells; j += block_threads()) {
    const int64_t cell = p.tiles.cell(tile, j / kTileColumns, j % kTileColumns);
    T value = 0;
    if (cell >= 0) {
      const Pixel pixel{b, cell / p.tiles.w, cell % p.tiles.w, true};
      value = body.pixel(pixel, p.warps.norms ? norms[j] : T(1), rows + j);
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
  const int64_t cells = p.tiles.h * p.tiles.w;
  for (int64_t i = thread; p.gradients && i < kTileCells * p.padded; i += block_threads()) {
    const int j = int(i / p.padded);
    const int64_t c = i % p.padded, cell = p.tiles.cell(tile, j / kTileColumns, j % kTileColumns);
    if (cell >= 0) p.gradients[(b * cells + cell) * p.padded + c] = rows[c * kTilePlane + j];
  }
  if constexpr (!Body::kForward) {
    if (!p.out.data) return;
    PSSL_SHARED(at_out, int64_t[kTileCells]);
    find_offsets<Alone>(p.out, p.tiles, b, tile, at_out);
    const Four<T> of_norm = four(norms + place);
    const int64_t D = p.f.size[1];
    for (int64_t d0 = 0; d0 < D; d0 += int64_t(1) << p.warps.log2_channels) {
      __syncthreads();
      if (p.warps.norms) stage<T, Alone>(p.f, at, d0, p.warps.log2_channels, staged);
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
            own.v[i] = p.warps.norms ? of[d][i] + times_if(of_norm.v[i], own.v[i]) : of[d][i];
        }
      }
      __syncthreads();
      unstage<T, Alone>(p.out, at_out, d0, p.warps.log2_channels, staged);
    }
  }
}

// Starts same_grid where the grids are the same and a tile's pixels fit into the device's shared memory beside the staged
// features; else false: the steps of the label grid do the same. `products`: padded classes to multiply with, or 0.
template <class T, class Body>
bool run_same_grid(const CudaCall& call, const Tensor& features, const Tensor& labels, SameGrid<T> p,
                   int64_t products, bool norms, const Body& body) {
  const int64_t n = labels.dim();
  if (labels.size(n - 2) != features.size(2) || labels.size(n - 1) != features.size(3)) return false;
  p.f = AnyView<4>::of(features);
  p.tiles = {features.size(2), features.size(3), true};
  p.warps = product_warps<T, Alone>(call.limits, products, norms, SameGrid<T>::rows(p.padded));
  if (p.shared() > call.limits.shared_bytes) return false;
  launch(call, same_grid<T, Body>, grid_of(features.size(0) * p.tiles.count()), dim3(p.warps.threads()),
         p.shared(), p, body);
  return true;
}

}  // namespace pssl::PSSL_SIMD_NAMESPACE
