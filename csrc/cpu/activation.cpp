// y = f(x + bias) with an optional bias: gelu, silu, relu_squared.
//
// Tiling   Without a bias the tensor is one long row, cut anywhere; with one, threads split the
//          rows, and in backward chunks of rows, whose dbias are added up in order.
// Traffic  Forward reads and writes each element once; backward reads two and writes one, and
//          computes the slope anew: no intermediate is stored.
// Numerics float32; curves.h has the functions.
#include "curves.h"
#include "kernels.h"
#include "parallel.h"
#include "rows.h"

namespace slimkernels::SLIM_ISA {
namespace {

template <typename Curve, typename T>
void forward(const T* x, const float* bias, T* y, int64_t M, int64_t N) {
  if (!bias) {
    for_rows(M * N, Curve::kWork, [&](int64_t begin, int64_t end) {
      for_vectors(end - begin, [&](int64_t i, auto n) {
        store(y + begin + i, value_of<Curve, T>(load(x + begin + i, n)), n);
      });
    });
    return;
  }
  for_rows(M, Curve::kWork * N, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for_vectors(N, [&](int64_t i, auto n) {
        const vfloat z = load(x + row * N + i, n) + load(bias + i, n);
        store(y + row * N + i, value_of<Curve, T>(z), n);
      });
  });
}

template <typename Curve, typename T>
void backward(const T* dy, const T* x, const float* bias, T* dx, float* dbias, int64_t M,
              int64_t N) {
  if (!bias) {
    for_rows(M * N, Curve::kWork, [&](int64_t begin, int64_t end) {
      for_vectors(end - begin, [&](int64_t i, auto n) {
        const int64_t at = begin + i;
        store(dx + at, load(dy + at, n) * Curve::at(load(x + at, n)).slope, n);
      });
    });
    return;
  }
  for_chunks(M, Curve::kWork * N, [&](int64_t chunk, int64_t begin, int64_t end) {
    float* sums = dbias + chunk * N;
    for (int64_t row = begin; row < end; ++row)
      for_vectors(N, [&](int64_t i, auto n) {
        const int64_t at = row * N + i;
        const vfloat dz = load(dy + at, n) * Curve::at(load(x + at, n) + load(bias + i, n)).slope;
        store(dx + at, dz, n);
        store(sums + i, load(sums + i, n) + dz, n);
      });
  });
}

}  // namespace

void activation_forward(const void* x, const void* bias, void* y, int64_t M, int64_t N, int curve,
                        int dtype, int bias_dtype) {
  const Widened b(bias, N, bias_dtype);
  with_curve(curve, [&](auto f) {
    with_type(dtype, [&](auto zero) {
      using T = decltype(zero);
      forward<decltype(f)>((const T*)x, b.values(), (T*)y, M, N);
    });
  });
}

void activation_backward(const void* dy, const void* x, const void* bias, void* dx, void* dbias,
                         int64_t M, int64_t N, int curve, int dtype, int bias_dtype) {
  const Widened b(bias, N, bias_dtype);
  const ChunkSums sums(dbias, chunks_for(M), N);
  with_curve(curve, [&](auto f) {
    with_type(dtype, [&](auto zero) {
      using T = decltype(zero);
      backward<decltype(f)>((const T*)dy, (const T*)x, b.values(), (T*)dx, sums.values(), M, N);
    });
  });
  sums.write(dbias, bias_dtype);
}

}  // namespace slimkernels::SLIM_ISA
