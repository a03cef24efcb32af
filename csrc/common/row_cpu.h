// Steps on one row of values, and the rows of a map in tasks for threads.
#pragma once

#include <limits>

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

// One step of best_of_rows: R rows, numbered from `number` on, beside the best of those before, if there are any. The same
// pixels of `next` are asked for, as many rows.
template <int R, class T>
PSSL_NOINLINE void best_of_group(const T* const* rows, const T* divisors, int64_t number, int64_t n,
                                 const T* const* next, T* best, int32_t* region) {
  constexpr int V = 2;
  auto block = [=](auto vectors, int64_t x) {
    constexpr int N = decltype(vectors)::value;
    Vec<T> top[N];
    Lanes<T> found[N];
    for (int v = 0; v < N; ++v) {
      top[v] = number ? load<T>(best + x + v * kLanes<T>) : splat<T>(-std::numeric_limits<T>::infinity());
      found[v] = number ? load_whole<T>(region + x + v * kLanes<T>) : Lanes<T>{};
    }
#pragma GCC unroll 4
    for (int k = 0; k < R; ++k) {
      for (int v = 0; v < N; v += 64 / kVecBytes) __builtin_prefetch(next[k] + x + v * kLanes<T>);
#pragma GCC unroll 2
      for (int v = 0; v < N; ++v) {
        Vec<T> value = load<T>(rows[k] + x + v * kLanes<T>);
        if (divisors) value = value / divisors[k];
        const Lanes<T> better = beats<Vec<T>>(value, top[v]);
        top[v] = better ? value : top[v];
        found[v] = better ? Lanes<T>{} + BitsOf<T>(number + k) : found[v];
      }
    }
    for (int v = 0; v < N; ++v) {
      store<T>(best + x + v * kLanes<T>, top[v]);
      store_whole<T>(region + x + v * kLanes<T>, found[v]);
    }
  };
  // the last block begins early enough to be whole: what it does twice comes out the same
  if (n >= V * kLanes<T>) {
    for (int64_t x = 0; x < n; x += V * kLanes<T>)
      block(std::integral_constant<int, V>{}, std::min(x, n - V * kLanes<T>));
    return;
  }
  if (number == 0) std::fill_n(best, n, -std::numeric_limits<T>::infinity()), std::fill_n(region, n, 0);
  for (int k = 0; k < R; ++k)
    for (int64_t x = 0; x < n; ++x) {
      const T value = divisors ? rows[k][x] / divisors[k] : rows[k][x];
      if (beats(value, best[x])) best[x] = value, region[x] = int32_t(number + k);
    }
}

// keep_best over `count` rows of values, each divided by its divisor if there are any. Pixels for which no value is above
// -infinity get that and 0. A few rows at a time: as many streams as there are classes come in slower than these.
template <class T>
PSSL_NOINLINE void best_of_rows(const T* const* rows, const T* divisors, int64_t count, int64_t n, T* best,
                                int32_t* region) {
  if (count == 0) std::fill_n(best, n, -std::numeric_limits<T>::infinity()), std::fill_n(region, n, 0);
  auto group = [&](auto together, int64_t k) {
    constexpr int R = decltype(together)::value;
    best_of_group<R>(rows + k, divisors ? divisors + k : nullptr, k, n, rows + std::min(k + R, count - R),
                     best, region);
  };
  int64_t k = 0;
  for (; k + 4 <= count; k += 4) group(std::integral_constant<int, 4>{}, k);
  for (; k + 2 <= count; k += 2) group(std::integral_constant<int, 2>{}, k);
  for (; k < count; ++k) group(std::integral_constant<int, 1>{}, k);
}

template <class T>
PSSL_NOINLINE void divide_row(T* values, int64_t n, T divisor) {
  for (int64_t x = 0; x < n; ++x) values[x] /= divisor;
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
