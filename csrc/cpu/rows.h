// The arithmetic of one normalised row, and the parameters that all rows share.
#pragma once
#include "memory.h"
#include "vec.h"

namespace slimkernels::SLIM_ISA {

// How a row is normalised, xhat = norm(x), is a type, so that every loop over rows is written once.
// Each is made from the sum of first(x) over the row, and saved as one float32 a row.

// LayerNorm.
struct Centered {
  float mean, rstd;
  static constexpr bool kCenters = true;

  static vfloat first(vfloat x) { return x; }
  // A sum near 1000 is off by 3e-5, which centering shows: what the centered values still add up to
  // corrects mean and variance.
  template <typename T>
  static Centered of(float sum_of_first, const T* x, int64_t N, float eps) {
    const float near = sum_of_first / N;
    const Pair rest = sum_over(N, [&](int64_t i, auto n) {
      const vfloat centered = keep(load(x + i, n) - near, n);
      return vpair{centered, centered * centered};
    });
    const float shift = rest.first / N, variance = rest.second / N - shift * shift;
    return {near + shift, 1.f / std::sqrt((variance < 0.f ? 0.f : variance) + eps)};
  }
  static Centered saved(const float* mean, const float* rstd, int64_t row) {
    return {mean[row], rstd[row]};
  }
  void save(float* mean_of, float* rstd_of, int64_t row) const {
    mean_of[row] = mean;
    rstd_of[row] = rstd;
  }
  vfloat operator()(vfloat x) const { return (x - mean) * rstd; }
};

// RMSNorm, which has no mean.
struct Scaled {
  float rstd;
  static constexpr bool kCenters = false;

  static vfloat first(vfloat x) { return x * x; }
  template <typename T>
  static Scaled of(float sum_of_first, const T*, int64_t N, float eps) {
    return {1.f / std::sqrt(sum_of_first / N + eps)};
  }
  static Scaled saved(const float*, const float* rstd, int64_t row) { return {rstd[row]}; }
  void save(float*, float* rstd_of, int64_t row) const { rstd_of[row] = rstd; }
  vfloat operator()(vfloat x) const { return x * rstd; }
};

template <typename Norm, typename T, typename Y>
inline void normalize(const T* x, const float* weight, const float* bias, Y* y, Norm norm,
                      int64_t N) {
  for_vectors(N, [&](int64_t i, auto n) {
    vfloat v = norm(load(x + i, n));
    if (weight) v *= load(weight + i, n);
    if (bias) v += load(bias + i, n);
    store(y + i, v, n);
  });
}

// Backward of a row, with xhat = norm(x) and g = dy * weight:
//   dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), in RMSNorm without mean(g).
// These are the two means.
template <typename Norm, typename T, typename X>
inline Pair means_of(const T* dy, const X* x, const float* weight, Norm norm, int64_t N) {
  const Pair sums = sum_over(N, [&](int64_t i, auto n) {
    vfloat g = load(dy + i, n);
    if (weight) g *= load(weight + i, n);
    return vpair{g, g * keep(norm(load(x + i, n)), n)};
  });
  return {sums.first / N, sums.second / N};
}

// dx of the columns from begin to end, dweight += dy * xhat and dbias += dy.
// store_dx(i, dx, lanes) takes each vector of dx.
template <typename Norm, typename T, typename X, typename Store>
inline void normalize_backward(const T* dy, const X* x, const float* weight, Norm norm, Pair means,
                               float* dweight, float* dbias, int64_t begin, int64_t end,
                               Store store_dx) {
  for_vectors(end - begin, [&](int64_t offset, auto n) {
    const int64_t i = begin + offset;
    const vfloat xhat = norm(load(x + i, n)), v = load(dy + i, n);
    vfloat g = weight ? v * load(weight + i, n) : v;
    if constexpr (Norm::kCenters) g -= means.first;
    store_dx(i, norm.rstd * (g - xhat * means.second), n);
    if (dweight) store(dweight + i, load(dweight + i, n) + v * xhat, n);
    if (dbias) store(dbias + i, load(dbias + i, n) + v, n);
  });
}

// A parameter of N elements, or none, plus an offset, as float32: one conversion a call instead of
// one a row.
class Widened {
 public:
  Widened(const void* parameter, int64_t N, int dtype, float offset = 0.f) {
    if (!parameter || (dtype == int(Dtype::kFloat32) && offset == 0.f)) {
      values_ = (const float*)parameter;
      return;
    }
    owned_.allocate(N);
    with_type(dtype, [&](auto zero) {
      const auto* stored = (const decltype(zero)*)parameter;
      for_vectors(N,
                  [&](int64_t i, auto n) { store(&owned_[i], load(stored + i, n) + offset, n); });
    });
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
