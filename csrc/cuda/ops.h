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
// With a bias, partials (parts, N) and dbias (N,) in bias_dtype.
void activation_backward(const void* dy, const void* x, const void* bias, void* dx, void* dbias,
                         float* partials, int64_t parts, int64_t M, int64_t N, int curve, int dtype,
                         int bias_dtype, int device, void* stream);
// Into how many parts activation_backward's rows go.
int64_t activation_parts(int64_t M, int64_t N, int device);

// cross_entropy.cu: x (M, V), labels (M,), weight (V,) or null, stats (3, M), correct (M,) of bool
// or null. losses (M,); total, unless it is null, is their sum or mean, divisor what a mean divides
// by.
void cross_entropy_forward(const void* x, const int64_t* target, const float* weight, float* losses,
                           float* total, float* stats, float* divisor, void* correct, int64_t M,
                           int64_t V, int64_t ignore_index, float smoothing, float z_loss,
                           float softcap, int is_mean, int dtype, int device, void* stream);
// dy (M,) if per_row, else one number; dlse (M,) or null; divisor null unless it is a mean.
void cross_entropy_backward(const float* dy, const float* dlse, const void* x,
                            const int64_t* target, const float* weight, float* stats,
                            const float* divisor, void* dx, int64_t M, int64_t V,
                            int64_t ignore_index, float smoothing, float z_loss, float softcap,
                            int per_row, int dtype, int device, void* stream);

// layer_norm.cu, rms_norm.cu (kRms: no mean, no bias). y = norm(total), total = residual +
// row_scale * dropout(x); a null residual means that total is x, and is not written. x, y are in
// dtype, residual, total, dsum and dresidual in residual_dtype, weight, bias (N,) in their own:
// dtype or float32. mean, rstd, row_scale (M,). weight_offset is added to the weight. A null seed
// means no dropout, of which bits below threshold drop, and dropout_scale multiplies the rest.
template <bool kRms>
void norm_forward(const void* x, const void* residual, const void* weight, const void* bias,
                  void* y, void* total, float* mean, float* rstd, const int64_t* seed,
                  const float* row_scale, int64_t M, int64_t N, float eps, float weight_offset,
                  int64_t threshold, float dropout_scale, int dtype, int residual_dtype,
                  int weight_dtype, int bias_dtype, int device, void* stream);
// dsum is null where nothing else flows into total, dx where it is dresidual, dweight and dbias
// where not wanted. partials: for each of these two that is, (programs, N).
template <bool kRms>
void norm_backward(const void* dy, const void* dsum, const void* total, const void* weight,
                   const float* mean, const float* rstd, void* dx, void* dresidual, void* dweight,
                   void* dbias, float* partials, int64_t programs, const int64_t* seed,
                   const float* row_scale, int64_t M, int64_t N, float weight_offset,
                   int64_t threshold, float dropout_scale, int dtype, int residual_dtype,
                   int weight_dtype, int bias_dtype, int device, void* stream);
// The teams of threads that norm_backward's rows of `dtype` are shared among.
int64_t norm_programs(int64_t M, int64_t N, int dtype, int device);

// softmax.cu: x, y (M, N); mask and sinks or null; shares (M,), what the sinks are of their rows.
// problem: struct SoftmaxProblem.
void softmax_forward(const void* x, const void* mask, const void* sinks, void* y, float* shares,
                     const int64_t* problem, float scale, int dtype, int device, void* stream);
// dx = scale * y * (dy - dot), products = -shares * dot, dot = sum(dy * y); shares (M,) or null.
void softmax_backward(const void* dy, const void* y, const float* shares, void* dx, float* products,
                      int64_t M, int64_t N, float scale, int dtype, int device, void* stream);

// attention_sm90.cu: query (B, H, Tq, D), key (B, Hkv, Tk, D), value (B, Hkv, Tk, Dv), float16 or
// bfloat16, D and Dv multiples of 8 up to 256, scale above 0, softcap 0 for none. Strides in
// elements, multiples of 8, as are addresses of 16 bytes; y and lse (2, B, H, Tq) have no gaps.
// With cu_seqlens, which may be null as may the three after it, B sequences lie in (Tq, H, D) and
// (Tk, Hkv, D), and lse is (2, H, Tq). left, right: -1 for no limit.
void attention_forward(const void* query, const void* key, const void* value, void* y, float* lse,
                       const int* cu_seqlens_q, const int* cu_seqlens_k, const int* key_lengths,
                       const int* causal_offsets, int64_t B, int64_t H, int64_t Hkv, int64_t Tq,
                       int64_t Tk, int64_t D, int64_t Dv, int64_t q_batch, int64_t q_head,
                       int64_t q_token, int64_t k_batch, int64_t k_head, int64_t k_token,
                       int64_t v_batch, int64_t v_head, int64_t v_token, int64_t left,
                       int64_t right, int64_t offset, float scale, float softcap, int dtype,
                       int device, void* stream);

// attention_sm90_backward.cu: the gradients, of the same call, scale and query as forward took
// them. dy (B, H, Tq, Dv), y and lse forward's, dlse (B, H, Tq) or null, dq, dk and dv without
// gaps. dq, or dk and dv, are null if not wanted. dq_scale: scale, and the sign that went into
// query. room: attention_backward_bytes(), from a boundary of 16 bytes on, wants_all: neither is
// null.
int64_t attention_backward_bytes(int64_t B, int64_t H, int64_t Tq, int64_t D, int64_t Dv,
                                 bool is_ragged, bool wants_all);
void attention_backward(const void* query, const void* key, const void* value, const void* dy,
                        const void* y, const float* lse, const float* dlse, void* room, void* dq,
                        void* dk, void* dv, const int* cu_seqlens_q, const int* cu_seqlens_k,
                        const int* key_lengths, const int* causal_offsets, int64_t B, int64_t H,
                        int64_t Hkv, int64_t Tq, int64_t Tk, int64_t D, int64_t Dv, int64_t q_batch,
                        int64_t q_head, int64_t q_token, int64_t k_batch, int64_t k_head,
                        int64_t k_token, int64_t v_batch, int64_t v_head, int64_t v_token,
                        int64_t dy_batch, int64_t dy_head, int64_t dy_token, int64_t left,
                        int64_t right, int64_t offset, float scale, float dq_scale, float softcap,
                        int dtype, int device, void* stream);

}  // namespace slimkernels
