// What a CUDA operator needs of its device: the current stream, its limits, launches that say who failed.
//
// Everything that CUDA writes in a syntax of its own, or asks of the runtime, is in this file. The tests have their own
// form of it, under which kernels run on the CPU (tests/cuda). So kernels are written with
//
//   launch(call, kernel<T>, grid, block, shared_bytes, arguments...)   for kernel<T><<<...>>>(...)
//   launch_early(call, early, kernel<T>, grid, block, arguments...)    for one that begins before the last has ended
//   PSSL_SHARED(name, T[32]);                                          for __shared__ T name[32];
//   PSSL_DYNAMIC_SHARED(T, name);                                      for extern __shared__ T name[];
//   PSSL_REGISTER_CUDA(m) { m.impl(...); }                             for STABLE_TORCH_LIBRARY_IMPL(pssl, CUDA, m)
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/types.h"

#ifdef PSSL_CUDA_ON_CPU
#include "cuda_on_cpu.h"
#else
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <mutex>

// A symbol of libtorch_cuda. Weak: the library loads in a CPU build of torch too, where nothing calls it.
#pragma weak aoti_torch_get_current_cuda_stream
#endif

namespace pssl::PSSL_SIMD_NAMESPACE {

// What the choice of a launch depends on.
struct DeviceLimits {
  int processors;        // streaming multiprocessors
  int64_t shared_bytes;  // dynamic shared memory that one block can have
};

// Shared memory that a kernel may declare beside the dynamic one. It counts towards the device's limits, that for launches
// which do not ask for more among them; the tests fail a kernel that declares more.
constexpr int64_t kMostStaticShared = 4 << 10;
constexpr int64_t kSharedUnasked = 48 << 10;  // of both, on every device

template <class T>
using Same = T;  // the argument's own type: `__shared__ Same<float[32]> name` has the extents on the left

#ifdef PSSL_CUDA_ON_CPU

inline DeviceLimits device_limits(int) {
  return {int(cuda_on_cpu::setting("PSSL_CUDA_ON_CPU_PROCESSORS", 3)),
          cuda_on_cpu::setting("PSSL_CUDA_ON_CPU_SHARED", 64 << 10)};
}

#define PSSL_SHARED(name, ...)                                                                            \
  static const char name##_key = 0;                                                                       \
  auto& name =                                                                                            \
      *static_cast<::pssl::PSSL_SIMD_NAMESPACE::Same<__VA_ARGS__>*>(::cuda_on_cpu::running->shared_array( \
          &name##_key, sizeof(::pssl::PSSL_SIMD_NAMESPACE::Same<__VA_ARGS__>)))
#define PSSL_DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(::cuda_on_cpu::running->dynamic_shared())
#define PSSL_REGISTER_CUDA(m) STABLE_TORCH_LIBRARY_IMPL(pssl, CPU, m)

#else

// Asked once a device.
inline const DeviceLimits& device_limits(int device) {
  constexpr int kDevices = 64;
  static std::array<DeviceLimits, kDevices> limits;
  static std::array<std::once_flag, kDevices> asked;
  STD_TORCH_CHECK(device >= 0 && device < kDevices, "pssl: CUDA device ", device, " is not among the first ",
                  kDevices);
  std::call_once(asked[device], [&] {
    int processors = 1, shared = kSharedUnasked;
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    limits[device] = {processors, shared - kMostStaticShared};
  });
  return limits[device];
}

#define PSSL_SHARED(name, ...) __shared__::pssl::PSSL_SIMD_NAMESPACE::Same<__VA_ARGS__> name
#define PSSL_DYNAMIC_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char pssl_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(pssl_dynamic_shared)
#define PSSL_REGISTER_CUDA(m) STABLE_TORCH_LIBRARY_IMPL(pssl, CUDA, m)

#endif

// One call of an operator: makes the tensor's device the current one for as long as it lives.
class CudaCall {
 public:
  CudaCall(const char* op, const Tensor& on)
      : op(op),
        limits(device_limits(on.get_device_index()))
#ifndef PSSL_CUDA_ON_CPU
        ,
        guard_(on.get_device_index())
#endif
  {
#ifndef PSSL_CUDA_ON_CPU
    cudaSetDevice(on.get_device_index());  // this library links a runtime of its own, beside torch's
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
#endif
  }

  const char* op;
  DeviceLimits limits;
#ifndef PSSL_CUDA_ON_CPU
  cudaStream_t stream;
#endif

  // The number of blocks for `tasks` that blocks take in strides: enough to fill the device `waves` times.
  int64_t blocks_for(int64_t tasks, int64_t waves) const {
    const int64_t most = waves * limits.processors;
    return tasks < most ? tasks : most;
  }

 private:
#ifndef PSSL_CUDA_ON_CPU
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

// Blocks of one launch along x.
inline dim3 grid_of(int64_t blocks) {
  STD_TORCH_CHECK(blocks <= 2147483647, "pssl: a launch of ", blocks, " blocks");
  return dim3(unsigned(blocks));
}

// Starts kernel(arguments...) on the call's stream; nothing where the grid is empty. An error names the operator.
template <class... P, class... A>
void launch(const CudaCall& call, void (*kernel)(P...), dim3 grid, dim3 block, int64_t shared_bytes,
            const A&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  STD_TORCH_CHECK(shared_bytes <= call.limits.shared_bytes, call.op, ": the kernel needs ", shared_bytes,
                  " bytes of shared memory, the device has ", call.limits.shared_bytes, " a block");
#ifdef PSSL_CUDA_ON_CPU
  cuda_on_cpu::launch(grid, block, size_t(shared_bytes), size_t(kMostStaticShared),
                      [&] { kernel(static_cast<P>(arguments)...); });
#else
  if (shared_bytes + kMostStaticShared > kSharedUnasked)
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
  kernel<<<grid, block, size_t(shared_bytes), call.stream>>>(static_cast<P>(arguments)...);
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, call.op, ": CUDA launch failed: ", cudaGetErrorString(error));
#endif
}

// Starts a kernel as `launch` does, but `early` before the stream's last kernel has ended: from where all of that one's
// blocks have called let_next_kernel_begin or ended. Until it calls wait_for_last_kernel it may not write, nor read what
// that one or others started early write; every thread has to call it.
template <class... P, class... A>
void launch_early(const CudaCall& call, bool early, void (*kernel)(P...), dim3 grid, dim3 block,
                  const A&... arguments) {
  if (!early) return launch(call, kernel, grid, block, 0, arguments...);
#ifndef PSSL_CUDA_ON_CPU
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block, config.stream = call.stream;
  config.attrs = &overlap, config.numAttrs = 1;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...);
  STD_TORCH_CHECK(error == cudaSuccess, call.op, ": CUDA launch failed: ", cudaGetErrorString(error));
#endif
}

// Whether a kernel that calls wait_for_last_kernel was compiled for devices where that waits.
template <class... P>
bool can_begin_early(void (*kernel)(P...)) {
#ifdef PSSL_CUDA_ON_CPU
  return kernel == nullptr;  // kernels run one after another
#else
  cudaFuncAttributes found{};
  return cudaFuncGetAttributes(&found, kernel) == cudaSuccess && found.ptxVersion >= 90;
#endif
}

__device__ inline void wait_for_last_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ inline void let_next_kernel_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// New memory on the device of `like`, from torch's allocator: safe under CUDA graphs.
inline Tensor new_on_device(const Tensor& like, std::vector<int64_t> sizes, ScalarType type) {
  return torch::stable::new_empty(like, sizes, type);
}

}  // namespace pssl::PSSL_SIMD_NAMESPACE
