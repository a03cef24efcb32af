// Maps cut into tiles for blocks of threads, and how many maps a thread works on at its pixel.
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

// Stencils over several maps that share their weights: calls f(maps) with the number of maps, a power of two up to
// 8, that a thread takes at its pixel, as a constant. More maps share one reading of the weights; fewer make more blocks:
// as few as fill the device. A map's result does not depend on it.
template <class F>
void with_maps_a_thread(const CudaCall& call, int64_t tiles, int64_t maps, const F& f) {
  int64_t most = 8;
  while (most > 1 && (most >= 2 * maps || tiles * ((maps + most - 1) / most) < call.limits.processors))
    most /= 2;
  switch (most) {
    case 1:
      return f(std::integral_constant<int, 1>{});
    case 2:
      return f(std::integral_constant<int, 2>{});
    case 4:
      return f(std::integral_constant<int, 4>{});
    default:
      return f(std::integral_constant<int, 8>{});
  }
}

// What a block of such a launch works on: a tile, an image, and of its maps [first, first + C), C the constant above.
struct TileOfMaps {
  int64_t maps, H, W, images = 1;

  PSSL_HD int64_t tiles() const { return Tile::count(H, W); }
  template <int C>
  PSSL_HD int64_t groups() const {
    return (maps + C - 1) / C;
  }
  template <int C>
  dim3 grid() const {
    return grid_of(tiles() * groups<C>() * images);
  }
  __device__ Tile tile() const { return Tile::at(blockIdx.x % tiles(), H, W); }
  template <int C>
  __device__ int64_t first() const {
    return blockIdx.x / tiles() % groups<C>() * C;
  }
  template <int C>
  __device__ int64_t image() const {
    return blockIdx.x / tiles() / groups<C>();
  }
};

}  // namespace pssl::PSSL_SIMD_NAMESPACE
