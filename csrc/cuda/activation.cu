// Entry points of gelu, silu and relu_squared: the element type, the device, a failed launch.
#include "activation.cuh"
#include "column_sums.h"
#include "ops.h"

namespace slimkernels {

void activation_forward(const void* x, const void* bias, void* y, int64_t M, int64_t N, int curve,
                        int dtype, int bias_dtype, int device, void* stream) {
  const DeviceGuard guard(device);
  const Tile tile = {M * N, N, Curve(curve), bias, is_float32(bias_dtype)};
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    activation_forward_rows((const T*)x, (T*)y, tile, (cudaStream_t)stream);
  });
  check_launch("activation_forward", M, N);
}

void activation_backward(const void* dy, const void* x, const void* bias, void* dx, void* dbias,
                         float* partials, int64_t parts, int64_t M, int64_t N, int curve, int dtype,
                         int bias_dtype, int device, void* stream) {
  const DeviceGuard guard(device);
  const Tile tile = {M * N, N, Curve(curve), bias, is_float32(bias_dtype)};
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    activation_backward_rows((const T*)dy, (const T*)x, (T*)dx, partials, tile, parts,
                             (cudaStream_t)stream);
  });
  if (bias) column_sums(partials, dbias, parts, N, bias_dtype, stream);
  check_launch("activation_backward", M, N);
}

// Enough for eight blocks, of 256 columns and 8 rows at a time, on each multiprocessor.
int64_t activation_parts(int64_t M, int64_t N, int device) {
  const int64_t most = 8 * 256 * int64_t(multiprocessors(device)) / N;
  return std::max<int64_t>(1, std::min({(M + 7) / 8, most, kMostBlocksDown}));
}

}  // namespace slimkernels
