// y = f(x + bias) with an optional bias: gelu, silu, relu_squared.
//
// Tiling   A block covers some columns, up to 32 packs of 16 bytes of a row, and walks down rows:
//          the columns' bias is loaded once, and backward keeps their dbias in registers. Without a
//          bias the tensor is cut anywhere, into rows as long as all threads side by side.
// Traffic  Forward reads and writes each element once, backward reads two and writes one; the
//          slope is computed anew. Partials of dbias add 2 * parts * N float32: no atomics, the
//          same sum on every run.
// Numerics x + bias is float32; curves.cuh has the functions.
// Launch   grid = (columns of blocks, parts of the rows), block = (1 to 256, 256 / that).
#pragma once
#include <algorithm>

#include "common.cuh"
#include "curves.cuh"

namespace slimkernels {

constexpr int64_t kMostBlocksDown = 65535;  // of a grid: its y

constexpr int kTileThreads = 256;

// A tensor seen as rows. A thread has the same columns in rows that are a step apart.
struct Tile {
  int64_t size, N;  // of all rows, the last of which may be short, and of one
  Curve curve;
  const void* bias;  // (N,) or null
  bool is_wide;      // bias is float32 whatever x is

  template <int kVec>
  __device__ int64_t column() const {
    return (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * kVec;
  }
  __device__ int64_t first_row() const { return int64_t(blockIdx.y) * blockDim.y + threadIdx.y; }
  // From an element to the thread's next one below.
  __device__ int64_t step() const { return int64_t(gridDim.y) * blockDim.y * N; }
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
  const int64_t col = tile.column<kVec>(), step = tile.step();
  if (col >= tile.N) return;
  float biases[kVec];
  tile.load_bias<T>(biases, col);
  for (int64_t at = tile.first_row() * tile.N + col; at < tile.size; at += 2 * step) {
    // Two at once: enough loads on their way.
    float values[2][kVec] = {};
    const bool are_two = at + step < tile.size;
    load(values[0], x + at);
    if (are_two) load(values[1], x + at + step);
    with_curve(tile.curve, [&](auto curve) {
#pragma unroll
      for (int i = 0; i < 2 * kVec; ++i) {
        float& value = values[i / kVec][i % kVec];
        value = curve.at(value + biases[i % kVec]).value;
      }
    });
    store(y + at, values[0]);
    if (are_two) store(y + at + step, values[1]);
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
  const int64_t size = inside ? tile.size : 0;
  float biases[kVec], values[kVec], dys[kVec], sums[kVec] = {};
  if (inside) tile.load_bias<T>(biases, col);
  for (int64_t at = tile.first_row() * tile.N + col; at < size; at += tile.step()) {
    load(values, x + at);
    load(dys, dy + at);
    with_curve(tile.curve, [&](auto curve) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) values[i] = dys[i] * curve.at(values[i] + biases[i]).slope;
    });
#pragma unroll
    for (int i = 0; i < kVec; ++i) sums[i] += values[i];
    store(dx + at, values);
  }
  if (!partials) return;
  sum_columns(sums);
  if (inside && threadIdx.y == 0) store(partials + int64_t(blockIdx.y) * tile.N + col, sums);
}

// With a bias a block is as wide as a row, up to 32 packs. Without, it is one row of threads, each
// of which has `rows` packs, and the rows' length is set so.
struct TileLaunch {
  Tile tile;
  dim3 grid, block;

  TileLaunch(const Tile& given, int vec, int64_t rows) : tile(given) {
    unsigned wide = kTileThreads;
    if (tile.bias) {
      for (wide = 1; wide < 32 && wide * vec < tile.N;) wide *= 2;
    } else {
      const int64_t packs = (tile.size + vec - 1) / vec, per_block = wide * rows;
      tile.N = (packs + per_block - 1) / per_block * wide * vec;
    }
    block = dim3(wide, kTileThreads / wide);
    grid = dim3(unsigned((tile.N + wide * vec - 1) / (wide * vec)));
  }
};

template <typename T, int kVec, typename Stream>
void launch_activation_forward(const T* x, T* y, const Tile& tile, Stream stream) {
  TileLaunch launch(tile, kVec, 2);
  if (tile.bias) {  // four rows a thread share a load of it
    const int64_t rows = 4 * tile.N * launch.block.y;
    launch.grid.y = unsigned(std::min<int64_t>((tile.size + rows - 1) / rows, kMostBlocksDown));
  }
  LAUNCH((activation_forward_kernel<T, kVec>), launch.grid, launch.block, stream, x, y,
         launch.tile);
}

template <typename T, int kVec, typename Stream>
void launch_activation_backward(const T* dy, const T* x, T* dx, float* partials, const Tile& tile,
                                int64_t parts, Stream stream) {
  TileLaunch launch(tile, kVec, 1);
  launch.grid.y = unsigned(parts);
  LAUNCH((activation_backward_kernel<T, kVec>), launch.grid, launch.block, stream, dy, x, dx,
         partials, launch.tile);
}

// Calls wide(tile) where packs of 16 bytes are aligned; narrow(start, tile) where they are not, and
// for what is left over of a tensor that may be cut anywhere.
template <typename T, typename Wide, typename Narrow, typename... Pointers>
void by_alignment(Tile tile, Wide wide, Narrow narrow, Pointers... pointers) {
  const int64_t rest = tile.bias ? 0 : tile.size % kFullVec<T>;
  if (!rows_aligned<T>(tile.bias ? tile.N : 0, tile.bias, pointers...)) return narrow(0, tile);
  tile.size -= rest;
  if (tile.size) wide(tile);
  const int64_t start = tile.size;
  tile.size = rest;
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
                              int64_t parts, Stream stream) {
  by_alignment<T>(
      tile,
      [&](Tile t) {
        launch_activation_backward<T, kFullVec<T>>(dy, x, dx, partials, t, parts, stream);
      },
      [&](int64_t start, Tile t) {
        launch_activation_backward<T, 1>(dy + start, x + start, dx + start, partials, t, parts,
                                         stream);
      },
      dy, x, dx);
}

}  // namespace slimkernels
