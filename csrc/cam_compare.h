// The arithmetic of cam_compare on one class of one image, for host and device.
#pragma once

#include <cmath>

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

}  // namespace pssl
