// What module.cpp asks torch for, which it cannot do itself.
#pragma once

#include <cstdint>

namespace pssl {

// The threads that torch's loops, and so the CPU kernels, have.
uint32_t torch_threads();

}  // namespace pssl
