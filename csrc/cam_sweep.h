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
  int32_t cells;
  bool single;  // no cell holds more than one threshold
};

// The cell of `value`, 0 for NaN.
template <class T>
PSSL_HD inline int32_t threshold_cell(const ThresholdCells<T>& grid, T value) {
  T z = (value - grid.lowest) * grid.scale;
  const T last = T(grid.cells - 1);
  z = z > T(0) ? z : T(0);
  z = z < last ? z : last;
  return int32_t(z);
}

// Thresholds strictly below `value`, which lies in `cell`. `ordered`: ascending, no NaN, and infinity behind the last.
// `first[c]`: the number of thresholds in cells below c, c <= cells. 0 for NaN.
template <bool kSingle, class T>
PSSL_HD inline int32_t thresholds_below(int32_t cell, const int32_t* first, const T* ordered, T value) {
  int32_t begin = first[cell];
  if (kSingle) return begin + (ordered[begin] < value);  // or the next cell's, which is not below
  int32_t end = first[cell + 1];
  while (begin < end) {
    const int32_t middle = begin + (end - begin) / 2;
    if (ordered[middle] < value) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// The same without cells for N values side by side: `ordered` holds `count` thresholds, ascending.
template <int N, class T>
PSSL_HD inline void thresholds_below(const T* ordered, int32_t count, const T (&value)[N],
                                     int32_t (&below)[N]) {
  for (int i = 0; i < N; ++i) below[i] = 0;
  int32_t step = 1;
  while (step <= count / 2) step *= 2;
  for (; step > 0; step /= 2)
    for (int i = 0; i < N; ++i)
      if (below[i] + step <= count && ordered[below[i] + step - 1] < value[i]) below[i] += step;
}

}  // namespace pssl
