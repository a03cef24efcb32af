// Identity 1 on the CPU: quantities of the label grid from maps on the feature grid, and the way back.
//
//   CellMaps     products of the features with the class vectors and with their neighbours, one pass over D
//   RowBlend     these maps blended along y for one label row; blending along x happens per label pixel
//   CellAdjoint  gradients with respect to the maps, gathered over the label pixels that touch a cell
//
// Label rows are worked off by the feature row above them, `y.index`: every label row belongs to one task, which adds
// to two feature rows, kept apart as `upper` and `lower` until all are done. So no two threads write one number, and
// the order of additions does not depend on the threads.
#pragma once

#include "common/axis_cpu.h"
#include "common/tile_cpu.h"

namespace pssl::PSSL_SIMD_NAMESPACE {

// The five products of identity 1: with itself, the right and the lower neighbour, and the sum of the two diagonals of
// the square whose upper left corner the cell is.
template <class T>
struct GramMaps {
  Buffer<T> self, right, lower, diagonals;  // [B,h,w], or with longer rows

  void reset(int64_t cells, bool zeroed = false) {
    for (Buffer<T>* m : {&self, &right, &lower, &diagonals}) m->reset(cells, zeroed);
  }
};

template <class T>
struct CellMaps {
  int64_t B, h, w, cp;
  Buffer<T> dots;  // [B,h,w,cp]; empty where cp = 0
  GramMaps<T> gram;
  bool has_gram;

  int64_t cell(int64_t b, int64_t y, int64_t x = 0) const { return (b * h + y) * w + x; }
};

// Packed runs of feature rows, the last N of them kept: as the loop goes down the rows, each is packed once.
template <class T, int N>
class RowWindow {
 public:
  RowWindow(const FeatureView& f, int64_t ld) : f_(f), ld_(ld) {
    for (Buffer<T>& row : rows_) row.reset(f.D * ld);
    restart();
  }
  // Before another run of columns.
  void restart() { std::fill_n(held_, N, kNone); }
  // Columns [x, x + n) of row y of image b, zero outside the map, as [D][ld].
  const T* at(int64_t b, int64_t y, int64_t x, int64_t n) {
    const int64_t wanted = b * (f_.h + 2) + y + 1, place = wanted % N;
    if (held_[place] != wanted) pack_row(f_, b, y, x, n, ld_, rows_[place].get(), ld_), held_[place] = wanted;
    return rows_[place].get();
  }

 private:
  static constexpr int64_t kNone = -1;
  const FeatureView& f_;
  int64_t ld_;
  Buffer<T> rows_[N];
  int64_t held_[N];  // which row, counted over all images with the two outside of each
};

// One pass over the cells, packed once for all products: calls dots(b, y, x, n, packed, ld) for each run of n cells and,
// where `gram` is given, fills it; its rows are `stride` apart, and what lies behind the w-th column is left alone.
template <class T, class Dots>
void cell_pass(const FeatureView& f, const GramMaps<T>* gram, int64_t stride, const Dots& dots) {
  const int64_t tile = tile_pixels(f.D, sizeof(T)), ld = tile_stride<T>(tile + 1 + kLanes<T>);
  torch::stable::parallel_for(0, f.B * f.h, 1, [&](int64_t begin, int64_t end) {
    RowWindow<T, 2> rows(f, ld);
    for (int64_t x = 0; x < f.w; x += tile) {
      rows.restart();
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / f.h, y = task % f.h, n = std::min(tile, f.w - x);
        const T* upper = rows.at(b, y, x, n + 1);
        dots(b, y, x, n, upper, ld);
        if (!gram) continue;
        const T* lower = rows.at(b, y + 1, x, n + 1);
        for (int64_t p = 0; p < n; p += kLanes<T>) {
          Vec<T> self = {}, right = {}, below = {}, diagonals = {};
          for (int64_t d = 0; d < f.D; ++d) {
            const T *u = upper + d * ld + p, *l = lower + d * ld + p;
            const Vec<T> f00 = load<T>(u), f01 = load<T>(u + 1), f10 = load<T>(l), f11 = load<T>(l + 1);
            self += f00 * f00;
            right += f00 * f01;
            below += f00 * f10;
            diagonals += f00 * f11;
            diagonals += f01 * f10;
          }
          const int64_t kept = std::min<int64_t>(kLanes<T>, n - p), cell = (b * f.h + y) * stride + x + p;
          std::memcpy(&gram->self[cell], &self, kept * sizeof(T));
          std::memcpy(&gram->right[cell], &right, kept * sizeof(T));
          std::memcpy(&gram->lower[cell], &below, kept * sizeof(T));
          std::memcpy(&gram->diagonals[cell], &diagonals, kept * sizeof(T));
        }
      }
    }
  });
}

// Products of every cell's feature with the class vectors of its image, `vectors(b)` = [D][cp], and, with `gram`, with
// its neighbours.
template <class T, class Vectors>
CellMaps<T> cell_maps(const FeatureView& f, int64_t cp, const Vectors& vectors, bool gram) {
  const int64_t cells = f.B * f.h * f.w;
  CellMaps<T> maps{f.B, f.h, f.w, cp, Buffer<T>(cells * cp), {}, gram};
  if (gram) maps.gram.reset(cells);
  cell_pass<T>(f, gram ? &maps.gram : nullptr, f.w,
               [&](int64_t b, int64_t y, int64_t x, int64_t n, const T* packed, int64_t ld) {
                 if (!cp) return;
                 Buffer<T> z(round_up(n, kPixelBlock) * cp);
                 tile_dots(packed, ld, round_up(n, kPixelBlock), f.D, vectors(b), cp, z.get());
                 std::copy_n(z.get(), n * cp, &maps.dots[maps.cell(b, y, x) * cp]);
               });
  return maps;
}

// The maps of one label row after blending along y, with a zero column behind the last cell so that index + 1 exists.
template <class T>
struct RowBlend {
  int64_t w, cp;
  Buffer<T> dots;         // [w+1,cp]
  Buffer<T> self, right;  // [w+1]

  RowBlend(int64_t w, int64_t cp)
      : w(w), cp(cp), dots((w + 1) * cp, true), self(w + 1, true), right(w + 1, true) {}

  void blend(const CellMaps<T>& maps, int64_t b, int64_t y, T t) {
    const int64_t below = std::min(y + 1, maps.h - 1);  // at the last row t = 0
    const int64_t c0 = maps.cell(b, y), c1 = maps.cell(b, below);
    const T *d0 = &maps.dots[c0 * cp], *d1 = &maps.dots[c1 * cp];
    const T s = T(1) - t;
    for (int64_t i = 0; i < w * cp; ++i) dots[i] = s * d0[i] + t * d1[i];
    if (!maps.has_gram) return;
    const GramMaps<T>& g = maps.gram;
    for (int64_t x = 0; x < w; ++x) {
      self[x] = blend_squared(g.self[c0 + x], g.self[c1 + x], g.lower[c0 + x], t);
      right[x] = blend_product(g.right[c0 + x], g.right[c1 + x], g.diagonals[c0 + x], t);
    }
  }
  // 1/|F| at the label pixels of the row
  void inverse_norms(const Axis<T>& axis, T eps, T* inverse) const {
    for (size_t x = 0; x < axis.index.size(); ++x) {
      const int64_t i = axis.index[x];
      inverse[x] = inverse_norm(blend_squared(self[i], self[i + 1], right[i], axis.fraction[x]), eps);
    }
  }
  // z[0..columns) = the blended products at label pixel x; columns = cp, see with_columns
  template <class Columns>
  void at(const Axis<T>& axis, int64_t x, Columns columns, T* z) const {
    const T *z0 = &dots[axis.index[x] * cp], *z1 = z0 + cp;
    const T t = axis.fraction[x], s = T(1) - t;
    for (int64_t c = 0; c < columns; c += kLanes<T>)
      store<T>(z + c, s * load<T>(z0 + c) + t * load<T>(z1 + c));
  }
};

// Gradients with respect to the maps of one batch: what a label row gives to the feature row above it and to the one
// below it.
template <class T>
struct CellAdjoint {
  int64_t B, C, h, w;
  int64_t class_stride, cell_stride, row_stride;  // of the products: [B,h,w,C], or planes [B,C,h,row]
  int64_t image_stride;
  Buffer<T> upper, lower;
  Buffer<T> self_upper, self_lower;    // [B,h,w]
  Buffer<T> right_upper, right_lower;  // [B,h,w]
  Buffer<T> below, diagonals;          // [B,h,w]

  // Classes innermost, `cp` of them.
  CellAdjoint(int64_t B, int64_t h, int64_t w, int64_t cp)
      : CellAdjoint(B, cp, h, w, 1, cp, w * cp, h * w * cp) {}
  // A plane for each class, whose rows are `row` long.
  static CellAdjoint planes(int64_t B, int64_t C, int64_t h, int64_t w, int64_t row) {
    return {B, C, h, w, h * row, 1, row, C * h * row};
  }
  int64_t cell(int64_t b, int64_t y, int64_t x = 0) const { return (b * h + y) * w + x; }
  int64_t product(int64_t b, int64_t y, int64_t x, int64_t c) const {
    return b * image_stride + y * row_stride + x * cell_stride + c * class_stride;
  }

  // The gradient of the products at a cell: from the label rows below it and from those above it.
  T dot(int64_t b, int64_t y, int64_t x, int64_t c) const {
    return upper[product(b, y, x, c)] + (y ? lower[product(b, y - 1, x, c)] : T(0));
  }
  // Twice the gradient of <f,f>: d<f,f>/df = 2 f.
  T self(int64_t b, int64_t y, int64_t x) const {
    return T(2) * (self_upper[cell(b, y, x)] + (y ? self_lower[cell(b, y - 1, x)] : T(0)));
  }
  T right(int64_t b, int64_t y, int64_t x) const {
    return x < 0 ? T(0) : right_upper[cell(b, y, x)] + (y ? right_lower[cell(b, y - 1, x)] : T(0));
  }
  T lower_product(int64_t b, int64_t y, int64_t x) const { return y < 0 ? T(0) : below[cell(b, y, x)]; }
  T diagonal(int64_t b, int64_t y, int64_t x) const {
    return x < 0 || y < 0 ? T(0) : diagonals[cell(b, y, x)];
  }

 private:
  CellAdjoint(int64_t B, int64_t C, int64_t h, int64_t w, int64_t class_stride, int64_t cell_stride,
              int64_t row_stride, int64_t image_stride)
      : B(B),
        C(C),
        h(h),
        w(w),
        class_stride(class_stride),
        cell_stride(cell_stride),
        row_stride(row_stride),
        image_stride(image_stride),
        upper(B * image_stride, true),
        lower(B * image_stride, true) {
    for (Buffer<T>* m : {&self_upper, &self_lower, &right_upper, &right_lower, &below, &diagonals})
      m->reset(B * h * w, true);
  }
};

// Collects one label row's gradients along x, then hands them to two feature rows.
template <class T>
struct RowAdjoint {
  int64_t w, cp;
  Buffer<T> dots;         // [w+1,cp]
  Buffer<T> self, right;  // [w+1]

  RowAdjoint(int64_t w, int64_t cp) : w(w), cp(cp), dots((w + 1) * cp), self(w + 1), right(w + 1) { clear(); }

  void clear() {
    std::fill_n(dots.get(), (w + 1) * cp, T(0));
    std::fill_n(self.get(), w + 1, T(0));
    std::fill_n(right.get(), w + 1, T(0));
  }
  // g: the gradient of the product with class c alone
  void add_one(const Axis<T>& axis, int64_t x, int64_t c, T g) {
    T* g0 = &dots[axis.index[x] * cp + c];
    const T t = axis.fraction[x];
    g0[0] += (T(1) - t) * g;
    g0[cp] += t * g;
  }
  // k: the gradient of |F|^2 at label pixel x; the adjoint of blend_squared along x
  void add_squared(const Axis<T>& axis, int64_t x, T k) {
    const int64_t i = axis.index[x];
    const T t = axis.fraction[x], s = T(1) - t;
    self[i] += s * s * k;
    self[i + 1] += t * t * k;
    right[i] += T(2) * s * t * k;
  }
  // The adjoint of RowBlend::blend; leaves the row cleared.
  void flush(CellAdjoint<T>& out, int64_t b, int64_t y, T t) {
    const int64_t cell = out.cell(b, y);
    const T s = T(1) - t;
    T *u = &out.upper[cell * cp], *l = &out.lower[cell * cp];
    for (int64_t i = 0; i < w * cp; ++i) {
      u[i] += s * dots[i];
      l[i] += t * dots[i];
    }
    for (int64_t x = 0; x < w; ++x) {
      out.self_upper[cell + x] += s * s * self[x];
      out.self_lower[cell + x] += t * t * self[x];
      out.below[cell + x] += T(2) * s * t * self[x];
      out.right_upper[cell + x] += s * s * right[x];
      out.right_lower[cell + x] += t * t * right[x];
      out.diagonals[cell + x] += s * t * right[x];
    }
    clear();
  }
};

}  // namespace pssl::PSSL_SIMD_NAMESPACE
