// Runs CUDA kernel bodies on the CPU, for tests: the .cu files compiled by g++, one fiber for each thread of a block.
//
// Blocks run one after another in a shuffled order. Within a block a thread runs until it waits (at a barrier, in a warp
// collective) or returns; which thread is next is drawn at random. So a result that depends on the order of threads or
// blocks changes from launch to launch, and a missing barrier shows as a wrong result. What is no valid program is an
// error that says where: threads at different barriers or returned before one, shuffles of lanes that have returned or
// that the mask leaves out, waiting for each other. Shared memory is new for each block, filled with a pattern that
// reads as NaN, and every array of it is a heap object of its own: AddressSanitizer sees what runs over its end. Beside
// dynamic shared memory a kernel declares no more than its launch reckons with.
//
// Not modelled: races that no order of whole runs between barriers shows, memory coalescing, anything asynchronous.
#pragma once

#if !defined(__x86_64__)
#error "cuda_on_cpu.h switches fibers by x86-64 instructions"
#endif

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <source_location>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace cuda_on_cpu {

using Where = std::source_location;

constexpr unsigned kWarp = 32;
constexpr size_t kPage = 4096, kStack = size_t(128) << 10;  // of a fiber; the page below it is a guard
constexpr unsigned char kPoison = 0xFF;  // NaN in every floating type, -1 in every integer type

enum class State { ready, at_barrier, in_collective, returned };
enum class Collective { shuffle, ballot, barrier };

struct Thread {
  dim3 index;
  unsigned linear = 0;
  State state = State::ready;
  Where where;               // of the barrier or collective it waits at
  int vote = 0, result = 0;  // of __syncthreads_count and its like
  Collective collective = Collective::barrier;
  unsigned mask = 0, source = 0;     // lanes of the collective, and the one that a shuffle reads
  uint64_t given = 0, received = 0;  // by a collective
  void* stack_pointer = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

// The lanes of a warp that wait in a collective and those that have returned, a bit each.
struct Warp {
  unsigned waiting = 0, returned = 0;
};

// The stacks of 1024 fibers; kept, since making them takes longer than most launches.
class Stacks {
 public:
  Stacks() {
    const size_t bytes = kCount * (kStack + kPage);
    memory_ = static_cast<char*>(
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (memory_ == MAP_FAILED) throw std::runtime_error("cuda_on_cpu: no memory for stacks");
    for (size_t i = 0; i < kCount; ++i) mprotect(memory_ + i * (kStack + kPage), kPage, PROT_NONE);
  }
  char* bottom(size_t i) const { return memory_ + i * (kStack + kPage) + kPage; }
  // After an error: threads that never returned have left their variables' red zones behind.
  void clean() const {
#if defined(__SANITIZE_ADDRESS__)
    for (size_t i = 0; i < kCount; ++i) __asan_unpoison_memory_region(bottom(i), kStack);
#endif
  }

 private:
  static constexpr size_t kCount = 1024;
  char* memory_;
};

inline const Stacks& stacks() {
  static const Stacks all;
  return all;
}

// One array of shared memory, poisoned.
struct SharedArray {
  const void* key;
  std::unique_ptr<void, void (*)(void*)> memory;

  SharedArray(const void* key, size_t bytes)
      : key(key), memory(std::aligned_alloc(16, (bytes + 15) / 16 * 16), std::free) {
    std::memset(memory.get(), kPoison, bytes);
#if defined(__SANITIZE_ADDRESS__)
    const size_t slack = (bytes + 15) / 16 * 16 - bytes;
    if (slack) __asan_poison_memory_region(static_cast<char*>(memory.get()) + bytes, slack);
#endif
  }
};

class Block;
inline thread_local Block* running = nullptr;

extern "C" void cuda_on_cpu_switch(void** save, void* to);
asm(R"(
  .pushsection .text
  .weak cuda_on_cpu_switch
  .type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
  .popsection
)");

class Block {
 public:
  Block(dim3 grid, dim3 size, size_t shared_bytes, size_t most_static, const std::function<void()>& body,
        std::mt19937& random, bool shuffled)
      : grid(grid),
        size(size),
        threads_(size.x * size.y * size.z),
        warps_((threads_.size() + kWarp - 1) / kWarp),
        shared_bytes_(shared_bytes),
        most_static_(most_static),
        body_(body),
        random_(random),
        shuffled_(shuffled) {}

  dim3 grid, size, index;

  void run(dim3 block) {
    index = block;
    arrays_.clear();
    static_bytes_ = 0;
    error_ = nullptr;
    runnable_.clear();
    live_ = threads_.size();
    std::fill(warps_.begin(), warps_.end(), Warp{});
    for (unsigned i = 0; i < threads_.size(); ++i) start(i);
    running = this;
    while (live_ && !error_) {
      if (runnable_.empty()) {
        release_barrier();
      } else {
        enter(next());
      }
    }
    running = nullptr;
    arrays_.clear();
    if (!error_) return;
    stacks().clean();
    std::rethrow_exception(error_);
  }

  Thread& current() const { return *current_; }

  // The array that `key` stands for; the first thread to ask makes it.
  void* shared_array(const void* key, size_t bytes) {
    for (SharedArray& array : arrays_)
      if (array.key == key) return array.memory.get();
    if (key != &shared_bytes_) static_bytes_ += (bytes + 15) / 16 * 16;
    if (shared_bytes_ && static_bytes_ > most_static_)
      fail("static shared memory of " + std::to_string(static_bytes_) + " bytes beside dynamic, at most " +
           std::to_string(most_static_) + " are reckoned with");
    return arrays_.emplace_back(key, bytes).memory.get();
  }
  void* dynamic_shared() {
    if (!shared_bytes_) fail("dynamic shared memory, but the launch asks for none");
    return shared_array(&shared_bytes_, shared_bytes_);
  }

  int barrier(int vote, const Where& where) {
    Thread& t = current();
    t.vote = vote;
    wait(State::at_barrier, where);
    return t.result;
  }

  // `given` of every lane in `mask` comes together; returns what this lane receives.
  uint64_t collective(unsigned mask, Collective kind, uint64_t given, unsigned source, const Where& where) {
    Thread& t = current();
    if (!(mask & bit(t))) fail("warp collective: the own lane is not in the mask", where);
    t.mask = mask, t.collective = kind, t.given = given, t.source = source;
    if (all_arrived(t, where)) {
      exchange(t, where);
    } else {
      warp_of(t).waiting |= bit(t);
      wait(State::in_collective, where);
    }
    return t.received;
  }

  [[noreturn]] void fail(const std::string& what, const Where& where = {}) const {
    std::ostringstream text;
    text << "cuda_on_cpu: " << what << " [block (" << index.x << ',' << index.y << ',' << index.z << ')';
    if (current_)
      text << " thread (" << current_->index.x << ',' << current_->index.y << ',' << current_->index.z << ')';
    text << ']';
    if (where.line()) text << " at " << place(where);
    throw std::runtime_error(text.str());
  }

 private:
  static std::string place(const Where& where) {
    const std::string file = where.file_name();
    return file.substr(file.rfind('/') + 1) + ':' + std::to_string(where.line());
  }

  void start(unsigned i) {
    Thread& t = threads_[i] = Thread{};
    t.linear = i;
    t.index = dim3(i % size.x, i / size.x % size.y, i / size.x / size.y);
    // the stack as cuda_on_cpu_switch leaves one: six registers, then where to go on
    void** top = reinterpret_cast<void**>(stacks().bottom(i) + kStack) - 1;
    *--top = reinterpret_cast<void*>(&entry);
    top -= 6;
    std::memset(top, 0, 6 * sizeof(void*));
    t.stack_pointer = top;
    runnable_.push_back(&t);
  }

  Thread* next() {
    size_t i = shuffled_ ? random_() % runnable_.size() : 0;
    Thread* t = runnable_[i];
    if (shuffled_) {
      runnable_[i] = runnable_.back();
      runnable_.pop_back();
    } else {
      runnable_.erase(runnable_.begin());
    }
    return t;
  }

  void enter(Thread* t) {
    current_ = t;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&own_fake_stack_, stacks().bottom(t->linear), kStack);
#endif
    cuda_on_cpu_switch(&own_stack_pointer_, t->stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(own_fake_stack_, nullptr, nullptr);
#endif
    current_ = nullptr;
  }

  void leave(bool forever) {
    Thread& t = current();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(forever ? nullptr : &t.fake_stack, own_stack_, own_stack_size_);
#endif
    cuda_on_cpu_switch(&t.stack_pointer, own_stack_pointer_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(t.fake_stack, nullptr, nullptr);
#endif
    (void)forever;
  }

  void wait(State state, const Where& where) {
    current().state = state;
    current().where = where;
    leave(false);
  }

  static void entry() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &running->own_stack_, &running->own_stack_size_);
#endif
    running->run_thread();
    running->leave(true);
    __builtin_unreachable();
  }
  void run_thread() {
    try {
      body_();
    } catch (...) {
      if (!error_) error_ = std::current_exception();
    }
    current().state = State::returned;
    warp_of(current()).returned |= bit(current());
    --live_;
  }

  // No thread can run: all that are left stand at one barrier, or the program is wrong.
  void release_barrier() {
    const Thread* first = nullptr;
    int votes = 0;
    try {
      for (const Thread& t : threads_) {
        if (t.state == State::in_collective) fail_waiting(t);
        if (t.state != State::at_barrier) continue;
        if (first && (t.where.line() != first->where.line() || t.where.column() != first->where.column()))
          fail("divergent barrier: threads wait at " + place(first->where) + " and at " + place(t.where));
        first = &t;
        votes += t.vote != 0;
      }
      if (live_ != threads_.size())
        fail("divergent barrier: " + std::to_string(live_) + " of " + std::to_string(threads_.size()) +
                 " threads reached it, the others have returned",
             first->where);
    } catch (...) {
      error_ = std::current_exception();
      return;
    }
    for (Thread& t : threads_) {
      t.result = votes;
      t.state = State::ready;
      runnable_.push_back(&t);
    }
  }

  [[noreturn]] void fail_waiting(const Thread& t) {
    each_lane(t, [&](const Thread& other) {
      if (other.state == State::returned)
        fail("warp collective: the mask names a lane that has returned", t.where);
      if (other.state == State::in_collective && !together(other, t))
        fail("warp collective: lanes disagree on the mask or the operation", t.where);
    });
    fail("deadlock: a thread waits in a warp collective for lanes that never come", t.where);
  }

  static unsigned bit(const Thread& t) { return 1u << t.linear % kWarp; }
  Warp& warp_of(const Thread& t) { return warps_[t.linear / kWarp]; }

  template <class F>
  void each_lane(const Thread& of, const F& f) {
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if (!(of.mask >> lane & 1)) continue;
      const unsigned i = of.linear / kWarp * kWarp + lane;
      if (i >= threads_.size()) fail("warp collective: the mask names lanes past the end of the block");
      f(threads_[i]);
    }
  }

  static bool together(const Thread& a, const Thread& b) {
    return a.state == State::in_collective && a.mask == b.mask && a.collective == b.collective;
  }

  // Lanes that wait in another collective are still to come here: only if nobody can run any more do they disagree.
  bool all_arrived(const Thread& t, const Where& where) {
    const Warp& warp = warp_of(t);
    if (t.mask & warp.returned) fail("warp collective: the mask names a lane that has returned", where);
    if (t.mask & ~warp.waiting & ~bit(t)) return false;
    bool all = true;
    each_lane(t, [&](const Thread& other) { all &= &other == &t || together(other, t); });
    return all;
  }

  void exchange(Thread& t, const Where& where) {
    uint64_t ballot = 0;
    warp_of(t).waiting &= ~t.mask;
    each_lane(t, [&](const Thread& o) { ballot |= uint64_t(o.given != 0) << o.linear % kWarp; });
    each_lane(t, [&](Thread& o) {
      if (o.collective != Collective::shuffle) {
        o.received = ballot;
        return;
      }
      if (!(t.mask >> o.source & 1)) fail("shuffle reads a lane that the mask leaves out", where);
      o.received = threads_[t.linear / kWarp * kWarp + o.source].given;
    });
    each_lane(t, [&](Thread& o) {
      o.state = State::ready;
      if (&o != &t) runnable_.push_back(&o);
    });
  }

  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<Thread*> runnable_;
  std::vector<SharedArray> arrays_;
  size_t shared_bytes_, most_static_, static_bytes_ = 0, live_ = 0;
  const std::function<void()>& body_;
  std::mt19937& random_;
  bool shuffled_;
  std::exception_ptr error_;
  Thread* current_ = nullptr;
  void *own_stack_pointer_ = nullptr, *own_fake_stack_ = nullptr;
  const void* own_stack_ = nullptr;
  size_t own_stack_size_ = 0;
};

inline long setting(const char* name, long otherwise) {
  const char* text = std::getenv(name);
  return text ? std::atol(text) : otherwise;
}

// How many kernels have been launched, for tests that ask the module.
inline std::atomic<long> launched{0};
extern "C" __attribute__((weak, used, visibility("default"))) long cuda_on_cpu_launched() { return launched; }

// Every launch draws another order from PSSL_CUDA_ON_CPU_SEED; 0 leaves threads and blocks in theirs. `most_static`: shared
// memory that the kernel may declare beside `shared_bytes`.
inline void launch(dim3 grid, dim3 block, size_t shared_bytes, size_t most_static,
                   const std::function<void()>& body) {
  static thread_local unsigned launches = 0;
  const unsigned seed = unsigned(setting("PSSL_CUDA_ON_CPU_SEED", 1));
  std::mt19937 random(seed * 7919u + launches++);
  const size_t threads = size_t(block.x) * block.y * block.z, blocks = size_t(grid.x) * grid.y * grid.z;
  if (threads == 0 || threads > 1024 || blocks == 0 || grid.y > 65535 || grid.z > 65535)
    throw std::runtime_error("cuda_on_cpu: a launch of " + std::to_string(blocks) + " blocks of " +
                             std::to_string(threads) + " threads");
  if (running) throw std::runtime_error("cuda_on_cpu: a launch within a kernel");
  ++launched;
  std::vector<size_t> order(blocks);
  for (size_t i = 0; i < blocks; ++i) order[i] = i;
  if (seed) std::shuffle(order.begin(), order.end(), random);
  Block one(grid, block, shared_bytes, most_static, body, random, seed != 0);
  for (size_t i : order)
    one.run(dim3(unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)));
}

inline unsigned lane() { return running->current().linear % kWarp; }

template <class T>
T shuffle(unsigned mask, T value, int source, const Where& where) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = running->collective(mask, Collective::shuffle, bits, unsigned(source) % kWarp, where);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The lane `source` where it is in this lane's group of `width`, else this lane.
inline int within(int source, int width) {
  const int own = int(lane()), group = own & ~(width - 1);
  return source >= group && source < group + width ? source : own;
}

}  // namespace cuda_on_cpu

#include "cuda_on_cpu_builtins.h"
