// Cross-entropy's entry points: the element type, the device, and what a failed launch says.
#include "cross_entropy.cuh"
#include "ops.h"

namespace slimkernels {

void cross_entropy_forward(const void* x, const int64_t* target, const float* weight, float* losses,
                           float* total, float* stats, float* divisor, void* correct, int64_t M,
                           int64_t V, int64_t ignore_index, float smoothing, float z_loss,
                           float softcap, int is_mean, int dtype, int device, void* stream) {
  const DeviceGuard guard(device);
  const Loss p = {target, weight, stats, M, int(V), ignore_index, smoothing, z_loss, softcap};
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const LossOutputs out = {losses, (uint8_t*)correct};
    cross_entropy_forward_rows((const T*)x, out, p, max_cluster(device), (cudaStream_t)stream);
  });
  if (total) cross_entropy_total(losses, total, divisor, is_mean, p, (cudaStream_t)stream);
  check_launch("cross_entropy_forward", M, V);
}

void cross_entropy_backward(const float* dy, const float* dlse, const void* x,
                            const int64_t* target, const float* weight, float* stats,
                            const float* divisor, void* dx, int64_t M, int64_t V,
                            int64_t ignore_index, float smoothing, float z_loss, float softcap,
                            int per_row, int dtype, int device, void* stream) {
  const DeviceGuard guard(device);
  const Loss p = {target, weight, stats, M, int(V), ignore_index, smoothing, z_loss, softcap};
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const LossGradients g = {dy, dlse, divisor, per_row != 0};
    cross_entropy_backward_rows((const T*)x, (T*)dx, g, p, (cudaStream_t)stream);
  });
  check_launch("cross_entropy_backward", M, V);
}

}  // namespace slimkernels
