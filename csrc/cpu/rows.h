// The arithmetic of one normalised row, and the parameters that all rows share.
//
// layer_norm.cpp and add_layer_norm.cpp differ in what they normalise and share how.
#pragma once
#include "memory.h"
#include "vec.h"

namespace slimkernels::SLIM_ISA {

struct Moments {
  float mean, rstd;
};

// Mean and variance of a row whose sum is known. A sum near 1000 is off by 3e-5, which centering
// shows: what the centered values still add up to corrects mean and variance.
template <typename T>
inline Moments moments_about(float total, const T* x, int64_t N, float eps) {
  const float near = total / N;
  const Pair rest = sum_over(N, [&](int64_t i, auto n) {
    const vfloat centered = keep(load(x + i, n) - near, n);
    return vpair{centered, centered * centered};
  });
  const float shift = rest.first / N, variance = rest.second / N - shift * shift;
  return {near + shift, 1.f / std::sqrt((variance < 0.f ? 0.f : variance) + eps)};
}

template <typename T>
inline Moments moments_of(const T* x, int64_t N, float eps) {
  const float total = sum_over(N, [&](int64_t i, auto n) { return load(x + i, n); });
  return moments_about(total, x, N, eps);
}

template <typename T>
inline void normalize(const T* x, const float* weight, const float* bias, T* y, Moments moments,
                      int64_t N) {
  for_vectors(N, [&](int64_t i, auto n) {
    vfloat v = (load(x + i, n) - moments.mean) * moments.rstd;
    if (weight) v *= load(weight + i, n);
    if (bias) v += load(bias + i, n);
    store(y + i, v, n);
  });
}

// With xhat = (x - mean) * rstd and g = dy * weight:
//   dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), dweight += dy * xhat, dbias += dy.
// store_dx(i, dx, lanes) takes each vector of dx.
template <typename T, typename Store>
inline void normalize_backward(const T* dy, const T* x, const float* weight, Moments moments,
                               float* dweight, float* dbias, int64_t N, Store store_dx) {
  const auto xhat = [&](int64_t i, auto n) {
    return keep((load(x + i, n) - moments.mean) * moments.rstd, n);
  };
  const auto g = [&](int64_t i, auto n) {
    const vfloat v = load(dy + i, n);
    return weight ? v * load(weight + i, n) : v;
  };
  const Pair sums = sum_over(N, [&](int64_t i, auto n) {
    const vfloat v = g(i, n);
    return vpair{v, v * xhat(i, n)};
  });
  const float mean_g = sums.first / N, mean_gx = sums.second / N;
  for_vectors(N, [&](int64_t i, auto n) {
    const vfloat h = xhat(i, n), v = load(dy + i, n);
    store_dx(i, moments.rstd * (g(i, n) - mean_g - h * mean_gx), n);
    if (dweight) store(dweight + i, load(dweight + i, n) + v * h, n);
    if (dbias) store(dbias + i, load(dbias + i, n) + v, n);
  });
}

// A parameter of N elements, or none, as float32: one conversion a call instead of one a row.
class Widened {
 public:
  Widened(const void* parameter, int64_t N, int dtype) {
    if (!parameter || dtype == int(Dtype::kFloat32)) {
      values_ = (const float*)parameter;
      return;
    }
    owned_.allocate(N);
    const bf16* narrow = (const bf16*)parameter;
    for_vectors(N, [&](int64_t i, auto n) { store(&owned_[i], load(narrow + i, n), n); });
    values_ = owned_.get();
  }
  const float* values() const { return values_; }

 private:
  Owned<float> owned_;
  const float* values_;
};

// One float32 row of partial sums a chunk, for a gradient of N elements that may not be wanted.
class ChunkSums {
 public:
  ChunkSums(const void* gradient, int64_t chunks, int64_t N) : chunks_(chunks), N_(N) {
    if (gradient) values_.allocate(chunks * N, true);
  }
  float* values() const { return values_.get(); }

  // Adds the chunks up, first to last, into the gradient.
  void write(void* gradient, int dtype) const {
    if (!values()) return;
    with_type(dtype, [&](auto zero) {
      for_vectors(N_, [&](int64_t i, auto n) {
        vfloat total = {};
        for (int64_t chunk = 0; chunk < chunks_; ++chunk)
          total += load(values() + chunk * N_ + i, n);
        store((decltype(zero)*)gradient + i, total, n);
      });
    });
  }

 private:
  Owned<float> values_;
  int64_t chunks_, N_;
};

}  // namespace slimkernels::SLIM_ISA
