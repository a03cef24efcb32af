// prototype_contrast on CUDA. With q_c = p_c / (|p_c| τ), z_c = <F, q_c> and u = 1/|F| the logits are z_c u, as on the CPU
// (prototype_contrast_cpu.cpp):
//
//   class vectors  q, and which are valid
//   products       the dots <f_i, q_c> and the Gram maps: one pass over D
//   pixels         the loss; backward what a pixel leaves of its softmax, and the gradient of its norm
//   squares        the gradients of the dots and Gram maps, gathered from the pixels
//   combine        the features' gradient; class sums that of the prototypes and of the temperature
#include <tuple>

#include "common/cuda_class_sums.cuh"
#include "common/cuda_combine.cuh"
#include "prototype_contrast.h"

namespace {

using namespace pssl;
using namespace pssl::PSSL_SIMD_NAMESPACE;

constexpr const char* kOp = "prototype_contrast";

// [C,*] as the same for all images, or [B,C,*]
template <int N>
AnyView<N> of_images(const Tensor& t) {
  if (t.dim() == N) return AnyView<N>::of(t);
  AnyView<N> v;
  const AnyView<N - 1> of = AnyView<N - 1>::of(t);
  v.size[0] = 1, v.stride[0] = 0;
  for (int i = 1; i < N; ++i) v.size[i] = of.size[i - 1], v.stride[i] = of.stride[i - 1];
  v.data = of.data, v.type = of.type;
  return v;
}

// A scalar as one element.
AnyView<1> scalar(const Tensor& t) { return AnyView<1>::of(torch::stable::view(t, {1})); }
AnyView<1> scalar(const std::optional<Tensor>& t) { return t ? scalar(*t) : AnyView<1>{}; }

// The prototypes, and the vectors that the products want of them.
template <class T>
struct Classes {
  AnyView<3> prototypes;  // [1 or B,C,D]
  AnyView<2> valid;       // [1 or B,C], or no data
  AnyView<1> temperature;
  T eps;
  int64_t images, B, C, D, padded;  // images: 1, or B where vectors differ from image to image
  bool own;                         // whether each image has prototypes of its own
  T* vectors;                       // [images,D,padded], p / (|p| τ), 0 where not valid
  T* mask;                          // [images,padded], 1 or 0

  __device__ bool is_valid(int64_t b, int64_t c) const { return !valid.data || valid.integer(b, c) != 0; }
  __device__ T of(int64_t b, int64_t c, int64_t d) const { return prototypes.floating<T>(b, c, d); }
  // |p|^2, for all threads of the block
  __device__ double squared(int64_t b, int64_t c, double* scratch) const {
    double sum = 0;
    for (int64_t d = threadIdx.x; d < D; d += kThreads) sum += double(of(b, c, d)) * double(of(b, c, d));
    return block_sum(sum, scratch);
  }
  __device__ const T* mask_of(int64_t b) const { return mask + (images == 1 ? 0 : b * padded); }
};

// A block for each image and class.
template <class T>
__global__ void __launch_bounds__(kThreads) class_vectors(const __grid_constant__ Classes<T> p) {
  PSSL_SHARED(scratch, double[kWarp]);
  const int64_t image = blockIdx.x / p.padded, c = blockIdx.x % p.padded;
  const bool valid = c < p.C && p.is_valid(image, c);
  const double inverse = valid ? inverse_norm(p.squared(image, c, scratch), double(p.eps)) : 0;
  const double temperature = p.temperature.template floating<double>(0);
  for (int64_t d = threadIdx.x; d < p.D; d += kThreads) {
    const double unit = valid ? double(T(double(p.of(image, c, d)) * inverse)) : 0;
    p.vectors[(image * p.D + d) * p.padded + c] = T(valid ? unit / temperature : 0);
  }
  if (threadIdx.x == 0) p.mask[image * p.padded + c] = T(valid);
}

// A block for each prototype: its gradient from partial [B,chunks,C,D], and its part in the temperature's.
template <class T>
__global__ void __launch_bounds__(kThreads)
    prototype_gradients(const __grid_constant__ Classes<T> p, const T* partial, int64_t chunks,
                        const __grid_constant__ AnyView<3> out, double* of_temperature) {
  PSSL_SHARED(scratch, double[kWarp]);
  const int64_t image = blockIdx.x / p.C, c = blockIdx.x % p.C;
  const int64_t first = p.own ? image : 0, last = p.own ? image + 1 : p.B;
  bool used = false;
  for (int64_t b = first; b < last; ++b) used |= p.is_valid(b, c);
  const double squared = used ? p.squared(image, c, scratch) : 0;
  const double inverse = inverse_norm(squared, double(p.eps)), norm = inverse == 0 ? 0 : std::sqrt(squared);
  auto unit = [&](int64_t d) { return double(T(double(p.of(image, c, d)) * inverse)); };
  auto dq = [&](int64_t d) {
    double sum = 0;
    for (int64_t b = first; b < last; ++b)
      for (int64_t chunk = 0; chunk < chunks; ++chunk)
        sum += double(partial[((b * chunks + chunk) * p.C + c) * p.D + d]);
    return sum;
  };
  double along = 0;
  for (int64_t d = threadIdx.x; used && d < p.D; d += kThreads) along += unit(d) * dq(d);
  along = block_sum(along, scratch);
  const double temperature = p.temperature.template floating<double>(0);
  for (int64_t d = threadIdx.x; out.data && d < p.D; d += kThreads)
    out.store(used ? T(prototype_gradient(dq(d), unit(d), along, norm, temperature)) : T(0), image, c, d);
  if (threadIdx.x == 0) of_temperature[blockIdx.x] = used ? temperature_gradient(along, temperature) : 0;
}

// What a pixel leaves of its softmax for the gradients of its logits.
template <class T>
struct alignas(16) SavedSoftmax {
  T maximum, sharpness, sum, scale;
};

// The label pixels, and what becomes of them.
template <class T>
struct Pixels {
  LabelGrid<T> grid;
  AnyView<3> labels, weights;  // [B,H,W]; weights may have no data
  int64_t ignore_index;
  Classes<T> classes;
  const T *dots, *gram;  // [B,h,w,padded]; [4][B,h,w]

  T* loss;          // [B,H,W]
  double* counted;  // the weights' sum of each block

  // backward
  AnyView<3> grad_loss;   // [B,H,W], or no data
  AnyView<1> grad_total;  // a number, or no data
  SavedSoftmax<T>* saved;
  int32_t* label;           // [B,H,W]
  T* norm_gradient;         // [B,H,W], d loss / d|F|^2
  AnyView<3> grad_weights;  // [B,H,W], or no data

  __device__ int64_t number(const Pixel& at) const { return (at.b * grid.H + at.y) * grid.W + at.x; }
  // -1 where the pixel does not count
  __device__ int32_t label_at(const Pixel& at) const {
    if (!at.inside) return -1;
    const int32_t own = counted_label(labels.integer(at.b, at.y, at.x), classes.C, ignore_index);
    return own >= 0 && classes.mask_of(at.b)[own] != T(0) ? own : -1;
  }
  __device__ T weight_at(const Pixel& at) const {
    return weights.data ? weights.floating<T>(at.b, at.y, at.x) : T(1);
  }
};

// The softmax of a pixel that counts.
template <class T>
struct PixelScores {
  OnlineSoftmax<T> softmax;
  T inverse, own;

  __device__ PixelScores(const Pixels<T>& p, const Pixel& at, int32_t label) {
    const Square<T> square = Square<T>::of(p.grid, at);
    inverse = inverse_norm(square.squared_norm(p.grid, p.gram), p.classes.eps);
    const T* mask = p.classes.mask_of(at.b);
    const T sharpness = OnlineSoftmax<T>::sharpness(inverse);
    for (int64_t c = 0; c < p.classes.padded; c += kFour) {
      const Four<T> z = square.products(p.dots, p.classes.padded, c), counts = four(mask + c);
#pragma unroll
      for (int k = 0; k < kFour; ++k)
        if (counts.v[k] != T(0)) softmax.add(z.v[k], sharpness);
    }
    own = square.product(p.dots, p.classes.padded, label);
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) losses(const __grid_constant__ Pixels<T> p) {
  PSSL_SHARED(scratch, double[kWarp]);
  const Pixel at = Pixel::of_thread(p.grid.H, p.grid.W);
  const int32_t label = p.label_at(at);
  T loss = 0, weight = 0;
  if (label >= 0) {
    const PixelScores<T> scores(p, at, label);
    weight = p.weight_at(at);
    loss = scores.softmax.loss(scores.own, scores.inverse) * weight;
  }
  if (at.inside) p.loss[p.number(at)] = loss;
  const double counted = block_sum(double(weight), scratch);
  if (threadIdx.x == 0) p.counted[blockIdx.x] = counted;
}

template <class T>
__global__ void __launch_bounds__(kThreads) residuals(const __grid_constant__ Pixels<T> p) {
  const Pixel at = Pixel::of_thread(p.grid.H, p.grid.W);
  if (!at.inside) return;
  const int32_t label = p.label_at(at);
  SavedSoftmax<T> saved = {};
  T norm_gradient = 0, of_weight = 0;
  if (label >= 0) {
    const PixelScores<T> scores(p, at, label);
    const T grad_loss = p.grad_loss.data ? p.grad_loss.template floating<T>(at.b, at.y, at.x) : T(0);
    const T gradient = grad_loss * p.weight_at(at);
    saved = {scores.softmax.maximum, OnlineSoftmax<T>::sharpness(scores.inverse), scores.softmax.sum,
             gradient / scores.softmax.sum * scores.inverse};
    norm_gradient =
        squared_norm_gradient(scores.inverse, gradient * scores.softmax.along(scores.own, scores.inverse));
    of_weight = scores.softmax.loss(scores.own, scores.inverse) * grad_loss +
                (p.grad_total.data ? p.grad_total.template floating<T>(0) : T(0));
  }
  const int64_t number = p.number(at);
  p.saved[number] = saved;
  p.label[number] = label;
  p.norm_gradient[number] = norm_gradient;
  if (p.grad_weights.data) p.grad_weights.store(of_weight, at.b, at.y, at.x);
}

// The gradient of a pixel's product with class c, for square_products.
template <class T>
struct PixelGradients {
  const SavedSoftmax<T>* saved;
  const int32_t* label;
  const T* dots;
  Classes<T> classes;

  // of a thread's square and class
  struct State {
    T corner[4], left, right;
    int64_t c;
    bool counts;
  };
  __device__ State begin(const Square<T>& square, int64_t b, int64_t c) const {
    auto of = [&](int64_t cell) { return dots[cell * classes.padded + c]; };
    return {{of(square.upper_left), of(square.upper_right), of(square.lower_left), of(square.lower_right)},
            T(0),
            T(0),
            c,
            classes.mask_of(b)[c] != T(0)};
  }
  __device__ void row(State& state, T ty) const {
    state.left = blend(state.corner[0], state.corner[2], ty);
    state.right = blend(state.corner[1], state.corner[3], ty);
  }
  __device__ T gradient(const State& state, int64_t number, int64_t, int64_t, int64_t, T tx) const {
    if (label[number] < 0 || !state.counts) return T(0);
    const SavedSoftmax<T> softmax = saved[number];
    const T e =
        OnlineSoftmax<T>::exponential(blend(state.left, state.right, tx), softmax.maximum, softmax.sharpness);
    return logit_gradient(e, label[number] == state.c ? softmax.sum : T(0), softmax.scale);
  }
};

// A call's arguments, and what forward and backward do alike.
template <class T>
struct Call {
  const CudaCall call;
  const Tensor& features;
  const Axes<T> axes;
  Classes<T> classes;
  Tensor vectors, mask, dots, gram;

  explicit Call(const ContrastArguments& a)
      : call(kOp, a.features), features(a.features), axes(call, a.features, a.regions, a.align_corners) {
    const int64_t B = a.features.size(0), D = a.features.size(1), n = a.per_image() ? B : 1, C = a.C();
    const int64_t padded = padded_classes(C);
    vectors = memory(n * D * padded), mask = memory(n * padded);
    dots = memory(axes.grid.all_cells() * padded), gram = memory(4 * axes.grid.all_cells());
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

  Tensor memory(int64_t count) const { return new_on_device(features, {count}, scalar_type_of<T>); }
  static T* data(Tensor& t) { return t.numel() > 0 ? t.mutable_data_ptr<T>() : nullptr; }
  int64_t vectors_image() const { return classes.images == 1 ? 0 : classes.D * classes.padded; }

  Pixels<T> pixels(const ContrastArguments& a) {
    find_products<T>(call, features, classes.vectors, vectors_image(), classes.padded, data(dots),
                     data(gram));
    return {axes.grid,
            AnyView<3>::of(a.regions),
            AnyView<3>::of(a.weights),
            a.ignore_index,
            classes,
            data(dots),
            data(gram),
            nullptr,
            nullptr,
            {},
            {},
            nullptr,
            nullptr,
            nullptr,
            {}};
  }
  int64_t blocks() const { return axes.grid.B * Tile::count(axes.grid.H, axes.grid.W); }
};

template <class T>
std::tuple<Tensor, Tensor> contrast(const ContrastArguments& a) {
  Call<T> c(a);
  Tensor loss = new_on_device(a.features, {c.axes.grid.B, a.H(), a.W()}, scalar_type_of<T>);
  Tensor total = new_on_device(a.features, {}, scalar_type_of<T>);
  Tensor counted = new_on_device(a.features, {c.blocks()}, ScalarType::Double);
  Pixels<T> p = c.pixels(a);
  p.loss = c.data(loss);
  p.counted = counted.numel() > 0 ? counted.mutable_data_ptr<double>() : nullptr;
  launch(c.call, losses<T>, grid_of(c.blocks()), kThreads, 0, p);
  launch(c.call, add_partials<T>, 1, kThreads, 0, p.counted, c.blocks(), scalar(total));
  return {loss, total};
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
  const int64_t all = c.axes.grid.all_pixels();
  Tensor saved = c.memory(4 * all), norms = c.memory(all),
         label = new_on_device(a.features, {all}, ScalarType::Int);
  Pixels<T> p = c.pixels(a);
  p.grad_loss = AnyView<3>::of(grad_loss), p.grad_total = scalar(grad_total);
  p.saved = reinterpret_cast<SavedSoftmax<T>*>(c.data(saved));
  p.label = label.mutable_data_ptr<int32_t>(), p.norm_gradient = c.data(norms);
  if (needs[3]) p.grad_weights = AnyView<3>::of(grad_weights);
  launch(c.call, residuals<T>, grid_of(c.blocks()), kThreads, 0, p);
  if (needs[0] || needs[1] || needs[2]) {
    const PixelGradients<T> of_pixels{p.saved, p.label, p.dots, c.classes};
    CellGradients<T> found(c.call, a.features, c.axes.grid, of_pixels, c.classes.C, c.classes.padded,
                           needs[0] ? p.norm_gradient : nullptr);
    if (needs[0])
      combine_cells<T>(c.call, a.features, grad_features, c.classes.vectors, c.vectors_image(),
                       c.classes.padded, c.data(found.of_products), c.data(found.of_pairs));
    if (needs[1] || needs[2]) {
      CellSums<T> sums(c.call, a.features, c.data(found.of_products), c.classes.C, c.classes.padded);
      const int64_t rows = (c.classes.own ? c.classes.B : 1) * c.classes.C;
      Tensor parts = new_on_device(a.features, {rows}, ScalarType::Double);
      double* of_temperature = rows > 0 ? parts.mutable_data_ptr<double>() : nullptr;
      launch(c.call, prototype_gradients<T>, grid_of(rows), kThreads, 0, c.classes, c.data(sums.partial),
             sums.chunks, needs[1] ? of_images<3>(grad_prototypes) : AnyView<3>{}, of_temperature);
      if (needs[2])
        launch(c.call, add_partials<T>, 1, kThreads, 0, of_temperature, rows, scalar(grad_temperature));
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
