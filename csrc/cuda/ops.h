// Every native CUDA entry point. Read this file for the table of contents of csrc/cuda.
//
// Tensors arrive as device pointers and sizes, rows without gaps; `device` and `stream` say where
// the kernel is launched. A launch that fails throws std::runtime_error naming op and sizes.
#pragma once
#include <cstdint>

namespace slimkernels {

// Mirrored by DTYPES in slimkernels/backends/cuda/_common.py, which passes these numbers.
enum class Dtype : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// softmax.cu: x, y (M, N). If period > 0, row r sees the columns up to r % period.
void softmax_forward(const void* x, void* y, int64_t M, int64_t N, int64_t period, float scale,
                     int dtype, int device, void* stream);
// dx = scale * y * (dy - sum(dy * y))
void softmax_backward(const void* dy, const void* y, void* dx, int64_t M, int64_t N, float scale,
                      int dtype, int device, void* stream);

}  // namespace slimkernels
