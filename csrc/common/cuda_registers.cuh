// Products and sums in a thread's registers: of four cells side by side, and some classes or channels.
#pragma once

#include "common/cuda_cells.cuh"

namespace pssl::PSSL_SIMD_NAMESPACE {

// sum[0..8) += f · q[0..8) of a channel, for four cells
template <class T>
__device__ inline void add_products(const Four<T>& f, const T* q, T (&sum)[kClassGroup][kFour]) {
  const Four<T> low = four(q), high = four(q + kFour);
#pragma unroll
  for (int c = 0; c < kFour; ++c)
#pragma unroll
    for (int i = 0; i < kFour; ++i) {
      sum[c][i] += f.v[i] * low.v[c];
      sum[c + kFour][i] += f.v[i] * high.v[c];
    }
}

// sum[0] += f·f
template <class T>
__device__ inline void add_squares(const Four<T>& f, T (&sum)[kFour]) {
#pragma unroll
  for (int i = 0; i < kFour; ++i) sum[i] += f.v[i] * f.v[i];
}

// With the next row and column, of identity 1 the others: sum[1] += f times the right, [2] the lower neighbour, [3] the two
// diagonals of the square whose upper left corner the cell is. `below`: the row below; `behind`, `diagonal`: the cells
// behind the two rows.
template <class T, int kSums>
__device__ inline void add_pairs(const Four<T>& f, const Four<T>& below, T behind, T diagonal,
                                 T (&sum)[kSums][kFour]) {
#pragma unroll
  for (int i = 0; i < kFour; ++i) {
    const T right = i + 1 < kFour ? f.v[(i + 1) % kFour] : behind;
    const T below_right = i + 1 < kFour ? below.v[(i + 1) % kFour] : diagonal;
    sum[1][i] += f.v[i] * right;
    sum[2][i] += f.v[i] * below.v[i];
    sum[3][i] += f.v[i] * below_right + right * below.v[i];
  }
}

// sum[channel][cell] += sum_c q[channel][c] g[c][cell] for kChannels channels, `padded` apart in q, `channels` of which
// there are, and classes [0, count), a multiple of 4.
template <class T, int kChannels>
__device__ inline void add_classes(const T* q, int64_t padded, int channels, const T* coefficients, int count,
                                   T (&sum)[kChannels][kFour]) {
#pragma unroll 1
  for (int c = 0; c < count; c += kFour) {
    Four<T> g[kFour];
#pragma unroll
    for (int k = 0; k < kFour; ++k) g[k] = four(coefficients + (c + k) * kTilePlane);
#pragma unroll
    for (int d = 0; d < kChannels; ++d) {
      if (d >= channels) break;
      const Four<T> vectors = four(q + d * padded + c);
#pragma unroll
      for (int k = 0; k < kFour; ++k)
#pragma unroll
        for (int i = 0; i < kFour; ++i) sum[d][i] += vectors.v[k] * g[k].v[i];
    }
  }
}

// 0 · NaN: a cell that no counted pixel touches must not pass its NaN on.
template <class T>
__device__ inline T times_if(T coefficient, T value) {
  return coefficient != T(0) ? coefficient * value : T(0);
}

}  // namespace pssl::PSSL_SIMD_NAMESPACE
