// The bilinear weights of all outputs along one axis.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/bilinear.h"
#include "common/simd.h"

namespace pssl::PSSL_SIMD_NAMESPACE {

template <class T>
struct Axis {
  std::vector<int64_t> index;
  std::vector<T> fraction;
  std::vector<int64_t> begin;  // begin[i]: the first output with index >= i

  Axis(int64_t in_size, int64_t out_size, bool align_corners)
      : index(out_size), fraction(out_size), begin(in_size + 1) {
    for (int64_t o = 0; o < out_size; ++o) {
      const AxisWeight weight = axis_weight(o, in_size, out_size, align_corners);
      index[o] = weight.index;
      fraction[o] = T(weight.fraction);
    }
    for (int64_t i = 0; i <= in_size; ++i)
      begin[i] = std::lower_bound(index.begin(), index.end(), i) - index.begin();
  }
};

}  // namespace pssl::PSSL_SIMD_NAMESPACE
