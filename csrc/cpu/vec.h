// SIMD vectors of float for the CPU kernels: load, store, sums and what intrinsics do better.
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

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();
inline constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

typedef float vfloat __attribute__((vector_size(kLanes * 4)));
typedef int32_t vint __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vuint __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vshort __attribute__((vector_size(kLanes * 2)));

struct bf16 {
  uint16_t bits;
};

inline vfloat broadcast(float value) { return vfloat{} + value; }
inline vuint bits_of(vfloat v) { return (vuint)v; }
inline vfloat float_of(vuint v) { return (vfloat)v; }

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

// GCC 12 widens a vector in two halves, which takes four instructions.
inline vfloat from_bf16(vshort half) {
#if defined(__AVX512F__)
  return float_of((vuint)_mm512_cvtepu16_epi32((__m256i)half) << 16);
#elif defined(__AVX2__)
  return float_of((vuint)_mm256_cvtepu16_epi32((__m128i)half) << 16);
#else
  return float_of(__builtin_convertvector(half, vuint) << 16);
#endif
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
  return from_bf16((vshort)half);
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

inline vfloat vsqrt(vfloat v) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_sqrt_ps((__m512)v);
#elif defined(__AVX2__)
  return (vfloat)_mm256_sqrt_ps((__m256)v);
#else
  for (int i = 0; i < kLanes; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

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

// Lanes 1 0 3 2 5 4 ..., and 0 0 1 1 2 2 ...: what pairs of neighbouring elements need.
#if defined(__AVX512F__)
inline vfloat swap_neighbours(vfloat v) { return (vfloat)_mm512_permute_ps((__m512)v, 0xB1); }
inline vfloat twice(vfloat v) {
  const __m512i lanes = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  return (vfloat)_mm512_permutexvar_ps(lanes, (__m512)v);
}
#elif defined(__AVX2__)
inline vfloat swap_neighbours(vfloat v) { return (vfloat)_mm256_permute_ps((__m256)v, 0xB1); }
inline vfloat twice(vfloat v) {
  const __m256i lanes = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
  return (vfloat)_mm256_permutevar8x32_ps((__m256)v, lanes);
}
#else
inline vfloat swap_neighbours(vfloat v) { return vfloat{v[1], v[0], v[3], v[2]}; }
inline vfloat twice(vfloat v) { return vfloat{v[0], v[0], v[1], v[1]}; }
#endif

// body(i, lanes) for each vector of a row of N elements; the last may be partial.
template <typename Body>
inline __attribute__((always_inline)) void for_vectors(int64_t N, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= N; i += kLanes) body(i, Full{});
  if (i < N) body(i, Part{int(N - i)});
}

// Two sums over the same elements.
struct vpair {
  vfloat first, second;
  vpair operator+(vpair other) const { return {first + other.first, second + other.second}; }
};
struct Pair {
  float first, second;
};
inline Pair sum(vpair v) { return {sum(v.first), sum(v.second)}; }

// Sum of term(i, lanes), a vfloat or a vpair, over a row. Four partial sums hide the latency of the
// addition, and round less than one chain. term must be zero in the lanes that are not real.
template <typename Term>
inline __attribute__((always_inline)) auto sum_over(int64_t N, Term term) {
  decltype(term(0, Full{})) partial[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= N; i += 4 * kLanes)
    for (int k = 0; k < 4; ++k) partial[k] = partial[k] + term(i + k * kLanes, Full{});
  for (; i + kLanes <= N; i += kLanes) partial[0] = partial[0] + term(i, Full{});
  if (i < N) partial[1] = partial[1] + term(i, Part{int(N - i)});
  return sum((partial[0] + partial[1]) + (partial[2] + partial[3]));
}

// A product as float32, which the compiler may not fuse with what is added to it: two loops that
// compute it must find the same number.
inline vfloat rounded(vfloat product) {
#if defined(__AVX512F__)
  asm("" : "+v"(product));
#elif defined(__x86_64__)
  asm("" : "+x"(product));
#elif defined(__aarch64__)
  asm("" : "+w"(product));
#else
  asm("" : "+m"(product));
#endif
  return product;
}

// a * b + c, rounded once.
inline vfloat fused(vfloat a, vfloat b, vfloat c) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (vfloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  for (int i = 0; i < kLanes; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#endif
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
