// Row softmax: y = exp(s - max(s)) / sum(exp(s - max(s))), s = x * scale where causality allows.
//
// Tiling   A row of up to 1024 elements stays in the registers of one warp, kPerLane values a lane.
//          A longer one is read twice by a block of 256 threads: once for (max, sum), once to
//          write; the second time it comes from L2.
// Traffic  N reads and N writes a row, backward 2 N reads: the roof is DRAM bandwidth. Loads are
//          16 bytes wide where rows are aligned.
// Numerics Subtracting the row's maximum bounds exp by 1; sums are float32 whatever T is. A row of
//          -inf only gives NaN, as torch.softmax does.
// Launch   short rows: grid = ceil(M / 4), block = (32, 4); long rows: grid = M, block = 256. No
//          dynamic shared memory.
#pragma once
#include "common.cuh"
#include "reduce.cuh"

namespace slimkernels {

constexpr int kShortRow = 1024;
constexpr int kRowsPerBlock = 4;
constexpr int kLongWarps = 8;

// Columns that a row sees: all, or under causality (period > 0) those up to its own index.
__device__ inline int visible_columns(int64_t row, int N, int64_t period) {
  if (period == 0) return N;
  const int64_t index = row % period;
  return index < N ? int(index) + 1 : N;
}

// The scores of kVec neighbours, -inf where the row does not see them.
template <int kVec, typename T>
__device__ void load_scores(float (&scores)[kVec], const T* row, int col, int visible,
                            float scale) {
  load(scores, row + col);
#pragma unroll
  for (int i = 0; i < kVec; ++i) scores[i] = col + i < visible ? scores[i] * scale : -INFINITY;
}

template <typename T, int kVec, int kPerLane>
__global__ void __launch_bounds__(32 * kRowsPerBlock)
    softmax_forward_short_kernel(const T* __restrict__ x, T* __restrict__ y, int64_t M, int N,
                                 int64_t period, float scale) {
  const int64_t row = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.y;
  if (row >= M) return;  // whole warps leave together, so the shuffles below stay full
  const int visible = visible_columns(row, N, period);
  float scores[kPerLane / kVec][kVec];
  float max = -INFINITY, sum = 0.f;
#pragma unroll  // constant indices keep the row in registers
  for (int i = 0; i < kPerLane / kVec; ++i) {
    const int col = (i * 32 + threadIdx.x) * kVec;
    if (col < N) load_scores(scores[i], x + row * N, col, visible, scale);
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      if (col >= N) scores[i][j] = -INFINITY;  // adds nothing below
      max = fmaxf(max, scores[i][j]);
    }
  }
  max = warp_reduce(max, combine_max);
#pragma unroll
  for (int i = 0; i < kPerLane / kVec; ++i)
#pragma unroll
    for (int j = 0; j < kVec; ++j) sum += scores[i][j] = expf(scores[i][j] - max);
  const float factor = 1.f / warp_reduce(sum, combine_sum);
#pragma unroll
  for (int i = 0; i < kPerLane / kVec; ++i) {
    const int col = (i * 32 + threadIdx.x) * kVec;
#pragma unroll
    for (int j = 0; j < kVec; ++j) scores[i][j] *= factor;
    if (col < N) store(y + row * N + col, scores[i]);
  }
}

template <typename T, int kVec>
__global__ void __launch_bounds__(32 * kLongWarps)
    softmax_forward_long_kernel(const T* __restrict__ x, T* __restrict__ y, int N, int64_t period,
                                float scale) {
  const int64_t row = blockIdx.x;
  const int visible = visible_columns(row, N, period);
  x += row * N;
  y += row * N;
  MaxSum total = {-INFINITY, 0.f};
  float scores[kVec];
  for (int64_t col = threadIdx.x * kVec; col < N; col += 32 * kLongWarps * kVec) {
    load_scores(scores, x, int(col), visible, scale);
    total = combine_max_sum(total, max_sum(scores));
  }
  total = block_reduce<kLongWarps>(total, combine_max_sum);
  const float factor = 1.f / total.sum;
  for (int64_t col = threadIdx.x * kVec; col < N; col += 32 * kLongWarps * kVec) {
    load_scores(scores, x, int(col), visible, scale);
#pragma unroll
    for (int i = 0; i < kVec; ++i) scores[i] = expf(scores[i] - total.max) * factor;
    store(y + col, scores);
  }
}

// dx = scale * y * (dy - dot), dot = sum(dy * y)
template <typename T, int kVec, int kPerLane>
__global__ void __launch_bounds__(32 * kRowsPerBlock)
    softmax_backward_short_kernel(const T* __restrict__ dy, const T* __restrict__ y,
                                  T* __restrict__ dx, int64_t M, int N, float scale) {
  const int64_t row = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.y;
  if (row >= M) return;  // whole warps leave together
  float dys[kPerLane / kVec][kVec], ys[kPerLane / kVec][kVec];
  float dot = 0.f;
#pragma unroll
  for (int i = 0; i < kPerLane / kVec; ++i) {
    const int col = (i * 32 + threadIdx.x) * kVec;
    if (col >= N) continue;
    load(dys[i], dy + row * N + col);
    load(ys[i], y + row * N + col);
#pragma unroll
    for (int j = 0; j < kVec; ++j) dot += dys[i][j] * ys[i][j];
  }
  dot = warp_reduce(dot, combine_sum);
#pragma unroll
  for (int i = 0; i < kPerLane / kVec; ++i) {
    const int col = (i * 32 + threadIdx.x) * kVec;
    if (col >= N) continue;
#pragma unroll
    for (int j = 0; j < kVec; ++j) dys[i][j] = scale * ys[i][j] * (dys[i][j] - dot);
    store(dx + row * N + col, dys[i]);
  }
}

template <typename T, int kVec>
__global__ void __launch_bounds__(32 * kLongWarps)
    softmax_backward_long_kernel(const T* __restrict__ dy, const T* __restrict__ y,
                                 T* __restrict__ dx, int N, float scale) {
  const int64_t start = int64_t(blockIdx.x) * N;
  float dys[kVec], ys[kVec];
  float dot = 0.f;
  for (int64_t col = threadIdx.x * kVec; col < N; col += 32 * kLongWarps * kVec) {
    load(dys, dy + start + col);
    load(ys, y + start + col);
#pragma unroll
    for (int i = 0; i < kVec; ++i) dot += dys[i] * ys[i];
  }
  dot = block_reduce<kLongWarps>(dot, combine_sum);
  for (int64_t col = threadIdx.x * kVec; col < N; col += 32 * kLongWarps * kVec) {
    load(dys, dy + start + col);
    load(ys, y + start + col);
#pragma unroll
    for (int i = 0; i < kVec; ++i) dys[i] = scale * ys[i] * (dys[i] - dot);
    store(dx + start + col, dys);
  }
}

inline dim3 short_grid(int64_t M) {
  return dim3(unsigned((M + kRowsPerBlock - 1) / kRowsPerBlock));
}

template <typename T, int kVec, typename Stream>
void launch_softmax_forward(const T* x, T* y, int64_t M, int N, int64_t period, float scale,
                            Stream stream) {
  const dim3 short_block(32, kRowsPerBlock);
  if (N <= kShortRow / 4)
    LAUNCH((softmax_forward_short_kernel<T, kVec, kShortRow / 4 / 32>), short_grid(M), short_block,
           stream, x, y, M, N, period, scale);
  else if (N <= kShortRow)
    LAUNCH((softmax_forward_short_kernel<T, kVec, kShortRow / 32>), short_grid(M), short_block,
           stream, x, y, M, N, period, scale);
  else
    LAUNCH((softmax_forward_long_kernel<T, kVec>), dim3(unsigned(M)), dim3(32 * kLongWarps), stream,
           x, y, N, period, scale);
}

template <typename T, int kVec, typename Stream>
void launch_softmax_backward(const T* dy, const T* y, T* dx, int64_t M, int N, float scale,
                             Stream stream) {
  const dim3 short_block(32, kRowsPerBlock);
  if (N <= kShortRow / 4)
    LAUNCH((softmax_backward_short_kernel<T, kVec, kShortRow / 4 / 32>), short_grid(M), short_block,
           stream, dy, y, dx, M, N, scale);
  else if (N <= kShortRow)
    LAUNCH((softmax_backward_short_kernel<T, kVec, kShortRow / 32>), short_grid(M), short_block,
           stream, dy, y, dx, M, N, scale);
  else
    LAUNCH((softmax_backward_long_kernel<T, kVec>), dim3(unsigned(M)), dim3(32 * kLongWarps),
           stream, dy, y, dx, N, scale);
}

template <typename T, typename Stream>
void softmax_forward_rows(const T* x, T* y, int64_t M, int64_t N, int64_t period, float scale,
                          Stream stream) {
  if (rows_aligned<T>(N, x, y))
    launch_softmax_forward<T, kFullVec<T>>(x, y, M, int(N), period, scale, stream);
  else
    launch_softmax_forward<T, 1>(x, y, M, int(N), period, scale, stream);
}

template <typename T, typename Stream>
void softmax_backward_rows(const T* dy, const T* y, T* dx, int64_t M, int64_t N, float scale,
                           Stream stream) {
  if (rows_aligned<T>(N, dy, y, dx))
    launch_softmax_backward<T, kFullVec<T>>(dy, y, dx, M, int(N), scale, stream);
  else
    launch_softmax_backward<T, 1>(dy, y, dx, M, int(N), scale, stream);
}

}  // namespace slimkernels
