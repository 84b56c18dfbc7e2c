// Runs simple CUDA C++ kernels on the CPU, compiled by g++: one cluster of blocks at a time, or as
// many as CUDA_ON_CPU_RESIDENT says, each in its slot until it is done; one fiber a thread.
//
// Covers thread and block indices, __syncthreads, warp shuffles, shared memory static and dynamic,
// clusters (barrier, each other's shared memory), launches and the 16-bit types of the toolkit's
// own headers; not inline PTX, wgmma, TMA or cp.async. Finds wrong maths and indices, barriers that
// some threads never reach and, under AddressSanitizer, accesses out of bounds: every shared array
// has an allocation of its own, full of NaN. Memory is sequential, so a missing barrier shows only
// if the order of the threads matters: run both orders (CUDA_ON_CPU_ORDER=reverse) and compare. It
// is the order of blocks, too. Blocks that wait for one another (through atomics and turns in
// global memory) must do so among those that are there: else it is a deadlock, reported with the
// places in the program where threads wait.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#undef __shared__
#define __shared__ please_write_SHARED_ARRAY
#undef __global__
#define __global__
#undef __launch_bounds__
#define __launch_bounds__(...)
#define __restrict__ __restrict

#include "cuda_on_cpu_fibers.h"

namespace cuda_on_cpu {

inline bool is_reverse() {
  const char* order = std::getenv("CUDA_ON_CPU_ORDER");
  return order && !std::strcmp(order, "reverse");
}

// The n-th cluster of the grid.
inline void start_cluster(Cluster& cluster, size_t n, int size) {
  const size_t row = n * size / grid_size.x;
  const int threads = block_size.x * block_size.y * block_size.z;
  static_cast<Barrier&>(cluster) = Barrier();
  cluster.live = cluster.threads = size * threads;
  if (int(cluster.fibers.size()) < cluster.threads) cluster.fibers.resize(cluster.threads);
  cluster.blocks.clear();
  cluster.blocks.resize(size);
  for (int b = 0; b < size; ++b) {
    Block& block = cluster.blocks[b];
    block.index = make_uint3(n * size % grid_size.x + b, row % grid_size.y, row / grid_size.y);
    block.cluster = &cluster;
    block.live = threads;
    block.warps.resize((threads + 31) / 32);
    for (int i = 0; i < threads; ++i) {
      start_thread(cluster.fibers[b * threads + i], block, i);
      ++block.warps[i / 32].live;
    }
    here = &block;
    if (at_start) at_start(threads);
  }
}

// Runs every thread of the cluster up to where it waits.
SLIM_UNSANITIZED inline void pass(Cluster& cluster, bool reverse) {
  for (int k = 0; k < cluster.threads && failure.empty(); ++k) {
    Fiber* fiber = &cluster.fibers[reverse ? cluster.threads - 1 - k : k];
    if (!fiber->done) resume(fiber, fiber->stack.get());
  }
}

// How many threads wait, and where.
inline std::string deadlock() {
  std::map<std::string, int> places;
  for (const Cluster& cluster : resident)
    for (int i = 0; i < cluster.threads; ++i) {
      const Fiber& fiber = cluster.fibers[i];
      if (fiber.done) continue;
      ++places[std::string(fiber.waits.file) + ":" + std::to_string(fiber.waits.line)];
    }
  std::string sentence = "deadlock: some threads never reach the barrier others wait at";
  for (const auto& [place, count] : places)
    sentence += ", " + std::to_string(count) + " at " + place;
  return sentence;
}

inline void end_cluster(Cluster& cluster) {
  for (Block& block : cluster.blocks) {
    here = &block;
    if (at_end && failure.empty()) failure = at_end();
  }
}

// What came last first: where a block should have waited for another, it is late.
inline bool do_late(bool reverse) {
  const size_t slots = resident.size();
  for (size_t i = 0; i < slots; ++i) {
    Cluster& cluster = resident[reverse ? i : slots - 1 - i];
    for (Block& block : cluster.blocks) {
      here = &block;
      if (cluster.live && when_idle && when_idle()) return true;
    }
  }
  return false;
}

// All clusters of the grid, each in the slot that is free next.
inline void run_grid(int cluster_size) {
  const char* wanted = std::getenv("CUDA_ON_CPU_RESIDENT");
  const size_t all = size_t(grid_size.x) * grid_size.y * grid_size.z / cluster_size;
  const size_t slots = std::min(all, size_t(wanted ? std::atoi(wanted) : 1));
  const bool reverse = is_reverse();
  size_t started = 0, left = all;
  const auto start = [&](Cluster& cluster) {
    if (started == all) return;
    start_cluster(cluster, reverse ? all - 1 - started : started, cluster_size);
    ++started;
  };
  failure.clear();
  if (resident.size() != slots) resident = std::vector<Cluster>(slots);
  for (Cluster& cluster : resident) start(cluster);
  bool backwards = false;  // in reverse, those that began last go on first
  for (int idle = 0; left; backwards = reverse) {
    const unsigned before = events;
    for (size_t i = 0; i < slots && failure.empty(); ++i) {
      Cluster& cluster = resident[backwards ? slots - 1 - i : i];
      if (!cluster.live) continue;
      pass(cluster, reverse);
      if (cluster.live || !failure.empty()) continue;
      end_cluster(cluster);
      --left;
      start(cluster);
    }
    idle = events == before ? idle + 1 : 0;
    if (idle > 1 && do_late(reverse)) idle = 0;
    if (idle > 4 && failure.empty()) failure = deadlock();
    if (!failure.empty()) throw std::runtime_error(failure);
  }
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
  run_grid(cluster_size);
}

template <typename T>
T* shared_array(const void* site, size_t n) {
  return reinterpret_cast<T*>(running->block->array(site, n * sizeof(T)));
}

template <typename T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(here->array(&dynamic_bytes, dynamic_bytes));
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

inline void __syncthreads(cuda_on_cpu::Place place = cuda_on_cpu::Place::here()) {
  cuda_on_cpu::wait(*cuda_on_cpu::running->block, place);
}
inline void __syncwarp(unsigned = ~0u, cuda_on_cpu::Place place = cuda_on_cpu::Place::here()) {
  cuda_on_cpu::wait(*cuda_on_cpu::running->warp, place);
}

inline int atomicAdd(int* at, int more) {
  ++cuda_on_cpu::events;
  return (*at += more) - more;
}

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
inline float __fdividef(float x, float y) { return x / y; }

namespace slimkernels {

inline void cluster_barrier(cuda_on_cpu::Place place = cuda_on_cpu::Place::here()) {
  cuda_on_cpu::wait(*cuda_on_cpu::running->block->cluster, place);
}

// The same array of another block of the cluster, which may not have come to declare it yet.
template <typename T>
T* map_shared_rank(T* shared, int rank) {
  const auto* address = reinterpret_cast<const unsigned char*>(shared);
  for (auto& [site, array] : cuda_on_cpu::running->block->arrays) {
    const ptrdiff_t offset = address - array.bytes.get();
    if (offset >= 0 && size_t(offset) < array.size)
      return reinterpret_cast<T*>(
          cuda_on_cpu::here->cluster->blocks.at(rank).array(site, array.size) + offset);
  }
  throw std::runtime_error("map_shared_rank: not an address of shared memory");
}

// A kernel on the CPU throws where a launch fails.
struct DeviceGuard {
  explicit DeviceGuard(int) {}
};
inline void check_launch(const char*, int64_t, int64_t) {}

}  // namespace slimkernels
