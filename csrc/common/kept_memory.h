// Memory of large new tensors on the CPU, kept from one to the next.
//
// The system clears every page that a process touches for the first time: for the gradient of a feature map of 32 MiB that
// takes longer than to compute it. malloc gives memory of this size back as soon as it is free, so that every step of a
// training run pays again. Here freed blocks stay mapped, marked so that the system may take their pages where it needs
// them (MADV_FREE): until it does, they are used again as they are.
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

// At least `bytes` bytes from the boundary of a huge page on, with anything in them; null where the system gives none.
KeptBlock take_block(int64_t bytes);
void give_back(KeptBlock block) noexcept;

// Bytes that are to be kept at most: PSSL_KEEP_MIB, by default 1024 MiB; throws where that is no number.
int64_t kept_limit();
// Unmaps what is kept and not in use; returns how many bytes that was.
int64_t release_kept();

}  // namespace pssl
