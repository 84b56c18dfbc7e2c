// Runs simple CUDA C++ kernels on the CPU, compiled by g++: one block at a time, one fiber a
// thread.
//
// Covers thread and block indices, __syncthreads, warp shuffles, static shared memory, launches and
// the 16-bit types of the toolkit's own headers; not inline PTX, wgmma, TMA, cp.async or clusters.
// Finds wrong maths and indices, barriers that some threads never reach and, under
// AddressSanitizer, accesses out of bounds. Memory is sequential, so a missing barrier shows only
// if the order of the threads matters: run both orders (CUDA_ON_CPU_ORDER=reverse) and compare.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <ucontext.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#undef __shared__
#define __shared__ static
#undef __global__
#define __global__
#undef __launch_bounds__
#define __launch_bounds__(...)
#define __restrict__ __restrict

namespace cuda_on_cpu {

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done = true;
  uint3 thread;
  int index;  // in the block
};

// Threads that wait for one another, and how often all of them have met.
struct Barrier {
  int live = 0, arrived = 0;
  unsigned rounds = 0;

  void release_if_all() {
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

inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline Barrier block;
inline ucontext_t scheduler;
inline int current = 0;
inline std::function<void()> body;
inline uint3 block_index;
inline dim3 block_size, grid_size;

// AddressSanitizer must be told of every change of stack.
inline void* scheduler_fake_stack = nullptr;
inline const void* scheduler_stack = nullptr;
inline size_t scheduler_stack_size = 0;

inline Fiber& me() { return fibers[current]; }
inline Warp& my_warp() { return warps[me().index / 32]; }
inline int lane() { return me().index % 32; }

inline void yield() {
  Fiber& fiber = me();
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack;
  __sanitizer_start_switch_fiber(fiber.done ? nullptr : &fake_stack, scheduler_stack,
                                 scheduler_stack_size);
  swapcontext(&fiber.context, &scheduler);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#else
  swapcontext(&fiber.context, &scheduler);
#endif
}

inline void resume(int index) {
  current = index;
#if defined(__SANITIZE_ADDRESS__)
  std::vector<char>& stack = fibers[index].stack;
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, stack.data(), stack.size());
  swapcontext(&scheduler, &fibers[index].context);
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#else
  swapcontext(&scheduler, &fibers[index].context);
#endif
}

inline void run_thread() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  body();
  me().done = true;
  for (Barrier* barrier : {&block, static_cast<Barrier*>(&my_warp())}) {
    --barrier->live;
    barrier->release_if_all();
  }
  yield();
}

inline void wait(Barrier& barrier) {
  const unsigned round = barrier.rounds;
  ++barrier.arrived;
  barrier.release_if_all();
  while (round == barrier.rounds) yield();
}

inline int start_block() {
  const int threads = block_size.x * block_size.y * block_size.z;
  if (int(fibers.size()) < threads) fibers.resize(threads);
  warps.assign((threads + 31) / 32, Warp());
  block = Barrier();
  block.live = threads;
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.stack.resize(128 << 10);
    fiber.index = i;
    const int row = i / block_size.x;
    fiber.thread = make_uint3(i % block_size.x, row % block_size.y, row / block_size.y);
    fiber.done = false;
    ++warps[i / 32].live;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_thread, 0);
  }
  return threads;
}

// A number that changes whenever some thread got on.
inline unsigned progress() {
  unsigned total = block.rounds - block.live;
  for (const Warp& warp : warps) total += warp.rounds;
  return total;
}

inline void run_block() {
  const char* order = std::getenv("CUDA_ON_CPU_ORDER");
  const bool reverse = order && !std::strcmp(order, "reverse");
  const int threads = start_block();
  for (int idle = 0; block.live;) {
    const unsigned before = progress();
    for (int k = 0; k < threads; ++k) {
      const int i = reverse ? threads - 1 - k : k;
      if (!fibers[i].done) resume(i);
    }
    idle = progress() == before ? idle + 1 : 0;
    if (idle > 4)
      throw std::runtime_error("deadlock: some threads never reach the barrier others wait at");
  }
}

template <typename Kernel, typename... Args>
void launch(Kernel kernel, dim3 grid, dim3 threads, Args... args) {
  grid_size = grid;
  block_size = threads;
  body = [=] { kernel(args...); };
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        block_index = make_uint3(x, y, z);
        run_block();
      }
}

// Every live thread of the warp takes part, and gets the value of lane `source`.
template <typename T>
T exchange(T value, int source) {
  static_assert(sizeof(T) <= 16, "");
  Warp& warp = my_warp();
  auto& slots = warp.slots[warp.rounds % 2];
  std::memcpy(slots[lane()], &value, sizeof(T));
  wait(warp);
  std::memcpy(&value, slots[source], sizeof(T));
  return value;
}

}  // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::me().thread)
#define blockIdx cuda_on_cpu::block_index
#define blockDim cuda_on_cpu::block_size
#define gridDim cuda_on_cpu::grid_size

inline void __syncthreads() { cuda_on_cpu::wait(cuda_on_cpu::block); }
inline void __syncwarp(unsigned = ~0u) { cuda_on_cpu::wait(cuda_on_cpu::my_warp()); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int lane_mask) {
  return cuda_on_cpu::exchange(value, cuda_on_cpu::lane() ^ lane_mask);
}
template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  return cuda_on_cpu::exchange(value, source);
}
