// Products of small bfloat16 matrices with float32 sums, by AMX: C = A * B or C += A * B.
//
// Tiling   B is packed into the tiles of AMX: kDepth rows of kTile columns, of which each 32 bits
//          are two neighbours along the sum. Up to two by two tiles of C stay in registers over the
//          whole sum.
// Numerics Products are exact. Each element of C is one chain of sums, two products at a time in
//          the order of the sum, whatever the tile. Denormals count as zero.
#pragma once
#include "gemm.h"
#include "parallel.h"

#if defined(__AVX512BF16__) && defined(SLIM_COMPILER_HAS_AMX)
#define SLIM_AMX
namespace slimkernels::SLIM_ISA {

inline constexpr int64_t kTile = 16, kDepth = 32, kTileElements = kTile * kDepth;

typedef uint16_t vshort2 __attribute__((vector_size(64)));

inline int64_t steps_for(int64_t depth) { return (depth + kDepth - 1) / kDepth; }
// Of a block of keys, so many that their scores with a tile of queries fit in L1.
inline constexpr int64_t kMostKeys = 256;
// Keys that products can begin and end with.
template <typename Span>
inline Span whole_steps(Span keys) {
  return {keys.begin / kDepth * kDepth, steps_for(keys.end) * kDepth};
}
inline int64_t tiles_for(int64_t columns) { return (columns + kTile - 1) / kTile; }

// The right-hand matrix: how far the next kTile columns, and the next kDepth rows, are in elements.
struct Tiles {
  const bf16* values;
  int64_t column_stride, step_stride;
};

// AMX's intrinsics may be assembler that does not tell the compiler which memory it reads or
// writes: between them and other code that shares memory with them stands this.
inline __attribute__((always_inline)) void memory_barrier(const void* memory) {
  asm volatile("" ::"r"(memory) : "memory");
}

// One thread's layout of AMX registers while it lives: sixteen rows of 64 bytes in each. The layout
// before comes back afterwards, since other libraries expect to find theirs.
class TileLayout {
 public:
  __attribute__((target("amx-tile"))) TileLayout() {
    Layout layout = {};
    layout.palette = 1;
    for (int i = 0; i < 8; ++i) layout.bytes_a_row[i] = 64, layout.rows[i] = kTile;
    _tile_storeconfig(&before_);
    memory_barrier(&layout);
    _tile_loadconfig(&layout);
  }
  TileLayout(const TileLayout&) = delete;
  __attribute__((target("amx-tile"))) ~TileLayout() {
    memory_barrier(&before_);
    _tile_loadconfig(&before_);
  }

 private:
  struct alignas(64) Layout {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes_a_row[16];
    uint8_t rows[16];
  };
  Layout before_;
};

// Registers 0 to 3 are C, 4 and 5 A, 6 and 7 B.
template <int kRows, int kColumns>
__attribute__((noinline, target("amx-tile,amx-bf16"))) void multiply_tiles(
    int64_t steps, const bf16* a, int64_t a_stride, const Tiles& b, float* c, int64_t c_stride,
    bool accumulate) {
  memory_barrier(a);
  const int64_t c_bytes = c_stride * int64_t(sizeof(float)), a_bytes = 2 * a_stride;
  float* below = c + kTile * c_stride;
  if (accumulate) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (kColumns > 1) _tile_loadd(1, c + kTile, c_bytes);
    if constexpr (kRows > 1) _tile_loadd(2, below, c_bytes);
    if constexpr (kRows > 1 && kColumns > 1) _tile_loadd(3, below + kTile, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const bf16* right = b.values;
  for (int64_t s = 0; s < steps; ++s, a += kDepth, right += b.step_stride) {
    _tile_loadd(4, a, a_bytes);
    _tile_loadd(6, right, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kColumns > 1) {
      _tile_loadd(7, right + b.column_stride, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kRows > 1) {
      _tile_loadd(5, a + kTile * a_stride, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (kRows > 1 && kColumns > 1) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (kColumns > 1) _tile_stored(1, c + kTile, c_bytes);
  if constexpr (kRows > 1) _tile_stored(2, below, c_bytes);
  if constexpr (kRows > 1 && kColumns > 1) _tile_stored(3, below + kTile, c_bytes);
  memory_barrier(c);
}

// C (rows, columns) = or += A (rows, steps * kDepth) * B. Rows, at most two tiles of them, and
// columns are rounded up to whole tiles, which A must have memory for and C and B room and values.
inline void multiply(int64_t rows, int64_t columns, int64_t steps, const bf16* a, int64_t a_stride,
                     Tiles b, float* c, int64_t c_stride, bool accumulate) {
  const bool two = rows > kTile;
  int64_t n = tiles_for(columns);
  for (; n > 1; n -= 2, b.values += 2 * b.column_stride, c += 2 * kTile)
    (two ? multiply_tiles<2, 2> : multiply_tiles<1, 2>)(steps, a, a_stride, b, c, c_stride,
                                                        accumulate);
  if (n)
    (two ? multiply_tiles<2, 1> : multiply_tiles<1, 1>)(steps, a, a_stride, b, c, c_stride,
                                                        accumulate);
}

// x (rows, columns) as A: columns padded with zeros to whole steps, rows to whole tiles.
inline void pack_left(const bf16* x, int64_t stride, int64_t rows, int64_t columns, bf16* out) {
  const int64_t width = steps_for(columns) * kDepth;
  for (int64_t row = 0; row < rows; ++row, x += stride, out += width) {
    prefetch_ahead(x, stride);
    std::memcpy(out, x, columns * sizeof *x);
    std::memset((void*)(out + columns), 0, (width - columns) * sizeof *x);
  }
  std::memset((void*)out, 0, (tiles_for(rows) * kTile - rows) * width * sizeof *x);
}

// x (rows, columns)'s transpose as A: rows, its columns, padded with zeros to `padded`, and columns
// to whole tiles.
inline void pack_left_transposed(const bf16* x, int64_t stride, int64_t rows, int64_t columns,
                                 int64_t padded, bf16* out) {
  for (int64_t row = 0; row < padded; row += kTile)
    for_vectors(columns, [&](int64_t column, auto n) {
      vfloat square[kTile];
#pragma GCC unroll 16
      for (int i = 0; i < kTile; ++i)
        square[i] = row + i < rows ? load(x + (row + i) * stride + column, n) : vfloat{};
      transpose_step<kLanes / 2>(square, EveryLane{});
      for (int i = 0; i < kTile; ++i) store(out + (column + i) * padded + row, square[i], Full{});
    });
}

// x (rows, columns)'s transpose as B, its columns, which are x's rows, padded with zeros to
// `padded`.
inline Tiles pack_right_transposed(const bf16* x, int64_t stride, int64_t rows, int64_t columns,
                                   int64_t padded, bf16* out) {
  const int64_t steps = steps_for(columns);
  bf16* tile = out;
  for (int64_t row = 0; row < padded; row += kTile)
    for (int64_t column = 0; column < columns; column += kDepth, tile += kTileElements) {
      const int64_t count = clamp(columns - column, 0, kDepth);
      const __mmask32 real = uint32_t((uint64_t(1) << count) - 1);
      vfloat square[kTile];
#pragma GCC unroll 16
      for (int i = 0; i < kTile; ++i) {
        const bf16* from = x + (row + i) * stride + column;
        prefetch_ahead(from, stride);
        square[i] = row + i < rows ? (vfloat)_mm512_maskz_loadu_epi16(real, from) : vfloat{};
      }
      transpose_step<kLanes / 2>(square, EveryLane{});
      for (int i = 0; i < kTile; ++i) std::memcpy(tile + i * kDepth, &square[i], sizeof square[i]);
    }
  return {out, steps * kTileElements, kTileElements};
}

// x (rows, columns) as B, rows padded with zeros to whole steps and columns to whole tiles.
inline Tiles pack_right(const bf16* x, int64_t stride, int64_t rows, int64_t columns, bf16* out) {
  const int64_t tiles = tiles_for(columns);
  for (int64_t row = 0; row < steps_for(rows) * kDepth; row += 2) {
    bf16* at = out + row / kDepth * tiles * kTileElements + row % kDepth / 2 * kDepth;
    const bf16* from = x + row * stride;
    for_vectors(columns, [&](int64_t column, auto n) {
      prefetch_ahead(from + column, stride);
      prefetch_ahead(from + stride + column, stride);
      const vuint even = row < rows ? bits_of(load(from + column, n)) : vuint{};
      const vuint odd = row + 1 < rows ? bits_of(load(from + stride + column, n)) : vuint{};
      const vuint pairs = (even >> 16) | odd;
      std::memcpy(at + column / kTile * kTileElements, &pairs, sizeof pairs);
    });
  }
  return {out, kTileElements, tiles * kTileElements};
}

// x (rows, columns) in float32 as B, rows padded with zeros to whole steps of at most `most_rows`,
// and, where `left` is not null, as A as well, which may be x's own memory.
inline Tiles pack_right_pairs(const float* x, int64_t stride, int64_t rows, int64_t columns,
                              int64_t most_rows, bf16* left, bf16* out) {
  const int64_t column_stride = steps_for(most_rows) * kTileElements;
  const int64_t left_rows = left ? tiles_for(rows) * kTile : 0;
  vshort2 even_odd;
  for (int i = 0; i < kDepth; ++i) even_odd[i] = uint16_t(i % 2 * kTile + i / 2);
  for (int64_t row = 0; row < steps_for(rows) * kDepth; row += 2) {
    const float* even = x + row * stride;
    bf16* at = out + row / kDepth * kTileElements + row % kDepth / 2 * kDepth;
    for (int64_t column = 0; column < columns; column += kTile, at += column_stride) {
      const vfloat a = row < rows ? load(even + column, Full{}) : vfloat{};
      const vfloat b = row + 1 < rows ? load(even + stride + column, Full{}) : vfloat{};
      const auto both = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
      const __m512i pairs = _mm512_permutexvar_epi16((__m512i)even_odd, both);
      std::memcpy(at, &pairs, sizeof pairs);
      if (row < left_rows) {
        bf16* row_of_left = left + row * 2 * stride + column;
        std::memcpy(row_of_left, &both, sizeof both / 2);
        std::memcpy(row_of_left + 2 * stride, (const char*)&both + sizeof both / 2,
                    sizeof both / 2);
      }
    }
  }
  return {out, column_stride, kTileElements};
}

}  // namespace slimkernels::SLIM_ISA
#endif
