#include "common/simd.h"

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <string>

namespace pssl {
namespace {

constexpr Simd kLevels[] = {Simd::baseline, Simd::avx2, Simd::avx512};

std::string requested() {
  const char* text = std::getenv("PSSL_SIMD");
  return text ? text : "";
}

// Nothing where PSSL_SIMD is no level's name. A level above the processor's is lowered, not refused: the same
// environment file may serve several machines.
std::optional<Simd> choose() {
  const std::string name = requested();
  if (name.empty()) return simd_supported();
  for (Simd level : kLevels)
    if (name == simd_name(level)) return std::min(level, simd_supported());
  return std::nullopt;
}

const std::optional<Simd>& chosen() {
  static const std::optional<Simd> level = choose();
  return level;
}

}  // namespace

const char* simd_name(Simd level) {
  switch (level) {
    case Simd::avx512:
      return "avx512";
    case Simd::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

Simd simd_supported() {
#if defined(__x86_64__)
  __builtin_cpu_init();  // needed where this runs before the constructors of libgcc
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? Simd::avx512 : avx2 ? Simd::avx2 : Simd::baseline;
#else
  return Simd::baseline;
#endif
}

Simd simd_level() {
  if (!chosen())
    throw std::invalid_argument("PSSL_SIMD must be one of baseline, avx2, avx512, got '" + requested() + "'");
  return *chosen();
}

bool simd_is_chosen(Simd level) noexcept { return chosen() == level; }

}  // namespace pssl
