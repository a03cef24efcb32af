// What the threads of a warp or a block do together. Sums are taken in an order that the number of threads alone fixes.
#pragma once

#include "common/cuda_device.cuh"

namespace pssl::PSSL_SIMD_NAMESPACE {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The thread's number in its block, whatever the block's shape, and the number of threads.
__device__ inline int block_thread() {
  return int(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
}
__device__ inline int block_threads() { return int(blockDim.x * blockDim.y * blockDim.z); }

struct Plus {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Largest {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return b > a ? b : a;
  }
};

// Every lane gets the result. All 32 lanes have to come here.
template <class T, class F>
__device__ T warp_reduce(T value, F combine) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2)
    value = combine(value, __shfl_xor_sync(kAllLanes, value, lanes));
  return value;
}

// Lane i gets the sum of all lanes' values[i]. All 32 lanes have to come here. `lanes` is a constant, one after the other of
// 16 to 1: values indexed by a variable would lie in local memory.
template <int lanes = kWarp / 2, class T>
__device__ T warp_sums(T (&values)[kWarp]) {
  const bool upper = block_thread() & lanes;  // keeps the upper half of what it has, and gives the lower away
#pragma unroll
  for (int i = 0; i < lanes; ++i) {
    const T kept = upper ? values[i + lanes] : values[i], given = upper ? values[i] : values[i + lanes];
    values[i] = kept + __shfl_xor_sync(kAllLanes, given, lanes);
  }
  if constexpr (lanes > 1) {
    return warp_sums<lanes / 2>(values);
  } else {
    return values[0];
  }
}

// Every thread gets the result. All threads of the block have to come here, their number a multiple of 32. `scratch` is
// shared memory of kWarp elements; it may be used again at once.
template <class T, class F>
__device__ T block_reduce(T value, F combine, T* scratch) {
  const int thread = block_thread(), warps = block_threads() / kWarp;
  value = warp_reduce(value, combine);
  if (thread % kWarp == 0) scratch[thread / kWarp] = value;
  __syncthreads();
  T result = scratch[0];
  for (int i = 1; i < warps; ++i) result = combine(result, scratch[i]);
  __syncthreads();
  return result;
}

template <class T>
__device__ T block_sum(T value, T* scratch) {
  return block_reduce(value, Plus{}, scratch);
}

template <class T>
__device__ T block_largest(T value, T* scratch) {
  return block_reduce(value, Largest{}, scratch);
}

// The sum of the values of all threads before this one, and in `total` that of all. Conditions as for block_reduce.
template <class T>
__device__ T block_sum_before(T value, T* scratch, T& total) {
  const int thread = block_thread(), warps = block_threads() / kWarp, lane = thread % kWarp;
  T sum = value;
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    const T before = __shfl_up_sync(kAllLanes, sum, lanes);
    if (lane >= lanes) sum += before;
  }
  if (lane == kWarp - 1) scratch[thread / kWarp] = sum;
  __syncthreads();
  T first = 0;
  total = 0;
  for (int i = 0; i < warps; ++i) {
    if (i == thread / kWarp) first = total;
    total += scratch[i];
  }
  __syncthreads();
  return first + sum - value;
}

}  // namespace pssl::PSSL_SIMD_NAMESPACE
