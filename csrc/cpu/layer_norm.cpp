// LayerNorm over the last dimension: y = (x - mean) * rstd * weight + bias.
//
// Tiling   Threads split the rows; a row (1.5 KiB at N = 384) stays in L1 across the passes of
//          rows.h. In backward they split the columns of long rows.
// Traffic  Forward reads and writes N elements a row; backward reads 2 N and writes N.
// Numerics Statistics are float32 and the variance is two-pass, because E[x^2] - mean^2 cancels.
//          dweight and dbias are summed in chunks of rows that depend on the shape alone, so the
//          result does not depend on the number of threads.
#include "kernels.h"
#include "norm.h"

namespace slimkernels::SLIM_ISA {

void layer_norm_forward(const void* x, const void* weight, const void* bias, void* y, float* mean,
                        float* rstd, int64_t M, int64_t N, float eps, float weight_offset,
                        int dtype, int parameter_dtype) {
  const Widened w(weight, N, parameter_dtype, weight_offset), b(bias, N, parameter_dtype);
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    normalize_rows<Centered>((const T*)x, w.values(), b.values(), (T*)y, mean, rstd, M, N, eps);
  });
}

void layer_norm_backward(const void* dy, const void* x, const void* weight, const float* mean,
                         const float* rstd, void* dx, void* dweight, void* dbias, int64_t M,
                         int64_t N, float weight_offset, int dtype, int parameter_dtype) {
  const Widened w(weight, N, parameter_dtype, weight_offset);
  const int64_t partials = partial_sums_of(M, N);
  const ChunkSums dw(dweight, partials, N), db(dbias, partials, N);
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    rows_backward<Centered>((const T*)dy, (const T*)x, w.values(), mean, rstd, dw.values(),
                            db.values(), M, N, store_rows((T*)dx, N));
  });
  dw.write(dweight, parameter_dtype);
  db.write(dbias, parameter_dtype);
}

}  // namespace slimkernels::SLIM_ISA
