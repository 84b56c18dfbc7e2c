// AdamW (Loshchilov, Hutter 2019) over many tensors in one call.
//
//   w -= lr weight_decay w;  m += (1 - b1) (g - m);  v += (1 - b2) (g^2 - v)
//   w -= lr m / (1 - b1^step) / (sqrt(v / (1 - b2^step)) + eps)
//
// Tiling   Threads split the elements of all tensors alike, in chunks: tensor_lists.h.
// Traffic  Reads w, g, m, v and writes w, m, v once: 28 bytes an element in float32.
// Numerics float32, with the bias corrections, which cancel, in double. A bfloat16 parameter is the
//          rounded copy of its float32 master, written in the same pass.
#include "adam.h"
#include "kernels.h"
#include "memory.h"

namespace slimkernels::SLIM_ISA {
namespace {

template <bool kAmsgrad, typename T>
void update(const AdamTensor<T>& p, int64_t begin, int64_t end, Decays d, Rates rates) {
  for_vectors(end - begin, [&](int64_t offset, auto n) {
    const int64_t i = begin + offset;
    const vpair moments = update_moments(p, i, d, n);
    vfloat v = moments.second;
    if constexpr (kAmsgrad) {
      v = vmax(load(p.max_exp_avg_sq + i, n), v);  // of NaN: v
      store(p.max_exp_avg_sq + i, v, n);
    }
    const vfloat w = load_master(p.master, p.param, i, n);
    const vfloat change = moments.first / (vsqrt(v) * rates.rsqrt_correction + d.eps);
    store_master(p.master, p.param, i, w * rates.decay - rates.step_size * change, n);
  });
}

}  // namespace

void adamw(const int64_t* table, int64_t count, const float* clip, double lr, double beta1,
           double beta2, double eps, double weight_decay, int amsgrad, int maximize, int dtype) {
  const Clip c(clip, maximize);
  if (!c.applies) return;
  const TensorLists lists{table, count, kSize};
  const Decays d(c, beta1, beta2, eps);
  Owned<Rates> rates(count);
  begin_step(lists, rates.get(), lr, beta1, beta2, weight_decay);
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    for_tensor_chunks(lists, [&](int64_t i, int64_t begin, int64_t end, int64_t) {
      const AdamTensor<T> p(lists, i);
      (amsgrad ? update<true, T> : update<false, T>)(p, begin, end, d, rates[i]);
    });
  });
}

}  // namespace slimkernels::SLIM_ISA
