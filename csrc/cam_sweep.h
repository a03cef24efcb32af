// How many thresholds lie strictly below a value, in a few steps whatever their number and spacing.
//
// The range of the thresholds is cut into equal cells. cell() never decreases with the value, so all thresholds of
// lower cells are below it, those of higher cells are not, and only its own cell's have to be compared.
#pragma once

#include <cstdint>

#include "common/bilinear.h"

namespace pssl {

template <class T>
struct ThresholdCells {
  T lowest, scale;  // cell = (value - lowest) * scale
  int64_t cells;
};

// The cell of `value`, 0 for NaN.
template <class T>
PSSL_HD inline int64_t threshold_cell(const ThresholdCells<T>& grid, T value) {
  const T z = (value - grid.lowest) * grid.scale;
  const T last = T(grid.cells - 1);
  return z > T(0) ? int64_t(z < last ? z : last) : 0;
}

// `ordered`: ascending, no NaN. `first[c]`: the number of thresholds in cells below c, c <= cells. 0 for NaN.
template <class T>
PSSL_HD inline int64_t thresholds_below(const ThresholdCells<T>& grid, const int32_t* first, const T* ordered,
                                        T value) {
  const int64_t cell = threshold_cell(grid, value);
  int64_t begin = first[cell], end = first[cell + 1];
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (ordered[middle] < value) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

}  // namespace pssl
