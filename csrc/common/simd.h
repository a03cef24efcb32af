// Which vector instructions the CPU kernels use.
//
// Every csrc/*_cpu.cpp is compiled once per level with -DPSSL_SIMD=<level>, all into one library; when it is loaded,
// only the copies of the chosen level register their kernels:
//
//     STABLE_TORCH_LIBRARY_IMPL(pssl, CPU, m) {
//       if (!simd_chosen()) return;
//       m.impl("op", TORCH_BOX(&op_cpu));
//     }
//
// Two rules follow for such a file. Its own functions live in an unnamed namespace, or the copies clash. And an inline
// function or template from a shared header exists once in the library whatever the level (the linker keeps the
// baseline copy, see build_tools/native.py): one that should be vectorised goes into `namespace PSSL_SIMD_NAMESPACE`.
#pragma once

namespace pssl {

enum class Simd { baseline, avx2, avx512 };

const char* simd_name(Simd level);

// The best level this processor, and the operating system on it, can run.
Simd simd_supported();

// The level in use: the best supported, or a lower one that the environment variable PSSL_SIMD names. Read once.
// Throws std::invalid_argument, naming the choices, if PSSL_SIMD names none of them.
Simd simd_level();

// Whether `level` is the one in use; false for all of them where simd_level() would throw, since this is asked while
// the library is being loaded, when an exception could only end the process.
bool simd_is_chosen(Simd level) noexcept;

}  // namespace pssl

#ifdef PSSL_SIMD

#define PSSL_SIMD_JOIN_(prefix, level) prefix##level
#define PSSL_SIMD_JOIN(prefix, level) PSSL_SIMD_JOIN_(prefix, level)
#define PSSL_SIMD_NAMESPACE PSSL_SIMD_JOIN(simd_, PSSL_SIMD)

namespace {

// Whether this copy of the file is the one to register. Internal linkage, so that each copy asks for its own level.
[[maybe_unused]] bool simd_chosen() noexcept { return pssl::simd_is_chosen(pssl::Simd::PSSL_SIMD); }

}  // namespace

#else
#define PSSL_SIMD_NAMESPACE simd_any  // a file compiled once, or CUDA: the shared headers still need a name
#endif
