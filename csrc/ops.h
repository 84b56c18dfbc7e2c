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
#if defined(__x86_64__) && (__has_include(<amxbf16intrin.h>) || __has_include(<amxintrin.h>))
#define SLIM_COMPILER_HAS_AMX
#endif

struct Kernels {
  // layer_norm.cpp: x, y (M, N); weight, bias (N,) in parameter_dtype; mean, rstd (M,).
  // weight_offset is added to the weight.
  void (*layer_norm_forward)(const void* x, const void* weight, const void* bias, void* y,
                             float* mean, float* rstd, int64_t M, int64_t N, float eps,
                             float weight_offset, int dtype, int parameter_dtype);
  void (*layer_norm_backward)(const void* dy, const void* x, const void* weight, const float* mean,
                              const float* rstd, void* dx, void* dweight, void* dbias, int64_t M,
                              int64_t N, float weight_offset, int dtype, int parameter_dtype);

  // rms_norm.cpp: as layer_norm.cpp
  void (*rms_norm_forward)(const void* x, const void* weight, void* y, float* rstd, int64_t M,
                           int64_t N, float eps, float weight_offset, int dtype,
                           int parameter_dtype);
  void (*rms_norm_backward)(const void* dy, const void* x, const void* weight, const float* rstd,
                            void* dx, void* dweight, int64_t M, int64_t N, float weight_offset,
                            int dtype, int parameter_dtype);

  // add_layer_norm.cpp: as layer_norm.cpp; total is the sum, in residual_dtype like residual, dsum
  // and dresidual: dtype or float32. dsum may be null. row_scale (M,), a null one is ones; a null
  // seed means no dropout. A null dx, of a branch whose gradient is dresidual, is not written.
  // total may be y itself where their dtypes are the same.
  void (*add_layer_norm_forward)(const void* x, const void* residual, const void* weight,
                                 const void* bias, void* y, void* total, float* mean, float* rstd,
                                 const int64_t* seed, const float* row_scale, int64_t M, int64_t N,
                                 float eps, double dropout_p, int64_t threshold,
                                 float weight_offset, int dtype, int residual_dtype,
                                 int parameter_dtype);
  void (*add_layer_norm_backward)(const void* dy, const void* dsum, const void* total,
                                  const void* weight, const float* mean, const float* rstd,
                                  void* dx, void* dresidual, void* dweight, void* dbias,
                                  const int64_t* seed, const float* row_scale, int64_t M, int64_t N,
                                  double dropout_p, int64_t threshold, float weight_offset,
                                  int dtype, int residual_dtype, int parameter_dtype);

  // add_rms_norm.cpp: as add_layer_norm.cpp
  void (*add_rms_norm_forward)(const void* x, const void* residual, const void* weight, void* y,
                               void* total, float* rstd, const int64_t* seed,
                               const float* row_scale, int64_t M, int64_t N, float eps,
                               double dropout_p, int64_t threshold, float weight_offset, int dtype,
                               int residual_dtype, int parameter_dtype);
  void (*add_rms_norm_backward)(const void* dy, const void* dsum, const void* total,
                                const void* weight, const float* rstd, void* dx, void* dresidual,
                                void* dweight, const int64_t* seed, const float* row_scale,
                                int64_t M, int64_t N, double dropout_p, int64_t threshold,
                                float weight_offset, int dtype, int residual_dtype,
                                int parameter_dtype);

  // group_norm.cpp: x, y (samples, groups, channels, S); weight, bias (groups * channels,); mean,
  // rstd (samples, groups)
  void (*group_norm_forward)(const void* x, const void* weight, const void* bias, void* y,
                             float* mean, float* rstd, int64_t samples, int64_t groups,
                             int64_t channels, int64_t S, float eps, int dtype,
                             int parameter_dtype);
  void (*group_norm_backward)(const void* dy, const void* x, const void* weight, const float* mean,
                              const float* rstd, void* dx, void* dweight, void* dbias,
                              int64_t samples, int64_t groups, int64_t channels, int64_t S,
                              int dtype, int parameter_dtype);

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

  // activation.cpp: x, y (M, N); bias (N,) in bias_dtype. Without a bias only M * N matters. y may
  // be x itself.
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

  // embedding.cpp: lookups is struct Lookups there, as integers; y, dy (M, N); weight, bias (N,) in
  // parameter_dtype; null mean and rstd (M,) stand for no norm, a null seed for no dropout. The
  // position and segment tables and dsum (M, N) are in wide_dtype: dtype or float32. dtable
  // (count, N) starts as zeros.
  void (*embedding_forward)(const int64_t* lookups, const void* weight, const void* bias, void* y,
                            float* mean, float* rstd, const int64_t* seed, int64_t M, int64_t N,
                            float eps, double dropout_p, int64_t threshold, int dtype,
                            int wide_dtype, int parameter_dtype);
  void (*embedding_backward)(const void* dy, const int64_t* lookups, const void* weight,
                             const float* mean, const float* rstd, void* dsum, void* dweight,
                             void* dbias, const int64_t* seed, int64_t M, int64_t N,
                             double dropout_p, int64_t threshold, int dtype, int wide_dtype,
                             int parameter_dtype);
  void (*embedding_table_backward)(const void* dsum, const int64_t* ids, void* dtable, int64_t M,
                                   int64_t N, int64_t count, int64_t padding_idx, int dtype,
                                   int table_dtype);

  // rotary.cpp: problem is struct Problem there, as integers; the last dimension of query and key
  // is contiguous, turned_query and turned_key (B, T, H, D) have no gaps; cos, sin (table_rows,
  // half). Null positions count from problem's offset. sign is 1, or -1 for backward.
  void (*rotary)(const void* query, const void* key, void* turned_query, void* turned_key,
                 const float* cos, const float* sin, const int64_t* positions,
                 const int64_t* problem, int interleaved, float sign, int dtype);

  // cross_entropy.cpp: x (M, V); target (M,) labels where target_dtype is -1, or (M, V)
  // probabilities of that dtype; weight (V,) may be null; losses (M,), stats (3, M), total and
  // divisor (1,). dy (M,), or one element with dy_stride 0; dlse (M,) may be null. A null divisor
  // stands for 1. dx may be x itself. correct (M,), which may be null: whether argmax gives the
  // label.
  void (*cross_entropy_forward)(const void* x, const void* target, const float* weight,
                                float* losses, float* total, float* stats, float* divisor,
                                uint8_t* correct, int64_t M, int64_t V, int64_t ignore_index,
                                float label_smoothing, float z_loss, float softcap, int is_mean,
                                int dtype, int target_dtype);
  void (*cross_entropy_backward)(const float* dy, int64_t dy_stride, const float* dlse,
                                 const void* x, const void* target, const float* weight,
                                 const float* stats, const float* divisor, void* dx, int64_t M,
                                 int64_t V, int64_t ignore_index, float label_smoothing,
                                 float z_loss, float softcap, int dtype, int target_dtype);

  // softmax.cpp: x, y, kept (M, N); sinks (heads,), shares (M,). problem is struct SoftmaxProblem
  // in cpu/softmax.h, as integers. With a seed, kept is y before dropout; backward takes that for
  // y.
  void (*softmax_forward)(const void* x, const void* mask, const void* sinks, void* y, void* kept,
                          float* shares, const int64_t* seed, const int64_t* problem, float scale,
                          double dropout_p);
  void (*softmax_backward)(const void* dy, const void* y, const float* shares, void* dx,
                           float* dsinks, const int64_t* seed, const int64_t* problem, float scale,
                           double dropout_p);

  // softmax_columns.cpp: x, y, kept (M, N, inner), over N
  void (*softmax_columns_forward)(const void* x, const void* mask, void* y, void* kept,
                                  const int64_t* seed, const int64_t* problem, float scale,
                                  double dropout_p);
  void (*softmax_columns_backward)(const void* dy, const void* y, void* dx, const int64_t* seed,
                                   const int64_t* problem, float scale, double dropout_p);

  // grad_norm.cpp: total (1,) of the tensors in a table of cpu/tensor_lists.h
  void (*sum_of_squares)(const int64_t* table, int64_t count, double* total, int dtype);

  // adamw.cpp, lamb.cpp: write the tensors in the table, whose rows are enum AdamRow in cpu/adam.h;
  // clip as struct Clip in cpu/tensor_lists.h, null for none
  void (*adamw)(const int64_t* table, int64_t count, const float* clip, double lr, double beta1,
                double beta2, double eps, double weight_decay, int amsgrad, int maximize,
                int dtype);
  void (*lamb)(const int64_t* table, int64_t count, const float* clip, double lr, double beta1,
               double beta2, double eps, double weight_decay, int maximize, int dtype);

  // muon.cpp: the table's rows are enum Row there, of which one is each tensor's place in
  // directions. muon_direction writes momenta and directions, muon_apply takes these
  // orthogonalized; ratios are of each tensor's learning rate to lr
  void (*muon_direction)(const int64_t* table, int64_t count, const float* clip, void* directions,
                         double momentum, int nesterov, double eps, int dtype, int direction_dtype);
  void (*muon_apply)(const int64_t* table, int64_t count, const void* directions,
                     const double* ratios, double lr, double weight_decay, int dtype,
                     int direction_dtype);
};

}  // namespace slimkernels
