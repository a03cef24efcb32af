// prototype_pool where the grids are the same, in one pass over the features: a block takes the tiles of a chunk of an image's
// cells. Of each it finds the norms, what its pixels give to each class, and with the tile's features, read a second time
// soon after the first, from the cache, adds to the sums. These stay in shared memory, each number with one thread.
#pragma once

#include "common/cuda_class_sums.cuh"
#include "prototype_pool_cuda.cuh"

namespace pssl::PSSL_SIMD_NAMESPACE {
namespace pool {

// Of partial sums: more than for class_sums, whose blocks share out the channels too.
constexpr int64_t kMostPartialBytes = int64_t(16) << 20;

template <class T>
struct TileSums {
  ClassSums<T> sums;   // all classes in one pass; the coefficients are made here
  ProductWarps warps;  // for norms, or for nothing
  TilePixels<T, true> body;

  static constexpr int kEach = kFour * kFour;  // sums of a thread and chunk of channels

  // elements of shared memory: a tile's features, its coefficients and norms, the sums
  PSSL_HD int64_t shared() const {
    const int64_t tile = (int64_t(kTilePlane) << sums.log2_channels) + (sums.padded + 1) * kTilePlane;
    return tile + sums.channel_tiles() * kEach * sums.threads();
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) tile_sums(const __grid_constant__ TileSums<T> p) {
  PSSL_DYNAMIC_SHARED(T, staged);
  PSSL_SHARED(at, int64_t[kTileCells]);
  const ClassSums<T>& s = p.sums;
  T* coefficients = staged + (kTilePlane << s.log2_channels);
  T* norms = coefficients + s.padded * kTilePlane;
  const int thread = block_thread(), threads = block_threads(), count = int(s.C);
  const int64_t chunk = blockIdx.x % s.chunks, b = blockIdx.x / s.chunks, D = s.f.size[1];
  T* own = norms + kTilePlane + thread;  // sum i of the k-th chunk of channels at (k · kEach + i) · threads
  for (int64_t i = 0; i < s.channel_tiles() * p.kEach; ++i) own[i * threads] = T(0);
  for (int64_t tile = s.tiles.count() * chunk / s.chunks; tile < s.tiles.count() * (chunk + 1) / s.chunks;
       ++tile) {
    __syncthreads();
    find_offsets<Alone>(s.f, s.tiles, b, tile, at);
    if (p.warps.norms)
      tile_products<T, Alone>(s.f, nullptr, 0, p.warps, at, staged, [&](int64_t, int first, const auto& sum) {
        four(norms + first) = {sum[0][0], sum[0][1], sum[0][2], sum[0][3]};
      });
    __syncthreads();
    for (int j = thread; j < kTileCells; j += threads) {
      const int64_t cell = s.tiles.cell(tile, j / kTileColumns, j % kTileColumns);
      T* column = coefficients + j;
      bool any = false;
      if (cell >= 0) {
        p.body.pixel({b, cell / s.tiles.w, cell % s.tiles.w, true}, p.warps.norms ? norms[j] : T(1), column);
        for (int c = 0; c < count; ++c) any |= column[c * kTilePlane] != T(0);
      }
      if (any) continue;
      // Left out, not multiplied by 0: its features may be NaN.
      at[j] = -1;
      for (int64_t c = 0; c < s.padded; ++c) column[c * kTilePlane] = T(0);
    }
    for (int64_t k = 0; k < s.channel_tiles(); ++k) {
      __syncthreads();
      stage<T, Alone>(s.f, at, k << s.log2_channels, s.log2_channels, staged);
      __syncthreads();
      T sum[kFour][kFour] = {};
      add_cells(s, staged, coefficients, count, sum);
#pragma unroll
      for (int i = 0; i < p.kEach; ++i) own[(k * p.kEach + i) * threads] += sum[i / kFour][i % kFour];
    }
  }
  __syncthreads();
  const int across = s.across(), down = s.down(), all = across * down;
  if (thread >= all) return;
  for (int64_t k = 0; k < s.channel_tiles(); ++k)
    for (int i = 0; i < p.kEach; ++i) {
      const int64_t c = thread / across + down * (i / kFour);
      const int64_t d = (k << s.log2_channels) + thread % across + across * (i % kFour);
      if (c >= count || d >= D) continue;
      T sum = 0;
      for (int part = 0; part < s.parts(); ++part) sum += own[(k * p.kEach + i) * threads + part * all];
      s.partial[((b * s.chunks + chunk) * s.C + c) * D + d] = sum;
    }
}

// Starts tile_sums where the grids are the same and the sums of two blocks fit into the device's shared memory, so that one
// computes while the other waits; else false. Not in double precision: there the norms' products and the sums together
// are more than a thread's registers, and spill.
template <class T>
bool run_tile_sums(const CudaCall& call, const Tensor& features, const Tensor& labels,
                   const Pixels<T>& pixels, CellSums<T>& found) {
  if constexpr (sizeof(T) == 8)
    return false;
  else {
    const int64_t n = labels.dim(), C = pixels.masks.C;
    if (labels.size(n - 2) != features.size(2) || labels.size(n - 1) != features.size(3)) return false;
    if (C > ClassSums<T>::kClasses) return false;
    TileSums<T> p{found.problem(features, nullptr, C, pixels.padded, kMostPartialBytes), {}, {pixels}};
    auto bytes = [&](int log2) {
      p.sums.log2_channels = log2;
      return p.shared() * int64_t(sizeof(T)) * 2;
    };
    p.sums.log2_channels = fitting_channels(call.limits, sizeof(T) == 8 ? 5 : 6, bytes);
    if (bytes(p.sums.log2_channels) > call.limits.shared_bytes) return false;
    p.warps = {p.sums.log2_channels, 0, pixels.normalize, p.sums.threads() / kWarp};
    if (p.sums.partial)
      launch(call, tile_sums<T>, grid_of(p.sums.f.size[0] * found.chunks), dim3(p.sums.threads()),
             p.shared() * int64_t(sizeof(T)), p);
    return true;
  }
}

}  // namespace pool
}  // namespace pssl::PSSL_SIMD_NAMESPACE
