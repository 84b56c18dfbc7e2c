// y = f(x + bias) with an optional bias: gelu, silu, relu_squared.
//
// Tiling   Without a bias the tensor is one long row, a pack of 16 bytes a thread. With one, a
//          block covers a tile of rows and columns, as wide as a row up to 32 packs, and walks down
//          the rows with the same columns: their bias is loaded once, and backward keeps their
//          dbias in registers. No atomics: each share of the rows leaves a row of partials.
// Traffic  Forward reads and writes each element once, backward reads two and writes one; the
//          slope is computed anew. Partials of dbias add 2 * shares * N float32.
// Numerics x + bias is float32; curves.cuh has the functions.
// Launch   grid = (columns of tiles, shares of the rows), block = (1 to 256, 256 / that).
#pragma once
#include <algorithm>

#include "common.cuh"
#include "curves.cuh"

namespace slimkernels {

constexpr int kTileThreads = 256;

// The rows, and where among them a thread begins.
struct Tile {
  int64_t M, N;
  Curve curve;
  const void* bias;  // (N,) or null
  bool is_wide;      // bias is float32 whatever x is

  template <int kVec>
  __device__ int64_t column() const {
    return (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * kVec;
  }
  __device__ int64_t first_row() const { return int64_t(blockIdx.y) * blockDim.y + threadIdx.y; }
  __device__ int64_t row_step() const { return int64_t(gridDim.y) * blockDim.y; }
  template <typename T, int kVec>
  __device__ void load_bias(float (&values)[kVec], int64_t col) const {
#pragma unroll
    for (int i = 0; i < kVec; ++i) values[i] = 0.f;
    if (!bias) return;
    if (is_wide)
      load(values, (const float*)bias + col);
    else
      load(values, (const T*)bias + col);
  }
};

template <typename T, int kVec>
__global__ void __launch_bounds__(kTileThreads)
    activation_forward_kernel(const T* __restrict__ x, T* __restrict__ y, Tile tile) {
  const int64_t col = tile.column<kVec>();
  if (col >= tile.N) return;
  float biases[kVec], values[kVec];
  tile.load_bias<T>(biases, col);
  for (int64_t row = tile.first_row(); row < tile.M; row += tile.row_step()) {
    load(values, x + row * tile.N + col);
    with_curve(tile.curve, [&](auto curve) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) values[i] = curve.at(values[i] + biases[i]).value;
    });
    store(y + row * tile.N + col, values);
  }
}

// The sums of all threads of a column, in its first one; the order is fixed.
template <int kVec>
__device__ void sum_columns(float (&sums)[kVec]) {
  SHARED_ARRAY(float, all, kVec* kTileThreads);
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
  for (int i = 0; i < kVec; ++i) all[i * kTileThreads + thread] = sums[i];
  for (int half = blockDim.y / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.y) >= half) continue;
#pragma unroll
    for (int i = 0; i < kVec; ++i)
      all[i * kTileThreads + thread] += all[i * kTileThreads + thread + half * blockDim.x];
  }
#pragma unroll
  for (int i = 0; i < kVec; ++i) sums[i] = all[i * kTileThreads + thread];
}

template <typename T, int kVec>
__global__ void __launch_bounds__(kTileThreads)
    activation_backward_kernel(const T* __restrict__ dy, const T* __restrict__ x,
                               T* __restrict__ dx, float* __restrict__ partials, Tile tile) {
  const int64_t col = tile.column<kVec>();
  const bool inside = col < tile.N;  // threads outside meet the others at the barriers below
  float biases[kVec], values[kVec], dys[kVec], sums[kVec] = {};
  if (inside) tile.load_bias<T>(biases, col);
  for (int64_t row = tile.first_row(); inside && row < tile.M; row += tile.row_step()) {
    load(values, x + row * tile.N + col);
    load(dys, dy + row * tile.N + col);
    with_curve(tile.curve, [&](auto curve) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) values[i] = dys[i] * curve.at(values[i] + biases[i]).slope;
    });
#pragma unroll
    for (int i = 0; i < kVec; ++i) sums[i] += values[i];
    store(dx + row * tile.N + col, values);
  }
  if (!partials) return;
  sum_columns(sums);
  if (inside && threadIdx.y == 0) store(partials + int64_t(blockIdx.y) * tile.N + col, sums);
}

struct TileLaunch {
  dim3 grid, block;
};

// As many threads in a row as it has packs, up to 32, or all 256 if it is the only one.
inline TileLaunch tile_launch(const Tile& tile, int vec, int64_t shares) {
  const int64_t packs = (tile.N + vec - 1) / vec, most = tile.M == 1 ? kTileThreads : 32;
  unsigned wide = 1;
  while (wide < most && wide < packs) wide *= 2;
  return {dim3(unsigned((packs + wide - 1) / wide), unsigned(shares)),
          dim3(wide, kTileThreads / wide)};
}

template <typename T, int kVec, typename Stream>
void launch_activation_forward(const T* x, T* y, const Tile& tile, Stream stream) {
  // Four rows a thread share a load of the bias.
  const int64_t rows = 4 * tile_launch(tile, kVec, 1).block.y;
  const int64_t shares = std::min<int64_t>((tile.M + rows - 1) / rows, 65535);
  const TileLaunch launch = tile_launch(tile, kVec, shares);
  LAUNCH((activation_forward_kernel<T, kVec>), launch.grid, launch.block, stream, x, y, tile);
}

template <typename T, int kVec, typename Stream>
void launch_activation_backward(const T* dy, const T* x, T* dx, float* partials, const Tile& tile,
                                int64_t shares, Stream stream) {
  const TileLaunch launch = tile_launch(tile, kVec, shares);
  LAUNCH((activation_backward_kernel<T, kVec>), launch.grid, launch.block, stream, dy, x, dx,
         partials, tile);
}

// Calls wide(tile) where packs of 16 bytes are aligned, narrow(start, tile) where they are not and
// for what a long row has left over.
template <typename T, typename Wide, typename Narrow, typename... Pointers>
void by_alignment(Tile tile, Wide wide, Narrow narrow, Pointers... pointers) {
  const int64_t rest = tile.M == 1 && !tile.bias ? tile.N % kFullVec<T> : 0;
  if (!rows_aligned<T>(tile.N - rest, tile.bias, pointers...)) return narrow(0, tile);
  tile.N -= rest;
  if (tile.N) wide(tile);
  const int64_t start = tile.N;
  tile.N = rest;
  if (rest) narrow(start, tile);
}

template <typename T, typename Stream>
void activation_forward_rows(const T* x, T* y, const Tile& tile, Stream stream) {
  by_alignment<T>(
      tile, [&](Tile t) { launch_activation_forward<T, kFullVec<T>>(x, y, t, stream); },
      [&](int64_t start, Tile t) {
        launch_activation_forward<T, 1>(x + start, y + start, t, stream);
      },
      x, y);
}

template <typename T, typename Stream>
void activation_backward_rows(const T* dy, const T* x, T* dx, float* partials, const Tile& tile,
                              int64_t shares, Stream stream) {
  by_alignment<T>(
      tile,
      [&](Tile t) {
        launch_activation_backward<T, kFullVec<T>>(dy, x, dx, partials, t, shares, stream);
      },
      [&](int64_t start, Tile t) {
        launch_activation_backward<T, 1>(dy + start, x + start, dx + start, partials, t, shares,
                                         stream);
      },
      dy, x, dx);
}

}  // namespace slimkernels
