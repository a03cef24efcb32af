// What operators on label pixels share, on every device.
#pragma once

#include "common/bilinear.h"

namespace pssl {

// A pixel's region; -1 where it does not count: ignored, or, where no error can be raised, none of the C regions.
PSSL_HD inline int32_t counted_label(int64_t label, int64_t C, int64_t ignore_index) {
  return label != ignore_index && label >= 0 && label < C ? int32_t(label) : -1;
}

}  // namespace pssl
