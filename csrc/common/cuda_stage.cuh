// A tile's features between memory and shared memory, along the axis of the map that is contiguous, and the coefficients of
// its cells.
#pragma once

#include "common/cuda_cells.cuh"

namespace pssl::PSSL_SIMD_NAMESPACE {

// Calls body(S{}) with the type of the elements: in double, or in one that float holds.
template <class T, class F>
__device__ void with_element(ScalarType type, const F& body) {
  switch (type) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Half:
      return body(Half{});
    case ScalarType::BFloat16:
      return body(BFloat16{});
    default:
      if constexpr (sizeof(T) == 8) body(double{});
  }
}

template <class To, class From>
__device__ inline To converted(From value) {
  if constexpr (sizeof(From) == 8 || sizeof(To) == 8) {
    return To(value);
  } else {
    return To(float(value));
  }
}

// Four elements of a map: in one access where they lie `together`, side by side and aligned; at[i] < 0: none there.
template <class S>
struct alignas(sizeof(S) * kFour < 16 ? sizeof(S) * kFour : 16) Stored {
  S v[kFour];
};

template <class S>
__device__ inline bool lie_together(const S* data, const int64_t (&at)[kFour]) {
  return at[0] >= 0 && at[0] % kFour == 0 && at[1] == at[0] + 1 && at[2] == at[0] + 2 && at[3] == at[0] + 3 &&
         reinterpret_cast<uintptr_t>(data) % alignof(Stored<S>) == 0;
}
template <class T, class S>
__device__ inline Four<T> load_four(const S* data, const int64_t (&at)[kFour], int64_t shift, bool together) {
  Four<T> values;
  if (together) {
    const Stored<S> stored = *reinterpret_cast<const Stored<S>*>(data + at[0] + shift);
#pragma unroll
    for (int i = 0; i < kFour; ++i) values.v[i] = converted<T>(stored.v[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kFour; ++i) values.v[i] = at[i] < 0 ? T(0) : converted<T>(data[at[i] + shift]);
  }
  return values;
}
template <class T, class S>
__device__ inline void store_four(const Four<T>& values, S* data, const int64_t (&at)[kFour], int64_t shift,
                                  bool together) {
  if (together) {
    Stored<S> stored;
#pragma unroll
    for (int i = 0; i < kFour; ++i) stored.v[i] = converted<S>(values.v[i]);
    *reinterpret_cast<Stored<S>*>(data + at[0] + shift) = stored;
  } else {
#pragma unroll
    for (int i = 0; i < kFour; ++i)
      if (at[i] >= 0) data[at[i] + shift] = converted<S>(values.v[i]);
  }
}

// What a block's threads have of a chunk of channels: items of four elements side by side along the axis of the map that is
// contiguous, each moved by one thread; some at a time, so that loads are under way together, and no more of them than
// registers hold.

template <class V, class Load, class Store>
__device__ void move_items(int first, int count, int step, const Load& load, const Store& store) {
  constexpr int kBatch = sizeof(V) > 16 ? 2 : 4;
#pragma unroll 1
  for (; first < count; first += kBatch * step) {
    V held[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k)
      if (first + k * step < count) held[k] = load(first + k * step);
#pragma unroll
    for (int k = 0; k < kBatch; ++k)
      if (first + k * step < count) store(first + k * step, held[k]);
  }
}

PSSL_HD inline bool along_channels(const AnyView<4>& map) { return map.stride[1] == 1 && map.stride[3] != 1; }

// Offsets of four channels of a cell from d on, of D.
__device__ inline void channel_offsets(int64_t cell, int64_t d, int64_t D, int64_t (&at)[kFour]) {
#pragma unroll
  for (int i = 0; i < kFour; ++i) at[i] = cell >= 0 && d + i < D ? cell + d + i : -1;
}

// staged[channel][place] = channels d0 + [0, 2^log2_channels) of the frame's cells; 0 outside of the map, in channels that
// there are not, and where at[cell] is -1. at[cell]: the offset of the cell in the map.
template <class T, class Around>
__device__ void stage(const AnyView<4>& map, const int64_t* at, int64_t d0, int log2_channels, T* staged) {
  const int thread = block_thread(), threads = block_threads(), channels = 1 << log2_channels;
  const int64_t D = map.size[1], stride = map.stride[1];
  auto place = [](int j) { return Around::place(Around::row(j), Around::column(j)); };
  with_element<T>(map.type, [&](auto zero) {
    const auto* data = static_cast<const decltype(zero)*>(map.data);
    if (along_channels(map)) {
      auto load = [&](int i) {
        int64_t own[kFour];
        channel_offsets(at[i >> (log2_channels - 2)], d0 + (i * kFour & (channels - 1)), D, own);
        return load_four<T>(data, own, 0, lie_together(data, own));
      };
      move_items<Four<T>>(
          thread, Around::kCells << (log2_channels - 2), threads, load, [&](int i, const Four<T>& values) {
            T* to = staged + (i * kFour & (channels - 1)) * Around::kPlane + place(i >> (log2_channels - 2));
#pragma unroll
            for (int k = 0; k < kFour; ++k) to[k * Around::kPlane] = values.v[k];
          });
    } else if constexpr (Around::kCells == kTileCells) {
      const int j = thread % kWarp * kFour;
      const int64_t own[kFour] = {at[j], at[j + 1], at[j + 2], at[j + 3]};
      const bool together = stride % kFour == 0 && lie_together(data, own);
      auto load = [&](int d) {
        return d0 + d < D ? load_four<T>(data, own, (d0 + d) * stride, together) : Four<T>{};
      };
      move_items<Four<T>>(thread / kWarp, channels, threads / kWarp, load, [&](int d, const Four<T>& values) {
        four(staged + d * Around::kPlane + j) = values;
      });
    } else {
      auto load = [&](int i) {
        const int j = i % Around::kCells, d = i / Around::kCells;
        return at[j] >= 0 && d0 + d < D ? converted<T>(data[at[j] + (d0 + d) * stride]) : T(0);
      };
      move_items<T>(thread, Around::kCells << log2_channels, threads, load, [&](int i, T value) {
        staged[i / Around::kCells * Around::kPlane + place(i % Around::kCells)] = value;
      });
    }
  });
}

// The reverse, for the tile's own cells.
template <class T, class Around>
__device__ void unstage(const AnyView<4>& map, const int64_t* at, int64_t d0, int log2_channels,
                        const T* staged) {
  const int thread = block_thread(), threads = block_threads(), channels = 1 << log2_channels;
  const int64_t D = map.size[1], stride = map.stride[1];
  with_element<T>(map.type, [&](auto zero) {
    auto* data = static_cast<decltype(zero)*>(map.data);
    if (along_channels(map)) {
#pragma unroll 1
      for (int i = thread; i < kTileCells << (log2_channels - 2); i += threads) {
        const int j = i >> (log2_channels - 2), d = i * kFour & (channels - 1);
        const T* from = staged + d * Around::kPlane + Around::place(j / kTileColumns, j % kTileColumns);
        int64_t own[kFour];
        channel_offsets(at[j], d0 + d, D, own);
        store_four<T>({from[0], from[Around::kPlane], from[2 * Around::kPlane], from[3 * Around::kPlane]},
                      data, own, 0, lie_together(data, own));
      }
    } else {
      const int j = thread % kWarp * kFour;
      const int64_t own[kFour] = {at[j], at[j + 1], at[j + 2], at[j + 3]};
      const bool together = stride % kFour == 0 && lie_together(data, own);
      const T* from = staged + Around::place(j / kTileColumns, j % kTileColumns);
#pragma unroll 1
      for (int d = thread / kWarp; d < channels && d0 + d < D; d += threads / kWarp)
        store_four<T>(four(from + d * Around::kPlane), data, own, (d0 + d) * stride, together);
    }
  });
}

// at[j] = the offset of the frame's cell j in image b of the map; -1 outside of it.
template <class Around>
__device__ void find_offsets(const AnyView<4>& map, const CellTiles& tiles, int64_t b, int64_t tile,
                             int64_t* at) {
  for (int j = block_thread(); j < Around::kCells; j += block_threads()) {
    const int64_t cell = tiles.cell(tile, Around::row(j), Around::column(j));
    at[j] = cell < 0 ? -1 : map.offset(b, 0, cell / tiles.w, cell % tiles.w);
  }
}

// staged[c][cell of the tile] = an image's coefficients [padded][plane] of classes first + [0, count); of cells where cell(j)
// is -1, and of classes up to a multiple of 4, 0.
template <class T, class Cell>
__device__ void stage_coefficients(const T* coefficients, int64_t plane, int64_t first, int count,
                                   const Cell& cell, T* staged) {
  const int rows = (count + kFour - 1) / kFour * kFour;
#pragma unroll 4
  for (int i = block_thread(); i < rows * kTileCells; i += block_threads()) {
    const int j = i % kTileCells, c = i / kTileCells;
    const int64_t from = c < count ? cell(j) : -1;
    staged[c * kTilePlane + j] = from < 0 ? T(0) : coefficients[(first + c) * plane + from];
  }
}

}  // namespace pssl::PSSL_SIMD_NAMESPACE
