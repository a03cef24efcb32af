// The kernels of prototype_contrast: class vectors, the softmax of label pixels and its gradients, the gradients of prototypes.
#pragma once

#include "common/cuda_same_grid.cuh"
#include "prototype_contrast.h"

namespace pssl::PSSL_SIMD_NAMESPACE {
namespace contrast {

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
inline AnyView<1> scalar(const Tensor& t) { return AnyView<1>::of(torch::stable::view(t, {1})); }
inline AnyView<1> scalar(const std::optional<Tensor>& t) { return t ? scalar(*t) : AnyView<1>{}; }

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
    const T* of_row = partial + c * p.D + d;
#pragma unroll 8  // so many loads are under way
    for (int64_t chunk = first * chunks; chunk < last * chunks; ++chunk)
      sum += double(of_row[chunk * p.C * p.D]);
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

  // d loss / d z_c of a valid class
  __device__ T gradient(T z, bool own) const {
    return logit_gradient(OnlineSoftmax<T>::exponential(z, maximum, sharpness), own ? sum : T(0), scale);
  }
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

// The products of a label pixel, from those of its four cells.
template <class T>
struct BlendedProducts {
  Square<T> square;
  const T* dots;
  int64_t padded;

  __device__ T one(int64_t c) const { return square.product(dots, padded, c); }
  __device__ Four<T> from(int64_t c) const { return square.products(dots, padded, c); }
};

// And of a cell, from its column of a tile.
template <class T>
struct ColumnProducts {
  const T* column;

  __device__ T one(int64_t c) const { return column[c * kTilePlane]; }
  __device__ Four<T> from(int64_t c) const { return {one(c), one(c + 1), one(c + 2), one(c + 3)}; }
};

// The softmax of a pixel that counts.
template <class T>
struct PixelScores {
  OnlineSoftmax<T> softmax;
  T inverse, own;

  template <class Products>
  __device__ PixelScores(const Pixels<T>& p, int64_t b, int32_t label, T squared, const Products& products)
      : inverse(inverse_norm(squared, p.classes.eps)), own(products.one(label)) {
    const T* mask = p.classes.mask_of(b);
    const T sharpness = OnlineSoftmax<T>::sharpness(inverse);
    for (int64_t c = 0; c < p.classes.padded; c += kClassGroup) {
      T z[kClassGroup];
      bool counts[kClassGroup];
#pragma unroll
      for (int half = 0; half < kClassGroup; half += kFour) {
        const Four<T> values = products.from(c + half), valid = four(mask + c + half);
#pragma unroll
        for (int k = 0; k < kFour; ++k) z[half + k] = values.v[k], counts[half + k] = valid.v[k] != T(0);
      }
      softmax.add(z, counts, sharpness);
    }
  }
  // Of a pixel of the label grid.
  __device__ static PixelScores of(const Pixels<T>& p, const Pixel& at, int32_t label) {
    const Square<T> square = Square<T>::of(p.grid, at);
    return PixelScores(p, at.b, label, square.squared_norm(p.grid, p.gram),
                       BlendedProducts<T>{square, p.dots, p.classes.padded});
  }
  __device__ T loss() const { return softmax.loss(own, inverse); }
};

// What a pixel's scores give back.
template <class T>
struct Residual {
  SavedSoftmax<T> saved = {};
  T norm_gradient = 0, of_weight = 0;

  Residual() = default;
  __device__ Residual(const Pixels<T>& p, const Pixel& at, const PixelScores<T>& scores) {
    const T grad_loss = p.grad_loss.data ? p.grad_loss.template floating<T>(at.b, at.y, at.x) : T(0);
    const T gradient = grad_loss * p.weight_at(at);
    saved = {scores.softmax.maximum, OnlineSoftmax<T>::sharpness(scores.inverse), scores.softmax.sum,
             gradient / scores.softmax.sum * scores.inverse};
    norm_gradient =
        squared_norm_gradient(scores.inverse, gradient * scores.softmax.along(scores.own, scores.inverse));
    of_weight = scores.loss() * grad_loss + (p.grad_total.data ? p.grad_total.template floating<T>(0) : T(0));
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) losses(const __grid_constant__ Pixels<T> p) {
  PSSL_SHARED(scratch, double[kWarp]);
  const Pixel at = Pixel::of_thread(p.grid.H, p.grid.W);
  const int32_t label = p.label_at(at);
  const T weight = label >= 0 ? p.weight_at(at) : T(0);
  if (at.inside) p.loss[p.number(at)] = label >= 0 ? PixelScores<T>::of(p, at, label).loss() * weight : T(0);
  const double counted = block_sum(double(weight), scratch);
  if (threadIdx.x == 0) p.counted[blockIdx.x] = counted;
}

template <class T>
__global__ void __launch_bounds__(kThreads) residuals(const __grid_constant__ Pixels<T> p) {
  const Pixel at = Pixel::of_thread(p.grid.H, p.grid.W);
  if (!at.inside) return;
  const int32_t label = p.label_at(at);
  Residual<T> found;
  if (label >= 0) found = Residual<T>(p, at, PixelScores<T>::of(p, at, label));
  const int64_t number = p.number(at);
  p.saved[number] = found.saved;
  p.label[number] = label;
  p.norm_gradient[number] = found.norm_gradient;
  if (p.grad_weights.data) p.grad_weights.store(found.of_weight, at.b, at.y, at.x);
}

// The same for same_grid.
template <class T>
struct TileLosses {
  static constexpr bool kForward = true;
  Pixels<T> p;

  __device__ T pixel(const Pixel& at, T squared, T* column) const {
    const int32_t label = p.label_at(at);
    const T weight = label >= 0 ? p.weight_at(at) : T(0);
    T loss = 0;
    if (label >= 0) loss = PixelScores<T>(p, at.b, label, squared, ColumnProducts<T>{column}).loss() * weight;
    p.loss[p.number(at)] = loss;
    return weight;
  }
  __device__ void finish(double counted) const { p.counted[blockIdx.x] = counted; }
};

template <class T>
struct TileResiduals {
  static constexpr bool kForward = false;
  Pixels<T> p;

  __device__ T pixel(const Pixel& at, T squared, T* column) const {
    const int32_t label = p.label_at(at);
    Residual<T> found;
    if (label >= 0)
      found = Residual<T>(p, at, PixelScores<T>(p, at.b, label, squared, ColumnProducts<T>{column}));
    const T* mask = p.classes.mask_of(at.b);
    for (int64_t c = 0; c < p.classes.padded; ++c) {
      T& z = column[c * kTilePlane];
      z = label >= 0 && mask[c] != T(0) ? found.saved.gradient(z, c == label) : T(0);
    }
    if (p.grad_weights.data) p.grad_weights.store(found.of_weight, at.b, at.y, at.x);
    return found.norm_gradient;
  }
};

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

}  // namespace contrast
}  // namespace pssl::PSSL_SIMD_NAMESPACE
