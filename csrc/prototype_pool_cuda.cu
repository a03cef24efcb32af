// prototype_pool on CUDA. With a = the bilinear weights, m = the masks times the weights, u = 1/|F|, sums[c] is the sum
// over the cells of f_i A_c(i), A_c(i) = sum_x a_i(x) m_c(x) u(x), as on the CPU (prototype_pool_cpu.cpp):
//
//   products    the Gram maps, and backward the dots <f_i, grad_sums[c]>: one pass over D
//   pixels      m u of every label pixel; backward its norm's gradient, and those of weights and masks
//   squares     A, gathered from the pixels
//   class sums  sum_i f_i A_c(i); backward the features' gradient instead
#include <tuple>

#include "common/cuda_class_sums.cuh"
#include "common/cuda_combine.cuh"
#include "prototype_pool.h"

namespace {

using namespace pssl;
using namespace pssl::PSSL_SIMD_NAMESPACE;

constexpr const char* kOp = "prototype_pool";

// The masks and weights of label pixels.
struct Masks {
  AnyView<3> labels;   // [B,H,W]; no data where masks are soft
  AnyView<4> soft;     // [B,C,H,W]
  AnyView<3> weights;  // [B,H,W], or no data
  int64_t C, ignore_index;
  bool is_soft;

  Masks(const Tensor& regions, const std::optional<Tensor>& weights, int64_t C, int64_t ignore_index)
      : weights(AnyView<3>::of(weights)), C(C), ignore_index(ignore_index), is_soft(regions.dim() == 4) {
    if (is_soft) {
      soft = AnyView<4>::of(regions);
    } else {
      labels = AnyView<3>::of(regions);
    }
  }
  // -1 where the pixel does not count
  __device__ int32_t label(int64_t b, int64_t y, int64_t x) const {
    return is_soft ? 0 : counted_label(labels.integer(b, y, x), C, ignore_index);
  }
  template <class T>
  __device__ T weight(int64_t b, int64_t y, int64_t x) const {
    return weights.data ? weights.floating<T>(b, y, x) : T(1);
  }
  // f(c, mask) for the classes of a pixel that counts
  template <class T, class F>
  __device__ void each(int32_t label, int64_t b, int64_t y, int64_t x, const F& f) const {
    if (!is_soft) return f(int64_t(label), T(1));
    for (int64_t c = 0; c < C; ++c) f(c, soft.floating<T>(b, c, y, x));
  }
};

// What the pixels leave for the squares, and the backward's own results.
template <class T>
struct Pixels {
  LabelGrid<T> grid;
  Masks masks;
  const T* gram;  // null: features count as they are
  T eps;
  T* value;        // [B,H,W], weight / |F|
  int32_t* label;  // [B,H,W]

  // backward
  const T* dots;  // [B,h,w,padded]; null: forward
  int64_t padded;
  AnyView<2> grad_mass;  // [B,C], or no data
  T* norm_gradient;      // [B,H,W], d loss / d|F|^2, or null
  AnyView<4> grad_soft;  // [B,C,H,W], or no data
  AnyView<3> grad_weights;
};

template <class T>
__global__ void __launch_bounds__(kThreads) pixels(const __grid_constant__ Pixels<T> p) {
  const Pixel at = Pixel::of_thread(p.grid.H, p.grid.W);
  if (!at.inside) return;
  const int64_t number = (at.b * p.grid.H + at.y) * p.grid.W + at.x;
  const int32_t label = p.masks.label(at.b, at.y, at.x);
  const Square<T> square = Square<T>::of(p.grid, at);
  T weight = 0, inverse = 1;
  if (label >= 0) {
    weight = p.masks.template weight<T>(at.b, at.y, at.x);
    if (p.gram) inverse = inverse_norm(square.squared_norm(p.grid, p.gram), p.eps);
  }
  p.value[number] = label >= 0 ? weight * inverse : T(0);
  p.label[number] = label;
  if (!p.dots) return;
  T along = 0, of_weight = 0;
  if (label >= 0)
    p.masks.template each<T>(label, at.b, at.y, at.x, [&](int64_t c, T mask) {
      const T product = square.product(p.dots, p.padded, c) * inverse;
      const T gradient = product + (p.grad_mass.data ? p.grad_mass.template floating<T>(at.b, c) : T(0));
      along += mask * weight * product;
      of_weight += mask * gradient;
      if (p.grad_soft.data) p.grad_soft.store(gradient * weight, at.b, c, at.y, at.x);
    });
  if (p.norm_gradient) p.norm_gradient[number] = squared_norm_gradient(inverse, along);
  if (p.grad_weights.data) p.grad_weights.store(of_weight, at.b, at.y, at.x);
}

// The gradient of a pixel's product with class c, for square_products: m u.
template <class T>
struct PixelGradients {
  const T* value;
  const int32_t* label;
  Masks masks;

  __device__ int64_t begin(const Square<T>&, int64_t, int64_t c) const { return c; }
  __device__ void row(int64_t, T) const {}
  __device__ T gradient(int64_t c, int64_t number, int64_t b, int64_t y, int64_t x, T) const {
    if (masks.is_soft) return masks.soft.floating<T>(b, c, y, x) * value[number];
    return label[number] == c ? value[number] : T(0);
  }
};

// partial[b][chunk][c] = the masks' sums over a chunk of an image's label pixels; threads take a class and every n-th pixel.
constexpr int64_t kMassPixels = 4096;

__device__ inline int mass_parts(int64_t C) { return C < kThreads ? kThreads / int(C) : 1; }

template <class T>
__global__ void __launch_bounds__(kThreads)
    masses(const __grid_constant__ Masks masks, int64_t H, int64_t W, int64_t chunks, double* partial) {
  PSSL_SHARED(sums, double[kThreads]);
  const int64_t b = blockIdx.x / chunks, chunk = blockIdx.x % chunks, begin = chunk * kMassPixels;
  const int64_t end = begin + kMassPixels < H * W ? begin + kMassPixels : H * W;
  const int parts = mass_parts(masks.C), thread = int(threadIdx.x);
  const int across = parts > 1 ? int(masks.C) : kThreads;
  for (int64_t c0 = 0; c0 < masks.C; c0 += across) {
    const int64_t c = c0 + thread % across;
    const int part = thread / across;
    double sum = 0;
    for (int64_t i = begin + part; c < masks.C && part < parts && i < end; i += parts) {
      const int64_t y = i / W, x = i % W;
      if (masks.is_soft) {
        sum += double(masks.soft.floating<T>(b, c, y, x) * masks.template weight<T>(b, y, x));
      } else if (masks.label(b, y, x) == c) {
        sum += double(masks.template weight<T>(b, y, x));
      }
    }
    sums[thread] = sum;
    __syncthreads();
    if (part == 0 && c < masks.C) {
      for (int other = 1; other < parts; ++other) sum += sums[thread + other * across];
      partial[blockIdx.x * masks.C + c] = sum;
    }
    __syncthreads();
  }
}

// vectors [B][D][padded] from grad_sums [B,C,D], 0 where there is none
template <class T>
__global__ void __launch_bounds__(kThreads)
    class_vectors(const __grid_constant__ AnyView<3> grad_sums, int64_t B, int64_t D, int64_t C,
                  int64_t padded, T* vectors) {
  const int64_t thread = grid_thread(), c = thread % padded, d = thread / padded % D, b = thread / padded / D;
  if (b >= B) return;
  vectors[thread] = c < C && grad_sums.data ? grad_sums.template floating<T>(b, c, d) : T(0);
}

// A call's arguments, and what forward and backward do alike.
template <class T>
struct Call {
  const CudaCall call;
  const Tensor& features;
  const Masks masks;
  const int64_t B, D, C, padded;
  const Axes<T> axes;
  const T eps;
  Tensor gram, value, label;

  Call(const PoolArguments& a)
      : call(kOp, a.features),
        features(a.features),
        masks(a.regions, a.weights, a.C, a.ignore_index),
        B(a.features.size(0)),
        D(a.features.size(1)),
        C(a.C),
        padded(padded_classes(a.C)),
        axes(call, a.features, a.regions, a.align_corners),
        eps(T(a.eps)),
        gram(memory(a.normalize ? 4 * axes.grid.all_cells() : 0)),
        value(memory(axes.grid.all_pixels())),
        label(new_on_device(a.features, {axes.grid.all_pixels()}, ScalarType::Int)) {}

  Tensor memory(int64_t count) const { return new_on_device(features, {count}, scalar_type_of<T>); }
  static T* data(Tensor& t) { return t.numel() > 0 ? t.mutable_data_ptr<T>() : nullptr; }

  Pixels<T> pixels_of() {
    return {axes.grid, masks,  data(gram), eps,     data(value), label.mutable_data_ptr<int32_t>(),
            nullptr,   padded, {},         nullptr, {},          {}};
  }
  void run(const Pixels<T>& p) const {
    launch(call, pixels<T>, grid_of(B * Tile::count(axes.grid.H, axes.grid.W)), kThreads, 0, p);
  }
  CellGradients<T> gather(const T* norm_gradient) {
    return {call,
            features,
            axes.grid,
            PixelGradients<T>{data(value), label.mutable_data_ptr<int32_t>(), masks},
            C,
            padded,
            norm_gradient};
  }
};

template <class T>
std::tuple<Tensor, Tensor> pool(const PoolArguments& a) {
  Call<T> c(a);
  const LabelGrid<T>& grid = c.axes.grid;
  Tensor sums = new_on_device(a.features, {c.B, c.C, c.D}, scalar_type_of<T>);
  Tensor mass = new_on_device(a.features, {c.B, c.C}, scalar_type_of<T>);
  if (a.normalize) find_products<T>(c.call, a.features, nullptr, 0, 0, nullptr, c.data(c.gram));
  c.run(c.pixels_of());
  CellGradients<T> found = c.gather(nullptr);
  CellSums<T> partial(c.call, a.features, c.data(found.of_products), c.C, c.padded);
  if (sums.numel() > 0)
    launch(c.call, add_chunks<T, T>, grid_for(sums.numel()), kThreads, 0, c.data(partial.partial), c.B,
           partial.chunks, c.C * c.D, c.data(sums));
  const int64_t chunks = (grid.H * grid.W + kMassPixels - 1) / kMassPixels;
  Tensor of_chunks = new_on_device(a.features, {c.B * chunks * c.C}, ScalarType::Double);
  double* counted = of_chunks.numel() > 0 ? of_chunks.mutable_data_ptr<double>() : nullptr;
  launch(c.call, masses<T>, grid_of(c.B * chunks), kThreads, 0, c.masks, grid.H, grid.W, chunks, counted);
  if (mass.numel() > 0)
    launch(c.call, add_chunks<double, T>, grid_for(mass.numel()), kThreads, 0, counted, c.B, chunks, c.C,
           c.data(mass));
  return {sums, mass};
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> pool_backward(const std::optional<Tensor>& grad_sums,
                                                 const std::optional<Tensor>& grad_mass,
                                                 const PoolArguments& a, const std::vector<bool>& needs) {
  Call<T> c(a);
  auto gradient = [](bool needed, const std::optional<Tensor>& argument) {
    return needed ? torch::stable::empty_like(*argument) : no_gradient(argument);
  };
  Tensor grad_features = gradient(needs[0], a.features), grad_regions = gradient(needs[1], a.regions),
         grad_weights = gradient(needs[2], a.weights);
  Tensor vectors = c.memory(c.B * c.D * c.padded), dots = c.memory(c.axes.grid.all_cells() * c.padded);
  Tensor norm_gradient = c.memory(a.normalize && needs[0] ? c.axes.grid.all_pixels() : 0);
  T* q = c.data(vectors);
  launch(c.call, class_vectors<T>, grid_for(vectors.numel()), kThreads, 0, AnyView<3>::of(grad_sums), c.B,
         c.D, c.C, c.padded, q);
  find_products<T>(c.call, a.features, q, c.D * c.padded, c.padded, c.data(dots), c.data(c.gram));
  Pixels<T> p = c.pixels_of();
  p.dots = c.data(dots), p.grad_mass = AnyView<2>::of(grad_mass), p.norm_gradient = c.data(norm_gradient);
  if (needs[1]) p.grad_soft = AnyView<4>::of(grad_regions);
  if (needs[2]) p.grad_weights = AnyView<3>::of(grad_weights);
  c.run(p);
  if (needs[0]) {
    CellGradients<T> found = c.gather(p.norm_gradient);
    combine_cells<T>(c.call, a.features, grad_features, q, c.D * c.padded, c.padded,
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
  return with_accumulation({features.scalar_type()}, [&](auto zero) { return pool<decltype(zero)>(a); });
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
