// sum = residual + row_scale * dropout(x), and RMSNorm of the sum over the last dimension.
//
// As add_layer_norm.cpp, with one pass fewer: the sum of squares is taken while the sum is stored.
#include "add_norm.h"
#include "kernels.h"

namespace slimkernels::SLIM_ISA {

void add_rms_norm_forward(const void* x, const void* residual, const void* weight, void* y,
                          void* total, float* rstd, const int64_t* seed, const float* row_scale,
                          int64_t M, int64_t N, float eps, double dropout_p, int64_t threshold,
                          float weight_offset, int dtype, int residual_dtype, int parameter_dtype) {
  const Widened w(weight, N, parameter_dtype, weight_offset), no_bias(nullptr, N, 0);
  add_norm_forward<Scaled>(x, residual, w, no_bias, y, total, nullptr, rstd, M, N, eps,
                           {seed, dropout_p, threshold, row_scale}, dtype, residual_dtype);
}

void add_rms_norm_backward(const void* dy, const void* dsum, const void* total, const void* weight,
                           const float* rstd, void* dx, void* dresidual, void* dweight,
                           const int64_t* seed, const float* row_scale, int64_t M, int64_t N,
                           double dropout_p, int64_t threshold, float weight_offset, int dtype,
                           int residual_dtype, int parameter_dtype) {
  const Widened w(weight, N, parameter_dtype, weight_offset);
  add_norm_backward<Scaled>(dy, dsum, total, w, nullptr, rstd, dx, dresidual, dweight, nullptr, M,
                            N, {seed, dropout_p, threshold, row_scale}, dtype, residual_dtype,
                            parameter_dtype);
}

}  // namespace slimkernels::SLIM_ISA
