// sum = residual + row_scale * dropout(x), and LayerNorm of the sum over the last dimension.
//
// Tiling   Threads split the rows; a row of the sum (1.5 KiB at N = 384) stays in L1 between the
//          pass that stores it and adds it up and the two that normalise it.
// Traffic  Forward reads 2 N and writes 2 N elements a row, or N where y takes the sum's place.
//          Backward reads 2 N, or 3 N with a gradient of the sum, and writes N, or 2 N where the
//          branch has a gradient of its own. Dropout stores nothing: backward draws its bits again.
// Numerics Statistics are those of the sum as stored, so y is exactly layer_norm(sum). dx comes
//          from dresidual before it is rounded. The rest as in layer_norm.cpp.
#include "add_norm.h"
#include "kernels.h"

namespace slimkernels::SLIM_ISA {

void add_layer_norm_forward(const void* x, const void* residual, const void* weight,
                            const void* bias, void* y, void* total, float* mean, float* rstd,
                            const int64_t* seed, const float* row_scale, int64_t M, int64_t N,
                            float eps, double dropout_p, int64_t threshold, float weight_offset,
                            int dtype, int residual_dtype, int parameter_dtype) {
  const Widened w(weight, N, parameter_dtype, weight_offset), b(bias, N, parameter_dtype);
  add_norm_forward<Centered>(x, residual, w, b, y, total, mean, rstd, M, N, eps,
                             {seed, dropout_p, threshold, row_scale}, dtype, residual_dtype);
}

void add_layer_norm_backward(const void* dy, const void* dsum, const void* total,
                             const void* weight, const float* mean, const float* rstd, void* dx,
                             void* dresidual, void* dweight, void* dbias, const int64_t* seed,
                             const float* row_scale, int64_t M, int64_t N, double dropout_p,
                             int64_t threshold, float weight_offset, int dtype, int residual_dtype,
                             int parameter_dtype) {
  const Widened w(weight, N, parameter_dtype, weight_offset);
  add_norm_backward<Centered>(dy, dsum, total, w, mean, rstd, dx, dresidual, dweight, dbias, M, N,
                              {seed, dropout_p, threshold, row_scale}, dtype, residual_dtype,
                              parameter_dtype);
}

}  // namespace slimkernels::SLIM_ISA
