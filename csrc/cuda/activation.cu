// Entry points of gelu, silu and relu_squared: the element type, the device, a failed launch.
#include "activation.cuh"
#include "ops.h"

namespace slimkernels {

void activation_forward(const void* x, const void* bias, void* y, int64_t M, int64_t N, int curve,
                        int dtype, int bias_dtype, int device, void* stream) {
  const DeviceGuard guard(device);
  const Tile tile = {M * N, N, Curve(curve), bias, Dtype(bias_dtype) == Dtype::kFloat32};
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    activation_forward_rows((const T*)x, (T*)y, tile, (cudaStream_t)stream);
  });
  check_launch("activation_forward", M, N);
}

void activation_backward(const void* dy, const void* x, const void* bias, void* dx, float* partials,
                         int64_t shares, int64_t M, int64_t N, int curve, int dtype, int bias_dtype,
                         int device, void* stream) {
  const DeviceGuard guard(device);
  const Tile tile = {M * N, N, Curve(curve), bias, Dtype(bias_dtype) == Dtype::kFloat32};
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    activation_backward_rows((const T*)dy, (const T*)x, (T*)dx, partials, tile, shares,
                             (cudaStream_t)stream);
  });
  check_launch("activation_backward", M, N);
}

}  // namespace slimkernels
