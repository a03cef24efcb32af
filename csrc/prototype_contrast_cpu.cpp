// prototype_contrast on the CPU. With q_c = p_c / (|p_c| τ), z_c = <F, q_c> and u = 1/|F|, the logits are z_c u and
//
//   loss = log sum_c exp(z_c u) - z_r u
//   d/d z_c    = a (softmax_c - [c = r]) u =: g_c        a: the gradient of the loss times the pixel's weight
//   d/d |F|^2  = -u^2/2 sum_c a (softmax_c - [c = r]) z_c u
//
// z and |F|^2 come from the feature grid (identity 1) and g goes back there; the label grid never meets D. Where the
// grids are the same, each tile goes through these steps while it is in the cache. Prototypes that are not valid stand
// as zero vectors with a bias that no logit reaches.
#include <tuple>

#include "common/tile_pass_cpu.h"

namespace {

using namespace pssl;
using namespace pssl::PSSL_SIMD_NAMESPACE;

constexpr const char* kOp = "prototype_contrast";

struct Problem {
  const Tensor &features, &prototypes, &regions;
  double temperature;
  const std::optional<Tensor>&valid, &weights;
  int64_t ignore_index;
  bool align_corners;
  double eps;

  int64_t H() const { return regions.size(1); }
  int64_t W() const { return regions.size(2); }
  int64_t C() const { return prototypes.size(prototypes.dim() - 2); }
  bool same_grid() const { return H() == features.size(2) && W() == features.size(3); }
  bool is_flat() const {
    return is_flat_map(features) && is_flat_map(regions) && (!weights || is_flat_map(*weights));
  }
  // Whether each image has class vectors of its own.
  bool per_image() const { return prototypes.dim() == 3 || (valid && valid->dim() == 2); }
  void check() const {
    const int64_t B = features.size(0), n = prototypes.dim();
    STD_TORCH_CHECK(features.dim() == 4, kOp, ": features must be [B,D,h,w]");
    STD_TORCH_CHECK((n == 2 || (n == 3 && prototypes.size(0) == B)) && C() >= 1 &&
                        prototypes.size(n - 1) == features.size(1),
                    kOp, ": prototypes must be [C,D] or [B,C,D]");
    STD_TORCH_CHECK(regions.dim() == 3 && regions.size(0) == B, kOp, ": regions must be [B,H,W]");
    STD_TORCH_CHECK(!valid || (valid->size(valid->dim() - 1) == C() &&
                               (valid->dim() == 1 || (valid->dim() == 2 && valid->size(0) == B))),
                    kOp, ": valid must be [C] or [B,C]");
    STD_TORCH_CHECK(!weights || (weights->dim() == 3 && weights->size(0) == B && weights->size(1) == H() &&
                                 weights->size(2) == W()),
                    kOp, ": weights must be [B,H,W]");
    STD_TORCH_CHECK(features.size(2) * features.size(3) > 0 || B * H() * W() == 0, kOp,
                    ": features have no cells");
  }
};

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
        for (int64_t d = 0; d < D; ++d) q[(b * D + d) * cp + c] = T(double(u[d]) / p.temperature);
      }
  }
  int64_t image(int64_t b) const { return n == 1 ? 0 : b; }
  const T* bias_of(int64_t b) const { return &bias[image(b) * cp]; }
  const T* mask_of(int64_t b) const { return &mask[image(b) * cp]; }
  const T* vectors(int64_t b) const { return &q[image(b) * D * cp]; }
  bool is_valid(int64_t b, int64_t c) const { return mask[image(b) * cp + c] != T(0); }
};

// Labels and weights of a run of pixels: label -1 and weight 0 where a pixel does not count.
template <class T>
class Pixels {
 public:
  Pixels(const Problem& p, const ClassVectors<T>& classes, LabelCheck& check)
      : regions_{&p.regions},
        weights_{p.weights ? &*p.weights : nullptr},
        classes_(classes),
        ignore_(p.ignore_index),
        check_(check) {}

  void read(int64_t b, int64_t y, int64_t x, int64_t n) {
    if (capacity_ < n) capacity_ = n, labels.reset(n), weights.reset(n);
    regions_.read(b, y, x, n, labels.get());
    if (weights_.tensor) {
      weights_.read(b, y, x, n, weights.get());
    } else {
      std::fill_n(weights.get(), n, T(1));
    }
    for (int64_t p = 0; p < n; ++p) {
      const int64_t label = labels[p];
      const bool in_range = label >= 0 && label < classes_.C;
      if (label != ignore_ && !in_range) check_.found(label);
      if (label == ignore_ || !in_range || !classes_.is_valid(b, label)) labels[p] = -1, weights[p] = T(0);
    }
  }
  Buffer<int64_t> labels;
  Buffer<T> weights;

 private:
  Rows regions_, weights_;
  const ClassVectors<T>& classes_;
  int64_t ignore_, capacity_ = 0;
  LabelCheck& check_;
};

// The softmax of one pixel. On entry z holds <F, q_c>, on return exp(logit_c - maximum); `logits` the logits.
template <class T, class Columns>
struct PixelSoftmax {
  Columns columns;
  T sum, rest;  // loss = log(sum) + rest

  PixelSoftmax(Columns columns, T* z, T* logits, T inverse, const T* bias, const T* mask, int64_t label)
      : columns(columns) {
    Vec<T> largest = splat<T>(T(-2e30));
    for (int64_t c = 0; c < columns; c += kLanes<T>) {
      const Vec<T> v = load<T>(z + c) * inverse + load<T>(bias + c);
      store<T>(logits + c, v);
      largest = larger<T>(largest, v);
    }
    const T maximum = lane_max<T>(largest);
    Vec<T> total = {};
    for (int64_t c = 0; c < columns; c += kLanes<T>) {
      const Vec<T> e = exp_nonpositive<T>(load<T>(logits + c) - maximum) * load<T>(mask + c);
      store<T>(z + c, e);
      total += e;
    }
    sum = lane_sum<T>(total);
    rest = maximum - logits[label];
  }

  // Turns z into g[c] = a (softmax_c - [c = label]) u; returns the gradient of |F|^2.
  T backward(T* z, const T* logits, T inverse, T a, int64_t label) const {
    z[label] -= sum;  // before scaling, so that a softmax of 1 gives exactly 0
    const T scale = a / sum;
    Vec<T> products = {};
    for (int64_t c = 0; c < columns; c += kLanes<T>) {
      const Vec<T> r = load<T>(z + c) * scale;
      products += r * load<T>(logits + c);
      store<T>(z + c, r * inverse);
    }
    return squared_norm_gradient(inverse, lane_sum<T>(products));
  }
};

// The losses of a run of pixels: their softmax pixel by pixel, the logarithm for all at once.
template <class T>
struct RunLosses {
  Buffer<T> sum, rest;  // a pixel that does not count: 1 and 0
  explicit RunLosses(int64_t n) : sum(round_up(n, kLanes<T>)), rest(round_up(n, kLanes<T>)) {}

  void clear(int64_t n) {
    std::fill_n(sum.get(), round_up(n, kLanes<T>), T(1));
    std::fill_n(rest.get(), round_up(n, kLanes<T>), T(0));
  }
  template <class Softmax>
  void set(int64_t i, const Softmax& softmax) {
    sum[i] = softmax.sum;
    rest[i] = softmax.rest;
  }
  // out[i] = factor[i] loss[i] + offset where pixel i counts, else 0
  void write(int64_t n, const int64_t* labels, const T* factor, T offset, T* out) {
    for (int64_t i = 0; i < n; i += kLanes<T>)
      store<T>(&sum[i], log_positive<T>(load<T>(&sum[i])) + load<T>(&rest[i]));
    for (int64_t i = 0; i < n; ++i) out[i] = labels[i] < 0 ? T(0) : factor[i] * sum[i] + offset;
  }
};

template <class T>
std::tuple<Tensor, Tensor> contrast(const Problem& p) {
  auto f = FeatureView::of(p.features);
  const ClassVectors<T> classes(p);
  const int64_t cp = classes.cp, H = p.H(), W = p.W();
  const T eps = T(p.eps);
  Tensor loss = new_tensor({f.B, H, W}, scalar_type_of<T>), total = new_tensor({}, scalar_type_of<T>);
  T* out = loss.numel() > 0 ? loss.mutable_data_ptr<T>() : nullptr;
  auto vectors = [&](int64_t b) { return classes.vectors(b); };
  LabelCheck check;
  Buffer<double> counted;
  int64_t parts = 0;
  if (p.same_grid()) {
    if (p.is_flat()) f = f.flat();
    counted.reset(parts = f.B * tile_count<T>(f), true);
    const int64_t tile = tile_pixels(f.D, sizeof(T));
    tile_pass<T>(f, cp, false, [&] {
      return [&, pixels = Pixels<T>(p, classes, check), z = Buffer<T>(tile * cp), squares = Buffer<T>(tile),
              losses = RunLosses<T>(tile)](Tile<T>& t) mutable {
        pixels.read(t.b, t.y, t.x, t.n);
        tile_squares(t.f, t.ld, round_up(t.n, kLanes<T>), f.D, squares.get());
        tile_dots(t.f, t.ld, round_up(t.n, kPixelBlock), f.D, vectors(t.b), cp, z.get());
        losses.clear(t.n);
        with_columns<T>(cp, [&](auto columns) {
          PixelScratch<T, decltype(columns)> logits(columns);
          for (int64_t i = 0; i < t.n; ++i) {
            if (pixels.labels[i] < 0) continue;
            losses.set(i, PixelSoftmax<T, decltype(columns)>(
                              columns, &z[i * cp], logits.get(), inverse_norm(squares[i], eps),
                              classes.bias_of(t.b), classes.mask_of(t.b), pixels.labels[i]));
            counted[t.index] += double(pixels.weights[i]);
          }
        });
        losses.write(t.n, pixels.labels.get(), pixels.weights.get(), T(0), out + (t.b * H + t.y) * W + t.x);
      };
    });
  } else {
    const Axis<T> ys(f.h, H, p.align_corners), xs(f.w, W, p.align_corners);
    const CellMaps<T> maps = cell_maps<T>(f, cp, vectors, true);
    counted.reset(parts = f.B * f.h, true);
    torch::stable::parallel_for(0, f.B * f.h, 1, [&](int64_t begin, int64_t end) {
      RowBlend<T> blend(f.w, cp);
      Pixels<T> pixels(p, classes, check);
      RunLosses<T> losses(W);
      Buffer<T> inverse(W);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / f.h, y0 = task % f.h;
        for (int64_t y = ys.begin[y0]; y < ys.begin[y0 + 1]; ++y) {
          pixels.read(b, y, 0, W);
          blend.blend(maps, b, y0, ys.fraction[y]);
          blend.inverse_norms(xs, eps, inverse.get());
          losses.clear(W);
          with_columns<T>(cp, [&](auto columns) {
            PixelScratch<T, decltype(columns)> z(columns), logits(columns);
            for (int64_t x = 0; x < W; ++x) {
              if (pixels.labels[x] < 0) continue;
              blend.at(xs, x, columns, z.get());
              losses.set(x, PixelSoftmax<T, decltype(columns)>(columns, z.get(), logits.get(), inverse[x],
                                                               classes.bias_of(b), classes.mask_of(b),
                                                               pixels.labels[x]));
              counted[task] += double(pixels.weights[x]);
            }
          });
          losses.write(W, pixels.labels.get(), pixels.weights.get(), T(0), out + (b * H + y) * W);
        }
      }
    });
  }
  check.raise_if_found(kOp, classes.C, p.ignore_index);
  double sum = 0;
  for (int64_t i = 0; i < parts; ++i) sum += counted[i];
  *total.mutable_data_ptr<T>() = T(sum);
  return {loss, total};
}

// From the class sums of the gradients, [B][D][cp] = d loss / d q, to the prototypes and the temperature:
// q = p̂/τ, dp = (dq - p̂ <p̂,dq>) / (|p| τ), dτ = -<p̂,dq> / τ².
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
    if (used) *d_temperature -= along / (p.temperature * p.temperature);
    const double scale = used && classes.norm[row] > 0 ? 1 / (classes.norm[row] * p.temperature) : 0;
    for (int64_t d = 0; d < D; ++d)
      d_prototypes[row * D + d] = scale == 0 ? T(0) : T(scale * (dq[d] - double(u[d]) * along));
  }
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> contrast_backward(const std::optional<Tensor>& grad_loss,
                                                             const std::optional<Tensor>& grad_total,
                                                             const Problem& p, const Tensor& temperature,
                                                             const std::vector<bool>& needs) {
  auto f = FeatureView::of(p.features);
  const ClassVectors<T> classes(p);
  const int64_t cp = classes.cp, C = classes.C, H = p.H(), W = p.W();
  const T eps = T(p.eps);
  const bool class_sums = needs[1] || needs[2];
  Tensor grad_features = needs[0] ? torch::stable::empty_like(p.features) : no_gradient(p.features);
  auto out = needs[0] ? FeatureView::of(grad_features) : f;
  Tensor d_weights = needs[3] ? new_tensor({f.B, H, W}, scalar_type_of<T>) : no_gradient(p.weights);
  T* d_weight = needs[3] ? d_weights.mutable_data_ptr<T>() : nullptr;
  const T d_total = grad_total ? T(scalar_value(*grad_total)) : T(0);
  auto vectors = [&](int64_t b) { return classes.vectors(b); };
  LabelCheck check;
  auto read_gradient = [&](int64_t b, int64_t y, int64_t x, int64_t n, T* g) {
    if (grad_loss) {
      Rows{&*grad_loss}.read(b, y, x, n, g);
    } else {
      std::fill_n(g, n, T(0));
    }
  };
  // d loss / d weight of a run of pixels, where it is wanted
  auto write_weights = [&](RunLosses<T>& losses, const Pixels<T>& pixels, const T* gradient, int64_t n,
                           int64_t b, int64_t y, int64_t x) {
    if (d_weight) losses.write(n, pixels.labels.get(), gradient, d_total, d_weight + (b * H + y) * W + x);
  };
  Buffer<T> sums;
  if (p.same_grid()) {
    const bool flat =
        p.is_flat() && (!grad_loss || is_flat_map(*grad_loss)) && (!needs[0] || is_flat_map(grad_features));
    if (flat) f = f.flat(), out = out.flat();
    const int64_t tile = tile_pixels(f.D, sizeof(T)), ldg = round_up(tile, kLanes<T>);
    sums = tile_pass<T>(f, cp, class_sums, [&] {
      return [&, pixels = Pixels<T>(p, classes, check), squares = Buffer<T>(ldg), losses = RunLosses<T>(tile),
              gt = Buffer<T>(C * ldg), norm = Buffer<T>(ldg), gradient = Buffer<T>(tile),
              result = Buffer<T>(f.D * tile_stride<T>(tile))](Tile<T>& t) mutable {
        const int64_t padded = round_up(t.n, kLanes<T>);
        pixels.read(t.b, t.y, t.x, t.n);
        read_gradient(t.b, t.y, t.x, t.n, gradient.get());
        tile_squares(t.f, t.ld, padded, f.D, squares.get());
        tile_dots(t.f, t.ld, round_up(t.n, kPixelBlock), f.D, vectors(t.b), cp, t.g);
        std::fill_n(norm.get(), ldg, T(0));
        losses.clear(t.n);
        with_columns<T>(cp, [&](auto columns) {
          PixelScratch<T, decltype(columns)> logits(columns);
          for (int64_t i = 0; i < t.n; ++i) {
            T* z = t.g + i * cp;
            const int64_t label = pixels.labels[i];
            if (label < 0) {
              std::fill_n(z, cp, T(0));
              continue;
            }
            t.active[t.count++] = int32_t(i);
            const T inverse = inverse_norm(squares[i], eps);
            const PixelSoftmax<T, decltype(columns)> softmax(
                columns, z, logits.get(), inverse, classes.bias_of(t.b), classes.mask_of(t.b), label);
            losses.set(i, softmax);
            norm[i] =
                T(2) * softmax.backward(z, logits.get(), inverse, gradient[i] * pixels.weights[i], label);
          }
        });
        write_weights(losses, pixels, gradient.get(), t.n, t.b, t.y, t.x);
        if (!needs[0]) return;
        transpose_tile(t.g, cp, C, t.n, gt.get(), ldg);
        for (int64_t c = 0; c < C; ++c) std::fill(&gt[c * ldg + t.n], &gt[c * ldg + padded], T(0));
        const std::vector<Neighbour<T>> self{{t.f, norm.get()}};
        tile_combine(vectors(t.b), cp, C, f.D, gt.get(), ldg, self, result.get(), t.ld, padded);
        unpack_row(result.get(), t.ld, out, t.b, t.y, t.x, t.n);
      };
    });
  } else {
    const Axis<T> ys(f.h, H, p.align_corners), xs(f.w, W, p.align_corners);
    const CellMaps<T> maps = cell_maps<T>(f, cp, vectors, true);
    CellAdjoint<T> adjoint(f.B, f.h, f.w, cp);
    torch::stable::parallel_for(0, f.B * f.h, 1, [&](int64_t begin, int64_t end) {
      RowBlend<T> blend(f.w, cp);
      RowAdjoint<T> row(f.w, cp);
      Pixels<T> pixels(p, classes, check);
      RunLosses<T> losses(W);
      Buffer<T> inverse(W), gradient(W);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / f.h, y0 = task % f.h;
        for (int64_t y = ys.begin[y0]; y < ys.begin[y0 + 1]; ++y) {
          pixels.read(b, y, 0, W);
          read_gradient(b, y, 0, W, gradient.get());
          blend.blend(maps, b, y0, ys.fraction[y]);
          blend.inverse_norms(xs, eps, inverse.get());
          losses.clear(W);
          with_columns<T>(cp, [&](auto columns) {
            PixelScratch<T, decltype(columns)> z(columns), logits(columns);
            for (int64_t x = 0; x < W; ++x) {
              const int64_t label = pixels.labels[x];
              if (label < 0) continue;
              blend.at(xs, x, columns, z.get());
              const PixelSoftmax<T, decltype(columns)> softmax(columns, z.get(), logits.get(), inverse[x],
                                                               classes.bias_of(b), classes.mask_of(b), label);
              losses.set(x, softmax);
              const T a = gradient[x] * pixels.weights[x];
              row.add_squared(xs, x, softmax.backward(z.get(), logits.get(), inverse[x], a, label));
              row.add(xs, x, columns, z.get());
            }
          });
          write_weights(losses, pixels, gradient.get(), W, b, y, 0);
          row.flush(adjoint, b, y0, ys.fraction[y]);
        }
      }
    });
    if (class_sums) sums = adjoint_class_sums(f, adjoint, C);
    if (needs[0]) adjoint_feature_gradient(f, out, adjoint, C, vectors, true);
  }
  check.raise_if_found(kOp, C, p.ignore_index);

  Tensor grad_prototypes = no_gradient(p.prototypes), grad_temperature = no_gradient(temperature);
  if (class_sums) {
    Tensor d_prototypes = new_tensor({int64_t(classes.norm.size()) * classes.D}, scalar_type_of<T>);
    Tensor d_temperature = new_tensor({}, scalar_type_of<T>);
    double dt = 0;
    class_gradients(sums, f.B, classes, p, d_prototypes.mutable_data_ptr<T>(), &dt);
    *d_temperature.mutable_data_ptr<T>() = T(dt);
    std::vector<int64_t> shape(p.prototypes.sizes().begin(), p.prototypes.sizes().end());
    if (needs[1]) grad_prototypes = in_layout_of(p.prototypes, torch::stable::view(d_prototypes, shape));
    if (needs[2]) grad_temperature = in_layout_of(temperature, d_temperature);
  }
  if (needs[3]) d_weights = in_layout_of(*p.weights, d_weights);
  return {grad_features, grad_prototypes, grad_temperature, d_weights};
}

std::tuple<Tensor, Tensor> prototype_contrast_cpu(const Tensor& features, const Tensor& prototypes,
                                                  const Tensor& regions, const Tensor& temperature,
                                                  const std::optional<Tensor>& valid,
                                                  const std::optional<Tensor>& weights, int64_t ignore_index,
                                                  bool align_corners, double eps) {
  const Problem p{features,     prototypes,    regions, scalar_value(temperature), valid, weights,
                  ignore_index, align_corners, eps};
  p.check();
  return with_accumulation({features.scalar_type(), prototypes.scalar_type()},
                           [&](auto zero) { return contrast<decltype(zero)>(p); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> prototype_contrast_backward_cpu(
    const std::optional<Tensor>& grad_loss, const std::optional<Tensor>& grad_total, const Tensor& features,
    const Tensor& prototypes, const Tensor& regions, const Tensor& temperature,
    const std::optional<Tensor>& valid, const std::optional<Tensor>& weights, int64_t ignore_index,
    bool align_corners, double eps, const std::vector<bool>& needs) {
  const Problem p{features,     prototypes,    regions, scalar_value(temperature), valid, weights,
                  ignore_index, align_corners, eps};
  p.check();
  return with_accumulation({features.scalar_type(), prototypes.scalar_type()}, [&](auto zero) {
    return contrast_backward<decltype(zero)>(grad_loss, grad_total, p, temperature, needs);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pssl, CPU, m) {
  if (!simd_chosen()) return;
  m.impl("prototype_contrast", TORCH_BOX(&prototype_contrast_cpu));
  m.impl("prototype_contrast_backward", TORCH_BOX(&prototype_contrast_backward_cpu));
}
