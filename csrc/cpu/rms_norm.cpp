// RMSNorm over the last dimension: y = x * rstd * weight, rstd = 1 / sqrt(mean(x^2) + eps).
//
// Tiling, traffic and the order of dweight's sum are layer_norm.cpp's. One pass fewer: nothing is
// centered, so the sum of squares does not wait for a mean.
#include "kernels.h"
#include "norm.h"

namespace slimkernels::SLIM_ISA {

void rms_norm_forward(const void* x, const void* weight, void* y, float* rstd, int64_t M, int64_t N,
                      float eps, float weight_offset, int dtype, int parameter_dtype) {
  const Widened w(weight, N, parameter_dtype, weight_offset);
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    normalize_rows<Scaled>((const T*)x, w.values(), nullptr, (T*)y, nullptr, rstd, M, N, eps);
  });
}

void rms_norm_backward(const void* dy, const void* x, const void* weight, const float* rstd,
                       void* dx, void* dweight, int64_t M, int64_t N, float weight_offset,
                       int dtype, int parameter_dtype) {
  const Widened w(weight, N, parameter_dtype, weight_offset);
  const ChunkSums dw(dweight, partial_sums_of(M, N), N);
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    rows_backward<Scaled>((const T*)dy, (const T*)x, w.values(), nullptr, rstd, dw.values(),
                          nullptr, M, N, store_rows((T*)dx, N));
  });
  dw.write(dweight, parameter_dtype);
}

}  // namespace slimkernels::SLIM_ISA
