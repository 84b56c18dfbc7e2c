// What forward multiplies, packed: an item's queries, and a block of keys and values after another.
// In float32 (FloatBlocks), or in bfloat16 by AMX (Bf16Blocks).
#pragma once
#include "attention.h"
#include "gemm_bf16.h"

namespace slimkernels::SLIM_ISA {

// Queries and keys as float32, keys transposed. scale is in the queries: kScaled.
class FloatBlocks {
 public:
  using Probability = float;  // what softmax leaves of a score
  static constexpr int64_t kRows = 24;
  static constexpr bool kScaled = true;

  FloatBlocks(const Problem& p, int64_t queries, int64_t keys)
      : D_(p.D), Dv_(p.Dv), queries_(queries), keys_(clamp(keys, 1, p.block_keys())) {}

  int64_t keys() const { return keys_; }
  int64_t rows() const { return queries_; }  // of y
  // Keys that a product can begin and end with.
  Span whole(Span keys) const { return {keys.begin - keys.begin % panels_.columns(), keys.end}; }

  int64_t floats() const {
    return queries_ * padded(D_) + block_floats(D_, keys_) + keys_ * padded(Dv_) + 48;
  }
  void place(Scratch& scratch) {
    q_ = scratch.take(queries_ * padded(D_));
    k_ = scratch.take(block_floats(D_, keys_));
    v_ = scratch.take(keys_ * padded(Dv_));
  }

  template <typename T>
  void pack_queries(const T* query, int64_t stride, float scale) {
    pack_rows(query, stride, queries_, D_, scale, q_);
  }
  template <typename T>
  void pack_keys(const T* key, int64_t key_stride, const T* value, int64_t value_stride,
                 int64_t count) {
    pack_transposed(key, key_stride, count, D_, k_);
    panels_ = panels_of_block(k_, D_, count);
    pack_rows(value, value_stride, count, Dv_, 1.f, v_);
  }

  // scores = q @ k^T, and y = or += probabilities @ v, of some rows and `keys`.
  void score(int64_t row, int64_t rows, Span keys, float* scores, int64_t stride) const {
    gemm(rows, keys.end - keys.begin, D_, q_ + row * padded(D_), padded(D_),
         panels_.from(keys.begin), scores + keys.begin, stride, false);
  }
  void weigh(int64_t rows, Span keys, const float* scores, int64_t stride, float* y,
             bool accumulate) const {
    const int64_t width = padded(Dv_);
    gemm(rows, width, keys.end - keys.begin, scores + keys.begin, stride,
         panels_of_rows(v_ + keys.begin * width, width, width), y, width, accumulate);
  }

 private:
  const int64_t D_, Dv_, queries_, keys_;
  float *q_ = nullptr, *k_ = nullptr, *v_ = nullptr;
  Panels panels_ = {};
};

#if defined(SLIM_AMX)
// Queries as they are: with scale in them they would be rounded once more. Probabilities become
// bfloat16, each row of them at the start of its scores, as in torch's kernel.
class Bf16Blocks {
 public:
  using Probability = bf16;
  static constexpr int64_t kRows = 2 * kTile;
  static constexpr bool kScaled = false;

  Bf16Blocks(const Problem& p, int64_t queries, int64_t keys)
      : D_(p.D),
        Dv_(p.Dv),
        queries_(queries),
        keys_(steps_for(clamp(keys, 1, kMostKeys)) * kDepth) {}

  int64_t keys() const { return keys_; }
  int64_t rows() const { return tiles_for(queries_) * kTile; }
  Span whole(Span keys) const { return whole_steps(keys); }

  int64_t floats() const { return (q_elements() + k_elements() + v_elements()) / 2 + 48; }
  void place(Scratch& scratch) {
    q_ = (bf16*)scratch.take(q_elements() / 2);
    k_ = (bf16*)scratch.take(k_elements() / 2);
    v_ = (bf16*)scratch.take(v_elements() / 2);
  }

  void pack_queries(const bf16* query, int64_t stride, float) {
    pack_left(query, stride, queries_, D_, q_);
  }
  void pack_keys(const bf16* key, int64_t key_stride, const bf16* value, int64_t value_stride,
                 int64_t count) {
    k_tiles_ = pack_right_transposed(key, key_stride, count, D_, steps_for(count) * kDepth, k_);
    v_tiles_ = pack_right(value, value_stride, count, Dv_, v_);
  }

  void score(int64_t row, int64_t rows, Span keys, float* scores, int64_t stride) const {
    const int64_t steps = steps_for(D_);
    Tiles tiles = k_tiles_;
    tiles.values += keys.begin / kTile * tiles.column_stride;
    multiply(rows, keys.end - keys.begin, steps, q_ + row * steps * kDepth, steps * kDepth, tiles,
             scores + keys.begin, stride, false);
  }
  void weigh(int64_t rows, Span keys, const float* scores, int64_t stride, float* y,
             bool accumulate) const {
    Tiles tiles = v_tiles_;
    tiles.values += keys.begin / kDepth * tiles.step_stride;
    multiply(rows, Dv_, (keys.end - keys.begin) / kDepth, (const bf16*)scores + keys.begin,
             2 * stride, tiles, y, padded(Dv_), accumulate);
  }

 private:
  int64_t q_elements() const { return rows() * steps_for(D_) * kDepth; }
  int64_t k_elements() const { return keys_ * steps_for(D_) * kDepth; }
  int64_t v_elements() const { return keys_ * tiles_for(Dv_) * kTile; }

  const int64_t D_, Dv_, queries_, keys_;
  bf16 *q_ = nullptr, *k_ = nullptr, *v_ = nullptr;
  Tiles k_tiles_ = {}, v_tiles_ = {};
  const TileLayout layout_;
};
#endif

}  // namespace slimkernels::SLIM_ISA
