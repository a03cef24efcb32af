// Products of pixels with class vectors, a few channels at a time. The sums of all classes wait in the first-level cache,
// so that a feature can be read once, straight from where it lies, and is used for every class while it is in a register.
// With the sums in registers, a few classes at a time, the features would be read again and again, and so would have to be
// packed beforehand: rows that are a power of two apart fall onto each other in the cache, where only a few such rows fit.
//
//   add_products:    z[c][p] += sum_d f[d][p] q[d][c],  squares[p] += sum_d f[d][p]^2
//   add_class_sums:  s[d][c] += sum_p f[d][p] g[c][p]
#pragma once

#include "common/tile_cpu.h"

namespace pssl::PSSL_SIMD_NAMESPACE {

constexpr int kChannelBlock = 4;

// Calls body(c, n) for runs of classes [c, c + n) whose sums, rows of `ld`, leave room in a first-level cache of 32 KiB for
// the features they are made of.
template <class T, class F>
void for_class_runs(int64_t C, int64_t ld, const F& body) {
  const int64_t together = std::max<int64_t>(1, (int64_t(24) << 10) / (ld * int64_t(sizeof(T))));
  for (int64_t c = 0; c < C; c += together) body(c, std::min(together, C - c));
}

// Calls body(integral_constant N, d) for blocks of channels that cover D.
template <class F>
void for_channel_blocks(int64_t D, const F& body) {
  int64_t d = 0;
  for (; d + kChannelBlock <= D; d += kChannelBlock) body(std::integral_constant<int, kChannelBlock>{}, d);
  for (; d < D; ++d) body(std::integral_constant<int, 1>{}, d);
}

// Which lanes of the vector of pixels that begins at p count, by their labels, or by anything else that is below 0 for those
// that do not: a feature that counts for nothing may be NaN.
template <class T>
inline Lanes<T> counted_lanes(const BitsOf<T>* labels, int64_t p) {
  return load_lanes<T>(labels + p) >= 0;
}

// Where add_products leaves what it reads, for later steps, and what it asks for ahead of time; null: nowhere, nothing.
template <class T>
struct OnTheWay {
  T* copy = nullptr;  // [N][ld]
  int64_t ld = 0;
  const BitsOf<T>* labels = nullptr;  // zeros are copied for pixels that do not count, where given
  const T* next = nullptr;            // rows as far apart as the features
};

// z[c][p] += sum_d f[d][p] q[d][c] over N channels, for c < C and p < pixels, a multiple of the vector length; q's rows
// are cp apart. squares[p] += sum_d f[d][p]^2 unless it is null. Without classes it packs, faster than pack_row.
template <int N, class T>
PSSL_NOINLINE void add_products(const T* f, int64_t ldf, int64_t pixels, const T* q, int64_t cp, int64_t C,
                                T* z, int64_t ldz, T* squares, OnTheWay<T> way) {
  auto block = [&](auto vectors, int64_t p) {
    constexpr int V = decltype(vectors)::value;
    Vec<T> x[N][V];
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) x[i][v] = load<T>(f + i * ldf + p + v * kLanes<T>);
    if (way.copy)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const int64_t at = p + v * kLanes<T>;
        const Lanes<T> counted = way.labels ? counted_lanes<T>(way.labels, at) : ~Lanes<T>{};
#pragma GCC unroll 4
        for (int i = 0; i < N; ++i) store<T>(way.copy + i * way.ld + at, keep<T>(x[i][v], counted));
      }
    if (way.next)
      for (int i = 0; i < N; ++i)
        for (int v = 0; v < V; ++v) __builtin_prefetch(way.next + i * ldf + p + v * kLanes<T>);
    if (squares)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        Vec<T> sum = load<T>(squares + p + v * kLanes<T>);
#pragma GCC unroll 4
        for (int i = 0; i < N; ++i) sum += x[i][v] * x[i][v];
        store<T>(squares + p + v * kLanes<T>, sum);
      }
    for (int64_t c = 0; c < C; ++c) {
      T* own = z + c * ldz + p;
      Vec<T> sum[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[v] = load<T>(own + v * kLanes<T>);
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[v] += x[i][v] * q[i * cp + c];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) store<T>(own + v * kLanes<T>, sum[v]);
    }
  };
  constexpr int kWide = kVecRegisters >= 32 ? 4 : 2;  // N · kWide features, kWide sums, one q
  int64_t p = 0;
  for (; p + kWide * kLanes<T> <= pixels; p += kWide * kLanes<T>)
    block(std::integral_constant<int, kWide>{}, p);
  for (; p < pixels; p += kLanes<T>) block(std::integral_constant<int, 1>{}, p);
}

// The same over the n channels of a packed run f [n][ld].
template <class T>
void add_packed_products(const T* f, int64_t ld, int64_t pixels, int64_t n, const T* q, int64_t cp, int64_t C,
                         T* z, int64_t ldz, T* squares) {
  for_channel_blocks(n, [&](auto block, int64_t d) {
    add_products<decltype(block)::value, T>(f + d * ld, ld, pixels, q + d * cp, cp, C, z, ldz, squares, {});
  });
}

// z[c][p] = sum_d f[d][p] q[d][c] of a packed tile, for c < C and p < pixels, a multiple of the vector length.
template <class T>
void packed_products(const T* f, int64_t ld, int64_t pixels, int64_t D, const T* q, int64_t cp, int64_t C,
                     T* z, int64_t ldz) {
  for_class_runs<T>(C, ldz, [&](int64_t c, int64_t n) {
    for (int64_t k = c; k < c + n; ++k) std::fill_n(z + k * ldz, pixels, T(0));
    add_packed_products<T>(f, ld, pixels, D, q + c, cp, n, z + c * ldz, ldz, nullptr);
  });
}

// s[d][c] += sum_p f[d][p] g[c][p] over N channels, for c < C and p < pixels, a multiple of the vector length; s's rows are
// cp apart. Features of pixels that do not count must have been cleared, since g is multiplied by them.
template <int N, class T>
PSSL_NOINLINE void add_class_sums(const T* f, int64_t ld, int64_t pixels, const T* g, int64_t ldg, int64_t C,
                                  T* s, int64_t cp) {
  auto classes = [&](auto rows, int64_t c) {
    constexpr int R = decltype(rows)::value;
    Vec<T> sum[R][N];  // cleared one by one: GCC would clear the array in memory
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) sum[r][i] = Vec<T>{};
    for (int64_t p = 0; p < pixels; p += kLanes<T>) {
      Vec<T> x[N];
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) x[i] = load<T>(f + i * ld + p);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const Vec<T> v = load<T>(g + (c + r) * ldg + p);
#pragma GCC unroll 4
        for (int i = 0; i < N; ++i) sum[r][i] += x[i] * v;
      }
    }
    T* own = s + c;
    for (int r = 0; r < R; ++r) {
      T sums[N];
      lane_sums<T, N>(sum[r], sums);
      for (int i = 0; i < N; ++i) own[i * cp + r] += sums[i];
    }
  };
  constexpr int kRows = kVecRegisters >= 32 ? 6 : 3;  // N · kRows sums, N features, one g
  int64_t c = 0;
  for (; c + kRows <= C; c += kRows) classes(std::integral_constant<int, kRows>{}, c);
  for (; c < C; ++c) classes(std::integral_constant<int, 1>{}, c);
}

}  // namespace pssl::PSSL_SIMD_NAMESPACE
