// Stable sorting of unsigned keys on the device, and numbering what sorted keys fall into. Least digit first: each pass
// counts the digits of every block's keys, adds the counts up, and puts the keys in their places, block by block, warp by
// warp and lane by lane in their order. So the order of equal keys, and every sum taken along it, is fixed.
#pragma once

#include <utility>

#include "common/bilinear.h"
#include "common/cuda_block.cuh"

namespace pssl::PSSL_SIMD_NAMESPACE {

constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits;
constexpr int kSortThreads = 256, kSortWarps = kSortThreads / kWarp;
constexpr int kSortRounds = 16;                        // keys a thread
constexpr int kSortKeys = kSortThreads * kSortRounds;  // keys a block
static_assert(kSortThreads == kDigits, "thread t looks after digit t");

// Keys and where each of them stood before any sorting; `entries` null: in order.
template <class Key>
struct Keys {
  Key* keys;
  int32_t* entries;

  __device__ int32_t entry(int64_t i) const { return entries ? entries[i] : int32_t(i); }
};

template <class Key>
struct SortPass {
  Keys<Key> from, to;
  int64_t count;
  int shift;        // of the digit
  int32_t* counts;  // [blocks][digits]
  int32_t* totals;  // [digits]

  PSSL_HD int64_t blocks() const { return (count + kSortKeys - 1) / kSortKeys; }
  __device__ int digit(Key key) const { return int(key >> shift & (kDigits - 1)); }
  // A warp's keys are consecutive, kWarp a round.
  __device__ int64_t key(int warp, int round, int lane) const {
    return blockIdx.x * int64_t(kSortKeys) + (warp * kSortRounds + round) * kWarp + lane;
  }
};

template <class Key>
__global__ void __launch_bounds__(kSortThreads) count_digits(const __grid_constant__ SortPass<Key> pass) {
  PSSL_SHARED(found, int32_t[kDigits]);
  const int thread = block_thread();
  found[thread] = 0;
  __syncthreads();
  for (int round = 0; round < kSortRounds; ++round) {
    const int64_t i = pass.key(thread / kWarp, round, thread % kWarp);
    if (i < pass.count) atomicAdd(&found[pass.digit(pass.from.keys[i])], 1);
  }
  __syncthreads();
  pass.counts[blockIdx.x * kDigits + thread] = found[thread];
}

// Each column of `counts` [rows][columns], a thread a column, becomes the sums of what stands above; `totals` [columns] that of
// all. Loads of several rows are under way at a time.
template <class Count>
__global__ void __launch_bounds__(kSortThreads) sum_columns(Count* counts, int64_t rows, Count* totals) {
  constexpr int kTogether = 32;
  const int64_t columns = blockDim.x;
  Count above = 0;
  counts += threadIdx.x;
  for (int64_t first = 0; first < rows; first += kTogether) {
    Count count[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) count[i] = first + i < rows ? counts[(first + i) * columns] : 0;
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (first + i < rows) counts[(first + i) * columns] = above;
      above += count[i];
    }
  }
  totals[threadIdx.x] = above;
}

// The lanes that are `there` and whose digit is this lane's.
__device__ inline unsigned lanes_of_digit(bool there, int digit) {
  unsigned lanes = __ballot_sync(kAllLanes, there);
  for (int bit = 0; bit < kDigitBits; ++bit) {
    const unsigned set = __ballot_sync(kAllLanes, digit >> bit & 1);
    lanes &= digit >> bit & 1 ? set : ~set;
  }
  return lanes;
}

template <class Key>
__global__ void __launch_bounds__(kSortThreads) place_keys(const __grid_constant__ SortPass<Key> pass) {
  PSSL_SHARED(next, int32_t[kSortWarps][kDigits]);  // the place of a warp's next key of each digit
  PSSL_SHARED(scratch, int32_t[kWarp]);
  const int thread = block_thread(), warp = thread / kWarp, lane = thread % kWarp;
  for (int w = 0; w < kSortWarps; ++w) next[w][thread] = 0;
  Key key[kSortRounds];
  int32_t entry[kSortRounds];
#pragma unroll
  for (int round = 0; round < kSortRounds; ++round) {  // all loads under way at a time
    const int64_t i = pass.key(warp, round, lane);
    key[round] = i < pass.count ? pass.from.keys[i] : Key(0);
    entry[round] = i < pass.count ? pass.from.entry(i) : 0;
  }
  __syncthreads();
#pragma unroll
  for (int round = 0; round < kSortRounds; ++round)
    if (pass.key(warp, round, lane) < pass.count) atomicAdd(&next[warp][pass.digit(key[round])], 1);
  int32_t all;
  int32_t place = block_sum_before(pass.totals[thread], &scratch[0], all);  // ends with a barrier
  place += pass.counts[blockIdx.x * kDigits + thread];
  for (int w = 0; w < kSortWarps; ++w) {
    const int32_t of_warp = next[w][thread];
    next[w][thread] = place;
    place += of_warp;
  }
  __syncthreads();
#pragma unroll
  for (int round = 0; round < kSortRounds; ++round) {
    const bool there = pass.key(warp, round, lane) < pass.count;
    const int digit = pass.digit(key[round]);
    const unsigned lanes = lanes_of_digit(there, digit), before = lanes & ((1u << lane) - 1);
    const int32_t to = next[warp][digit] + __popc(before);
    __syncwarp();  // all have read before the last of each digit writes
    if (there && lanes >> lane == 1) next[warp][digit] = to + 1;
    __syncwarp();
    if (!there) continue;
    pass.to.keys[to] = key[round];
    pass.to.entries[to] = entry[round];
  }
}

// Memory for sorting `count` keys: `keys` to begin with, and what passes need.
template <class Key>
class Sorter {
 public:
  Sorter(const Tensor& like, int64_t count)
      : count_(count),
        keys_(new_on_device(like, {2 * count}, ScalarType::Long)),
        entries_(new_on_device(like, {2 * count}, ScalarType::Int)),
        counts_(new_on_device(like, {kDigits * (blocks() + 1)}, ScalarType::Int)) {
    STD_TORCH_CHECK(count < (int64_t(1) << 31), "pssl: sorting ", count, " keys, 2^31 or more");
    static_assert(sizeof(Key) == 8, "what a Long tensor holds");
    Key* keys = static_cast<Key*>(keys_.mutable_data_ptr());
    int32_t* entries = entries_.mutable_data_ptr<int32_t>();
    now_ = {keys, entries}, other_ = {keys + count, entries + count};
  }
  int64_t blocks() const { return (count_ + kSortKeys - 1) / kSortKeys; }
  int64_t count() const { return count_; }
  Keys<Key> now() const { return now_; }
  Keys<Key> other() const { return other_; }
  // [blocks][kDigits] and [kDigits]
  int32_t* counts() { return counts_.mutable_data_ptr<int32_t>(); }
  int32_t* totals() { return counts() + kDigits * blocks(); }

  // Sorts now().keys, of which the lowest `bits` count; entries begin as 0, 1, ..
  void sort(const CudaCall& call, int bits) {
    for (int shift = 0; shift < bits; shift += kDigitBits) {
      SortPass<Key> pass{now_, other_, count_, shift, counts(), totals()};
      if (shift == 0) pass.from.entries = nullptr;
      launch(call, count_digits<Key>, grid_of(blocks()), dim3(kSortThreads), 0, pass);
      sum(call, kDigits);
      launch(call, place_keys<Key>, grid_of(blocks()), dim3(kSortThreads), 0, pass);
      std::swap(now_, other_);
    }
  }
  // sum_columns of counts() [blocks][columns]
  void sum(const CudaCall& call, int columns) {
    launch(call, sum_columns<int32_t>, dim3(1), dim3(unsigned(columns)), 0, counts(), blocks(), totals());
  }

 private:
  int64_t count_;
  Tensor keys_, entries_, counts_;
  Keys<Key> now_, other_;
};

}  // namespace pssl::PSSL_SIMD_NAMESPACE
