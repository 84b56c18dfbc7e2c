// GELU with an optional bias: y = z Phi(z), z = x + bias; Phi exact, or logistic for "tanh".
//
// Tiling   Without a bias the tensor is one long row, cut anywhere; with one, threads split the
//          rows, and in backward chunks of rows, whose dbias are added up in order.
// Traffic  Forward reads and writes each element once; backward reads two and writes one, and
//          recomputes Phi: no intermediate is stored.
// Numerics z is float32. Phi and its slope come from one exponential and keep their relative
//          accuracy where Phi is small (vec.h). (1 + tanh(u)) / 2 is the logistic function of 2 u.
#include "kernels.h"
#include "parallel.h"
#include "rows.h"
#include "vec.h"

namespace slimkernels::SLIM_ISA {
namespace {

constexpr int64_t kWork = 4;  // an element costs as much as this many of layer_norm's

constexpr float kTwice = 1.595769122f;        // 2 sqrt(2 / pi)
constexpr float kCubic = 0.044715f * kTwice;  // u = kTwice z + kCubic z^3

struct Exact {
  static vfloat value(vfloat z) { return z * normal(z).below; }
  static vfloat slope(vfloat z) {
    const Normal n = normal(z);
    return n.below + z * n.density;
  }
};

struct Tanh {
  static vfloat value(vfloat z) { return z * logistic(z * (kTwice + kCubic * z * z)).value; }
  static vfloat slope(vfloat z) {
    const vfloat square = z * z;
    const Logistic l = logistic(z * (kTwice + kCubic * square));
    return l.value + z * l.slope * (kTwice + 3.f * kCubic * square);
  }
};

template <typename Curve, typename T>
void forward(const T* x, const float* bias, T* y, int64_t M, int64_t N) {
  if (!bias) {
    for_rows(M * N, kWork, [&](int64_t begin, int64_t end) {
      for_vectors(end - begin, [&](int64_t i, auto n) {
        store(y + begin + i, Curve::value(load(x + begin + i, n)), n);
      });
    });
    return;
  }
  for_rows(M, kWork * N, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for_vectors(N, [&](int64_t i, auto n) {
        store(y + row * N + i, Curve::value(load(x + row * N + i, n) + load(bias + i, n)), n);
      });
  });
}

template <typename Curve, typename T>
void backward(const T* dy, const T* x, const float* bias, T* dx, float* dbias, int64_t M,
              int64_t N) {
  if (!bias) {
    for_rows(M * N, kWork, [&](int64_t begin, int64_t end) {
      for_vectors(end - begin, [&](int64_t i, auto n) {
        const int64_t at = begin + i;
        store(dx + at, load(dy + at, n) * Curve::slope(load(x + at, n)), n);
      });
    });
    return;
  }
  for_chunks(M, kWork * N, [&](int64_t chunk, int64_t begin, int64_t end) {
    float* sums = dbias + chunk * N;
    for (int64_t row = begin; row < end; ++row)
      for_vectors(N, [&](int64_t i, auto n) {
        const int64_t at = row * N + i;
        const vfloat dz = load(dy + at, n) * Curve::slope(load(x + at, n) + load(bias + i, n));
        store(dx + at, dz, n);
        store(sums + i, load(sums + i, n) + dz, n);
      });
  });
}

}  // namespace

void gelu_forward(const void* x, const void* bias, void* y, int64_t M, int64_t N, int is_tanh,
                  int dtype, int bias_dtype) {
  const Widened b(bias, N, bias_dtype);
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    (is_tanh ? forward<Tanh, T> : forward<Exact, T>)((const T*)x, b.values(), (T*)y, M, N);
  });
}

void gelu_backward(const void* dy, const void* x, const void* bias, void* dx, void* dbias,
                   int64_t M, int64_t N, int is_tanh, int dtype, int bias_dtype) {
  const Widened b(bias, N, bias_dtype);
  const ChunkSums sums(dbias, chunks_for(M), N);
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    (is_tanh ? backward<Tanh, T> : backward<Exact, T>)((const T*)dy, (const T*)x, b.values(),
                                                       (T*)dx, sums.values(), M, N);
  });
  sums.write(dbias, bias_dtype);
}

}  // namespace slimkernels::SLIM_ISA
