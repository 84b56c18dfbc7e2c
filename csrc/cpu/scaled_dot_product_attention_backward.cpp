// Gradients of attention: with p the probabilities, recomputed from the scores and lse, and dp
// their gradient, ds = p * (dp - delta), delta = sum(p * dp) - dlse, and
//   dvalue = p^T dy   dquery = ds key   dkey = ds^T query   dbias = ds   dsink = -p_sink * delta
//
// Tiling   An item is one key head of one sequence with every query head that reads it: dkey and
//          dvalue are summed without atomics. It walks blocks of keys, and in each the tiles of
//          kRows queries that see one of them (attention_gradients.h).
//          A bias that is broadcast over sequences or heads, but not over queries or keys, has a
//          pass of its own: an item owns some of its rows and walks all that share them, since
//          (B, H, Tq, Tk) would have to be stored otherwise. Broadcast over queries or keys it is
//          summed along the way, a small sum a sequence and head, and these are added at the end.
//          The products of a gradient that is not wanted are left out; what is left has the same
//          bits.
// Traffic  Each operand is read once an item; O(T * D) scratch a thread.
// Numerics As in scaled_dot_product_attention.cpp; by AMX ds is rounded as probabilities are. Sums
//          over sequences and heads are in float64.
#include "attention_gradients.h"
#include "attention_scores.h"
#include "kernels.h"

namespace slimkernels::SLIM_ISA {
namespace {

struct Operands {
  const void *dy, *query, *key, *value, *y;
  const float *dlse, *lse;
  void *dquery, *dkey, *dvalue;  // null where not wanted
};

// What is summed for the variant's parameters; null where that is not wanted.
struct Sums {
  double *bias, *relative, *sinks;  // of one (sequence, head) each
  void* dbias;                      // of a bias that is broadcast over nothing

  bool any() const { return bias || relative || sinks || dbias; }
};

template <typename T, typename Gradients, bool kDropout, bool kModified>
class Backward {
 public:
  static constexpr int64_t kRows = Gradients::kRows;

  Backward(const Problem& problem, const Variant& variant, const Operands& operands, float scale,
           const Dropout& dropout)
      : p_(problem), variant_(variant), o_(operands), scale_(scale), dropout_(dropout) {}

  // sums_of(head): where that of one head of this sequence goes.
  template <typename SumsOf>
  bool run(int64_t batch, int64_t key_head, Scratch& scratch, SumsOf sums_of) {
    const Sequence sequence = p_.sequence(batch);
    const int64_t queries = sequence.q_count;
    const Span keys = p_.seen(sequence, 0, queries, 0, sequence.k_count);
    Gradients gradients(p_, queries, keys.end - keys.begin,
                        {o_.dquery != nullptr, o_.dkey != nullptr, o_.dvalue != nullptr});
    if (!take(scratch, keys, queries, 0, gradients)) return false;
    for (int64_t head = key_head * p_.group(); head < (key_head + 1) * p_.group(); ++head) {
      sums_ = sums_of(head);
      needs_dscores_ = o_.dquery || o_.dkey || sums_.any();
      load_queries(sequence, head, 0, queries, gradients);
      for (int64_t first = keys.begin; first < keys.end; first += block_)
        add_block(sequence, head, first, clamp(keys.end - first, 0, block_), gradients);
      if (o_.dquery)
        write(gradients.dq(), {0, queries}, p_.D, scale_, o_.dquery,
              p_.contiguous(p_.H, p_.Tq, p_.D), sequence.batch, head, sequence.q_begin, queries);
    }
    // The gradients have rows for the keys that were not seen, too.
    if (o_.dkey)
      write(gradients.dk(), keys, p_.D, Gradients::kScaled ? 1.f : scale_, o_.dkey,
            p_.contiguous(p_.Hkv, p_.Tk, p_.D), sequence.batch, key_head, sequence.k_begin,
            sequence.k_rows);
    if (o_.dvalue)
      write(gradients.dv(), keys, p_.Dv, kDropout ? dropout_.scale : 1.f, o_.dvalue,
            p_.contiguous(p_.Hkv, p_.Tk, p_.Dv), sequence.batch, key_head, sequence.k_begin,
            sequence.k_rows);
    return true;
  }

  // Rows from i of dbias (Tq, Tk), which these sequences and heads share.
  bool run_bias(Span sequences, Span heads, int64_t i, void* dbias, Scratch& scratch) {
    const int64_t columns = variant_.bias_size[3];
    const int64_t rows = clamp(variant_.bias_size[2] - i, 0, kRows);
    const bool is_direct = p_.Tq <= kDirectQueries;
    Gradients gradients(p_, is_direct ? p_.Tq : kRows, is_direct ? p_.Tk : p_.block_keys(), {});
    if (!take(scratch, {}, kRows, 2 * rows * columns, gradients)) return false;
    needs_dscores_ = true;
    sums_ = {(double*)extra_, nullptr, nullptr, nullptr};
    for (int64_t n = 0; n < rows * columns; ++n) sums_.bias[n] = 0;
    for (int64_t b = sequences.begin; b < sequences.end; ++b) {
      const Sequence sequence = p_.sequence(b);
      const int64_t count = clamp(sequence.seeing - i, 0, rows);
      keys_ = p_.seen(sequence, i, i + count, 0, sequence.k_count);
      if (count == 0 || keys_.empty()) continue;
      for (int64_t head = heads.begin; head < heads.end; ++head) {
        load_queries(sequence, head, i, count, gradients);
        for (int64_t first = keys_.begin; first < keys_.end; first += block_) {
          const int64_t n = clamp(keys_.end - first, 0, block_);
          load_keys(sequence, head / p_.group(), first, n, gradients);
          differentiate(sequence, head, 0, count, first, n, gradients);
        }
      }
    }
    with_type(int(variant_.bias_dtype), [&](auto zero) {
      auto* out = (decltype(zero)*)dbias + i * columns;
      for (int64_t n = 0; n < rows * columns; ++n) store_one(float(sums_.bias[n]), out + n);
    });
    return true;
  }

 private:
  bool take(Scratch& scratch, const Span& keys, int64_t queries, int64_t extra,
            Gradients& gradients) {
    keys_ = keys;
    block_ = gradients.block();
    stride_ = score_stride(block_);
    const int64_t rows = clamp((queries + 15) / 16 * 16, 0, kRows);
    if (!scratch.reserve(gradients.floats() + queries + (2 * rows + 1) * stride_ + extra + 96))
      return false;
    gradients.place(scratch);
    delta_ = scratch.take(queries);
    scores_ = scratch.take(rows * stride_);
    dscores_ = scratch.take(rows * stride_);
    slopes_ = scratch.take(stride_);
    extra_ = scratch.take(extra);
    return true;
  }

  // `queries` of them from query `begin` on.
  void load_queries(const Sequence& sequence, int64_t head, int64_t begin, int64_t queries,
                    Gradients& gradients) {
    const int64_t token = sequence.q_begin + begin;
    begin_ = begin;
    sink_ = variant_.sink(head);
    const T* dy = (const T*)o_.dy + at(p_.dy, sequence.batch, head, token);
    gradients.pack_queries((const T*)o_.query + at(p_.query, sequence.batch, head, token),
                           p_.query.token, dy, p_.dy.token, queries, scale_);
    const Strides strides = p_.contiguous(p_.H, p_.Tq, p_.Dv);
    const T* y = (const T*)o_.y + at(strides, sequence.batch, head, token);
    for (int64_t i = 0; i < queries; ++i, y += strides.token, dy += p_.dy.token) {
      if (is_whole(sequence, begin + i)) continue;
      delta_[i] =
          sum_over(p_.Dv, [&](int64_t d, auto n) { return load(y + d, n) * load(dy + d, n); });
      delta_[i] -= dlse(sequence, head, begin + i);
      const float* lse = lse_of(sequence, head, begin + i);
      if (sums_.sinks && *lse != -kInfinity)
        *sums_.sinks -= double(::expf((sink_ - *lse) - lse[p_.rows()])) * delta_[i];
    }
  }

  // Whether all keys that a query sees are in one block.
  bool is_whole(const Sequence& sequence, int64_t i) const {
    const Span seen = p_.seen(sequence, i, i + 1, 0, sequence.k_count);
    if (seen.empty()) return false;
    return (seen.begin - keys_.begin) / block_ == (seen.end - 1 - keys_.begin) / block_;
  }

  void load_keys(const Sequence& sequence, int64_t key_head, int64_t first, int64_t count,
                 Gradients& gradients) {
    const int64_t token = sequence.k_begin + first;
    gradients.pack_keys(
        (const T*)o_.key + at(p_.key, sequence.batch, key_head, token), p_.key.token,
        (const T*)o_.value + at(p_.value, sequence.batch, key_head, token), p_.value.token, count);
  }

  // Of `count` keys from `first`, of all those in keys_.
  void add_block(const Sequence& sequence, int64_t head, int64_t first, int64_t count,
                 Gradients& gradients) {
    const Span queries = p_.seeing(sequence, first, count);
    if (queries.empty()) return;
    load_keys(sequence, head / p_.group(), first, count, gradients);
    for (int64_t row = queries.begin - queries.begin % kRows; row < queries.end; row += kRows) {
      const int64_t rows = clamp(queries.end - row, 0, kRows);
      const Span seen = differentiate(sequence, head, row, rows, first, count, gradients);
      if (!seen.empty())
        gradients.add(row, rows, seen, first - keys_.begin, scores_, dscores_, stride_);
    }
  }

  // Leaves the probabilities of a tile after dropout in scores_, the gradient of the products in
  // dscores_, both from the first to the last key that one of its rows sees, which it returns.
  Span differentiate(const Sequence& sequence, int64_t head, int64_t row, int64_t rows,
                     int64_t first, int64_t count, const Gradients& gradients) {
    const int64_t i = begin_ + row;
    Span tile = p_.seen(sequence, i, i + rows, first, count);
    if (tile.empty()) return tile;
    tile = gradients.whole(tile);
    gradients.score(row, rows, tile, scores_, stride_);
    if (needs_dscores_)
      gradients.differentiate(row, rows, tile, dscores_, stride_);
    else
      clear(dscores_, 0, rows * stride_);
    for (int64_t r = 0; r < rows; ++r)
      differentiate_row(sequence, head, i + r, first, count, tile, scores_ + r * stride_,
                        dscores_ + r * stride_);
    return tile;
  }

  void differentiate_row(const Sequence& sequence, int64_t head, int64_t i, int64_t first,
                         int64_t count, const Span& tile, float* s, float* dp) {
    const float* lse = lse_of(sequence, head, i);
    Span seen = p_.seen(sequence, i, i + 1, first, count);
    if (*lse == -kInfinity || seen.empty()) seen = {tile.end, tile.end};
    fill(s, tile.begin, seen.begin, 0.f);
    fill(dp, tile.begin, seen.begin, 0.f);
    const Row row = {sequence, head, i, first + seen.begin, seen.end - seen.begin};
    if (row.n) {
      const RowBits bits(
          dropout_.seed,
          kDropout ? at(p_.dropout_rows(), sequence.batch, head, sequence.q_begin + i) : 0);
      float *scores = s + seen.begin, *ds = dp + seen.begin;
      if constexpr (!Gradients::kScaled) multiply_row(scores, row.n, scale_);
      if constexpr (kModified) modify(variant_, row, scores, slopes_);
      if (is_whole(sequence, i)) {
        const float dsink = gradient_whole_row<kDropout>(
            scores, ds, row.n, sink_, dlse(sequence, head, i), dropout_, bits, row.first);
        if (sums_.sinks) *sums_.sinks += dsink;
      } else {
        gradient_row<kDropout>(scores, ds, row.n, *lse, lse[p_.rows()], delta_[i - begin_],
                               dropout_, bits, row.first);
      }
      if constexpr (kModified) collect(row, ds);
    }
    fill(s, seen.end, tile.end, 0.f);
    fill(dp, seen.end, tile.end, 0.f);
  }

  // ds, the gradient of the modified scores, goes to what modified them, and becomes that of the
  // products.
  void collect(const Row& row, float* ds) {
    if (sums_.dbias)
      with_type(int(variant_.bias_dtype),
                [&](auto zero) { write_to_bias(variant_, row, ds, (decltype(zero)*)sums_.dbias); });
    if (sums_.bias) add_to_bias(variant_, row, begin_, ds, sums_.bias);
    if (sums_.relative) add_to_relative(variant_, row, ds, sums_.relative);
    if (variant_.softcap != 0.f)
      for_vectors(row.n, [&](int64_t j, auto n) {
        store(ds + j, load(ds + j, Full{}) * load(slopes_ + j, Full{}), n);
      });
  }

  const float* lse_of(const Sequence& sequence, int64_t head, int64_t i) const {
    return o_.lse + at(p_.statistics(), sequence.batch, head, sequence.q_begin + i);
  }
  float dlse(const Sequence& sequence, int64_t head, int64_t i) const {
    return o_.dlse ? o_.dlse[at(p_.dlse, sequence.batch, head, sequence.q_begin + i)] : 0.f;
  }

  // Row n of x is row rows.begin + n of the gradient from `token` on; all others, up to `all`, are
  // zero.
  void write(const float* x, Span rows, int64_t columns, float factor, void* gradient,
             const Strides& strides, int64_t batch, int64_t head, int64_t token, int64_t all) {
    T* out = (T*)gradient + at(strides, batch, head, token);
    for (int64_t row = 0; row < all; ++row) {
      const bool there = rows.begin <= row && row < rows.end;
      const float* from = x + (there ? row - rows.begin : 0) * padded(columns);
      for_vectors(columns, [&](int64_t d, auto n) {
        store(out + row * strides.token + d, there ? load(from + d, Full{}) * factor : vfloat{}, n);
      });
    }
  }

  const Problem& p_;
  const Variant& variant_;
  const Operands& o_;
  const float scale_;
  const Dropout& dropout_;
  Sums sums_;
  float sink_;
  bool needs_dscores_;              // dscores_ is read
  Span keys_;                       // what is seen, cut from its begin into blocks of
  int64_t block_, stride_, begin_;  // keys; of the scores; the query that row 0 of a tile is
  float *delta_, *scores_, *dscores_, *slopes_, *extra_;
};

// How the gradient of a bias is made: see Tiling.
enum class BiasGradient { kNone, kWhole, kShared, kNarrow };

BiasGradient gradient_of(const Variant& variant, const void* dbias, int64_t B, int64_t H) {
  const int64_t* size = variant.bias_size;
  if (!dbias) return BiasGradient::kNone;
  if (size[2] == 1 || size[3] == 1) return BiasGradient::kNarrow;
  return size[0] == B && size[1] == H ? BiasGradient::kWhole : BiasGradient::kShared;
}

}  // namespace

void scaled_dot_product_attention_backward(const void* dy, const float* dlse, const void* query,
                                           const void* key, const void* value, const void* y,
                                           const float* lse, void* dquery, void* dkey, void* dvalue,
                                           void* dbias, float* dsinks, float* drelative,
                                           const int64_t* seed, const int64_t* problem_numbers,
                                           const int64_t* variant_numbers, float scale,
                                           float softcap, float dropout_p, int64_t threshold,
                                           int dtype) {
  const Problem problem(problem_numbers);
  const Variant variant(variant_numbers, softcap);
  const Dropout dropout(seed, dropout_p, threshold);
  const Operands operands = {dy, query, key, value, y, dlse, lse, dquery, dkey, dvalue};
  const int64_t B = problem.sequences, H = problem.H;
  const BiasGradient bias = gradient_of(variant, dbias, B, H);
  const int64_t narrow = variant.bias_size[2] * variant.bias_size[3];
  const int64_t distances = variant.distances();
  Owned<double> bias_sums, relative_sums, sink_sums;
  if (bias == BiasGradient::kNarrow) bias_sums.allocate(B * H * narrow, true);
  if (drelative) relative_sums.allocate(B * H * distances, true);
  if (dsinks) sink_sums.allocate(B * H, true);
  const auto sums_of = [&](int64_t b, int64_t h) {
    const int64_t n = b * H + h;
    return Sums{bias_sums.get() ? bias_sums.get() + n * narrow : nullptr,
                drelative ? relative_sums.get() + n * distances : nullptr,
                dsinks ? sink_sums.get() + n : nullptr,
                bias == BiasGradient::kWhole ? dbias : nullptr};
  };
  const auto differentiate = [&](auto gradients, auto zero, auto dropped, auto modified) {
    using Kernel = Backward<decltype(zero), typename decltype(gradients)::type,
                            decltype(dropped)::value, decltype(modified)::value>;
    const bool is_first_pass_wanted = dquery || dkey || dvalue || sums_of(0, 0).any();
    const int64_t items = is_first_pass_wanted ? B * problem.Hkv : 0;
    for_items(items, problem, variant.modifies, [&](int64_t n, Scratch& scratch) {
      const int64_t b = n / problem.Hkv;
      Kernel kernel(problem, variant, operands, scale, dropout);
      return kernel.run(b, n % problem.Hkv, scratch, [&](int64_t h) { return sums_of(b, h); });
    });
    if (bias != BiasGradient::kShared) return;
    const int64_t* size = variant.bias_size;
    const int64_t tiles = (size[2] + Kernel::kRows - 1) / Kernel::kRows;
    const int64_t bytes = variant.bias_dtype == int64_t(Dtype::kFloat32) ? 4 : 2;
    for_items(size[0] * size[1] * tiles, problem, variant.modifies,
              [&](int64_t n, Scratch& scratch) {
                const int64_t b = n / tiles / size[1], h = n / tiles % size[1];
                Kernel kernel(problem, variant, operands, scale, dropout);
                return kernel.run_bias(size[0] == 1 ? Span{0, B} : Span{b, b + 1},
                                       size[1] == 1 ? Span{0, H} : Span{h, h + 1},
                                       n % tiles * Kernel::kRows,
                                       (char*)dbias + n / tiles * narrow * bytes, scratch);
              });
  };
  with_kernel(dtype, seed, variant.modifies, [&](auto zero, auto dropped, auto modified) {
#if defined(SLIM_AMX)
    if constexpr (sizeof zero == 2)
      if (has_amx) return differentiate(Chosen<Bf16Gradients>{}, zero, dropped, modified);
#endif
    differentiate(Chosen<FloatGradients>{}, zero, dropped, modified);
  });
  if (bias == BiasGradient::kNarrow)
    with_type(int(variant.bias_dtype), [&](auto zero) {
      reduce(bias_sums.get(), B, H, narrow, variant.bias_size[0] == 1, variant.bias_size[1] == 1,
             (decltype(zero)*)dbias);
    });
  if (drelative) reduce(relative_sums.get(), B, H, distances, true, false, drelative);
  if (dsinks) reduce(sink_sums.get(), B, H, 1, true, false, dsinks);
}

}  // namespace slimkernels::SLIM_ISA
