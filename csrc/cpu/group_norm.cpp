// GroupNorm: a sample's group of channels is one row, y = (x - mean) * rstd * weight + bias with a
// weight and a bias a channel.
//
// Tiling   Threads split the rows; a channel is S neighbouring elements of its row.
// Traffic  Forward reads x for the statistics (twice) and to normalise it, backward dy and x for
//          the sums and for dx; only what the caches do not hold comes from memory again.
// Numerics Statistics as in layer_norm.cpp. Every sample adds its own sums to dweight and dbias,
//          first to last, so the result does not depend on the number of threads.
#include "kernels.h"
#include "parallel.h"
#include "rows.h"
#include "vec.h"

namespace slimkernels::SLIM_ISA {
namespace {

// x is (samples, groups, channels of a group, S).
struct Groups {
  int64_t samples, groups, channels, S;
  int64_t rows() const { return samples * groups; }
  int64_t row_length() const { return channels * S; }
};

// The place of a row's first channel in weight and bias.
inline int64_t first_channel(const Groups& shape, int64_t row) {
  return row % shape.groups * shape.channels;
}

template <typename T>
void forward(const T* x, const float* weight, const float* bias, T* y, float* mean, float* rstd,
             const Groups& shape, float eps) {
  const int64_t N = shape.row_length(), S = shape.S;
  for_rows(shape.rows(), N, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* values = x + row * N;
      const float total = sum_over(N, [&](int64_t i, auto n) { return load(values + i, n); });
      const Centered norm = Centered::of(total, values, N, eps);
      norm.save(mean, rstd, row);
      for (int64_t c = 0; c < shape.channels; ++c) {
        const int64_t at = row * N + c * S, channel = first_channel(shape, row) + c;
        const float scale = weight ? norm.rstd * weight[channel] : norm.rstd;
        const float shift = bias ? bias[channel] : 0.f;
        for_vectors(S, [&](int64_t i, auto n) {
          store(y + at + i, (load(x + at + i, n) - norm.mean) * scale + shift, n);
        });
      }
    }
  });
}

// dx as in rows.h. dweight and dbias have one row of channels a sample, or are null.
template <typename T>
void backward(const T* dy, const T* x, const float* weight, const float* mean, const float* rstd,
              T* dx, float* dweight, float* dbias, const Groups& shape) {
  const int64_t N = shape.row_length(), S = shape.S;
  for_rows(shape.rows(), 2 * N, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const Centered norm = Centered::saved(mean, rstd, row);
      const int64_t first = first_channel(shape, row);
      float sum_g = 0.f, sum_gx = 0.f;
      for (int64_t c = 0; c < shape.channels; ++c) {
        const int64_t at = row * N + c * S;
        const Pair sums = sum_over(S, [&](int64_t i, auto n) {
          const vfloat v = load(dy + at + i, n);
          return vpair{v, v * keep(norm(load(x + at + i, n)), n)};
        });
        const float w = weight ? weight[first + c] : 1.f;
        sum_g += w * sums.first;
        sum_gx += w * sums.second;
        if (dbias) dbias[row * shape.channels + c] = sums.first;
        if (dweight) dweight[row * shape.channels + c] = sums.second;
      }
      const float mean_g = sum_g / N, mean_gx = sum_gx / N;
      for (int64_t c = 0; c < shape.channels; ++c) {
        const int64_t at = row * N + c * S;
        const float w = weight ? weight[first + c] : 1.f;
        for_vectors(S, [&](int64_t i, auto n) {
          const vfloat xhat = norm(load(x + at + i, n));
          const vfloat g = load(dy + at + i, n) * w;
          store(dx + at + i, norm.rstd * (g - mean_g - xhat * mean_gx), n);
        });
      }
    }
  });
}

}  // namespace

void group_norm_forward(const void* x, const void* weight, const void* bias, void* y, float* mean,
                        float* rstd, int64_t samples, int64_t groups, int64_t channels, int64_t S,
                        float eps, int dtype, int parameter_dtype) {
  const int64_t C = groups * channels;
  const Widened w(weight, C, parameter_dtype), b(bias, C, parameter_dtype);
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    forward((const T*)x, w.values(), b.values(), (T*)y, mean, rstd, {samples, groups, channels, S},
            eps);
  });
}

void group_norm_backward(const void* dy, const void* x, const void* weight, const float* mean,
                         const float* rstd, void* dx, void* dweight, void* dbias, int64_t samples,
                         int64_t groups, int64_t channels, int64_t S, int dtype,
                         int parameter_dtype) {
  const int64_t C = groups * channels;
  const Widened w(weight, C, parameter_dtype);
  const ChunkSums dw(dweight, samples, C), db(dbias, samples, C);
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    backward((const T*)dy, (const T*)x, w.values(), mean, rstd, (T*)dx, dw.values(), db.values(),
             {samples, groups, channels, S});
  });
  dw.write(dweight, parameter_dtype);
  db.write(dbias, parameter_dtype);
}

}  // namespace slimkernels::SLIM_ISA
