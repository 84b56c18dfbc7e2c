// SIMD vectors of float for the CPU kernels: load, store, reductions, exp.
//
// One source serves every instruction set: the vectors are GCC/Clang vector extensions, whose
// width follows the flags this file is compiled with, and intrinsics appear only where the
// compiler finds no good code by itself. Arithmetic is float32 whatever the storage type is.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../ops.h"

namespace slimkernels::SLIM_ISA {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

typedef float vfloat __attribute__((vector_size(kLanes * 4)));
typedef int32_t vint __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vuint __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vshort __attribute__((vector_size(kLanes * 2)));

struct bf16 {
  uint16_t bits;
};

inline vfloat broadcast(float value) { return vfloat{} + value; }
inline vuint bits_of(vfloat v) { return reinterpret_cast<vuint&>(v); }
inline vfloat float_of(vuint v) { return reinterpret_cast<vfloat&>(v); }

// Round to nearest even, as torch does. NaN keeps its sign and stays NaN: adding the rounding
// constant to a NaN with a full mantissa would carry into infinity or zero.
inline vshort to_bf16(vfloat v) {
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
  __m256bh packed = _mm512_cvtneps_pbh(reinterpret_cast<__m512&>(v));
  return reinterpret_cast<vshort&>(packed);
#else
  const vuint u = bits_of(v);
  const vuint rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  const vuint quiet = (u >> 16) | 0x40u;
  return __builtin_convertvector(v != v ? quiet : rounded, vshort);
#endif
}

inline vfloat from_bf16(vshort half) {
  return float_of(__builtin_convertvector(half, vuint) << 16);
}

// How many lanes of a vector are real: all of them, or the first few at the end of a row. Two
// types, so that a loop body is compiled without masks for the whole vectors.
struct Full {
  static constexpr int count = kLanes;
};
struct Part {
  int count;
};

inline vfloat load(const float* p, Full) {
  vfloat v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline vfloat load(const bf16* p, Full) {
  vshort half;
  std::memcpy(&half, p, sizeof half);
  return from_bf16(half);
}
inline void store(float* p, vfloat v, Full) { std::memcpy(p, &v, sizeof v); }
inline void store(bf16* p, vfloat v, Full) {
  const vshort half = to_bf16(v);
  std::memcpy(p, &half, sizeof half);
}

#if defined(__AVX512F__)
inline __mmask16 lanes(Part part) { return __mmask16((1u << part.count) - 1u); }
inline vfloat load(const float* p, Part part) {
  __m512 v = _mm512_maskz_loadu_ps(lanes(part), p);
  return reinterpret_cast<vfloat&>(v);
}
inline vfloat load(const bf16* p, Part part) {
  __m256i half = _mm256_maskz_loadu_epi16(lanes(part), p);
  return from_bf16(reinterpret_cast<vshort&>(half));
}
inline void store(float* p, vfloat v, Part part) {
  _mm512_mask_storeu_ps(p, lanes(part), reinterpret_cast<__m512&>(v));
}
inline void store(bf16* p, vfloat v, Part part) {
  vshort half = to_bf16(v);
  _mm256_mask_storeu_epi16(p, lanes(part), reinterpret_cast<__m256i&>(half));
}
inline vfloat keep(vfloat v, Part part) {
  __m512 kept = _mm512_maskz_mov_ps(lanes(part), reinterpret_cast<__m512&>(v));
  return reinterpret_cast<vfloat&>(kept);
}
#else
inline vfloat load(const float* p, Part part) {
  vfloat v = {};
  std::memcpy(&v, p, part.count * sizeof *p);
  return v;
}
inline vfloat load(const bf16* p, Part part) {
  vshort half = {};
  std::memcpy(&half, p, part.count * sizeof *p);
  return from_bf16(half);
}
inline void store(float* p, vfloat v, Part part) { std::memcpy(p, &v, part.count * sizeof *p); }
inline void store(bf16* p, vfloat v, Part part) {
  const vshort half = to_bf16(v);
  std::memcpy(p, &half, part.count * sizeof *p);
}
inline vfloat keep(vfloat v, Part part) {
  for (int i = part.count; i < kLanes; ++i) v[i] = 0.f;
  return v;
}
#endif
inline vfloat keep(vfloat v, Full) { return v; }

// Loads zero the lanes that are not real; keep() zeroes them again after arithmetic that may have
// made them something else.

inline vfloat vmax(vfloat a, vfloat b) { return a > b ? a : b; }
inline vfloat vmin(vfloat a, vfloat b) { return a < b ? a : b; }

#if defined(__AVX512F__)
inline float sum(vfloat v) { return _mm512_reduce_add_ps(reinterpret_cast<__m512&>(v)); }
inline float max(vfloat v) { return _mm512_reduce_max_ps(reinterpret_cast<__m512&>(v)); }
#else
// Halving trees: the operations of one level do not wait for each other.
inline float sum(vfloat v) {
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) v[i] += v[i + width];
  return v[0];
}
inline float max(vfloat v) {
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) v[i] = v[i] > v[i + width] ? v[i] : v[i + width];
  return v[0];
}
#endif

// body(i, lanes) for each vector of a row of N elements; the last may be partial.
template <typename Body>
inline __attribute__((always_inline)) void for_vectors(int64_t N, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= N; i += kLanes) body(i, Full{});
  if (i < N) body(i, Part{int(N - i)});
}

// Sum of term(i, lanes) over a row. Four partial sums hide the latency of the addition, and round
// less than one chain. term must be zero in the lanes that are not real.
template <typename Term>
inline __attribute__((always_inline)) float sum_over(int64_t N, Term term) {
  vfloat partial[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= N; i += 4 * kLanes)
    for (int k = 0; k < 4; ++k) partial[k] += term(i + k * kLanes, Full{});
  for (; i + kLanes <= N; i += kLanes) partial[0] += term(i, Full{});
  if (i < N) partial[1] += term(i, Part{int(N - i)});
  return sum((partial[0] + partial[1]) + (partial[2] + partial[3]));
}

// e^x to about one unit in the last place. x = n ln2 + r with |r| <= ln2 / 2, then a Taylor
// polynomial of degree 7 in r (its truncation error there is below 2^-27), then 2^n through the
// exponent bits, in two halves so that results down to the smallest denormal are right. Inputs
// past the range of float32 give 0 and inf, as exp does; NaN gives NaN.
inline vfloat exp(vfloat x) {
  const vfloat clamped = vmin(vmax(x, broadcast(-104.f)), broadcast(89.f));
  const vfloat shifted = clamped * 1.44269504088896341f + 12582912.f;  // 1.5 * 2^23: rounds to int
  const vfloat n = shifted - 12582912.f;
  // ln 2 in two parts, so that n * ln2 loses no bits.
  const vfloat r = (clamped - n * 0.693145751953125f) - n * 1.42860677e-6f;
  vfloat p = broadcast(1.98412698e-4f);
  p = p * r + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  const vint k = __builtin_convertvector(n, vint);
  const vint half = k >> 1;
  const vint low = (half + 127) << 23, high = (k - half + 127) << 23;
  p = p * reinterpret_cast<const vfloat&>(low) * reinterpret_cast<const vfloat&>(high);
  return x != x ? x : p;
}

// Calls body with a value of the C++ type that a Dtype number stands for.
template <typename Body>
inline void with_type(int dtype, Body body) {
  if (dtype == int(Dtype::kFloat32))
    body(float{});
  else
    body(bf16{});
}

}  // namespace slimkernels::SLIM_ISA
