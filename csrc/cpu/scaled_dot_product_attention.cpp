// softmax(query @ key^T * scale) @ value over dense or ragged sequences, without storing the scores
// (FlashAttention, Dao et al. 2022). Its gradients are in
// scaled_dot_product_attention_backward.cpp, sequences of few queries in attention_direct.h.
//
// Tiling   An item of work is one head of one sequence and kQueriesPerItem queries. It packs blocks
//          of keys and values once (attention_blocks.h) and walks them with tiles of kRows queries,
//          whose scores stay in L1. Keys that none of an item's queries sees are not read, those
//          that none of a tile's sees not multiplied. Items are handed out dynamically, since
//          lengths differ.
// Traffic  Each operand is read once an item, through its own strides; O(T * D) scratch a thread.
// Numerics Scores, their softmax and all sums are float32 whatever the storage is. So are the
//          factors, but for bfloat16 on processors that multiply it: there the probabilities are
//          rounded before they meet the values. Survivors of dropout are scaled once, in the
//          output. No item writes what another writes and tiles do not change the order of sums:
//          the same bits for any number of threads, and for a sequence whatever its neighbours
//          hold.
#include "attention_blocks.h"
#include "attention_direct.h"
#include "attention_scores.h"
#include "kernels.h"

namespace slimkernels::SLIM_ISA {
namespace {

inline constexpr int64_t kQueriesPerItem = 256;

struct Item {
  int64_t batch, first_query;
};

// The output rows of one item so far: softmax's running maximum and sum, and the weighted values.
struct Running {
  float *peak, *sum, *y;
};

template <typename T, typename Blocks, bool kDropout, bool kModified>
class Forward {
 public:
  Forward(const Problem& problem, const Variant& variant, const void* query, const void* key,
          const void* value, void* y, float* lse, float scale, const Dropout& dropout)
      : p_(problem),
        variant_(variant),
        query_((const T*)query),
        key_((const T*)key),
        value_((const T*)value),
        y_((T*)y),
        lse_(lse),
        scale_(scale),
        dropout_(dropout) {}

  bool run(const Item& item, int64_t head, Scratch& scratch) const {
    const Sequence sequence = p_.sequence(item.batch);
    const int64_t begin = item.first_query, out_width = padded(p_.Dv);
    const int64_t end = clamp(begin + kQueriesPerItem, begin, sequence.q_count);
    const Span keys = p_.seen(sequence, begin, end, 0, sequence.k_count);
    const int64_t queries = end - begin;
    Blocks blocks(p_, queries, keys.end - keys.begin);
    const int64_t block = blocks.keys(), stride = score_stride(block);
    if (!scratch.reserve(2 * Scratch::rounded(queries) + blocks.rows() * out_width +
                         Blocks::kRows * stride + blocks.floats() + 32))
      return false;
    Running running = {scratch.take(queries), scratch.take(queries),
                       scratch.take(blocks.rows() * out_width)};
    float* scores = scratch.take(Blocks::kRows * stride);
    blocks.place(scratch);

    fill(running.peak, 0, queries, -kInfinity);
    fill(running.sum, 0, queries, 0.f);
    blocks.pack_queries(query_ + at(p_.query, sequence.batch, head, sequence.q_begin + begin),
                        p_.query.token, scale_);
    const int64_t key_head = head / p_.group();
    for (int64_t first = keys.begin; first < keys.end; first += block) {
      const int64_t count = clamp(keys.end - first, 0, block), token = sequence.k_begin + first;
      blocks.pack_keys(key_ + at(p_.key, sequence.batch, key_head, token), p_.key.token,
                       value_ + at(p_.value, sequence.batch, key_head, token), p_.value.token,
                       count);
      for (int64_t row = 0; row < queries; row += Blocks::kRows) {
        const int64_t rows = clamp(queries - row, 0, Blocks::kRows), i = begin + row;
        Span seen = p_.seen(sequence, i, i + rows, first, count);
        if (seen.empty()) continue;
        seen = blocks.whole(seen);
        blocks.score(row, rows, seen, scores, stride);
        softmax(sequence, head, i, rows, first, count, seen, scores, stride,
                {running.peak + row, running.sum + row, running.y + row * out_width});
        const bool seen_before = p_.low(sequence, i) < first;
        blocks.weigh(rows, seen, scores, stride, running.y + row * out_width, seen_before);
      }
    }
    write(sequence, head, begin, queries, running);
    return true;
  }

 private:
  // A vector of rows at a time, whose statistics are computed side by side.
  void softmax(const Sequence& sequence, int64_t head, int64_t i, int64_t rows, int64_t first,
               int64_t count, const Span& tile, float* scores, int64_t stride,
               const Running& running) const {
    for (int64_t r = 0; r < rows; r += kLanes)
      softmax_rows(sequence, head, i + r, int(clamp(rows - r, 0, kLanes)), first, count, tile,
                   scores + r * stride, stride,
                   {running.peak + r, running.sum + r, running.y + r * padded(p_.Dv)});
  }

  // Of the keys that the tile sees, a row may see fewer.
  void softmax_rows(const Sequence& sequence, int64_t head, int64_t i, int rows, int64_t first,
                    int64_t count, const Span& tile, float* scores, int64_t stride,
                    const Running& running) const {
    constexpr bool kScale = !Blocks::kScaled && !kModified;  // which modify() does not wait for
    Span seen[kLanes];
    vfloat statistic[kLanes];
    for (int r = 0; r < kLanes; ++r) {
      statistic[r] = broadcast(-kInfinity);
      seen[r] = r < rows ? p_.seen(sequence, i + r, i + r + 1, first, count) : Span{0, 0};
      const int64_t n = seen[r].end - seen[r].begin;
      if (n == 0) continue;
      float* s = scores + r * stride + seen[r].begin;
      if constexpr (!Blocks::kScaled && kModified) multiply_row(s, n, scale_);
      if constexpr (kModified)
        modify(variant_, {sequence, head, i + r, first + seen[r].begin, n}, s, nullptr);
      statistic[r] = peaks_of<kScale>(s, n, scale_);
    }
    const vfloat before = load(running.peak, Part{rows});
    const vfloat peak = vmax(fold(statistic, vmax), before);
    // Of what was summed relative to a smaller peak; before the first keys there is nothing.
    const auto shrinks = before != peak && before != -kInfinity;
    alignas(64) float shift[kLanes], shrink[kLanes];
    store(shift, shift_of(peak), Full{});
    store(shrink, shrinks ? exp_of_nonpositive(before - peak) : broadcast(1.f), Full{});
    for (int r = 0; r < kLanes; ++r) {
      statistic[r] = vfloat{};
      if (r >= rows) continue;
      const int64_t n = seen[r].end - seen[r].begin;
      auto* p = (typename Blocks::Probability*)(scores + r * stride);
      if (n) {
        const int64_t token = sequence.q_begin + i + r;
        const RowBits bits(dropout_.seed,
                           kDropout ? at(p_.dropout_rows(), sequence.batch, head, token) : 0);
        statistic[r] =
            exponentials<kDropout>(scores + r * stride + seen[r].begin, broadcast(shift[r]),
                                   p + seen[r].begin, n, dropout_, bits, first + seen[r].begin);
      }
      clear(p, tile.begin, n ? seen[r].begin : tile.end);
      clear(p, n ? seen[r].end : tile.end, tile.end);
      if (shrink[r] != 1.f) multiply_row(running.y + r * padded(p_.Dv), p_.Dv, shrink[r]);
    }
    const vfloat sums = fold(statistic, [](vfloat a, vfloat b) { return a + b; });
    const vfloat so_far = load(running.sum, Part{rows}) * load(shrink, Full{});
    store(running.peak, peak, Part{rows});
    store(running.sum, so_far + sums, Part{rows});
  }

  void write(const Sequence& sequence, int64_t head, int64_t begin, int64_t rows,
             const Running& running) const {
    const int64_t out_width = padded(p_.Dv);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t token = sequence.q_begin + begin + r;
      const Total total(running.peak[r], running.sum[r], variant_.sink(head));
      const float factor = total.factor * (kDropout ? dropout_.scale : 1.f);
      T* out = y_ + at(p_.contiguous(p_.H, p_.Tq, p_.Dv), sequence.batch, head, token);
      // No key may have been seen, and y not been written: zero times that could be NaN.
      for_vectors(p_.Dv, [&](int64_t d, auto n) {
        const vfloat y = load(running.y + r * out_width + d, Full{});
        store(out + d, total.unseen ? vfloat{} : y * factor, n);
      });
      float* lse = lse_ + at(p_.statistics(), sequence.batch, head, token);
      lse[0] = total.lse;
      lse[p_.rows()] = total.low;
    }
  }

  const Problem& p_;
  const Variant& variant_;
  const T *query_, *key_, *value_;
  T* y_;
  float* lse_;
  const float scale_;
  const Dropout& dropout_;
};

}  // namespace

void scaled_dot_product_attention_forward(const void* query, const void* key, const void* value,
                                          void* y, float* lse, const int64_t* seed,
                                          const int64_t* problem_numbers,
                                          const int64_t* variant_numbers, float scale,
                                          float softcap, float dropout_p, int64_t threshold,
                                          int dtype) {
  const Problem problem(problem_numbers);
  const Variant variant(variant_numbers, softcap);
  const Dropout dropout(seed, dropout_p, threshold);
  int64_t tiles = 0;
  bool any_direct = false;
  const auto tiles_of = [&](const Sequence& sequence) {
    if (is_direct(sequence)) return int64_t(0);
    return (sequence.q_count + kQueriesPerItem - 1) / kQueriesPerItem;
  };
  for (int64_t b = 0; b < problem.sequences; ++b) {
    const Sequence sequence = problem.sequence(b);
    any_direct = any_direct || is_direct(sequence);
    tiles += tiles_of(sequence);
  }
  const Owned<Item> items(tiles);
  tiles = 0;
  for (int64_t b = 0; b < problem.sequences; ++b)
    for (int64_t i = 0, n = tiles_of(problem.sequence(b)); i < n; ++i)
      items[tiles++] = {b, i * kQueriesPerItem};
  with_kernel(dtype, seed, variant.modifies, [&](auto zero, auto dropped, auto modified) {
    using T = decltype(zero);
    constexpr bool kDropout = decltype(dropped)::value, kModified = decltype(modified)::value;
    if (any_direct)
      attend_directly<T, kDropout, kModified>(problem, variant, query, key, value, y, lse, scale,
                                              dropout);
    const auto attend = [&](auto blocks) {
      using Blocks = typename decltype(blocks)::type;
      const Forward<T, Blocks, kDropout, kModified> kernel(problem, variant, query, key, value, y,
                                                           lse, scale, dropout);
      for_items(tiles * problem.H, problem, kModified, [&](int64_t n, Scratch& scratch) {
        return kernel.run(items[n / problem.H], n % problem.H, scratch);
      });
    };
#if defined(SLIM_AMX)
    if constexpr (sizeof(T) == 2)
      if (has_amx) return attend(Chosen<Bf16Blocks>{});
#endif
    attend(Chosen<FloatBlocks>{});
  });
}

}  // namespace slimkernels::SLIM_ISA
