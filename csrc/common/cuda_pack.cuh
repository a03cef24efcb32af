// Four numbers side by side, which a thread loads and stores at once: those of four maps or classes at a pixel.
#pragma once

#include <cstring>

#include "common/bilinear.h"
#include "common/cuda_device.cuh"

namespace pssl::PSSL_SIMD_NAMESPACE {

constexpr int kPack = 4;

// How many packs hold `count` numbers.
PSSL_HD inline int64_t packs_of(int64_t count) { return (count + kPack - 1) / kPack; }

template <class T>
struct alignas(16) Pack {
  T v[kPack];

  // f(0), f(1), f(2), f(3)
  template <class F>
  PSSL_HD static Pack of(const F& f) {
    return {f(0), f(1), f(2), f(3)};
  }
  PSSL_HD friend Pack operator+(const Pack& a, const Pack& b) {
    return of([&](int i) { return a.v[i] + b.v[i]; });
  }
  PSSL_HD friend Pack operator-(const Pack& a, const Pack& b) {
    return of([&](int i) { return a.v[i] - b.v[i]; });
  }
  PSSL_HD friend Pack operator*(const Pack& a, const Pack& b) {
    return of([&](int i) { return a.v[i] * b.v[i]; });
  }
  PSSL_HD friend Pack operator*(T a, const Pack& b) {
    return of([&](int i) { return a * b.v[i]; });
  }
  PSSL_HD Pack& operator+=(const Pack& other) { return *this = *this + other; }
  PSSL_HD Pack& operator*=(T factor) { return *this = factor * *this; }
};

// 16 bytes, the most that an instruction loads or stores.
template <class T>
struct Wide;
template <>
struct Wide<float> {
  using Type = float4;
};
template <>
struct Wide<double> {
  using Type = double2;
};

// The members of a Pack one by one would be loads and stores one by one.
template <class T>
__device__ inline Pack<T> load_pack(const Pack<T>* from) {
  Pack<T> value;
#pragma unroll
  for (int i = 0; i < int(sizeof value) / 16; ++i) {
    const typename Wide<T>::Type part = reinterpret_cast<const typename Wide<T>::Type*>(from)[i];
    memcpy(value.v + i * 16 / int(sizeof(T)), &part, sizeof part);
  }
  return value;
}

template <class T>
__device__ inline void store_pack(Pack<T>* to, const Pack<T>& value) {
#pragma unroll
  for (int i = 0; i < int(sizeof value) / 16; ++i) {
    typename Wide<T>::Type part;
    memcpy(&part, value.v + i * 16 / int(sizeof(T)), sizeof part);
    reinterpret_cast<typename Wide<T>::Type*>(to)[i] = part;
  }
}

// A tensor's memory, at its beginning.
template <class T>
Pack<T>* packs_in(Tensor& numbers) {
  return reinterpret_cast<Pack<T>*>(numbers.mutable_data_ptr<T>());
}

}  // namespace pssl::PSSL_SIMD_NAMESPACE
