// y = f(gate) * up: swiglu, geglu.
//
// Tiling   Threads split the rows. The strides from row to row let both, and both gradients, be
//          halves of one packed tensor.
// Traffic  Forward reads two elements and writes one; backward reads three and writes two, and
//          computes f and its slope anew, from one exponential.
// Numerics float32: f(gate) is not rounded before it is multiplied.
#include "curves.h"
#include "kernels.h"
#include "parallel.h"

namespace slimkernels::SLIM_ISA {
namespace {

template <typename Curve, typename T>
void forward(const T* gate, const T* up, T* y, int64_t M, int64_t N, int64_t gate_stride,
             int64_t up_stride) {
  for_rows(M, Curve::kWork * N, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T *g = gate + row * gate_stride, *u = up + row * up_stride;
      for_vectors(N, [&](int64_t i, auto n) {
        store(y + row * N + i, value_of<Curve, T>(load(g + i, n)) * load(u + i, n), n);
      });
    }
  });
}

template <typename Curve, typename T>
void backward(const T* dy, const T* gate, const T* up, T* dgate, T* dup, int64_t M, int64_t N,
              int64_t gate_stride, int64_t up_stride, int64_t gradient_stride) {
  for_rows(M, Curve::kWork * N, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T *g = gate + row * gate_stride, *u = up + row * up_stride;
      T *dg = dgate + row * gradient_stride, *du = dup + row * gradient_stride;
      for_vectors(N, [&](int64_t i, auto n) {
        const vfloat v = load(dy + row * N + i, n);
        const Point point = Curve::at(load(g + i, n));
        store(dg + i, v * load(u + i, n) * point.slope, n);
        store(du + i, v * point.value, n);
      });
    }
  });
}

}  // namespace

void gated_forward(const void* gate, const void* up, void* y, int64_t M, int64_t N,
                   int64_t gate_stride, int64_t up_stride, int curve, int dtype) {
  with_curve(curve, [&](auto f) {
    with_type(dtype, [&](auto zero) {
      using T = decltype(zero);
      forward<decltype(f)>((const T*)gate, (const T*)up, (T*)y, M, N, gate_stride, up_stride);
    });
  });
}

void gated_backward(const void* dy, const void* gate, const void* up, void* dgate, void* dup,
                    int64_t M, int64_t N, int64_t gate_stride, int64_t up_stride,
                    int64_t gradient_stride, int curve, int dtype) {
  with_curve(curve, [&](auto f) {
    with_type(dtype, [&](auto zero) {
      using T = decltype(zero);
      backward<decltype(f)>((const T*)dy, (const T*)gate, (const T*)up, (T*)dgate, (T*)dup, M, N,
                            gate_stride, up_stride, gradient_stride);
    });
  });
}

}  // namespace slimkernels::SLIM_ISA
