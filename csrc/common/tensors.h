// Views of tensors for CPU loops: strides, element types, errors.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/kept_memory.h"
#include "common/simd.h"
#include "common/types.h"

namespace pssl::PSSL_SIMD_NAMESPACE {

// Compiled once a type: the callers are many and the bodies long.
#define PSSL_NOINLINE __attribute__((noinline))

// Copies n elements, `stride` apart, of a floating or integer tensor into `out`.
template <class T>
PSSL_NOINLINE void read_elements(const Tensor& t, int64_t offset, int64_t stride, int64_t n, T* out) {
  auto copy = [&](auto zero) {
    const auto* p = static_cast<const decltype(zero)*>(t.const_data_ptr()) + offset;
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(p[i * stride]);
  };
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return copy(float{});
    case ScalarType::Double:
      return copy(double{});
    case ScalarType::Half:
      return copy(Half{});
    case ScalarType::BFloat16:
      return copy(BFloat16{});
    case ScalarType::Byte:
      return copy(uint8_t{});
    case ScalarType::Char:
      return copy(int8_t{});
    case ScalarType::Short:
      return copy(int16_t{});
    case ScalarType::Int:
      return copy(int32_t{});
    case ScalarType::Long:
      return copy(int64_t{});
    case ScalarType::Bool:
      return copy(bool{});
    default:
      STD_TORCH_CHECK(false, "pssl: element type ", int(t.scalar_type()), " is not supported");
  }
}

// A map [B,*,H,W], [B,H,W] or [H,W] whose last two dimensions are read row by row, in any element type and with any strides.
struct Rows {
  const Tensor* tensor = nullptr;

  template <class T>
  void read_plane(int64_t y, int64_t x, int64_t n, T* out) const {
    const Tensor& t = *tensor;
    read_elements(t, y * t.stride(0) + x * t.stride(1), t.stride(1), n, out);
  }
  template <class T>
  void read(int64_t b, int64_t y, int64_t x, int64_t n, T* out) const {
    const Tensor& t = *tensor;
    read_elements(t, b * t.stride(0) + y * t.stride(1) + x * t.stride(2), t.stride(2), n, out);
  }
  template <class T>
  void read(int64_t b, int64_t c, int64_t y, int64_t x, int64_t n, T* out) const {
    const Tensor& t = *tensor;
    read_elements(t, b * t.stride(0) + c * t.stride(1) + y * t.stride(2) + x * t.stride(3), t.stride(3), n,
                  out);
  }
};

// Whether the last two dimensions can be read as one row.
inline bool is_flat_map(const Tensor& t) {
  const int64_t n = t.dim();
  return t.size(n - 2) == 1 || t.stride(n - 2) == t.size(n - 1) * t.stride(n - 1);
}

// [B,D,h,w] of any floating type and strides. The type is looked at where rows are packed and unpacked, so that
// everything behind is compiled for the accumulation type alone.
struct FeatureView {
  void* data;
  ScalarType type;
  int64_t B, D, h, w;
  int64_t sb, sd, sy, sx;

  static FeatureView of(const Tensor& t) {
    // const_cast: one view type serves the features, read only, and their gradient, written
    void* data = t.numel() > 0 ? const_cast<void*>(t.const_data_ptr()) : nullptr;
    if (t.dim() == 3)  // one image
      return {data, t.scalar_type(), 1,           t.size(0),  t.size(1), t.size(2),
              0,    t.stride(0),     t.stride(1), t.stride(2)};
    return {data,      t.scalar_type(), t.size(0),   t.size(1),   t.size(2),
            t.size(3), t.stride(0),     t.stride(1), t.stride(2), t.stride(3)};
  }
  // Channels [d, d + n).
  FeatureView channels(int64_t d, int64_t n) const {
    return {element(d * sd), type, B, n, h, w, sb, sd, sy, sx};
  }
  // Channel d of image b alone.
  FeatureView plane(int64_t b, int64_t d) const {
    return {element(b * sb + d * sd), type, 1, 1, h, w, sb, sd, sy, sx};
  }
  void* element(int64_t offset) const {
    if (!data) return nullptr;
    return with_floating(type,
                         [&](auto zero) -> void* { return static_cast<decltype(zero)*>(data) + offset; });
  }
  // The same elements as one row of h·w pixels, where is_flat_map: longer tiles.
  FeatureView flat() const { return {data, type, B, D, 1, h * w, sb, sd, h * w * sx, sx}; }
};

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Asks for huge pages for what lies within large memory that is about to be written for the first time: page by page,
// the system takes longer over it than the kernels do. Where it refuses, nothing is lost.
inline void prefer_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  constexpr int64_t page = 4096;
  if (bytes < kLargeMemory) return;
  const int64_t begin = round_up(int64_t(reinterpret_cast<intptr_t>(memory)), page);
  const int64_t end = (int64_t(reinterpret_cast<intptr_t>(memory)) + bytes) / page * page;
  madvise(reinterpret_cast<void*>(intptr_t(begin)), size_t(end - begin), MADV_HUGEPAGE);
#endif
}

// Touches each huge page of `bytes` bytes that are about to be written for the first time, each by one thread: the system
// clears a page before it looks whether another thread has just brought it in, and the kernels' threads, which write to all
// channels of neighbouring pixels, would all clear every page.
inline void touch_huge_pages(void* memory, int64_t bytes) {
  const int64_t address = int64_t(reinterpret_cast<intptr_t>(memory));
  const int64_t first = round_up(address, kHugePage) - address;
  if (first >= bytes) return;
  char* const data = static_cast<char*>(memory) + first;
  torch::stable::parallel_for(0, (bytes - first - 1) / kHugePage + 1, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) data[i * kHugePage] = 0;
  });
}

// A new tensor like `t`, which has not been touched yet: where it is large and memory is kept, in a kept block. Otherwise
// `t` itself, with huge pages where it is large.
inline Tensor in_kept_memory(Tensor t) {
  const int64_t bytes = t.numel() * int64_t(t.element_size());
  if (bytes < kLargeMemory) return t;
  const KeptBlock block = take_block(bytes);
  if (!block.memory) {
    prefer_huge_pages(t.mutable_data_ptr(), bytes);
    touch_huge_pages(t.mutable_data_ptr(), bytes);
    return t;
  }
  touch_huge_pages(block.memory, block.bytes);
  return torch::stable::from_blob(block.memory, t.sizes(), t.strides(), t.device(), t.scalar_type(),
                                  [block](void*) { give_back(block); });
}

inline Tensor new_tensor(std::vector<int64_t> sizes, ScalarType type) {
  return in_kept_memory(torch::stable::empty(sizes, type));
}

// For a gradient: the sizes, the type and, where it is dense, the layout of `argument`.
inline Tensor new_like(const Tensor& argument) { return in_kept_memory(torch::stable::empty_like(argument)); }

// The element of a one-element floating tensor.
inline double scalar_value(const Tensor& t) {
  double value;
  read_elements(t, 0, 1, 1, &value);
  return value;
}

// Memory of one call: uninitialised or zeroed, aligned to a cache line.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t n, bool zeroed = false) { reset(n, zeroed); }
  void reset(int64_t n, bool zeroed = false) {
    storage_.reset(
        static_cast<T*>(::operator new(std::max<int64_t>(n, 1) * sizeof(T), std::align_val_t{64})));
    prefer_huge_pages(storage_.get(), n * int64_t(sizeof(T)));
    if (zeroed) std::fill_n(storage_.get(), n, T(0));
  }
  T* get() const { return storage_.get(); }
  T& operator[](int64_t i) const { return storage_.get()[i]; }

 private:
  struct Free {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  std::unique_ptr<T, Free> storage_;
};

// Labels that are neither a region nor ignored are found while the kernels run in threads; the error is raised after.
class LabelCheck {
 public:
  void found(int64_t label) { bad_.store(label, std::memory_order_relaxed), any_.store(true); }
  void raise_if_found(const char* op, int64_t regions, int64_t ignore_index,
                      const std::string& argument = "regions") const {
    if (!any_.load()) return;
    std::ostringstream text;  // std::invalid_argument arrives in Python as ValueError
    text << op << ": " << argument << " must hold labels 0.." << regions - 1
         << " or ignore_index=" << ignore_index << ", got [" << bad_.load() << "]";
    throw std::invalid_argument(text.str());
  }

 private:
  std::atomic<bool> any_{false};
  std::atomic<int64_t> bad_{0};
};

}  // namespace pssl::PSSL_SIMD_NAMESPACE
