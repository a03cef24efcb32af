// Floating numbers as unsigned integers of the same order, for maxima by integer atomics: their result does not depend on
// the order in which values arrive.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/bilinear.h"

namespace pssl {

// unsigned long long, not uint64_t: the type that CUDA's atomics are declared for
template <class T>
using OrderedBits = std::conditional_t<sizeof(T) == 4, unsigned, unsigned long long>;

// a < b gives ordered_bits(a) < ordered_bits(b); every NaN is above all. 0 is below what any number gives.
template <class T>
PSSL_HD inline OrderedBits<T> ordered_bits(T value) {
  using Bits = OrderedBits<T>;
  constexpr Bits sign = Bits(1) << (8 * sizeof(T) - 1);
  if (value != value) return ~Bits(0);
  Bits bits;
  memcpy(&bits, &value, sizeof bits);
  return bits & sign ? ~bits : bits | sign;
}

template <class T>
PSSL_HD inline T from_ordered_bits(OrderedBits<T> ordered) {
  using Bits = OrderedBits<T>;
  constexpr Bits sign = Bits(1) << (8 * sizeof(T) - 1);
  const Bits bits = ordered & sign ? ordered & ~sign : ~ordered;
  T value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace pssl
