// The sum of squares of many tensors: one part of a gradient's norm.
//
// Numerics Squares are added in float32 lanes over a chunk, chunks in double and in order: the same
//          bits for any number of threads.
#include "kernels.h"
#include "memory.h"
#include "tensor_lists.h"

namespace slimkernels::SLIM_ISA {

namespace {
enum Row { kGrad, kSize };
}  // namespace

void sum_of_squares(const int64_t* table, int64_t count, double* total, int dtype) {
  const TensorLists lists{table, count, kSize};
  const int64_t chunks = chunks_of(lists);
  Owned<float> sums(chunks);
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    for_tensor_chunks(lists, [&](int64_t t, int64_t begin, int64_t end, int64_t chunk) {
      const T* grad = lists.at<T>(kGrad, t) + begin;
      sums[chunk] = sum_over(end - begin, [&](int64_t i, auto n) {
        const vfloat g = load(grad + i, n);
        return g * g;
      });
    });
  });
  *total = 0.;
  for (int64_t i = 0; i < chunks; ++i) *total += sums[i];
}

}  // namespace slimkernels::SLIM_ISA
