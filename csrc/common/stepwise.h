// Arithmetic whose every step rounds, as in the references: thresholds are compared with the results, so that their last
// bits count. Contraction into fused multiply-add would skip a rounding. Files that include this are compiled without
// it (STEPWISE in build_tools/native.py).
#pragma once

#include "common/bilinear.h"
#include "common/simd.h"

#ifndef PSSL_STEPWISE
#error "name this file in STEPWISE in build_tools/native.py"
#endif

namespace pssl::PSSL_SIMD_NAMESPACE {

// a for t = 0, b for t = 1; the references' resize_stepwise does this along y, then along x.
template <class T>
PSSL_HD inline T blend_stepwise(T a, T b, T t) {
  return (T(1) - t) * a + t * b;
}

// A pixel from its four cells: [above, below] along y, then [left, right] along x.
template <class T>
PSSL_HD inline T blend_cells_stepwise(T above_left, T above_right, T below_left, T below_right, T ty, T tx) {
  return blend_stepwise(blend_stepwise(above_left, below_left, ty),
                        blend_stepwise(above_right, below_right, ty), tx);
}

}  // namespace pssl::PSSL_SIMD_NAMESPACE
