// Maps cut into tiles for blocks of threads.
#pragma once

#include "common/bilinear.h"
#include "common/cuda_block.cuh"

namespace pssl::PSSL_SIMD_NAMESPACE {

// A tile of pixels, one a thread of a block of dim3(kWidth, kHeight).
struct Tile {
  static constexpr int kWidth = 32, kHeight = 8, kThreads = kWidth * kHeight;

  int64_t y0, x0, H, W;

  // How many tiles a map of H×W has; `index` counts them row by row.
  PSSL_HD static int64_t across(int64_t W) { return (W + kWidth - 1) / kWidth; }
  PSSL_HD static int64_t count(int64_t H, int64_t W) { return (H + kHeight - 1) / kHeight * across(W); }
  __device__ static Tile at(int64_t index, int64_t H, int64_t W) {
    return {index / across(W) * kHeight, index % across(W) * kWidth, H, W};
  }
  static dim3 block() { return dim3(kWidth, kHeight); }

  __device__ int64_t y() const { return y0 + threadIdx.y; }
  __device__ int64_t x() const { return x0 + threadIdx.x; }
  __device__ bool inside() const { return y() < H && x() < W; }
};

}  // namespace pssl::PSSL_SIMD_NAMESPACE
