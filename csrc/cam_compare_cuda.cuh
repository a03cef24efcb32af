// What the kernels of cam_compare share on CUDA: the maps of a class at a tile of pixels, and the classes that are present
// shared out among blocks.
#pragma once

#include <algorithm>

#include "cam_compare.h"
#include "common/cuda_resize.cuh"

namespace pssl::PSSL_SIMD_NAMESPACE::compare {

constexpr int64_t kMostChunks = kWarp;  // a lane each where they are added up
constexpr int kMapsAtOnce = 4;          // whose loading is on its way together
constexpr int kBlocks = 4;              // a processor, for what blocks share among them

struct Problem {
  MapList maps;  // the main maps, then the support maps
  int mains;
  AnyView<2> labels;  // [B,K]
  int64_t B, K, H, W;
  bool cosine;

  PSSL_HD int supports() const { return maps.count - mains; }
  PSSL_HD int quantities() const { return maps.count + mains * supports(); }
  PSSL_HD int64_t pairs() const { return B * K; }
  PSSL_HD int64_t tiles() const { return Tile::count(H, W); }
  // of a pair; by its size alone, so that sums do not depend on the device
  PSSL_HD int64_t chunks() const { return tiles() < kMostChunks ? tiles() : kMostChunks; }
  PSSL_HD bool present(int64_t pair) const { return labels.truth(pair / K, pair % K); }
};

// A block's shared memory.
template <class T>
struct Scratch {
  double* totals;     // [quantities] of a pair
  TileTaps<T>* taps;  // [maps]
  T* values;          // [maps][threads] the cut maps at the tile's pixels
  T* more;            // what the kernel wants beside

  static int64_t bytes(const Problem& p, int64_t more) {
    return p.quantities() * int64_t(sizeof(double)) +
           p.maps.count * int64_t(sizeof(TileTaps<T>) + Tile::kThreads * sizeof(T)) +
           more * int64_t(sizeof(T));
  }
  __device__ Scratch(void* memory, const Problem& p)
      : totals(static_cast<double*>(memory)),
        taps(reinterpret_cast<TileTaps<T>*>(totals + p.quantities())),
        values(reinterpret_cast<T*>(taps + p.maps.count)),
        more(values + p.maps.count * Tile::kThreads) {}
  // map i at this thread's pixel
  __device__ T& own(int i) const { return values[i * Tile::kThreads + block_thread()]; }

  // The maps of a pair at the tile's pixels, 0 outside. Others' values are there after a barrier.
  __device__ void read(const Problem& p, int64_t pair, const Tile& tile) const {
    find_taps(tile, p.maps.map, p.maps.count, taps);
    const int64_t b = pair / p.K, k = pair % p.K;
    for (int first = 0; first < p.maps.count; first += kMapsAtOnce) {
      Cells<T> cells[kMapsAtOnce];
#pragma unroll
      for (int j = 0; j < kMapsAtOnce; ++j) {
        const int i = first + j;
        if (i >= p.maps.count) break;
        const TileTaps<T>& at = taps[i];
        cells[j].load(p.maps.map[i], p.maps.map[i].offset(b, k, 0, 0), at.y[threadIdx.y].index,
                      at.x[threadIdx.x].index, at.same);
      }
#pragma unroll
      for (int j = 0; j < kMapsAtOnce; ++j) {
        const int i = first + j;
        if (i >= p.maps.count) break;
        const TileTaps<T>& at = taps[i];
        const T value = cells[j].blend(at.y[threadIdx.y].fraction, at.x[threadIdx.x].fraction, at.same);
        own(i) = tile.inside() ? relu(value) : T(0);
      }
    }
  }
  // M_s - target_s at this thread's pixel
  __device__ T difference(const Problem& p, const T* share, int s) const {
    T target = 0;
    for (int t = 0; t < p.supports(); ++t) target += share[s * p.supports() + t] * own(p.mains + t);
    return own(s) - target;
  }
};

// f(pair, part) for the parts of all present pairs, `parts` each, shared among `blocks` blocks of which this is number
// `block`; by all threads.
template <class F>
__device__ void each_present(const Problem& p, int64_t parts, int64_t block, int64_t blocks, const F& f) {
  PSSL_SHARED(scratch, int64_t[kWarp]);
  PSSL_SHARED(found, int64_t);
  const int64_t each = (p.pairs() + Tile::kThreads - 1) / Tile::kThreads;
  const int64_t first = block_thread() * each, end = std::min(first + each, p.pairs());
  int64_t own = 0, all;
  for (int64_t pair = first; pair < end; ++pair) own += p.present(pair);
  const int64_t before = block_sum_before(own, scratch, all);
  for (int64_t task = block; task < all * parts; task += blocks) {
    int64_t n = task / parts - before;  // of this thread's present pairs
    if (n >= 0 && n < own) {
      int64_t pair = first;
      while (!p.present(pair) || n-- > 0) ++pair;
      found = pair;
    }
    __syncthreads();
    f(found, task % parts);
    __syncthreads();
  }
}

// share[s, t] = w_st / T of a pair, for all threads of the block.
template <class T>
__device__ void find_share(const Problem& p, const Scratch<T>& scratch, const double* partial, int64_t pair,
                           T* share) {
  constexpr int kLanes = 8;  // for a sum
  const int64_t quantities = p.cosine ? p.quantities() : 0;
  for (int first = 0; first < quantities; first += Tile::kThreads / kLanes) {
    const int q = first + block_thread() / kLanes;
    double sum = 0;
    if (q < quantities)
      for (int64_t chunk = block_thread() % kLanes; chunk < p.chunks(); chunk += kLanes)
        sum += partial[(pair * quantities + q) * p.chunks() + chunk];
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
    if (q < quantities && block_thread() % kLanes == 0) scratch.totals[q] = sum;
  }
  __syncthreads();
  for (int i = block_thread(); i < p.mains * p.supports(); i += Tile::kThreads) {
    const double *squares = scratch.totals, *products = squares + p.maps.count;
    const int s = i / p.supports(), t = i % p.supports();
    share[i] = p.cosine ? T(cam_share(products[i], squares[s], squares[p.mains + t], p.supports()))
                        : T(1) / T(p.supports());
  }
  __syncthreads();
}

}  // namespace pssl::PSSL_SIMD_NAMESPACE::compare
