// What backward multiplies, packed, and what it sums: for the queries of one head, a block of keys
// and values after another. In float32 (FloatGradients), or in bfloat16 by AMX (Bf16Gradients).
#pragma once
#include "attention_products.h"
#include "attention_scores.h"
#include "gemm_bf16.h"

namespace slimkernels::SLIM_ISA {

// Which gradients are summed.
struct Wanted {
  bool query, key, value;
};

// Keys in a block: all of them where forward was direct. Then no row needs its lse, whose scores
// were rounded otherwise: of scores of 1e6 the probabilities would be wrong by half.
inline int64_t keys_in_block(int64_t queries, int64_t keys, int64_t most) {
  return queries <= kDirectQueries ? clamp(keys, 1, keys + 1) : clamp(keys, 1, most);
}

// Tiles of kRows queries. scale is in the queries: kScaled.
class FloatGradients {
 public:
  static constexpr int64_t kRows = 48;
  static constexpr bool kScaled = true;

  FloatGradients(const Problem& p, int64_t queries, int64_t keys, const Wanted& wanted)
      : wanted_(wanted),
        D_(p.D),
        Dv_(p.Dv),
        width_(padded(p.D)),
        out_width_(padded(p.Dv)),
        queries_(queries),
        keys_(keys),
        block_(keys_in_block(queries, keys, p.block_keys())) {}

  int64_t block() const { return block_; }
  // Keys that a product can begin and end with.
  Span whole(Span keys) const { return {keys.begin - keys.begin % k_panels_.columns(), keys.end}; }

  int64_t floats() const {
    return queries_ * (width_ + out_width_) + block_floats(D_, block_) + block_floats(Dv_, block_) +
           dq_size() + k_size() + dk_size() + dv_size() + 128;
  }
  void place(Scratch& scratch) {
    q_ = scratch.take(queries_ * width_);
    dy_ = scratch.take(queries_ * out_width_);
    k_transposed_ = scratch.take(block_floats(D_, block_));
    v_transposed_ = scratch.take(block_floats(Dv_, block_));
    dq_ = scratch.take(dq_size());
    k_ = scratch.take(k_size());
    dk_ = scratch.take(dk_size());
    dv_ = scratch.take(dv_size());
    clear(dk_, 0, dk_size());
    clear(dv_, 0, dv_size());
  }

  // `queries` of them; dq starts again.
  template <typename T>
  void pack_queries(const T* query, int64_t stride, const T* dy, int64_t dy_stride, int64_t queries,
                    float scale) {
    pack_rows(query, stride, queries, D_, scale, q_);
    pack_rows(dy, dy_stride, queries, Dv_, 1.f, dy_);
    clear(dq_, 0, dq_size());
  }
  template <typename T>
  void pack_keys(const T* key, int64_t key_stride, const T* value, int64_t value_stride,
                 int64_t count) {
    pack_transposed(key, key_stride, count, D_, k_transposed_);
    pack_transposed(value, value_stride, count, Dv_, v_transposed_);
    k_panels_ = panels_of_block(k_transposed_, D_, count);
    v_panels_ = panels_of_block(v_transposed_, Dv_, count);
    if (wanted_.query) pack_rows(key, key_stride, count, D_, 1.f, k_);
  }

  // scores = q @ k^T, and dp = dy @ v^T, of some rows and `keys`.
  void score(int64_t row, int64_t rows, Span keys, float* scores, int64_t stride) const {
    gemm(rows, keys.end - keys.begin, D_, q_ + row * width_, width_, k_panels_.from(keys.begin),
         scores + keys.begin, stride, false);
  }
  void differentiate(int64_t row, int64_t rows, Span keys, float* dp, int64_t stride) const {
    gemm(rows, keys.end - keys.begin, Dv_, dy_ + row * out_width_, out_width_,
         v_panels_.from(keys.begin), dp + keys.begin, stride, false);
  }

  // dq += ds @ k, dv += p^T @ dy, dk += ds^T @ q. The block's first key is number `first`.
  void add(int64_t row, int64_t rows, Span keys, int64_t first, const float* p, const float* ds,
           int64_t stride) {
    const int64_t n = keys.end - keys.begin, key = first + keys.begin;
    p += keys.begin;
    ds += keys.begin;
    if (wanted_.query)
      gemm(rows, width_, n, ds, stride, panels_of_rows(k_ + keys.begin * width_, width_, width_),
           dq_ + row * width_, width_, true);
    if (wanted_.value)
      gemm<true>(n, out_width_, rows, p, stride,
                 panels_of_rows(dy_ + row * out_width_, out_width_, out_width_),
                 dv_ + key * out_width_, out_width_, true);
    if (wanted_.key)
      gemm<true>(n, width_, rows, ds, stride, panels_of_rows(q_ + row * width_, width_, width_),
                 dk_ + key * width_, width_, true);
  }

  const float* dq() const { return dq_; }
  const float* dk() const { return dk_; }
  const float* dv() const { return dv_; }

 private:
  int64_t dq_size() const { return wanted_.query ? queries_ * width_ : 0; }
  int64_t k_size() const { return wanted_.query ? block_ * width_ : 0; }
  int64_t dk_size() const { return wanted_.key ? keys_ * width_ : 0; }
  int64_t dv_size() const { return wanted_.value ? keys_ * out_width_ : 0; }

  const Wanted wanted_;
  const int64_t D_, Dv_, width_, out_width_, queries_, keys_, block_;
  float *q_, *dy_, *k_transposed_, *v_transposed_, *dq_, *k_, *dk_, *dv_;
  Panels k_panels_ = {}, v_panels_ = {};
};

#if defined(SLIM_AMX)
// p and ds become bfloat16, as in torch's kernel: ds once as rows, at the start of its float32
// ones, and both as pairs of queries. With those on the right dk and dv are summed transposed, so
// that only q and dy, once a head, and not every tile need a transpose.
class Bf16Gradients {
 public:
  static constexpr int64_t kRows = 2 * kDepth;
  static constexpr bool kScaled = false;

  Bf16Gradients(const Problem& p, int64_t queries, int64_t keys, const Wanted& wanted)
      : wanted_(wanted),
        D_(p.D),
        Dv_(p.Dv),
        queries_(steps_for(queries) * kDepth),
        keys_(steps_for(keys) * kDepth),
        block_(steps_for(keys_in_block(queries, keys, kMostKeys)) * kDepth),
        key_stride_(keys_ + kLanes) {}

  int64_t block() const { return block_; }
  Span whole(Span keys) const { return whole_steps(keys); }

  int64_t floats() const {
    const int64_t left =
        queries_ * (depth(D_) + depth(Dv_)) + q_transposed_size() + dy_transposed_size();
    const int64_t right = block_ * (depth(D_) + depth(Dv_)) + k_size() + p_size() + ds_size();
    return (left + right) / 2 + dq_size() + dk_size() + dv_size() + rows_size() + 256;
  }
  void place(Scratch& scratch) {
    const auto take = [&](int64_t elements) { return (bf16*)scratch.take(elements / 2); };
    q_ = take(queries_ * depth(D_));
    dy_ = take(queries_ * depth(Dv_));
    q_transposed_ = take(q_transposed_size());
    dy_transposed_ = take(dy_transposed_size());
    k_transposed_ = take(block_ * depth(D_));
    v_transposed_ = take(block_ * depth(Dv_));
    k_ = take(k_size());
    p_ = take(p_size());
    ds_ = take(ds_size());
    dq_ = scratch.take(dq_size());
    dk_ = scratch.take(dk_size());
    dv_ = scratch.take(dv_size());
    rows_ = scratch.take(rows_size());
    clear(dk_, 0, dk_size());
    clear(dv_, 0, dv_size());
  }

  void pack_queries(const bf16* query, int64_t stride, const bf16* dy, int64_t dy_stride,
                    int64_t queries, float) {
    pack_left(query, stride, queries, D_, q_);
    pack_left(dy, dy_stride, queries, Dv_, dy_);
    if (wanted_.key) pack_left_transposed(query, stride, queries, D_, queries_, q_transposed_);
    if (wanted_.value) pack_left_transposed(dy, dy_stride, queries, Dv_, queries_, dy_transposed_);
    clear(dq_, 0, dq_size());
  }
  void pack_keys(const bf16* key, int64_t key_stride, const bf16* value, int64_t value_stride,
                 int64_t count) {
    const int64_t all = steps_for(count) * kDepth;
    k_transposed_tiles_ = pack_right_transposed(key, key_stride, count, D_, all, k_transposed_);
    v_transposed_tiles_ =
        pack_right_transposed(value, value_stride, count, Dv_, all, v_transposed_);
    if (wanted_.query) k_tiles_ = pack_right(key, key_stride, count, D_, k_);
  }

  void score(int64_t row, int64_t rows, Span keys, float* scores, int64_t stride) const {
    against_keys(q_, D_, k_transposed_tiles_, row, rows, keys, scores, stride);
  }
  void differentiate(int64_t row, int64_t rows, Span keys, float* dp, int64_t stride) const {
    against_keys(dy_, Dv_, v_transposed_tiles_, row, rows, keys, dp, stride);
  }

  void add(int64_t row, int64_t rows, Span keys, int64_t first, const float* p, float* ds,
           int64_t stride) {
    const int64_t n = keys.end - keys.begin, key = first + keys.begin;
    if (wanted_.value) {
      const Tiles tiles = pack_right_pairs(p + keys.begin, stride, rows, n, kRows, nullptr, p_);
      add_transposed(dy_transposed_, Dv_, row, rows, tiles, n, dv_ + key);
    }
    if (!wanted_.query && !wanted_.key) return;
    bf16* ds_rows = (bf16*)ds;
    const Tiles tiles =
        pack_right_pairs(ds + keys.begin, stride, rows, n, kRows, ds_rows + keys.begin, ds_);
    if (wanted_.key) add_transposed(q_transposed_, D_, row, rows, tiles, n, dk_ + key);
    if (!wanted_.query) return;
    Tiles k = k_tiles_;
    k.values += keys.begin / kDepth * k.step_stride;
    for (int64_t r = 0; r < rows; r += 2 * kTile)
      multiply(clamp(rows - r, 0, 2 * kTile), D_, n / kDepth, ds_rows + 2 * stride * r + keys.begin,
               2 * stride, k, dq_ + (row + r) * padded(D_), padded(D_), true);
  }

  const float* dq() const { return dq_; }
  const float* dk() { return by_rows(dk_, D_); }
  const float* dv() { return by_rows(dv_, Dv_); }

 private:
  static int64_t depth(int64_t columns) { return steps_for(columns) * kDepth; }
  int64_t dq_size() const { return wanted_.query ? queries_ * padded(D_) : 0; }
  int64_t dk_size() const { return wanted_.key ? padded(D_) * key_stride_ : 0; }
  int64_t dv_size() const { return wanted_.value ? padded(Dv_) * key_stride_ : 0; }
  int64_t q_transposed_size() const { return wanted_.key ? queries_ * depth(D_) : 0; }
  int64_t dy_transposed_size() const { return wanted_.value ? queries_ * depth(Dv_) : 0; }
  int64_t k_size() const { return wanted_.query ? block_ * depth(D_) : 0; }
  int64_t p_size() const { return wanted_.value ? kRows * block_ : 0; }
  int64_t ds_size() const { return wanted_.query || wanted_.key ? kRows * block_ : 0; }
  int64_t rows_size() const {
    const int64_t dk = wanted_.key ? padded(D_) : 0, dv = wanted_.value ? padded(Dv_) : 0;
    return keys_ * (dk > dv ? dk : dv);
  }

  void against_keys(const bf16* left, int64_t columns, Tiles right, int64_t row, int64_t rows,
                    Span keys, float* out, int64_t stride) const {
    right.values += keys.begin / kTile * right.column_stride;
    for (int64_t r = 0; r < rows; r += 2 * kTile)
      multiply(clamp(rows - r, 0, 2 * kTile), keys.end - keys.begin, steps_for(columns),
               left + (row + r) * depth(columns), depth(columns), right,
               out + r * stride + keys.begin, stride, false);
  }
  // out (columns, keys) += left (columns, queries) @ right (queries, keys)
  void add_transposed(const bf16* left, int64_t columns, int64_t row, int64_t rows,
                      const Tiles& right, int64_t keys, float* out) const {
    for (int64_t d = 0; d < columns; d += 2 * kTile)
      multiply(clamp(columns - d, 0, 2 * kTile), keys, steps_for(rows), left + d * queries_ + row,
               queries_, right, out + d * key_stride_, key_stride_, true);
  }
  const float* by_rows(const float* x, int64_t columns) {
    transpose(x, key_stride_, padded(columns), keys_, rows_, padded(columns));
    return rows_;
  }

  const Wanted wanted_;
  const int64_t D_, Dv_, queries_, keys_, block_, key_stride_;
  bf16 *q_, *dy_, *q_transposed_, *dy_transposed_, *k_transposed_, *v_transposed_, *k_, *p_, *ds_;
  float *dq_, *dk_, *dv_, *rows_;
  Tiles k_transposed_tiles_ = {}, v_transposed_tiles_ = {}, k_tiles_ = {};
  const TileLayout layout_;
};
#endif

}  // namespace slimkernels::SLIM_ISA
