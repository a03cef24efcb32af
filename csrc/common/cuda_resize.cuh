// CAM maps read at another size by blocks that take a tile of pixels at a time, with the references' rounding.
//
// The weights of a tile's rows and columns are computed once (in double: see axis_weight) and shared by its threads,
// by all classes, and by all images at the same place.
#pragma once

#include "common/cam_maps.h"
#include "common/cuda_tile.cuh"
#include "common/cuda_views.cuh"
#include "common/stepwise.h"

namespace pssl::PSSL_SIMD_NAMESPACE {

// Maps travel in the kernel's parameters.
constexpr int kMostMaps = 24;

// One image's maps [k,h,w] as a batch of one.
inline AnyView<4> one_image(const Tensor& maps) {
  AnyView<4> v;
  const AnyView<3> of = AnyView<3>::of(maps);
  v.size[0] = 1, v.stride[0] = 0;
  for (int i = 0; i < 3; ++i) v.size[i + 1] = of.size[i], v.stride[i + 1] = of.stride[i];
  v.data = of.data, v.type = of.type;
  return v;
}

struct MapList {
  int count = 0;
  AnyView<4> map[kMostMaps];  // [B,K,h,w] each

  void add(const char* op, const char* argument, const std::vector<Tensor>& maps) {
    STD_TORCH_CHECK(count + maps.size() <= kMostMaps, op, ": ", argument, ": the CUDA kernel takes at most ",
                    kMostMaps, " maps in all, got ", count + maps.size());
    for (const Tensor& t : maps) map[count++] = AnyView<4>::of(t);
  }
};

// A weight of the resize along one axis, in the type of the values.
template <class T>
struct Tap {
  int64_t index;
  T fraction;
};

template <class T>
__device__ inline Tap<T> axis_tap(int64_t out, int64_t in_size, int64_t out_size) {
  const AxisWeight weight = axis_weight(out, in_size, out_size, false);
  return {weight.index, T(weight.fraction)};
}

// map[b,k] resized, at the pixel of the two taps.
template <class T>
__device__ T resized(const AnyView<4>& map, int64_t b, int64_t k, Tap<T> y, Tap<T> x, bool same) {
  if (same) return map.template floating<T>(b, k, y.index, x.index);
  const int64_t below = y.index + 1 < map.size[2] ? y.index + 1 : y.index;
  const int64_t right = x.index + 1 < map.size[3] ? x.index + 1 : x.index;
  return blend_cells_stepwise(map.template floating<T>(b, k, y.index, x.index),
                              map.template floating<T>(b, k, y.index, right),
                              map.template floating<T>(b, k, below, x.index),
                              map.template floating<T>(b, k, below, right), y.fraction, x.fraction);
}

// The taps of one map's tile.
template <class T>
struct TileTaps {
  Tap<T> x[Tile::kWidth], y[Tile::kHeight];
  bool same;  // nothing to resize
};

// taps[0..count) for the maps; ends with a barrier, and begins with one, so that the last tile's readers have finished.
template <class T>
__device__ void find_taps(const Tile& tile, const AnyView<4>* maps, int count, TileTaps<T>* taps) {
  constexpr int kEach = Tile::kWidth + Tile::kHeight;
  __syncthreads();
  for (int i = block_thread(); i < count * kEach; i += Tile::kThreads) {
    const AnyView<4>& map = maps[i / kEach];
    TileTaps<T>& to = taps[i / kEach];
    const int j = i % kEach;
    if (j < Tile::kWidth) {
      to.x[j] = axis_tap<T>(tile.x0 + j, map.size[3], tile.W);
    } else {
      to.y[j - Tile::kWidth] = axis_tap<T>(tile.y0 + j - Tile::kWidth, map.size[2], tile.H);
    }
    if (j == 0) to.same = map.size[2] == tile.H && map.size[3] == tile.W;
  }
  __syncthreads();
}

// map[b,k] at this thread's pixel, which has to be inside.
template <class T>
__device__ T resized_at_thread(const AnyView<4>& map, const TileTaps<T>& taps, int64_t b, int64_t k) {
  return resized(map, b, k, taps.y[threadIdx.y], taps.x[threadIdx.x], taps.same);
}

}  // namespace pssl::PSSL_SIMD_NAMESPACE
