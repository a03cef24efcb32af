// Bilinear resizing and the squared norm of a bilinearly resized feature, for host and device.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define PSSL_HD __host__ __device__
#else
#define PSSL_HD
#endif

namespace pssl {

// Output pixel = (1 - fraction) * input[index] + fraction * input[index + 1]; fraction is 0 at the last input.
struct AxisWeight {
  int64_t index;
  double fraction;
};

// The weights of F.interpolate(mode="bilinear") along one axis. Computed in double: the source coordinate's rounding
// error would otherwise grow with the size of the axis.
PSSL_HD inline AxisWeight axis_weight(int64_t out, int64_t in_size, int64_t out_size, bool align_corners) {
  double source;
  if (align_corners) {
    source = out_size > 1 ? double(out) * double(in_size - 1) / double(out_size - 1) : 0.0;
  } else {
    source = (double(out) + 0.5) * double(in_size) / double(out_size) - 0.5;
    if (source < 0) source = 0;
  }
  int64_t index = int64_t(source);
  if (index >= in_size - 1) return {in_size - 1, 0.0};
  return {index, source - double(index)};
}

// The first output whose index is at least `index`; out_size where there is none. Indices never decrease.
PSSL_HD inline int64_t first_output(int64_t index, int64_t in_size, int64_t out_size, bool align_corners) {
  int64_t begin = 0, end = out_size;
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (axis_weight(middle, in_size, out_size, align_corners).index < index) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// a for t = 0, b for t = 1. The same bits wherever it is compiled: there is nothing that a compiler may contract.
template <class T>
PSSL_HD inline T blend(T a, T b, T t) {
  return std::fma(t, b - a, a);
}

// Identity 1. For two features f0, f1 with squared norms a0, a1 and inner product r,
// |(1-t) f0 + t f1|^2 = (1-t)^2 a0 + t^2 a1 + 2 t (1-t) r. Applied along y to each column (a: norms, r: lower
// neighbour) and then along x it gives the squared norm between four cells from five maps on the feature grid.
template <class T>
PSSL_HD inline T blend_squared(T a0, T a1, T r, T t) {
  T s = T(1) - t;
  return s * s * a0 + t * t * a1 + T(2) * s * t * r;
}

// The inner product of the two columns' features after blending both along y: right neighbours above and below, and
// the two diagonals of the four cells.
template <class T>
PSSL_HD inline T blend_product(T right0, T right1, T diagonals, T t) {
  T s = T(1) - t;
  return s * s * right0 + t * t * right1 + s * t * diagonals;
}

// The derivatives of blend_squared by a0, a1 and r.
template <class T>
struct SquareWeights {
  T first, second, product;

  PSSL_HD explicit SquareWeights(T t)
      : first((T(1) - t) * (T(1) - t)), second(t * t), product(T(2) * (T(1) - t) * t) {}
};

// 1 / sqrt(squared), and 0 for a feature that counts as zero. Gram maps can round to a negative square: zero as well.
template <class T>
PSSL_HD inline T inverse_norm(T squared, T eps) {
  return squared > eps * eps ? T(1) / std::sqrt(squared) : T(0);
}

// d loss / d |F|^2, for a loss that depends on |F| through u = y / |F| with sum_c (d loss / d u_c) u_c = s:
// d(1/|F|) / d|F|^2 = -1 / (2 |F|^3).
template <class T>
PSSL_HD inline T squared_norm_gradient(T inverse, T s) {
  return T(-0.5) * inverse * inverse * s;
}

}  // namespace pssl
