// What pixels are compared by, and the permutohedral lattice (Adams, Baek, Davis 2010): where a point lies in it, for host
// and device.
//
// A point of d dimensions is scaled and turned into the hyperplane sum_i e_i = 0 of d+1 dimensions. The lattice's
// vertices there are the integer points with equal remainders modulo d+1; they cut the plane into simplices, one vertex
// of each remainder 0..d. A point's simplex is given by the nearest vertex of remainder 0 and by the order of the
// point's differences from it, its weights by these differences sorted.
#pragma once

#include <cmath>
#include <cstdint>
#include <sstream>
#include <stdexcept>

#include "common/bilinear.h"
#include "common/types.h"

namespace pssl::PSSL_SIMD_NAMESPACE {

constexpr double kLowestProbability = 1e-5;  // as in the reference

struct CrfSettings {
  int64_t iterations;
  double gaussian_sxy, gaussian_compat, bilateral_sxy, bilateral_srgb, bilateral_compat;

  bool has_gaussian() const { return gaussian_compat != 0 && iterations > 0; }
  bool has_bilateral() const { return bilateral_compat != 0 && iterations > 0; }
};

// What pixels are compared by: position over sxy, and where d is 5 colour over srgb.
template <int d>
struct PixelFeatures {
  double sxy, srgb = 1;

  PSSL_HD void largest(int64_t H, int64_t W, double* out) const {
    out[0] = double(W - 1) / sxy, out[1] = double(H - 1) / sxy;
    for (int k = 2; k < d; ++k) out[k] = 255 / srgb;
  }
  // `colour(k)` is the pixel's channel k
  template <class Colour>
  PSSL_HD void at(int64_t y, int64_t x, const Colour& colour, double* out) const {
    out[0] = double(x) / sxy, out[1] = double(y) / sxy;
    for (int k = 2; k < d; ++k) out[k] = colour(k - 2) / srgb;
  }
};

// Added to every feature. Many pixels lie on the border of simplices (the column x = 0 on that of two); by rounding alone
// they would fall to either, and bring another vertex into being, differently for each processor. This moves them to one
// side, by more than double's rounding and less than shows.
constexpr double kOffBorders = 1e-6;

// How points become vertices, and vertices numbers. Positions are computed in double whatever the type of the values,
// so that every type has the same vertices: whether a vertex exists has a say in the blur, and no tolerance.
template <int d>
struct LatticeMap {
  double scale[d];     // of each feature, for a blur of standard deviation 1
  int64_t stride[d];   // vertex v has the key sum_i v_i stride_i; the last coordinate follows from the others
  int64_t to_next[d];  // key step along direction j = (1, .., 1) - (d+1) unit_j, 0 <= j < d ..
  int64_t to_last;     // .. and for j = d
  double points;       // in the range of the keys

  // Whether the keys are distinct; where not, nothing else here is set.
  PSSL_HD bool is_sound() const { return points < 4611686018427387904.0; }
  PSSL_HD int64_t step(int j) const { return j < d ? to_next[j] : to_last; }
  // Keys differ by less than `points`: their lowest bits tell them apart.
  int key_bits() const {
    int bits = 1;
    while (double(int64_t(1) << bits) < points) ++bits;
    return bits;
  }

  // For features in [0, largest_k].
  PSSL_HD static LatticeMap make(const double* largest) {
    LatticeMap map;
    double above[d + 1];  // the sum of the largest scaled features i..d-1
    above[d] = 0;
    for (int k = d - 1; k >= 0; --k) {
      // a splat, a blur and a slice spread by (d+1)^2 * 2/3 along each axis of the plane
      map.scale[k] = (d + 1) * std::sqrt(2.0 / 3.0) / std::sqrt(double((k + 1) * (k + 2)));
      above[k] = above[k + 1] + largest[k] * map.scale[k];
    }
    map.points = 1;
    int64_t stride = 1, sum = 0;
    for (int i = 0; i < d; ++i) {
      map.stride[i] = stride;
      sum += stride;
      const double below = i > 0 ? i * largest[i - 1] * map.scale[i - 1] : 0.0;
      // a vertex of the simplex is less than d+1 away from its point, a neighbour as much again, on either side
      const double range = std::ceil(above[i] + below) + 4 * (d + 1) + 1;
      map.points *= range;
      if (!map.is_sound()) return map;
      stride *= int64_t(range);
    }
    for (int j = 0; j < d; ++j) map.to_next[j] = sum - (d + 1) * map.stride[j];
    map.to_last = sum;
    return map;
  }
};

// The map of an image's pixels; an error where its keys would not be distinct.
template <int d>
LatticeMap<d> lattice_of(const char* op, const char* argument, const PixelFeatures<d>& features, int64_t H,
                         int64_t W) {
  double largest[d];
  features.largest(H, W, largest);
  const LatticeMap<d> map = LatticeMap<d>::make(largest);
  if (map.is_sound()) return map;
  std::ostringstream text;
  text << op << ": " << argument
       << " must be standard deviations that cut the image into less than 2^62 lattice cells, got smaller "
          "ones";
  throw std::invalid_argument(text.str());
}

// A vertex blurred along one direction, from itself and the sum of its two neighbours; one that does not exist counts
// as 0. The factor that keeps the sum, 1/2, would cancel in the normalisation. V is a number or a vector of them.
template <class T, class V>
PSSL_HD inline V lattice_blur(V here, V neighbours) {
  return here + T(0.5) * neighbours;
}

template <int d>
struct Simplex {
  int64_t key[d + 1];  // of the vertices of remainder 0..d
  double weight[d + 1];
};

template <int d>
PSSL_HD inline Simplex<d> find_simplex(const LatticeMap<d>& map, const double* feature) {
  // The turn: e_i = (sum of the scaled features i..d-1) - i * (scaled feature i-1).
  double e[d + 1], sum = 0;
  for (int i = d; i > 0; --i) {
    const double f = (feature[i - 1] + kOffBorders) * map.scale[i - 1];
    e[i] = sum - i * f;
    sum += f;
  }
  e[0] = sum;
  // The multiples of d+1 nearest to each coordinate; by how many they miss the plane is mended below.
  int64_t q[d + 1], excess = 0;
  for (int i = 0; i <= d; ++i) {
    q[i] = int64_t(std::floor(e[i] * (1.0 / (d + 1)) + 0.5));
    e[i] -= q[i] * double(d + 1);
    excess += q[i];
  }
  // rank_i: how many coordinates have a larger difference (of equal ones the earlier counts as larger)
  int64_t rank[d + 1] = {};
  for (int i = 0; i < d; ++i)
    for (int j = i + 1; j <= d; ++j) {
      const int less = e[i] < e[j];
      rank[i] += less;
      rank[j] += 1 - less;
    }
  // Above the plane the coordinates with the smallest differences go one multiple down, below it those with the largest
  // go up; either way the order turns round by as many places.
  for (int i = 0; i <= d; ++i) {
    rank[i] += excess;
    const int64_t turn = rank[i] > d ? -1 : rank[i] < 0 ? 1 : 0;
    rank[i] += turn * (d + 1);
    q[i] += turn;
    e[i] -= turn * double(d + 1);
  }
  double sorted[d + 1];
  int64_t by_rank[d + 1], key = 0;
  for (int i = 0; i <= d; ++i) sorted[rank[i]] = e[i];
  for (int i = 0; i <= d; ++i) by_rank[rank[i]] = i < d ? map.stride[i] : 0;
  for (int i = 0; i < d; ++i) key += q[i] * int64_t(d + 1) * map.stride[i];
  // Vertex k is vertex k-1 plus 1 everywhere, less d+1 in the coordinate of rank d+1-k.
  Simplex<d> simplex;
  for (int k = 0; k <= d; ++k) {
    if (k > 0) key += map.to_last - (d + 1) * by_rank[d + 1 - k];
    simplex.key[k] = key;
    const double gap = k > 0 ? sorted[d - k] - sorted[d + 1 - k] : sorted[d] - sorted[0] + (d + 1);
    simplex.weight[k] = gap * (1.0 / (d + 1));
  }
  return simplex;
}

inline void check_crf(const char* op, const Tensor& images, const Tensor& probabilities) {
  STD_TORCH_CHECK(probabilities.dim() == 4, op, ": probabilities must be [B,C,H,W]");
  STD_TORCH_CHECK(images.dim() == 4 && images.size(0) == probabilities.size(0) && images.size(1) == 3 &&
                      images.size(2) == probabilities.size(2) && images.size(3) == probabilities.size(3) &&
                      images.scalar_type() == ScalarType::Byte,
                  op, ": images must be uint8 [B,3,H,W]");
}

}  // namespace pssl::PSSL_SIMD_NAMESPACE
