// Small tables of numbers made on the host, brought to the device in the parameters of a kernel: no copy that would wait, or
// that a CUDA graph could not hold.
#pragma once

#include <type_traits>
#include <vector>

#include "common/cuda_block.cuh"

namespace pssl::PSSL_SIMD_NAMESPACE {

template <class E>
struct TablePart {
  static constexpr int kMost = 2048 / int(sizeof(E));
  int count;
  E entry[kMost];
};

template <class E>
__global__ void write_table(const __grid_constant__ TablePart<E> part, E* out) {
  for (int i = block_thread(); i < part.count; i += block_threads()) out[i] = part.entry[i];
}

// A copy of `entries` in new memory on the device of `like`.
template <class E>
class DeviceTable {
 public:
  DeviceTable(const CudaCall& call, const Tensor& like, const std::vector<E>& entries)
      : memory_(new_on_device(like, {int64_t(entries.size() * sizeof(E))}, ScalarType::Byte)) {
    static_assert(std::is_trivially_copyable_v<E>);
    const int64_t count = int64_t(entries.size());
    for (int64_t first = 0; first < count; first += TablePart<E>::kMost) {
      TablePart<E> part;
      part.count = int(count - first < part.kMost ? count - first : part.kMost);
      for (int i = 0; i < part.count; ++i) part.entry[i] = entries[first + i];
      launch(call, write_table<E>, dim3(1), dim3(128), 0, part, get() + first);
    }
  }
  E* get() { return reinterpret_cast<E*>(memory_.mutable_data_ptr<uint8_t>()); }

 private:
  Tensor memory_;
};

}  // namespace pssl::PSSL_SIMD_NAMESPACE
