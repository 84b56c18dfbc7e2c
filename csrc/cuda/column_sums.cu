// sums = partials.sum(0), float32, without atomics: the same bits every time.
//
// Tiling   A block of 32 warps has 32 columns, a warp every 32nd row of them: so even few columns
//          keep many loads on their way.
// Traffic  reads P N float32, mostly from L2, where the kernel before left them.
#include "column_sums.h"
#include "reduce.cuh"

namespace slimkernels {
namespace {

constexpr int kColumns = 32, kWarps = 32;

template <typename T>
__global__ void __launch_bounds__(kColumns* kWarps)
    column_sums_kernel(const float* __restrict__ partials, T* __restrict__ sums, int64_t P,
                       int64_t N) {
  SHARED_ARRAY(float, sum_of_warp, kWarps*(kColumns + 1));  // a column more: no bank conflicts
  const int64_t col = int64_t(blockIdx.x) * kColumns + threadIdx.x;
  float sum = 0.f;
#pragma unroll 4
  for (int64_t row = threadIdx.y; row < P; row += kWarps)
    if (col < N) sum += partials[row * N + col];
  sum_of_warp[threadIdx.y * (kColumns + 1) + threadIdx.x] = sum;
  __syncthreads();
  // Now a warp has a column.
  sum = warp_reduce(sum_of_warp[threadIdx.x * (kColumns + 1) + threadIdx.y], combine_sum);
  const int64_t own = int64_t(blockIdx.x) * kColumns + threadIdx.y;
  if (threadIdx.x == 0 && own < N) sums[own] = narrow<T>(sum);
}

}  // namespace

void column_sums(const float* partials, void* sums, int64_t P, int64_t N, int dtype, void* stream) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    LAUNCH((column_sums_kernel<T>), dim3(unsigned((N + kColumns - 1) / kColumns)),
           dim3(kColumns, kWarps), (cudaStream_t)stream, partials, (T*)sums, P, N);
  });
}

}  // namespace slimkernels
