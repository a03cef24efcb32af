// The products of cells on CUDA: with class vectors, with themselves and with their neighbours, one pass over D.
//
// A warp takes all cells of a tile times 8 classes, or times the products of neighbours; where that leaves few warps, each
// takes some of the channels, and their sums are added in order.
#pragma once

#include <algorithm>

#include "common/cuda_quads.cuh"

namespace pssl::PSSL_SIMD_NAMESPACE {

// The warps of a block: groups of 8 classes, one for norms, each as many times as the channels are shared among.
struct ProductWarps {
  int log2_channels;  // of a chunk
  int groups;         // of classes in one pass over the channels
  bool norms;
  int parts;

  static constexpr int kMost = 8, kSums = kClassGroup * kFour;

  PSSL_HD int each() const { return groups + norms; }
  PSSL_HD int threads() const { return (each() > 0 ? each() : 1) * parts * kWarp; }
  // elements of shared memory
  template <class Around>
  PSSL_HD int64_t staged(int log2) const {
    const int64_t features = int64_t(Around::kPlane) << log2, sums = parts > 1 ? each() * kWarp * kSums : 0;
    return features > sums ? features : sums;
  }
};

// For `padded` classes, and norms; the block has `more` bytes of shared memory beside.
template <class T, class Around>
ProductWarps product_warps(const DeviceLimits& limits, int64_t padded, bool norms, int64_t more = 0) {
  ProductWarps warps;
  warps.norms = norms;
  warps.groups = int(std::min<int64_t>(padded / kClassGroup, ProductWarps::kMost - norms));
  warps.parts = std::max(1, ProductWarps::kMost / std::max(1, warps.each()));
  auto bytes = [&](int log2) { return warps.template staged<Around>(log2) * int64_t(sizeof(T)) + more; };
  while (warps.parts > 1 && bytes(3) > limits.shared_bytes) --warps.parts;
  warps.log2_channels = fitting_channels(limits, sizeof(T) == 8 ? 4 : 5, bytes);
  return warps;
}

// The products of a tile with vectors q [D][padded]. `at`: find_offsets, behind a barrier. In the threads that hold
// sums of all channels, sink(c, cell, sum) gets the products of four cells from the tile's `cell` on with classes c + [0, 8),
// or with c = -1 those of add_squares and add_pairs. Ends without a barrier.
template <class T, class Around, class Sink>
__device__ void tile_products(const AnyView<4>& f, const T* q, int64_t padded, const ProductWarps& warps,
                              const int64_t* at, T* staged, const Sink& sink) {
  const int lane = block_thread() % kWarp, warp = block_thread() / kWarp;
  const int group = warp % warps.each(), part = warp / warps.each();
  const bool is_norm = group == warps.groups;
  const int row = lane / (kTileColumns / kFour), column = lane % (kTileColumns / kFour) * kFour;
  const int place = Around::place(row, column), channels = 1 << warps.log2_channels;
  const int64_t D = f.size[1], pass = int64_t(warps.groups) * kClassGroup;
  int64_t first = 0;
  do {
    const int64_t c = first + group * kClassGroup;
    const bool busy = is_norm ? first == 0 : c < padded;
    T sum[kClassGroup][kFour] = {};
    for (int64_t d0 = 0; d0 < D; d0 += channels) {
      __syncthreads();
      stage<T, Around>(f, at, d0, warps.log2_channels, staged);
      __syncthreads();
      const int count = int(D - d0 < channels ? D - d0 : channels);
      if (busy && is_norm) {
#pragma unroll 2
        for (int d = part; d < count; d += warps.parts) {
          const T *own = staged + d * Around::kPlane + place, *below = own + Around::kRow;
          add_squares(four(own), sum[0]);
          if constexpr (Around::kRows > kTileRows)
            add_pairs(four(own), four(below), own[kFour], below[kFour], sum);
        }
      } else if (busy) {
#pragma unroll 2
        for (int d = part; d < count; d += warps.parts)
          add_products(four(staged + d * Around::kPlane + place), q + (d0 + d) * padded + c, sum);
      }
    }
    for (int other = 1; other < warps.parts; ++other) {
      T* sums = staged + group * kWarp * ProductWarps::kSums + lane;
      __syncthreads();
      if (part == other) {
#pragma unroll
        for (int i = 0; i < ProductWarps::kSums; ++i) sums[i * kWarp] = sum[i / kFour][i % kFour];
      }
      __syncthreads();
      if (part == 0) {
#pragma unroll
        for (int i = 0; i < ProductWarps::kSums; ++i) sum[i / kFour][i % kFour] += sums[i * kWarp];
      }
    }
    if (busy && part == 0) sink(is_norm ? -1 : c, row * kTileColumns + column, sum);
    first += pass;
  } while (first < padded);
}

constexpr int kPairTerms = 4;  // what identity 1 wants of a cell: |f|^2 and three products with neighbours
constexpr int kQuadPairWarps = 8;  // share the channels

// The products of all cells of a batch.
template <class T>
struct CellProducts {
  AnyView<4> f;
  const T* q;               // [1 or B][D][padded]
  int64_t q_image, padded;  // from one image's vectors to the next's, 0 where they share them
  T *dots, *gram;           // [B,h,w,padded]; [4][B,h,w], null: none
  CellTiles tiles;
  ProductWarps warps;
};

template <class T>
__global__ void __launch_bounds__(ProductWarps::kMost* kWarp)
    cell_products(const __grid_constant__ CellProducts<T> p) {
  PSSL_DYNAMIC_SHARED(T, staged);
  PSSL_SHARED(at, int64_t[WithNext::kCells]);
  const int64_t b = blockIdx.x / p.tiles.count(), tile = blockIdx.x % p.tiles.count();
  const int64_t cells = p.tiles.h * p.tiles.w, all = p.f.size[0] * cells;
  find_offsets<WithNext>(p.f, p.tiles, b, tile, at);
  tile_products<T, WithNext>(
      p.f, p.q + b * p.q_image, p.padded, p.warps, at, staged, [&](int64_t c, int first, const auto& sum) {
        for (int i = 0; i < kFour; ++i) {
          const int at_row = first / kTileColumns, at_column = first % kTileColumns + i;
          const int64_t cell = p.tiles.cell(tile, at_row, at_column);
          if (cell < 0) continue;
          const int64_t to = b * cells + cell;
          if (c < 0) {
            for (int k = 0; k < 4; ++k) p.gram[k * all + to] = sum[k][i];
          } else {
            T* dots = p.dots + to * p.padded + c;
            four(dots) = {sum[0][i], sum[1][i], sum[2][i], sum[3][i]};
            four(dots + kFour) = {sum[4][i], sum[5][i], sum[6][i], sum[7][i]};
          }
        }
      });
}

// The same in quads: the products with class vectors, a block for a tile of an image's cells in a row ...
template <class T>
__global__ void __launch_bounds__(QuadTile::kMost* kWarp)
    quad_cell_products(const __grid_constant__ CellProducts<T> p, const __grid_constant__ QuadTile shape) {
  PSSL_DYNAMIC_SHARED(float, area);
  PSSL_SHARED(at, int64_t[kTileCells]);
  float* rows = area + shape.area();
  const int64_t b = blockIdx.x / p.tiles.count(), tile = blockIdx.x % p.tiles.count();
  find_offsets<Alone>(p.f, p.tiles, b, tile, at);
  __syncthreads();
  with_element<float>(p.f.type, [&](auto zero) {
    const Quad<const decltype(zero)> quad(p.f, at + block_thread() % kWarp * kFour);
    quad_products(quad, p.f.size[1], p.q + b * p.q_image, p.padded, shape, area, rows, nullptr);
  });
  __syncthreads();
  for (int64_t i = block_thread(); i < kTileCells * p.padded / kFour; i += block_threads()) {
    const int j = int(i % kTileCells);
    const int64_t c = i / kTileCells * kFour, cell = p.tiles.cell(tile, j / kTileColumns, j % kTileColumns);
    const float* row = rows + c * kTilePlane + j;
    if (cell >= 0)
      four(p.dots + (b * p.tiles.h * p.tiles.w + cell) * p.padded + c) = {
          row[0], row[kTilePlane], row[2 * kTilePlane], row[3 * kTilePlane]};
  }
}

// ... and those with neighbours, whose tiles are 4 rows of 32 cells.
template <class T>
__global__ void __launch_bounds__(kQuadPairWarps* kWarp)
    quad_cell_pairs(const __grid_constant__ CellProducts<T> p) {
  PSSL_DYNAMIC_SHARED(float, area);
  PSSL_SHARED(at, int64_t[WithNext::kCells]);
  const int64_t b = blockIdx.x / p.tiles.count(), tile = blockIdx.x % p.tiles.count(), D = p.f.size[1];
  const int lane = block_thread() % kWarp, part = block_thread() / kWarp;
  find_offsets<WithNext>(p.f, p.tiles, b, tile, at);
  __syncthreads();
  with_element<float>(p.f.type, [&](auto zero) {
    using S = decltype(zero);
    const int row = lane / (kTileColumns / kFour), column = lane % (kTileColumns / kFour) * kFour;
    const int64_t *own_at = at + row * WithNext::kColumns + column, *below_at = own_at + WithNext::kColumns;
    const Quad<const S> own(p.f, own_at), below(p.f, below_at);
    struct Loaded {
      Stored<S> own, below;
      S behind, diagonal;
    };
    float sum[kPairTerms][kFour] = {};
    auto one = [&](int64_t cell, int64_t d) { return cell >= 0 ? own.data[cell + d * own.stride] : S(0.0f); };
    const int each = int((D + kQuadPairWarps - 1) / kQuadPairWarps), first = part * each;
    each_channel<kChannelsAhead<S>>(
        first, first + each < D ? first + each : int(D),
        [&](int d) {
          return Loaded{own.load(d), below.load(d), one(own_at[kFour], d), one(below_at[kFour], d)};
        },
        [&](int, const Loaded& f) {
          const Four<float> values = floats(f.own);
          add_squares(values, sum[0]);
          add_pairs(values, floats(f.below), converted<float>(f.behind), converted<float>(f.diagonal), sum);
        });
#pragma unroll
    for (int k = 0; k < kPairTerms; ++k)
      four(area + (part * kPairTerms + k) * kTilePlane + lane * kFour) = {sum[k][0], sum[k][1], sum[k][2],
                                                                          sum[k][3]};
  });
  __syncthreads();
  const int64_t cells = p.tiles.h * p.tiles.w;
  for (int i = block_thread(); i < kPairTerms * kTileCells; i += block_threads()) {
    const int j = i % kTileCells, k = i / kTileCells;
    const int64_t cell = p.tiles.cell(tile, j / kTileColumns, j % kTileColumns);
    float all = 0;
    for (int other = 0; other < kQuadPairWarps; ++other)
      all += area[(other * kPairTerms + k) * kTilePlane + j];
    if (cell >= 0) p.gram[(k * p.f.size[0] + b) * cells + cell] = all;
  }
}

// Starts them where the map is read in quads and a tile's sums fit into shared memory; else false.
inline bool run_quad_products(const CudaCall& call, CellProducts<float> p) {
  const int64_t rows = p.padded * kTilePlane;
  const QuadTile shape = QuadTile::fitting(call.limits, rows);
  if (!in_quads<float>(p.f) || shape.parts == 0) return false;
  const int64_t B = p.f.size[0];
  if (p.gram)
    launch(call, quad_cell_pairs<float>, grid_of(B * p.tiles.count()), dim3(kQuadPairWarps * kWarp),
           kQuadPairWarps * kPairTerms * kTilePlane * int64_t(sizeof(float)), p);
  p.tiles.flat = true;
  if (p.padded > 0)
    launch(call, quad_cell_products<float>, grid_of(B * p.tiles.count()), dim3(shape.threads()),
           shape.bytes(rows), p, shape);
  return true;
}

// dots [B,h,w,padded] and gram [4][B,h,w]; either may be left out (padded = 0, no norms).
template <class T>
void find_products(const CudaCall& call, const Tensor& features, const T* q, int64_t q_image, int64_t padded,
                   T* dots, T* gram) {
  CellProducts<T> p{AnyView<4>::of(features), q, q_image, padded, dots, gram, {}, {}};
  p.tiles = {p.f.size[2], p.f.size[3], false};
  if constexpr (sizeof(T) == sizeof(float))
    if (run_quad_products(call, p)) return;
  p.warps = product_warps<T, WithNext>(call.limits, padded, gram != nullptr);
  if (p.warps.each() == 0) return;
  launch(call, cell_products<T>, grid_of(p.f.size[0] * p.tiles.count()), dim3(p.warps.threads()),
         p.warps.template staged<WithNext>(p.warps.log2_channels) * int64_t(sizeof(T)), p);
}

}  // namespace pssl::PSSL_SIMD_NAMESPACE
