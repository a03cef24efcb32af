// The gradient of the features on CUDA, from the gradients of cells' products: the class vectors times their coefficients,
// sum_c q_c g_c, and the neighbours' features times theirs (identity 1).
#pragma once

#include "common/cuda_label_grid.cuh"

namespace pssl::PSSL_SIMD_NAMESPACE {

constexpr int kNeighbours = 9, kCentre = 4;  // row by row

// sum[cell] += a row of three neighbours' coefficients times their features in one channel: those of the four cells, and
// of the cells before and behind.
template <class T>
__device__ inline void add_neighbours(T before, const Four<T>& f, T behind, const Four<T>* coefficients,
                                      T (&sum)[kFour]) {
  const T values[kFour + 2] = {before, f.v[0], f.v[1], f.v[2], f.v[3], behind};
#pragma unroll
  for (int dx = 0; dx < 3; ++dx)
#pragma unroll
    for (int i = 0; i < kFour; ++i) sum[i] += times_if(coefficients[dx].v[i], values[i + dx]);
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

// of_neighbours[neighbour][cell of the tile] from `pairs`; 0 where there is no such neighbour.
template <class T>
__device__ void stage_neighbours(const Combination<T>& p, int64_t b, int64_t tile, T* of_neighbours) {
  const int64_t cells = p.tiles.h * p.tiles.w, n = p.f.size[0] * cells;
#pragma unroll 4
  for (int i = block_thread(); i < kNeighbours * kTileCells; i += block_threads()) {
    const int j = i % kTileCells, k = i / kTileCells, y = j / kTileColumns, x = j % kTileColumns;
    const int64_t cell = p.tiles.cell(tile, y, x);
    const bool both = cell >= 0 && p.tiles.cell(tile, y + k / 3 - 1, x + k % 3 - 1) >= 0;
    of_neighbours[k * kTilePlane + j] =
        both ? neighbour_coefficient(p.pairs, n, p.tiles.w, b * cells + cell, k) : T(0);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) combine(const __grid_constant__ Combination<T> p) {
  PSSL_DYNAMIC_SHARED(T, staged);
  PSSL_SHARED(at, int64_t[WithAround::kCells]);
  PSSL_SHARED(at_out, int64_t[kTileCells]);
  T* coefficients = staged + (WithAround::kPlane << p.log2_channels);
  T* of_neighbours = coefficients + p.classes * kTilePlane;
  const int64_t b = blockIdx.x / p.tiles.count(), tile = blockIdx.x % p.tiles.count();
  const int warp = block_thread() / kWarp, lane = block_thread() % kWarp;
  const int row = lane / (kTileColumns / kFour), column = lane % (kTileColumns / kFour) * kFour;
  const int64_t plane = coefficient_plane(p.tiles.h * p.tiles.w);
  auto cell = [&](int j) { return p.tiles.cell(tile, j / kTileColumns, j % kTileColumns); };
  find_offsets<WithAround>(p.f, p.tiles, b, tile, at);
  find_offsets<Alone>(p.out, p.tiles, b, tile, at_out);
  if (p.pairs) stage_neighbours(p, b, tile, of_neighbours);
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
    for (int k = 0; k < kFour; ++k) {
      if (!p.pairs) break;
#pragma unroll
      for (int dy = 0; dy < 3; ++dy) {
        const T* at_row = own + k * WithAround::kPlane + (dy - 1) * WithAround::kRow;
        Four<T> of_row[3];
#pragma unroll
        for (int dx = 0; dx < 3; ++dx)
          of_row[dx] = four(of_neighbours + (dy * 3 + dx) * kTilePlane + row * kTileColumns + column);
        add_neighbours(at_row[-1], four(at_row), at_row[kFour], of_row, sum[k]);
      }
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kFour; ++k)
      four(own + k * WithAround::kPlane) = {sum[k][0], sum[k][1], sum[k][2], sum[k][3]};
    __syncthreads();
    unstage<T, WithAround>(p.out, at_out, d0, p.log2_channels, staged);
  }
}

// The same in quads: warps share the channels of a tile, whose coefficients stay in shared memory.
struct QuadCombination {
  int channels;  // whose vectors are staged at a time

  static constexpr int kWarps = 8, kMost = 128;

  // floats of shared memory
  PSSL_HD int64_t shared(int64_t padded) const {
    return channels * padded + (padded + kNeighbours) * kTilePlane;
  }
};

template <class T>
__global__ void __launch_bounds__(QuadCombination::kWarps* kWarp)
    quad_combine(const __grid_constant__ Combination<T> p, const __grid_constant__ QuadCombination shape) {
  PSSL_DYNAMIC_SHARED(float, vectors);
  PSSL_SHARED(at, int64_t[WithAround::kCells]);
  PSSL_SHARED(at_out, int64_t[kTileCells]);
  float *coefficients = vectors + shape.channels * p.padded,
        *of_neighbours = coefficients + p.padded * kTilePlane;
  const int64_t b = blockIdx.x / p.tiles.count(), tile = blockIdx.x % p.tiles.count(), D = p.f.size[1];
  const int64_t plane = coefficient_plane(p.tiles.h * p.tiles.w);
  const int warp = block_thread() / kWarp, place = block_thread() % kWarp * kFour;
  find_offsets<WithAround>(p.f, p.tiles, b, tile, at);
  find_offsets<Alone>(p.out, p.tiles, b, tile, at_out);
  if (p.pairs) stage_neighbours(p, b, tile, of_neighbours);
  stage_coefficients(
      p.gradients + b * p.padded * plane, plane, 0, int(p.padded),
      [&](int j) { return p.tiles.cell(tile, j / kTileColumns, j % kTileColumns); }, coefficients);
  __syncthreads();
  with_element<float>(p.f.type, [&](auto zero) {
    using S = decltype(zero);
    const int64_t* first = at + place / kTileColumns * WithAround::kColumns + place % kTileColumns;
    const Quad<const S> above(p.f, first + 1), own(p.f, first + WithAround::kColumns + 1),
        below(p.f, first + 2 * WithAround::kColumns + 1);
    const Quad<S> out(p.out, at_out + place);
    struct Row {
      Stored<S> f;
      S before, behind;
    };
    auto load = [&](const Quad<const S>& row, int dy, int64_t d) {
      const int64_t *offset = first + dy * WithAround::kColumns, before = offset[0],
                    behind = offset[kFour + 1];
      return Row{row.load(d), before >= 0 ? row.data[before + d * row.stride] : S(0.0f),
                 behind >= 0 ? row.data[behind + d * row.stride] : S(0.0f)};
    };
    Four<float> of_pairs[kNeighbours] = {};
    if (p.pairs)
#pragma unroll
      for (int k = 0; k < kNeighbours; ++k) of_pairs[k] = four(of_neighbours + k * kTilePlane + place);
    for (int64_t d0 = 0; d0 < D; d0 += shape.channels) {
      const int count = int(D - d0 < shape.channels ? D - d0 : shape.channels);
      __syncthreads();
      stage_vectors(p.q + b * p.q_image + d0 * p.padded, p.padded, 0, count, int(p.padded), vectors);
      __syncthreads();
#pragma unroll 1
      for (int d = warp * kFour; d < count; d += QuadCombination::kWarps * kFour) {
        const int channels = count - d < kFour ? count - d : kFour;
        Row rows[kFour][3] = {};
#pragma unroll
        for (int k = 0; k < kFour; ++k)
          if (p.pairs && k < channels)
            rows[k][0] = load(above, 0, d0 + d + k), rows[k][1] = load(own, 1, d0 + d + k),
            rows[k][2] = load(below, 2, d0 + d + k);
        float sum[kFour][kFour] = {};
        add_classes(vectors + d * p.padded, p.padded, channels, coefficients + place, int(p.padded), sum);
#pragma unroll
        for (int k = 0; k < kFour; ++k) {
          if (k >= channels) break;
#pragma unroll
          for (int dy = 0; dy < 3; ++dy)
            add_neighbours(converted<float>(rows[k][dy].before), floats(rows[k][dy].f),
                           converted<float>(rows[k][dy].behind), of_pairs + dy * 3, sum[k]);
          out.store(d0 + d + k, {sum[k][0], sum[k][1], sum[k][2], sum[k][3]});
        }
      }
    }
  });
}

// Starts it where the maps are read in quads and what it stages fits into shared memory; else false.
inline bool run_quad_combine(const CudaCall& call, const Combination<float>& p) {
  if (!in_quads<float>(p.f) || !in_quads<float>(p.out)) return false;
  QuadCombination shape{QuadCombination::kMost};
  auto bytes = [&] { return shape.shared(p.padded) * int64_t(sizeof(float)); };
  while (shape.channels > QuadCombination::kWarps * kFour && bytes() > call.limits.shared_bytes)
    shape.channels /= 2;
  if (bytes() > call.limits.shared_bytes) return false;
  launch(call, quad_combine<float>, grid_of(p.f.size[0] * p.tiles.count()),
         dim3(QuadCombination::kWarps * kWarp), bytes(), p, shape);
  return true;
}

// The gradient of the features, written to `out`. q: at least one group of classes.
template <class T>
void combine_cells(const CudaCall& call, const Tensor& features, const Tensor& out, const T* q,
                   int64_t q_image, int64_t padded, const T* gradients, const T* pairs) {
  Combination<T> p{
      AnyView<4>::of(features),          AnyView<4>::of(out), q, q_image, padded, gradients, pairs, {}, 0,
      int(std::min<int64_t>(padded, 48))};
  p.tiles = {p.f.size[2], p.f.size[3], false};
  if constexpr (sizeof(T) == sizeof(float))
    if (run_quad_combine(call, p)) return;
  auto bytes = [&](int log2) { return p.shared(log2) * int64_t(sizeof(T)); };
  while (p.classes > kClassGroup && bytes(3) > call.limits.shared_bytes) p.classes -= kClassGroup;
  p.log2_channels = fitting_channels(call.limits, sizeof(T) == 8 ? 4 : 5, bytes);
  launch(call, combine<T>, grid_of(p.f.size[0] * p.tiles.count()), dim3(p.threads()), bytes(p.log2_channels),
         p);
}

}  // namespace pssl::PSSL_SIMD_NAMESPACE
