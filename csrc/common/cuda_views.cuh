// Tensors as kernels take them: by value, with sizes and 64-bit strides, so that no layout needs a copy.
//
//   View<S, N>   elements of a type known to the compiler: what is read or written much
//   AnyView<N>   a type known at run time: labels of any integer type, optional weights, lists of maps. The type is the
//                same for all threads, so that choosing by it costs a branch that never diverges.
#pragma once

#include "common/bilinear.h"
#include "common/types.h"

namespace pssl::PSSL_SIMD_NAMESPACE {

template <int N>
struct Extents {
  int64_t size[N], stride[N];

  void set(const Tensor& t) {
    STD_TORCH_CHECK(t.dim() == N, "pssl: a view of ", N, " dimensions on a tensor of ", t.dim());
    for (int i = 0; i < N; ++i) size[i] = t.size(i), stride[i] = t.stride(i);
  }
  template <class... I>
  PSSL_HD int64_t offset(I... i) const {
    static_assert(sizeof...(I) == N, "one index a dimension");
    const int64_t index[] = {int64_t(i)...};
    int64_t sum = 0;
    for (int n = 0; n < N; ++n) sum += index[n] * stride[n];
    return sum;
  }
};

template <class S, int N>
struct View : Extents<N> {
  S* data;

  // const_cast: one view type serves inputs, as View<const S, N>, and outputs
  static View of(const Tensor& t) {
    View v;
    v.set(t);
    v.data = t.numel() > 0 ? static_cast<S*>(const_cast<void*>(t.const_data_ptr())) : nullptr;
    return v;
  }
  template <class... I>
  PSSL_HD S& operator()(I... i) const {
    return data[this->offset(i...)];
  }
};

// One element of a floating tensor as T.
template <class T>
PSSL_HD inline T load_floating(const void* data, ScalarType type, int64_t offset) {
  switch (type) {
    case ScalarType::Float:
      return T(static_cast<const float*>(data)[offset]);
    case ScalarType::Double:
      return T(static_cast<const double*>(data)[offset]);
    case ScalarType::Half:
      return T(static_cast<float>(static_cast<const Half*>(data)[offset]));
    default:
      return T(static_cast<float>(static_cast<const BFloat16*>(data)[offset]));
  }
}

// One element of an integer or bool tensor.
PSSL_HD inline int64_t load_integer(const void* data, ScalarType type, int64_t offset) {
  switch (type) {
    case ScalarType::Byte:
      return static_cast<const uint8_t*>(data)[offset];
    case ScalarType::Char:
      return static_cast<const int8_t*>(data)[offset];
    case ScalarType::Short:
      return static_cast<const int16_t*>(data)[offset];
    case ScalarType::Int:
      return static_cast<const int32_t*>(data)[offset];
    case ScalarType::Long:
      return static_cast<const int64_t*>(data)[offset];
    default:
      return static_cast<const bool*>(data)[offset];
  }
}

PSSL_HD inline bool is_floating(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
         type == ScalarType::BFloat16;
}

template <int N>
struct AnyView : Extents<N> {
  void* data = nullptr;  // null: no tensor, or none of its elements
  ScalarType type = ScalarType::Float;

  static AnyView of(const Tensor& t) {
    AnyView v;
    v.set(t);
    v.type = t.scalar_type();
    v.data = t.numel() > 0 ? const_cast<void*>(t.const_data_ptr()) : nullptr;
    return v;
  }
  static AnyView of(const std::optional<Tensor>& t) { return t ? of(*t) : AnyView{}; }

  template <class T, class... I>
  PSSL_HD T floating(I... i) const {
    return load_floating<T>(data, type, this->offset(i...));
  }
  template <class... I>
  PSSL_HD int64_t integer(I... i) const {
    return load_integer(data, type, this->offset(i...));
  }
  // whether an element of any type is not 0
  template <class... I>
  PSSL_HD bool truth(I... i) const {
    return is_floating(type) ? floating<double>(i...) != 0 : integer(i...) != 0;
  }
  // writes an element of a floating tensor
  template <class T, class... I>
  PSSL_HD void store(T value, I... i) const {
    const int64_t at = this->offset(i...);
    switch (type) {
      case ScalarType::Float:
        static_cast<float*>(data)[at] = float(value);
        break;
      case ScalarType::Double:
        static_cast<double*>(data)[at] = double(value);
        break;
      case ScalarType::Half:
        static_cast<Half*>(data)[at] = Half(float(value));
        break;
      default:
        static_cast<BFloat16*>(data)[at] = BFloat16(float(value));
    }
  }
};

}  // namespace pssl::PSSL_SIMD_NAMESPACE
