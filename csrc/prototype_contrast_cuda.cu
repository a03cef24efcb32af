// prototype_contrast on CUDA. With q_c = p_c / (|p_c| τ), z_c = <F, q_c> and u = 1/|F| the logits are z_c u, as on the CPU
// (prototype_contrast_cpu.cpp):
//
//   class vectors  q, and which are valid
//   products       the dots <f_i, q_c> and the Gram maps: one pass over D
//   pixels         the loss; backward what a pixel leaves of its softmax, and the gradient of its norm
//   squares        the gradients of the dots and Gram maps, gathered from the pixels
//   combine        the features' gradient; class sums that of the prototypes and of the temperature
//
// Where the grids are the same, same_grid takes a tile through products, pixels and combine.
#include <tuple>

#include "common/cuda_class_sums.cuh"
#include "prototype_contrast_cuda.cuh"

namespace {

using namespace pssl;
using namespace pssl::PSSL_SIMD_NAMESPACE;
using namespace pssl::PSSL_SIMD_NAMESPACE::contrast;

constexpr const char* kOp = "prototype_contrast";

// A call's arguments, and what forward and backward do alike.
template <class T>
struct Call {
  const CudaCall call;
  const ContrastArguments& a;
  Classes<T> classes;
  Tensor vectors, mask;

  explicit Call(const ContrastArguments& a) : call(kOp, a.features), a(a) {
    const int64_t B = a.features.size(0), D = a.features.size(1), n = a.per_image() ? B : 1, C = a.C();
    const int64_t padded = padded_classes(C);
    vectors = memory(n * D * padded), mask = memory(n * padded);
    classes = {of_images<3>(a.prototypes),
               a.valid ? of_images<2>(*a.valid) : AnyView<2>{},
               scalar(a.temperature),
               T(a.eps),
               n,
               B,
               C,
               D,
               padded,
               a.prototypes.dim() == 3,
               data(vectors),
               data(mask)};
    launch(call, class_vectors<T>, grid_of(n * padded), kThreads, 0, classes);
  }

  Tensor memory(int64_t count) const { return new_on_device(a.features, {count}, scalar_type_of<T>); }
  static T* data(Tensor& t) { return t.numel() > 0 ? t.mutable_data_ptr<T>() : nullptr; }
  int64_t vectors_image() const { return classes.images == 1 ? 0 : classes.D * classes.padded; }

  Pixels<T> pixels() const {
    Pixels<T> p{};
    p.grid = {classes.B, a.features.size(2), a.features.size(3), a.H(), a.W(), a.align_corners, {}, {}};
    p.labels = AnyView<3>::of(a.regions), p.weights = AnyView<3>::of(a.weights);
    p.ignore_index = a.ignore_index, p.classes = classes;
    return p;
  }
  // As same_grid, where it can.
  template <class Body>
  bool in_tiles(const Body& body, const Tensor* out, T* gradients) const {
    return run_same_grid(call, a.features, a.regions,
                         SameGrid<T>{{},
                                     out ? AnyView<4>::of(*out) : AnyView<4>{},
                                     classes.vectors,
                                     vectors_image(),
                                     classes.padded,
                                     gradients,
                                     classes.padded,
                                     true,
                                     {},
                                     {}},
                         body);
  }
  int64_t label_blocks() const { return classes.B * Tile::count(a.H(), a.W()); }
};

// The maps on the feature grid that the label grid needs.
template <class T>
struct Maps {
  Axes<T> axes;
  Tensor dots, gram;

  Maps(const Call<T>& c, Pixels<T>& p)
      : axes(c.call, c.a.features, c.a.regions, c.a.align_corners),
        dots(c.memory(axes.grid.all_cells() * c.classes.padded)),
        gram(c.memory(4 * axes.grid.all_cells())) {
    find_products<T>(c.call, c.a.features, c.classes.vectors, c.vectors_image(), c.classes.padded,
                     c.data(dots), c.data(gram));
    p.grid = axes.grid, p.dots = c.data(dots), p.gram = c.data(gram);
  }
};

template <class T>
std::tuple<Tensor, Tensor> contrast(const ContrastArguments& a) {
  Call<T> c(a);
  Tensor loss = new_on_device(a.features, {c.classes.B, a.H(), a.W()}, scalar_type_of<T>);
  Tensor total = new_on_device(a.features, {}, scalar_type_of<T>);
  int64_t blocks = c.classes.B * CellTiles{a.H(), a.W(), true}.count();
  Tensor counted = new_on_device(a.features, {std::max(blocks, c.label_blocks())}, ScalarType::Double);
  Pixels<T> p = c.pixels();
  p.loss = c.data(loss);
  p.counted = counted.numel() > 0 ? counted.mutable_data_ptr<double>() : nullptr;
  if (!c.in_tiles(TileLosses<T>{p}, nullptr, nullptr)) {
    const Maps<T> maps(c, p);
    launch(c.call, losses<T>, grid_of(blocks = c.label_blocks()), kThreads, 0, p);
  }
  launch(c.call, add_partials<T>, 1, kThreads, 0, p.counted, blocks, scalar(total));
  return {loss, total};
}

// The gradients of the prototypes and of the temperature, from those of the products [B,padded,plane].
template <class T>
void write_class_gradients(const Call<T>& c, const T* gradients, Tensor* grad_prototypes,
                           Tensor* grad_temperature) {
  CellSums<T> sums(c.call, c.a.features, gradients, c.classes.C, c.classes.padded);
  const int64_t rows = (c.classes.own ? c.classes.B : 1) * c.classes.C;
  Tensor parts = new_on_device(c.a.features, {rows}, ScalarType::Double);
  double* of_temperature = rows > 0 ? parts.mutable_data_ptr<double>() : nullptr;
  launch(c.call, prototype_gradients<T>, grid_of(rows), kThreads, 0, c.classes, c.data(sums.partial),
         sums.chunks, grad_prototypes ? of_images<3>(*grad_prototypes) : AnyView<3>{}, of_temperature);
  if (grad_temperature)
    launch(c.call, add_partials<T>, 1, kThreads, 0, of_temperature, rows, scalar(*grad_temperature));
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> contrast_backward(const std::optional<Tensor>& grad_loss,
                                                             const std::optional<Tensor>& grad_total,
                                                             const ContrastArguments& a,
                                                             const std::vector<bool>& needs) {
  Call<T> c(a);
  auto gradient = [](bool needed, const std::optional<Tensor>& argument) {
    return needed ? torch::stable::empty_like(*argument) : no_gradient(argument);
  };
  Tensor grad_features = gradient(needs[0], a.features), grad_prototypes = gradient(needs[1], a.prototypes),
         grad_temperature = gradient(needs[2], a.temperature), grad_weights = gradient(needs[3], a.weights);
  const bool of_classes = needs[1] || needs[2];
  auto class_gradients = [&](Tensor& gradients) {
    if (of_classes)
      write_class_gradients(c, c.data(gradients), needs[1] ? &grad_prototypes : nullptr,
                            needs[2] ? &grad_temperature : nullptr);
  };
  Pixels<T> p = c.pixels();
  p.grad_loss = AnyView<3>::of(grad_loss), p.grad_total = scalar(grad_total);
  if (needs[3]) p.grad_weights = AnyView<3>::of(grad_weights);
  const int64_t all = p.grid.all_pixels();
  const int64_t plane = coefficient_plane(p.grid.cells());
  Tensor in_tiles = c.memory(a.same_grid() && of_classes ? c.classes.B * c.classes.padded * plane : 0);
  if (c.in_tiles(TileResiduals<T>{p}, needs[0] ? &grad_features : nullptr, c.data(in_tiles))) {
    class_gradients(in_tiles);
  } else {
    const Maps<T> maps(c, p);
    Tensor saved = c.memory(4 * all), norms = c.memory(all),
           label = new_on_device(a.features, {all}, ScalarType::Int);
    p.saved = reinterpret_cast<SavedSoftmax<T>*>(c.data(saved));
    p.label = label.mutable_data_ptr<int32_t>(), p.norm_gradient = c.data(norms);
    launch(c.call, residuals<T>, grid_of(c.label_blocks()), kThreads, 0, p);
    if (needs[0] || of_classes) {
      const PixelGradients<T> of_pixels{p.saved, p.label, p.dots, c.classes};
      CellGradients<T> found(c.call, a.features, p.grid, of_pixels, c.classes.C, c.classes.padded,
                             needs[0] ? p.norm_gradient : nullptr);
      if (needs[0])
        combine_cells<T>(c.call, a.features, grad_features, c.classes.vectors, c.vectors_image(),
                         c.classes.padded, c.data(found.of_products), c.data(found.of_pairs));
      class_gradients(found.of_products);
    }
  }
  return {grad_features, grad_prototypes, grad_temperature, grad_weights};
}

std::tuple<Tensor, Tensor> prototype_contrast_cuda(const Tensor& features, const Tensor& prototypes,
                                                   const Tensor& regions, const Tensor& temperature,
                                                   const std::optional<Tensor>& valid,
                                                   const std::optional<Tensor>& weights, int64_t ignore_index,
                                                   bool align_corners, double eps) {
  const ContrastArguments a{features, prototypes,   regions,       temperature, valid,
                            weights,  ignore_index, align_corners, eps};
  a.check(kOp);
  return with_accumulation({features.scalar_type(), prototypes.scalar_type()},
                           [&](auto zero) { return contrast<decltype(zero)>(a); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> prototype_contrast_backward_cuda(
    const std::optional<Tensor>& grad_loss, const std::optional<Tensor>& grad_total, const Tensor& features,
    const Tensor& prototypes, const Tensor& regions, const Tensor& temperature,
    const std::optional<Tensor>& valid, const std::optional<Tensor>& weights, int64_t ignore_index,
    bool align_corners, double eps, const std::vector<bool>& needs) {
  const ContrastArguments a{features, prototypes,   regions,       temperature, valid,
                            weights,  ignore_index, align_corners, eps};
  a.check(kOp);
  return with_accumulation({features.scalar_type(), prototypes.scalar_type()}, [&](auto zero) {
    return contrast_backward<decltype(zero)>(grad_loss, grad_total, a, needs);
  });
}

}  // namespace

PSSL_REGISTER_CUDA(m) {
  m.impl("prototype_contrast", TORCH_BOX(&prototype_contrast_cuda));
  m.impl("prototype_contrast_backward", TORCH_BOX(&prototype_contrast_backward_cuda));
}
