// Passes over the cells of a feature map on CUDA: blocks take a tile of cells, and of these a chunk of channels at a time,
// staged in shared memory. What reads and writes the map goes along the axis that is contiguous; what computes meets one
// layout and one type, whatever the map's. A thread's registers hold 4 cells side by side times some classes or channels.
#pragma once

#include "common/cuda_block.cuh"
#include "common/cuda_four.cuh"
#include "common/cuda_views.cuh"

namespace pssl::PSSL_SIMD_NAMESPACE {

constexpr int kTileRows = 4, kTileColumns = 32, kTileCells = kTileRows * kTileColumns;

// Classes side by side: padded to groups of 8, with vectors and coefficients of 0.
constexpr int kClassGroup = 8;
inline int64_t padded_classes(int64_t C) { return (C + kClassGroup - 1) / kClassGroup * kClassGroup; }

// Coefficients of cells, the gradients of their products, lie class by class: [B][padded][plane] with an image's cells in a
// plane, and zeros up to a multiple of 4.
PSSL_HD inline int64_t coefficient_plane(int64_t cells) { return packs_of(cells) * kFour; }

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

// Halves the channels of a chunk, from 2^most on, until bytes(log2_channels) fit a block's shared memory; at least 8
// stay: where these do not fit, launch() says so.
template <class F>
int fitting_channels(const DeviceLimits& limits, int most, const F& bytes) {
  int log2_channels = most;
  while (log2_channels > 3 && bytes(log2_channels) > limits.shared_bytes) --log2_channels;
  return log2_channels;
}

}  // namespace pssl::PSSL_SIMD_NAMESPACE
