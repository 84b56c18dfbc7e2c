// What attention works with: the arithmetic of one row of scores, where sequences lie and which
// keys a query sees, and scratch memory.
#pragma once
#include "gemm.h"
#include "memory.h"
#include "parallel.h"
#include "random.h"

namespace slimkernels::SLIM_ISA {

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The largest of n scores. Up to a whole vector, what no key stands behind becomes -inf, whose
// exponential is zero.
inline float peak_of(float* s, int64_t n) {
  if (n % kLanes) store(s + n, broadcast(-kInfinity), Part{int(kLanes - n % kLanes)});
  vfloat most[2] = {broadcast(-kInfinity), broadcast(-kInfinity)};
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes)
    for (int k = 0; k < 2; ++k) most[k] = vmax(load(s + i + k * kLanes, Full{}), most[k]);
  for (; i < n; i += kLanes) most[0] = vmax(load(s + i, Full{}), most[0]);
  return max(vmax(most[0], most[1]));
}

// One row of scores to probabilities relative to the maximum so far.
template <bool kDropout>
inline void softmax_row(float* s, int64_t n, float& peak, float& total, float* y, int64_t width,
                        const Dropout& dropout, const RowBits& bits, int64_t first_key) {
  const float before = peak, here = peak_of(s, n);
  peak = here > before ? here : before;
  // While all scores are -inf, they add exp(-inf - 0) = 0, not exp(-inf + inf) = NaN.
  const float shift = peak == -kInfinity ? 0.f : peak;
  if (before != peak && before != -kInfinity) {
    const float shrink = exp_of_nonpositive(broadcast(before - peak))[0];
    total *= shrink;
    for (int64_t d = 0; d < width; d += kLanes) store(y + d, load(y + d, Full{}) * shrink, Full{});
  }
  vfloat sums[2] = {};
  const auto exponential = [&](int64_t j, vfloat& sum) {
    const vfloat p = exp_of_nonpositive(load(s + j, Full{}) - shift);
    sum += p;
    if constexpr (kDropout)
      store(s + j, bits.at(first_key + j) >= dropout.threshold ? p : vfloat{}, Full{});
    else
      store(s + j, p, Full{});
  };
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes)
    for (int k = 0; k < 2; ++k) exponential(i + k * kLanes, sums[k]);
  for (; i < n; i += kLanes) exponential(i, sums[0]);
  total += sum(sums[0] + sums[1]);
}

// Of one row: probabilities p = exp(s - lse), and with dropout's mask and scale in dp,
// ds = p * (dp - delta). Leaves p after dropout in s, and ds in dp.
template <bool kDropout>
inline void gradient_row(float* s, float* dp, int64_t n, float lse, float delta,
                         const Dropout& dropout, const RowBits& bits, int64_t first_key) {
  for_vectors(n, [&](int64_t i, auto lanes) {
    const vfloat p = exp_of_nonpositive(load(s + i, Full{}) - lse);
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
// lse.
template <bool kDropout>
inline void gradient_whole_row(float* s, float* dp, int64_t n, const Dropout& dropout,
                               const RowBits& bits) {
  const float peak = peak_of(s, n);
  if (n % kLanes) store(dp + n, vfloat{}, Part{int(kLanes - n % kLanes)});
  vfloat total = {}, dot = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    vfloat p = exp_of_nonpositive(load(s + i, Full{}) - peak), g = load(dp + i, Full{});
    total += p;
    if constexpr (kDropout) {
      const auto keeps = bits.at(i) >= dropout.threshold;
      g = keeps ? g * dropout.scale : vfloat{};
      store(dp + i, g, Full{});
      dot += p * g;
      p = keeps ? p : -p;  // the sign remembers the mask until the next loop
    } else {
      dot += p * g;
    }
    store(s + i, p, Full{});
  }
  const float inverse = 1.f / sum(total), delta = sum(dot) * inverse;
  for (int64_t i = 0; i < n; i += kLanes) {
    const vfloat p = load(s + i, Full{}) * inverse, size = p < 0.f ? -p : p;
    store(s + i, kDropout ? p < 0.f ? vfloat{} : p : p, Full{});
    store(dp + i, (kDropout ? size : p) * (load(dp + i, Full{}) - delta), Full{});
  }
}

// Where the elements of a tensor lie: offset = batch * b + head * h + token * t, in elements.
struct Strides {
  int64_t batch, head, token;
};

struct Sequence {
  int64_t batch;  // index along the dimension that Strides::batch steps; 0 where ragged
  int64_t q_begin, q_count, k_begin, k_count;
};

// One call's shapes. Mirrors _sizes() in slimkernels/backends/cpu/scaled_dot_product_attention.py.
struct Problem {
  int64_t sequences, H, Hkv, Tq, Tk, D;
  Strides query, key, value, dy;
  const int32_t *key_lengths, *cu_seqlens_q, *cu_seqlens_k;
  float scale;
  bool is_causal;

  Problem(const int64_t* sizes, const int32_t* key_lengths, const int32_t* cu_seqlens_q,
          const int32_t* cu_seqlens_k, float scale, int is_causal)
      : key_lengths(key_lengths),
        cu_seqlens_q(cu_seqlens_q),
        cu_seqlens_k(cu_seqlens_k),
        scale(scale),
        is_causal(is_causal) {
    std::memcpy(&sequences, sizes, 18 * sizeof(int64_t));
  }

  bool ragged() const { return cu_seqlens_q; }
  int64_t width() const { return padded(D); }

  // Contiguous (B, heads, T, D), or (T, heads, D) where ragged.
  Strides contiguous(int64_t heads, int64_t T) const {
    return ragged() ? Strides{0, D, heads * D} : Strides{heads * T * D, T * D, D};
  }
  // lse: (B, H, Tq), or (H, Tq) where ragged.
  Strides statistics() const { return {ragged() ? 0 : H * Tq, Tq, 1}; }
  // Dropout's row number: (b * H + h) * Tq + i, or t * H + h where ragged.
  Strides dropout_rows() const { return ragged() ? Strides{0, 1, H} : statistics(); }

  Sequence sequence(int64_t b) const {
    if (!ragged()) return {b, 0, Tq, 0, key_lengths ? clamp(key_lengths[b], 0, Tk) : Tk};
    // Values are checked above where that is possible; here only memory is kept safe.
    const int64_t q = clamp(cu_seqlens_q[b], 0, Tq), k = clamp(cu_seqlens_k[b], 0, Tk);
    return {0, q, clamp(cu_seqlens_q[b + 1], q, Tq) - q, k, clamp(cu_seqlens_k[b + 1], k, Tk) - k};
  }

  // Of `count` keys, those from `first`, how many query i sees.
  int64_t visible(int64_t i, int64_t first, int64_t count) const {
    return is_causal ? clamp(i + 1 - first, 0, count) : count;
  }

  // Keys in a block: packed twice they fit in half of a 1 MiB L2 beside the scores.
  int64_t block_keys() const { return clamp(32768 / width() / 64 * 64, 64, 512); }

  int threads(int64_t items) const {
    const int64_t keys = ragged() ? Tk / clamp(sequences, 1, Tk + 1) : Tk;
    const int64_t rows = Tq * H * (ragged() ? 1 : sequences);
    return int(clamp(threads_for(rows * (keys + 1) / 16 * D), 1, clamp(items, 1, 1 << 20)));
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

// body(item, scratch) for each item, handed out dynamically; false says that memory ran out.
template <typename Body>
void for_items(int64_t items, const Problem& problem, Body body) {
  bool failed = false;
#pragma omp parallel num_threads(problem.threads(items)) reduction(|| : failed)
  {
    Scratch& scratch = scratch_of_thread();
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t item = 0; item < items; ++item) failed = !body(item, scratch) || failed;
    scratch.end_call();
  }
  if (failed) out_of_memory();
}

inline void fill(float* x, int64_t begin, int64_t end, float value) {
  for (int64_t i = begin; i < end; ++i) x[i] = value;
}

}  // namespace slimkernels::SLIM_ISA
