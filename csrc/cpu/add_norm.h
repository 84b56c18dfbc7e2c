// total = residual + row_scale * dropout(x), and the norm of the total: add_layer_norm.cpp with
// Norm = Centered, add_rms_norm.cpp with Norm = Scaled (rows.h).
//
// T is the branch's type: of x and y, and of their gradients. R is the residual stream's.
#pragma once
#include "norm.h"
#include "random.h"

namespace slimkernels::SLIM_ISA {

// What is done to x before it is added. A null seed means no dropout, null scales that all are 1.
struct Branch {
  Dropout dropout;
  bool drops;
  const float* row_scale;

  Branch(const int64_t* seed, double dropout_p, int64_t threshold, const float* row_scale)
      : dropout(seed, dropout_p, threshold), drops(seed), row_scale(row_scale) {}

  float scale(int64_t row) const { return row_scale ? row_scale[row] : 1.f; }
};

template <typename Norm, bool kDrops, typename T, typename R>
void add_rows(const T* x, const R* residual, const float* weight, const float* bias, T* y, R* total,
              float* mean, float* rstd, int64_t M, int64_t N, float eps, const Branch& branch) {
  for_rows(M, N, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const Dropout dropout = branch.dropout;
      const RowBits bits(dropout.seed, row);
      const float scale = branch.scale(row);
      const T* values = x + row * N;
      const R* skip = residual + row * N;
      R* sum = total + row * N;
      const float first = sum_over(N, [&](int64_t i, auto n) {
        vfloat v = load(values + i, n);
        if constexpr (kDrops) v = dropout.apply(v, bits, i);
        store(sum + i, load(skip + i, n) + v * scale, n);
        return Norm::first(load(sum + i, n));  // as rounded
      });
      const Norm norm = Norm::of(first, sum, N, eps);
      normalize(sum, weight, bias, y + row * N, norm, N);
      norm.save(mean, rstd, row);
    }
  });
}

// dsum and dx may be null: a sum that nobody used, and a branch whose gradient is the residual's.
template <typename Norm, bool kDrops, typename T, typename R>
void add_rows_backward(const T* dy, const R* dsum, const R* total, const float* weight,
                       const float* mean, const float* rstd, T* dx, R* dresidual, float* dweight,
                       float* dbias, int64_t M, int64_t N, const Branch& branch) {
  const auto store_of = [&](int64_t row) {
    const RowBits bits(branch.dropout.seed, row);
    return [=, scale = branch.scale(row), dropout = branch.dropout, at = row * N](
               int64_t i, vfloat v, auto n) {
      if (dsum) v += load(dsum + at + i, n);
      store(dresidual + at + i, v, n);
      if (!dx) return;
      v *= scale;
      if constexpr (kDrops) v = dropout.apply(v, bits, i);
      store(dx + at + i, v, n);
    };
  };
  rows_backward<Norm>(dy, total, weight, mean, rstd, dweight, dbias, M, N, store_of);
}

// body with a value of x's type and one of the residual's, which is the same or float32.
template <typename Body>
inline void with_types(int dtype, int residual_dtype, Body body) {
  if (dtype != int(Dtype::kFloat32) && residual_dtype == int(Dtype::kFloat32))
    body(bf16{}, float{});
  else
    with_type(dtype, [&](auto zero) { body(zero, zero); });
}

// The two above on untyped memory.
template <typename Norm>
void add_norm_forward(const void* x, const void* residual, const Widened& weight,
                      const Widened& bias, void* y, void* total, float* mean, float* rstd,
                      int64_t M, int64_t N, float eps, const Branch& branch, int dtype,
                      int residual_dtype) {
  with_types(dtype, residual_dtype, [&](auto narrow, auto wide) {
    using T = decltype(narrow);
    using R = decltype(wide);
    (branch.drops ? add_rows<Norm, true, T, R>
                  : add_rows<Norm, false, T, R>)((const T*)x, (const R*)residual, weight.values(),
                                                 bias.values(), (T*)y, (R*)total, mean, rstd, M, N,
                                                 eps, branch);
  });
}

template <typename Norm>
void add_norm_backward(const void* dy, const void* dsum, const void* total, const Widened& weight,
                       const float* mean, const float* rstd, void* dx, void* dresidual,
                       void* dweight, void* dbias, int64_t M, int64_t N, const Branch& branch,
                       int dtype, int residual_dtype, int parameter_dtype) {
  const int64_t partials = partial_sums_of(M, N);
  const ChunkSums dw(dweight, partials, N), db(dbias, partials, N);
  with_types(dtype, residual_dtype, [&](auto narrow, auto wide) {
    using T = decltype(narrow);
    using R = decltype(wide);
    (branch.drops ? add_rows_backward<Norm, true, T, R>
                  : add_rows_backward<Norm, false, T, R>)((const T*)dy, (const R*)dsum,
                                                          (const R*)total, weight.values(), mean,
                                                          rstd, (T*)dx, (R*)dresidual, dw.values(),
                                                          db.values(), M, N, branch);
  });
  dw.write(dweight, parameter_dtype);
  db.write(dbias, parameter_dtype);
}

}  // namespace slimkernels::SLIM_ISA
