// CUDA's words for cuda_on_cpu.h: what kernels may use. What is not here does not compile.
#pragma once

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (::cuda_on_cpu::running->current().index)
#define blockIdx (::cuda_on_cpu::running->index)
#define blockDim (::cuda_on_cpu::running->size)
#define gridDim (::cuda_on_cpu::running->grid)

constexpr int warpSize = 32;

#define CUDA_ON_CPU_VECTOR(name, type, align)                                       \
  struct alignas(align) name##2 { type x, y; };                                     \
  struct alignas(2 * (align) < 16 ? 2 * (align) : 16) name##4 { type x, y, z, w; }; \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                  \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
CUDA_ON_CPU_VECTOR(float, float, 8)
CUDA_ON_CPU_VECTOR(int, int, 8)
CUDA_ON_CPU_VECTOR(uint, unsigned, 8)
CUDA_ON_CPU_VECTOR(double, double, 16)
#undef CUDA_ON_CPU_VECTOR

// -- barriers and warp collectives; the default argument tells where they were called

inline void __syncthreads(cuda_on_cpu::Where where = cuda_on_cpu::Where::current()) {
  cuda_on_cpu::running->barrier(0, where);
}
inline int __syncthreads_count(int vote, cuda_on_cpu::Where where = cuda_on_cpu::Where::current()) {
  return cuda_on_cpu::running->barrier(vote, where);
}
inline int __syncthreads_or(int vote, cuda_on_cpu::Where where = cuda_on_cpu::Where::current()) {
  return cuda_on_cpu::running->barrier(vote, where) > 0;
}
inline void __syncwarp(unsigned mask = ~0u, cuda_on_cpu::Where where = cuda_on_cpu::Where::current()) {
  cuda_on_cpu::running->collective(mask, cuda_on_cpu::Collective::barrier, 0, 0, where);
}
inline unsigned __ballot_sync(unsigned mask, int vote,
                              cuda_on_cpu::Where where = cuda_on_cpu::Where::current()) {
  const auto kind = cuda_on_cpu::Collective::ballot;
  return unsigned(cuda_on_cpu::running->collective(mask, kind, vote != 0, 0, where));
}
inline int __any_sync(unsigned mask, int vote, cuda_on_cpu::Where where = cuda_on_cpu::Where::current()) {
  return __ballot_sync(mask, vote, where) != 0;
}
inline int __all_sync(unsigned mask, int vote, cuda_on_cpu::Where where = cuda_on_cpu::Where::current()) {
  return __ballot_sync(mask, vote, where) == mask;
}
template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32,
              cuda_on_cpu::Where where = cuda_on_cpu::Where::current()) {
  const int group = int(cuda_on_cpu::lane()) & ~(width - 1);
  return cuda_on_cpu::shuffle(mask, v, group + (source & (width - 1)), where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int lanes, int width = 32,
                  cuda_on_cpu::Where where = cuda_on_cpu::Where::current()) {
  const int own = int(cuda_on_cpu::lane());
  return cuda_on_cpu::shuffle(mask, v, cuda_on_cpu::within(own ^ lanes, width), where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned by, int width = 32,
                   cuda_on_cpu::Where where = cuda_on_cpu::Where::current()) {
  const int own = int(cuda_on_cpu::lane());
  return cuda_on_cpu::shuffle(mask, v, cuda_on_cpu::within(own + int(by), width), where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned by, int width = 32,
                 cuda_on_cpu::Where where = cuda_on_cpu::Where::current()) {
  const int own = int(cuda_on_cpu::lane());
  return cuda_on_cpu::shuffle(mask, v, cuda_on_cpu::within(own - int(by), width), where);
}

// -- atomics: one thread runs at a time. As in CUDA integers only but for atomicAdd, which kernels that promise the
// same bits on every run use on integers alone.

template <class T>
T cuda_on_cpu_replace(T* p, T value) {
  static_assert(std::is_integral_v<T> && sizeof(T) >= 4,
                "no atomics on floating numbers: their sum has no fixed order");
  const T old = *p;
  *p = value;
  return old;
}
template <class T>
T atomicAdd(T* p, std::type_identity_t<T> v) {
  return cuda_on_cpu_replace(p, T(*p + v));
}
template <class T>
T atomicMax(T* p, std::type_identity_t<T> v) {
  return cuda_on_cpu_replace(p, std::max(*p, v));
}
template <class T>
T atomicMin(T* p, std::type_identity_t<T> v) {
  return cuda_on_cpu_replace(p, std::min(*p, v));
}
template <class T>
T atomicOr(T* p, std::type_identity_t<T> v) {
  return cuda_on_cpu_replace(p, T(*p | v));
}
template <class T>
T atomicExch(T* p, std::type_identity_t<T> v) {
  return cuda_on_cpu_replace(p, v);
}
template <class T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> v) {
  return cuda_on_cpu_replace(p, *p == expected ? v : *p);
}

// -- the rest

inline void __threadfence() {}
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz(unsigned(v)) : 32; }
inline float rsqrtf(float v) { return 1 / std::sqrt(v); }
inline double rsqrt(double v) { return 1 / std::sqrt(v); }

template <class To, class From>
To cuda_on_cpu_bits(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}
inline unsigned __float_as_uint(float v) { return cuda_on_cpu_bits<unsigned>(v); }
inline float __uint_as_float(unsigned v) { return cuda_on_cpu_bits<float>(v); }
inline long long __double_as_longlong(double v) { return cuda_on_cpu_bits<long long>(v); }
inline double __longlong_as_double(long long v) { return cuda_on_cpu_bits<double>(v); }
