// Of cuda_on_cpu.h: threads as fibers, and what blocks and clusters of them are.
#pragma once
#include <vector_functions.h>
#include <vector_types.h>

#include <cstdint>
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

// How often some thread got on.
inline unsigned events = 0;

// Where in the program a thread waits. As a default argument, where its caller is.
struct Place {
  const char* file = "";
  int line = 0;

  static Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// Threads that wait for one another, and how often all of them have met.
struct Barrier {
  int live = 0, arrived = 0;
  unsigned rounds = 0;

  SLIM_UNSANITIZED void release_if_all() {
    if (live && arrived == live) {
      arrived = 0;
      ++rounds;
      ++events;
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

struct Cluster;

struct Block : Barrier {
  uint3 index;
  Cluster* cluster;
  std::vector<Warp> warps;
  std::shared_ptr<void> more;                 // what hopper_on_cpu.h keeps of it
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
  int index, lane;  // in its block, in its warp
  Block* block;
  Warp* warp;
  Place waits;  // where it did last
};

// A slot: blocks, neighbours along x, all alive at once, and then others.
struct Cluster : Barrier {
  int threads = 0;
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;  // as many, or more
};

inline std::vector<Cluster> resident;
inline void* scheduler;  // its stack pointer
inline Fiber* running = nullptr;
inline Block* here = nullptr;  // running's, or that the scheduler is at
inline std::function<void()> body;
inline dim3 block_size, grid_size;
inline size_t dynamic_bytes = 0;

// What further instructions need (hopper_on_cpu.h): to be told of a block's start and end, where a
// sentence is an error; to do something of what may still happen when no thread gets on. `here` is
// the block.
inline std::function<void(int threads)> at_start;
inline std::function<std::string()> at_end;
inline std::function<bool()> when_idle;
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
  here = fiber->block;
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
  ++events;
  for (Barrier* barrier :
       {static_cast<Barrier*>(running->block->cluster), static_cast<Barrier*>(running->block),
        static_cast<Barrier*>(running->warp)}) {
    --barrier->live;
    barrier->release_if_all();
  }
  yield();
}

SLIM_UNSANITIZED inline void wait(Barrier& barrier, Place place = Place::here()) {
  const unsigned round = barrier.rounds;
  running->waits = place;
  ++barrier.arrived;
  barrier.release_if_all();
  while (round == barrier.rounds) yield();
}

inline void start_thread(Fiber& fiber, Block& block, int index) {
  if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
  fiber.block = &block;
  fiber.warp = &block.warps[index / 32];
  fiber.index = index;
  fiber.lane = index % 32;
  fiber.waits = {};
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

}  // namespace cuda_on_cpu
