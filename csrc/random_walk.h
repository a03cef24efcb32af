// The random walk on the pixel grid: which cells are neighbours, what lies between them, and one step's weights, for
// host and device.
#pragma once

#include "common/bilinear.h"

namespace pssl {

// Neighbours are less than `radius` apart. Affinities are symmetric, so of an offset and its opposite only the one that
// points ahead in reading order is kept.
PSSL_HD inline bool is_walk_offset(int64_t dy, int64_t dx, int64_t radius) {
  return (dy > 0 || (dy == 0 && dx > 0)) && dy * dy + dx * dx < radius * radius;
}

// Whether (y,x), a cell of the box spanned by (0,0) and (dy,dx), is less than 1 away from the line through the two.
// The square of the distance is cross^2 / (dy^2 + dx^2): compared in integers.
PSSL_HD inline bool is_on_walk_path(int64_t dy, int64_t dx, int64_t y, int64_t x) {
  const int64_t cross = dy * x - dx * y;
  return cross * cross < dy * dy + dx * dx;
}

// AffinityNet's radius on a map smaller than 2 * radius + 1.
PSSL_HD inline int64_t shrunk_radius(int64_t radius, int64_t h, int64_t w) {
  const int64_t shorter = h < w ? h : w;
  return shorter < 2 * radius + 1 ? (shorter - 1) / 2 : radius;
}

// How freely a cell is entered, (1 - edge)^beta. The power grows with its base, so the affinity of a pair,
// (1 - largest edge on the path)^beta, is the least of these on the path: one power a cell instead of one a pair. In
// double, since the power multiplies the rounding of 1 - edge by beta, and hundreds of steps add it up.
PSSL_HD inline double walk_openness(double edge, double beta) { return std::pow(1 - edge, beta); }

// One step is x_j + scale_j * sum_i a_ij (x_i - x_j), the same as the weighted mean of all x_i with 1 for the cell itself:
// rounding is then relative to what a step changes, not to the values, and equal values stay exactly equal.
PSSL_HD inline double walk_scale(double affinity_sum) {  // over the neighbours, the cell itself left out
  return 1 / (1 + affinity_sum);
}

}  // namespace pssl
