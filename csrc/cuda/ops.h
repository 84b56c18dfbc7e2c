// Every native CUDA entry point. Read this file for the table of contents of csrc/cuda.
//
// Tensors arrive as device pointers and sizes, rows without gaps; `device` and `stream` say where
// the kernel is launched. A launch that fails throws std::runtime_error naming op and sizes.
#pragma once
#include <cstdint>

namespace slimkernels {

// Mirrored by DTYPES in slimkernels/backends/cuda/_common.py, which passes these numbers.
enum class Dtype : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// The functions of csrc/cuda/curves.cuh; mirrored in slimkernels/backends/cuda/_activation.py.
enum class Curve : int { kGelu = 0, kGeluTanh = 1, kSilu = 2, kReluSquared = 3 };

// activation.cu: y = curve(x + bias), bias (N,) or null; without one M is 1.
void activation_forward(const void* x, const void* bias, void* y, int64_t M, int64_t N, int curve,
                        int dtype, int bias_dtype, int device, void* stream);
// partials (shares, N): their sum is dbias; null without a bias.
void activation_backward(const void* dy, const void* x, const void* bias, void* dx, float* partials,
                         int64_t shares, int64_t M, int64_t N, int curve, int dtype, int bias_dtype,
                         int device, void* stream);

// cross_entropy.cu: x (M, V), labels (M,), weight (V,) or null, stats (3, M), correct (M,) of bool
// or null. losses (M,): of x's dtype if total is null, else float32, and total is their sum or
// mean, divisor what a mean divides by.
void cross_entropy_forward(const void* x, const int64_t* target, const float* weight, void* losses,
                           void* total, float* stats, float* divisor, void* correct, int64_t M,
                           int64_t V, int64_t ignore_index, float smoothing, float z_loss,
                           float softcap, int is_mean, int dtype, int device, void* stream);
// dy (M,) if per_row, else one number; dlse (M,) or null; divisor null unless it is a mean.
void cross_entropy_backward(const void* dy, const float* dlse, const void* x, const int64_t* target,
                            const float* weight, float* stats, const float* divisor, void* dx,
                            int64_t M, int64_t V, int64_t ignore_index, float smoothing,
                            float z_loss, float softcap, int per_row, int dtype, int device,
                            void* stream);

// softmax.cu: x, y (M, N); mask and sinks or null; shares (M,), what the sinks are of their rows.
// problem: struct SoftmaxProblem.
void softmax_forward(const void* x, const void* mask, const void* sinks, void* y, float* shares,
                     const int64_t* problem, float scale, int dtype, int device, void* stream);
// dx = scale * y * (dy - dot), products = -shares * dot, dot = sum(dy * y); shares (M,) or null.
void softmax_backward(const void* dy, const void* y, const float* shares, void* dx, float* products,
                      int64_t M, int64_t N, float scale, int dtype, int device, void* stream);

}  // namespace slimkernels
