// sum = residual + dropout(x), and LayerNorm of the sum over the last dimension.
//
// Tiling   Threads split the rows; a row of the sum (1.5 KiB at N = 384) stays in L1 between the
//          pass that stores it and adds it up and the two that normalise it.
// Traffic  Forward reads 2 N and writes 2 N elements a row. Backward reads 2 N, or 3 N with a
//          gradient of the sum, and writes N, or 2 N with dropout. Dropout stores nothing: backward
//          draws its bits again.
// Numerics Statistics are those of the sum as stored, so y is exactly layer_norm(sum). dx comes
//          from dresidual before it is rounded. The rest as in layer_norm.cpp.
#include "kernels.h"
#include "parallel.h"
#include "random.h"
#include "rows.h"
#include "vec.h"

namespace slimkernels::SLIM_ISA {
namespace {

template <bool kDropout, typename T>
void forward(const T* x, const T* residual, const float* weight, const float* bias, T* y, T* total,
             float* mean, float* rstd, int64_t M, int64_t N, float eps, const Dropout& dropout) {
  for_rows(M, N, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const RowBits bits(dropout.seed, row);
      const T *branch = x + row * N, *skip = residual + row * N;
      T* sum = total + row * N;
      const float added = sum_over(N, [&](int64_t i, auto n) {
        vfloat v = load(branch + i, n);
        if constexpr (kDropout) v = dropout.apply(v, bits, i);
        store(sum + i, load(skip + i, n) + v, n);
        return load(sum + i, n);  // as rounded
      });
      const Moments moments = moments_about(added, sum, N, eps);
      normalize(sum, weight, bias, y + row * N, moments, N);
      mean[row] = moments.mean;
      rstd[row] = moments.rstd;
    }
  });
}

template <bool kDropout, typename T>
void backward(const T* dy, const T* dsum, const T* total, const float* weight, const float* mean,
              const float* rstd, T* dx, T* dresidual, float* dweight, float* dbias, int64_t M,
              int64_t N, const Dropout& dropout) {
  for_chunks(M, 2 * N, [&](int64_t chunk, int64_t begin, int64_t end) {
    float* dw = dweight ? dweight + chunk * N : nullptr;
    float* db = dbias ? dbias + chunk * N : nullptr;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = row * N;
      const RowBits bits(dropout.seed, row);
      normalize_backward(dy + at, total + at, weight, {mean[row], rstd[row]}, dw, db, N,
                         [&](int64_t i, vfloat v, auto n) {
                           if (dsum) v += load(dsum + at + i, n);
                           store(dresidual + at + i, v, n);
                           if constexpr (kDropout) store(dx + at + i, dropout.apply(v, bits, i), n);
                         });
    }
  });
}

}  // namespace

void add_layer_norm_forward(const void* x, const void* residual, const void* weight,
                            const void* bias, void* y, void* total, float* mean, float* rstd,
                            const int64_t* seed, int64_t M, int64_t N, float eps, double dropout_p,
                            int64_t threshold, int dtype, int parameter_dtype) {
  const Widened w(weight, N, parameter_dtype), b(bias, N, parameter_dtype);
  const Dropout dropout(seed, dropout_p, threshold);
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    (seed ? forward<true, T> : forward<false, T>)((const T*)x, (const T*)residual, w.values(),
                                                  b.values(), (T*)y, (T*)total, mean, rstd, M, N,
                                                  eps, dropout);
  });
}

void add_layer_norm_backward(const void* dy, const void* dsum, const void* total,
                             const void* weight, const float* mean, const float* rstd, void* dx,
                             void* dresidual, void* dweight, void* dbias, const int64_t* seed,
                             int64_t M, int64_t N, double dropout_p, int64_t threshold, int dtype,
                             int parameter_dtype) {
  const Widened w(weight, N, parameter_dtype);
  const int64_t chunks = chunks_for(M);
  const ChunkSums dw(dweight, chunks, N), db(dbias, chunks, N);
  const Dropout dropout(seed, dropout_p, threshold);
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    (seed ? backward<true, T> : backward<false, T>)((const T*)dy, (const T*)dsum, (const T*)total,
                                                    w.values(), mean, rstd, (T*)dx, (T*)dresidual,
                                                    dw.values(), db.values(), M, N, dropout);
  });
  dw.write(dweight, parameter_dtype);
  db.write(dbias, parameter_dtype);
}

}  // namespace slimkernels::SLIM_ISA
