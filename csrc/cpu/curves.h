// The activation functions of one number, with their slopes: what activation.cpp applies to x +
// bias and gated.cpp to the gate.
//
// Phi and its slope come from one exponential and keep their relative accuracy where Phi is small
// (elementary.h). (1 + tanh(u)) / 2 is the logistic function of 2 u.
#pragma once
#include <type_traits>

#include "elementary.h"

namespace slimkernels::SLIM_ISA {

struct Point {
  vfloat value, slope;
};

struct Gelu {
  static constexpr int64_t kWork = 4;  // an element costs as much as this many of layer_norm's
  static Point at(vfloat z) {
    const Normal n = normal(z);
    return {z * n.below, n.below + z * n.density};
  }
};

struct GeluTanh {
  static constexpr int64_t kWork = 4;
  static constexpr float kTwice = 1.595769122f;        // 2 sqrt(2 / pi)
  static constexpr float kCubic = 0.044715f * kTwice;  // u = kTwice z + kCubic z^3
  static Point at(vfloat z) {
    const vfloat square = z * z;
    const Logistic l = logistic(z * (kTwice + kCubic * square));
    return {z * l.value, l.value + z * l.slope * (kTwice + 3.f * kCubic * square)};
  }
};

struct Silu {
  static constexpr int64_t kWork = 3;
  static Point at(vfloat z) {
    const Logistic l = logistic(z);
    return {z * l.value, l.value + z * l.slope};
  }
};

struct ReluSquared {
  static constexpr int64_t kWork = 1;
  static Point at(vfloat z) {
    const vfloat above = z < 0.f ? vfloat{} : z;  // a NaN stays one
    return {above * above, 2.f * above};
  }
};

// A curve's value where it will be written as T. Slopes have no such short form: they cancel where
// they are small, which even bfloat16 would show.
template <typename Curve, typename T>
inline vfloat value_of(vfloat z) {
  if constexpr (std::is_same_v<Curve, Gelu> && std::is_same_v<T, bf16>)
    return z * phi_for_bf16(z);
  else
    return Curve::at(z).value;
}

// Calls body with a value of the C++ type that a Curve number stands for.
template <typename Body>
inline void with_curve(int curve, Body body) {
  switch (Curve(curve)) {
    case Curve::kGelu:
      return body(Gelu{});
    case Curve::kGeluTanh:
      return body(GeluTanh{});
    case Curve::kSilu:
      return body(Silu{});
    case Curve::kReluSquared:
      return body(ReluSquared{});
  }
}

}  // namespace slimkernels::SLIM_ISA
