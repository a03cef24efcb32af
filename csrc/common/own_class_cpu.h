// Products of a tile's pixels with the class that each belongs to. Where labels are hard, a pixel's masks of all other
// classes are 0, and a product with every class is mostly work for nothing. Here a vector of pixels is worked off once
// for each class that occurs in it: once inside a region, a few times across its edges.
//
//   sums:      s[c][d] += sum_{p of c} f[d][p] w[p]
//   dots:      t[p]  = <f(p), q[label(p)]>
//   gradient:  o[d][p] = a[p] q[label(p)][d] + b[p] f[d][p]
//
// Features and weights are masked by their bits, not multiplied by 0: NaN stays with the pixel's own class, or with none.
#pragma once

#include "common/tile_cpu.h"

namespace pssl::PSSL_SIMD_NAMESPACE {

template <class T>
class OwnClasses {
 public:
  // Room for tiles of `pixels` pixels.
  OwnClasses(int64_t pixels, int64_t C) : first_(round_up(pixels, kLanes<T>) / kLanes<T> + 1), last_(C) {}

  // The labels of a tile's n pixels, -1 for none.
  void find(const int64_t* labels, int64_t n) {
    n_ = n, padded_ = round_up(n, kLanes<T>);
    parts_.clear();
    heads_.clear();
    std::fill(last_.begin(), last_.end(), int64_t(-1));
    for (int64_t p = 0; p < padded_; p += kLanes<T>) {
      const int64_t first = int64_t(parts_.size());
      first_[p / kLanes<T>] = first;
      for (int64_t i = 0; i < std::min<int64_t>(kLanes<T>, n - p); ++i)
        if (labels[p + i] >= 0) parts_[part_of(labels[p + i], p, first)].pixels[i] = -1;
    }
    first_[padded_ / kLanes<T>] = int64_t(parts_.size());
  }

  // s[c][d] += sum of f[d][p] w[p] over the pixels p of class c; s is [C][D].
  PSSL_NOINLINE void add_sums(const T* f, int64_t ld, int64_t D, const T* w, T* s) const {
    rows_of(D, [&](auto rows, int64_t d) {
      constexpr int N = decltype(rows)::value;
      for (const int64_t head : heads_) {
        const int64_t label = parts_[head].label;
        Vec<T> sum[N] = {};
        for (int64_t k = head; k >= 0; k = parts_[k].next) {
          const Part& part = parts_[k];
          const Vec<T> weight = keep<T>(load<T>(w + part.p), part.pixels);
#pragma GCC unroll 8
          for (int i = 0; i < N; ++i)
            sum[i] += keep<T>(load<T>(f + (d + i) * ld + part.p), part.pixels) * weight;
        }
        T sums[N];
        lane_sums<T, N>(sum, sums);
        for (int i = 0; i < N; ++i) s[label * D + d + i] += sums[i];
      }
    });
  }

  // dots[p] += <f(p), q[label(p)]> for all pixels; q's rows are ldq apart.
  PSSL_NOINLINE void add_dots(const T* f, int64_t ld, int64_t D, const T* q, int64_t ldq, T* dots) const {
    rows_of(D, [&](auto rows, int64_t d) {
      constexpr int N = decltype(rows)::value;
      for (int64_t p = 0; p < padded_; p += kLanes<T>) {
        Vec<T> own[N];
        vectors<N>(p, q + d, ldq, own);
        Vec<T> dot = load<T>(dots + p);
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) dot += load<T>(f + (d + i) * ld + p) * own[i];
        store<T>(dots + p, dot);
      }
    });
  }

  // o[d][p] = a[p] q[label(p)][d] + b[p] f[d][p], without f where b[p] is 0; o's rows are ldo apart.
  PSSL_NOINLINE void gradient(const T* f, int64_t ld, int64_t D, const T* q, int64_t ldq, const T* a,
                              const T* b, T* o, int64_t ldo) const {
    rows_of(D, [&](auto rows, int64_t d) {
      constexpr int N = decltype(rows)::value;
      for (int64_t p = 0; p < padded_; p += kLanes<T>) {
        Vec<T> own[N];
        vectors<N>(p, q + d, ldq, own);
        const Vec<T> along = load<T>(a + p), back = load<T>(b + p);
        const Lanes<T> any = back != T(0);
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i)
          store_part<T>(o + (d + i) * ldo + p,
                        along * own[i] + back * keep<T>(load<T>(f + (d + i) * ld + p), any), n_ - p);
      }
    });
  }

 private:
  // The pixels of one class within the vector that begins at p: -1 in their lanes.
  struct Part {
    Lanes<T> pixels;
    int64_t p, label, next;  // next: the class's part in a later vector, or -1
  };

  // The part of the class in the vector at p, whose parts begin with `first`; a new one if there is none yet.
  int64_t part_of(int64_t label, int64_t p, int64_t first) {
    const int64_t count = int64_t(parts_.size());
    for (int64_t k = count; k > first; --k)
      if (parts_[k - 1].label == label) return k - 1;
    if (last_[label] < 0) {
      heads_.push_back(count);
    } else {
      parts_[last_[label]].next = count;
    }
    last_[label] = count;
    parts_.push_back(Part{Lanes<T>{}, p, label, -1});
    return count;
  }

  template <class Rows>
  static void rows_of(int64_t D, const Rows& rows) {
    constexpr int N = 8;
    int64_t d = 0;
    for (; d + N <= D; d += N) rows(std::integral_constant<int, N>{}, d);
    for (; d < D; ++d) rows(std::integral_constant<int, 1>{}, d);
  }

  // own[i] = q[label][i] in the lanes of the vector that begins at p; q's rows are ldq apart.
  template <int N>
  void vectors(int64_t p, const T* q, int64_t ldq, Vec<T>* own) const {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) own[i] = Vec<T>{};
    for (int64_t k = first_[p / kLanes<T>]; k < first_[p / kLanes<T> + 1]; ++k) {
      const Part& part = parts_[k];
      const T* row = q + part.label * ldq;
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) own[i] = part.pixels ? splat<T>(row[i]) : own[i];
    }
  }

  int64_t n_ = 0, padded_ = 0;
  std::vector<Part> parts_;     // in the order of the pixels
  std::vector<int64_t> heads_;  // the first part of each class that occurs
  Buffer<int64_t> first_;       // [vectors + 1] the first part of each vector
  std::vector<int64_t> last_;   // [C] the last part of each class so far, -1 for none
};

}  // namespace pssl::PSSL_SIMD_NAMESPACE
