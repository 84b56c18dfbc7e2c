// What AdamW and LAMB share: their tensors, the steps counted, and the moments of the gradient.
#pragma once
#include <cmath>

#include "tensor_lists.h"

namespace slimkernels::SLIM_ISA {

// Mirrored by COLUMNS in slimkernels/backends/cpu/_tensor_lists.py. LAMB has no kMaxExpAvgSq.
enum AdamRow { kParam, kGrad, kExpAvg, kExpAvgSq, kMaxExpAvgSq, kMaster, kStep, kSize };

struct Rates {
  float decay, step_size, rsqrt_correction;
};

// Counts the step of each tensor. A run's tensors have mostly the same: powers are kept.
inline void begin_step(const TensorLists& lists, Rates* rates, double lr, double beta1,
                       double beta2, double weight_decay) {
  double last = -1.;
  Rates shared = {};
  for (int64_t i = 0; i < lists.count; ++i) {
    float* counter = lists.at<float>(kStep, i);
    const double step = *counter += 1.f;
    if (step != last) {
      last = step;
      shared.decay = float(1. - lr * weight_decay);
      shared.step_size = float(lr / (1. - ::pow(beta1, step)));
      shared.rsqrt_correction = float(1. / ::sqrt(1. - ::pow(beta2, step)));
    }
    rates[i] = shared;
  }
}

template <typename T>
struct AdamTensor {
  T* param;
  const T* grad;
  float *exp_avg, *exp_avg_sq, *max_exp_avg_sq, *master;
  AdamTensor(const TensorLists& lists, int64_t i)
      : param(lists.at<T>(kParam, i)),
        grad(lists.at<T>(kGrad, i)),
        exp_avg(lists.at<float>(kExpAvg, i)),
        exp_avg_sq(lists.at<float>(kExpAvgSq, i)),
        max_exp_avg_sq(lists.at<float>(kMaxExpAvgSq, i)),
        master(lists.at<float>(kMaster, i)) {}
};

// The numbers that are the same for all tensors, in float32.
struct Decays {
  float coefficient, weight1, beta2, weight2, eps;
  Decays(Clip clip, double beta1, double beta2, double eps)
      : coefficient(clip.coefficient),
        weight1(float(1. - beta1)),
        beta2(float(beta2)),
        weight2(float(1. - beta2)),
        eps(float(eps)) {}
};

// m += (1 - b1) (g - m) and v = b2 v + (1 - b2) g^2, written and returned.
template <typename T, typename Lanes>
inline vpair update_moments(const AdamTensor<T>& p, int64_t i, Decays d, Lanes n) {
  const vfloat g = load(p.grad + i, n) * d.coefficient;
  const vfloat before = load(p.exp_avg + i, n);
  const vfloat m = before + d.weight1 * (g - before);
  const vfloat v = load(p.exp_avg_sq + i, n) * d.beta2 + d.weight2 * (g * g);
  store(p.exp_avg + i, m, n);
  store(p.exp_avg_sq + i, v, n);
  return {m, v};
}

}  // namespace slimkernels::SLIM_ISA
