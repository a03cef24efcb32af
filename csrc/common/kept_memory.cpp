#include "common/kept_memory.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace pssl {
namespace {

constexpr int64_t kDefaultMiB = 1024;

std::string requested() {
  const char* text = std::getenv("PSSL_KEEP_MIB");
  return text ? text : "";
}

// Nothing where PSSL_KEEP_MIB is no number.
std::optional<int64_t> choose() {
  const std::string text = requested();
  if (text.empty()) return kDefaultMiB << 20;
  if (text.size() > 9 || text.find_first_not_of("0123456789") != std::string::npos) return std::nullopt;
  return std::stoll(text) << 20;
}

const std::optional<int64_t>& chosen() {
  static const std::optional<int64_t> limit = choose();
  return limit;
}

#if defined(__linux__)

struct Kept {
  std::mutex mutex;
  std::vector<KeptBlock> blocks;  // in the order in which they were given back
  int64_t bytes = 0;

  void drop(size_t i) {
    bytes -= blocks[i].bytes;
    blocks.erase(blocks.begin() + std::ptrdiff_t(i));
  }
};

// Never destroyed: tensors may outlive everything static.
Kept& kept() {
  static Kept* const all = new Kept;
  return *all;
}

KeptBlock map(int64_t bytes) {
  // one huge page more, to begin at the boundary of one
  const int64_t room = bytes + kHugePage;
  void* const memory =
      mmap(nullptr, size_t(room), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return {};
  char* const begin = static_cast<char*>(memory);
  const int64_t before = -int64_t(reinterpret_cast<intptr_t>(begin)) & (kHugePage - 1);
  if (before > 0) munmap(begin, size_t(before));
  if (before < kHugePage) munmap(begin + before + bytes, size_t(kHugePage - before));
  madvise(begin + before, size_t(bytes), MADV_HUGEPAGE);
  return {begin + before, bytes};
}

void unmap(KeptBlock block) noexcept { munmap(block.memory, size_t(block.bytes)); }

#endif

}  // namespace

int64_t kept_limit() {
  if (!chosen())
    throw std::invalid_argument("PSSL_KEEP_MIB must be a number of MiB, 0 for none, got '" + requested() +
                                "'");
  return *chosen();
}

#if defined(__linux__)

// Who finds the lock taken goes without: it is held for moments, or, in a process forked in such a moment, for ever.

KeptBlock take_block(int64_t bytes) {
  bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  Kept& all = kept();
  if (const std::unique_lock lock(all.mutex, std::try_to_lock); lock) {
    // the smallest that is large enough, if no more than a quarter of it would lie idle
    std::optional<size_t> best;
    for (size_t i = 0; i < all.blocks.size(); ++i) {
      const int64_t size = all.blocks[i].bytes;
      if (size >= bytes && size - bytes <= size / 4 && (!best || size < all.blocks[*best].bytes)) best = i;
    }
    if (best) {
      const KeptBlock block = all.blocks[*best];
      all.drop(*best);
      return block;
    }
  }
  return map(bytes);
}

void give_back(KeptBlock block) noexcept {
  Kept& all = kept();
  const std::unique_lock lock(all.mutex, std::try_to_lock);
  const int64_t limit = chosen().value_or(0);
  if (!lock || block.bytes > limit) return unmap(block);
  for (; all.bytes + block.bytes > limit; all.drop(0)) unmap(all.blocks[0]);
  madvise(block.memory, size_t(block.bytes), MADV_FREE);
  try {
    all.blocks.push_back(block);
    all.bytes += block.bytes;
  } catch (const std::bad_alloc&) {
    unmap(block);
  }
}

int64_t release_kept() {
  Kept& all = kept();
  const std::lock_guard lock(all.mutex);
  const int64_t bytes = all.bytes;
  while (!all.blocks.empty()) unmap(all.blocks[0]), all.drop(0);
  return bytes;
}

#else

KeptBlock take_block(int64_t) { return {}; }
void give_back(KeptBlock) noexcept {}
int64_t release_kept() { return 0; }

#endif

}  // namespace pssl
