// Products of a few queries with many keys, and of their probabilities with values, read in place.
//
// Tiling   Scores: kLanes dot products at a time, of 1, 2 or 4 queries, whose lanes are summed at
//          the end. Values: sums of 1, 2 or 4 queries and several vectors stay in registers over
//          kChain keys. The _by_products functions do the same for more queries, through gemm.h.
// Numerics The order of each sum depends on the widths alone, not on the tile it is computed in.
#pragma once
#include "gemm.h"
#include "parallel.h"

namespace slimkernels::SLIM_ISA {

// A constant as a type, which chooses a template's instance inside a function.
template <int kValue>
struct Count {
  static constexpr int value = kValue;
};

// How far ahead to fetch, in elements: 4 KiB, which memory takes as long for as the products of
// what lies in between, but at least 8 rows.
template <typename T>
inline int64_t fetch_ahead(int64_t stride) {
  const int64_t bytes = 4096 / int64_t(sizeof(T));
  return clamp(bytes, 8 * stride, bytes + 8 * stride);
}

// Vector i becomes, in lane i of the first, the sum of its lanes. Each sum is the same tree.
template <int kWidth, int... kLane>
inline __attribute__((always_inline)) void sum_step(vfloat* sums, LaneList<kLane...> lanes) {
#pragma GCC unroll 8
  for (int i = 0; i < kWidth; ++i) {
    const vfloat a = sums[i], b = sums[i + kWidth];
    sums[i] = shuffle<(kLane & kWidth ? kLanes + kLane - kWidth : kLane)...>(a, b) +
              shuffle<(kLane & kWidth ? kLanes + kLane : kLane + kWidth)...>(a, b);
  }
  if constexpr (kWidth > 1) sum_step<kWidth / 2>(sums, lanes);
}

// Two vectors of x at once, and a fetch of what lies `ahead`. Of bfloat16 they are the elements at
// even and at odd places, which take one instruction each to widen: neighbours would take two.
inline void load_pair(const float* x, int64_t ahead, vfloat* pair) {
  for (int n = 0; n < 2; ++n) {
    __builtin_prefetch(x + n * kLanes + ahead);
    pair[n] = load(x + n * kLanes, Full{});
  }
}
inline void load_pair(const bf16* x, int64_t ahead, vfloat* pair) {
  vuint two;
  std::memcpy(&two, x, sizeof two);
  __builtin_prefetch(x + ahead);
  pair[0] = float_of(two << 16);
  pair[1] = float_of(two & 0xFFFF0000u);
}

// A row's elements in the order of load_pair(), and back.
inline void separate(float* x, int64_t n) {
  float pair[2 * kLanes];
  for (; n >= 2 * kLanes; n -= 2 * kLanes, x += 2 * kLanes) {
    std::memcpy(pair, x, sizeof pair);
    for (int i = 0; i < 2 * kLanes; ++i) x[i % 2 * kLanes + i / 2] = pair[i];
  }
}
inline void join(float* x, int64_t n) {
  float pair[2 * kLanes];
  for (; n >= 2 * kLanes; n -= 2 * kLanes, x += 2 * kLanes) {
    std::memcpy(pair, x, sizeof pair);
    for (int i = 0; i < 2 * kLanes; ++i) x[i] = pair[i % 2 * kLanes + i / 2];
  }
}

// Products of kRows queries with kLanes / kRows keys; past `keys` the last one stands in.
template <int kRows, typename T>
inline void score_tile(const float* q, int64_t width, const T* key, int64_t stride, int64_t D,
                       int64_t keys, float* scores, int64_t score_stride) {
  constexpr int kKeys = kLanes / kRows, kBatch = kKeys < 8 ? kKeys : 8;
  const int64_t ahead = fetch_ahead<T>(stride);
  vfloat sums[kLanes] = {};
#pragma GCC unroll 2
  for (int first = 0; first < kKeys; first += kBatch) {
    const T* rows[kBatch];
#pragma GCC unroll 8
    for (int j = 0; j < kBatch; ++j) rows[j] = key + clamp(first + j, 0, keys - 1) * stride;
    int64_t d = 0;
    for (; d + 2 * kLanes <= D; d += 2 * kLanes) {
      vfloat left[kRows][2];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r)
        for (int n = 0; n < 2; ++n) left[r][n] = load(q + r * width + d + n * kLanes, Full{});
#pragma GCC unroll 8
      for (int j = 0; j < kBatch; ++j) {
        vfloat right[2];
        load_pair(rows[j] + d, ahead, right);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r)
          for (int n = 0; n < 2; ++n) sums[r * kKeys + first + j] += left[r][n] * right[n];
      }
    }
    for_vectors(D - d, [&](int64_t i, auto n) {
#pragma GCC unroll 8
      for (int j = 0; j < kBatch; ++j) {
        const vfloat right = load(rows[j] + d + i, n);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r)
          sums[r * kKeys + first + j] += load(q + r * width + d + i, Full{}) * right;
      }
    });
  }
  sum_step<kLanes / 2>(sums, EveryLane{});
  for (int r = 0; r < kRows; ++r)
    std::memcpy(scores + r * score_stride, (const float*)&sums[0] + r * kKeys,
                kKeys * sizeof(float));
}

// scores (rows, keys) = q (rows, D) @ key^T (D, keys), q in the order of load_pair(). Written up to
// whole vectors of keys.
template <typename T>
void score_directly(const float* q, int64_t rows, const T* key, int64_t stride, int64_t D,
                    int64_t keys, float* scores, int64_t score_stride) {
  const int64_t width = padded(D);
  const auto tile = [&](auto kRows, int64_t r, int64_t first) {
    constexpr int kCount = decltype(kRows)::value, kKeys = kLanes / kCount;
    for (int64_t j = first; j < first + kLanes && j < keys; j += kKeys)
      score_tile<kCount>(q + r * width, width, key + j * stride, stride, D, keys - j,
                         scores + r * score_stride + j, score_stride);
  };
  for (int64_t first = 0; first < keys; first += kLanes) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) tile(Count<4>{}, r, first);
    for (; r + 2 <= rows; r += 2) tile(Count<2>{}, r, first);
    if (r < rows) tile(Count<1>{}, r, first);
  }
}

// y (kRows, kVectors vectors) += p (kRows, keys) @ value (keys, ...), where there are several
// vectors in the order of load_pair().
template <int kRows, int kVectors, typename T, typename Lanes>
inline void weigh_tile(const float* p, int64_t p_stride, const T* value, int64_t stride,
                       int64_t keys, Lanes lanes, float* y, int64_t width) {
  const int64_t ahead = fetch_ahead<T>(stride);
  vfloat sums[kRows][kVectors] = {};
  for (int64_t j = 0; j < keys; ++j, value += stride) {
    vfloat right[kVectors];
    if constexpr (kVectors > 1)
      for (int n = 0; n < kVectors; n += 2) load_pair(value + n * kLanes, ahead, right + n);
    else
      right[0] = load(value, lanes);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const vfloat left = spread(p[r * p_stride + j], EveryLane{});
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n) sums[r][n] += left * right[n];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) {
      float* out = y + r * width + n * kLanes;
      store(out, load(out, Full{}) + sums[r][n], Full{});
    }
}

// y (rows, Dv) += p (rows, keys) @ value (keys, Dv), in chains of kChain keys as in gemm.h.
template <typename T>
void weigh_directly(const float* p, int64_t p_stride, int64_t rows, const T* value, int64_t stride,
                    int64_t Dv, int64_t keys, float* y) {
  const int64_t width = padded(Dv);
  for (int64_t j = 0; j < keys; j += kChain) {
    const int64_t count = clamp(keys - j, 0, kChain);
    const auto columns = [&](auto kVectors, int64_t d, auto lanes) {
      constexpr int kCount = decltype(kVectors)::value;
      const T* v = value + j * stride + d;
      int64_t r = 0;
      const auto tile = [&](auto kRows) {
        constexpr int kTile = decltype(kRows)::value;
        for (; r + kTile <= rows; r += kTile)
          weigh_tile<kTile, kCount>(p + r * p_stride + j, p_stride, v, stride, count, lanes,
                                    y + r * width + d, width);
      };
      tile(Count<4>{});
      tile(Count<2>{});
      tile(Count<1>{});
    };
    int64_t d = 0;
    for (; d + kPanelVectors * kLanes <= Dv; d += kPanelVectors * kLanes)
      columns(Count<kPanelVectors>{}, d, Full{});
    if (d + 2 * kLanes <= Dv) {
      columns(Count<2>{}, d, Full{});
      d += 2 * kLanes;
    }
    for (; d + kLanes <= Dv; d += kLanes) columns(Count<1>{}, d, Full{});
    if (d < Dv) columns(Count<1>{}, d, Part{int(Dv - d)});
  }
}

// out (columns, rows) = the transpose of x (rows, columns), both rounded up to whole vectors.
inline void transpose(const float* x, int64_t stride, int64_t rows, int64_t columns, float* out,
                      int64_t out_stride) {
  for (int64_t row = 0; row < rows; row += kLanes)
    for (int64_t column = 0; column < columns; column += kLanes) {
      vfloat square[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) square[i] = load(x + (row + i) * stride + column, Full{});
      transpose_step<kLanes / 2>(square, EveryLane{});
      for (int i = 0; i < kLanes && column + i < columns; ++i)
        store(out + (column + i) * out_stride + row, square[i], Full{});
    }
}

// score_directly() for many rows: key @ q^T, kChain keys at a time. q_panels is q^T, packed.
template <typename T>
void score_by_products(const Panels& q_panels, int64_t rows, const T* key, int64_t stride,
                       int64_t D, int64_t keys, float* scores, int64_t score_stride, float* some,
                       float* products) {
  for (int64_t j = 0; j < keys; j += kChain) {
    const int64_t count = clamp(keys - j, 0, kChain);
    pack_rows(key + j * stride, stride, count, D, 1.f, some);
    gemm(count, rows, D, some, padded(D), q_panels, products, padded(rows), false);
    transpose(products, padded(rows), count, rows, scores + j, score_stride);
  }
}

// weigh_directly() for many rows.
template <typename T>
void weigh_by_products(const float* p, int64_t p_stride, int64_t rows, const T* value,
                       int64_t stride, int64_t Dv, int64_t keys, float* y, float* some) {
  for (int64_t j = 0; j < keys; j += kChain) {
    const int64_t count = clamp(keys - j, 0, kChain);
    pack_rows(value + j * stride, stride, count, Dv, 1.f, some);
    gemm(rows, padded(Dv), count, p + j, p_stride, panels_of_rows(some, padded(Dv), padded(Dv)), y,
         padded(Dv), j > 0);
  }
}

}  // namespace slimkernels::SLIM_ISA
