// What the kernels of layer_norm, rms_norm and both of a sum are given: a null pointer turns off
// what an op does not have. Fields named is_wide: float32 beside a 16-bit x.
#pragma once
#include <cstdint>

#include "random.cuh"

namespace slimkernels {

struct NormForward {
  const void *x, *residual;  // total = residual + row_scale * dropout(x); no residual: total is x
  const void *weight, *bias;
  void *y, *total;
  float *mean, *rstd;
  Dropout dropout;
  const float* row_scale;
  int64_t M;
  int N;
  float eps, weight_offset;
  bool residual_is_wide, weight_is_wide, bias_is_wide;
};

struct NormBackward {
  const void *dy, *dsum, *total;  // dsum flows into the sum besides
  const void* weight;
  const float *mean, *rstd;
  void *dresidual, *dx;    // dx: of a branch whose gradient is not dresidual
  float *dweight, *dbias;  // (programs, N) shares of the gradients
  Dropout dropout;
  const float* row_scale;
  int64_t M;
  int N;
  float weight_offset;
  bool residual_is_wide, weight_is_wide;
};

}  // namespace slimkernels
