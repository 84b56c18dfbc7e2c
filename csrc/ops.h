// Every native CPU entry point. Read this file for the table of contents of csrc/cpu.
//
// Each instruction set fills one Kernels table (cpu/table.cpp is compiled once for each), and
// bindings.cpp calls through the table of the best one this machine has. No torch header
// anywhere: tensors arrive as pointers and sizes, rows are contiguous, and a null pointer
// stands for an optional tensor that was not given.
#pragma once
#include <cstdint>

namespace slimkernels {

// Mirrored by DTYPES in slimkernels/backends/cpu/_common.py, which passes these numbers.
enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1 };

// Mirrored by CURVES in slimkernels/backends/cpu/_activation.py. cpu/curves.h has the functions.
enum class Curve : int { kGelu = 0, kGeluTanh = 1, kSilu = 2, kReluSquared = 3 };

// Throws what pybind11 makes a MemoryError. Compiled once, like all of the standard library that is
// used, not once an instruction set.
[[noreturn]] void out_of_memory();

// Whether the chosen instruction set has AMX, which needs no code of its own outside a few products
// and so no table: it is avx512bf16's, with this on.
extern bool has_amx;

struct Kernels {
  // layer_norm.cpp: x, y (M, N); weight, bias (N,) in parameter_dtype; mean, rstd (M,)
  void (*layer_norm_forward)(const void* x, const void* weight, const void* bias, void* y,
                             float* mean, float* rstd, int64_t M, int64_t N, float eps, int dtype,
                             int parameter_dtype);
  void (*layer_norm_backward)(const void* dy, const void* x, const void* weight, const float* mean,
                              const float* rstd, void* dx, void* dweight, void* dbias, int64_t M,
                              int64_t N, int dtype, int parameter_dtype);

  // add_layer_norm.cpp: as layer_norm.cpp; total is the sum. dsum may be null. A null seed means no
  // dropout: dx, which would equal dresidual, is not written then.
  void (*add_layer_norm_forward)(const void* x, const void* residual, const void* weight,
                                 const void* bias, void* y, void* total, float* mean, float* rstd,
                                 const int64_t* seed, int64_t M, int64_t N, float eps,
                                 double dropout_p, int64_t threshold, int dtype,
                                 int parameter_dtype);
  void (*add_layer_norm_backward)(const void* dy, const void* dsum, const void* total,
                                  const void* weight, const float* mean, const float* rstd,
                                  void* dx, void* dresidual, void* dweight, void* dbias,
                                  const int64_t* seed, int64_t M, int64_t N, double dropout_p,
                                  int64_t threshold, int dtype, int parameter_dtype);

  // scaled_dot_product_attention.cpp, _backward.cpp: problem and variant are struct Problem in
  // cpu/attention.h and the start of struct Variant in cpu/attention_scores.h, as integers; the
  // last dimension of query, key, value and dy is contiguous. A null variant is none, a null seed
  // no dropout, a null dlse zeros, a null gradient not wanted. dbias has the bias' shape and dtype
  // and starts as zeros; dsinks (H,), drelative (H, distances)
  void (*scaled_dot_product_attention_forward)(const void* query, const void* key,
                                               const void* value, void* y, float* lse,
                                               const int64_t* seed, const int64_t* problem,
                                               const int64_t* variant, float scale, float softcap,
                                               float dropout_p, int64_t threshold, int dtype);
  void (*scaled_dot_product_attention_backward)(const void* dy, const float* dlse,
                                                const void* query, const void* key,
                                                const void* value, const void* y, const float* lse,
                                                void* dquery, void* dkey, void* dvalue, void* dbias,
                                                float* dsinks, float* drelative,
                                                const int64_t* seed, const int64_t* problem,
                                                const int64_t* variant, float scale, float softcap,
                                                float dropout_p, int64_t threshold, int dtype);

  // activation.cpp: x, y (M, N); bias (N,) in bias_dtype. Without a bias only M * N matters.
  void (*activation_forward)(const void* x, const void* bias, void* y, int64_t M, int64_t N,
                             int curve, int dtype, int bias_dtype);
  void (*activation_backward)(const void* dy, const void* x, const void* bias, void* dx,
                              void* dbias, int64_t M, int64_t N, int curve, int dtype,
                              int bias_dtype);

  // gated.cpp: gate, up (M, N), with a stride from row to row; y, dy (M, N) without gaps; dgate,
  // dup (M, N), both with gradient_stride
  void (*gated_forward)(const void* gate, const void* up, void* y, int64_t M, int64_t N,
                        int64_t gate_stride, int64_t up_stride, int curve, int dtype);
  void (*gated_backward)(const void* dy, const void* gate, const void* up, void* dgate, void* dup,
                         int64_t M, int64_t N, int64_t gate_stride, int64_t up_stride,
                         int64_t gradient_stride, int curve, int dtype);

  // bias_dropout_add.cpp: x, residual, y (M, N); bias (N,) in bias_dtype. Null bias and residual
  // are zero. A null seed means no dropout: dx, which would equal dy, is not written then.
  void (*bias_dropout_add_forward)(const void* x, const void* bias, const void* residual, void* y,
                                   const int64_t* seed, int64_t M, int64_t N, double dropout_p,
                                   int64_t threshold, int dtype, int bias_dtype);
  void (*bias_dropout_add_backward)(const void* dy, void* dx, void* dbias, const int64_t* seed,
                                    int64_t M, int64_t N, double dropout_p, int64_t threshold,
                                    int dtype, int bias_dtype);

  // rotary.cpp: problem is struct Problem there, as integers; the last dimension of query and key
  // is contiguous, turned_query and turned_key (B, T, H, D) have no gaps; cos, sin (table_rows,
  // half). Null positions count from problem's offset. sign is 1, or -1 for backward.
  void (*rotary)(const void* query, const void* key, void* turned_query, void* turned_key,
                 const float* cos, const float* sin, const int64_t* positions,
                 const int64_t* problem, int interleaved, float sign, int dtype);

  // cross_entropy.cpp: x (M, V), target and losses (M,), lse (2, M), total and count (1,);
  // dy (M,), or one element with dy_stride 0. A null divisor stands for 1.
  void (*cross_entropy_forward)(const void* x, const int64_t* target, float* losses, float* total,
                                float* lse, float* count, int64_t M, int64_t V,
                                int64_t ignore_index, float label_smoothing, int is_mean,
                                int dtype);
  void (*cross_entropy_backward)(const float* dy, int64_t dy_stride, const void* x,
                                 const int64_t* target, const float* lse, const float* divisor,
                                 void* dx, int64_t M, int64_t V, int64_t ignore_index,
                                 float label_smoothing, int dtype);

  // softmax.cpp: x, y (M, N). If period > 0, row r sees the columns up to r % period. mask_rows are
  // the integers of MaskRows in slimkernels/backends/_mask.py, null where mask is.
  void (*softmax_forward)(const void* x, const uint8_t* mask, void* y, const int64_t* mask_rows,
                          int64_t M, int64_t N, int64_t period, float scale, int dtype);
  void (*softmax_backward)(const void* dy, const void* y, void* dx, int64_t M, int64_t N,
                           float scale, int dtype);
};

}  // namespace slimkernels
