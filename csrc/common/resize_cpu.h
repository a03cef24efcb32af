// Maps read row by row at another size, with the references' rounding, and the way back for gradients.
#pragma once

#include "common/axis_cpu.h"
#include "common/row_cpu.h"
#include "common/stepwise.h"
#include "common/tile_cpu.h"

namespace pssl::PSSL_SIMD_NAMESPACE {

template <class T>
struct ResizedMaps {
  FeatureView maps;
  int64_t H, W;
  bool same;  // nothing to resize
  Axis<T> ys, xs;

  ResizedMaps(const Tensor& t, int64_t H, int64_t W)
      : maps(FeatureView::of(t)),
        H(H),
        W(W),
        same(maps.h == H && maps.w == W),
        ys(same ? 0 : maps.h, same ? 0 : H, false),
        xs(same ? 0 : maps.w, same ? 0 : W, false) {}

  // Whether rows can be read where they lie.
  bool in_place() const { return same && maps.type == scalar_type_of<T> && maps.sx == 1; }
  int64_t scratch() const { return same ? 0 : 2 * maps.w + 1; }

  // out[0..W) = row y of `plane`, one of maps.plane(b, k). `memory` holds scratch() elements.
  void row(const FeatureView& plane, int64_t y, T* memory, T* out) const {
    const int64_t w = plane.w;
    if (same) return pack_row(plane, 0, y, 0, w, w, out, w);
    T *blended = memory, *lower = memory + w + 1;
    const int64_t above = ys.index[y], below = std::min(above + 1, plane.h - 1);
    pack_row(plane, 0, above, 0, w, w, blended, w);
    pack_row(plane, 0, below, 0, w, w, lower, w);
    blend_rows(blended, lower, ys.fraction[y], w);
    blended[w] = blended[w - 1];  // so that index + 1 exists
    spread_row(blended, out);
  }

  // Row y of `plane` where it lies, if it can be read there; else row() into `out`.
  const T* row_in_place(const FeatureView& plane, int64_t y, T* memory, T* out) const {
    if (in_place()) return static_cast<const T*>(plane.data) + y * plane.sy;
    row(plane, y, memory, out);
    return out;
  }

  // The adjoint of row(): adds to cells[h][w] what gradient[0..W) of row y gives to each. Contents of `memory` are lost.
  void add_adjoint(const T* gradient, int64_t y, T* memory, T* cells) const {
    const int64_t w = maps.w;
    if (same) return add_row(gradient, w, cells + y * w);
    std::fill_n(memory, w + 1, T(0));
    gather_row(gradient, memory);
    const int64_t above = ys.index[y], below = std::min(above + 1, maps.h - 1);
    share_row(memory, ys.fraction[y], w, cells + above * w, cells + below * w);
  }

 private:
  PSSL_NOINLINE static void blend_rows(T* __restrict upper, const T* __restrict lower, T t, int64_t w) {
    for (int64_t x = 0; x < w; ++x) upper[x] = blend_stepwise(upper[x], lower[x], t);
  }
  PSSL_NOINLINE void spread_row(const T* __restrict cells, T* __restrict out) const {
    const int64_t* index = xs.index.data();
    const T* fraction = xs.fraction.data();
    for (int64_t x = 0; x < W; ++x) {
      const T* c = cells + index[x];
      out[x] = blend_stepwise(c[0], c[1], fraction[x]);
    }
  }
  PSSL_NOINLINE void gather_row(const T* __restrict gradient, T* __restrict cells) const {
    const int64_t* index = xs.index.data();
    const T* fraction = xs.fraction.data();
    for (int64_t x = 0; x < W; ++x) {
      T* c = cells + index[x];
      c[0] += (T(1) - fraction[x]) * gradient[x];
      c[1] += fraction[x] * gradient[x];
    }
  }
  // `above` and `below` are one row at the last, where t = 0
  PSSL_NOINLINE static void share_row(const T* row, T t, int64_t w, T* above, T* below) {
    const T s = T(1) - t;
    for (int64_t x = 0; x < w; ++x) above[x] += s * row[x];
    if (t == T(0)) return;
    for (int64_t x = 0; x < w; ++x) below[x] += t * row[x];
  }
};

}  // namespace pssl::PSSL_SIMD_NAMESPACE
