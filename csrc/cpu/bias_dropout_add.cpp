// y = residual + dropout(x + bias), the bias and the residual optional.
//
// Tiling   Threads split the rows, in backward chunks of rows, whose dbias are added up in order.
// Traffic  Forward reads two elements and writes one; backward reads and writes one, or only reads
//          it where nothing was dropped: dx is then dy. Dropout stores nothing: backward draws its
//          bits again.
// Numerics float32 up to y, which is rounded once.
#include "kernels.h"
#include "parallel.h"
#include "random.h"
#include "rows.h"
#include "vec.h"

namespace slimkernels::SLIM_ISA {
namespace {

constexpr int64_t kWork = 2;  // the random bits, in elements of layer_norm

template <bool kDropout, typename T>
void forward(const T* x, const float* bias, const T* residual, T* y, int64_t M, int64_t N,
             const Dropout& dropout) {
  for_rows(M, kWork * N, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const RowBits bits(dropout.seed, row);
      for_vectors(N, [&](int64_t i, auto n) {
        vfloat v = load(x + row * N + i, n);
        if (bias) v += load(bias + i, n);
        if constexpr (kDropout) v = dropout.apply(v, bits, i);
        if (residual) v += load(residual + row * N + i, n);
        store(y + row * N + i, v, n);
      });
    }
  });
}

template <bool kDropout, typename T>
void backward(const T* dy, T* dx, float* dbias, int64_t M, int64_t N, const Dropout& dropout) {
  for_chunks(M, kWork * N, [&](int64_t chunk, int64_t begin, int64_t end) {
    float* sums = dbias ? dbias + chunk * N : nullptr;
    for (int64_t row = begin; row < end; ++row) {
      const RowBits bits(dropout.seed, row);
      for_vectors(N, [&](int64_t i, auto n) {
        vfloat v = load(dy + row * N + i, n);
        if constexpr (kDropout) {
          v = dropout.apply(v, bits, i);
          store(dx + row * N + i, v, n);
        }
        if (sums) store(sums + i, load(sums + i, n) + v, n);
      });
    }
  });
}

}  // namespace

void bias_dropout_add_forward(const void* x, const void* bias, const void* residual, void* y,
                              const int64_t* seed, int64_t M, int64_t N, double dropout_p,
                              int64_t threshold, int dtype, int bias_dtype) {
  const Widened b(bias, N, bias_dtype);
  const Dropout dropout(seed, dropout_p, threshold);
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    (seed ? forward<true, T> : forward<false, T>)((const T*)x, b.values(), (const T*)residual,
                                                  (T*)y, M, N, dropout);
  });
}

void bias_dropout_add_backward(const void* dy, void* dx, void* dbias, const int64_t* seed,
                               int64_t M, int64_t N, double dropout_p, int64_t threshold, int dtype,
                               int bias_dtype) {
  const ChunkSums sums(dbias, chunks_for(M), N);
  const Dropout dropout(seed, dropout_p, threshold);
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    (seed ? backward<true, T> : backward<false, T>)((const T*)dy, (T*)dx, sums.values(), M, N,
                                                    dropout);
  });
  sums.write(dbias, bias_dtype);
}

}  // namespace slimkernels::SLIM_ISA
