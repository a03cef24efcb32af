// The gradient of the features on CUDA, from the gradients of cells' products: the class vectors times their coefficients,
// sum_c q_c g_c, and the neighbours' features times theirs (identity 1).
#pragma once

#include "common/cuda_label_grid.cuh"

namespace pssl::PSSL_SIMD_NAMESPACE {

constexpr int kNeighbours = 9, kCentre = 4;  // row by row

// sum[cell] += coefficients[neighbour][cell] times the neighbours' features in one channel.
template <class T>
__device__ inline void add_neighbours(const T* cell, const T* coefficients, T (&sum)[kFour]) {
#pragma unroll
  for (int dy = 0; dy < 3; ++dy) {
    const T* row = cell + (dy - 1) * WithAround::kRow;
    const Four<T> f = four(row);
    const T values[kFour + 2] = {row[-1], f.v[0], f.v[1], f.v[2], f.v[3], row[kFour]};
#pragma unroll
    for (int dx = 0; dx < 3; ++dx) {
      const Four<T> k = four(coefficients + (dy * 3 + dx) * kTilePlane);
#pragma unroll
      for (int i = 0; i < kFour; ++i) sum[i] += times_if(k.v[i], values[i + dx]);
    }
  }
}

// The coefficient of a neighbour of a cell, from the gradients `pairs` of cell_gradients.
template <class T>
__device__ T neighbour_coefficient(const T* pairs, int64_t n, int64_t w, int64_t cell, int neighbour) {
  const T *self = pairs, *right = pairs + n, *below = pairs + 2 * n, *diagonals = pairs + 3 * n;
  switch (neighbour) {
    case 0:
      return diagonals[cell - w - 1];
    case 1:
      return below[cell - w];
    case 2:
      return diagonals[cell - w];
    case 3:
      return right[cell - 1];
    case kCentre:
      return self[cell];
    case 5:
      return right[cell];
    case 6:
      return diagonals[cell - 1];
    case 7:
      return below[cell];
    default:
      return diagonals[cell];
  }
}

template <class T>
struct Combination {
  AnyView<4> f, out;
  const T* q;
  int64_t q_image, padded;     // as in CellProducts
  const T *gradients, *pairs;  // of CellGradients; pairs null: norms do not count
  CellTiles tiles;
  int log2_channels;  // of a chunk; a warp for each four of them
  int classes;        // whose coefficients are staged at a time

  PSSL_HD int threads() const { return (1 << log2_channels) / kFour * kWarp; }
  PSSL_HD int64_t shared(int log2) const {
    return (int64_t(WithAround::kPlane) << log2) + (classes + (pairs ? kNeighbours : 0)) * kTilePlane;
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) combine(const __grid_constant__ Combination<T> p) {
  PSSL_DYNAMIC_SHARED(T, staged);
  PSSL_SHARED(at, int64_t[WithAround::kCells]);
  PSSL_SHARED(at_out, int64_t[kTileCells]);
  T* coefficients = staged + (WithAround::kPlane << p.log2_channels);
  T* of_neighbours = coefficients + p.classes * kTilePlane;
  const int64_t b = blockIdx.x / p.tiles.count(), tile = blockIdx.x % p.tiles.count();
  const int64_t cells = p.tiles.h * p.tiles.w, n = p.f.size[0] * cells;
  const int warp = block_thread() / kWarp, lane = block_thread() % kWarp;
  const int row = lane / (kTileColumns / kFour), column = lane % (kTileColumns / kFour) * kFour;
  const int64_t plane = coefficient_plane(cells);
  auto cell = [&](int j) { return p.tiles.cell(tile, j / kTileColumns, j % kTileColumns); };
  find_offsets<WithAround>(p.f, p.tiles, b, tile, at);
  find_offsets<Alone>(p.out, p.tiles, b, tile, at_out);
  for (int i = block_thread(); p.pairs && i < kNeighbours * kTileCells; i += block_threads()) {
    const int j = i % kTileCells, k = i / kTileCells, y = j / kTileColumns, x = j % kTileColumns;
    const bool both = cell(j) >= 0 && p.tiles.cell(tile, y + k / 3 - 1, x + k % 3 - 1) >= 0;
    of_neighbours[k * kTilePlane + j] =
        both ? neighbour_coefficient(p.pairs, n, p.tiles.w, b * cells + cell(j), k) : T(0);
  }
  const int64_t D = p.f.size[1];
  for (int64_t d0 = 0; d0 < D; d0 += int64_t(1) << p.log2_channels) {
    const int64_t d = d0 + warp * kFour;  // this warp's first channel
    const int channels = int(D - d < 0 ? 0 : D - d < kFour ? D - d : kFour);
    T sum[kFour][kFour] = {};
    __syncthreads();
    if (p.pairs) stage<T, WithAround>(p.f, at, d0, p.log2_channels, staged);
    for (int64_t c = 0; c < p.padded; c += p.classes) {
      const int count = int(p.padded - c < p.classes ? p.padded - c : p.classes);
      if (c > 0) __syncthreads();
      if (d0 == 0 || p.classes < p.padded)
        stage_coefficients(p.gradients + b * p.padded * plane, plane, c, count, cell, coefficients);
      __syncthreads();
      add_classes(p.q + b * p.q_image + d * p.padded + c, p.padded, channels,
                  coefficients + row * kTileColumns + column, count, sum);
    }
    T* own = staged + warp * kFour * WithAround::kPlane + WithAround::place(row, column);
#pragma unroll
    for (int k = 0; k < kFour; ++k)
      if (p.pairs)
        add_neighbours(own + k * WithAround::kPlane, of_neighbours + row * kTileColumns + column, sum[k]);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kFour; ++k)
      four(own + k * WithAround::kPlane) = {sum[k][0], sum[k][1], sum[k][2], sum[k][3]};
    __syncthreads();
    unstage<T, WithAround>(p.out, at_out, d0, p.log2_channels, staged);
  }
}

// The gradient of the features, written to `out`. q: at least one group of classes.
template <class T>
void combine_cells(const CudaCall& call, const Tensor& features, const Tensor& out, const T* q,
                   int64_t q_image, int64_t padded, const T* gradients, const T* pairs) {
  Combination<T> p{
      AnyView<4>::of(features),          AnyView<4>::of(out), q, q_image, padded, gradients, pairs, {}, 0,
      int(std::min<int64_t>(padded, 48))};
  p.tiles = {p.f.size[2], p.f.size[3], false};
  auto bytes = [&](int log2) { return p.shared(log2) * int64_t(sizeof(T)); };
  while (p.classes > kClassGroup && bytes(3) > call.limits.shared_bytes) p.classes -= kClassGroup;
  p.log2_channels = fitting_channels(call.limits, sizeof(T) == 8 ? 4 : 5, bytes);
  launch(call, combine<T>, grid_of(p.f.size[0] * p.tiles.count()), dim3(p.threads()), bytes(p.log2_channels),
         p);
}

}  // namespace pssl::PSSL_SIMD_NAMESPACE
