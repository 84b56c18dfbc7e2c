// Attention of few queries on many keys, as in decoding: each key and value is read once, where it
// lies, by all query heads that share it.
//
// Tiling   An item is one key head of one sequence and kSplitKeys keys, cut at the same places for
//          any batch and any number of threads, so that a row's bits depend on neither. Its
//          results, relative to its own maximum, are merged afterwards (flash decoding, Dao et al.
//          2023).
//          Up to kDotRows rows of queries are multiplied with keys and values where those lie. More
//          of them pay for a copy of a few keys in L1, which makes the products those of gemm.h.
// Traffic  Keys and values once. Packing them, as the tiled path does, would cost more than the
//          products of a few queries.
#pragma once
#include "attention_products.h"
#include "attention_scores.h"

namespace slimkernels::SLIM_ISA {

inline constexpr int64_t kSplitKeys = 512, kDotRows = 8;

inline bool is_direct(const Sequence& sequence) {
  return 0 < sequence.q_count && sequence.q_count <= kDirectQueries;
}

// A part of the keys that one sequence's queries see, and where its results go, in floats and for
// one key head.
struct Split {
  int64_t batch, begin, end, offset;
};

// Results of a split for one query: y relative to peak (padded(Dv)), then peak and sum.
inline int64_t result_floats(const Problem& p) { return padded(p.Dv) + kLanes; }

template <typename T, bool kDropout, bool kModified>
class Direct {
 public:
  Direct(const Problem& problem, const Variant& variant, float scale, const Dropout& dropout)
      : p_(problem), variant_(variant), scale_(scale), dropout_(dropout) {}

  // The rows of results are the queries of the first head that shares the keys, then of the next.
  bool run(const Split& split, int64_t key_head, const T* query, const T* key, const T* value,
           float* results, Scratch& scratch) const {
    const Sequence sequence = p_.sequence(split.batch);
    const int64_t queries = sequence.q_count, rows = p_.group() * queries;
    const int64_t width = padded(p_.D), out_width = padded(p_.Dv), keys = split.end - split.begin;
    const int64_t stride = score_stride(kSplitKeys);
    const bool many = rows > kDotRows;
    const int64_t some_floats = many ? kChain * (width > out_width ? width : out_width) : 0;
    if (!scratch.reserve(rows * (width + out_width + stride) + 96 + some_floats +
                         (many ? kChain * padded(rows) + block_floats(p_.D, rows) : 0)))
      return false;
    float* q = scratch.take(rows * width);
    float* scores = scratch.take(rows * stride);
    float* y = scratch.take(rows * out_width);
    for (int64_t n = 0; n < p_.group(); ++n)
      pack_rows(query + at(p_.query, sequence.batch, key_head * p_.group() + n, sequence.q_begin),
                p_.query.token, queries, p_.D, scale_, q + n * queries * width);
    const int64_t token = sequence.k_begin + split.begin;
    const T* k = key + at(p_.key, sequence.batch, key_head, token);
    const T* v = value + at(p_.value, sequence.batch, key_head, token);
    float* some = scratch.take(some_floats);
    if (many) {
      float* q_transposed = scratch.take(block_floats(p_.D, rows));
      float* products = scratch.take(kChain * padded(rows));
      pack_transposed(q, width, rows, p_.D, q_transposed);
      score_by_products(panels_of_block(q_transposed, p_.D, rows), rows, k, p_.key.token, p_.D,
                        keys, scores, stride, some, products);
    } else {
      if constexpr (kPairs)
        for (int64_t row = 0; row < rows; ++row) separate(q + row * width, p_.D);
      score_directly(q, rows, k, p_.key.token, p_.D, keys, scores, stride);
    }
    for (int64_t row = 0; row < rows; ++row)
      softmax(sequence, key_head * p_.group() + row / queries, row % queries, split,
              scores + row * stride, results + row * result_floats(p_) + out_width);
    if (many) {
      weigh_by_products(scores, stride, rows, v, p_.value.token, p_.Dv, keys, y, some);
    } else {
      fill(y, 0, rows * out_width, 0.f);
      weigh_directly(scores, stride, rows, v, p_.value.token, p_.Dv, keys, y);
      if constexpr (kPairs)
        for (int64_t row = 0; row < rows; ++row) join(y + row * out_width, p_.Dv);
    }
    for (int64_t row = 0; row < rows; ++row)
      std::memcpy(results + row * result_floats(p_), y + row * out_width,
                  out_width * sizeof(float));
    return true;
  }

 private:
  static constexpr bool kPairs = sizeof(T) == 2;  // whether load_pair() changes the order

  void softmax(const Sequence& sequence, int64_t head, int64_t i, const Split& split, float* s,
               float* peak_and_sum) const {
    const int64_t keys = split.end - split.begin;
    const Span seen = p_.seen(sequence, i, i + 1, split.begin, keys);
    const int64_t n = seen.end - seen.begin;
    float peak = -kInfinity, total = 0.f;
    if (n) {
      if constexpr (kModified)
        modify(variant_, {sequence, head, i, split.begin + seen.begin, n}, s + seen.begin, nullptr);
      const RowBits bits(
          dropout_.seed,
          kDropout ? at(p_.dropout_rows(), sequence.batch, head, sequence.q_begin + i) : 0);
      peak = max(peaks_of(s + seen.begin, n));
      total = sum(exponentials<kDropout>(s + seen.begin, shift_of(broadcast(peak)), s + seen.begin,
                                         n, dropout_, bits, split.begin + seen.begin));
    }
    fill(s, 0, n ? seen.begin : keys, 0.f);
    fill(s, n ? seen.end : keys, keys, 0.f);
    peak_and_sum[0] = peak;
    peak_and_sum[1] = total;
  }

  const Problem& p_;
  const Variant& variant_;
  const float scale_;
  const Dropout& dropout_;
};

// One query's results of `splits` parts, `stride` floats apart, in order.
template <typename T>
void merge(const float* results, int64_t stride, int64_t splits, int64_t Dv, float sink,
           float factor, T* y, float* lse, float* low) {
  const int64_t width = padded(Dv);
  float peak = -kInfinity, sum = 0.f;
  for (int64_t n = 0; n < splits; ++n) {
    const float here = results[n * stride + width];
    peak = here > peak ? here : peak;
  }
  const float shift = peak == -kInfinity ? 0.f : peak;
  const auto share = [&](int64_t n) {
    return exp_of_nonpositive(broadcast(results[n * stride + width] - shift))[0];
  };
  for (int64_t n = 0; n < splits; ++n) sum += results[n * stride + width + 1] * share(n);
  const Total total(peak, sum, sink);
  for_vectors(Dv, [&](int64_t d, auto lanes) {
    vfloat out = {};
    if (!total.unseen)
      for (int64_t n = 0; n < splits; ++n) out += load(results + n * stride + d, Full{}) * share(n);
    store(y + d, out * (total.unseen ? 0.f : total.factor * factor), lanes);
  });
  *lse = total.lse;
  *low = total.low;
}

// The sequences that is_direct() says.
template <typename T, bool kDropout, bool kModified>
void attend_directly(const Problem& p, const Variant& variant, const void* query, const void* key,
                     const void* value, void* y, float* lse, float scale, const Dropout& dropout) {
  const auto span_of = [&](const Sequence& s) { return p.seen(s, 0, s.q_count, 0, s.k_count); };
  const auto first_cut = [](const Span& keys) { return keys.begin / kSplitKeys; };
  const auto splits_of = [&](const Sequence& s) {
    const Span keys = span_of(s);
    if (!is_direct(s) || keys.empty()) return int64_t(0);
    return (keys.end - 1) / kSplitKeys - first_cut(keys) + 1;
  };
  int64_t count = 0, floats = 0;
  const Owned<int64_t> starts(p.sequences + 1);  // the first split of each sequence
  for (int64_t b = 0; b < p.sequences; ++b) {
    starts[b] = count;
    count += splits_of(p.sequence(b));
  }
  starts[p.sequences] = count;
  const Owned<Split> splits(count);
  for (int64_t b = 0; b < p.sequences; ++b) {
    const Sequence sequence = p.sequence(b);
    const Span keys = span_of(sequence);
    for (int64_t n = starts[b]; n < starts[b + 1]; ++n) {
      const int64_t cut = (first_cut(keys) + n - starts[b]) * kSplitKeys;
      splits[n] = {b, clamp(cut, keys.begin, keys.end), clamp(cut + kSplitKeys, 0, keys.end),
                   floats};
      floats += p.group() * sequence.q_count * result_floats(p);
    }
  }
  const Owned<float> results(floats * p.Hkv);
  const Direct<T, kDropout, kModified> kernel(p, variant, scale, dropout);
  // Of one key head, a split's results lie together, and after them the next split's.
  for_items(count * p.Hkv, p, kModified, [&](int64_t n, Scratch& scratch) {
    const Split& split = splits[n / p.Hkv];
    const int64_t key_head = n % p.Hkv;
    return kernel.run(split, key_head, (const T*)query, (const T*)key, (const T*)value,
                      results.get() + key_head * floats + split.offset, scratch);
  });
  for_rows(p.sequences * p.H, kDirectQueries * p.Dv, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / p.H, head = row % p.H;
      const Sequence sequence = p.sequence(b);
      if (!is_direct(sequence)) continue;
      const int64_t first = starts[b], number = starts[b + 1] - first, queries = sequence.q_count;
      const float* of_head =
          results.get() + head / p.group() * floats + head % p.group() * queries * result_floats(p);
      for (int64_t i = 0; i < queries; ++i) {
        const int64_t token = sequence.q_begin + i;
        const float* from =
            number ? of_head + splits[first].offset + i * result_floats(p) : nullptr;
        merge(from, p.group() * queries * result_floats(p), number, p.Dv, variant.sink(head),
              kDropout ? dropout.scale : 1.f,
              (T*)y + at(p.contiguous(p.H, p.Tq, p.Dv), sequence.batch, head, token),
              lse + at(p.statistics(), sequence.batch, head, token),
              lse + p.rows() + at(p.statistics(), sequence.batch, head, token));
      }
    }
  });
}

}  // namespace slimkernels::SLIM_ISA
