// Vectors of the width that the file is compiled for, by the compiler's vector extension (GCC, Clang).
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__SSE__)
#include <immintrin.h>
#endif

#include "common/simd.h"

namespace pssl::PSSL_SIMD_NAMESPACE {

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
constexpr int kVecRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
constexpr int kVecRegisters = 16;
#else
constexpr int kVecBytes = 16;
constexpr int kVecRegisters = 16;
#endif

template <class T>
constexpr int kLanes = kVecBytes / int(sizeof(T));

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(kVecBytes)));
};
template <class T>
using Vec = typename VecOf<T>::type;

template <class T>
using BitsOf = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

// Whole numbers or masks beside the lanes of a Vec<T>.
template <class T>
using Lanes = typename VecOf<BitsOf<T>>::type;

template <class T>
inline Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
inline void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}

// Stores past the caches, at a multiple of the vector's size: what is written is not read from memory first, and takes no
// room from what will be read again. Other threads see it after streamed().
template <class T>
inline void stream(T* p, Vec<T> v) {
#if defined(__AVX512F__)
  __m512i bits;
  std::memcpy(&bits, &v, sizeof bits);
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bits);
#elif defined(__AVX2__)
  __m256i bits;
  std::memcpy(&bits, &v, sizeof bits);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bits);
#elif defined(__SSE__)
  __m128 bits;
  std::memcpy(&bits, &v, sizeof bits);
  _mm_stream_ps(reinterpret_cast<float*>(p), bits);
#else
  store<T>(p, v);
#endif
}
inline void streamed() {
#if defined(__SSE__)
  _mm_sfence();
#endif
}

// The first n lanes; all of them where n is larger.
template <class T>
inline void store_part(T* p, Vec<T> v, int64_t n) {
  if (n >= kLanes<T>) return store<T>(p, v);
  std::memcpy(p, &v, n * sizeof(T));
}

template <class T>
inline Lanes<T> load_lanes(const BitsOf<T>* p) {
  Lanes<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Whole numbers of 32 bits beside the lanes of a Vec<T>.
template <class T>
struct WholeOf {
  typedef int32_t type __attribute__((vector_size(kLanes<T> * 4)));
};
template <class T>
inline Lanes<T> load_whole(const int32_t* p) {
  typename WholeOf<T>::type v;
  std::memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, Lanes<T>);
}
template <class T>
inline void store_whole(int32_t* p, Lanes<T> v) {
  const auto narrow = __builtin_convertvector(v, typename WholeOf<T>::type);
  std::memcpy(p, &narrow, sizeof narrow);
}

template <class T>
inline Vec<T> splat(T x) {
  return x - Vec<T>{};
}

template <class T>
inline Vec<T> larger(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

// v in the lanes where `kept` is -1, else 0: by its bits, since 0 · NaN is NaN.
template <class T>
inline Vec<T> keep(Vec<T> v, Lanes<T> kept) {
  Lanes<T> bits;
  std::memcpy(&bits, &v, sizeof bits);
  bits &= kept;
  std::memcpy(&v, &bits, sizeof bits);
  return v;
}

// v with lane i exchanged with lane i ^ Step
template <int Step, class T>
inline Vec<T> exchange(Vec<T> v) {
#if defined(__clang__)
  Vec<T> r;
  for (int i = 0; i < kLanes<T>; ++i) r[i] = v[i ^ Step];
  return r;
#else
  Lanes<T> index;
  for (int i = 0; i < kLanes<T>; ++i) index[i] = i ^ Step;
  return __builtin_shuffle(v, index);
#endif
}

// Lane i of the result is lane index[i] of v.
template <class T>
inline Vec<T> pick(Vec<T> v, Lanes<T> index) {
#if defined(__clang__)
  Vec<T> r;
  for (int i = 0; i < kLanes<T>; ++i) r[i] = v[index[i]];
  return r;
#else
  return __builtin_shuffle(v, index);
#endif
}

// The sum and the maximum over the lanes, by a butterfly: the order of additions is fixed by the width alone.
template <class T>
inline T lane_sum(Vec<T> v) {
  if constexpr (kLanes<T> > 8) v += exchange<8, T>(v);
  if constexpr (kLanes<T> > 4) v += exchange<4, T>(v);
  if constexpr (kLanes<T> > 2) v += exchange<2, T>(v);
  v += exchange<1, T>(v);
  return v[0];
}

// The sums over the lanes of N vectors at once, N a power of two: pairs of vectors are halved and added, so that lane i
// belongs to vector i modulo ever higher powers of two.
template <class T, int N, int Step = 1>
inline void lane_sums(Vec<T>* v, T* out) {
  if constexpr (Step == kLanes<T>) {
    std::memcpy(out, v, N * sizeof(Vec<T>));
  } else if constexpr (N > 1) {
    Lanes<T> first;
    for (int i = 0; i < kLanes<T>; ++i) first[i] = i & Step ? 0 : -1;
    for (int k = 0; k < N / 2; ++k) {
      const Vec<T> a = v[2 * k], b = v[2 * k + 1];
      v[k] = (first ? a : b) + exchange<Step, T>(first ? b : a);
    }
    lane_sums<T, N / 2, Step * 2>(v, out);
  } else {
    Vec<T> sum = v[0];
    if constexpr (Step <= 1) sum += exchange<1, T>(sum);
    if constexpr (Step <= 2 && kLanes<T> > 2) sum += exchange<2, T>(sum);
    if constexpr (Step <= 4 && kLanes<T> > 4) sum += exchange<4, T>(sum);
    if constexpr (Step <= 8 && kLanes<T> > 8) sum += exchange<8, T>(sum);
    std::memcpy(out, &sum, Step * sizeof(T));
  }
}

template <class T>
inline T lane_max(Vec<T> v) {
  if constexpr (kLanes<T> > 8) v = larger<T>(v, exchange<8, T>(v));
  if constexpr (kLanes<T> > 4) v = larger<T>(v, exchange<4, T>(v));
  if constexpr (kLanes<T> > 2) v = larger<T>(v, exchange<2, T>(v));
  v = larger<T>(v, exchange<1, T>(v));
  return v[0];
}

// e^x for x <= 0 (a softmax after subtracting its maximum), to about one unit in the last place. x = n ln2 + r with
// |r| <= ln2/2; Taylor's series of e^r to a term below the type's rounding (r^8/8! = 5e-9, r^14/14! = 4e-18). Adding
// 1.5 * 2^mantissa rounds to an integer and leaves it in the low bits; with the exponent's bias added too, these bits
// moved up are 2^n. Results below the smallest normal numbers come out as one of these; they do not count beside the
// maximum's 1.
template <class T>
inline Vec<T> exp_nonpositive(Vec<T> x) {
  constexpr bool single = sizeof(T) == 4;
  constexpr int mantissa = single ? 23 : 52;
  constexpr T lowest = single ? T(-86.6) : T(-707);
  constexpr T round = single ? T(12582912.0 + 127) : T(6755399441055744.0 + 1023);
  constexpr T log2e = T(1.4426950408889634074);
  // ln2 in two parts, the first short enough that n * high is exact
  constexpr T high = single ? T(0.693359375) : T(0.693147180369123816490);
  constexpr T low = single ? T(-2.12194440e-4) : T(1.90821492927058770002e-10);
  x = x < lowest ? splat<T>(lowest) : x;
  const Vec<T> shifted = x * log2e + round;
  const Vec<T> n = shifted - round;
  const Vec<T> r = (x - n * high) - n * low;
  constexpr int degree = single ? 7 : 13;
  constexpr std::array<T, degree + 1> inverse_factorial = [] {
    std::array<T, degree + 1> values{};
    double factorial = 1;
    for (int k = 0; k <= degree; ++k) values[k] = T(1 / factorial), factorial *= k + 1;
    return values;
  }();
  Vec<T> series = splat<T>(inverse_factorial[degree]);
#pragma GCC unroll 16
  for (int k = degree - 1; k >= 0; --k) series = series * r + inverse_factorial[k];
  Lanes<T> exponent;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  exponent <<= mantissa;
  Vec<T> power;
  std::memcpy(&power, &exponent, sizeof power);
  return series * power;  // NaN stays NaN through the series
}

// log(x) for normal x > 0, to about one unit in the last place. x = 2^n m with m in [sqrt(1/2), sqrt(2)), and
// log m = 2 (s + s^3/3 + s^5/5 + ...) with s = (m - 1)/(m + 1), |s| <= 0.1716: the first term left out is below the
// type's rounding (2 s^11/11 = 7e-10, 2 s^23/23 = 2e-19).
template <class T>
inline Vec<T> log_positive(Vec<T> x) {
  constexpr bool single = sizeof(T) == 4;
  constexpr int mantissa = single ? 23 : 52;
  using Bits = Lanes<T>;
  constexpr BitsOf<T> root_half = single ? BitsOf<T>(0x3f3504f3) : BitsOf<T>(0x3fe6a09e667f3bcd);
  Bits bits;
  std::memcpy(&bits, &x, sizeof bits);
  const Bits n = (bits - root_half) >> mantissa;
  bits -= n << mantissa;
  Vec<T> m;
  std::memcpy(&m, &bits, sizeof m);
  const Vec<T> s = (m - T(1)) / (m + T(1)), square = s * s;
  Vec<T> series = {};
#pragma GCC unroll 16
  for (int k = single ? 9 : 21; k >= 3; k -= 2) series = (series + T(1.0 / k)) * square;
  const Vec<T> log_m = T(2) * (s + s * series);
  const Vec<T> result = __builtin_convertvector(n, Vec<T>) * T(0.6931471805599453094) + log_m;
  return x == x ? result : x;
}

// Calls f(columns) with the number of columns, a multiple of the vector length, as a constant where it is small:
// loops over the classes of a pixel then stay in registers.
template <class T, class F>
inline void with_columns(int64_t columns, const F& f) {
  constexpr int64_t n = kLanes<T>;
  if constexpr (sizeof(T) == 4) {
    if (columns == n) return f(std::integral_constant<int64_t, n>{});
    if (columns == 2 * n) return f(std::integral_constant<int64_t, 2 * n>{});
    if (columns == 3 * n) return f(std::integral_constant<int64_t, 3 * n>{});
  }
  f(columns);
}

// Stencils over several maps that share their weights: calls f(maps, vectors) with the number of maps, 1..kMapGroup, and
// of vectors to work on at a time as constants, so that weights are loaded once for all maps and sums stay in registers.
constexpr int64_t kMapGroup = 4;
template <class F>
inline void with_map_group(int64_t maps, const F& f) {
  using std::integral_constant;
  switch (maps) {
    case 1:
      return f(integral_constant<int, 1>{}, integral_constant<int, 8>{});
    case 2:
      return f(integral_constant<int, 2>{}, integral_constant<int, 4>{});
    case 3:
      return f(integral_constant<int, 3>{}, integral_constant<int, 2>{});
    default:
      return f(integral_constant<int, 4>{}, integral_constant<int, 2>{});
  }
}

// Room for one pixel's classes: on the stack where their number is a constant, else behind a pointer.
template <class T, class Columns>
struct PixelScratch {
  alignas(64) T values[Columns::value];
  explicit PixelScratch(Columns) {}
  T* get() { return values; }
};
template <class T>
struct PixelScratch<T, int64_t> {
  std::vector<T> values;
  explicit PixelScratch(int64_t columns) : values(columns) {}
  T* get() { return values.data(); }
};

}  // namespace pssl::PSSL_SIMD_NAMESPACE
