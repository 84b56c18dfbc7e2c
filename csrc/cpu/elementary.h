// Elementary functions of vectors: exponentials, the normal distribution, the logistic function and
// the hyperbolic tangent, to about one unit in the last place and without a branch.
#pragma once
#include "vec.h"

namespace slimkernels::SLIM_ISA {

// e^x to about one unit in the last place, for -150 <= x <= 89. x = n ln2 + r with |r| <= ln2 / 2,
// then a Taylor polynomial of degree 7 in r (its truncation error there is below 2^-27), then 2^n
// in a way that is right down to the smallest denormal: AVX-512 has an instruction for it,
// elsewhere the exponent bits do it in two halves.
inline vfloat exp_within(vfloat x) {
  const vfloat shifted = x * 1.44269504088896341f + 12582912.f;  // 1.5 * 2^23: rounds to int
  const vfloat n = shifted - 12582912.f;
  // ln 2 in two parts, so that n * ln2 loses no bits.
  const vfloat r = (x - n * 0.693145751953125f) - n * 1.42860677e-6f;
  vfloat p = broadcast(1.98412698e-4f);
  p = p * r + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
#if defined(__AVX512F__)
  return (vfloat)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const vint k = __builtin_convertvector(n, vint);
  const vint half = k >> 1;
  const vint low = (half + 127) << 23, high = (k - half + 127) << 23;
  return p * (vfloat)low * (vfloat)high;
#endif
}

// e^x for every x: past the range of float32 0 and inf, as exp gives them; NaN gives NaN.
inline vfloat exp(vfloat x) {
  const vfloat p = exp_within(vmin(vmax(x, broadcast(-104.f)), broadcast(89.f)));
  return x != x ? x : p;
}

// e^x for x <= 0: scores less their maximum. x = n ln2 + r, a polynomial of degree 6 in r (through
// the Chebyshev nodes; relative error 3e-9), times 2^n. Below the smallest normal number, -inf
// included, it gives exactly 0: denormal results, and AVX-512's own instruction for 2^n wherever
// its result underflows, cost Intel's processors 150 cycles. NaN stays NaN. Half the work of exp,
// which takes any x. 2^(x * log2(e)) would be shorter, but its product rounds x a second time.
inline vfloat exp_of_nonpositive(vfloat x) {
  const vfloat clamped = x < -87.3365f ? broadcast(-88.f) : x;  // there n = -127, and 2^n becomes 0
  const vfloat shifted = clamped * 1.44269504f + 12582912.f;    // 1.5 * 2^23: n is in the low bits
  const vfloat n = shifted - 12582912.f;
  const vfloat r = (clamped - n * 0.693145751953125f) - n * 1.42860677e-6f;
  vfloat p = broadcast(0.00139411189f);
  p = p * r + 0.00837513477f;
  p = p * r + 0.0416663528f;
  p = p * r + 0.166664154f;
  p = p * r + 0.500000005f;
  p = p * r + 1.00000004f;
  p = p * r + 1.f;
  return p * (vfloat)(((vuint)shifted << 23) + 0x3F800000u);
}

// 1 / x to one unit in the last place, for x whose reciprocal is neither 0 nor infinite.
inline vfloat reciprocal(vfloat x) {
#if defined(__AVX512F__)
  // The estimate has 14 bits; one Newton step doubles them, in half the time of a division.
  const vfloat r = (vfloat)_mm512_rcp14_ps((__m512)x);
  return r + r * (1.f - x * r);
#else
  return 1.f / x;
#endif
}

// The normal distribution: below = Phi(z), density = exp(-z^2 / 2) / sqrt(2 pi).
struct Normal {
  vfloat below, density;
};

// Phi(-a) = e^(-a^2 / 2) R(a) for a >= 0, where R falls slowly from 1/2 to 1 / (a sqrt(2 pi)). Both
// factors keep their relative accuracy, so z Phi(z) is right to a few units in the last place for
// every negative z, where (1 + erf(z / sqrt 2)) / 2 has no digit left from z = -5.6 on.
//
// (a + 3.5) R(a) is a polynomial of degree 9 in t = (a - 3.5) / (a + 3.5), which maps [0, inf) to
// [-1, 1): fitted on [0, 14.5] for the least relative error, 0.12 * 2^-24 before rounding. At 15
// the exponential is 0; stopping there keeps infinity out of the products. NaN does not survive the
// clamp: the caller multiplies by z.
inline Normal normal(vfloat z) {
  const vfloat a = vmin(z < 0.f ? -z : z, broadcast(15.f));
  const vfloat r = reciprocal(a + 3.5f);
  const vfloat t = (a - 3.5f) * r;
  vfloat p = broadcast(1.10689398e-4f);
  p = p * t + 4.21897857e-4f;
  p = p * t - 4.94943699e-4f;
  p = p * t - 3.17531079e-3f;
  p = p * t + 6.49311580e-3f;
  p = p * t + 1.74063779e-2f;
  p = p * t - 1.16053037e-1f;
  p = p * t + 3.15425038e-1f;
  p = p * t - 5.65561771e-1f;
  p = p * t + 7.44416058e-1f;
  // a^2 rounds, and e^(-18) would magnify that to 16 units at a = 6: the lost part is put back.
  const vfloat square = a * a;
  const vfloat lost = fused(a, a, -square);
  const vfloat e = exp_within(-0.5f * square) * (1.f - 0.5f * lost);
  const vfloat beyond = e * p * r;
  return {z < 0.f ? beyond : 1.f - beyond, 0.398942280f * e};
}

// Phi(z) to 5e-5, a fortieth of what rounding to bfloat16 adds, by less work: degree 4 in
// t = (a - 4) / (a + 4), fitted on [0, 13.2], past which the exponential is 0.
inline vfloat phi_for_bf16(vfloat z) {
  const vfloat a = vmin(z < 0.f ? -z : z, broadcast(15.f));
  const vfloat r = reciprocal(a + 4.f);
  const vfloat t = (a - 4.f) * r;
  vfloat p = broadcast(0.0604316041f);
  p = p * t - 0.189629781f;
  p = p * t + 0.386966742f;
  p = p * t - 0.60760933f;
  p = p * t + 0.755285648f;
  const vfloat e = exp_of_nonpositive(-0.5f * a * a);
  const vfloat beyond = e * p * r;
  return z < 0.f ? beyond : 1.f - beyond;
}

// The logistic function s = 1 / (1 + e^-u) and its slope s (1 - s), from e^-|u|: neither cancels,
// as 1 + tanh(u / 2) does, and nothing overflows.
struct Logistic {
  vfloat value, slope;
};
inline Logistic logistic(vfloat u) {
  const vfloat e = exp(u < 0.f ? u : -u);
  const vfloat q = reciprocal(1.f + e);
  return {u < 0.f ? e * q : q, e * q * q};
}

// The hyperbolic tangent and its slope 1 - tanh^2, both to about one unit in the last place: near
// zero, where 1 - 2 / (e^2u + 1) cancels, by the polynomial of Cephes' tanhf, elsewhere from
// e^-2|u|, which does not overflow. The slope does not cancel where tanh is almost 1.
struct Hyperbolic {
  vfloat value, slope;
};
inline Hyperbolic hyperbolic(vfloat u) {
  const vfloat size = u < 0.f ? -u : u, square = u * u;
  const vfloat e = exp_of_nonpositive(-2.f * size), r = reciprocal(1.f + e);
  vfloat p = broadcast(-5.70498872745e-3f);
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const vfloat near = u + u * square * p, far = 1.f - 2.f * e * r;
  return {size < 0.625f ? near : u < 0.f ? -far : far, 4.f * e * r * r};
}

}  // namespace slimkernels::SLIM_ISA
