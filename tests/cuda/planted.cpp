// A sum over blocks with a fault of choice, for tests of cuda_on_cpu.h itself:  planted FAULT SEED [FAULT SEED]...
// prints four sums, one a line, then a line "status N" with the exit status. Each pair runs in a process of its own,
// since most faults end it; they are forks, since loading torch takes longer than all that they do.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <string>

#include "common/cuda_block.cuh"

namespace {

using namespace pssl::PSSL_SIMD_NAMESPACE;

constexpr int kThreads = 96, kBlocks = 5;
std::string fault;
bool planted(const char* name) { return fault == name; }

// out[block] = the sum of the block's share of x[0..n), through every kind of shared memory
__global__ void block_sums(const float* x, int n, float* out) {
  PSSL_DYNAMIC_SHARED(float, tile);
  PSSL_SHARED(warps, float[kThreads / kWarp]);
  if (planted("much static shared")) {
    PSSL_SHARED(much, float[kMostStaticShared / sizeof(float)]);
    much[0] = 0;
  }
  const int thread = block_thread(), lane = thread % kWarp;
  float sum = 0;
  const int end = planted("global overrun") ? n + 1 : n;
  for (int i = blockIdx.x * kThreads + thread; i < end; i += kBlocks * kThreads) sum += x[i];
  const int shift = planted("dynamic shared overrun");
  if (!planted("uninitialised") || thread > 0) tile[thread + shift] = sum;
  if (!planted("missing barrier")) __syncthreads();
  sum = tile[kThreads - 1 - thread + shift];
  if (planted("returned before a barrier") && thread >= 64) return;
  if (planted("two barriers") && thread >= 64) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  if (planted("shuffle of returned lanes") && lane > 7) return;
  if (planted("shuffle out of the mask")) sum = __shfl_sync(lane < 16 ? 0xffffu : 0xffff0000u, sum, 20);
  if (planted("deadlock") && lane == 3) __syncthreads();
  if (planted("lanes disagree")) __syncwarp(lane < 16 ? 0xffffffffu : 0xffff0000u);
  sum = warp_reduce(sum, Plus{});
  if (lane == 0) warps[thread / kWarp + (planted("static shared overrun") && thread / kWarp == 2)] = sum;
  __syncthreads();
  if (thread > 0) return;
  float total = 0;
  for (int i = 0; i < kThreads / kWarp; ++i) total += warps[i];
  // the last block to run wins
  out[planted("order of blocks") ? 0 : blockIdx.x] = total;
}

void print_sums() {
  const int n = 1001;
  float* x = new float[n];
  for (int i = 0; i < n; ++i) x[i] = float(i % 7);
  try {
    for (int run = 0; run < 4; ++run) {
      float* out = new float[kBlocks]();
      const size_t shared = kThreads * sizeof(float);
      cuda_on_cpu::launch(dim3(kBlocks), dim3(kThreads), shared, kMostStaticShared,
                          [&] { block_sums(x, n, out); });
      float sum = 0;
      for (int b = 0; b < kBlocks; ++b) sum += out[b];
      std::printf("%g\n", sum);
      delete[] out;
    }
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
  }
  delete[] x;
}

}  // namespace

int main(int argc, char** argv) {
  for (int i = 1; i + 1 < argc; i += 2) {
    const pid_t child = fork();
    if (child == 0) {
      fault = argv[i];
      setenv("PSSL_CUDA_ON_CPU_SEED", argv[i + 1], 1);
      dup2(STDOUT_FILENO, STDERR_FILENO);
      print_sums();
      std::exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    std::printf("status %d\n", WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
    std::fflush(stdout);
  }
}
