// A mask read through its strides: slimkernels/backends/_mask.py says how rows are described.
#pragma once
#include "common.cuh"

namespace slimkernels {

__device__ inline float widen(uint8_t x) { return x; }

struct Mask {
  const void* values;  // null for none
  bool is_bool;        // not 0 where an element takes part; else it is added, and -inf hides
  bool is_wide;        // float32 whatever x is
  bool is_aligned;     // rows begin where packs of x's kVec elements may be loaded
  int64_t middle, inner, stride_outer, stride_middle, stride_inner, stride_col;

  __device__ int64_t start(int64_t row) const {
    const int64_t block = row / inner;
    return block / middle * stride_outer + block % middle * stride_middle +
           row % inner * stride_inner;
  }

  // What is added to kVec neighbouring scores of the row that begins at `at`.
  template <typename T, int kVec>
  __device__ void load(float (&added)[kVec], int64_t at, int col) const {
    at += col * stride_col;
    if (is_bool) {
      load_from<uint8_t>(added, at);
#pragma unroll
      for (int i = 0; i < kVec; ++i) added[i] = added[i] != 0.f ? 0.f : -INFINITY;
    } else if (is_wide) {
      load_from<float>(added, at);
    } else {
      load_from<T>(added, at);
    }
  }

 private:
  template <typename Value, int kVec>
  __device__ void load_from(float (&added)[kVec], int64_t at) const {
    const Value* from = (const Value*)values + at;
    if (is_aligned) return slimkernels::load(added, from);
#pragma unroll
    for (int i = 0; i < kVec; ++i) added[i] = widen(from[i * stride_col]);
  }
};

}  // namespace slimkernels
