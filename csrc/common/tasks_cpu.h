// Tasks that threads take by turns.
#pragma once

#include <algorithm>
#include <atomic>

#include "common/tensors.h"

namespace pssl::PSSL_SIMD_NAMESPACE {

// Calls the functions that `make_worker()` returns, one a thread, as worker(task) for every task of 0..count-1, each of them
// in ascending order, and at the end worker.finish(), where a worker has that. A thread
// that the machine holds up leaves its tasks to the others, where halves handed out beforehand would all wait for it; so
// what tasks add up must not depend on who takes which.
template <class MakeWorker>
void share_tasks(int64_t count, const MakeWorker& make_worker) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(count, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    auto worker = make_worker();
    for (int64_t task = next++; task < count; task = next++) worker(task);
    if constexpr (requires { worker.finish(); }) worker.finish();
  });
}

}  // namespace pssl::PSSL_SIMD_NAMESPACE
