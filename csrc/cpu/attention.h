// What attention works with: the arithmetic of one row of scores, where sequences lie and which
// keys a query sees, and scratch memory.
#pragma once
#include "elementary.h"
#include "gemm.h"
#include "memory.h"
#include "parallel.h"
#include "random.h"

namespace slimkernels::SLIM_ISA {

// The largest of n scores, a lane of the result's for each lane's. Up to a whole vector, what no
// key stands behind becomes -inf, whose exponential is zero. kScale: of s times scale, which it
// becomes; not later, in one operation with the subtraction of the largest, since that would not
// round where this does, and a large score could pass its own maximum.
template <bool kScale = false>
inline vfloat peaks_of(float* s, int64_t n, float scale = 1.f) {
  vfloat most[2] = {broadcast(-kInfinity), broadcast(-kInfinity)};
  const auto score = [&](int64_t i) {
    const vfloat x = load(s + i, Full{});
    if constexpr (!kScale) return x;
    store(s + i, x * scale, Full{});
    return x * scale;
  };
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes)
    for (int k = 0; k < 2; ++k) most[k] = vmax(score(i + k * kLanes), most[k]);
  for (; i + kLanes <= n; i += kLanes) most[0] = vmax(score(i), most[0]);
  if (i < n) {
    score(i);
    store(s + n, broadcast(-kInfinity), Part{int(kLanes - n % kLanes)});
    most[1] = vmax(load(s + i, Full{}), most[1]);
  }
  return vmax(most[0], most[1]);
}

// s *= factor, up to a whole vector.
inline void multiply_row(float* s, int64_t n, float factor) {
  for (int64_t i = 0; i < n; i += kLanes) store(s + i, load(s + i, Full{}) * factor, Full{});
}

// One vector of the sums, or of what else `combine` makes of two, of each of kLanes vectors, which
// are lost: one by one they would wait for each of their additions.
template <typename Combine>
inline vfloat fold(vfloat* rows, Combine combine) {
  transpose_step<kLanes / 2>(rows, EveryLane{});
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) rows[i] = combine(rows[i], rows[i + width]);
  return rows[0];
}

// While all scores are -inf, they add exp(-inf - 0) = 0, not exp(-inf + inf) = NaN.
inline vfloat shift_of(vfloat peak) { return peak == -kInfinity ? vfloat{} : peak; }

// One row of scores to probabilities relative to `shift`, which may overwrite the scores from their
// own start or from before it; returns their sums, lane by lane. Inlined, as its gradients are: the
// keys in RowBits would be read from memory for every vector otherwise.
template <bool kDropout, typename Probability>
inline __attribute__((always_inline)) vfloat exponentials(const float* s, vfloat shift,
                                                          Probability* probabilities, int64_t n,
                                                          const Dropout& dropout,
                                                          const RowBits& bits, int64_t first_key) {
  vfloat sums[2] = {};
  const auto exponential = [&](int64_t j, vfloat& sum) {
    const vfloat p = exp_of_nonpositive(load(s + j, Full{}) - shift);
    sum += p;
    if constexpr (kDropout)
      store(probabilities + j, bits.at(first_key + j) >= dropout.threshold ? p : vfloat{}, Full{});
    else
      store(probabilities + j, p, Full{});
  };
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes)
    for (int k = 0; k < 2; ++k) exponential(i + k * kLanes, sums[k]);
  for (; i < n; i += kLanes) exponential(i, sums[0]);
  return sums[0] + sums[1];
}

// Of one row: probabilities p = exp(s - lse), where lse is the sum of `lse` and `low`, and with
// dropout's mask and scale in dp, ds = p * (dp - delta). Leaves p after dropout in s, and ds in dp.
template <bool kDropout>
inline __attribute__((always_inline)) void gradient_row(float* s, float* dp, int64_t n, float lse,
                                                        float low, float delta,
                                                        const Dropout& dropout, const RowBits& bits,
                                                        int64_t first_key) {
  for_vectors(n, [&](int64_t i, auto lanes) {
    const vfloat p = exp_of_nonpositive((load(s + i, Full{}) - lse) - low);
    vfloat kept = p, g = load(dp + i, Full{});
    if constexpr (kDropout) {
      const auto keeps = bits.at(first_key + i) >= dropout.threshold;
      kept = keeps ? p : vfloat{};
      g = keeps ? g * dropout.scale : vfloat{};
    }
    store(s + i, keep(kept, lanes), Full{});
    store(dp + i, keep(p * (g - delta), lanes), Full{});
  });
}

// The same where all of a row's keys are here: its softmax and sum(p * dp) are computed again
// rather than taken from lse and from delta. They cancel against the p and dp of this very row, so
// that their roundings do too; lse, one float32, carries an error of exp's argument as large as
// lse. sink is one more score, without a value; -inf where there is none. Returns its gradient.
template <bool kDropout>
inline __attribute__((always_inline)) float gradient_whole_row(float* s, float* dp, int64_t n,
                                                               float sink, float dlse,
                                                               const Dropout& dropout,
                                                               const RowBits& bits,
                                                               int64_t first_key) {
  const float most = max(peaks_of(s, n)), peak = sink > most ? sink : most;
  if (n % kLanes) store(dp + n, vfloat{}, Part{int(kLanes - n % kLanes)});
  vfloat total = {}, dot = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    vfloat p = exp_of_nonpositive(load(s + i, Full{}) - peak), g = load(dp + i, Full{});
    total += p;
    if constexpr (kDropout) {
      const auto keeps = bits.at(first_key + i) >= dropout.threshold;
      g = keeps ? g * dropout.scale : vfloat{};
      store(dp + i, g, Full{});
      dot += p * g;
      p = keeps ? p : -p;  // the sign remembers the mask until the next loop
    } else {
      dot += p * g;
    }
    store(s + i, p, Full{});
  }
  const float p_sink = sink != -kInfinity ? exp_of_nonpositive(broadcast(sink - peak))[0] : 0.f;
  const float all = sum(total) + p_sink;
  const float inverse = 1.f / all, delta = sum(dot) * inverse - dlse;
  for (int64_t i = 0; i < n; i += kLanes) {
    const vfloat p = load(s + i, Full{}) * inverse, size = p < 0.f ? -p : p;
    store(s + i, kDropout ? p < 0.f ? vfloat{} : p : p, Full{});
    store(dp + i, (kDropout ? size : p) * (load(dp + i, Full{}) - delta), Full{});
  }
  return -p_sink * inverse * delta;
}

// The sum over a row's keys, and its sink, where forward ends.
class Total {
 public:
  float lse, low, factor;  // low: what lse lacks; factor: 1 / the sum relative to the keys' peak
  bool unseen;             // no key is seen, or only scores of -inf

  Total(float peak, float sum, float sink) {
    unseen = peak == -kInfinity && sum == 0.f;  // NaN makes no peak, but a sum
    if (sink == -kInfinity) {
      factor = 1.f / sum;
      set(peak, sum);
      if (unseen) lse = -kInfinity, low = 0.f;
    } else {
      const float top = sink > peak ? sink : peak;
      const float shrink = exp_of_nonpositive(broadcast(peak - top))[0];
      const float all = sum * shrink + exp_of_nonpositive(broadcast(sink - top))[0];
      factor = shrink / all;
      set(top, all);
    }
  }

 private:
  // Fast2Sum (Dekker 1971) where the peak is the larger, which is where it matters.
  void set(float peak, float sum) {
    const float log = ::logf(sum);
    lse = peak + log;
    low = std::isfinite(lse) ? log - (lse - peak) : 0.f;
  }
};

// The scores of a tile: rows a cache line longer than the keys, so that a column of them, which the
// transposed products read, does not fall into one cache set.
inline int64_t score_stride(int64_t keys) { return padded(keys) + kLanes; }

// Where the elements of a tensor lie: offset = batch * b + head * h + token * t, in elements.
struct Strides {
  int64_t batch, head, token;
};

struct Sequence {
  int64_t index;
  int64_t batch;  // index along the dimension that Strides::batch steps; 0 where ragged
  int64_t q_begin, q_count, k_begin;
  int64_t k_count, k_rows;  // the keys that may be seen, and those that are there
  int64_t seeing;           // queries from here on see nothing
  int64_t offset;           // added to the position of a query
};

// Sequences of so few queries have a forward of their own (attention_direct.h), which sums products
// in another order.
inline constexpr int64_t kDirectQueries = 16;

struct Span {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};

// One call's shapes. Mirrors _problem() in
// slimkernels/backends/cpu/scaled_dot_product_attention.py.
struct Problem {
  int64_t sequences, H, Hkv, Tq, Tk, D, Dv;
  int64_t left, right;       // query i sees keys i - left to i + right; -1: no limit
  int64_t offset;            // where offsets is null
  int64_t limit_q, limit_k;  // queries and keys at and after these see, are seen not
  Strides query, key, value, dy, dlse;
  const int32_t *key_lengths, *offsets;  // (sequences,), or null
  const int32_t *cu_seqlens_q, *cu_seqlens_k;

  explicit Problem(const int64_t* numbers) { std::memcpy((void*)this, numbers, sizeof *this); }

  bool ragged() const { return cu_seqlens_q; }
  int64_t group() const { return H / Hkv; }

  // Contiguous (B, heads, T, width), or (T, heads, width) where ragged.
  Strides contiguous(int64_t heads, int64_t T, int64_t width) const {
    return ragged() ? Strides{0, width, heads * width}
                    : Strides{heads * T * width, T * width, width};
  }
  // lse: (2, B, H, Tq), or (2, H, Tq) where ragged: what the first lacks is `rows` further on.
  int64_t rows() const { return (ragged() ? 1 : sequences) * H * Tq; }
  Strides statistics() const { return {ragged() ? 0 : H * Tq, Tq, 1}; }
  // Dropout's row number: (b * H + h) * Tq + i, or t * H + h where ragged.
  Strides dropout_rows() const { return ragged() ? Strides{0, 1, H} : statistics(); }

  Sequence sequence(int64_t b) const {
    Sequence s = {b, b, 0, Tq, 0, key_lengths ? clamp(key_lengths[b], 0, Tk) : Tk, Tk, 0, offset};
    if (ragged()) {
      // Values are checked above where that is possible; here only memory is kept safe.
      const int64_t q = clamp(cu_seqlens_q[b], 0, Tq), k = clamp(cu_seqlens_k[b], 0, Tk);
      s.batch = 0;
      s.q_begin = q, s.q_count = clamp(cu_seqlens_q[b + 1], q, Tq) - q;
      s.k_begin = k, s.k_count = s.k_rows = clamp(cu_seqlens_k[b + 1], k, Tk) - k;
    }
    s.k_count = clamp(limit_k, 0, s.k_count);
    s.seeing = clamp(limit_q, 0, s.q_count);
    if (offsets) s.offset = offsets[b];
    return s;
  }

  // Query i sees keys from low(i) to below high(i); neither falls as i grows.
  int64_t low(const Sequence& s, int64_t i) const {
    return left < 0 ? 0 : clamp(i + s.offset - left, 0, s.k_count);
  }
  int64_t high(const Sequence& s, int64_t i) const {
    return right < 0 ? s.k_count : clamp(i + s.offset + right + 1, 0, s.k_count);
  }
  // Of `count` keys from `first`, all there are, those that one of the queries from i to below
  // `end` sees.
  Span seen(const Sequence& s, int64_t i, int64_t end, int64_t first, int64_t count) const {
    if (i >= s.seeing) return {0, 0};
    if (left < 0 && right < 0) return {0, count};
    return {clamp(low(s, i) - first, 0, count), clamp(high(s, end - 1) - first, 0, count)};
  }
  // The queries that may see one of these keys.
  Span seeing(const Sequence& s, int64_t first, int64_t count) const {
    return {right < 0 ? 0 : clamp(first - s.offset - right, 0, s.seeing),
            left < 0 ? s.seeing : clamp(first + count - s.offset + left, 0, s.seeing)};
  }

  // Keys in a block: packed twice they fit in half of a 1 MiB L2 beside the scores.
  int64_t block_keys() const { return clamp(65536 / (padded(D) + padded(Dv)) / 64 * 64, 64, 512); }

  int threads(int64_t items) const {
    const int64_t count = ragged() ? Tk / clamp(sequences, 1, Tk + 1) : Tk;
    const int64_t band = left < 0 || right < 0 ? count : clamp(left + right + 1, 0, count);
    const int64_t rows = Tq * H * (ragged() ? 1 : sequences);
    return int(clamp(threads_for(rows * (band + 1) / 16 * D), 1, clamp(items, 1, 1 << 20)));
  }
};

inline int64_t at(const Strides& strides, int64_t batch, int64_t head, int64_t token) {
  return strides.batch * batch + strides.head * head + strides.token * token;
}

// A thread's memory, kept between calls: malloc would map and fault in the 256 KiB to a few MiB of
// a short sequence every time, which costs as much as its attention. Past kKept, where backward of
// a long sequence gets, that cost does not show and the memory does: it goes when the call ends.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  ~Scratch() { std::free(memory_); }

  // Room for `floats`, handed out by take(); false if there is none. What was there is lost.
  bool reserve(int64_t floats) {
    used_ = 0;
    if (floats <= size_) return true;
    resize(rounded(floats));
    return memory_;
  }
  float* take(int64_t floats) {
    float* part = memory_ + used_;
    used_ += rounded(floats);
    return part;
  }
  void end_call() {
    if (size_ > kKept) resize(0);
  }
  static int64_t rounded(int64_t floats) { return (floats + 15) / 16 * 16; }

 private:
  static constexpr int64_t kKept = 2 << 20;  // floats: 8 MiB

  void resize(int64_t floats) {
    std::free(memory_);
    memory_ = floats ? (float*)std::aligned_alloc(64, floats * sizeof(float)) : nullptr;
    size_ = memory_ ? floats : 0;
  }

  float* memory_ = nullptr;
  int64_t size_ = 0, used_ = 0;
};

inline Scratch& scratch_of_thread() {
  static thread_local Scratch scratch;
  return scratch;
}

// While it lives, results below the smallest normal number become 0. A bias such as ALiBi's makes
// probabilities fall to there and past it, and each denormal sum would cost Intel's processors 150
// cycles: with them ALiBi took 1.7 times as long.
class FlushDenormals {
 public:
  explicit FlushDenormals(bool flush) : flush_(flush) {
#if defined(__x86_64__)
    before_ = _mm_getcsr();
    if (flush_) _mm_setcsr(before_ | 0x8000u);
#endif
  }
  FlushDenormals(const FlushDenormals&) = delete;
  ~FlushDenormals() {
#if defined(__x86_64__)
    if (flush_) _mm_setcsr(before_);
#endif
  }

 private:
  bool flush_;
  unsigned before_ = 0;
};

// body(item, scratch) for each item, handed out dynamically; false says that memory ran out.
template <typename Body>
void for_items(int64_t items, const Problem& problem, bool is_modified, Body body) {
  bool failed = false;
#pragma omp parallel num_threads(problem.threads(items)) reduction(|| : failed)
  {
    const FlushDenormals flush(is_modified);
    Scratch& scratch = scratch_of_thread();
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t item = 0; item < items; ++item) failed = !body(item, scratch) || failed;
    scratch.end_call();
  }
  if (failed) out_of_memory();
}

// A constant as a type, which chooses a template's instance inside a function.
template <bool kValue>
struct Choice {
  static constexpr bool value = kValue;
};

// A type as a value, likewise.
template <typename Type>
struct Chosen {
  using type = Type;
};

// body(T{}, Choice{}, Choice{}) with the storage type, whether scores are dropped and whether they
// are modified as types.
template <typename Body>
void with_kernel(int dtype, bool dropped, bool modified, Body body) {
  with_type(dtype, [&](auto zero) {
    if (dropped)
      modified ? body(zero, Choice<true>{}, Choice<true>{})
               : body(zero, Choice<true>{}, Choice<false>{});
    else
      modified ? body(zero, Choice<false>{}, Choice<true>{})
               : body(zero, Choice<false>{}, Choice<false>{});
  });
}

inline void fill(float* x, int64_t begin, int64_t end, float value) {
  for (int64_t i = begin; i < end; ++i) x[i] = value;
}
template <typename T>
inline void clear(T* x, int64_t begin, int64_t end) {
  if (begin < end) std::memset((void*)(x + begin), 0, (end - begin) * sizeof *x);
}

}  // namespace slimkernels::SLIM_ISA
