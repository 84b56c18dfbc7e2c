// softmax(query @ key^T * scale) @ value over dense or ragged sequences, without storing the scores
// (FlashAttention, Dao et al. 2022), and its gradients.
//
// Tiling   Forward: an item of work is one head of one sequence and kQueriesPerItem queries; it
//          packs a block of keys and values once (float32, keys transposed) and walks it with tiles
//          of kForwardRows queries, whose scores stay in L1. Backward: an item is one key head of
//          one sequence with every query head that reads it, so that dkey and dvalue are summed
//          without atomics. Items are handed out dynamically, since lengths differ.
// Traffic  Each operand is read once an item, through its own strides; O(T * D) scratch a thread.
// Numerics Everything is float32 whatever the storage is. scale is multiplied into the queries when
//          they are packed, which backward's dkey needs as well. Survivors of dropout are scaled
//          once, in the output. No item writes what another writes and tiles do not change the
//          order of sums: the same bits for any number of threads, and for a sequence whatever its
//          neighbours hold.
#include "attention.h"
#include "kernels.h"

namespace slimkernels::SLIM_ISA {
namespace {

inline constexpr int64_t kQueriesPerItem = 256, kForwardRows = 24, kBackwardRows = 48;

// The scores of a tile: rows a cache line longer than the keys, so that a column of them, which the
// transposed products read, does not fall into one cache set.
inline int64_t score_stride(int64_t keys) { return padded(keys) + kLanes; }

struct Item {
  int64_t batch, first_query;
};

// The output rows of one item so far: softmax's running maximum and sum, and the weighted values.
struct Running {
  float *peak, *sum, *y;
};

template <typename T, bool kDropout>
class Forward {
 public:
  Forward(const Problem& problem, const void* query, const void* key, const void* value, void* y,
          float* lse, const Dropout& dropout)
      : p_(problem),
        query_((const T*)query),
        key_((const T*)key),
        value_((const T*)value),
        y_((T*)y),
        lse_(lse),
        dropout_(dropout) {}

  bool run(const Item& item, int64_t head, Scratch& scratch) {
    const Sequence sequence = p_.sequence(item.batch);
    const int64_t begin = item.first_query, width = p_.width();
    const int64_t end = clamp(begin + kQueriesPerItem, begin, sequence.q_count);
    const int64_t keys = p_.visible(end - 1, 0, sequence.k_count);
    const int64_t block = clamp(keys, 1, p_.block_keys()), queries = end - begin;
    if (!scratch.reserve(2 * Scratch::rounded(queries) + 2 * queries * width + 64 +
                         block_floats(p_.D, block) + block * width +
                         kForwardRows * score_stride(block) + 64))
      return false;
    Running running = {scratch.take(queries), scratch.take(queries), scratch.take(queries * width)};
    float* q = scratch.take(queries * width);
    float* k = scratch.take(block_floats(p_.D, block));
    float* v = scratch.take(block * width);
    float* scores = scratch.take(kForwardRows * score_stride(block));

    fill(running.peak, 0, queries, -kInfinity);
    fill(running.sum, 0, queries, 0.f);
    if (keys == 0) fill(running.y, 0, queries * width, 0.f);
    pack_rows(query_ + at(p_.query, sequence.batch, head, sequence.q_begin + begin), p_.query.token,
              queries, p_.D, p_.scale, q);
    const int64_t key_head = head / (p_.H / p_.Hkv);
    for (int64_t first = 0; first < keys; first += block) {
      const int64_t count = clamp(keys - first, 0, block), token = sequence.k_begin + first;
      pack_transposed(key_ + at(p_.key, sequence.batch, key_head, token), p_.key.token, count, p_.D,
                      k);
      pack_rows(value_ + at(p_.value, sequence.batch, key_head, token), p_.value.token, count, p_.D,
                1.f, v);
      for (int64_t row = 0; row < queries; row += kForwardRows) {
        const int64_t rows = clamp(queries - row, 0, kForwardRows);
        const int64_t seen = p_.visible(begin + row + rows - 1, first, count);
        if (seen == 0) continue;
        const int64_t stride = score_stride(block);
        gemm(rows, seen, p_.D, q + row * width, width, panels_of_block(k, p_.D, count), scores,
             stride, false);
        softmax(sequence, head, begin + row, rows, first, count, seen, scores, stride,
                {running.peak + row, running.sum + row, running.y + row * width});
        gemm(rows, width, seen, scores, stride, panels_of_rows(v, width, width),
             running.y + row * width, width, first > 0);
      }
    }
    write(sequence, head, begin, queries, running);
    return true;
  }

 private:
  void softmax(const Sequence& sequence, int64_t head, int64_t i, int64_t rows, int64_t first,
               int64_t count, int64_t seen, float* scores, int64_t stride, const Running& running) {
    for (int64_t r = 0; r < rows; ++r, scores += stride) {
      const int64_t n = p_.visible(i + r, first, count);
      const int64_t token = sequence.q_begin + i + r;
      const RowBits bits(dropout_.seed,
                         kDropout ? at(p_.dropout_rows(), sequence.batch, head, token) : 0);
      if (n)
        softmax_row<kDropout>(scores, n, running.peak[r], running.sum[r],
                              running.y + r * p_.width(), first ? p_.width() : 0, dropout_, bits,
                              first);
      fill(scores, n, seen, 0.f);
    }
  }

  void write(const Sequence& sequence, int64_t head, int64_t begin, int64_t rows,
             const Running& running) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t token = sequence.q_begin + begin + r;
      T* out = y_ + at(p_.contiguous(p_.H, p_.Tq), sequence.batch, head, token);
      const float total = running.sum[r];
      const bool empty = running.peak[r] == -kInfinity && total == 0.f;
      const float factor = empty ? 0.f : (kDropout ? dropout_.scale : 1.f) / total;
      for_vectors(p_.D, [&](int64_t d, auto n) {
        store(out + d, load(running.y + r * p_.width() + d, Full{}) * factor, n);
      });
      lse_[at(p_.statistics(), sequence.batch, head, token)] =
          empty ? -kInfinity : running.peak[r] + ::logf(total);
    }
  }

  const Problem& p_;
  const T *query_, *key_, *value_;
  T* y_;
  float* lse_;
  const Dropout& dropout_;
};

template <typename T, bool kDropout>
class Backward {
 public:
  Backward(const Problem& problem, const void* dy, const void* query, const void* key,
           const void* value, const void* y, const float* lse, void* dquery, void* dkey,
           void* dvalue, const Dropout& dropout)
      : p_(problem),
        dy_((const T*)dy),
        query_((const T*)query),
        key_((const T*)key),
        value_((const T*)value),
        y_((const T*)y),
        lse_(lse),
        dquery_((T*)dquery),
        dkey_((T*)dkey),
        dvalue_((T*)dvalue),
        dropout_(dropout) {}

  bool run(int64_t batch, int64_t key_head, Scratch& scratch) {
    const Sequence sequence = p_.sequence(batch);
    const int64_t queries = sequence.q_count, width = p_.width();
    const int64_t keys = queries ? p_.visible(queries - 1, 0, sequence.k_count) : 0;
    const int64_t block = clamp(keys, 1, p_.block_keys()), stride = score_stride(block);
    whole_ = keys <= block;
    if (!scratch.reserve(Scratch::rounded(queries) + 3 * queries * width + 2 * keys * width +
                         2 * block_floats(p_.D, block) + block * width +
                         2 * kBackwardRows * stride + 128))
      return false;
    delta_ = scratch.take(queries);
    q_ = scratch.take(queries * width);
    dout_ = scratch.take(queries * width);
    dq_ = scratch.take(queries * width);
    dk_ = scratch.take(keys * width);
    dv_ = scratch.take(keys * width);
    k_transposed_ = scratch.take(block_floats(p_.D, block));
    v_transposed_ = scratch.take(block_floats(p_.D, block));
    k_ = scratch.take(block * width);
    scores_ = scratch.take(kBackwardRows * stride);
    dscores_ = scratch.take(kBackwardRows * stride);

    fill(dk_, 0, keys * width, 0.f);
    fill(dv_, 0, keys * width, 0.f);
    const int64_t group = p_.H / p_.Hkv;
    for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
      load_queries(sequence, head);
      for (int64_t first = 0; first < keys; first += block)
        add_block(sequence, head, first, clamp(keys - first, 0, block), stride);
      write(dq_, queries, p_.scale,
            dquery_ + at(p_.contiguous(p_.H, p_.Tq), sequence.batch, head, sequence.q_begin),
            p_.contiguous(p_.H, p_.Tq).token, queries);
    }
    // With key_lengths the gradients have rows for the keys that were ignored, too.
    const int64_t rows = p_.ragged() ? sequence.k_count : p_.Tk;
    const Strides strides = p_.contiguous(p_.Hkv, p_.Tk);
    const int64_t offset = at(strides, sequence.batch, key_head, sequence.k_begin);
    write(dk_, keys, 1.f, dkey_ + offset, strides.token, rows);
    write(dv_, keys, kDropout ? dropout_.scale : 1.f, dvalue_ + offset, strides.token, rows);
    return true;
  }

 private:
  void load_queries(const Sequence& sequence, int64_t head) {
    const int64_t queries = sequence.q_count, width = p_.width();
    const Strides strides = p_.contiguous(p_.H, p_.Tq);
    pack_rows(query_ + at(p_.query, sequence.batch, head, sequence.q_begin), p_.query.token,
              queries, p_.D, p_.scale, q_);
    pack_rows(dy_ + at(p_.dy, sequence.batch, head, sequence.q_begin), p_.dy.token, queries, p_.D,
              1.f, dout_);
    fill(dq_, 0, queries * width, 0.f);
    if (whole_) return;
    const T* y = y_ + at(strides, sequence.batch, head, sequence.q_begin);
    for (int64_t i = 0; i < queries; ++i, y += strides.token)
      delta_[i] = sum_over(p_.D, [&](int64_t d, auto n) {
        return load(y + d, n) * load(dout_ + i * width + d, Full{});
      });
  }

  void add_block(const Sequence& sequence, int64_t head, int64_t first, int64_t count,
                 int64_t stride) {
    const int64_t width = p_.width(), key_head = head / (p_.H / p_.Hkv);
    const int64_t token = sequence.k_begin + first;
    const T* key = key_ + at(p_.key, sequence.batch, key_head, token);
    pack_transposed(key, p_.key.token, count, p_.D, k_transposed_);
    pack_rows(key, p_.key.token, count, p_.D, 1.f, k_);
    pack_transposed(value_ + at(p_.value, sequence.batch, key_head, token), p_.value.token, count,
                    p_.D, v_transposed_);
    const auto row_panels = [&](const float* x) { return panels_of_rows(x, width, width); };
    for (int64_t row = 0; row < sequence.q_count; row += kBackwardRows) {
      const int64_t rows = clamp(sequence.q_count - row, 0, kBackwardRows);
      const int64_t seen = p_.visible(row + rows - 1, first, count);
      if (seen == 0) continue;
      const float *q = q_ + row * width, *dout = dout_ + row * width;
      gemm(rows, seen, p_.D, q, width, panels_of_block(k_transposed_, p_.D, count), scores_, stride,
           false);
      gemm(rows, seen, p_.D, dout, width, panels_of_block(v_transposed_, p_.D, count), dscores_,
           stride, false);
      differentiate(sequence, head, row, rows, first, count, seen, stride);
      gemm(rows, width, seen, dscores_, stride, row_panels(k_), dq_ + row * width, width, true);
      gemm<true>(seen, width, rows, scores_, stride, row_panels(dout), dv_ + first * width, width,
                 true);
      gemm<true>(seen, width, rows, dscores_, stride, row_panels(q), dk_ + first * width, width,
                 true);
    }
  }

  void differentiate(const Sequence& sequence, int64_t head, int64_t i, int64_t rows, int64_t first,
                     int64_t count, int64_t seen, int64_t stride) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t token = sequence.q_begin + i + r;
      const float lse = lse_[at(p_.statistics(), sequence.batch, head, token)];
      const int64_t n = lse == -kInfinity ? 0 : p_.visible(i + r, first, count);
      const RowBits bits(dropout_.seed,
                         kDropout ? at(p_.dropout_rows(), sequence.batch, head, token) : 0);
      float *s = scores_ + r * stride, *dp = dscores_ + r * stride;
      if (whole_ && n)
        gradient_whole_row<kDropout>(s, dp, n, dropout_, bits);
      else if (n)
        gradient_row<kDropout>(s, dp, n, lse, delta_[i + r], dropout_, bits, first);
      fill(s, n, seen, 0.f);
      fill(dp, n, seen, 0.f);
    }
  }

  // The first `rows` rows of x, and zeros up to `all`.
  void write(const float* x, int64_t rows, float factor, T* out, int64_t stride, int64_t all) {
    for (int64_t row = 0; row < all; ++row)
      for_vectors(p_.D, [&](int64_t d, auto n) {
        const vfloat v = row < rows ? load(x + row * p_.width() + d, Full{}) : vfloat{};
        store(out + row * stride + d, v * factor, n);
      });
  }

  const Problem& p_;
  const T *dy_, *query_, *key_, *value_, *y_;
  const float* lse_;
  T *dquery_, *dkey_, *dvalue_;
  const Dropout& dropout_;
  bool whole_;  // all keys are in one block
  float *delta_, *q_, *dout_, *dq_, *dk_, *dv_, *k_transposed_, *v_transposed_, *k_, *scores_,
      *dscores_;
};

template <bool kValue>
struct Choice {
  static constexpr bool value = kValue;
};

// body(T{}, Choice{}) with the storage type and whether scores are dropped as types.
template <typename Body>
void with_kernel(int dtype, bool dropped, Body body) {
  with_type(dtype,
            [&](auto zero) { dropped ? body(zero, Choice<true>{}) : body(zero, Choice<false>{}); });
}

}  // namespace

void scaled_dot_product_attention_forward(const void* query, const void* key, const void* value,
                                          void* y, float* lse, const int32_t* key_lengths,
                                          const int32_t* cu_seqlens_q, const int32_t* cu_seqlens_k,
                                          const int64_t* seed, const int64_t* sizes, float scale,
                                          int is_causal, float dropout_p, int64_t threshold,
                                          int dtype) {
  const Problem problem(sizes, key_lengths, cu_seqlens_q, cu_seqlens_k, scale, is_causal);
  const Dropout dropout(seed, dropout_p, threshold);
  int64_t tiles = 0;
  for (int64_t b = 0; b < problem.sequences; ++b)
    tiles += (problem.sequence(b).q_count + kQueriesPerItem - 1) / kQueriesPerItem;
  const Owned<Item> items(tiles);
  tiles = 0;
  for (int64_t b = 0; b < problem.sequences; ++b)
    for (int64_t i = 0; i < problem.sequence(b).q_count; i += kQueriesPerItem)
      items[tiles++] = {b, i};
  with_kernel(dtype, seed, [&](auto zero, auto dropped) {
    for_items(tiles * problem.H, problem, [&](int64_t n, Scratch& scratch) {
      Forward<decltype(zero), decltype(dropped)::value> kernel(problem, query, key, value, y, lse,
                                                               dropout);
      return kernel.run(items[n / problem.H], n % problem.H, scratch);
    });
  });
}

void scaled_dot_product_attention_backward(const void* dy, const void* query, const void* key,
                                           const void* value, const void* y, const float* lse,
                                           void* dquery, void* dkey, void* dvalue,
                                           const int32_t* key_lengths, const int32_t* cu_seqlens_q,
                                           const int32_t* cu_seqlens_k, const int64_t* seed,
                                           const int64_t* sizes, float scale, int is_causal,
                                           float dropout_p, int64_t threshold, int dtype) {
  const Problem problem(sizes, key_lengths, cu_seqlens_q, cu_seqlens_k, scale, is_causal);
  const Dropout dropout(seed, dropout_p, threshold);
  with_kernel(dtype, seed, [&](auto zero, auto dropped) {
    for_items(problem.sequences * problem.Hkv, problem, [&](int64_t n, Scratch& scratch) {
      Backward<decltype(zero), decltype(dropped)::value> kernel(problem, dy, query, key, value, y,
                                                                lse, dquery, dkey, dvalue, dropout);
      return kernel.run(n / problem.Hkv, n % problem.Hkv, scratch);
    });
  });
}

}  // namespace slimkernels::SLIM_ISA
