// What prototype_pool's passes on the CPU share: the masks and the results.
#pragma once

#include "common/axis_cpu.h"
#include "common/tensors.h"
#include "prototype_pool.h"

namespace pssl::PSSL_SIMD_NAMESPACE {
namespace pool {

constexpr const char* kOp = "prototype_pool";

// Whether the maps can all be read as one row of pixels.
inline bool is_flat(const PoolArguments& p) {
  return is_flat_map(p.features) && is_flat_map(p.regions) && (!p.weights || is_flat_map(*p.weights));
}

// Masks and weights of a run of label pixels, whatever form they come in.
template <class T>
class Masks {
 public:
  Masks(const PoolArguments& p, LabelCheck& check)
      : regions_{&p.regions},
        weights_{p.weights ? &*p.weights : nullptr},
        C_(p.C),
        ignore_(p.ignore_index),
        check_(check) {}

  bool soft() const { return regions_.tensor->dim() == 4; }

  // Reads pixels [x, x + n) of row y: labels (-1 where ignored) or soft masks, and weights (0 where ignored).
  void read(int64_t b, int64_t y, int64_t x, int64_t n) {
    if (capacity_ < n) {
      capacity_ = n;
      labels.reset(n), weights.reset(n), masks.reset(soft() ? C_ * n : 0);
    }
    n_ = n;
    if (weights_.tensor) {
      weights_.read(b, y, x, n, weights.get());
    } else {
      std::fill_n(weights.get(), n, T(1));
    }
    if (soft()) {
      for (int64_t c = 0; c < C_; ++c) regions_.read(b, c, y, x, n, &masks[c * n]);
      return;
    }
    regions_.read(b, y, x, n, labels.get());
    for (int64_t p = 0; p < n; ++p) {
      const int64_t label = labels[p];
      labels[p] = counted_label(label, C_, ignore_);
      if (labels[p] >= 0) continue;
      if (label != ignore_) check_.found(label);
      weights[p] = T(0);
    }
  }
  // f(c, mask without weight) for the classes of pixel p
  template <class F>
  void each(int64_t p, const F& f) const {
    if (soft()) {
      for (int64_t c = 0; c < C_; ++c) f(c, masks[c * n_ + p]);
    } else if (labels[p] >= 0) {
      f(labels[p], T(1));
    }
  }

  Buffer<int64_t> labels;
  Buffer<T> weights, masks;

 private:
  Rows regions_, weights_;
  int64_t C_, ignore_, n_ = 0, capacity_ = 0;
  LabelCheck& check_;
};

// Sums of double for each class and task, added up in the order of the tasks.
template <class T>
void write_mass(const Buffer<double>& partial, int64_t B, int64_t tasks, int64_t C, T* out) {
  for (int64_t b = 0; b < B; ++b)
    for (int64_t c = 0; c < C; ++c) {
      double sum = 0;
      for (int64_t t = 0; t < tasks; ++t) sum += partial[(b * tasks + t) * C + c];
      out[b * C + c] = T(sum);
    }
}

// Gradients of soft masks and of weights, written pixel by pixel where they are wanted.
template <class T>
struct MaskGradients {
  T *regions, *weights;  // [B,C,H,W] and [B,H,W], or null
  const T* grad_mass;    // [B,C]
  int64_t C, H, W;

  // t(c) = <F(x), grad_sums[c]> / |F(x)|
  template <class Product>
  void write(const Masks<T>& masks, int64_t i, int64_t b, int64_t y, int64_t x, const Product& t) const {
    T sum = T(0);
    masks.each(i, [&](int64_t c, T m) {
      const T g = t(c) + grad_mass[b * C + c];
      sum += m * g;
      if (regions) regions[((b * C + c) * H + y) * W + x] = g * masks.weights[i];
    });
    if (weights) weights[(b * H + y) * W + x] = sum;
  }
};

// Class sums [B][C][D] in `out`, and the masks' sums in `masses`, [B][tasks][C].
template <class T>
struct Sums {
  T* out;
  Buffer<double> masses;
};

template <class T>
void write_sums(const Buffer<T>& sums, int64_t B, int64_t C, int64_t D, int64_t cp, T* out) {
  for (int64_t b = 0; b < B; ++b)
    for (int64_t c = 0; c < C; ++c)
      for (int64_t d = 0; d < D; ++d) out[(b * C + c) * D + d] = sums[(b * D + d) * cp + c];
}

// What the backward passes read and write.
template <class T>
struct Backward {
  const PoolArguments& p;
  FeatureView f, out;
  bool features;  // whether `out`, their gradient, is wanted
  MaskGradients<T> written;
  LabelCheck& check;
};

}  // namespace pool
}  // namespace pssl::PSSL_SIMD_NAMESPACE
