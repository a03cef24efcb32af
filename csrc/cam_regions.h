// The arithmetic of cam_regions on one pixel, for host and device.
#pragma once

#include <cstdint>

#include "common/bilinear.h"

namespace pssl {

constexpr int kMostRegionClasses = 254;  // the mask is uint8, and 255 is left to what is ignored

// The label of a pixel whose best class is `index`; a NaN is neither sure nor background.
template <class T>
PSSL_HD inline uint8_t region_label(T best, int32_t index, T foreground, T background, uint8_t ignore) {
  const uint8_t unsure = best < background ? 0 : ignore;
  return best >= foreground ? uint8_t(index + 1) : unsure;
}

}  // namespace pssl
