// Products of small float32 matrices that are packed for it: C = A * B or C += A * B.
//
// Tiling   A tile of C of some rows and up to kPanelVectors vectors of columns stays in registers
//          over the whole sum. Its size is what hides the latency of the multiply-add (24 sums with
//          AVX-512's 32 registers, 12 with 16) with the fewest loads: of each step, one vector a
//          column and one broadcast a row. B is walked by panels as wide as a tile, so that one
//          panel serves all rows from L1 or L2.
// Numerics Each element of A * B is one chain of multiply-adds in the order of the sum, whatever
//          the tile: a row has the same bits wherever a caller cuts the rows. C is added at the
//          end, so that a sum over several calls rounds less than one long chain.
#pragma once
#include "vec.h"

namespace slimkernels::SLIM_ISA {

#if defined(__AVX512F__)
inline constexpr int kSums = 24, kPanelVectors = 4;
#else
inline constexpr int kSums = 12, kPanelVectors = 2;
#endif
inline constexpr int kMaxRows = 12;
inline constexpr int64_t kChain = 64;

template <int... kLane>
struct LaneList {};
#if defined(__AVX512F__)
using EveryLane = LaneList<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>;
#elif defined(__AVX2__)
using EveryLane = LaneList<0, 1, 2, 3, 4, 5, 6, 7>;
#else
using EveryLane = LaneList<0, 1, 2, 3>;
#endif

// One load instruction: broadcast() adds to zero, which the compiler must not skip for -0.
template <int... kLane>
inline vfloat spread(float value, LaneList<kLane...>) {
  return vfloat{((void)kLane, value)...};
}

inline int64_t vectors_for(int64_t columns) { return (columns + kLanes - 1) / kLanes; }
inline int64_t padded(int64_t columns) { return vectors_for(columns) * kLanes; }

// The widest panel that cuts `columns` into equal parts: 5 vectors make panels of 3 and 2, since
// one of 4 and one of 1 would leave a tile too narrow to be fast.
inline int64_t panel_vectors(int64_t columns) {
  const int64_t vectors = vectors_for(columns);
  const int64_t panels = (vectors + kPanelVectors - 1) / kPanelVectors;
  return panels ? (vectors + panels - 1) / panels : 1;
}

// The right-hand matrix, in panels of `vectors` vectors of columns.
struct Panels {
  const float* values;
  int64_t vectors;
  int64_t row_stride, panel_stride;  // in floats

  int64_t columns() const { return vectors * kLanes; }  // of one panel
  // Without the columns before this one, with which a panel begins.
  Panels from(int64_t column) const {
    return {values + column / columns() * panel_stride, vectors, row_stride, panel_stride};
  }
};

// Rows of `stride` floats, seen as panels.
inline Panels panels_of_rows(const float* x, int64_t columns, int64_t stride) {
  const int64_t vectors = panel_vectors(columns);
  return {x, vectors, stride, vectors * kLanes};
}

// Panels that each lie in one piece, as pack_transposed writes them.
inline Panels panels_of_block(const float* x, int64_t rows, int64_t columns) {
  const int64_t vectors = panel_vectors(columns);
  return {x, vectors, vectors * kLanes, rows * vectors * kLanes};
}

// kTransposed: a points to A's transpose, so that a step of the sum is a row of it.
template <int kRows, int kVectors, bool kTransposed>
__attribute__((noinline)) void gemm_tile(const float* a, int64_t a_stride, const float* b,
                                         int64_t b_stride, float* c, int64_t c_stride, int64_t K,
                                         bool accumulate) {
  vfloat sums[kRows][kVectors] = {};
  for (int64_t k = 0; k < K; ++k) {
    vfloat right[kVectors];
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) right[n] = load(b + k * b_stride + n * kLanes, Full{});
#pragma GCC unroll 12
    for (int m = 0; m < kRows; ++m) {
      const float* element = kTransposed ? a + k * a_stride + m : a + m * a_stride + k;
      const vfloat left = spread(*element, EveryLane{});
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n) sums[m][n] += left * right[n];
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) {
      float* out = c + m * c_stride + n * kLanes;
      store(out, accumulate ? load(out, Full{}) + sums[m][n] : sums[m][n], Full{});
    }
}

// The tile of exactly `rows` rows: the switch that turns run-time sizes into template arguments.
template <int kRows, int kVectors, bool kTransposed, typename... Args>
inline void gemm_rows(int64_t rows, Args... args) {
  if constexpr (kRows > 1)
    if (rows < kRows) return gemm_rows<kRows - 1, kVectors, kTransposed>(rows, args...);
  gemm_tile<kRows, kVectors, kTransposed>(args...);
}

template <int kVectors, bool kTransposed>
inline void gemm_panel(int64_t M, int64_t vectors, const float* a, int64_t a_stride, const float* b,
                       int64_t b_stride, float* c, int64_t c_stride, int64_t K, bool accumulate) {
  if constexpr (kVectors > 1)
    if (vectors < kVectors)
      return gemm_panel<kVectors - 1, kTransposed>(M, vectors, a, a_stride, b, b_stride, c,
                                                   c_stride, K, accumulate);
  constexpr int kRows = kSums / kVectors < kMaxRows ? kSums / kVectors : kMaxRows;
  for (int64_t m = 0; m < M; m += kRows)
    gemm_rows<kRows, kVectors, kTransposed>(M - m < kRows ? M - m : kRows,
                                            a + (kTransposed ? m : m * a_stride), a_stride, b,
                                            b_stride, c + m * c_stride, c_stride, K, accumulate);
}

// C (M, N) = or += A (M, K) * B (K, N). N is rounded up to whole vectors, which C must have room
// for and B must have values for.
template <bool kTransposed = false>
void gemm(int64_t M, int64_t N, int64_t K, const float* a, int64_t a_stride, const Panels& b,
          float* c, int64_t c_stride, bool accumulate) {
  const int64_t vectors = vectors_for(N);
  for (int64_t k = 0; k == 0 || k < K; k += kChain) {
    const float* panel = b.values + k * b.row_stride;
    for (int64_t v = 0; v < vectors; v += b.vectors, panel += b.panel_stride)
      gemm_panel<kPanelVectors, kTransposed>(M, vectors - v < b.vectors ? vectors - v : b.vectors,
                                             a + (kTransposed ? k * a_stride : k), a_stride, panel,
                                             b.row_stride, c + v * kLanes, c_stride,
                                             K - k < kChain ? K - k : kChain, accumulate || k > 0);
  }
}

template <int... kLane>
inline vfloat shuffle(vfloat a, vfloat b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, kLane...);
#else
  return __builtin_shuffle(a, b, vint{kLane...});
#endif
}

// Swaps the off-diagonal halves of all squares of 2 * kWidth lanes: log2(kLanes) such steps
// transpose a square of kLanes vectors.
template <int kWidth, int... kLane>
inline __attribute__((always_inline)) void transpose_step(vfloat* rows, LaneList<kLane...> lanes) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & kWidth) continue;
    const vfloat a = rows[i], b = rows[i + kWidth];
    rows[i] = shuffle<(kLane & kWidth ? kLanes + kLane - kWidth : kLane)...>(a, b);
    rows[i + kWidth] = shuffle<(kLane & kWidth ? kLanes + kLane : kLane + kWidth)...>(a, b);
  }
  if constexpr (kWidth > 1) transpose_step<kWidth / 2>(rows, lanes);
}

// Rows of a head lie a token apart, which no hardware prefetcher follows across pages: without this
// a short sequence spends a fifth of its time waiting for them. Past the end it fetches in vain.
template <typename T>
inline void prefetch_ahead(const T* x, int64_t stride) {
  __builtin_prefetch(x + 16 * stride);
}

// Room for panels_of_block(_, rows, columns), whose last panel takes a full one's place.
inline int64_t block_floats(int64_t rows, int64_t columns) {
  const int64_t width = panel_vectors(columns) * kLanes;
  return (columns + width - 1) / width * width * rows;
}

// x (rows, columns) of any storage type as float32 panels of its transpose (columns, rows), for
// panels_of_block(out, columns, rows). The last vector of columns is filled up with zeros.
template <typename T>
void pack_transposed(const T* x, int64_t stride, int64_t rows, int64_t columns, float* out) {
  const int64_t width = panel_vectors(rows) * kLanes;
  for (int64_t row = 0; row < rows; row += kLanes) {
    float* panel = out + row / width * (columns * width) + row % width;
    for_vectors(columns, [&](int64_t column, auto n) {
      vfloat square[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        prefetch_ahead(x + (row + i) * stride + column, stride);
        square[i] = row + i < rows ? load(x + (row + i) * stride + column, n) : vfloat{};
      }
      transpose_step<kLanes / 2>(square, EveryLane{});
      for (int i = 0; i < n.count; ++i) store(panel + (column + i) * width, square[i], Full{});
    });
  }
}

// x (rows, columns) as float32 times scale, rows padded with zeros to whole vectors.
template <typename T>
void pack_rows(const T* x, int64_t stride, int64_t rows, int64_t columns, float scale, float* out) {
  const int64_t width = padded(columns);
  for (int64_t row = 0; row < rows; ++row)
    for_vectors(columns, [&](int64_t i, auto n) {
      prefetch_ahead(x + row * stride + i, stride);
      store(out + row * width + i, load(x + row * stride + i, n) * scale, Full{});
    });
}

}  // namespace slimkernels::SLIM_ISA
