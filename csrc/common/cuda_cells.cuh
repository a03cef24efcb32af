// Passes over the cells of a feature map on CUDA: blocks take a tile of cells, and of these a chunk of channels at a time,
// staged in shared memory. What reads and writes the map goes along the axis that is contiguous; what computes meets one
// layout and one type, whatever the map's. A thread's registers hold 4 cells side by side times some classes or channels.
#pragma once

#include "common/cuda_block.cuh"
#include "common/cuda_views.cuh"

namespace pssl::PSSL_SIMD_NAMESPACE {

constexpr int kTileRows = 4, kTileColumns = 32, kTileCells = kTileRows * kTileColumns;
constexpr int kFour = 4;  // cells, classes or channels that go together through registers

// Four elements in one load or store.
template <class T>
struct alignas(16) Four {
  T v[kFour];
};
template <class T>
__device__ inline Four<T>& four(T* p) {
  return *reinterpret_cast<Four<T>*>(p);
}
template <class T>
__device__ inline const Four<T>& four(const T* p) {
  return *reinterpret_cast<const Four<T>*>(p);
}

// Classes side by side: padded to groups of 8, with vectors and coefficients of 0.
constexpr int kClassGroup = 8;
inline int64_t padded_classes(int64_t C) { return (C + kClassGroup - 1) / kClassGroup * kClassGroup; }

// The cells of an image cut into tiles of 4 rows of 32: rows of the map, or, `flat`, cells one after another whatever row
// they are in, where neighbours do not count.
struct CellTiles {
  int64_t h, w;
  bool flat;

  PSSL_HD int64_t across() const { return flat ? 1 : (w + kTileColumns - 1) / kTileColumns; }
  PSSL_HD int64_t count() const {
    return flat ? (h * w + kTileCells - 1) / kTileCells : (h + kTileRows - 1) / kTileRows * across();
  }
  // The number of the cell at a row and a column of a tile, in its image; -1 outside of the map. Rows and columns may
  // lie around the tile where it is not flat.
  PSSL_HD int64_t cell(int64_t tile, int row, int column) const {
    if (flat) {
      const int64_t cell = tile * kTileCells + row * kTileColumns + column;
      return cell < h * w ? cell : -1;
    }
    const int64_t y = tile / across() * kTileRows + row, x = tile % across() * kTileColumns + column;
    return y >= 0 && y < h && x >= 0 && x < w ? y * w + x : -1;
  }
};

// What of a tile and around it is staged: kBefore rows and columns before its own, kAfter behind. A channel takes kPlane
// elements; four cells of a row are aligned, and channels are not a multiple of the banks apart.
template <int kBefore, int kAfter>
struct Frame {
  static constexpr int kRows = kTileRows + kBefore + kAfter, kColumns = kTileColumns + kBefore + kAfter;
  static constexpr int kCells = kRows * kColumns;
  static constexpr int kMargin = kBefore > 0 ? kFour : 0;
  static constexpr int kRow = kMargin + kTileColumns + (kAfter > 0 ? kFour : 0);
  static constexpr int kPlane = kRows * kRow + kFour;

  // the place of a cell of the tile, or around it
  PSSL_HD static int place(int row, int column) { return (row + kBefore) * kRow + kMargin + column; }
  // cell j of those that are staged: row by row
  PSSL_HD static int row(int j) { return j / kColumns - kBefore; }
  PSSL_HD static int column(int j) { return j % kColumns - kBefore; }
};
using Alone = Frame<0, 0>;
using WithNext = Frame<0, 1>;
using WithAround = Frame<1, 1>;
constexpr int kTilePlane = Alone::kPlane;  // a row of coefficients of a tile's cells

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

// store(cell, channel, load(cell, channel)) for n cells of 2^log2_channels channels, threads side by side along the axis of
// `map` that is contiguous; kBatch at a time, so that loads are under way together.
template <class V, int n, class Load, class Store>
__device__ void move_elements(const AnyView<4>& map, int log2_channels, const Load& load,
                              const Store& store) {
  constexpr int kBatch = 8;
  const int all = n << log2_channels, threads = block_threads();
  const bool along_channels = map.stride[1] == 1 && map.stride[3] != 1;
  auto cell = [&](int i) { return along_channels ? i >> log2_channels : i % n; };
  auto channel = [&](int i) { return along_channels ? i & ((1 << log2_channels) - 1) : i / n; };
  for (int first = block_thread(); first < all; first += kBatch * threads) {
    V held[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int i = first + k * threads;
      held[k] = i < all ? load(cell(i), channel(i)) : V(0);
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int i = first + k * threads;
      if (i < all) store(cell(i), channel(i), held[k]);
    }
  }
}

// staged[channel][place] = channels d0 + [0, 2^log2_channels) of the frame's cells; 0 outside of the map, in channels that
// there are not, and where at[cell] is -1. at[cell]: the offset of the cell in the map.
template <class T, class Around>
__device__ void stage(const AnyView<4>& map, const int64_t* at, int64_t d0, int log2_channels, T* staged) {
  with_element<T>(map.type, [&](auto zero) {
    const auto* data = static_cast<const decltype(zero)*>(map.data);
    auto load = [&](int j, int d) {
      const bool there = at[j] >= 0 && d0 + d < map.size[1];
      return there ? converted<T>(data[at[j] + (d0 + d) * map.stride[1]]) : T(0);
    };
    move_elements<T, Around::kCells>(map, log2_channels, load, [&](int j, int d, T value) {
      staged[d * Around::kPlane + Around::place(Around::row(j), Around::column(j))] = value;
    });
  });
}

// The reverse, for the tile's own cells.
template <class T, class Around>
__device__ void unstage(const AnyView<4>& map, const int64_t* at, int64_t d0, int log2_channels,
                        const T* staged) {
  with_element<T>(map.type, [&](auto zero) {
    using S = decltype(zero);
    S* data = static_cast<S*>(map.data);
    auto load = [&](int j, int d) {
      return staged[d * Around::kPlane + Around::place(j / kTileColumns, j % kTileColumns)];
    };
    move_elements<T, kTileCells>(map, log2_channels, load, [&](int j, int d, T value) {
      if (at[j] >= 0 && d0 + d < map.size[1]) data[at[j] + (d0 + d) * map.stride[1]] = converted<S>(value);
    });
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

// coefficients[c][cell of the tile] = those of classes first + [0, count); of cells where cell(j) is -1, and of classes up to
// a multiple of 4, 0.
template <class T, class Cell>
__device__ void stage_coefficients(const T* gradients, int64_t padded, int64_t first, int count,
                                   const Cell& cell, T* coefficients) {
  const int rows = (count + kFour - 1) / kFour * kFour;
  for (int i = block_thread(); i < rows * kTileCells; i += block_threads()) {
    const int j = i / rows, c = i % rows;
    const int64_t from = c < count ? cell(j) : -1;
    coefficients[c * kTilePlane + j] = from < 0 ? T(0) : gradients[from * padded + first + c];
  }
}

// Halves the channels of a chunk, from 2^most on, until bytes(log2_channels) fit a block's shared memory; at least 8
// stay: where these do not fit, launch() says so.
template <class F>
int fitting_channels(const DeviceLimits& limits, int most, const F& bytes) {
  int log2_channels = most;
  while (log2_channels > 3 && bytes(log2_channels) > limits.shared_bytes) --log2_channels;
  return log2_channels;
}

}  // namespace pssl::PSSL_SIMD_NAMESPACE
