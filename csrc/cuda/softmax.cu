// Softmax's entry points: the element type, the device, and what a failed launch says.
#include <algorithm>
#include <cstring>

#include "ops.h"
#include "softmax.cuh"

namespace slimkernels {
namespace {

// A call's integers, in the order of _problem in slimkernels/backends/cuda/softmax.py.
struct SoftmaxProblem {
  int64_t M, N, period, queries, heads, mask_dtype, sinks_dtype;
  // Where a mask's rows begin, as MaskRows in slimkernels/backends/_mask.py.
  int64_t middle, inner, stride_outer, stride_middle, stride_inner, stride_col;
};

constexpr int64_t kBool = -1;  // of mask_dtype

template <typename T>
Mask mask_of(const void* values, const SoftmaxProblem& call) {
  const bool is_bool = call.mask_dtype == kBool,
             is_wide = !is_bool && is_float32(int(call.mask_dtype));
  // A pack of the mask is as many elements as one of x.
  constexpr int64_t kVec = kFullVec<T>;
  const int64_t bytes = std::min<int64_t>(kVec * (is_bool ? 1 : is_wide ? 4 : sizeof(T)), 16);
  const bool is_aligned = call.stride_col == 1 &&
                          reinterpret_cast<uintptr_t>(values) % bytes == 0 &&
                          call.stride_outer % kVec == 0 && call.stride_middle % kVec == 0 &&
                          call.stride_inner % kVec == 0;
  return {values,
          is_bool,
          is_wide,
          is_aligned,
          call.middle,
          call.inner,
          call.stride_outer,
          call.stride_middle,
          call.stride_inner,
          call.stride_col};
}

}  // namespace

void softmax_forward(const void* x, const void* mask, const void* sinks, void* y, float* shares,
                     const int64_t* problem, float scale, int dtype, int device, void* stream) {
  const DeviceGuard guard(device);
  SoftmaxProblem given;
  std::memcpy(&given, problem, sizeof given);
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool is_wide = is_float32(int(given.sinks_dtype));
    const Scores call = {given.M,
                         int(given.N),
                         given.period,
                         scale,
                         mask_of<T>(mask, given),
                         {sinks, is_wide, given.queries, given.heads}};
    softmax_forward_rows((const T*)x, (T*)y, shares, call, max_cluster(device),
                         (cudaStream_t)stream);
  });
  check_launch("softmax_forward", given.M, given.N);
}

void softmax_backward(const void* dy, const void* y, const float* shares, void* dx, float* products,
                      int64_t M, int64_t N, float scale, int dtype, int device, void* stream) {
  const DeviceGuard guard(device);
  const SoftmaxGradient call = {M, int(N), scale, shares, products};
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    softmax_backward_rows((const T*)dy, (const T*)y, (T*)dx, call, max_cluster(device),
                          (cudaStream_t)stream);
  });
  check_launch("softmax_backward", M, N);
}

}  // namespace slimkernels
