// prototype_pool on CUDA. With a = the bilinear weights, m = the masks times the weights, u = 1/|F|, sums[c] is the sum
// over the cells of f_i A_c(i), A_c(i) = sum_x a_i(x) m_c(x) u(x), as on the CPU (prototype_pool_cpu.cpp):
//
//   products    the Gram maps, and backward the dots <f_i, grad_sums[c]>: one pass over D
//   pixels      m u of every label pixel; backward its norm's gradient, and those of weights and masks
//   squares     A, gathered from the pixels
//   class sums  sum_i f_i A_c(i); backward the features' gradient instead
//
// Where the grids are the same, same_grid takes a tile through products and pixels, and backward to the features' gradient.
#include <tuple>

#include "common/cuda_class_sums.cuh"
#include "prototype_pool_cuda.cuh"

namespace {

using namespace pssl;
using namespace pssl::PSSL_SIMD_NAMESPACE;
using namespace pssl::PSSL_SIMD_NAMESPACE::pool;

constexpr const char* kOp = "prototype_pool";

// A call's arguments, and what forward and backward do alike.
template <class T>
struct Call {
  const CudaCall call;
  const PoolArguments& a;
  const Masks masks;
  const int64_t B, D, C, padded;

  explicit Call(const PoolArguments& a)
      : call(kOp, a.features),
        a(a),
        masks(a.regions, a.weights, a.C, a.ignore_index),
        B(a.features.size(0)),
        D(a.features.size(1)),
        C(a.C),
        padded(padded_classes(a.C)) {}

  Tensor memory(int64_t count) const { return new_on_device(a.features, {count}, scalar_type_of<T>); }
  static T* data(Tensor& t) { return t.numel() > 0 ? t.mutable_data_ptr<T>() : nullptr; }
  Pixels<T> pixels_of() const {
    const LabelGrid<T> grid{B, a.features.size(2), a.features.size(3), a.H(), a.W(), a.align_corners, {}, {}};
    return {grid,    masks,   padded, a.normalize, T(a.eps), nullptr, nullptr,
            nullptr, nullptr, {},     nullptr,     {},       {}};
  }
  int64_t vectors_image() const { return D * padded; }
};

// The steps on the label grid, up to the gradients of the cells' products.
template <class T>
struct LabelPass {
  Axes<T> axes;
  Tensor dots, gram, value, label, norms;

  // q: null forward. `p` gets what it lacks.
  LabelPass(const Call<T>& c, Pixels<T>& p, const T* q, bool of_features)
      : axes(c.call, c.a.features, c.a.regions, c.a.align_corners),
        dots(c.memory(q ? axes.grid.all_cells() * c.padded : 0)),
        gram(c.memory(c.a.normalize ? 4 * axes.grid.all_cells() : 0)),
        value(c.memory(axes.grid.all_pixels())),
        label(new_on_device(c.a.features, {axes.grid.all_pixels()}, ScalarType::Int)),
        norms(c.memory(c.a.normalize && of_features ? axes.grid.all_pixels() : 0)) {
    find_products<T>(c.call, c.a.features, q, q ? c.vectors_image() : 0, q ? c.padded : 0, c.data(dots),
                     c.data(gram));
    p.grid = axes.grid, p.dots = c.data(dots), p.gram = c.data(gram), p.value = c.data(value);
    p.label = label.mutable_data_ptr<int32_t>(), p.norm_gradient = c.data(norms);
    launch(c.call, pixels<T>, grid_of(c.B * Tile::count(axes.grid.H, axes.grid.W)), kThreads, 0, p);
  }
  static CellGradients<T> gather(const Call<T>& c, const Pixels<T>& p) {
    return {c.call, c.a.features, p.grid,         PixelGradients<T>{p.value, p.label, p.masks},
            c.C,    c.padded,     p.norm_gradient};
  }
};

template <class T>
std::tuple<Tensor, Tensor> pool_forward(const PoolArguments& a) {
  const Call<T> c(a);
  Tensor sums = new_on_device(a.features, {c.B, c.C, c.D}, scalar_type_of<T>);
  Tensor mass = new_on_device(a.features, {c.B, c.C}, scalar_type_of<T>);
  Pixels<T> p = c.pixels_of();
  Tensor coefficients = c.memory(a.same_grid() ? c.B * c.padded * coefficient_plane(p.grid.cells()) : 0);
  const SameGrid<T> tiles{{}, {}, nullptr, 0, c.padded, c.data(coefficients), 0, a.normalize, {}, {}};
  if (!run_same_grid(c.call, a.features, a.regions, tiles, TilePixels<T, true>{p})) {
    const LabelPass<T> pass(c, p, nullptr, false);
    coefficients = LabelPass<T>::gather(c, p).of_products;
  }
  CellSums<T> partial(c.call, a.features, c.data(coefficients), c.C, c.padded);
  if (sums.numel() > 0)
    launch(c.call, add_chunks<T, T>, grid_for(sums.numel()), kThreads, 0, c.data(partial.partial), c.B,
           partial.chunks, c.C * c.D, c.data(sums));
  const int64_t pixels = a.H() * a.W(), chunks = (pixels + kMassPixels - 1) / kMassPixels;
  Tensor of_chunks = new_on_device(a.features, {c.B * chunks * c.C}, ScalarType::Double);
  double* counted = of_chunks.numel() > 0 ? of_chunks.mutable_data_ptr<double>() : nullptr;
  launch(c.call, masses<T>, grid_of(c.B * chunks), kThreads, kMassShared<T>, c.masks, a.H(), a.W(), chunks,
         counted);
  if (mass.numel() > 0)
    launch(c.call, add_chunks<double, T>, grid_for(mass.numel()), kThreads, 0, counted, c.B, chunks, c.C,
           c.data(mass));
  return {sums, mass};
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> pool_backward(const std::optional<Tensor>& grad_sums,
                                                 const std::optional<Tensor>& grad_mass,
                                                 const PoolArguments& a, const std::vector<bool>& needs) {
  const Call<T> c(a);
  auto gradient = [](bool needed, const std::optional<Tensor>& argument) {
    return needed ? torch::stable::empty_like(*argument) : no_gradient(argument);
  };
  Tensor grad_features = gradient(needs[0], a.features), grad_regions = gradient(needs[1], a.regions),
         grad_weights = gradient(needs[2], a.weights);
  Tensor vectors = c.memory(c.B * c.D * c.padded);
  T* q = c.data(vectors);
  launch(c.call, class_vectors<T>, grid_for(vectors.numel()), kThreads, 0, AnyView<3>::of(grad_sums), c.B,
         c.D, c.C, c.padded, q);
  Pixels<T> p = c.pixels_of();
  p.grad_mass = AnyView<2>::of(grad_mass);
  if (needs[1]) p.grad_soft = AnyView<4>::of(grad_regions);
  if (needs[2]) p.grad_weights = AnyView<3>::of(grad_weights);
  const SameGrid<T> tiles{{},       needs[0] ? AnyView<4>::of(grad_features) : AnyView<4>{},
                          q,        c.vectors_image(),
                          c.padded, nullptr,
                          c.padded, a.normalize,
                          {},       {}};
  if (run_same_grid(c.call, a.features, a.regions, tiles, TilePixels<T, false>{p}))
    return {grad_features, grad_regions, grad_weights};
  const LabelPass<T> pass(c, p, q, needs[0]);
  if (needs[0]) {
    CellGradients<T> found = LabelPass<T>::gather(c, p);
    combine_cells<T>(c.call, a.features, grad_features, q, c.vectors_image(), c.padded,
                     c.data(found.of_products), c.data(found.of_pairs));
  }
  return {grad_features, grad_regions, grad_weights};
}

std::tuple<Tensor, Tensor> prototype_pool_cuda(const Tensor& features, const Tensor& regions,
                                               int64_t num_regions, const std::optional<Tensor>& weights,
                                               bool normalize, int64_t ignore_index, bool align_corners,
                                               double eps) {
  const PoolArguments a{features, regions, weights, num_regions, normalize, ignore_index, align_corners, eps};
  a.check(kOp);
  return with_accumulation({features.scalar_type()},
                           [&](auto zero) { return pool_forward<decltype(zero)>(a); });
}

std::tuple<Tensor, Tensor, Tensor> prototype_pool_backward_cuda(
    const std::optional<Tensor>& grad_sums, const std::optional<Tensor>& grad_mass, const Tensor& features,
    const Tensor& regions, int64_t num_regions, const std::optional<Tensor>& weights, bool normalize,
    int64_t ignore_index, bool align_corners, double eps, const std::vector<bool>& needs) {
  const PoolArguments a{features, regions, weights, num_regions, normalize, ignore_index, align_corners, eps};
  a.check(kOp);
  return with_accumulation({features.scalar_type()}, [&](auto zero) {
    return pool_backward<decltype(zero)>(grad_sums, grad_mass, a, needs);
  });
}

}  // namespace

PSSL_REGISTER_CUDA(m) {
  m.impl("prototype_pool", TORCH_BOX(&prototype_pool_cuda));
  m.impl("prototype_pool_backward", TORCH_BOX(&prototype_pool_backward_cuda));
}
