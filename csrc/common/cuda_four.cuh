// Four numbers side by side, which a thread loads and stores at once: of cells, classes or channels in registers, and in
// packs, of four maps or classes at a pixel.
#pragma once

#include <cstring>

#include "common/bilinear.h"
#include "common/cuda_device.cuh"

namespace pssl::PSSL_SIMD_NAMESPACE {

constexpr int kFour = 4;

template <class T>
struct alignas(16) Four {
  T v[kFour];

  // f(0), f(1), f(2), f(3)
  template <class F>
  PSSL_HD static Four of(const F& f) {
    return {f(0), f(1), f(2), f(3)};
  }
  PSSL_HD friend Four operator+(const Four& a, const Four& b) {
    return of([&](int i) { return a.v[i] + b.v[i]; });
  }
  PSSL_HD friend Four operator-(const Four& a, const Four& b) {
    return of([&](int i) { return a.v[i] - b.v[i]; });
  }
  PSSL_HD friend Four operator*(const Four& a, const Four& b) {
    return of([&](int i) { return a.v[i] * b.v[i]; });
  }
  PSSL_HD friend Four operator*(T a, const Four& b) {
    return of([&](int i) { return a * b.v[i]; });
  }
  PSSL_HD Four& operator+=(const Four& other) { return *this = *this + other; }
  PSSL_HD Four& operator*=(T factor) { return *this = factor * *this; }
};

template <class T>
__device__ inline Four<T>& four(T* p) {
  return *reinterpret_cast<Four<T>*>(p);
}
template <class T>
__device__ inline const Four<T>& four(const T* p) {
  return *reinterpret_cast<const Four<T>*>(p);
}

// How many packs hold `count` numbers.
PSSL_HD inline int64_t packs_of(int64_t count) { return (count + kFour - 1) / kFour; }

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

// The members of a Four one by one would be loads and stores one by one.
template <class T>
__device__ inline Four<T> load_pack(const Four<T>* from) {
  Four<T> value;
#pragma unroll
  for (int i = 0; i < int(sizeof value) / 16; ++i) {
    const typename Wide<T>::Type part = reinterpret_cast<const typename Wide<T>::Type*>(from)[i];
    memcpy(value.v + i * 16 / int(sizeof(T)), &part, sizeof part);
  }
  return value;
}

template <class T>
__device__ inline void store_pack(Four<T>* to, const Four<T>& value) {
#pragma unroll
  for (int i = 0; i < int(sizeof value) / 16; ++i) {
    typename Wide<T>::Type part;
    memcpy(&part, value.v + i * 16 / int(sizeof(T)), sizeof part);
    reinterpret_cast<typename Wide<T>::Type*>(to)[i] = part;
  }
}

// A tensor's memory, at its beginning.
template <class T>
Four<T>* packs_in(Tensor& numbers) {
  return reinterpret_cast<Four<T>*>(numbers.mutable_data_ptr<T>());
}

}  // namespace pssl::PSSL_SIMD_NAMESPACE
