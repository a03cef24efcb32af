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
// Where the grids are the same, each tile goes through these steps while it is in the cache, and with labels each pixel
// through those of its own class alone.
#include <tuple>

#include "prototype_pool_same_grid_cpu.h"

namespace {

using namespace pssl;
using namespace pssl::PSSL_SIMD_NAMESPACE;
using namespace pssl::PSSL_SIMD_NAMESPACE::pool;

template <class T>
void pool_label_grid(const PoolArguments& p, const FeatureView& f, LabelCheck& check, Sums<T>& sums) {
  const int64_t C = p.C, cp = round_up(C, kLanes<T>), W = p.W();
  const Axis<T> ys(f.h, p.H(), p.align_corners), xs(f.w, W, p.align_corners);
  auto no_vectors = [](int64_t) -> const T* { return nullptr; };
  CellMaps<T> maps = p.normalize ? cell_maps<T>(f, 0, no_vectors, true)
                                 : CellMaps<T>{f.B, f.h, f.w, 0, Buffer<T>(), {}, false};
  CellAdjoint<T> adjoint(f.B, f.h, f.w, cp);
  share_tasks(f.B * f.h, [&] {
    Buffer<T> ones(W);
    std::fill_n(ones.get(), W, T(1));
    return [&, blend = RowBlend<T>(f.w, 0), row = RowAdjoint<T>(f.w, cp), masks = Masks<T>(p, check),
            inverse = std::move(ones)](int64_t task) mutable {
      const int64_t b = task / f.h, y0 = task % f.h;
      for (int64_t y = ys.begin[y0]; y < ys.begin[y0 + 1]; ++y) {
        masks.read(b, y, 0, W);
        if (p.normalize) {
          blend.blend(maps, b, y0, ys.fraction[y]);
          blend.inverse_norms(xs, T(p.eps), inverse.get());
        }
        for (int64_t x = 0; x < W; ++x)
          masks.each(x, [&](int64_t c, T m) {
            row.add_one(xs, x, c, m * masks.weights[x] * inverse[x]);
            sums.masses[task * C + c] += double(m) * double(masks.weights[x]);
          });
        row.flush(adjoint, b, y0, ys.fraction[y]);
      }
    };
  });
  write_sums(adjoint_class_sums(f, adjoint, C), f.B, C, f.D, cp, sums.out);
}

template <class T>
std::tuple<Tensor, Tensor> pool_forward(const PoolArguments& p) {
  auto f = FeatureView::of(p.features);
  if (p.same_grid() && is_flat(p)) f = f.flat();
  Tensor out = new_tensor({f.B, p.C, f.D}, scalar_type_of<T>);
  Tensor mass = new_tensor({f.B, p.C}, scalar_type_of<T>);
  const int64_t parts = !p.same_grid() ? f.h : tiling_of<T>(p, f).count;
  Sums<T> sums{out.mutable_data_ptr<T>(), Buffer<double>(f.B * parts * p.C, true)};
  LabelCheck check;
  if (!p.same_grid()) {
    pool_label_grid(p, f, check, sums);
  } else if (p.soft()) {
    pool_masks(p, f, check, sums);
  } else {
    pool_labels(p, f, check, sums);
  }
  check.raise_if_found(kOp, p.C, p.ignore_index);
  write_mass(sums.masses, f.B, parts, p.C, mass.mutable_data_ptr<T>());
  return {out, mass};
}

// Row by row as [B][C][D], or turned as [B][D][cp]; zeros without a gradient.
template <class T>
Buffer<T> read_grad_sums(const std::optional<Tensor>& grad_sums, const FeatureView& f, int64_t C,
                         bool turned) {
  const int64_t cp = turned ? round_up(C, kLanes<T>) : C;
  Buffer<T> q(f.B * f.D * cp, true);
  std::vector<T> line(f.D);
  for (int64_t b = 0; b < f.B && grad_sums; ++b)
    for (int64_t c = 0; c < C; ++c) {
      read_elements(*grad_sums, b * grad_sums->stride(0) + c * grad_sums->stride(1), grad_sums->stride(2),
                    f.D, line.data());
      for (int64_t d = 0; d < f.D; ++d) q[turned ? (b * f.D + d) * cp + c : (b * C + c) * f.D + d] = line[d];
    }
  return q;
}

template <class T>
void backward_label_grid(const Backward<T>& to, const Buffer<T>& q) {
  const PoolArguments& p = to.p;
  const FeatureView& f = to.f;
  const int64_t C = p.C, cp = round_up(C, kLanes<T>), W = p.W();
  auto vectors = [&](int64_t b) { return &q[b * f.D * cp]; };
  const Axis<T> ys(f.h, p.H(), p.align_corners), xs(f.w, W, p.align_corners);
  const CellMaps<T> maps = cell_maps<T>(f, cp, vectors, p.normalize);
  CellAdjoint<T> adjoint(f.B, f.h, f.w, cp);
  share_tasks(f.B * f.h, [&] {
    Buffer<T> ones(W);
    std::fill_n(ones.get(), W, T(1));
    return [&, blend = RowBlend<T>(f.w, cp), row = RowAdjoint<T>(f.w, cp), masks = Masks<T>(p, to.check),
            inverse = std::move(ones), z = Buffer<T>(cp)](int64_t task) mutable {
      const int64_t b = task / f.h, y0 = task % f.h;
      for (int64_t y = ys.begin[y0]; y < ys.begin[y0 + 1]; ++y) {
        masks.read(b, y, 0, W);
        blend.blend(maps, b, y0, ys.fraction[y]);
        if (p.normalize) blend.inverse_norms(xs, T(p.eps), inverse.get());
        for (int64_t x = 0; x < W; ++x) {
          const T u = inverse[x];
          T s = T(0);
          if (masks.soft() || masks.labels[x] >= 0) blend.at(xs, x, cp, z.get());
          masks.each(x, [&](int64_t c, T m) {
            row.add_one(xs, x, c, m * masks.weights[x] * u);
            s += m * masks.weights[x] * z[c] * u;
          });
          if (p.normalize && s != T(0)) row.add_squared(xs, x, squared_norm_gradient(u, s));
          to.written.write(masks, x, b, y, x, [&](int64_t c) { return z[c] * u; });
        }
        row.flush(adjoint, b, y0, ys.fraction[y]);
      }
    };
  });
  if (to.features) adjoint_feature_gradient(f, to.out, adjoint, C, vectors, p.normalize);
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> pool_backward(const std::optional<Tensor>& grad_sums,
                                                 const std::optional<Tensor>& grad_mass,
                                                 const PoolArguments& p, const std::vector<bool>& needs) {
  const auto f = FeatureView::of(p.features);
  const int64_t C = p.C, H = p.H(), W = p.W();
  Tensor grad_features = needs[0] ? new_like(p.features) : no_gradient(p.features);
  Tensor d_regions = needs[1] ? new_tensor({f.B, C, H, W}, scalar_type_of<T>) : no_gradient(p.regions);
  Tensor d_weights = needs[2] ? new_tensor({f.B, H, W}, scalar_type_of<T>) : no_gradient(p.weights);
  Buffer<T> d_mass(f.B * C, true);
  for (int64_t b = 0; b < f.B && grad_mass; ++b)
    read_elements(*grad_mass, b * grad_mass->stride(0), grad_mass->stride(1), C, &d_mass[b * C]);
  LabelCheck check;
  Backward<T> to{p,
                 f,
                 needs[0] ? FeatureView::of(grad_features) : f,
                 needs[0],
                 {needs[1] ? d_regions.mutable_data_ptr<T>() : nullptr,
                  needs[2] ? d_weights.mutable_data_ptr<T>() : nullptr, d_mass.get(), C, H, W},
                 check};
  if (p.same_grid() && is_flat(p) && (!needs[0] || is_flat_map(grad_features)))
    to.f = to.f.flat(), to.out = to.out.flat();
  const bool own_class = p.same_grid() && !p.soft();
  const Buffer<T> q = read_grad_sums<T>(grad_sums, f, C, !own_class);
  if (!p.same_grid()) {
    backward_label_grid(to, q);
  } else if (p.soft()) {
    backward_masks(to, q);
  } else {
    backward_labels(to, q);
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
  const PoolArguments p{features, regions, weights, num_regions, normalize, ignore_index, align_corners, eps};
  p.check(kOp);
  return with_accumulation({features.scalar_type()},
                           [&](auto zero) { return pool_forward<decltype(zero)>(p); });
}

std::tuple<Tensor, Tensor, Tensor> prototype_pool_backward_cpu(
    const std::optional<Tensor>& grad_sums, const std::optional<Tensor>& grad_mass, const Tensor& features,
    const Tensor& regions, int64_t num_regions, const std::optional<Tensor>& weights, bool normalize,
    int64_t ignore_index, bool align_corners, double eps, const std::vector<bool>& needs) {
  const PoolArguments p{features, regions, weights, num_regions, normalize, ignore_index, align_corners, eps};
  p.check(kOp);
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
