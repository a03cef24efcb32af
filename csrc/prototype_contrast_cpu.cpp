// prototype_contrast on the CPU. With q_c = p_c / (|p_c| τ), z_c = <F, q_c> and u = 1/|F|, the logits are z_c u and
//
//   loss = log sum_c exp(z_c u) - z_r u
//   d/d z_c    = a (softmax_c - [c = r]) u =: g_c        a: the gradient of the loss times the pixel's weight
//   d/d |F|^2  = -u^2/2 sum_c a (softmax_c - [c = r]) z_c u
//
// z and |F|^2 come from the feature grid (identity 1) and g goes back there; the label grid never meets D. Where the
// grids are the same, each tile goes through these steps while it is in the cache, and what the forward pass has saved of z
// and |F|^2 the backward pass does not compute again. Prototypes that are not valid stand as zero vectors with a bias that
// no logit reaches.
#include "prototype_contrast_cpu.h"

#include <tuple>

namespace {

using namespace pssl;
using namespace pssl::PSSL_SIMD_NAMESPACE;
using namespace pssl::PSSL_SIMD_NAMESPACE::contrast;

// 1/|f| of n pixels.
template <class T>
Vec<T> inverse_norms(const T* squares, T eps) {
  T result[kLanes<T>];
  for (int i = 0; i < kLanes<T>; ++i) result[i] = inverse_norm(squares[i], eps);
  return load<T>(result);
}

// The logits without their bias, from planes z of products.
template <class T>
auto logits_of(const T* z, int64_t stride, Vec<T> inverse) {
  return [=](int64_t c) { return load<T>(z + c * stride) * inverse; };
}

// The label grid in blocks: for each row of cells the label rows below it, a few at a time, and each block through
// these rows. `make_body()` gives each thread a functor with row(b, y, x, n, at, block view, fraction), for the pixels
// read to the places [at, at + n), and flush(block, b, y0) after a block's rows.
template <class T, class MakeBody>
void label_pass(const Problem& p, const FeatureView& f, const PlaneMaps<T>& maps, const MakeBody& make_body) {
  constexpr int64_t kRows = 16;
  const Axis<T> ys(f.h, p.H(), p.align_corners), xs(f.w, p.W(), p.align_corners);
  const std::vector<LabelBlock<T>> blocks = label_blocks<T>(xs);
  const int64_t W = p.W();
  share_tasks(f.B * f.h, [&] {
    auto body = make_body();
    body.pixels.reserve(kRows * W);
    return [&, body = std::move(body)](int64_t task) mutable {
      const int64_t b = task / f.h, y0 = task % f.h;
      for (int64_t first = ys.begin[y0]; first < ys.begin[y0 + 1]; first += kRows) {
        const int64_t last = std::min(first + kRows, ys.begin[y0 + 1]);
        for (int64_t y = first; y < last; ++y) body.pixels.read(b, y, 0, W, (y - first) * W);
        body.rows(task, (last - first) * W);
        for (const LabelBlock<T>& block : blocks) {
          const BlockView<T> view(maps, block, b, y0);
          for (int64_t y = first; y < last; ++y)
            body.row(b, y, block, (y - first) * W + block.x, view, ys.fraction[y]);
          body.flush(block, b, y0);
        }
      }
    };
  });
}

// The loss, the total weight and, if they are to be saved, the products.
template <class T>
std::tuple<Tensor, Tensor, Tensor> contrast_forward(const Problem& p, bool save) {
  auto f = FeatureView::of(p.features);
  const ClassVectors<T> classes(p);
  const int64_t C = classes.C, H = p.H(), W = p.W();
  const T eps = T(p.eps);
  Tensor loss = new_tensor({f.B, H, W}, scalar_type_of<T>), total = new_tensor({}, scalar_type_of<T>);
  T* out = loss.numel() > 0 ? loss.mutable_data_ptr<T>() : nullptr;
  LabelCheck check;
  Buffer<double> counted;
  int64_t parts = 0;
  Tensor saved = new_tensor({0}, scalar_type_of<T>);
  if (p.same_grid()) {
    if (p.is_flat()) f = f.flat();
    if (save) saved = new_tensor(saved_sizes<T>(f, C), scalar_type_of<T>);
    T* const all = saved.numel() > 0 ? saved.mutable_data_ptr<T>() : nullptr;
    counted.reset(parts = f.B * Tiling<T>::packed(f).count, true);
    const int64_t tile = tile_pixels(f.D, sizeof(T)), ldz = tile_stride<T>(tile);
    sum_over_tiles<T>(f, Tiling<T>::packed(f), 0, [&] {
      return [&, pixels = Pixels<T>(p, classes, nullptr, check), logits = Buffer<T>(C * kLanes<T>),
              room = Buffer<T>((C + 1) * ldz)](Tile<T>& t, T*) mutable {
        T* const z = all ? all + t.index * (C + 1) * ldz : room.get();
        T* const squares = z + C * ldz;
        pixels.reserve(tile);
        pixels.read(t.b, t.y, t.x, t.n);
        t.products(classes.vectors(t.b), classes.cp, C, z, ldz, squares, false);
        for (int64_t i = 0; i < t.n; i += kLanes<T>) {
          const int64_t n = std::min<int64_t>(kLanes<T>, t.n - i);
          const LaneSoftmax<T> softmax(logits_of(&z[i], ldz, inverse_norms(&squares[i], eps)), logits.get(),
                                       nullptr, kLanes<T>, C, pixels.labels_at(i, n), classes.bias_of(t.b),
                                       classes.mask_of(t.b));
          store_part<T>(out + (t.b * H + t.y) * W + t.x + i, softmax.loss * load<T>(&pixels.weights[i]), n);
        }
        counted[t.index] = pixels.count(0, t.n);
      };
    });
  } else {
    const PlaneMaps<T> maps(f, C, [&](int64_t b) { return classes.vectors(b); });
    counted.reset(parts = f.B * f.h, true);
    struct Body {
      Pixels<T> pixels;
      Buffer<T> logits;
      const ClassVectors<T>& classes;
      Buffer<double>& counted;
      T* out;
      int64_t H, W;
      T eps;

      void rows(int64_t task, int64_t n) { counted[task] += pixels.count(0, n); }
      void row(int64_t b, int64_t y, const LabelBlock<T>& block, int64_t at, const BlockView<T>& view, T t) {
        const LaneSoftmax<T> softmax(view.products(t, view.inverse_norms(t, eps)), logits.get(), nullptr,
                                     kLanes<T>, classes.C, pixels.labels_at(at, block.n), classes.bias_of(b),
                                     classes.mask_of(b));
        store_part<T>(out + (b * H + y) * W + block.x, softmax.loss * load<T>(&pixels.weights[at]), block.n);
      }
      void flush(const LabelBlock<T>&, int64_t, int64_t) {}
    };
    label_pass<T>(p, f, maps, [&] {
      return Body{
          Pixels<T>(p, classes, nullptr, check), Buffer<T>(C * kLanes<T>), classes, counted, out, H, W, eps};
    });
  }
  check.raise_if_found(kOp, C, p.ignore_index);
  double sum = 0;
  for (int64_t i = 0; i < parts; ++i) sum += counted[i];
  *total.mutable_data_ptr<T>() = T(sum);
  return {loss, total, saved};
}

// `saved`: what the forward pass has saved, null where nothing.
template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> contrast_backward(const std::optional<Tensor>& grad_loss,
                                                             const std::optional<Tensor>& grad_total,
                                                             const Tensor* saved, const Problem& p,
                                                             const std::vector<bool>& needs) {
  auto f = FeatureView::of(p.features);
  const ClassVectors<T> classes(p);
  const int64_t cp = classes.cp, C = classes.C, H = p.H(), W = p.W();
  const T eps = T(p.eps);
  const bool class_sums = needs[1] || needs[2];
  Tensor grad_features = needs[0] ? new_like(p.features) : no_gradient(p.features);
  auto out = needs[0] ? FeatureView::of(grad_features) : f;
  Tensor d_weights = needs[3] ? new_tensor({f.B, H, W}, scalar_type_of<T>) : no_gradient(p.weights);
  T* d_weight = needs[3] ? d_weights.mutable_data_ptr<T>() : nullptr;
  const T d_total = grad_total ? T(scalar_value(*grad_total)) : T(0);
  const Tensor* gradient = grad_loss ? &*grad_loss : nullptr;
  auto vectors = [&](int64_t b) { return classes.vectors(b); };
  LabelCheck check;
  // d loss / d weight of the n pixels read to places from `at` on, where it is wanted
  auto write_weights = [=](const LaneSoftmax<T>& softmax, const Pixels<T>& pixels, int64_t at, int64_t n,
                           int64_t b, int64_t y, int64_t x) {
    if (!d_weight) return;
    const Vec<T> v = softmax.loss * load<T>(&pixels.gradients[at]) + d_total;
    store_part<T>(d_weight + (b * H + y) * W + x, softmax.label >= 0 ? v : Vec<T>{}, n);
  };
  Buffer<T> sums;
  if (p.same_grid()) {
    const bool flat =
        p.is_flat() && (!grad_loss || is_flat_map(*grad_loss)) && (!needs[0] || is_flat_map(grad_features));
    if (flat) f = f.flat(), out = out.flat();
    const int64_t tile = tile_pixels(f.D, sizeof(T)), ldz = tile_stride<T>(tile);
    // what the forward pass has saved is of no use where it had other tiles
    const bool use = saved && saved->numel() > 0 && flat == p.is_flat();
    const std::vector<int64_t> sizes = saved_sizes<T>(f, C);
    STD_TORCH_CHECK(
        !use || (saved->dim() == 3 && std::equal(sizes.begin(), sizes.end(), saved->sizes().begin())), kOp,
        ": saved must be what the forward pass of the same arguments returned");
    const T* const all = use ? saved->const_data_ptr<T>() : nullptr;
    sums = sum_over_tiles<T>(f, Tiling<T>::packed(f), class_sums ? f.D * cp : 0, [&] {
      return [&, pixels = Pixels<T>(p, classes, gradient, check), room = Buffer<T>(all ? 0 : (C + 1) * ldz),
              g = Buffer<T>(C * ldz), logits = Buffer<T>(C * ldz), norm = Buffer<T>(ldz),
              result = Buffer<T>(Tile<T>::kChannels * tile_stride<T>(tile))](Tile<T>& t, T* total) mutable {
        pixels.reserve(tile);
        pixels.read(t.b, t.y, t.x, t.n);
        const BitsOf<T>* const labels = pixels.labels.get();
        if (!all) t.products(vectors(t.b), cp, C, room.get(), ldz, room.get() + C * ldz, true, labels);
        const T* const z = all ? all + t.index * (C + 1) * ldz : room.get();
        const T* const squares = z + C * ldz;
        for (int64_t i = 0; i < t.n; i += kLanes<T>) {
          const int64_t n = std::min<int64_t>(kLanes<T>, t.n - i);
          const Vec<T> a = load<T>(&pixels.gradients[i]) * load<T>(&pixels.weights[i]);
          const Vec<T> inverse = inverse_norms(&squares[i], eps);
          const LaneSoftmax<T> softmax(logits_of(&z[i], ldz, inverse), logits.get(), &g[i], ldz, C,
                                       pixels.labels_at(i, n), classes.bias_of(t.b), classes.mask_of(t.b));
          store<T>(&norm[i], T(2) * softmax.backward(&g[i], logits.get(), inverse, a));
          write_weights(softmax, pixels, i, n, t.b, t.y, t.x + i);
        }
        // both products by turns, a few channels at a time: they read the same features and g
        auto gradients = [&](int64_t begin, int64_t count, T* o, int64_t ldo) {
          for_channel_blocks(count, [&](auto block, int64_t i) {
            constexpr int N = decltype(block)::value;
            const int64_t d = begin + i;
            const T* own = t.f + d * t.ld;
            if (class_sums)
              add_class_sums<N, T>(own, t.ld, round_up(t.n, kLanes<T>), g.get(), ldz, C, total + d * cp, cp);
            if (!needs[0]) return;
            const auto along = [&, ld = t.ld, k = norm.get()](int64_t row, int64_t p) {
              return load<T>(k + p) * load<T>(own + row * ld + p);
            };
            tile_combine(vectors(t.b) + d * cp, cp, C, N, g.get(), ldz, along, o + i * ldo, ldo, t.n);
          });
        };
        auto part = [&](int64_t d, int64_t n) {
          if (!needs[0]) return gradients(d, n, nullptr, 0);
          write_row(out.channels(d, n), t.b, t.y, t.x, t.n, result.get(), t.ld,
                    [&](T* o, int64_t ldo) { gradients(d, n, o, ldo); });
        };
        if (all) {
          t.pack_channels(nullptr, part, labels);
        } else {
          t.each_channels(part);
        }
      };
    });
  } else {
    const PlaneMaps<T> maps(f, C, [&](int64_t b) { return classes.vectors(b); });
    auto adjoint = CellAdjoint<T>::planes(f.B, C, f.h, f.w, maps.row);
    using WriteWeights = decltype(write_weights);
    struct Body {
      Pixels<T> pixels;
      Buffer<T> g, logits;
      BlockAdjoint<T> block_adjoint;
      const ClassVectors<T>& classes;
      CellAdjoint<T>& adjoint;
      const WriteWeights& write_weights;
      T eps;

      void rows(int64_t, int64_t) {}
      void row(int64_t b, int64_t y, const LabelBlock<T>& block, int64_t at, const BlockView<T>& view, T t) {
        const Vec<T> inverse = view.inverse_norms(t, eps);
        const LaneSoftmax<T> softmax(view.products(t, inverse), logits.get(), g.get(), kLanes<T>, classes.C,
                                     pixels.labels_at(at, block.n), classes.bias_of(b), classes.mask_of(b));
        const Vec<T> a = load<T>(&pixels.gradients[at]) * load<T>(&pixels.weights[at]);
        const Vec<T> k = softmax.backward(g.get(), logits.get(), inverse, a);
        block_adjoint.add(t, g.get(), k);
        write_weights(softmax, pixels, at, block.n, b, y, block.x);
      }
      void flush(const LabelBlock<T>& block, int64_t b, int64_t y0) {
        block_adjoint.flush(block, adjoint, b, y0);
      }
    };
    label_pass<T>(p, f, maps, [&] {
      return Body{Pixels<T>(p, classes, gradient, check),
                  Buffer<T>(C * kLanes<T>),
                  Buffer<T>(C * kLanes<T>),
                  BlockAdjoint<T>(C),
                  classes,
                  adjoint,
                  write_weights,
                  eps};
    });
    if (class_sums) sums = adjoint_class_sums(f, adjoint, C);
    if (needs[0]) adjoint_feature_gradient(f, out, adjoint, C, vectors, true);
  }
  check.raise_if_found(kOp, C, p.ignore_index);

  Tensor grad_prototypes = no_gradient(p.prototypes), grad_temperature = no_gradient(p.temperature);
  if (class_sums) {
    Tensor d_prototypes = new_tensor({int64_t(classes.norm.size()) * classes.D}, scalar_type_of<T>);
    Tensor d_temperature = new_tensor({}, scalar_type_of<T>);
    double dt = 0;
    class_gradients(sums, f.B, classes, p, d_prototypes.mutable_data_ptr<T>(), &dt);
    *d_temperature.mutable_data_ptr<T>() = T(dt);
    std::vector<int64_t> shape(p.prototypes.sizes().begin(), p.prototypes.sizes().end());
    if (needs[1]) grad_prototypes = in_layout_of(p.prototypes, torch::stable::view(d_prototypes, shape));
    if (needs[2]) grad_temperature = in_layout_of(p.temperature, d_temperature);
  }
  if (needs[3]) d_weights = in_layout_of(*p.weights, d_weights);
  return {grad_features, grad_prototypes, grad_temperature, d_weights};
}

std::tuple<Tensor, Tensor, Tensor> forward(const Problem& p, bool save) {
  p.check(kOp);
  return with_accumulation({p.features.scalar_type(), p.prototypes.scalar_type()},
                           [&](auto zero) { return contrast_forward<decltype(zero)>(p, save); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const std::optional<Tensor>& grad_loss,
                                                    const std::optional<Tensor>& grad_total,
                                                    const Tensor* saved, const Problem& p,
                                                    const std::vector<bool>& needs) {
  p.check(kOp);
  return with_accumulation({p.features.scalar_type(), p.prototypes.scalar_type()}, [&](auto zero) {
    return contrast_backward<decltype(zero)>(grad_loss, grad_total, saved, p, needs);
  });
}

std::tuple<Tensor, Tensor, Tensor> prototype_contrast_saving_cpu(
    const Tensor& features, const Tensor& prototypes, const Tensor& regions, const Tensor& temperature,
    const std::optional<Tensor>& valid, const std::optional<Tensor>& weights, int64_t ignore_index,
    bool align_corners, double eps) {
  return forward(
      {{features, prototypes, regions, temperature, valid, weights, ignore_index, align_corners, eps},
       scalar_value(temperature)},
      true);
}

std::tuple<Tensor, Tensor> prototype_contrast_cpu(const Tensor& features, const Tensor& prototypes,
                                                  const Tensor& regions, const Tensor& temperature,
                                                  const std::optional<Tensor>& valid,
                                                  const std::optional<Tensor>& weights, int64_t ignore_index,
                                                  bool align_corners, double eps) {
  const auto [loss, total, saved] =
      forward({{features, prototypes, regions, temperature, valid, weights, ignore_index, align_corners, eps},
               scalar_value(temperature)},
              false);
  return {loss, total};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> prototype_contrast_backward_saved_cpu(
    const std::optional<Tensor>& grad_loss, const std::optional<Tensor>& grad_total, const Tensor& saved,
    const Tensor& features, const Tensor& prototypes, const Tensor& regions, const Tensor& temperature,
    const std::optional<Tensor>& valid, const std::optional<Tensor>& weights, int64_t ignore_index,
    bool align_corners, double eps, const std::vector<bool>& needs) {
  return backward(
      grad_loss, grad_total, &saved,
      {{features, prototypes, regions, temperature, valid, weights, ignore_index, align_corners, eps},
       scalar_value(temperature)},
      needs);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> prototype_contrast_backward_cpu(
    const std::optional<Tensor>& grad_loss, const std::optional<Tensor>& grad_total, const Tensor& features,
    const Tensor& prototypes, const Tensor& regions, const Tensor& temperature,
    const std::optional<Tensor>& valid, const std::optional<Tensor>& weights, int64_t ignore_index,
    bool align_corners, double eps, const std::vector<bool>& needs) {
  return backward(
      grad_loss, grad_total, nullptr,
      {{features, prototypes, regions, temperature, valid, weights, ignore_index, align_corners, eps},
       scalar_value(temperature)},
      needs);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pssl, CPU, m) {
  if (!simd_chosen()) return;
  m.impl("prototype_contrast", TORCH_BOX(&prototype_contrast_cpu));
  m.impl("prototype_contrast_backward", TORCH_BOX(&prototype_contrast_backward_cpu));
  m.impl("prototype_contrast_saving", TORCH_BOX(&prototype_contrast_saving_cpu));
  m.impl("prototype_contrast_backward_saved", TORCH_BOX(&prototype_contrast_backward_saved_cpu));
}
