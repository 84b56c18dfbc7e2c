// Rows normalised, y = norm(x) * weight + bias, and their gradients: layer_norm.cpp with
// Norm = Centered, rms_norm.cpp with Norm = Scaled (rows.h).
#pragma once
#include "parallel.h"
#include "rows.h"
#include "vec.h"

namespace slimkernels::SLIM_ISA {

template <typename Norm, typename T>
void normalize_rows(const T* x, const float* weight, const float* bias, T* y, float* mean,
                    float* rstd, int64_t M, int64_t N, float eps) {
  for_rows(M, N, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* values = x + row * N;
      const float total =
          sum_over(N, [&](int64_t i, auto n) { return Norm::first(load(values + i, n)); });
      const Norm norm = Norm::of(total, values, N, eps);
      normalize(values, weight, bias, y + row * N, norm, N);
      norm.save(mean, rstd, row);
    }
  });
}

// Rows this long are shared by their columns in backward: there may be fewer of them than threads,
// and partial sums of dweight would be as large as they are. The first cache holds no such row.
inline constexpr int64_t kLongRow = 1 << 14, kColumns = 1 << 12;

inline int64_t partial_sums_of(int64_t M, int64_t N) { return N < kLongRow ? chunks_for(M) : 1; }

// What stores the vectors of dx where they belong.
template <typename T>
inline auto store_rows(T* dx, int64_t N) {
  return [=](int64_t row) {
    return [=](int64_t i, vfloat v, auto n) { store(dx + row * N + i, v, n); };
  };
}

// store_of(row) makes what takes a row's dx: normalize_backward in rows.h. dweight and dbias have
// partial_sums_of(M, N) rows, or are null.
template <typename Norm, typename T, typename X, typename StoreOf>
void rows_backward(const T* dy, const X* x, const float* weight, const float* mean,
                   const float* rstd, float* dweight, float* dbias, int64_t M, int64_t N,
                   StoreOf store_of) {
  const auto sums = [&](int64_t row) {
    return means_of(dy + row * N, x + row * N, weight, Norm::saved(mean, rstd, row), N);
  };
  const auto apply = [&](int64_t row, Pair means, int64_t chunk, int64_t begin, int64_t end) {
    normalize_backward(dy + row * N, x + row * N, weight, Norm::saved(mean, rstd, row), means,
                       dweight ? dweight + chunk * N : nullptr, dbias ? dbias + chunk * N : nullptr,
                       begin, end, store_of(row));
  };
  if (N < kLongRow) {
    for_chunks(M, 2 * N, [&](int64_t chunk, int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) apply(row, sums(row), chunk, 0, N);
    });
    return;
  }
  const Owned<Pair> of_row(M);
  for_rows(M, 2 * N, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) of_row[row] = sums(row);
  });
  for_rows((N + kColumns - 1) / kColumns, 2 * M * kColumns, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block)
      for (int64_t row = 0; row < M; ++row)
        apply(row, of_row[row], 0, block * kColumns, clamp((block + 1) * kColumns, 0, N));
  });
}

}  // namespace slimkernels::SLIM_ISA
