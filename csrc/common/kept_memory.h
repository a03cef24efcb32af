// Memory of large new tensors on the CPU, kept from one to the next.
//
// The system clears every page that a process touches for the first time: for the gradient of a feature map of 32 MiB that
// takes longer than to compute it. malloc gives memory of this size back as soon as it is free, so that every step of a
// training run pays again. Here, where it is asked for, freed blocks stay mapped, marked so that the system may take their
// pages where it needs them (MADV_FREE): until it does, they are used again as they are. A tensor in such a block has a
// storage that cannot be resized: the stable ABI makes a tensor of given memory (from_blob) without an allocator.
#pragma once

#include <cstdint>

namespace pssl {

constexpr int64_t kHugePage = int64_t(2) << 20;
constexpr int64_t kLargeMemory =
    2 * kHugePage;  // bytes from which on memory is kept, and huge pages are asked for

struct KeptBlock {
  void* memory = nullptr;
  int64_t bytes = 0;
};

// At least `bytes` bytes from the boundary of a huge page on, with anything in them; null where so much is not to be kept,
// and where the system gives none.
KeptBlock take_block(int64_t bytes);
void give_back(KeptBlock block) noexcept;

// Keeps at most `mib` MiB from now on, and unmaps what is kept beyond that and not in use. Until it is called, nothing.
void keep_memory(int64_t mib);
// keep_memory(PSSL_KEEP_MIB) where that is set; throws where it is no number.
void keep_from_environment();
// Unmaps what is kept and not in use; returns how many bytes that was.
int64_t release_kept();

}  // namespace pssl
