// Reductions over a warp and over a block: sum, max, and the pair (max, sum of exp) of softmax.
//
// Every thread gets the result. The order of the additions is fixed, so the bits are too.
#pragma once
#include "common.cuh"

namespace slimkernels {

constexpr unsigned kWholeWarp = 0xffffffffu;

__device__ inline float combine_sum(float a, float b) { return a + b; }
__device__ inline float combine_max(float a, float b) { return fmaxf(a, b); }

// The greatest of some scores, and the sum of exp(score - max) over them.
struct MaxSum {
  float max;
  float sum;
};

// Scores of -inf only have sum 0 here rather than exp(-inf + inf); +inf and NaN still give NaN.
__device__ inline MaxSum combine_max_sum(MaxSum a, MaxSum b) {
  const float max = fmaxf(a.max, b.max);
  const float shift = max == -INFINITY ? 0.f : max;
  return {max, a.sum * expf(a.max - shift) + b.sum * expf(b.max - shift)};
}

template <typename T>
__device__ T from_lane_xor(T value, int lane_mask);
template <>
__device__ inline float from_lane_xor(float value, int lane_mask) {
  return __shfl_xor_sync(kWholeWarp, value, lane_mask);
}
template <>
__device__ inline MaxSum from_lane_xor(MaxSum value, int lane_mask) {
  return {__shfl_xor_sync(kWholeWarp, value.max, lane_mask),
          __shfl_xor_sync(kWholeWarp, value.sum, lane_mask)};
}

template <typename T>
__device__ T warp_reduce(T value, T (*combine)(T, T)) {
#pragma unroll
  for (int lane_mask = 16; lane_mask > 0; lane_mask /= 2)
    value = combine(value, from_lane_xor(value, lane_mask));
  return value;
}

// For a block of (32 * kWarps) threads; each kernel may call it once, for its shared memory is
// not guarded against a second round.
template <int kWarps, typename T>
__device__ T block_reduce(T value, T (*combine)(T, T)) {
  __shared__ T partial[kWarps];
  value = warp_reduce(value, combine);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  value = partial[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) value = combine(value, partial[warp]);
  return value;
}

}  // namespace slimkernels
