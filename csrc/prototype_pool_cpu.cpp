// prototype_pool on the CPU. With a = the bilinear weights, m = the masks times the weights, u = 1/|F|:
//
//   sums[c]  = sum_i f_i A_c(i),  A_c(i) = sum_x a_i(x) m_c(x) u(x)
//
// so the label grid meets [C,h,w] and the Gram maps (identity 1), never D. Backward, with t_c(x) = <F(x), grad_sums[c]> u:
//
//   d/d features = sum_c A_c grad_sums[c], and the norm's part through the Gram maps, whose gradient is
//                  d/d|F|^2 = -u^2/2 sum_c m_c t_c
//   d/d m_c      = t_c + grad_mass[c]
//
// Where the grids are the same, each tile goes through these steps while it is in the cache.
#include <tuple>

#include "common/tile_pass_cpu.h"

namespace {

using namespace pssl;
using namespace pssl::PSSL_SIMD_NAMESPACE;

constexpr const char* kOp = "prototype_pool";

// Masks and weights of a run of label pixels, whatever form they come in.
template <class T>
class Masks {
 public:
  Masks(const Tensor& regions, const std::optional<Tensor>& weights, int64_t C, int64_t ignore_index,
        LabelCheck& check)
      : regions_{&regions},
        weights_{weights ? &*weights : nullptr},
        C_(C),
        ignore_(ignore_index),
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
      if (label != ignore_ && label >= 0 && label < C_) continue;
      if (label != ignore_) check_.found(label);
      labels[p] = -1;
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

struct Problem {
  const Tensor &features, &regions;
  const std::optional<Tensor>& weights;
  int64_t C;
  bool normalize;
  int64_t ignore_index;
  bool align_corners;
  double eps;

  int64_t H() const { return regions.size(regions.dim() - 2); }
  int64_t W() const { return regions.size(regions.dim() - 1); }
  bool same_grid() const { return H() == features.size(2) && W() == features.size(3); }
  bool is_flat() const {
    return is_flat_map(features) && is_flat_map(regions) && (!weights || is_flat_map(*weights));
  }
  void check() const {
    const int64_t B = features.size(0);
    STD_TORCH_CHECK(features.dim() == 4, kOp, ": features must be [B,D,h,w]");
    STD_TORCH_CHECK((regions.dim() == 3 || (regions.dim() == 4 && regions.size(1) == C)) &&
                        regions.size(0) == B && C >= 1,
                    kOp, ": regions must be [B,H,W] or soft masks [B,num_regions,H,W]");
    STD_TORCH_CHECK(!weights || (weights->dim() == 3 && weights->size(0) == B && weights->size(1) == H() &&
                                 weights->size(2) == W()),
                    kOp, ": weights must be [B,H,W]");
    STD_TORCH_CHECK(features.size(2) * features.size(3) > 0 || B * H() * W() == 0, kOp,
                    ": features have no cells");
  }
};

// Sums of double for each class and task, added up in the order of the tasks.
template <class T>
void write_mass(const Buffer<double>& partial, int64_t B, int64_t tasks, int64_t C, Tensor& mass) {
  T* out = mass.mutable_data_ptr<T>();
  for (int64_t b = 0; b < B; ++b)
    for (int64_t c = 0; c < C; ++c) {
      double sum = 0;
      for (int64_t t = 0; t < tasks; ++t) sum += partial[(b * tasks + t) * C + c];
      out[b * C + c] = T(sum);
    }
}

template <class T>
void write_sums(const Buffer<T>& sums, int64_t B, int64_t C, int64_t D, int64_t cp, Tensor& out) {
  T* o = out.mutable_data_ptr<T>();
  for (int64_t b = 0; b < B; ++b)
    for (int64_t c = 0; c < C; ++c)
      for (int64_t d = 0; d < D; ++d) o[(b * C + c) * D + d] = sums[(b * D + d) * cp + c];
}

template <class T>
std::tuple<Tensor, Tensor> pool(const Problem& p) {
  auto f = FeatureView::of(p.features);
  const int64_t C = p.C, cp = round_up(C, kLanes<T>), H = p.H(), W = p.W();
  Tensor sums = new_tensor({f.B, C, f.D}, scalar_type_of<T>), mass = new_tensor({f.B, C}, scalar_type_of<T>);
  LabelCheck check;
  const T eps = T(p.eps);
  if (p.same_grid()) {
    if (p.is_flat()) f = f.flat();
    const int64_t tiles = tile_count<T>(f);
    Buffer<double> masses(f.B * tiles * C, true);
    Buffer<T> total = tile_pass<T>(f, cp, true, [&] {
      return [&, masks = Masks<T>(p.regions, p.weights, C, p.ignore_index, check),
              squares = Buffer<T>(round_up(tile_pixels(f.D, sizeof(T)), kLanes<T>))](Tile<T>& t) mutable {
        masks.read(t.b, t.y, t.x, t.n);
        if (p.normalize) tile_squares(t.f, t.ld, round_up(t.n, kLanes<T>), f.D, squares.get());
        for (int64_t i = 0; i < t.n; ++i) {
          T* g = t.g + i * cp;
          std::fill_n(g, cp, T(0));
          const T scale = masks.weights[i] * (p.normalize ? inverse_norm(squares[i], eps) : T(1));
          bool any = false;
          masks.each(i, [&](int64_t c, T m) {
            g[c] = m * scale, any = true;
            masses[t.index * C + c] += double(m) * double(masks.weights[i]);
          });
          if (any) t.active[t.count++] = int32_t(i);
        }
      };
    });
    check.raise_if_found(kOp, C, p.ignore_index);
    write_sums(total, f.B, C, f.D, cp, sums);
    write_mass<T>(masses, f.B, tiles, C, mass);
    return {sums, mass};
  }
  const Axis<T> ys(f.h, H, p.align_corners), xs(f.w, W, p.align_corners);
  auto no_vectors = [](int64_t) -> const T* { return nullptr; };
  CellMaps<T> maps = p.normalize ? cell_maps<T>(f, 0, no_vectors, true)
                                 : CellMaps<T>{f.B, f.h, f.w, 0, Buffer<T>(), {}, false};
  CellAdjoint<T> adjoint(f.B, f.h, f.w, cp);
  Buffer<double> masses(f.B * f.h * C, true);
  torch::stable::parallel_for(0, f.B * f.h, 1, [&](int64_t begin, int64_t end) {
    RowBlend<T> blend(f.w, 0);
    RowAdjoint<T> row(f.w, cp);
    Masks<T> masks(p.regions, p.weights, C, p.ignore_index, check);
    Buffer<T> inverse(W);
    std::fill_n(inverse.get(), W, T(1));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / f.h, y0 = task % f.h;
      for (int64_t y = ys.begin[y0]; y < ys.begin[y0 + 1]; ++y) {
        masks.read(b, y, 0, W);
        if (p.normalize) {
          blend.blend(maps, b, y0, ys.fraction[y]);
          blend.inverse_norms(xs, eps, inverse.get());
        }
        for (int64_t x = 0; x < W; ++x)
          masks.each(x, [&](int64_t c, T m) {
            row.add_one(xs, x, c, m * masks.weights[x] * inverse[x]);
            masses[task * C + c] += double(m) * double(masks.weights[x]);
          });
        row.flush(adjoint, b, y0, ys.fraction[y]);
      }
    }
  });
  check.raise_if_found(kOp, C, p.ignore_index);
  write_sums(adjoint_class_sums(f, adjoint, C), f.B, C, f.D, cp, sums);
  write_mass<T>(masses, f.B, f.h, C, mass);
  return {sums, mass};
}

// Gradients of soft masks and of weights, written pixel by pixel where they are wanted.
template <class T>
struct MaskGradients {
  T *regions, *weights;  // [B,C,H,W] and [B,H,W], or null
  int64_t C, H, W;

  // t(c) = <F(x), grad_sums[c]> / |F(x)|
  template <class Product>
  void write(const Masks<T>& masks, int64_t i, int64_t b, int64_t y, int64_t x, const T* grad_mass,
             const Product& t) const {
    T sum = T(0);
    masks.each(i, [&](int64_t c, T m) {
      const T g = t(c) + (grad_mass ? grad_mass[b * C + c] : T(0));
      sum += m * g;
      if (regions) regions[((b * C + c) * H + y) * W + x] = g * masks.weights[i];
    });
    if (weights) weights[(b * H + y) * W + x] = sum;
  }
};

template <class T>
std::tuple<Tensor, Tensor, Tensor> pool_backward(const std::optional<Tensor>& grad_sums,
                                                 const std::optional<Tensor>& grad_mass, const Problem& p,
                                                 const std::vector<bool>& needs) {
  auto f = FeatureView::of(p.features);
  const int64_t C = p.C, cp = round_up(C, kLanes<T>), H = p.H(), W = p.W();
  const T eps = T(p.eps);
  Tensor grad_features = needs[0] ? new_like(p.features) : no_gradient(p.features);
  Tensor d_regions = needs[1] ? new_tensor({f.B, C, H, W}, scalar_type_of<T>) : no_gradient(p.regions);
  Tensor d_weights = needs[2] ? new_tensor({f.B, H, W}, scalar_type_of<T>) : no_gradient(p.weights);
  auto out = needs[0] ? FeatureView::of(grad_features) : f;
  MaskGradients<T> written{needs[1] ? d_regions.mutable_data_ptr<T>() : nullptr,
                           needs[2] ? d_weights.mutable_data_ptr<T>() : nullptr, C, H, W};
  Buffer<T> q(f.B * f.D * cp, true), masses(grad_mass ? f.B * C : 0);  // q: grad_sums as [B][D][cp]
  std::vector<T> line(C);
  for (int64_t b = 0; b < f.B && (grad_sums || grad_mass); ++b) {
    for (int64_t d = 0; d < f.D && grad_sums; ++d) {
      read_elements(*grad_sums, b * grad_sums->stride(0) + d * grad_sums->stride(2), grad_sums->stride(1), C,
                    line.data());
      std::copy(line.begin(), line.end(), &q[(b * f.D + d) * cp]);
    }
    if (grad_mass)
      read_elements(*grad_mass, b * grad_mass->stride(0), grad_mass->stride(1), C, &masses[b * C]);
  }
  const T* d_mass = grad_mass ? masses.get() : nullptr;
  auto vectors = [&](int64_t b) { return &q[b * f.D * cp]; };
  LabelCheck check;

  if (p.same_grid()) {
    if (p.is_flat() && (!needs[0] || is_flat_map(grad_features))) f = f.flat(), out = out.flat();
    const int64_t tile = tile_pixels(f.D, sizeof(T)), ldg = round_up(tile, kLanes<T>);
    tile_pass<T>(f, cp, false, [&] {
      return [&, masks = Masks<T>(p.regions, p.weights, C, p.ignore_index, check), squares = Buffer<T>(ldg),
              z = Buffer<T>(round_up(tile, kPixelBlock) * cp), gt = Buffer<T>(C * ldg), norm = Buffer<T>(ldg),
              result = Buffer<T>(f.D * tile_stride<T>(tile))](Tile<T>& t) mutable {
        const int64_t padded = round_up(t.n, kLanes<T>);
        masks.read(t.b, t.y, t.x, t.n);
        if (p.normalize) tile_squares(t.f, t.ld, padded, f.D, squares.get());
        tile_dots(t.f, t.ld, round_up(t.n, kPixelBlock), f.D, vectors(t.b), cp, z.get());
        std::fill_n(gt.get(), C * ldg, T(0));
        std::fill_n(norm.get(), ldg, T(0));
        for (int64_t i = 0; i < t.n; ++i) {
          const T inverse = p.normalize ? inverse_norm(squares[i], eps) : T(1);
          T s = T(0);
          masks.each(i, [&](int64_t c, T m) {
            gt[c * ldg + i] = m * masks.weights[i] * inverse;
            s += m * masks.weights[i] * z[i * cp + c] * inverse;
          });
          if (p.normalize) norm[i] = T(2) * squared_norm_gradient(inverse, s);
          written.write(masks, i, t.b, t.y, t.x + i, d_mass,
                        [&](int64_t c) { return z[i * cp + c] * inverse; });
        }
        if (!needs[0]) return;
        std::vector<Neighbour<T>> self;
        if (p.normalize) self.push_back({t.f, norm.get()});
        tile_combine(vectors(t.b), cp, C, f.D, gt.get(), ldg, self, result.get(), t.ld, padded);
        unpack_row(result.get(), t.ld, out, t.b, t.y, t.x, t.n);
      };
    });
  } else {
    const Axis<T> ys(f.h, H, p.align_corners), xs(f.w, W, p.align_corners);
    const CellMaps<T> maps = cell_maps<T>(f, cp, vectors, p.normalize);
    CellAdjoint<T> adjoint(f.B, f.h, f.w, cp);
    torch::stable::parallel_for(0, f.B * f.h, 1, [&](int64_t begin, int64_t end) {
      RowBlend<T> blend(f.w, cp);
      RowAdjoint<T> row(f.w, cp);
      Masks<T> masks(p.regions, p.weights, C, p.ignore_index, check);
      Buffer<T> inverse(W), z(cp);
      std::fill_n(inverse.get(), W, T(1));
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / f.h, y0 = task % f.h;
        for (int64_t y = ys.begin[y0]; y < ys.begin[y0 + 1]; ++y) {
          masks.read(b, y, 0, W);
          blend.blend(maps, b, y0, ys.fraction[y]);
          if (p.normalize) blend.inverse_norms(xs, eps, inverse.get());
          for (int64_t x = 0; x < W; ++x) {
            const T u = inverse[x];
            T s = T(0);
            if (masks.soft() || masks.labels[x] >= 0) blend.at(xs, x, cp, z.get());
            masks.each(x, [&](int64_t c, T m) {
              row.add_one(xs, x, c, m * masks.weights[x] * u);
              s += m * masks.weights[x] * z[c] * u;
            });
            if (p.normalize && s != T(0)) row.add_squared(xs, x, squared_norm_gradient(u, s));
            written.write(masks, x, b, y, x, d_mass, [&](int64_t c) { return z[c] * u; });
          }
          row.flush(adjoint, b, y0, ys.fraction[y]);
        }
      }
    });
    if (needs[0]) adjoint_feature_gradient(f, out, adjoint, C, vectors, p.normalize);
  }
  check.raise_if_found(kOp, C, p.ignore_index);
  if (needs[1]) d_regions = in_layout_of(p.regions, d_regions);
  if (needs[2]) d_weights = in_layout_of(*p.weights, d_weights);
  return {grad_features, d_regions, d_weights};
}

std::tuple<Tensor, Tensor> prototype_pool_cpu(const Tensor& features, const Tensor& regions,
                                              int64_t num_regions, const std::optional<Tensor>& weights,
                                              bool normalize, int64_t ignore_index, bool align_corners,
                                              double eps) {
  const Problem p{features, regions, weights, num_regions, normalize, ignore_index, align_corners, eps};
  p.check();
  return with_accumulation({features.scalar_type()}, [&](auto zero) { return pool<decltype(zero)>(p); });
}

std::tuple<Tensor, Tensor, Tensor> prototype_pool_backward_cpu(
    const std::optional<Tensor>& grad_sums, const std::optional<Tensor>& grad_mass, const Tensor& features,
    const Tensor& regions, int64_t num_regions, const std::optional<Tensor>& weights, bool normalize,
    int64_t ignore_index, bool align_corners, double eps, const std::vector<bool>& needs) {
  const Problem p{features, regions, weights, num_regions, normalize, ignore_index, align_corners, eps};
  p.check();
  return with_accumulation({features.scalar_type()}, [&](auto zero) {
    return pool_backward<decltype(zero)>(grad_sums, grad_mass, p, needs);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pssl, CPU, m) {
  if (!simd_chosen()) return;
  m.impl("prototype_pool", TORCH_BOX(&prototype_pool_cpu));
  m.impl("prototype_pool_backward", TORCH_BOX(&prototype_pool_backward_cpu));
}
