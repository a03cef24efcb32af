// Steps on one row of values, and the rows of a map in tasks for threads.
#pragma once

#include "common/cam_maps.h"
#include "common/tensors.h"
#include "common/vec.h"

namespace pssl::PSSL_SIMD_NAMESPACE {

// A map's rows in runs of about kPixels, which a thread takes at a time. Without pixels there is no task.
struct RowTasks {
  static constexpr int64_t kPixels = 1 << 13;

  int64_t H, rows, count;

  RowTasks(int64_t H, int64_t W)
      : H(H),
        rows(std::max<int64_t>(1, kPixels / std::max<int64_t>(1, W))),
        count(W ? (H + rows - 1) / rows : 0) {}
  // f(y) for the rows of one task
  template <class F>
  void each_row(int64_t task, const F& f) const {
    for (int64_t y = task * rows; y < std::min((task + 1) * rows, H); ++y) f(y);
  }
};

// The largest of `top` and n values; NaN counts as larger than all, as in torch.amax.
template <class T>
PSSL_NOINLINE T largest_of(const T* values, int64_t n, T top) {
  int64_t i = 0;
  if (n >= kLanes<T>) {
    Vec<T> v = splat<T>(top);
    for (; i + kLanes<T> <= n; i += kLanes<T>) {
      const Vec<T> next = load<T>(values + i);
      v = (next > v) | (next != next) ? next : v;
    }
    for (int lane = 0; lane < kLanes<T>; ++lane) top = beats(T(v[lane]), top) ? v[lane] : top;
  }
  for (; i < n; ++i) top = beats(values[i], top) ? values[i] : top;
  return top;
}

// Keeps the first of the largest; NaN counts as larger than all.
template <class T>
PSSL_NOINLINE void keep_best(const T* __restrict values, int64_t n, int32_t number, T* __restrict best,
                             int32_t* __restrict region) {
  for (int64_t x = 0; x < n; ++x) {
    const bool better = beats(values[x], best[x]);
    best[x] = better ? values[x] : best[x];
    region[x] = better ? number : region[x];
  }
}

template <class T>
PSSL_NOINLINE const T* divide_row(const T* values, int64_t n, T divisor, T* out) {
  for (int64_t x = 0; x < n; ++x) out[x] = values[x] / divisor;
  return out;
}

template <class T>
PSSL_NOINLINE void relu_row(T* values, int64_t n) {
  for (int64_t x = 0; x < n; ++x) values[x] = relu(values[x]);
}

template <class T>
PSSL_NOINLINE void add_row(const T* __restrict values, int64_t n, T* __restrict sum) {
  for (int64_t x = 0; x < n; ++x) sum[x] += values[x];
}

}  // namespace pssl::PSSL_SIMD_NAMESPACE
