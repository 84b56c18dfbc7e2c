// The activation functions of one number, float32, with their slopes.
//
// Phi(-|z|) is exp(-z^2 / 2) times a polynomial, which keeps its relative accuracy where 1 + erf
// has no digit left; csrc/cpu/elementary.h derives it. (1 + tanh(u)) / 2 is the logistic function
// of 2 u, from exp(-2 |u|), which cannot overflow.
#pragma once
#include "common.cuh"

namespace slimkernels {

struct Point {
  float value, slope;
};

struct Gelu {
  static __device__ Point at(float z) {
    const float a = fminf(fabsf(z), 15.f);
    const float r = __fdividef(1.f, a + 3.5f);
    const float t = (a - 3.5f) * r;
    float p = 1.10689398e-4f * t + 4.21897857e-4f;
    p = p * t - 4.94943699e-4f;
    p = p * t - 3.17531079e-3f;
    p = p * t + 6.49311580e-3f;
    p = p * t + 1.74063779e-2f;
    p = p * t - 1.16053037e-1f;
    p = p * t + 3.15425038e-1f;
    p = p * t - 5.65561771e-1f;
    p = p * t + 7.44416058e-1f;
    const float e = expf(-0.5f * a * a);
    const float beyond = e * p * r;
    const float below = z < 0.f ? beyond : 1.f - beyond;  // Phi(z)
    return {z * below, below + z * e * 0.398942280f};
  }
};

struct Logistic {
  float value, slope;
};

// 1 / (1 + exp(-u))
__device__ inline Logistic logistic(float u) {
  const float e = expf(-fabsf(u));
  const float q = __fdividef(1.f, 1.f + e);
  return {u < 0.f ? e * q : q, e * q * q};
}

struct GeluTanh {
  static __device__ Point at(float z) {
    constexpr float kTwice = 1.595769122f;        // 2 sqrt(2 / pi)
    constexpr float kCubic = 0.044715f * kTwice;  // u = kTwice z + kCubic z^3
    const float square = z * z;
    const Logistic l = logistic(z * (kTwice + kCubic * square));
    return {z * l.value, l.value + z * l.slope * (kTwice + 3.f * kCubic * square)};
  }
};

struct Silu {
  static __device__ Point at(float z) {
    const Logistic l = logistic(z);
    return {z * l.value, l.value + z * l.slope};
  }
};

struct ReluSquared {
  static __device__ Point at(float z) {
    const float above = z < 0.f ? 0.f : z;  // a NaN stays one
    return {above * above, 2.f * above};
  }
};

// Calls run with the struct of a curve: one kernel has them all, and asks once a pack.
template <typename Run>
__device__ void with_curve(Curve curve, Run run) {
  switch (curve) {
    case Curve::kGelu:
      return run(Gelu{});
    case Curve::kGeluTanh:
      return run(GeluTanh{});
    case Curve::kSilu:
      return run(Silu{});
    case Curve::kReluSquared:
      return run(ReluSquared{});
  }
}

}  // namespace slimkernels
