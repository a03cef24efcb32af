// Element types and what operators on every device do with tensors on the host.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <vector>

#include "common/simd.h"

namespace pssl::PSSL_SIMD_NAMESPACE {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
constexpr ScalarType scalar_type_of = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;

// Calls f(S{}) with the C++ type of the elements of a floating tensor.
template <class F>
auto with_floating(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::Half:
      return f(Half{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    default:
      STD_TORCH_CHECK(false, "pssl: features must be float16, bfloat16, float32 or float64");
  }
}

// Calls f(T{}) with the type in which sums are kept: double if any input is, else float.
template <class F>
auto with_accumulation(std::initializer_list<ScalarType> inputs, const F& f) {
  for (ScalarType type : inputs)
    if (type == ScalarType::Double) return f(double{});
  return f(float{});
}

// What a backward returns for a gradient that is not wanted, in the type of the argument (float32 where there is none).
inline Tensor no_gradient(const std::optional<Tensor>& argument) {
  const std::vector<int64_t> none{0};
  return argument ? torch::stable::new_empty(*argument, none) : torch::stable::empty(none, ScalarType::Float);
}

// `gradient` in the type and the layout of `argument`.
inline Tensor in_layout_of(const Tensor& argument, const Tensor& gradient) {
  Tensor result = torch::stable::empty_like(argument);
  return torch::stable::copy_(result, gradient);
}

}  // namespace pssl::PSSL_SIMD_NAMESPACE
