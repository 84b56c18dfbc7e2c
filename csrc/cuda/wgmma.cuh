// wgmma (sm_90a): D (64, N) += A (64, 16) @ B (16, N), by the 128 threads of a warpgroup, behind
// their backs. Included by hopper.cuh, which says what a panel is. PTX ISA, "Asynchronous
// Warpgroup Level Matrix Instructions".
//
// Order    wgmma_fence(), wgmma()s, wgmma_commit() make a group. Until wgmma_wait<n>() says that at
//          most the last n groups are under way, D, a register A, and what the operands read in
//          shared memory must be neither read nor written; then fence_registers() on D keeps the
//          compiler from reading it early.
// D        "Register fragments for wgmma.mma_async.m64nNk16": thread t of the group has in
//          d[4 * j + e] row t / 32 * 16 + t % 32 / 4 + 8 * (e / 2), column 8 * j + t % 4 * 2 + e
//          % 2.
// A        In registers, a[e] is two 16-bit columns from t % 4 * 2 + 8 * (e / 2) on of row
//          t / 32 * 16 + t % 32 / 4 + 8 * (e % 2): D's places, so that columns 16 * k to 16 * k +
//          15 of a product are, rounded in pairs, the A of the k-th step of the next.
// Shared   A descriptor says where an operand is, "Asynchronous Warpgroup Level Matrix Shared
//          Memory Layout". kK: its panels' rows are M or N, 64 neighbours of K in a row. kMN: its
//          rows are K, 64 neighbours of M or N in a row.
#pragma once

namespace slimkernels {

enum Major : int { kK = 0, kMN = 1 };  // the instruction's tnspA, tnspB

// Start, leading and stride byte offsets in units of 16 bytes; layout type 1: 128-byte swizzle.
// The pattern starts on 1024-byte boundaries, so the base offset is 0.
__host__ __device__ constexpr uint64_t matrix_descriptor(uint32_t address, uint32_t leading,
                                                         uint32_t stride) {
  return uint64_t(address >> 4 & 0x3fff) | uint64_t(leading >> 4) << 16 |
         uint64_t(stride >> 4) << 32 | uint64_t(1) << 62;
}

// The operand whose first row (a multiple of 8) is `row` of a tile of `rows` rows, at the step of
// 16 along K that starts at `k`. The stride is that of 8 rows; swizzled, kK has no leading offset.
__device__ inline uint64_t operand_k(uint32_t tile, int rows, int row, int k) {
  const int panel = k / kPanelColumns * panel_bytes(rows);
  return matrix_descriptor(tile + panel + row * kPanelRowBytes + k % kPanelColumns * 2, 16,
                           8 * kPanelRowBytes);
}

// The operand whose first column is `column` and whose rows start at `k`. The stride is that of 8
// rows, the leading offset that of 64 columns. It may start inside a panel if it ends there: the
// swizzle is one of addresses, as for kK's steps.
__device__ inline uint64_t operand_mn(uint32_t tile, int rows, int column, int k) {
  const int panel = column / kPanelColumns * panel_bytes(rows);
  const int inside = column % kPanelColumns * 2;
  return matrix_descriptor(tile + panel + inside + k * kPanelRowBytes, panel_bytes(rows),
                           8 * kPanelRowBytes);
}

#ifdef __CUDACC__

template <int kCount>
__device__ inline void fence_registers(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int kSteps>
__device__ inline void fence_registers(uint32_t (&a)[kSteps][4]) {
#pragma unroll
  for (int i = 0; i < kSteps * 4; ++i) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
}

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The instruction names its N / 2 registers, so a list of them in two spellings.
#define SLIM_R0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define SLIM_R1 SLIM_R0 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define SLIM_R2 SLIM_R1 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define SLIM_R3 SLIM_R2 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define SLIM_R4 SLIM_R3 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define SLIM_R5 SLIM_R4 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define SLIM_R6 SLIM_R5 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define SLIM_R7 SLIM_R6 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define SLIM_R8 SLIM_R7 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define SLIM_R9 SLIM_R8 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define SLIM_R10 SLIM_R9 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define SLIM_R11 SLIM_R10 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define SLIM_R12 SLIM_R11 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define SLIM_R13 SLIM_R12 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define SLIM_R14 SLIM_R13 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define SLIM_R15 SLIM_R14 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define SLIM_EIGHT(i)                                                                         \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define SLIM_D0 SLIM_EIGHT(0)
#define SLIM_D1 SLIM_D0, SLIM_EIGHT(8)
#define SLIM_D2 SLIM_D1, SLIM_EIGHT(16)
#define SLIM_D3 SLIM_D2, SLIM_EIGHT(24)
#define SLIM_D4 SLIM_D3, SLIM_EIGHT(32)
#define SLIM_D5 SLIM_D4, SLIM_EIGHT(40)
#define SLIM_D6 SLIM_D5, SLIM_EIGHT(48)
#define SLIM_D7 SLIM_D6, SLIM_EIGHT(56)
#define SLIM_D8 SLIM_D7, SLIM_EIGHT(64)
#define SLIM_D9 SLIM_D8, SLIM_EIGHT(72)
#define SLIM_D10 SLIM_D9, SLIM_EIGHT(80)
#define SLIM_D11 SLIM_D10, SLIM_EIGHT(88)
#define SLIM_D12 SLIM_D11, SLIM_EIGHT(96)
#define SLIM_D13 SLIM_D12, SLIM_EIGHT(104)
#define SLIM_D14 SLIM_D13, SLIM_EIGHT(112)
#define SLIM_D15 SLIM_D14, SLIM_EIGHT(120)

#define SLIM_SHARED_A(N, TYPE, LAST, O0, O1, O2, O3, O4)                                  \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #O2                                   \
               ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE      \
               " {" SLIM_R##LAST "}, %" #O0 ", %" #O1 ", p, 1, 1, %" #O3 ", %" #O4 ";\n}" \
               : SLIM_D##LAST                                                             \
               : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(kA)), "n"(int(kB)))
#define SLIM_REGISTER_A(N, TYPE, LAST, O0, O1, O2, O3, O4, O5, O6)                          \
  asm volatile(                                                                             \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %" #O5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N \
      "k16.f32." TYPE "." TYPE " {" SLIM_R##LAST "}, {%" #O0 ", %" #O1 ", %" #O2 ", %" #O3  \
                                                 "}, %" #O4 ", p, 1, 1, %" #O6 ";\n}"       \
      : SLIM_D##LAST                                                                        \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(int(kB)))

// wgmma<T, kA, kB>(d, a, b, accumulate) with both operands in shared memory, and
// wgmma<T, kB>(d, a, b, accumulate) with A in registers; N is twice the size of d. accumulate: or
// else d is overwritten. LAST is N / 16 - 1; O0 and so on number the operands behind d's.
#define SLIM_WGMMA(N, LAST, O0, O1, O2, O3, O4, O5, O6)                                      \
  template <typename T, Major kA, Major kB>                                                  \
  __device__ inline void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) { \
    if constexpr (std::is_same_v<T, __half>)                                                 \
      SLIM_SHARED_A(N, "f16", LAST, O0, O1, O2, O3, O4);                                     \
    else                                                                                     \
      SLIM_SHARED_A(N, "bf16", LAST, O0, O1, O2, O3, O4);                                    \
  }                                                                                          \
  template <typename T, Major kB>                                                            \
  __device__ inline void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,        \
                               bool accumulate) {                                            \
    if constexpr (std::is_same_v<T, __half>)                                                 \
      SLIM_REGISTER_A(N, "f16", LAST, O0, O1, O2, O3, O4, O5, O6);                           \
    else                                                                                     \
      SLIM_REGISTER_A(N, "bf16", LAST, O0, O1, O2, O3, O4, O5, O6);                          \
  }

SLIM_WGMMA(32, 1, 16, 17, 18, 19, 20, 21, 22)
SLIM_WGMMA(48, 2, 24, 25, 26, 27, 28, 29, 30)
SLIM_WGMMA(64, 3, 32, 33, 34, 35, 36, 37, 38)
SLIM_WGMMA(80, 4, 40, 41, 42, 43, 44, 45, 46)
SLIM_WGMMA(96, 5, 48, 49, 50, 51, 52, 53, 54)
SLIM_WGMMA(128, 7, 64, 65, 66, 67, 68, 69, 70)
SLIM_WGMMA(256, 15, 128, 129, 130, 131, 132, 133, 134)

#endif  // __CUDACC__

}  // namespace slimkernels
