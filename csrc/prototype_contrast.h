// prototype_contrast: its arguments and the arithmetic of a pixel and of a prototype, for host and device.
#pragma once

#include <cmath>

#include "common/label_pixels.h"
#include "common/types.h"

namespace pssl::PSSL_SIMD_NAMESPACE {

struct ContrastArguments {
  const Tensor &features, &prototypes, &regions, &temperature;
  const std::optional<Tensor>&valid, &weights;
  int64_t ignore_index;
  bool align_corners;
  double eps;

  int64_t H() const { return regions.size(1); }
  int64_t W() const { return regions.size(2); }
  int64_t C() const { return prototypes.size(prototypes.dim() - 2); }
  bool same_grid() const { return H() == features.size(2) && W() == features.size(3); }
  // Whether each image has class vectors of its own.
  bool per_image() const { return prototypes.dim() == 3 || (valid && valid->dim() == 2); }
  void check(const char* op) const {
    const int64_t B = features.size(0), n = prototypes.dim();
    STD_TORCH_CHECK(features.dim() == 4, op, ": features must be [B,D,h,w]");
    STD_TORCH_CHECK((n == 2 || (n == 3 && prototypes.size(0) == B)) && C() >= 1 &&
                        prototypes.size(n - 1) == features.size(1),
                    op, ": prototypes must be [C,D] or [B,C,D]");
    STD_TORCH_CHECK(regions.dim() == 3 && regions.size(0) == B, op, ": regions must be [B,H,W]");
    STD_TORCH_CHECK(!valid || (valid->size(valid->dim() - 1) == C() &&
                               (valid->dim() == 1 || (valid->dim() == 2 && valid->size(0) == B))),
                    op, ": valid must be [C] or [B,C]");
    STD_TORCH_CHECK(!weights || (weights->dim() == 3 && weights->size(0) == B && weights->size(1) == H() &&
                                 weights->size(2) == W()),
                    op, ": weights must be [B,H,W]");
    STD_TORCH_CHECK(features.size(2) * features.size(3) > 0 || B * H() * W() == 0, op,
                    ": features have no cells");
  }
};

// The softmax of a pixel over its classes, some at a time, from z_c = <F, q_c>: the logits are z_c / |F|, and
// e_c = 2^((z_c - maximum) sharpness) with sharpness = log2(e) / |F|. Where a new maximum comes, what is there is scaled.
template <class T>
struct OnlineSoftmax {
  T maximum = 0, sum = 0, pull = 0;  // of z; of e_c, 0 while there is none; of e_c (z_c - maximum)

  static PSSL_HD T sharpness(T inverse) { return inverse * T(1.4426950408889634074); }
  static PSSL_HD T exponential(T z, T maximum, T sharpness) { return std::exp2((z - maximum) * sharpness); }

  // Of N classes those that count.
  template <int N>
  PSSL_HD void add(const T (&z)[N], const bool (&counts)[N], T sharpness) {
    bool any = sum != T(0);
    T largest = maximum;
    for (int i = 0; i < N; ++i) {
      const bool larger = counts[i] && (!any || z[i] > largest);
      largest = larger ? z[i] : largest;
      any |= counts[i];
    }
    const T behind = maximum - largest;
    const T scale = sum != T(0) ? std::exp2(behind * sharpness) : T(0);
    pull = sum != T(0) ? (pull + behind * sum) * scale : T(0);
    sum *= scale;
    maximum = largest;
    for (int i = 0; i < N; ++i) {
      const T ahead = counts[i] ? z[i] - largest : T(0);
      const T e = counts[i] ? std::exp2(ahead * sharpness) : T(0);
      sum += e;
      pull += e * ahead;
    }
  }
  // -log softmax of the class with product `own`
  PSSL_HD T loss(T own, T inverse) const { return std::log(sum) + (maximum - own) * inverse; }
  // sum_c (d loss / d logit_c) logit_c
  PSSL_HD T along(T own, T inverse) const { return (pull / sum + (maximum - own)) * inverse; }
};

// d loss / d logit_c from e_c, the sum and `scale`, the gradient of the loss over the sum, for numbers and vectors of them.
// The one is taken off before scaling, so that a softmax of 1 gives exactly 0.
template <class V>
PSSL_HD inline V logit_gradient(V e, V own_sum, V scale) {
  return (e - own_sum) * scale;
}

// From dq = d loss / dq with q = p̂/τ to the prototype and the temperature, with along = <p̂,dq>:
// dp = (dq - p̂ <p̂,dq>) / (|p| τ), dτ = -<p̂,dq> / τ².
PSSL_HD inline double prototype_gradient(double dq, double unit, double along, double norm,
                                         double temperature) {
  return norm > 0 ? (dq - unit * along) / (norm * temperature) : 0;
}
PSSL_HD inline double temperature_gradient(double along, double temperature) {
  return -along / (temperature * temperature);
}

}  // namespace pssl::PSSL_SIMD_NAMESPACE
