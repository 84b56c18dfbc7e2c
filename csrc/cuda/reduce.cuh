// Reductions over a warp and over a block: sum, max, and the pair (max, sum of exp) of softmax.
// rows.cuh goes on to clusters.
//
// Every thread gets the result. The order of the additions is fixed, so the bits are too.
#pragma once
#include "common.cuh"

namespace slimkernels {

constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr float kLog2E = 1.4426950408889634f;

// Two sums that share a reduction.
struct SumPair {
  float first;
  float second;
};

// The greatest of some scores, and the sum of exp(score - max) over them.
struct MaxSum {
  float max;
  float sum;
};

__device__ inline float combine_sum(float a, float b) { return a + b; }
__device__ inline float combine_max(float a, float b) { return fmaxf(a, b); }
__device__ inline SumPair combine_sum_pair(SumPair a, SumPair b) {
  return {a.first + b.first, a.second + b.second};
}

// Scores of -inf only have sum 0 here rather than exp(-inf + inf); +inf and NaN still give NaN.
__device__ inline MaxSum combine_max_sum(MaxSum a, MaxSum b) {
  const float max = fmaxf(a.max, b.max);
  const float shift = max == -INFINITY ? 0.f : max;
  return {max, a.sum * expf(a.max - shift) + b.sum * expf(b.max - shift)};
}

// exp(x), x <= 0, for terms of a sum and shares of it. Of 16-bit tensors in two instructions: the
// error grows with -x, but slower than the term shrinks.
template <typename T>
__device__ float exp_of_nonpositive(float x) {
  if constexpr (sizeof(T) == 4) return expf(x);
  return exp2_approximate(kLog2E * x);
}

// With more scores, `max` being the greatest of all so far.
template <typename T, int kVec>
__device__ MaxSum add_exponentials(MaxSum total, float max, const float (&scores)[kVec]) {
  // While all scores are -inf they add exp(-inf - 0) = 0, not exp(-inf + inf) = NaN.
  const float shift = max == -INFINITY ? 0.f : max;
  float sum = total.sum * exp_of_nonpositive<T>(total.max - shift);
#pragma unroll
  for (int i = 0; i < kVec; ++i) sum += exp_of_nonpositive<T>(scores[i] - shift);
  return {max, sum};
}

// T is made of 32-bit words.
template <typename T>
__device__ T from_lane_xor(T value, int lane_mask) {
  static_assert(sizeof(T) % sizeof(unsigned) == 0, "");
  unsigned words[sizeof(T) / sizeof(unsigned)];
  memcpy(words, &value, sizeof(T));
#pragma unroll
  for (unsigned& word : words) word = __shfl_xor_sync(kWholeWarp, word, lane_mask);
  memcpy(&value, words, sizeof(T));
  return value;
}

// Over `lanes` neighbours, a power of two. The whole warp must come here.
template <typename T>
__device__ T warp_reduce(T value, T (*combine)(T, T), int lanes = 32) {
#pragma unroll
  for (int lane_mask = 16; lane_mask > 0; lane_mask /= 2)
    if (lane_mask < lanes) value = combine(value, from_lane_xor(value, lane_mask));
  return value;
}

// For a block of (32 * kWarps) threads; each kernel may call it once, for its shared memory is
// not guarded against a second round.
template <int kWarps, typename T>
__device__ T block_reduce(T value, T (*combine)(T, T)) {
  SHARED_ARRAY(T, partial, kWarps);
  value = warp_reduce(value, combine);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  value = partial[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) value = combine(value, partial[warp]);
  return value;
}

}  // namespace slimkernels
