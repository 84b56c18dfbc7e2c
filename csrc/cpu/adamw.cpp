// AdamW (Loshchilov, Hutter 2019) over many tensors in one call.
//
//   w -= lr weight_decay w;  m += (1 - b1) (g - m);  v += (1 - b2) (g^2 - v)
//   w -= lr m / (1 - b1^step) / (sqrt(v / (1 - b2^step)) + eps)
//
// Tiling   Threads split the elements of all tensors alike, in chunks: tensor_lists.h.
// Traffic  Reads w, g, m, v and writes w, m, v once: 28 bytes an element in float32.
// Numerics float32, with the bias corrections, which cancel, in double. A bfloat16 parameter is the
//          rounded copy of its float32 master, written in the same pass.
#include <cmath>

#include "kernels.h"
#include "memory.h"
#include "tensor_lists.h"

namespace slimkernels::SLIM_ISA {
namespace {

enum Row { kParam, kGrad, kExpAvg, kExpAvgSq, kMaxExpAvgSq, kMaster, kStep, kSize };

struct Rates {
  float decay, step_size, rsqrt_correction;
};

// Counts the step of each tensor. A run's tensors have mostly the same: powers are kept.
void begin_step(const TensorLists& lists, Rates* rates, double lr, double beta1, double beta2,
                double weight_decay) {
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
struct Pointers {
  T* param;
  const T* grad;
  float *exp_avg, *exp_avg_sq, *max_exp_avg_sq, *master;
};

template <bool kAmsgrad, typename T>
void update(const Pointers<T>& p, int64_t begin, int64_t end, float coefficient, Rates rates,
            float weight1, float beta2, float weight2, float eps) {
  for_vectors(end - begin, [&](int64_t offset, auto n) {
    const int64_t i = begin + offset;
    const vfloat g = load(p.grad + i, n) * coefficient;
    const vfloat before = load(p.exp_avg + i, n);
    const vfloat m = before + weight1 * (g - before);
    const vfloat v = load(p.exp_avg_sq + i, n) * beta2 + weight2 * (g * g);
    store(p.exp_avg + i, m, n);
    store(p.exp_avg_sq + i, v, n);
    vfloat peak = v;
    if constexpr (kAmsgrad) {
      peak = vmax(load(p.max_exp_avg_sq + i, n), v);  // of NaN: v
      store(p.max_exp_avg_sq + i, peak, n);
    }
    const vfloat w = load_master(p.master, p.param, i, n);
    const vfloat change = m / (vsqrt(peak) * rates.rsqrt_correction + eps);
    store_master(p.master, p.param, i, w * rates.decay - rates.step_size * change, n);
  });
}

}  // namespace

void adamw(const int64_t* table, int64_t count, const float* clip, double lr, double beta1,
           double beta2, double eps, double weight_decay, int amsgrad, int maximize, int dtype) {
  const Clip c(clip, maximize);
  if (!c.applies) return;
  const TensorLists lists{table, count, kSize};
  Owned<Rates> rates(count);
  begin_step(lists, rates.get(), lr, beta1, beta2, weight_decay);
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    for_tensor_chunks(lists, [&](int64_t t, int64_t begin, int64_t end, int64_t) {
      const Pointers<T> p = {lists.at<T>(kParam, t),           lists.at<T>(kGrad, t),
                             lists.at<float>(kExpAvg, t),      lists.at<float>(kExpAvgSq, t),
                             lists.at<float>(kMaxExpAvgSq, t), lists.at<float>(kMaster, t)};
      (amsgrad ? update<true, T> : update<false, T>)(p, begin, end, c.coefficient, rates[t],
                                                     float(1. - beta1), float(beta2),
                                                     float(1. - beta2), float(eps));
    });
  });
}

}  // namespace slimkernels::SLIM_ISA
