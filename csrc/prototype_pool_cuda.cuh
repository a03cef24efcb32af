// The kernels of prototype_pool: masks and weights of label pixels, what they give to the cells, and their sums.
#pragma once

#include "common/cuda_same_grid.cuh"
#include "prototype_pool.h"

namespace pssl::PSSL_SIMD_NAMESPACE {
namespace pool {

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

// The label pixels, and what becomes of them.
template <class T>
struct Pixels {
  LabelGrid<T> grid;
  Masks masks;
  int64_t padded;
  bool normalize;
  T eps;
  const T* gram;   // [4][B,h,w]
  T* value;        // [B,H,W], weight / |F|
  int32_t* label;  // [B,H,W]

  // backward
  const T* dots;         // [B,h,w,padded]; null: forward
  AnyView<2> grad_mass;  // [B,C], or no data
  T* norm_gradient;      // [B,H,W], d loss / d|F|^2, or null
  AnyView<4> grad_soft;  // [B,C,H,W], or no data
  AnyView<3> grad_weights;
};

// A pixel's label (-1 where it does not count), weight and 1/|F|.
template <class T>
struct PixelMask {
  int32_t label;
  T weight = 0, inverse = 1;

  template <class Squared>
  __device__ PixelMask(const Pixels<T>& p, const Pixel& at, const Squared& squared)
      : label(p.masks.label(at.b, at.y, at.x)) {
    if (label < 0) return;
    weight = p.masks.template weight<T>(at.b, at.y, at.x);
    if (!p.normalize) return;
    // NaN stays NaN, for a value of 0 would have its pixel left out of the sums, and hide it.
    const T square = squared();
    inverse = square == square ? inverse_norm(square, p.eps) : square;
  }
  __device__ T value() const { return label >= 0 ? weight * inverse : T(0); }
  // d loss / d|F|^2, from the products product(c); writes the gradients of masks and weights where they are wanted.
  template <class Product>
  __device__ T backward(const Pixels<T>& p, const Pixel& at, const Product& product) const {
    T along = 0, of_weight = 0;
    if (label >= 0)
      p.masks.template each<T>(label, at.b, at.y, at.x, [&](int64_t c, T mask) {
        const T of_mask = product(c) * inverse;
        const T gradient = of_mask + (p.grad_mass.data ? p.grad_mass.template floating<T>(at.b, c) : T(0));
        along += mask * weight * of_mask;
        of_weight += mask * gradient;
        if (p.grad_soft.data) p.grad_soft.store(gradient * weight, at.b, c, at.y, at.x);
      });
    if (p.grad_weights.data) p.grad_weights.store(of_weight, at.b, at.y, at.x);
    return p.normalize ? squared_norm_gradient(inverse, along) : T(0);
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) pixels(const __grid_constant__ Pixels<T> p) {
  const Pixel at = Pixel::of_thread(p.grid.H, p.grid.W);
  if (!at.inside) return;
  const Square<T> square = Square<T>::of(p.grid, at);
  const PixelMask<T> mask(p, at, [&] { return square.squared_norm(p.grid, p.gram); });
  const int64_t number = (at.b * p.grid.H + at.y) * p.grid.W + at.x;
  p.value[number] = mask.value();
  p.label[number] = mask.label;
  if (!p.dots) return;
  const T gradient = mask.backward(p, at, [&](int64_t c) { return square.product(p.dots, p.padded, c); });
  if (p.norm_gradient) p.norm_gradient[number] = gradient;
}

// The same for same_grid: the pixel's coefficients take the place of its products.
template <class T, bool forward>
struct TilePixels {
  static constexpr bool kForward = forward;
  Pixels<T> p;

  __device__ T pixel(const Pixel& at, T squared, T* column) const {
    const PixelMask<T> mask(p, at, [&] { return squared; });
    T gradient = 0;
    if (!forward) gradient = mask.backward(p, at, [&](int64_t c) { return column[c * kTilePlane]; });
    for (int64_t c = 0; c < p.padded; ++c) column[c * kTilePlane] = T(0);
    if (mask.label >= 0)
      p.masks.template each<T>(mask.label, at.b, at.y, at.x,
                               [&](int64_t c, T m) { column[c * kTilePlane] = m * mask.value(); });
    return gradient;
  }
  __device__ void finish(double) const {}
};

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

// partial[b][chunk][c] = the masks' sums over a chunk of an image's label pixels. Labels come to shared memory, where
// threads take a class and every n-th of them; of soft masks all threads take one class after the other.
constexpr int kMassPixels = 4096;
constexpr int kMassTogether = 4;  // pixels of a thread whose loads are under way together

template <class T>
constexpr int64_t kMassShared = kMassTogether * kThreads * int64_t(sizeof(T) + sizeof(int32_t));

template <class T>
__global__ void __launch_bounds__(kThreads)
    masses(const __grid_constant__ Masks masks, int64_t H, int64_t W, int64_t chunks, double* partial) {
  constexpr int kStaged = kMassTogether * kThreads;
  PSSL_DYNAMIC_SHARED(T, weights);
  int32_t* labels = reinterpret_cast<int32_t*>(weights + kStaged);
  PSSL_SHARED(sums, double[kThreads]);
  const int64_t b = blockIdx.x / chunks, chunk = blockIdx.x % chunks, begin = chunk * kMassPixels;
  const int count = int(H * W - begin < kMassPixels ? H * W - begin : kMassPixels), thread = int(threadIdx.x);
  double* out = partial + blockIdx.x * masks.C;
  if (masks.is_soft) {
    for (int64_t c = 0; c < masks.C; ++c) {
      double sum = 0;
#pragma unroll 4
      for (int i = thread; i < count; i += kThreads) {
        const int64_t y = (begin + i) / W, x = (begin + i) % W;
        sum += double(masks.soft.floating<T>(b, c, y, x) * masks.template weight<T>(b, y, x));
      }
      sum = block_sum(sum, sums);
      if (thread == 0) out[c] = sum;
    }
    return;
  }
  const int across = masks.C < kThreads ? int(masks.C) : kThreads, parts = kThreads / across;
  const int part = thread / across;
  for (int64_t c0 = 0; c0 < masks.C; c0 += across) {
    const int64_t c = c0 + thread % across;
    double sum = 0;
    for (int first = 0; first < count; first += kStaged) {
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kMassTogether; ++k) {
        const int i = thread + k * kThreads;
        const int64_t pixel = begin + first + i, y = pixel / W, x = pixel % W;
        const bool inside = first + i < count;
        labels[i] = inside ? masks.label(b, y, x) : -1;
        weights[i] = inside ? masks.template weight<T>(b, y, x) : T(0);
      }
      __syncthreads();
      if (part >= parts) continue;
#pragma unroll 8
      for (int i = part; i < kStaged; i += parts)
        if (labels[i] == c) sum += double(weights[i]);
    }
    sums[thread] = sum;
    __syncthreads();
    if (part == 0 && c < masks.C) {
      for (int other = 1; other < parts; ++other) sum += sums[thread + other * across];
      out[c] = sum;
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

}  // namespace pool
}  // namespace pssl::PSSL_SIMD_NAMESPACE
