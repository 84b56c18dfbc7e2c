// Runs simple CUDA C++ kernels on the CPU, compiled by g++: one cluster of blocks at a time, one
// fiber a thread.
//
// Covers thread and block indices, __syncthreads, warp shuffles, shared memory static and dynamic,
// clusters (barrier, each other's shared memory), launches and the 16-bit types of the toolkit's
// own headers; not inline PTX, wgmma, TMA or cp.async. Finds wrong maths and indices, barriers that
// some threads never reach and, under AddressSanitizer, accesses out of bounds: every shared array
// has an allocation of its own, full of NaN. Memory is sequential, so a missing barrier shows only
// if the order of the threads matters: run both orders (CUDA_ON_CPU_ORDER=reverse) and compare.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#undef __shared__
#define __shared__ please_write_SHARED_ARRAY
#undef __global__
#define __global__
#undef __launch_bounds__
#define __launch_bounds__(...)
#define __restrict__ __restrict

// Keeps this stack's registers on it and its pointer in *from, and goes on where `to` was kept. Not
// swapcontext, which asks the kernel for signal masks and AddressSanitizer for a clean stack.
extern "C" void slim_switch_stack(void** from, void* to);
asm(R"(
  .text
  .hidden slim_switch_stack
  .globl slim_switch_stack
slim_switch_stack:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");

namespace cuda_on_cpu {

constexpr size_t kStackBytes = 64 << 10;

// The scheduler itself is not under test, and runs for every instruction that waits.
#define SLIM_UNSANITIZED __attribute__((no_sanitize("address", "undefined")))

// Threads that wait for one another, and how often all of them have met.
struct Barrier {
  int live = 0, arrived = 0;
  unsigned rounds = 0;

  SLIM_UNSANITIZED void release_if_all() {
    if (live && arrived == live) {
      arrived = 0;
      ++rounds;
    }
  }
};

struct Warp : Barrier {
  // Two sets of slots: a fast thread may write the next exchange while others read the last.
  unsigned char slots[2][32][16];
};

// One allocation an array, so that AddressSanitizer sees an access that leaves it.
struct SharedArray {
  std::unique_ptr<unsigned char[]> bytes;
  size_t size;
};

struct Block : Barrier {
  uint3 index;
  std::vector<Warp> warps;
  std::map<const void*, SharedArray> arrays;  // by the place in the program that declares it

  unsigned char* array(const void* site, size_t size) {
    SharedArray& array = arrays[site];
    if (!array.bytes) {
      // What nobody has written is NaN.
      array = {std::unique_ptr<unsigned char[]>(new unsigned char[size]), size};
      std::memset(array.bytes.get(), 0xff, size);
    }
    return array.bytes.get();
  }
};

struct Fiber {
  void* stack_pointer;
  std::unique_ptr<char[]> stack;
  bool done = true;
  uint3 thread;
  int lane;
  Block* block;
  Warp* warp;
};

inline std::vector<Fiber> fibers;
inline std::vector<Block> blocks;  // of the cluster that runs
inline Barrier cluster;
inline void* scheduler;  // its stack pointer
inline Fiber* running = nullptr;
inline std::function<void()> body;
inline dim3 block_size, grid_size;
inline size_t dynamic_bytes = 0;

// What further instructions need (hopper_on_cpu.h): to be told of a block's start and end, where a
// sentence is an error; to do what may still happen when no thread gets on; to count what got on.
inline std::function<void(int threads)> at_start;
inline std::function<std::string()> at_end;
inline std::function<bool()> when_idle;
inline unsigned events = 0;
inline std::string failure;
inline bool in_fiber = false;

// AddressSanitizer must be told of every change of stack.
inline void* scheduler_fake_stack = nullptr;
inline const void* scheduler_stack = nullptr;
inline size_t scheduler_stack_size = 0;

SLIM_UNSANITIZED inline void yield() {
  Fiber& fiber = *running;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack;
  __sanitizer_start_switch_fiber(fiber.done ? nullptr : &fake_stack, scheduler_stack,
                                 scheduler_stack_size);
  slim_switch_stack(&fiber.stack_pointer, scheduler);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#else
  slim_switch_stack(&fiber.stack_pointer, scheduler);
#endif
}

SLIM_UNSANITIZED inline void resume(Fiber* fiber, void* stack) {
  running = fiber;
  in_fiber = true;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, stack, kStackBytes);
  slim_switch_stack(&scheduler, fiber->stack_pointer);
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#else
  slim_switch_stack(&scheduler, fiber->stack_pointer);
#endif
  in_fiber = false;
}

// An error of the kernel's: a thread stops here, since a fiber cannot throw, and the launch does.
[[noreturn]] inline void fail(const std::string& sentence) {
  if (!in_fiber) throw std::runtime_error(sentence);
  if (failure.empty()) failure = sentence;
  for (;;) yield();
}

inline void run_thread() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  body();
  running->done = true;
  for (Barrier* barrier :
       {&cluster, static_cast<Barrier*>(running->block), static_cast<Barrier*>(running->warp)}) {
    --barrier->live;
    barrier->release_if_all();
  }
  yield();
}

SLIM_UNSANITIZED inline void wait(Barrier& barrier) {
  const unsigned round = barrier.rounds;
  ++barrier.arrived;
  barrier.release_if_all();
  while (round == barrier.rounds) yield();
}

inline void start_thread(Fiber& fiber, Block& block, int index) {
  if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
  fiber.block = &block;
  fiber.warp = &block.warps[index / 32];
  fiber.lane = index % 32;
  const int row = index / block_size.x;
  fiber.thread = make_uint3(index % block_size.x, row % block_size.y, row / block_size.y);
  fiber.done = false;
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(fiber.stack.get(), kStackBytes);  // of frames that never returned
#endif
  // As slim_switch_stack leaves one: six registers and where to go on, which nobody returns from.
  void** top = reinterpret_cast<void**>(fiber.stack.get() + kStackBytes) - 1;
  *top = nullptr;
  *--top = reinterpret_cast<void*>(&run_thread);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
}

// The blocks from `first` on, neighbours along x, all alive at once.
inline void start_cluster(uint3 first, int cluster_size) {
  const int threads = block_size.x * block_size.y * block_size.z;
  if (int(fibers.size()) < cluster_size * threads) fibers.resize(cluster_size * threads);
  blocks.clear();
  blocks.resize(cluster_size);
  cluster = Barrier();
  cluster.live = cluster_size * threads;
  for (int b = 0; b < cluster_size; ++b) {
    blocks[b].index = make_uint3(first.x + b, first.y, first.z);
    blocks[b].live = threads;
    blocks[b].warps.resize((threads + 31) / 32);
    for (int i = 0; i < threads; ++i) {
      start_thread(fibers[b * threads + i], blocks[b], i);
      ++blocks[b].warps[i / 32].live;
    }
  }
}

// A number that changes whenever some thread got on.
inline unsigned progress() {
  unsigned total = events + cluster.rounds - cluster.live;
  for (const Block& block : blocks) {
    total += block.rounds;
    for (const Warp& warp : block.warps) total += warp.rounds;
  }
  return total;
}

// Runs every thread up to where it waits.
SLIM_UNSANITIZED inline void pass(Fiber* first, int threads, bool reverse) {
  for (int k = 0; k < threads && failure.empty(); ++k) {
    Fiber* fiber = first + (reverse ? threads - 1 - k : k);
    if (!fiber->done) resume(fiber, fiber->stack.get());
  }
}

inline void run_cluster() {
  const char* order = std::getenv("CUDA_ON_CPU_ORDER");
  const bool reverse = order && !std::strcmp(order, "reverse");
  const int threads = cluster.live;
  failure.clear();
  if (at_start) at_start(threads);
  for (int idle = 0; cluster.live;) {
    const unsigned before = progress();
    pass(fibers.data(), threads, reverse);
    idle = progress() == before ? idle + 1 : 0;
    if (idle > 1 && when_idle && when_idle()) idle = 0;
    if (idle > 4) failure = "deadlock: some threads never reach the barrier others wait at";
    if (!failure.empty()) throw std::runtime_error(failure);
  }
  if (at_end) failure = at_end();
  if (!failure.empty()) throw std::runtime_error(failure);
}

inline void check_launch(dim3 grid, dim3 threads, int cluster_size, size_t shared_bytes) {
  const size_t count = size_t(threads.x) * threads.y * threads.z;
  if (!count || count > 1024) throw std::runtime_error("a block of 1 to 1024 threads is needed");
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
    throw std::runtime_error("the grid is empty or too large");
  if (cluster_size < 1 || cluster_size > 16 || grid.x % cluster_size)
    throw std::runtime_error("clusters of " + std::to_string(cluster_size) + " do not fill a grid");
  if (shared_bytes > 227 << 10) throw std::runtime_error("too much shared memory");
}

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 threads, int cluster_size,
            size_t shared_bytes, const void* stream, Args... args) {
  check_launch(grid, threads, cluster_size, shared_bytes);
  grid_size = grid;
  block_size = threads;
  dynamic_bytes = shared_bytes;
  body = [=] { kernel(Params(args)...); };
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; x += cluster_size) {
        start_cluster(make_uint3(x, y, z), cluster_size);
        run_cluster();
      }
}

template <typename T>
T* shared_array(const void* site, size_t n) {
  return reinterpret_cast<T*>(running->block->array(site, n * sizeof(T)));
}

template <typename T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(running->block->array(&dynamic_bytes, dynamic_bytes));
}

// Every live thread of the warp takes part, and gets the value of lane `source`.
template <typename T>
SLIM_UNSANITIZED T exchange(T value, int source) {
  static_assert(sizeof(T) <= 16, "");
  Warp& warp = *running->warp;
  auto& slots = warp.slots[warp.rounds % 2];
  std::memcpy(slots[running->lane], &value, sizeof(T));
  wait(warp);
  std::memcpy(&value, slots[source], sizeof(T));
  return value;
}

}  // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::running->thread)
#define blockIdx (cuda_on_cpu::running->block->index)
#define blockDim cuda_on_cpu::block_size
#define gridDim cuda_on_cpu::grid_size

inline void __syncthreads() { cuda_on_cpu::wait(*cuda_on_cpu::running->block); }
inline void __syncwarp(unsigned = ~0u) { cuda_on_cpu::wait(*cuda_on_cpu::running->warp); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int lane_mask) {
  return cuda_on_cpu::exchange(value, cuda_on_cpu::running->lane ^ lane_mask);
}
template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  return cuda_on_cpu::exchange(value, source);
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }

namespace slimkernels {

inline void cluster_barrier() { cuda_on_cpu::wait(cuda_on_cpu::cluster); }

// The same array of another block of the cluster, which may not have come to declare it yet.
template <typename T>
T* map_shared_rank(T* shared, int rank) {
  const auto* address = reinterpret_cast<const unsigned char*>(shared);
  for (auto& [site, array] : cuda_on_cpu::running->block->arrays) {
    const ptrdiff_t offset = address - array.bytes.get();
    if (offset >= 0 && size_t(offset) < array.size)
      return reinterpret_cast<T*>(cuda_on_cpu::blocks.at(rank).array(site, array.size) + offset);
  }
  throw std::runtime_error("map_shared_rank: not an address of shared memory");
}

// A kernel on the CPU throws where a launch fails.
struct DeviceGuard {
  explicit DeviceGuard(int) {}
};
inline void check_launch(const char*, int64_t, int64_t) {}

}  // namespace slimkernels
