// What prototype_contrast's passes on the CPU share: the arguments, the class vectors, the pixels that count, and the
// softmax of as many pixels as a vector has lanes.
#pragma once

#include "common/label_block_cpu.h"
#include "common/tile_pass_cpu.h"
#include "prototype_contrast.h"

namespace pssl::PSSL_SIMD_NAMESPACE {
namespace contrast {

constexpr const char* kOp = "prototype_contrast";

struct Problem : ContrastArguments {
  double tau;  // the temperature's value

  bool is_flat() const {
    return is_flat_map(features) && is_flat_map(regions) && (!weights || is_flat_map(*weights));
  }
};

// What the forward pass of a call whose grids are the same may leave to the backward pass, [tiles][C + 1][ld]: for each tile
// of `f` its products with the classes and, in the last row, |F|^2.
template <class T>
std::vector<int64_t> saved_sizes(const FeatureView& f, int64_t C) {
  return {f.B * Tiling<T>::packed(f).count, C + 1, tile_stride<T>(tile_pixels(f.D, sizeof(T)))};
}

// The prototypes as the products want them.
template <class T>
struct ClassVectors {
  int64_t n, C, D, cp;       // n: 1, or B where they differ from image to image
  Buffer<T> q;               // [n][D][cp], p / (|p| τ), 0 where not valid
  Buffer<T> bias, mask;      // [n][cp], 0 and 1; where not valid -1e30 and 0
  std::vector<T> unit;       // [rows][D], p / |p|
  std::vector<double> norm;  // [rows], 0 where the prototype counts as zero

  explicit ClassVectors(const Problem& p)
      : n(p.per_image() ? p.features.size(0) : 1),
        C(p.C()),
        D(p.features.size(1)),
        cp(round_up(C, kLanes<T>)),
        q(n * D * cp, true),
        bias(n * cp),
        mask(n * cp, true) {
    std::fill_n(bias.get(), n * cp, T(-1e30));
    const bool own = p.prototypes.dim() == 3;
    const int64_t last = p.prototypes.dim() - 1;
    unit.resize((own ? n : 1) * C * D), norm.resize((own ? n : 1) * C);
    for (int64_t row = 0; row < int64_t(norm.size()); ++row) {
      T* u = &unit[row * D];
      const int64_t offset =
          (own ? row / C * p.prototypes.stride(0) : 0) + row % C * p.prototypes.stride(last - 1);
      read_elements(p.prototypes, offset, p.prototypes.stride(last), D, u);
      double squared = 0;
      for (int64_t d = 0; d < D; ++d) squared += double(u[d]) * double(u[d]);
      const double inverse = inverse_norm(squared, p.eps);
      norm[row] = inverse == 0 ? 0 : std::sqrt(squared);
      for (int64_t d = 0; d < D; ++d) u[d] = T(double(u[d]) * inverse);
    }
    for (int64_t b = 0; b < n; ++b)
      for (int64_t c = 0; c < C; ++c) {
        bool is_valid = true;
        if (p.valid) {
          const int64_t row = p.valid->dim() == 2 ? b * p.valid->stride(0) : 0;
          read_elements(*p.valid, row + c * p.valid->stride(p.valid->dim() - 1), 1, 1, &is_valid);
        }
        if (!is_valid) continue;
        bias[b * cp + c] = T(0);
        mask[b * cp + c] = T(1);
        const T* u = &unit[((own ? b : 0) * C + c) * D];
        for (int64_t d = 0; d < D; ++d) q[(b * D + d) * cp + c] = T(double(u[d]) / p.tau);
      }
  }
  int64_t image(int64_t b) const { return n == 1 ? 0 : b; }
  const T* bias_of(int64_t b) const { return &bias[image(b) * cp]; }
  const T* mask_of(int64_t b) const { return &mask[image(b) * cp]; }
  const T* vectors(int64_t b) const { return &q[image(b) * D * cp]; }
  bool is_valid(int64_t b, int64_t c) const { return mask[image(b) * cp + c] != T(0); }
  bool all_valid(int64_t b) const {
    return std::all_of(mask_of(b), mask_of(b) + C, [](T m) { return m != T(0); });
  }
};

// Labels, weights and gradients of the losses, of some pixels side by side: label -1 and weight 0 where a pixel does
// not count.
template <class T>
class Pixels {
 public:
  Pixels(const Problem& p, const ClassVectors<T>& classes, const Tensor* gradient, LabelCheck& check)
      : regions_{&p.regions},
        weights_{p.weights ? &*p.weights : nullptr},
        gradient_{gradient},
        classes_(classes),
        ignore_(p.ignore_index),
        check_(check) {}

  // Room for n pixels, and for a vector that begins at the last of them.
  void reserve(int64_t n) {
    n += kLanes<T>;
    if (capacity_ >= n) return;
    capacity_ = n;
    read_.reset(n), labels.reset(n), weights.reset(n), gradients.reset(n, true);
  }
  // Reads pixels [x, x + n) of row y to the places [at, at + n).
  void read(int64_t b, int64_t y, int64_t x, int64_t n, int64_t at = 0) {
    regions_.read(b, y, x, n, read_.get());
    if (weights_.tensor) {
      weights_.read(b, y, x, n, &weights[at]);
    } else {
      std::fill_n(&weights[at], n, T(1));
    }
    if (gradient_.tensor) gradient_.read(b, y, x, n, &gradients[at]);
    // without branches where all classes are valid, so that the loop takes a vector of labels at a time
    const T* mask = classes_.mask_of(b);
    const bool all_valid = classes_.all_valid(b);
    const int64_t C = classes_.C, ignore = ignore_;
    int64_t* label = read_.get();
    bool bad = false;
    for (int64_t p = 0; p < n; ++p) {
      const bool in_range = uint64_t(label[p]) < uint64_t(C), counts = in_range & (label[p] != ignore);
      bad |= !in_range & (label[p] != ignore);
      label[p] = counts ? label[p] : -1;
    }
    if (bad) find_bad(b, y, x, n);
    for (int64_t p = 0; p < n && !all_valid; ++p)
      if (label[p] >= 0 && mask[label[p]] == T(0)) label[p] = -1;
    for (int64_t p = 0; p < n; ++p) {
      labels[at + p] = BitsOf<T>(label[p]);
      weights[at + p] = label[p] >= 0 ? weights[at + p] : T(0);
    }
  }
  // The labels of the vector that begins at i and has n pixels.
  Lanes<T> labels_at(int64_t i, int64_t n) const {
    Lanes<T> v = load_lanes<T>(&labels[i]);
    for (int64_t lane = n; lane < kLanes<T>; ++lane) v[lane] = -1;
    return v;
  }
  // The sum of n weights.
  double count(int64_t i, int64_t n) const {
    double sums[8] = {}, sum = 0;
    int64_t p = i;
    for (; p + 8 <= i + n; p += 8)
      for (int k = 0; k < 8; ++k) sums[k] += double(weights[p + k]);
    for (; p < i + n; ++p) sum += double(weights[p]);
    for (double part : sums) sum += part;
    return sum;
  }

  Buffer<BitsOf<T>> labels;
  Buffer<T> weights, gradients;

 private:
  PSSL_NOINLINE void find_bad(int64_t b, int64_t y, int64_t x, int64_t n) {
    std::vector<int64_t> label(n);
    regions_.read(b, y, x, n, label.data());
    for (int64_t l : label)
      if (l != ignore_ && uint64_t(l) >= uint64_t(classes_.C)) return check_.found(l);
  }

  Buffer<int64_t> read_;
  Rows regions_, weights_, gradient_;
  const ClassVectors<T>& classes_;
  int64_t ignore_, capacity_ = 0;
  LabelCheck& check_;
};

// The softmax of the pixels in the lanes of a vector, over the classes c < C. Row c of `logits`, `stride` behind row
// c - 1, receives logit(c) + bias[c]; with `exponentials`, row c of that exp(logit - maximum).
template <class T>
struct LaneSoftmax {
  Lanes<T> label;
  int64_t C, stride;
  Vec<T> sum, loss;

  template <class Logit>
  LaneSoftmax(const Logit& logit, T* logits, T* exponentials, int64_t stride, int64_t C, Lanes<T> label,
              const T* bias, const T* mask)
      : label(label), C(C), stride(stride), sum() {
    Vec<T> maximum = splat<T>(T(-2e30)), own = {};
    for (int64_t c = 0; c < C; ++c) {
      const Vec<T> v = logit(c) + bias[c];
      store<T>(logits + c * stride, v);
      maximum = larger<T>(maximum, v);
      own = label == BitsOf<T>(c) ? v : own;
    }
    for (int64_t c = 0; c < C; ++c) {
      const Vec<T> e = exp_nonpositive<T>(load<T>(logits + c * stride) - maximum) * mask[c];
      if (exponentials) store<T>(exponentials + c * stride, e);
      sum += e;
    }
    loss = label >= 0 ? log_positive<T>(sum) + (maximum - own) : Vec<T>{};
  }

  // Turns the exponentials into g[c] = a (softmax_c - [c = label]) u with u = `inverse`, zero for pixels that do not
  // count; returns the gradient of |F|^2.
  Vec<T> backward(T* g, const T* logits, Vec<T> inverse, Vec<T> a) const {
    const Lanes<T> counts = label >= 0;
    const Vec<T> scale = a / sum;
    Vec<T> products = {};
    for (int64_t c = 0; c < C; ++c) {
      const Vec<T> e = load<T>(g + c * stride);
      const Vec<T> r =
          counts ? logit_gradient<Vec<T>>(e, label == BitsOf<T>(c) ? sum : Vec<T>{}, scale) : Vec<T>{};
      products += r * load<T>(logits + c * stride);
      store<T>(g + c * stride, r * inverse);
    }
    return counts ? T(-0.5) * inverse * inverse * products : Vec<T>{};
  }
};

// From the class sums of the gradients, [B][D][cp] = d loss / d q, to the prototypes and the temperature.
template <class T>
void class_gradients(const Buffer<T>& sums, int64_t B, const ClassVectors<T>& classes, const Problem& p,
                     T* d_prototypes, double* d_temperature) {
  const int64_t C = classes.C, D = classes.D, rows = int64_t(classes.norm.size());
  *d_temperature = 0;
  std::vector<double> dq(D);
  for (int64_t row = 0; row < rows; ++row) {
    const bool own = rows > C || B == 1;
    std::fill(dq.begin(), dq.end(), 0.0);
    const int64_t first = own ? row / C : 0, last = own ? first + 1 : B;
    bool used = false;
    for (int64_t b = first; b < last; ++b) {
      if (!classes.is_valid(b, row % C)) continue;
      used = true;
      for (int64_t d = 0; d < D; ++d) dq[d] += double(sums[(b * D + d) * classes.cp + row % C]);
    }
    const T* u = &classes.unit[row * D];
    double along = 0;
    for (int64_t d = 0; d < D && used; ++d) along += double(u[d]) * dq[d];
    if (used) *d_temperature += temperature_gradient(along, p.tau);
    for (int64_t d = 0; d < D; ++d)
      d_prototypes[row * D + d] =
          used ? T(prototype_gradient(dq[d], double(u[d]), along, classes.norm[row], p.tau)) : T(0);
  }
}

}  // namespace contrast
}  // namespace pssl::PSSL_SIMD_NAMESPACE
