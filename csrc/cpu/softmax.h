// What softmax's kernels over rows and over columns share: a call's numbers, and masked scores.
#pragma once
#include "elementary.h"

namespace slimkernels::SLIM_ISA {

// A call's integers, in the order of _problem in slimkernels/backends/cpu/_softmax.py.
struct SoftmaxProblem {
  int64_t log;          // the logarithm of softmax
  int64_t hides;        // in its backward: what is -inf was hidden
  int64_t M, N, inner;  // rows (M, N), or columns (M, N, inner)
  int64_t period;       // if > 0, row r sees the columns up to r % period
  int64_t queries;      // rows of a head
  int64_t heads;
  int64_t threshold;  // of dropout
  int64_t dtype, mask_dtype, sinks_dtype;
  // Where a mask's rows begin, as MaskRows in slimkernels/backends/_mask.py. Of columns these are
  // middle and inner 1, and stride_middle the stride from one of the N to the next.
  int64_t mask_middle, mask_inner, stride_outer, stride_middle, stride_inner, stride_col;

  explicit SoftmaxProblem(const int64_t* numbers) { std::memcpy(this, numbers, sizeof *this); }
};

inline constexpr int kBool = -1;  // of mask_dtype

// Whether an element of a mask hides: false does, or -inf that would be added.
inline bool hides(uint8_t m) { return !m; }
inline bool hides(float m) { return m == -kInfinity; }
inline bool hides(bf16 m) { return m.bits == 0xFF80; }

// All bits of a lane that stands for a column, and which a mask shows.
inline vint real(Full) { return vint{} == 0; }
inline vint real(Part part) {
  vint lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < part.count;
}
template <typename Lanes>
inline vint shown(const uint8_t* mask, Lanes lanes) {
  uint8_t bytes[16] = {};
  std::memcpy(bytes, mask, lanes.count);
  vint wide;
#if defined(__AVX512F__)  // GCC widens bytes one by one
  wide = (vint)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)bytes));
#elif defined(__AVX2__)
  wide = (vint)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)bytes));
#else
  for (int i = 0; i < kLanes; ++i) wide[i] = bytes[i];
#endif
  return wide != 0;
}

// A score, -inf where hidden and in lanes that stand for no column, and in which lanes it is seen.
struct Score {
  vfloat value;
  vint seen;
};
inline Score where(vint seen, vfloat value) { return {seen ? value : broadcast(-kInfinity), seen}; }

// What a mask's row makes of the scores of columns i and on; its elements are 1 apart, or one for
// all where stride is 0.
struct Unmasked {
  template <typename Lanes>
  Score of(vfloat s, int64_t, Lanes lanes) const {
    return where(real(lanes), s);
  }
  bool shows_any(int64_t end) const { return end > 0; }
  Unmasked from(int64_t) const { return {}; }
};
template <typename M>
struct Masked {
  const M* mask;
  int64_t stride;

  template <typename Lanes>
  Score of(vfloat s, int64_t i, Lanes lanes) const {
    if constexpr (sizeof(M) == 1) {
      if (stride) return where(shown(mask + i, lanes), s);
      return where(hides(*mask) ? vint{} : real(lanes), s);
    } else {
      const vfloat m = stride ? load(mask + i, lanes) : broadcast(load(mask, Part{1})[0]);
      return where((m != -kInfinity) & real(lanes), s + m);
    }
  }
  bool shows_any(int64_t end) const {
    for (int64_t i = 0; i < end; ++i)
      if (!hides(mask[i * stride])) return true;
    return false;
  }
  Masked from(int64_t offset) const { return {mask + offset, stride}; }
};

// A row of scores, x * scale under its mask. A score is the same number whenever it is asked for:
// else one of a row taken by segments could pass the maximum that was found before.
template <typename T, typename Mask>
struct Scores {
  const T* x;
  Mask mask;
  float scale;

  template <typename Lanes>
  Score at(int64_t i, Lanes lanes) const {
    return mask.of(rounded(load(x + i, lanes) * scale), i, lanes);
  }
};

// Calls body with a value of x's type and one of the mask's, bytes also for no mask.
template <typename Body>
inline void with_types(const SoftmaxProblem& p, Body body) {
  with_type(p.dtype, [&](auto x) {
    if (p.mask_dtype == kBool)
      body(x, uint8_t{});
    else if (p.mask_dtype == int(Dtype::kFloat32))
      body(x, float{});
    else if constexpr (sizeof x == sizeof(bf16))  // no other is added to float32
      body(x, bf16{});
  });
}

// The gradient of a softmax, or of its logarithm, from y and what is to be its dy:
//   dx = scale * y * (dy - sum(dy * y)), dx = scale * (dy - exp(y) * sum(dy)).
// `hides`  what is -inf in the logarithm was hidden: it has no gradient
template <bool kLog>
struct Gradient {
  float scale;
  bool hides;

  vint counts(vfloat y) const { return hides ? y != -kInfinity : vint{} == 0; }
  vfloat term(vfloat dy, vfloat y) const {
    if constexpr (!kLog) return dy * y;
    return counts(y) ? dy : vfloat{};
  }
  vfloat dx(vfloat dy, vfloat y, vfloat sum) const {
    if constexpr (!kLog) return scale * y * (dy - sum);
    return counts(y) ? scale * (dy - exp_of_nonpositive(y) * sum) : vfloat{};
  }
};

}  // namespace slimkernels::SLIM_ISA
