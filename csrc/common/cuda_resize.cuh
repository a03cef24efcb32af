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

// Calls f with the elements of a floating tensor, as a pointer of their type: one choice for all that f loads.
template <class F>
__device__ auto with_elements(const void* data, ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Float:
      return f(static_cast<const float*>(data));
    case ScalarType::Double:
      return f(static_cast<const double*>(data));
    case ScalarType::Half:
      return f(static_cast<const Half*>(data));
    default:
      return f(static_cast<const BFloat16*>(data));
  }
}

template <class T, class S>
__device__ T element(const S* at) {
  if constexpr (sizeof(S) < sizeof(float)) {
    return T(static_cast<float>(*at));
  } else {
    return T(*at);
  }
}

// The four cells between which a pixel of a resized map lies.
template <class T>
struct Cells {
  T above_left, above_right, below_left, below_right;

  // map[b,k] starts at `plane`. Where nothing is to be resized all four are the one: no branch that waits for it.
  __device__ void load(const AnyView<4>& map, int64_t plane, int64_t y, int64_t x, bool same) {
    const int64_t down = same || y + 1 == map.size[2] ? 0 : map.stride[2];
    const int64_t right = same || x + 1 == map.size[3] ? 0 : map.stride[3];
    *this = with_elements(map.data, map.type, [=](const auto* data) -> Cells {
      data += plane + y * map.stride[2] + x * map.stride[3];
      return {element<T>(data), element<T>(data + right), element<T>(data + down),
              element<T>(data + down + right)};
    });
  }
  __device__ T blend(T ty, T tx, bool same) const {
    return same ? above_left : blend_cells_stepwise(above_left, above_right, below_left, below_right, ty, tx);
  }
};

// The taps of one map's tile.
template <class T, int kRows = 1>
struct TileTaps {
  Tap<T> x[TallTile<kRows>::kWidth], y[TallTile<kRows>::kHeight];  // beyond the last pixel: of the last cell
  bool same;                                                       // nothing to resize
};

// taps[0..count) for the maps; ends with a barrier, and begins with one, so that the last tile's readers have finished.
template <class T, int kRows>
__device__ void find_taps(const TallTile<kRows>& tile, const AnyView<4>* maps, int count,
                          TileTaps<T, kRows>* taps) {
  constexpr int kWidth = TallTile<kRows>::kWidth, kEach = kWidth + TallTile<kRows>::kHeight;
  __syncthreads();
  for (int i = block_thread(); i < count * kEach; i += Tile::kThreads) {
    const AnyView<4>& map = maps[i / kEach];
    TileTaps<T, kRows>& to = taps[i / kEach];
    const int j = i % kEach;
    if (j < kWidth) {
      to.x[j] = axis_tap<T>(tile.x0 + j, map.size[3], tile.W);
    } else {
      to.y[j - kWidth] = axis_tap<T>(tile.y0 + j - kWidth, map.size[2], tile.H);
    }
    if (j == 0) to.same = map.size[2] == tile.H && map.size[3] == tile.W;
  }
  __syncthreads();
}

// map[b,k] resized at this thread's pixels; those outside repeat the last cells.
template <class T, int kRows>
__device__ void resize_at_thread(const AnyView<4>& map, const TileTaps<T, kRows>& taps, int64_t b, int64_t k,
                                 T (&value)[kRows]) {
  const int64_t plane = map.offset(b, k, 0, 0);
  const Tap<T> x = taps.x[threadIdx.x], *y = taps.y + threadIdx.y * kRows;
  if (taps.same) {
    with_elements(map.data, map.type, [&](const auto* data) {
      data += plane + x.index * map.stride[3];
#pragma unroll
      for (int r = 0; r < kRows; ++r) value[r] = element<T>(data + y[r].index * map.stride[2]);
    });
    return;
  }
  Cells<T> cells;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r == 0 || y[r].index != y[r - 1].index) cells.load(map, plane, y[r].index, x.index, false);
    value[r] = cells.blend(y[r].fraction, x.fraction, false);
  }
}

}  // namespace pssl::PSSL_SIMD_NAMESPACE
