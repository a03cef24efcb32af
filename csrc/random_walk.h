// The random walk on the pixel grid: which cells are neighbours, what lies between them, one step's weights, and where
// cells lie in memory, for host and device.
#pragma once

#include <algorithm>
#include <vector>

#include "common/bilinear.h"
#include "common/types.h"

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

// The affinity of two features is exp(this * sum over channels of |f_i - f_j|).
PSSL_HD inline double walk_feature_exponent(double beta, int64_t channels) {
  return -beta / double(channels);
}

// One step is x_j + scale_j * sum_i a_ij (x_i - x_j), the same as the weighted mean of all x_i with 1 for the cell itself:
// rounding is then relative to what a step changes, not to the values, and equal values stay exactly equal.
PSSL_HD inline double walk_scale(double affinity_sum) {  // over the neighbours, the cell itself left out
  return 1 / (1 + affinity_sum);
}

}  // namespace pssl

namespace pssl::PSSL_SIMD_NAMESPACE {

// What a neighbour adds to that sum; V is a number or a vector of them, A too or a number.
template <class A, class V>
PSSL_HD inline V walk_change(A affinity, V neighbour, V here) {
  return affinity * (neighbour - here);
}

struct WalkOffset {
  int64_t dy, dx, distance;  // distance: in cells of the run
};

// Where the cells of an h×w map lie in memory: one run, its rows `ld` apart with cells of value 0 between them, wide enough
// that an offset never reaches the next row's cells: a neighbour is a fixed distance away, at most `reach`, and what
// lies outside the map needs no question.
struct WalkRun {
  int64_t h, w, ld, reach;
  std::vector<WalkOffset> offsets;  // that point ahead

  WalkRun(int64_t h, int64_t w, int64_t radius) : h(h), w(w) {
    int64_t down = 0, side = 0;
    // on a map smaller than the radius no pair has the longer offsets
    for (int64_t dy = 0; dy < std::min(radius, h); ++dy)
      for (int64_t dx = -std::min(radius, w) + 1; dx < std::min(radius, w); ++dx)
        if (is_walk_offset(dy, dx, radius)) {
          offsets.push_back({dy, dx, 0});
          down = std::max(down, dy), side = std::max(side, dx < 0 ? -dx : dx);
        }
    ld = w + side;
    for (WalkOffset& o : offsets) o.distance = o.dy * ld + o.dx;
    reach = down * ld + side;
  }
};

inline void check_walk(const char* op, const Tensor& cams, const std::optional<Tensor>& edge,
                       const std::optional<Tensor>& features, int64_t radius, double beta,
                       int64_t log2_steps) {
  STD_TORCH_CHECK(cams.dim() == 3, op, ": cams must be [k,h,w]");
  STD_TORCH_CHECK(edge.has_value() != features.has_value(), op, ": edge must be given, or else features");
  STD_TORCH_CHECK(
      !edge || (edge->dim() == 2 && edge->size(0) == cams.size(1) && edge->size(1) == cams.size(2)), op,
      ": edge must be [h,w]");
  STD_TORCH_CHECK(!features || (features->dim() == 3 && features->size(0) >= 1 &&
                                features->size(1) == cams.size(1) && features->size(2) == cams.size(2)),
                  op, ": features must be [D,h,w]");
  STD_TORCH_CHECK(radius >= 1 && beta > 0 && log2_steps >= 0 && log2_steps <= 30, op,
                  ": radius must be at least 1, beta greater than 0, log2_steps in 0..30");
}

}  // namespace pssl::PSSL_SIMD_NAMESPACE
