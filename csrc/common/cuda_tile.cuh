// Maps cut into tiles for blocks of threads.
#pragma once

#include "common/bilinear.h"
#include "common/cuda_block.cuh"

namespace pssl::PSSL_SIMD_NAMESPACE {

// A tile of pixels of which a thread takes kRows, one above the other: neighbours in a column mostly lie between the same
// cells, and what they load is on its way together.
template <int kRows>
struct TallTile {
  static constexpr int kWidth = 32, kThreads = 256, kHeight = kThreads / kWidth * kRows;

  int64_t y0, x0, H, W;

  // How many tiles a map of H×W has; `index` counts them row by row.
  PSSL_HD static int64_t across(int64_t W) { return (W + kWidth - 1) / kWidth; }
  PSSL_HD static int64_t count(int64_t H, int64_t W) { return (H + kHeight - 1) / kHeight * across(W); }
  __device__ static TallTile at(int64_t index, int64_t H, int64_t W) {
    return {index / across(W) * kHeight, index % across(W) * kWidth, H, W};
  }
  static dim3 block() { return dim3(kWidth, kThreads / kWidth); }

  __device__ int64_t y(int row = 0) const { return y0 + threadIdx.y * kRows + row; }
  __device__ int64_t x() const { return x0 + threadIdx.x; }
  __device__ bool inside(int row = 0) const { return y(row) < H && x() < W; }
};
using Tile = TallTile<1>;  // one a thread

}  // namespace pssl::PSSL_SIMD_NAMESPACE
