// Muon (Jordan 2024) over many matrices: what comes before and after their orthogonalization, whose
// products are torch's.
//
//   b += (1 - momentum) (g - b);  d = g + momentum (b - g) with Nesterov's momentum, else b
//   x = d / max(|d|, eps), rounded once;  after the products  w -= lr weight_decay w + lr ratio x
//
// Tiling   Chunks of all tensors, three passes: momenta and norms; directions; parameters.
// Traffic  Reads g, b and writes b; reads g, b and writes x; reads w, x and writes w. To store d
//          for the second pass in bfloat16 would round it twice.
// Numerics float32; norms in float32 over a chunk, chunks in double and in order.
#include <cmath>

#include "kernels.h"
#include "memory.h"
#include "tensor_lists.h"

namespace slimkernels::SLIM_ISA {
namespace {

enum Row { kParam, kGrad, kMomentum, kMaster, kPlace, kSize };

inline vfloat direction(vfloat g, vfloat b, float momentum, int nesterov) {
  return nesterov ? g + momentum * (b - g) : b;
}

// The new momenta; the sum of squares of the directions.
template <typename T>
float accelerate(const T* grad, float* buffer, int64_t N, float coefficient, float weight,
                 float momentum, int nesterov) {
  return sum_over(N, [&](int64_t i, auto n) {
    const vfloat g = load(grad + i, n) * coefficient;
    vfloat b = load(buffer + i, n);
    b += weight * (g - b);
    store(buffer + i, b, n);
    const vfloat d = direction(g, b, momentum, nesterov);
    return keep(d * d, n);
  });
}

}  // namespace

void muon_direction(const int64_t* table, int64_t count, const float* clip, void* directions,
                    double momentum, int nesterov, double eps, int dtype, int direction_dtype) {
  const Clip c(clip, 0);
  const TensorLists lists{table, count, kSize};
  const float weight = float(1. - momentum), kept = float(momentum);
  Owned<float> sums(chunks_of(lists)), scales(count);
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    for_tensor_chunks(lists, [&](int64_t t, int64_t begin, int64_t end, int64_t chunk) {
      sums[chunk] = accelerate(lists.at<T>(kGrad, t) + begin, lists.at<float>(kMomentum, t) + begin,
                               end - begin, c.coefficient, weight, kept, nesterov);
    });
    for (int64_t t = 0, chunk = 0; t < count; ++t) {
      double total = 0.;
      for (const int64_t end = chunk + chunks_of(lists.size(t)); chunk < end; ++chunk)
        total += sums[chunk];
      const double norm = ::sqrt(total);
      scales[t] = float(1. / (norm < eps ? eps : norm));
    }
    with_type(direction_dtype, [&](auto out) {
      for_tensor_chunks(lists, [&](int64_t t, int64_t begin, int64_t end, int64_t) {
        const T* grad = lists.at<T>(kGrad, t) + begin;
        const float* buffer = lists.at<float>(kMomentum, t) + begin;
        auto* x = (decltype(out)*)directions + table[kPlace * count + t] + begin;
        for_vectors(end - begin, [&](int64_t i, auto n) {
          const vfloat g = load(grad + i, n) * c.coefficient;
          store(x + i, direction(g, load(buffer + i, n), kept, nesterov) * scales[t], n);
        });
      });
    });
  });
}

void muon_apply(const int64_t* table, int64_t count, const void* directions, const double* ratios,
                double lr, double weight_decay, int dtype, int direction_dtype) {
  const TensorLists lists{table, count, kSize};
  const float decay = float(1. - lr * weight_decay);
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    with_type(direction_dtype, [&](auto out) {
      for_tensor_chunks(lists, [&](int64_t t, int64_t begin, int64_t end, int64_t) {
        const auto* x = (const decltype(out)*)directions + table[kPlace * count + t];
        float* master = lists.at<float>(kMaster, t);
        T* param = lists.at<T>(kParam, t);
        const float size = float(lr * ratios[t]);
        for_vectors(end - begin, [&](int64_t offset, auto n) {
          const int64_t i = begin + offset;
          const vfloat w = load_master(master, param, i, n);
          store_master(master, param, i, w * decay - size * load(x + i, n), n);
        });
      });
    });
  });
}

}  // namespace slimkernels::SLIM_ISA
