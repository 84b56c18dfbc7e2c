// Hopper's own instructions (sm_90a), one function each: mbarriers, TMA, bulk copies, named
// barriers, setmaxnreg and, in wgmma.cuh, matrix products; and turns, which blocks take through
// global memory. Each names the heading of the PTX ISA that defines it.
//
// A kernel includes this file only. Compiled by g++, the same names come from
// tests/cuda_on_cpu/hopper_on_cpu.h, which does what those headings say to bytes of shared memory,
// so that kernels run unchanged on a CPU.
//
// Tiles in shared memory are PANELS: 64 columns of a 16-bit type, 128 bytes a row, rows following
// one another, each panel on a 1024-byte boundary. TMA writes a panel with 128-byte swizzle (the
// 16-byte chunk c of row r lies where chunk c ^ (r % 8) would), and wgmma undoes it.
#pragma once
#include <array>
#include <cstdint>
#include <type_traits>

#include "common.cuh"

#ifdef __CUDACC__
#include <cudaTypedefs.h>

// Code for other architectures has kernels that trap: backends/cuda refuses what would run them.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SLIM_HOPPER 1
#endif
#else
#include "hopper_on_cpu.h"
#define SLIM_HOPPER 1
#endif

namespace slimkernels {

constexpr int kWarpGroup = 128;    // threads that issue a wgmma together
constexpr int kPanelColumns = 64;  // of 16-bit elements
constexpr int kPanelRowBytes = 128;
constexpr int kPanelAlignment = 1024;  // where the swizzle's pattern starts

// Whether a block's producer and consumers ask setmaxnreg for no more registers than the launch
// gives it, whole steps of 8 a thread: it would wait for them forever.
constexpr bool fits_registers(int groups, int producer, int consumer) {
  const int threads = kWarpGroup * (groups + 1);
  return producer + groups * consumer <= 65536 / threads / 8 * 8 * (groups + 1);
}

// Bytes of a tile of `rows` by `columns` 16-bit elements, in panels.
__host__ __device__ constexpr int panel_bytes(int rows) { return rows * kPanelRowBytes; }
__host__ __device__ constexpr int tile_bytes(int rows, int columns) {
  return columns / kPanelColumns * panel_bytes(rows);
}

#ifdef __CUDACC__

using TensorMap = CUtensorMap;
using Mbarrier = uint64_t;

__device__ inline uint32_t shared_address(const void* pointer) {
  return uint32_t(__cvta_generic_to_shared(pointer));
}

// "Parallel Synchronization and Communication Instructions: mbarrier".

// The phase ends when `arrivals` have arrived and all bytes that were announced have come.
__device__ inline void mbarrier_init(Mbarrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// After the last mbarrier_init, by the thread that did it, before a barrier of the block.
__device__ inline void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void mbarrier_arrive(Mbarrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// Announces bytes, then arrives.
__device__ inline void mbarrier_arrive_expect(Mbarrier* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// Until the phase of this parity (the first has 0) has ended. On a new barrier, parity 1 has.
__device__ inline void mbarrier_wait(Mbarrier* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over;\n"
      "bra again;\n"
      "over:\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// "bar, barrier": named barriers.

// Of `threads` threads, a multiple of 32, that sync or arrive. Barrier 0 is __syncthreads'.
__device__ inline void named_barrier_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ inline void named_barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// "setmaxnreg".

// By every warp of a warpgroup. The kernel needs __launch_bounds__(threads, 1).
template <int kRegisters>
__device__ inline void registers_grow() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void registers_shrink() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// "membar, fence": fence.proxy.async.

// By each thread that wrote shared memory with ordinary stores, before the barrier behind which TMA
// or wgmma reads or overwrites it.
__device__ inline void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// An ordinary store of 16 bytes.
__device__ inline void store_shared(void* to, uint4 value) { *static_cast<uint4*>(to) = value; }

// "Data Movement and Conversion Instructions: cp.async.bulk.tensor".

__device__ inline void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// The box at coordinates c (innermost first) of the map's tensor, the bytes of which are reported
// to `barrier`; what lies outside the tensor is zero, and counts among them. One thread issues.
__device__ inline void tma_load(void* to, const TensorMap* map, Mbarrier* barrier, int c0, int c1,
                                int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}
__device__ inline void tma_load(void* to, const TensorMap* map, Mbarrier* barrier, int c0, int c1,
                                int c2, int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

// "cp.async.bulk", "cp.reduce.async.bulk": shared memory to global memory.

// `bytes`, a multiple of 16, from a boundary of 16 bytes to another. By one thread, which commits
// what it issued since as a group, and waits for its groups.
__device__ inline void bulk_store(float* to, const void* from, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(
                   __cvta_generic_to_global(to)),
               "r"(shared_address(from)), "r"(bytes)
               : "memory");
}
// Adds them, float by float.
__device__ inline void bulk_add(float* to, const void* from, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(
                   __cvta_generic_to_global(to)),
               "r"(shared_address(from)), "r"(bytes)
               : "memory");
}
__device__ inline void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until this thread's groups have read shared memory.
__device__ inline void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
// Until global memory has them, as far as this thread can see.
__device__ inline void bulk_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// "stmatrix".

// By a warp: four matrices of 8 rows of 16 bytes, which lie in `words` as in A's registers. Lane l
// brings the address of row l % 8 of matrix l / 8.
__device__ inline void store_matrices(void* row, const uint32_t (&words)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
      "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
      : "memory");
}

// Turns: a count in global memory, which blocks wait for and increase. "ld", "red", and "membar,
// fence" for the proxy fences: bulk copies are of another proxy than these two. Of global memory
// alone, since a fence of all spaces is a membar more on the way from turn to turn.

// A minute and more: only a call that is wrong (cu_seqlens that go down) waits as long, and it ends
// in an error.
constexpr unsigned kMostPolls = 1u << 27;

// Until `turn` others have passed; what they had bulk_wait()ed for lies before our bulk copies.
__device__ inline void wait_turn(const int* passed, int turn) {
  int count;
  unsigned polls = 0;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];"
                 : "=r"(count)
                 : "l"(__cvta_generic_to_global(passed))
                 : "memory");
    if (++polls == kMostPolls) __trap();
  } while (count < turn);
  asm volatile("fence.proxy.async.global;" ::: "memory");
}
// After bulk_wait().
__device__ inline void pass_turn(int* passed) {
  asm volatile("fence.proxy.async.global;" ::: "memory");
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(__cvta_generic_to_global(passed))
               : "memory");
}

// The rest.

// "rcp": 1 / x, at most one unit in the last place off; no branch, as a division would have.
__device__ inline float reciprocal_approximate(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Dynamic shared memory from its first 1024-byte boundary on; ask for kPanelAlignment bytes more.
__device__ inline unsigned char* aligned_shared() {
  DYNAMIC_SHARED(unsigned char, start);
  return start + (kPanelAlignment - shared_address(start) % kPanelAlignment) % kPanelAlignment;
}

// The host's side.

template <typename T>
constexpr CUtensorMapDataType kMapType =
    std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;

// The driver's function, found at run time: the extension does not link libcuda.
inline PFN_cuTensorMapEncodeTiled_v12000 map_encoder() {
  static const auto encoder = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                               12000, cudaEnableDefault, &result);
#else
    const cudaError_t error =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    check(error, "cuTensorMapEncodeTiled");
    if (result != cudaDriverEntryPointSuccess || found == nullptr)
      throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled: it needs 12.0");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
  }();
  return encoder;
}

// `sizes` and `box` in elements, innermost dimension first; `strides` those of the others, in
// elements, each a multiple of 16 bytes; so is the address. A box is a panel wide.
template <typename T, size_t kRank>
TensorMap tensor_map(const T* start, std::array<int64_t, kRank> sizes,
                     std::array<int64_t, kRank - 1> strides, std::array<int, kRank> box) {
  TensorMap map;
  cuuint64_t dims[kRank], bytes[kRank];
  cuuint32_t boxes[kRank], steps[kRank];
  for (size_t i = 0; i < kRank; ++i) {
    dims[i] = sizes[i];
    boxes[i] = box[i];
    steps[i] = 1;
    if (i > 0) bytes[i - 1] = strides[i - 1] * sizeof(T);
  }
  const CUresult result =
      map_encoder()(&map, kMapType<T>, kRank, const_cast<T*>(start), dims, bytes, boxes, steps,
                    CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                    CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(int(result)));
  return map;
}

#endif  // __CUDACC__

}  // namespace slimkernels

#include "wgmma.cuh"
