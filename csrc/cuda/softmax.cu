// Softmax's entry points: the element type, the device, and what a failed launch says.
#include "ops.h"
#include "softmax.cuh"

namespace slimkernels {

void softmax_forward(const void* x, void* y, int64_t M, int64_t N, int64_t period, float scale,
                     int dtype, int device, void* stream) {
  const DeviceGuard guard(device);
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    softmax_forward_rows((const T*)x, (T*)y, M, N, period, scale, (cudaStream_t)stream);
  });
  check_launch("softmax_forward", M, N);
}

void softmax_backward(const void* dy, const void* y, void* dx, int64_t M, int64_t N, float scale,
                      int dtype, int device, void* stream) {
  const DeviceGuard guard(device);
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    softmax_backward_rows((const T*)dy, (const T*)y, (T*)dx, M, N, scale, (cudaStream_t)stream);
  });
  check_launch("softmax_backward", M, N);
}

}  // namespace slimkernels
