// Dropout's random bits: slimkernels/ops/_dropout.py has the definition, word for word the same.
#pragma once
#include "common.cuh"

namespace slimkernels {

// Below which bits an element is dropped, and what survivors are multiplied by. A null seed means
// no dropout.
struct Dropout {
  const int64_t* seed;
  uint32_t threshold;
  float scale;
};

__device__ inline uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// The random bits of one row.
class RowBits {
 public:
  __device__ RowBits(int64_t seed, int64_t row) {
    const uint32_t low = uint32_t(seed), high = uint32_t(uint64_t(seed) >> 32);
    key0_ = mix(mix(mix(low) ^ high ^ uint32_t(row)) ^ uint32_t(uint64_t(row) >> 32));
    key1_ = mix(key0_ ^ low);
  }

  __device__ uint32_t at(int col) const {
    uint32_t x = uint32_t(col) * 0x9E3779B9u + key0_;
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = ((x ^ (x >> 15)) + key1_) * 0x846CA68Bu;
    return x ^ (x >> 16);
  }

 private:
  uint32_t key0_, key1_;
};

}  // namespace slimkernels
