// Products of pixels with the class that each belongs to. Where labels are hard, a pixel's masks of all other classes are 0,
// and a product with every class is mostly work for nothing. Here a vector of pixels takes the vectors of two classes, which
// is enough for nearly all, since regions are areas: without a branch that the processor would have to guess at each edge.
//
//   sums:      s[c][d] += sum_{p of c} f[d][p] w[p]
//   dots:      t[p] += <f(p), q[label(p)]>,  squares[p] += |f(p)|^2
//   gradient:  o[d][p] = a[p] q[label(p)][d] + b[p] f[d][p]
//
// Features are masked by their bits, not multiplied by 0: NaN stays with the pixel's own class, or with none.
#pragma once

#include "common/channel_blocks_cpu.h"

namespace pssl::PSSL_SIMD_NAMESPACE {

template <class T>
class OwnClasses {
 public:
  // Room for tiles of `pixels` pixels.
  OwnClasses(int64_t pixels, int64_t C)
      : labels_(round_up(pixels, kLanes<T>)), vectors_(round_up(pixels, kLanes<T>) / kLanes<T>), places_(C) {}

  // The labels of a tile's n pixels, -1 for those that do not count.
  void find(const int64_t* labels, int64_t n) {
    n_ = n;
    const int64_t padded = round_up(n, kLanes<T>);
    for (int64_t p = 0; p < n; ++p) labels_[p] = BitsOf<T>(labels[p]);
    std::fill(&labels_[n], &labels_[padded], BitsOf<T>(-1));
    for (const BitsOf<T> label : present_) places_[label].clear();
    present_.clear();
    others_.clear();
    for (int64_t p = 0; p < padded; p += kLanes<T>) {
      Vector v{0, 0, int64_t(others_.size()), 0};
      int64_t count = 0;
      for (int64_t i = 0; i < kLanes<T>; ++i) {
        const BitsOf<T> label = labels_[p + i];
        if (label < 0 || (count > 0 && label == v.one) || (count > 1 && label == v.other)) continue;
        if (count > 2 && std::find(others_.begin() + v.first, others_.end(), label) != others_.end())
          continue;
        if (count == 0) v.one = label;
        if (count <= 1) v.other = label;
        if (count > 1) others_.push_back(label);
        ++count;
        if (places_[label].empty()) present_.push_back(label);
        places_[label].push_back(p);
      }
      v.last = int64_t(others_.size());
      vectors_[p / kLanes<T>] = v;
    }
  }

  // s[c][d] += sum of f[d][p] w[p] over the pixels p of class c; s is [C][D].
  void add_sums(const T* f, int64_t ld, int64_t D, const T* w, T* s) const {
    for_channel_blocks(D, [&](auto rows, int64_t d) {
      constexpr int N = decltype(rows)::value;
      add_row_sums<N>(f + d * ld, ld, f + std::min(d + N, D - N) * ld, D, w, s + d);
    });
  }

  // dots and squares of all pixels, those that do not count with any value; q's rows are ldq apart.
  void add_dots(const T* f, int64_t ld, int64_t D, const T* q, int64_t ldq, T* dots, T* squares) const {
    for_channel_blocks(D, [&](auto rows, int64_t d) {
      constexpr int N = decltype(rows)::value;
      add_row_dots<N>(f + d * ld, ld, f + std::min(d + N, D - N) * ld, q + d, ldq, dots, squares);
    });
  }

  // o[d][p] for all pixels; without b, nothing is added to the first product. o's rows are ldo apart.
  void gradient(const T* f, int64_t ld, int64_t D, const T* q, int64_t ldq, const T* a, const T* b, T* o,
                int64_t ldo) const {
    for_channel_blocks(D, [&](auto rows, int64_t d) {
      constexpr int N = decltype(rows)::value;
      if (b) {
        row_gradients<N>(q + d, ldq, a, o + d * ldo, ldo, [b, ld, own = f + d * ld](int64_t p, Vec<T>* out) {
          const Vec<T> back = load<T>(b + p);
#pragma GCC unroll 4
          for (int i = 0; i < N; ++i) out[i] += back * load<T>(own + i * ld + p);
        });
      } else {
        row_gradients<N>(q + d, ldq, a, o + d * ldo, ldo, [](int64_t, Vec<T>*) {});
      }
    });
  }

 private:
  // The classes of the pixels of a vector: two, which may be the same, and others_[first, last).
  struct Vector {
    BitsOf<T> one, other;
    int64_t first, last;
  };

  // The steps on N rows. What their loops use lies in variables of their own: as far as the compiler knows, anything else
  // could change with each vector that is stored. `next` are the rows to ask for ahead of time.

  // Class by class, with the sums in registers.
  template <int N>
  PSSL_NOINLINE void add_row_sums(const T* f, int64_t ld, const T* next, int64_t D, const T* w, T* s) const {
    const BitsOf<T>* const labels = labels_.get();
    for (const BitsOf<T> label : present_) {
      Vec<T> sum[N];
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) sum[i] = Vec<T>{};
      const std::vector<int64_t>& places = places_[label];
      for (const int64_t *place = places.data(), *end = place + places.size(); place != end; ++place) {
        const int64_t p = *place;
        const Lanes<T> pixels = load_lanes<T>(labels + p) == label;
        const Vec<T> weight = load<T>(w + p);
#pragma GCC unroll 4
        for (int i = 0; i < N; ++i) {
          sum[i] += keep<T>(load<T>(f + i * ld + p), pixels) * weight;
          __builtin_prefetch(next + i * ld + p);
        }
      }
      T sums[N];
      lane_sums<T, N>(sum, sums);
      for (int i = 0; i < N; ++i) s[label * D + i] += sums[i];
    }
  }

  template <int N>
  PSSL_NOINLINE void add_row_dots(const T* f, int64_t ld, const T* next, const T* q, int64_t ldq, T* dots,
                                  T* squares) const {
    each_vector<N>(0, round_up(n_, kLanes<T>), q, ldq, [=](int64_t p, Lanes<T>, const Vec<T>* own) {
      Vec<T> dot = load<T>(dots + p), square = load<T>(squares + p);
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) {
        const Vec<T> x = load<T>(f + i * ld + p);
        __builtin_prefetch(next + i * ld + p);
        dot += x * own[i];
        square += x * x;
      }
      store<T>(dots + p, dot);
      store<T>(squares + p, square);
    });
  }

  // add(p, out) adds to the N vectors at p
  template <int N, class Add>
  PSSL_NOINLINE void row_gradients(const T* q, int64_t ldq, const T* a, T* o, int64_t ldo,
                                   const Add add) const {
    auto at = [=](int64_t p, Lanes<T> labels, const Vec<T>* own, Vec<T>* out) {
      const Vec<T> along = load<T>(a + p);
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) out[i] = along * own[i];
      add(p, out);
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) out[i] = keep<T>(out[i], labels >= 0);
    };
    const int64_t n = n_, whole = n / kLanes<T> * kLanes<T>;
    each_vector<N>(0, whole, q, ldq, [=](int64_t p, Lanes<T> labels, const Vec<T>* own) {
      Vec<T> out[N];
      at(p, labels, own, out);
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) store<T>(o + i * ldo + p, out[i]);
    });
    each_vector<N>(whole, n, q, ldq, [=](int64_t p, Lanes<T> labels, const Vec<T>* own) {
      Vec<T> out[N];
      at(p, labels, own, out);
      for (int i = 0; i < N; ++i) store_part<T>(o + i * ldo + p, out[i], n - p);
    });
  }

  // f(p, labels, own) for the vectors at p of [begin, end) with own[i] = q[label][i]; q's rows are ldq apart.
  template <int N, class F>
  void each_vector(int64_t begin, int64_t end, const T* q, int64_t ldq, const F f) const {
    const BitsOf<T>* const labels = labels_.get();
    const Vector* v = vectors_.data() + begin / kLanes<T>;
    for (int64_t p = begin; p < end; p += kLanes<T>, ++v) {
      const Lanes<T> label = load_lanes<T>(labels + p);
      const T *one = q + v->one * ldq, *other = q + v->other * ldq;
      Vec<T> own[N];
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) own[i] = label == v->one ? splat<T>(one[i]) : splat<T>(other[i]);
      for (int64_t k = v->first; k < v->last; ++k)
#pragma GCC unroll 4
        for (int i = 0; i < N; ++i) own[i] = label == others_[k] ? splat<T>(q[others_[k] * ldq + i]) : own[i];
      f(p, label, own);
    }
  }

  int64_t n_ = 0;
  Buffer<BitsOf<T>> labels_;                  // of the tile's pixels and, to the end of the last vector, -1
  std::vector<Vector> vectors_;               // in the order of the pixels
  std::vector<BitsOf<T>> others_;             // classes behind the second of a vector
  std::vector<BitsOf<T>> present_;            // the tile's classes
  std::vector<std::vector<int64_t>> places_;  // [C] where vectors begin in which each one occurs
};

}  // namespace pssl::PSSL_SIMD_NAMESPACE
