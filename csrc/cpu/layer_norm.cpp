// LayerNorm over the last dimension: y = (x - mean) * rstd * weight + bias.
//
// Tiling   Threads split the rows; a row (1.5 KiB at N = 384) stays in L1 across the passes below.
// Traffic  Forward reads and writes N elements a row; backward reads 2 N and writes N.
// Numerics Statistics are float32 and the variance is two-pass, because E[x^2] - mean^2 cancels.
//          dweight and dbias are summed in chunks of rows that depend on the shape alone, so the
//          result does not depend on the number of threads.
#include "kernels.h"
#include "parallel.h"
#include "rows.h"
#include "vec.h"

namespace slimkernels::SLIM_ISA {
namespace {

template <typename T>
void forward(const T* x, const float* weight, const float* bias, T* y, float* mean, float* rstd,
             int64_t M, int64_t N, float eps) {
  for_rows(M, N, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const Moments moments = moments_of(x + row * N, N, eps);
      normalize(x + row * N, weight, bias, y + row * N, moments, N);
      mean[row] = moments.mean;
      rstd[row] = moments.rstd;
    }
  });
}

template <typename T>
void backward(const T* dy, const T* x, const float* weight, const float* mean, const float* rstd,
              T* dx, float* dweight, float* dbias, int64_t M, int64_t N) {
  for_chunks(M, 2 * N, [&](int64_t chunk, int64_t begin, int64_t end) {
    float* dw = dweight ? dweight + chunk * N : nullptr;
    float* db = dbias ? dbias + chunk * N : nullptr;
    for (int64_t row = begin; row < end; ++row)
      normalize_backward(dy + row * N, x + row * N, weight, {mean[row], rstd[row]}, dw, db, N,
                         [&](int64_t i, vfloat v, auto n) { store(dx + row * N + i, v, n); });
  });
}

}  // namespace

void layer_norm_forward(const void* x, const void* weight, const void* bias, void* y, float* mean,
                        float* rstd, int64_t M, int64_t N, float eps, int dtype,
                        int parameter_dtype) {
  const Widened w(weight, N, parameter_dtype), b(bias, N, parameter_dtype);
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    forward((const T*)x, w.values(), b.values(), (T*)y, mean, rstd, M, N, eps);
  });
}

void layer_norm_backward(const void* dy, const void* x, const void* weight, const float* mean,
                         const float* rstd, void* dx, void* dweight, void* dbias, int64_t M,
                         int64_t N, int dtype, int parameter_dtype) {
  const Widened w(weight, N, parameter_dtype);
  const int64_t chunks = chunks_for(M);
  const ChunkSums dw(dweight, chunks, N), db(dbias, chunks, N);
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    backward((const T*)dy, (const T*)x, w.values(), mean, rstd, (T*)dx, dw.values(), db.values(), M,
             N);
  });
  dw.write(dweight, parameter_dtype);
  db.write(dbias, parameter_dtype);
}

}  // namespace slimkernels::SLIM_ISA
