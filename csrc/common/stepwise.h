// Arithmetic whose every step rounds, as in the references: thresholds are compared with the results, so that their last
// bits count. Contraction into fused multiply-add would skip a rounding. Files that include this are compiled without
// it (STEPWISE in build_tools/native.py); a device needs products by __fmul_rn and __dmul_rn, which are never fused.
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

}  // namespace pssl::PSSL_SIMD_NAMESPACE
