// Pixel-adaptive refinement: neighbours and what their colours and distances weigh, for host and device.
#pragma once

#include "common/bilinear.h"

namespace pssl {

constexpr int kRefineDirections = 8;     // of each dilation
constexpr int kRefineChannels = 3;       // red, green, blue
constexpr double kRefineEpsilon = 1e-8;  // added to standard deviations, as PAR does

struct RefineOffset {
  int64_t dy, dx;
};

// Neighbour n of a pixel, 8 for each dilation.
PSSL_HD inline RefineOffset refine_offset(int64_t n, const int64_t* dilations) {
  const int64_t d = dilations[n / kRefineDirections], i = n % kRefineDirections;
  const int64_t cell = i < 4 ? i : i + 1;  // of 3×3 cells, the middle one left out
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
