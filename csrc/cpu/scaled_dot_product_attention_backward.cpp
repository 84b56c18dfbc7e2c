// Gradients of attention: with p the probabilities, recomputed from the scores and lse, and dp
// their gradient, ds = p * (dp - delta), delta = sum(p * dp) - dlse, and
//   dvalue = p^T dy   dquery = ds key   dkey = ds^T query   dbias = ds   dsink = -p_sink * delta
//
// Tiling   An item is one key head of one sequence with every query head that reads it: dkey and
//          dvalue are summed without atomics. It walks blocks of keys, and in each the tiles of
//          kBackwardRows queries that see one of them.
//          A bias that is broadcast over sequences or heads, but not over queries or keys, has a
//          pass of its own: an item owns some of its rows and walks all that share them, since
//          (B, H, Tq, Tk) would have to be stored otherwise. Broadcast over queries or keys it is
//          summed along the way, a small sum a sequence and head, and these are added at the end.
//          The products of a gradient that is not wanted are left out; what is left has the same
//          bits.
// Traffic  Each operand is read once an item; O(T * D) scratch a thread.
// Numerics As in scaled_dot_product_attention.cpp. Sums over sequences and heads are in float64.
#include "attention_scores.h"
#include "kernels.h"

namespace slimkernels::SLIM_ISA {
namespace {

inline constexpr int64_t kBackwardRows = 48;

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

template <typename T, bool kDropout, bool kModified>
class Backward {
 public:
  Backward(const Problem& problem, const Variant& variant, const Operands& operands, float scale,
           const Dropout& dropout)
      : p_(problem), variant_(variant), o_(operands), scale_(scale), dropout_(dropout) {}

  // sums_of(head): where that of one head of this sequence goes.
  template <typename SumsOf>
  bool run(int64_t batch, int64_t key_head, Scratch& scratch, SumsOf sums_of) {
    const Sequence sequence = p_.sequence(batch);
    const int64_t queries = sequence.q_count, width = padded(p_.D), out_width = padded(p_.Dv);
    const Span keys = p_.seen(sequence, 0, queries, 0, sequence.k_count);
    const int64_t count = keys.end - keys.begin, block = clamp(count, 1, p_.block_keys());
    const int64_t dq_size = o_.dquery ? queries * width : 0, k_size = o_.dquery ? block * width : 0;
    const int64_t dk_size = o_.dkey ? count * width : 0,
                  dv_size = o_.dvalue ? count * out_width : 0;
    if (!scratch.reserve(floats(queries, block) + dq_size + dk_size + dv_size + k_size + 64))
      return false;
    take(scratch, queries, block);
    cut(keys, block);
    dq_ = scratch.take(dq_size);
    dk_ = scratch.take(dk_size);
    dv_ = scratch.take(dv_size);
    k_ = scratch.take(k_size);

    fill(dk_, 0, dk_size, 0.f);
    fill(dv_, 0, dv_size, 0.f);
    const int64_t group = p_.group();
    for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
      sums_ = sums_of(head);
      needs_dscores_ = o_.dquery || o_.dkey || sums_.any();
      load_queries(sequence, head, 0, queries);
      fill(dq_, 0, dq_size, 0.f);
      for (int64_t first = keys.begin; first < keys.end; first += block)
        add_block(sequence, head, keys, first, clamp(keys.end - first, 0, block));
      write(dq_, {0, queries}, p_.D, scale_, o_.dquery, p_.contiguous(p_.H, p_.Tq, p_.D),
            sequence.batch, head, sequence.q_begin, queries);
    }
    // The gradients have rows for the keys that were not seen, too.
    write(dk_, keys, p_.D, 1.f, o_.dkey, p_.contiguous(p_.Hkv, p_.Tk, p_.D), sequence.batch,
          key_head, sequence.k_begin, sequence.k_rows);
    write(dv_, keys, p_.Dv, kDropout ? dropout_.scale : 1.f, o_.dvalue,
          p_.contiguous(p_.Hkv, p_.Tk, p_.Dv), sequence.batch, key_head, sequence.k_begin,
          sequence.k_rows);
    return true;
  }

  // Rows from i of dbias (Tq, Tk), which these sequences and heads share.
  bool run_bias(Span sequences, Span heads, int64_t i, void* dbias, Scratch& scratch) {
    const int64_t columns = variant_.bias_size[3], block = p_.block_keys();
    const int64_t rows = clamp(variant_.bias_size[2] - i, 0, kBackwardRows);
    if (!scratch.reserve(floats(kBackwardRows, block) + 2 * rows * columns + 16)) return false;
    take(scratch, kBackwardRows, block);
    needs_dscores_ = true;
    sums_ = {(double*)scratch.take(2 * rows * columns), nullptr, nullptr, nullptr};
    for (int64_t n = 0; n < rows * columns; ++n) sums_.bias[n] = 0;
    for (int64_t b = sequences.begin; b < sequences.end; ++b) {
      const Sequence sequence = p_.sequence(b);
      const int64_t count = clamp(sequence.seeing - i, 0, rows);
      const Span keys = p_.seen(sequence, i, i + count, 0, sequence.k_count);
      if (count == 0 || keys.empty()) continue;
      cut(keys, block);
      for (int64_t head = heads.begin; head < heads.end; ++head) {
        load_queries(sequence, head, i, count);
        for (int64_t first = keys.begin; first < keys.end; first += block) {
          const int64_t n = clamp(keys.end - first, 0, block);
          load_keys(sequence, head / p_.group(), first, n);
          differentiate(sequence, head, 0, count, first, n);
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
  // Memory that both passes need.
  int64_t floats(int64_t queries, int64_t block) const {
    return Scratch::rounded(queries) + queries * (padded(p_.D) + padded(p_.Dv)) +
           block_floats(p_.D, block) + block_floats(p_.Dv, block) +
           (2 * kBackwardRows + 1) * score_stride(block) + 128;
  }
  void take(Scratch& scratch, int64_t queries, int64_t block) {
    stride_ = score_stride(block);
    delta_ = scratch.take(queries);
    q_ = scratch.take(queries * padded(p_.D));
    dout_ = scratch.take(queries * padded(p_.Dv));
    k_transposed_ = scratch.take(block_floats(p_.D, block));
    v_transposed_ = scratch.take(block_floats(p_.Dv, block));
    scores_ = scratch.take(kBackwardRows * stride_);
    dscores_ = scratch.take(kBackwardRows * stride_);
    slopes_ = scratch.take(stride_);
  }

  void cut(const Span& keys, int64_t block) {
    keys_ = keys;
    block_ = block;
    one_block_ = keys.end - keys.begin <= block;
  }

  // `queries` of them from query `begin` on.
  void load_queries(const Sequence& sequence, int64_t head, int64_t begin, int64_t queries) {
    const int64_t out_width = padded(p_.Dv), token = sequence.q_begin + begin;
    begin_ = begin;
    sink_ = variant_.sink(head);
    pack_rows((const T*)o_.query + at(p_.query, sequence.batch, head, token), p_.query.token,
              queries, p_.D, scale_, q_);
    pack_rows((const T*)o_.dy + at(p_.dy, sequence.batch, head, token), p_.dy.token, queries, p_.Dv,
              1.f, dout_);
    const Strides strides = p_.contiguous(p_.H, p_.Tq, p_.Dv);
    const T* y = (const T*)o_.y + at(strides, sequence.batch, head, token);
    for (int64_t i = 0; i < queries; ++i, y += strides.token) {
      if (is_whole(sequence, begin + i)) continue;
      delta_[i] = sum_over(p_.Dv, [&](int64_t d, auto n) {
        return load(y + d, n) * load(dout_ + i * out_width + d, Full{});
      });
      delta_[i] -= dlse(sequence, head, begin + i);
      const float* lse = lse_of(sequence, head, begin + i);
      if (sums_.sinks && *lse != -kInfinity)
        *sums_.sinks -= double(::expf((sink_ - *lse) - lse[p_.rows()])) * delta_[i];
    }
  }

  // Whether all keys that a query sees are in one block.
  bool is_whole(const Sequence& sequence, int64_t i) const {
    const Span seen = p_.seen(sequence, i, i + 1, 0, sequence.k_count);
    if (seen.empty() || one_block_) return !seen.empty();
    return (seen.begin - keys_.begin) / block_ == (seen.end - 1 - keys_.begin) / block_;
  }

  void load_keys(const Sequence& sequence, int64_t key_head, int64_t first, int64_t count) {
    const int64_t token = sequence.k_begin + first;
    pack_transposed((const T*)o_.key + at(p_.key, sequence.batch, key_head, token), p_.key.token,
                    count, p_.D, k_transposed_);
    pack_transposed((const T*)o_.value + at(p_.value, sequence.batch, key_head, token),
                    p_.value.token, count, p_.Dv, v_transposed_);
  }

  // Of `count` keys from `first`, of all those in `keys`.
  void add_block(const Sequence& sequence, int64_t head, const Span& keys, int64_t first,
                 int64_t count) {
    const int64_t width = padded(p_.D), out_width = padded(p_.Dv), key_head = head / p_.group();
    const Span queries = p_.seeing(sequence, first, count);
    if (queries.empty()) return;
    load_keys(sequence, key_head, first, count);
    if (o_.dquery)
      pack_rows((const T*)o_.key + at(p_.key, sequence.batch, key_head, sequence.k_begin + first),
                p_.key.token, count, p_.D, 1.f, k_);
    float *dk = dk_ + (first - keys.begin) * width, *dv = dv_ + (first - keys.begin) * out_width;
    const int64_t aligned = queries.begin - queries.begin % kBackwardRows;
    for (int64_t row = aligned; row < queries.end; row += kBackwardRows) {
      const int64_t rows = clamp(queries.end - row, 0, kBackwardRows);
      const Span seen = differentiate(sequence, head, row, rows, first, count);
      if (seen.empty()) continue;
      const int64_t n = seen.end - seen.begin;
      const float *p = scores_ + seen.begin, *ds = dscores_ + seen.begin;
      if (o_.dquery)
        gemm(rows, width, n, ds, stride_, panels_of_rows(k_ + seen.begin * width, width, width),
             dq_ + row * width, width, true);
      if (o_.dvalue)
        gemm<true>(n, out_width, rows, p, stride_,
                   panels_of_rows(dout_ + row * out_width, out_width, out_width),
                   dv + seen.begin * out_width, out_width, true);
      if (o_.dkey)
        gemm<true>(n, width, rows, ds, stride_, panels_of_rows(q_ + row * width, width, width),
                   dk + seen.begin * width, width, true);
    }
  }

  // Leaves the probabilities of a tile after dropout in scores_, the gradient of the products in
  // dscores_, both from the first to the last key that one of its rows sees, which it returns.
  Span differentiate(const Sequence& sequence, int64_t head, int64_t row, int64_t rows,
                     int64_t first, int64_t count) {
    const int64_t i = begin_ + row, width = padded(p_.D), out_width = padded(p_.Dv);
    Span tile = p_.seen(sequence, i, i + rows, first, count);
    if (tile.empty()) return tile;
    const Panels keys = panels_of_block(k_transposed_, p_.D, count);
    const Panels values = panels_of_block(v_transposed_, p_.Dv, count);
    tile.begin -= tile.begin % keys.columns();
    const int64_t n = tile.end - tile.begin;
    gemm(rows, n, p_.D, q_ + row * width, width, keys.from(tile.begin), scores_ + tile.begin,
         stride_, false);
    if (needs_dscores_)
      gemm(rows, n, p_.Dv, dout_ + row * out_width, out_width, values.from(tile.begin),
           dscores_ + tile.begin, stride_, false);
    else
      fill(dscores_, 0, rows * stride_, 0.f);
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
      if constexpr (kModified) modify(variant_, row, scores, slopes_);
      if (one_block_ || is_whole(sequence, i)) {
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

  // Row n of x is row rows.begin + n of out from `token` on, if out is wanted; all others, up to
  // `all`, are zero.
  void write(const float* x, Span rows, int64_t columns, float factor, void* gradient,
             const Strides& strides, int64_t batch, int64_t head, int64_t token, int64_t all) {
    if (!gradient) return;
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
  bool one_block_;                  // all that is seen is in one
  Span keys_;                       // what is seen, cut from its begin into blocks of
  int64_t block_, stride_, begin_;  // keys; of the scores; the query that row 0 of q_ is
  float *delta_, *q_, *dout_, *dq_, *dk_, *dv_, *k_transposed_, *v_transposed_, *k_, *scores_,
      *dscores_, *slopes_;
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
  with_kernel(dtype, seed, variant.modifies, [&](auto zero, auto dropped, auto modified) {
    using Kernel = Backward<decltype(zero), decltype(dropped)::value, decltype(modified)::value>;
    const bool is_first_pass_wanted = dquery || dkey || dvalue || sums_of(0, 0).any();
    const int64_t items = is_first_pass_wanted ? B * problem.Hkv : 0;
    for_items(items, problem, variant.modifies, [&](int64_t n, Scratch& scratch) {
      const int64_t b = n / problem.Hkv;
      Kernel kernel(problem, variant, operands, scale, dropout);
      return kernel.run(b, n % problem.Hkv, scratch, [&](int64_t h) { return sums_of(b, h); });
    });
    if (bias != BiasGradient::kShared) return;
    const int64_t* size = variant.bias_size;
    const int64_t tiles = (size[2] + kBackwardRows - 1) / kBackwardRows;
    const int64_t bytes = variant.bias_dtype == int64_t(Dtype::kFloat32) ? 4 : 2;
    for_items(size[0] * size[1] * tiles, problem, variant.modifies,
              [&](int64_t n, Scratch& scratch) {
                const int64_t b = n / tiles / size[1], h = n / tiles % size[1];
                Kernel kernel(problem, variant, operands, scale, dropout);
                return kernel.run_bias(size[0] == 1 ? Span{0, B} : Span{b, b + 1},
                                       size[1] == 1 ? Span{0, H} : Span{h, h + 1},
                                       n % tiles * kBackwardRows,
                                       (char*)dbias + n / tiles * narrow * bytes, scratch);
              });
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
