// LAMB (You et al. 2020) over many tensors in one call: Adam's step, as long as the parameter is.
//
//   m and v as AdamW's;  u = m / (1 - b1^step) / (sqrt(v / (1 - b2^step)) + eps) + weight_decay w
//   w -= lr |w| / |u| u, with norms over each tensor; where either is 0, w -= lr u
//
// Tiling   Two passes over chunks of all tensors (tensor_lists.h): the first has the norms, the
//          second, which makes u anew from m and v, the step.
// Traffic  Reads w, g, m, v and writes m, v; then reads w, m, v and writes w: 40 bytes a float32
//          element. To store u would cost two more passes.
// Numerics float32; norms in float32 over a chunk, chunks in double and in order.
#include "adam.h"
#include "kernels.h"
#include "memory.h"

namespace slimkernels::SLIM_ISA {
namespace {

// A step before its length is known.
inline vfloat direction(vfloat m, vfloat v, vfloat w, Rates rates, float eps, float weight_decay) {
  return rates.step_size * m / (vsqrt(v) * rates.rsqrt_correction + eps) + weight_decay * w;
}

// The new moments, and the sums of squares of w and u over a chunk.
template <typename T>
Pair measure(const AdamTensor<T>& p, int64_t begin, int64_t end, Decays d, Rates rates,
             float weight_decay) {
  return sum_over(end - begin, [&](int64_t offset, auto n) {
    const int64_t i = begin + offset;
    const vpair moments = update_moments(p, i, d, n);
    const vfloat w = load_master(p.master, p.param, i, n);
    const vfloat u = direction(moments.first, moments.second, w, rates, d.eps, weight_decay);
    return vpair{keep(w * w, n), keep(u * u, n)};
  });
}

template <typename T>
void apply(const AdamTensor<T>& p, int64_t begin, int64_t end, float eps, Rates rates,
           float weight_decay, float size) {
  for_vectors(end - begin, [&](int64_t offset, auto n) {
    const int64_t i = begin + offset;
    const vfloat w = load_master(p.master, p.param, i, n);
    const vfloat u =
        direction(load(p.exp_avg + i, n), load(p.exp_avg_sq + i, n), w, rates, eps, weight_decay);
    store_master(p.master, p.param, i, w - size * u, n);
  });
}

// lr |w| / |u| of each tensor, from the sums of its chunks.
void sizes_of_steps(const TensorLists& lists, const Pair* sums, double lr, float* sizes) {
  for (int64_t i = 0; i < lists.count; ++i) {
    double w = 0., u = 0.;
    for (const Pair* end = sums + chunks_of(lists.size(i)); sums != end; ++sums) {
      w += sums->first;
      u += sums->second;
    }
    sizes[i] = float(w > 0. && u > 0. ? lr * ::sqrt(w) / ::sqrt(u) : lr);
  }
}

}  // namespace

void lamb(const int64_t* table, int64_t count, const float* clip, double lr, double beta1,
          double beta2, double eps, double weight_decay, int maximize, int dtype) {
  const Clip c(clip, maximize);
  if (!c.applies) return;
  const TensorLists lists{table, count, kSize};
  const Decays d(c, beta1, beta2, eps);
  const float decay = float(weight_decay);
  Owned<Rates> rates(count);
  Owned<Pair> sums(chunks_of(lists));
  Owned<float> sizes(count);
  begin_step(lists, rates.get(), 1., beta1, beta2, 0.);
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    for_tensor_chunks(lists, [&](int64_t i, int64_t begin, int64_t end, int64_t chunk) {
      sums[chunk] = measure(AdamTensor<T>(lists, i), begin, end, d, rates[i], decay);
    });
    sizes_of_steps(lists, sums.get(), lr, sizes.get());
    for_tensor_chunks(lists, [&](int64_t i, int64_t begin, int64_t end, int64_t) {
      apply(AdamTensor<T>(lists, i), begin, end, d.eps, rates[i], decay, sizes[i]);
    });
  });
}

}  // namespace slimkernels::SLIM_ISA
