// The arithmetic of cam_compare on one class of one image, for host and device.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/bilinear.h"

namespace pssl {

// 2 - cos(M, S) from <M,S>, |M|^2 and |S|^2 over space; the norms are clamped as in F.cosine_similarity.
template <class T>
PSSL_HD inline T cam_attention(T product, T main_square, T support_square) {
  const T eps = T(1e-8);
  T m = std::sqrt(main_square), s = std::sqrt(support_square);
  m = m < eps ? eps : m, s = s < eps ? eps : s;
  return T(2) - product / (m * s);
}

// The share of a support map in the target of a main map: its attention over the number of support maps.
template <class T>
PSSL_HD inline T cam_share(T product, T main_square, T support_square, int64_t supports) {
  return cam_attention(product, main_square, support_square) / T(supports);
}

// For numbers and for vectors of them.

template <class V>
PSSL_HD inline V magnitude(V d) {
  return d < V{} ? -d : d;
}

// The gradient of `grad`·|d|: 0 at 0; NaN stays.
template <class V>
PSSL_HD inline V magnitude_gradient(V d, V grad) {
  return d > V{} ? grad : d < V{} ? -grad : d;
}

// Back through relu, from its result.
template <class V>
PSSL_HD inline V relu_gradient(V result, V grad) {
  return result <= V{} ? V{} : grad;
}

}  // namespace pssl
