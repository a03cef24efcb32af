#include "common/kept_memory.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace pssl {
namespace {

// Bytes that are to be kept at most.
std::atomic<int64_t> limit{0};

#if defined(__linux__)

void unmap(KeptBlock block) noexcept { munmap(block.memory, size_t(block.bytes)); }

struct Kept {
  std::mutex mutex;
  std::vector<KeptBlock> blocks;  // in the order in which they were given back
  int64_t bytes = 0;

  void drop(size_t i) {
    bytes -= blocks[i].bytes;
    blocks.erase(blocks.begin() + std::ptrdiff_t(i));
  }
  // Unmaps the oldest until no more than `most` bytes are left.
  void shrink(int64_t most) noexcept {
    while (bytes > most) {
      unmap(blocks[0]);
      drop(0);
    }
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

#endif

}  // namespace

void keep_from_environment() {
  const char* const value = std::getenv("PSSL_KEEP_MIB");
  const std::string text = value ? value : "";
  if (text.empty()) return;
  if (text.size() > 9 || text.find_first_not_of("0123456789") != std::string::npos)
    throw std::invalid_argument("PSSL_KEEP_MIB must be a number of MiB, 0 for none, got '" + text + "'");
  keep_memory(std::stoll(text));
}

#if defined(__linux__)

// Who finds the lock taken goes without: it is held for moments, or, in a process forked in such a moment, for ever.

KeptBlock take_block(int64_t bytes) {
  bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  if (bytes > limit.load()) return {};  // it would not be kept, and its tensor could not be resized
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
  const int64_t most = limit.load();
  if (!lock || block.bytes > most) return unmap(block);
  all.shrink(most - block.bytes);
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
  all.shrink(0);
  return bytes;
}

void keep_memory(int64_t mib) {
  limit.store(mib << 20);
  Kept& all = kept();
  const std::lock_guard lock(all.mutex);
  all.shrink(mib << 20);
}

#else

KeptBlock take_block(int64_t) { return {}; }
void give_back(KeptBlock) noexcept {}
int64_t release_kept() { return 0; }
void keep_memory(int64_t mib) { limit.store(mib << 20); }

#endif

}  // namespace pssl
