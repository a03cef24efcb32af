// Maps read row by row at another size, with the rounding of the references' resize_stepwise: s a + t b along y, then
// along x, s = 1 - t, one rounding a step. Thresholds are compared with the result, so its last bit counts.
#pragma once

#include "common/axis_cpu.h"
#include "common/tile_cpu.h"

#ifndef PSSL_STEPWISE
#error \
    "build_tools/native.py must name this file in STEPWISE: contraction into fused multiply-add skips a rounding"
#endif

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

 private:
  PSSL_NOINLINE static void blend_rows(T* __restrict upper, const T* __restrict lower, T t, int64_t w) {
    const T s = T(1) - t;
    for (int64_t x = 0; x < w; ++x) upper[x] = s * upper[x] + t * lower[x];
  }
  PSSL_NOINLINE void spread_row(const T* __restrict cells, T* __restrict out) const {
    const int64_t* index = xs.index.data();
    const T* fraction = xs.fraction.data();
    for (int64_t x = 0; x < W; ++x) {
      const T *c = cells + index[x], t = fraction[x];
      out[x] = (T(1) - t) * c[0] + t * c[1];
    }
  }
};

}  // namespace pssl::PSSL_SIMD_NAMESPACE
