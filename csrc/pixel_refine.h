// Pixel-adaptive refinement: neighbours and what their colours and distances weigh, for host and device.
#pragma once

#include <algorithm>

#include "common/bilinear.h"
#include "common/types.h"

namespace pssl {

constexpr int kRefineDirections = 8;     // of each dilation
constexpr int kRefineChannels = 3;       // red, green, blue
constexpr double kRefineEpsilon = 1e-8;  // added to standard deviations, as PAR does

struct RefineOffset {
  int64_t dy, dx;
};

// Direction i as one of 3×3 cells, row by row with the middle one left out.
PSSL_HD inline int64_t refine_cell(int64_t i) { return i < kRefineDirections / 2 ? i : i + 1; }

// Neighbour n of a pixel, 8 for each dilation.
PSSL_HD inline RefineOffset refine_offset(int64_t n, const int64_t* dilations) {
  const int64_t d = dilations[n / kRefineDirections], cell = refine_cell(n % kRefineDirections);
  return {(cell / 3 - 1) * d, (cell % 3 - 1) * d};
}

// What a channel's colour difference is multiplied by, from the sum of squares about the mean of n neighbours.
template <class T>
PSSL_HD inline T refine_colour_factor(T squares, int64_t n, T scale) {
  return T(1) / ((std::sqrt(squares / T(n - 1)) + T(kRefineEpsilon)) * scale);
}

// weight * softmax over the N = 8 * count neighbours of -(r / (std(r) + epsilon) / scale)^2, r the distance.
inline void refine_position_affinities(const int64_t* dilations, int64_t count, double scale, double weight,
                                       double* out) {
  const int64_t N = kRefineDirections * count;
  double mean = 0, squares = 0, nearest = 0, total = 0;
  for (int64_t n = 0; n < N; ++n) {
    const RefineOffset o = refine_offset(n, dilations);
    out[n] = std::sqrt(double(o.dy) * double(o.dy) + double(o.dx) * double(o.dx));
    mean += out[n] / double(N);
  }
  for (int64_t n = 0; n < N; ++n) squares += (out[n] - mean) * (out[n] - mean);
  const double factor = refine_colour_factor(squares, N, scale);
  for (int64_t n = 0; n < N; ++n) {
    out[n] = (out[n] * factor) * (out[n] * factor);
    if (n == 0 || out[n] < nearest) nearest = out[n];
  }
  for (int64_t n = 0; n < N; ++n) total += out[n] = std::exp(nearest - out[n]);
  for (int64_t n = 0; n < N; ++n) out[n] *= weight / total;
}

}  // namespace pssl

namespace pssl::PSSL_SIMD_NAMESPACE {

// In what follows V is a number or a vector of them.

template <class V, class T>
PSSL_HD inline V refine_blend(V a, V b, T t) {
  return (T(1) - t) * a + t * b;
}

// The sum of squares about the mean over all neighbours, from difference(dilation, direction): neighbour less pixel, so that
// it is exactly 0 where all colours are equal. Sums are taken dilation by dilation, which rounds less than one sum
// of all.
template <class T, class V, class F>
PSSL_HD inline V refine_squares(int64_t dilations, const F& difference) {
  V mean = {};
  for (int64_t j = 0; j < dilations; ++j) {
    V sum = {};
    for (int i = 0; i < kRefineDirections; ++i) sum += difference(j, i);
    mean += sum;
  }
  mean *= T(1.0 / double(kRefineDirections * dilations));
  V squares = {};
  for (int64_t j = 0; j < dilations; ++j) {
    V sum = {};
    for (int i = 0; i < kRefineDirections; ++i) {
      const V d = difference(j, i) - mean;
      sum += d * d;
    }
    squares += sum;
  }
  return squares;
}

// A neighbour's logit of the colour affinity, from difference(channel).
template <class T, class V, class F>
PSSL_HD inline V refine_logit(const V* factor, const F& difference) {
  V sum = {};
  for (int c = 0; c < kRefineChannels; ++c) {
    const V scaled = difference(c) * factor[c];
    sum += scaled * scaled;
  }
  return sum * T(-1.0 / kRefineChannels);
}

inline void check_refine(const char* op, const Tensor& images, const Tensor& masks,
                         const std::vector<int64_t>& dilations, int64_t iterations, double colour_scale) {
  STD_TORCH_CHECK(
      images.dim() == 4 && images.size(1) == kRefineChannels && images.size(2) > 0 && images.size(3) > 0, op,
      ": images must be [B,3,H,W]");
  STD_TORCH_CHECK(
      masks.dim() == 4 && masks.size(0) == images.size(0) && masks.size(2) > 0 && masks.size(3) > 0, op,
      ": masks must be [B,k,h,w]");
  STD_TORCH_CHECK(!dilations.empty() && *std::min_element(dilations.begin(), dilations.end()) >= 1, op,
                  ": dilations must be at least 1");
  STD_TORCH_CHECK(iterations >= 1 && colour_scale > 0, op,
                  ": iterations must be at least 1 and colour_scale greater than 0");
}

}  // namespace pssl::PSSL_SIMD_NAMESPACE
