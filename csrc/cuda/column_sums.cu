// sums = partials.sum(0), float32, without atomics: the same bits every time.
//
// Tiling   A block has 32 columns, each of its up to 32 warps every so-manieth row of them: so even
//          few columns keep many loads on their way.
// Traffic  reads P N float32, mostly from L2, where the kernel before left them.
#include <algorithm>

#include "column_sums.h"
#include "common.cuh"

namespace slimkernels {
namespace {

constexpr int kColumns = 32, kMaxWarps = 32;
// A warp's loads of as many rows are on their way together, by the unrolled loop: with fewer, more
// warps would only meet at the barrier.
constexpr int kRowsOfWarp = 4;

template <typename T>
__global__ void __launch_bounds__(kColumns* kMaxWarps)
    column_sums_kernel(const float* __restrict__ partials, T* __restrict__ sums, int64_t P,
                       int64_t N) {
  SHARED_ARRAY(float, sums_of_warps, kMaxWarps* kColumns);
  const int64_t col = int64_t(blockIdx.x) * kColumns + threadIdx.x;
  float sum = 0.f;
  if (col < N) {
#pragma unroll kRowsOfWarp
    for (int64_t row = threadIdx.y; row < P; row += blockDim.y) sum += partials[row * N + col];
  }
  sums_of_warps[threadIdx.y * kColumns + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || col >= N) return;
  for (int warp = 1; warp < int(blockDim.y); ++warp)
    sum += sums_of_warps[warp * kColumns + threadIdx.x];
  sums[col] = narrow<T>(sum);
}

}  // namespace

void column_sums(const float* partials, void* sums, int64_t P, int64_t N, int dtype, void* stream) {
  const int64_t warps =
      std::clamp((P + kRowsOfWarp - 1) / kRowsOfWarp, int64_t(1), int64_t(kMaxWarps));
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    LAUNCH((column_sums_kernel<T>), dim3(unsigned((N + kColumns - 1) / kColumns)),
           dim3(kColumns, unsigned(warps)), (cudaStream_t)stream, partials, (T*)sums, P, N);
  });
}

}  // namespace slimkernels
