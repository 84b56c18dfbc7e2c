// Dropout's random bits: slimkernels/ops/_dropout.py has the definition, word for word the same.
#pragma once
#include "vec.h"

namespace slimkernels::SLIM_ISA {

inline uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// The random bits of one row; at(col) gives those of kLanes neighbouring columns.
class RowBits {
 public:
  RowBits(int64_t seed, int64_t row) {
    const uint32_t low = uint32_t(seed), high = uint32_t(uint64_t(seed) >> 32);
    const uint32_t key0 = mix(mix(mix(low) ^ high ^ uint32_t(row)) ^ uint32_t(uint64_t(row) >> 32));
    key1_ = vuint{} + mix(key0 ^ low);
    for (int i = 0; i < kLanes; ++i) first_[i] = i * kStep + key0;
  }

  vuint at(int64_t col) const {
    vuint x = first_ + uint32_t(col) * kStep;  // of lane + col: no vector product
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = ((x ^ (x >> 15)) + key1_) * 0x846CA68Bu;
    return x ^ (x >> 16);
  }

 private:
  static constexpr uint32_t kStep = 0x9E3779B9u;
  vuint first_ = {}, key1_;
};

// What survivors are multiplied by, and below which bits an element is dropped.
struct Dropout {
  uint32_t threshold;
  float scale;
  // The seed is read here, once a call. A null seed means no dropout.
  int64_t seed;

  Dropout(const int64_t* seed_pointer, double dropout_p, int64_t threshold_word)
      : threshold(uint32_t(threshold_word)),
        scale(float(1 / (1 - dropout_p))),
        seed(seed_pointer ? *seed_pointer : 0) {}

  vfloat apply(vfloat v, const RowBits& bits, int64_t col) const {
    return bits.at(col) >= threshold ? v * scale : vfloat{};
  }
};

}  // namespace slimkernels::SLIM_ISA
