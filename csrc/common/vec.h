// Vectors of the width that the file is compiled for, by the compiler's vector extension (GCC, Clang).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

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

template <class T>
inline Vec<T> splat(T x) {
  return Vec<T>{} + x;
}

template <class T>
inline Vec<T> larger(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

// v with lane i exchanged with lane i ^ Step
template <int Step, class T>
inline Vec<T> exchange(Vec<T> v) {
#if defined(__clang__)
  Vec<T> r;
  for (int i = 0; i < kLanes<T>; ++i) r[i] = v[i ^ Step];
  return r;
#else
  typename VecOf<BitsOf<T>>::type index;
  for (int i = 0; i < kLanes<T>; ++i) index[i] = i ^ Step;
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

template <class T>
inline T lane_max(Vec<T> v) {
  if constexpr (kLanes<T> > 8) v = larger<T>(v, exchange<8, T>(v));
  if constexpr (kLanes<T> > 4) v = larger<T>(v, exchange<4, T>(v));
  if constexpr (kLanes<T> > 2) v = larger<T>(v, exchange<2, T>(v));
  v = larger<T>(v, exchange<1, T>(v));
  return v[0];
}

// e^x for x <= 0 (a softmax after subtracting its maximum), to about one unit in the last place. x = n ln2 + r with
// |r| <= ln2/2; Taylor's series of e^r to a term below the type's rounding (r^8/8! = 5e-9, r^14/14! = 4e-18); n goes
// into the exponent bits. Adding 1.5 * 2^mantissa rounds to an integer and leaves it in the low bits. Results below
// the smallest normal number come out as that number; they do not count beside the maximum's 1.
template <class T>
inline Vec<T> exp_nonpositive(Vec<T> x) {
  constexpr bool single = sizeof(T) == 4;
  constexpr int mantissa = single ? 23 : 52;
  constexpr T lowest = single ? T(-86.6) : T(-707);
  constexpr T round = single ? T(12582912.0) : T(6755399441055744.0);
  constexpr T log2e = T(1.4426950408889634074);
  // ln2 in two parts, the first short enough that n * high is exact
  constexpr T high = single ? T(0.693359375) : T(0.693147180369123816490);
  constexpr T low = single ? T(-2.12194440e-4) : T(1.90821492927058770002e-10);
  x = x < lowest ? splat<T>(lowest) : x;
  Vec<T> shifted = x * log2e + round;
  Vec<T> n = shifted - round;
  Vec<T> r = (x - n * high) - n * low;
  constexpr int degree = single ? 7 : 13;
  Vec<T> series = splat<T>(T(1));
#pragma GCC unroll 16
  for (int k = degree; k >= 1; --k) series = series * (r * T(1.0 / k)) + T(1);
  using Bits = typename VecOf<BitsOf<T>>::type;
  Bits exponent, value;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  std::memcpy(&value, &series, sizeof value);
  value += exponent << mantissa;
  Vec<T> result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}

}  // namespace pssl::PSSL_SIMD_NAMESPACE
