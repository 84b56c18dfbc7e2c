// Row softmax: y = exp(s - max(s)) / sum(exp(s - max(s))), s = x * scale + mask, with one more
// score in the sum if there are sinks.
//
// Tiling   rows.cuh: lanes, a block or a cluster hold a row in registers. Longer rows are walked in
//          pieces, twice: for (max, sum) and to be written; the second time they may come from L2.
// Traffic  N reads and N writes a row, backward 2 N reads: the roof is DRAM bandwidth. What
//          causality hides is not read; what the mask hides is. The mask is read through its
//          strides, so rows that share one find it in the caches.
// Numerics float32 whatever T is. Subtracting a maximum bounds exp by 1: a thread takes its own
//          scores', so that maximum and sum need one exchange. A row of -inf only gives NaN, as
//          torch.softmax does; one that sees nothing is zero.
// Launch   rows.cuh, one row a team.
#pragma once
#include "common.cuh"
#include "mask.cuh"
#include "reduce.cuh"
#include "rows.cuh"

namespace slimkernels {

constexpr int kSoftmaxThreads = 1024;
constexpr float kLowest = -3.402823466e38f;

// One more score in every row of a head.
struct Sinks {
  const void* values;  // (heads,) or null
  bool is_wide;        // float32 whatever x is
  int64_t queries, heads;

  template <typename T>
  __device__ float of(int64_t row) const {
    const int64_t head = row / queries % heads;
    return is_wide ? ((const float*)values)[head] : widen(((const T*)values)[head]);
  }
};

// What makes scores of x.
struct Scores {
  int64_t M;
  int N;
  int64_t period;  // queries that see the keys up to their own index; 0 if all see all
  float scale;
  Mask mask;
  Sinks sinks;

  __device__ int visible(int64_t row) const {
    if (period == 0) return N;
    const int64_t index = row % period;
    return index < N ? int(index) + 1 : N;
  }
};

// A row's scores, as one thread loads some of them.
template <typename T, int kVec>
struct ScoreRow {
  const Scores& p;
  const T* x;
  int visible;
  int64_t mask_start;

  __device__ ScoreRow(const Scores& p, const T* x, int64_t row)
      : p(p), x(x + row * p.N), visible(p.visible(row)), mask_start(0) {
    if (p.mask.values) mask_start = p.mask.start(row);
  }

  // kVec neighbours, -inf where hidden, and their maximum. There a seen -inf counts as the lowest
  // number: a maximum of -inf is that of a row which sees nothing.
  __device__ float load(float (&scores)[kVec], int col) const {
    float added[kVec] = {}, max = -INFINITY;
    if (col < visible) {
      slimkernels::load(scores, x + col);
      if (p.mask.values) p.mask.template load<T>(added, mask_start, col);
    }
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const bool is_seen = col + i < visible && added[i] != -INFINITY;
      scores[i] = is_seen ? scores[i] * p.scale + added[i] : -INFINITY;
      if (is_seen) max = fmaxf(max, fmaxf(scores[i], kLowest));
    }
    return max;
  }
};

// With the sink's score added, which only the first thread of a row's must do.
template <typename T>
__device__ MaxSum with_sink(MaxSum total, const Sinks& sinks, int64_t row) {
  return sinks.values ? combine_max_sum(total, {sinks.of<T>(row), 1.f}) : total;
}

// What the sink's score is of the row's sum.
template <typename T>
__device__ float sink_share(MaxSum total, const Sinks& sinks, int64_t row) {
  return total.max == -INFINITY ? 0.f : expf(sinks.of<T>(row) - total.max) / total.sum;
}

// What turns exp(score - max) into y: 0 for a row that sees nothing, and for one of -inf only 0 /
// 0.
__device__ inline float factor_of(float max, MaxSum total) {
  if (total.max == -INFINITY) return 0.f;
  return (max == -INFINITY ? 0.f : expf(max - total.max)) / total.sum;
}

template <typename T, int kVec>
__global__ void __launch_bounds__(kSoftmaxThreads)
    softmax_forward_kernel(const T* __restrict__ x, T* __restrict__ y, float* __restrict__ shares,
                           Scores p, RowTiling tiling) {
  Team team(tiling);
  const int64_t row = team.first_row();
  const int N = row < p.M ? p.N : 0;  // a team beyond the last row has only to meet the others
  const ScoreRow<T, kVec> scores(p, x, row);
  float values[kHeld / kVec][kVec];
  float max = -INFINITY, sum = 0.f;
  team.each_pack<kVec>(0, N,
                       [&](int i, int col) { max = fmaxf(max, scores.load(values[i], col)); });
  const float shift = max == -INFINITY ? 0.f : max;
  team.each_pack<kVec>(0, N, [&](int i, int) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) sum += values[i][j] = expf(values[i][j] - shift);
  });
  MaxSum total = team.reduce(MaxSum{max, sum}, combine_max_sum);
  if (N > 0) total = with_sink<T>(total, p.sinks, row);
  const float factor = factor_of(max, total);
  y += row * p.N;
  team.each_pack<kVec>(0, N, [&](int i, int col) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) values[i][j] *= factor;
    store(y + col, values[i]);
  });
  if (p.sinks.values && N > 0 && team.rank() == 0) shares[row] = sink_share<T>(total, p.sinks, row);
}

template <typename T, int kVec>
__global__ void __launch_bounds__(kSoftmaxThreads)
    softmax_forward_long_kernel(const T* __restrict__ x, T* __restrict__ y,
                                float* __restrict__ shares, Scores p, RowTiling tiling) {
  Team team(tiling);
  const int64_t row = team.first_row();
  const int N = row < p.M ? p.N : 0;
  const ScoreRow<T, kVec> scores(p, x, row);
  float values[kVec];
  MaxSum total = {-INFINITY, 0.f};
  const int64_t piece = kHeld * team.size();
  for (int64_t start = 0; start < N; start += piece)
    team.each_pack<kVec>(start, N, [&](int, int64_t col) {
      const float max = fmaxf(total.max, scores.load(values, col));
      total = add_exponentials(total, max, values);
    });
  total = team.reduce(total, combine_max_sum);
  if (N > 0) total = with_sink<T>(total, p.sinks, row);
  const float shift = total.max == -INFINITY ? 0.f : total.max;
  const float factor = factor_of(total.max, total);
  y += row * p.N;
  for (int64_t start = 0; start < N; start += piece)
    team.each_pack<kVec>(start, N, [&](int, int64_t col) {
      scores.load(values, col);
#pragma unroll
      for (int i = 0; i < kVec; ++i) values[i] = expf(values[i] - shift) * factor;
      store(y + col, values);
    });
  if (p.sinks.values && N > 0 && team.rank() == 0) shares[row] = sink_share<T>(total, p.sinks, row);
}

// What backward is told: dx = scale * y * (dy - dot), dot = sum(dy * y); a row's sink has the
// gradient -share * dot.
struct SoftmaxGradient {
  int64_t M;
  int N;
  float scale;
  const float* shares;  // (M,) or null
  float* products;      // (M,), the sinks' gradients row by row

  __device__ void store_product(int64_t row, float dot) const {
    if (shares) products[row] = -shares[row] * dot;
  }
};

template <typename T, int kVec>
__global__ void __launch_bounds__(kSoftmaxThreads)
    softmax_backward_kernel(const T* __restrict__ dy, const T* __restrict__ y, T* __restrict__ dx,
                            SoftmaxGradient p, RowTiling tiling) {
  Team team(tiling);
  const int64_t row = team.first_row(), begin = row * p.N;
  const int N = row < p.M ? p.N : 0;
  float dys[kHeld / kVec][kVec], ys[kHeld / kVec][kVec];
  float dot = 0.f;
  team.each_pack<kVec>(0, N, [&](int i, int col) {
    load(dys[i], dy + begin + col);
    load(ys[i], y + begin + col);
#pragma unroll
    for (int j = 0; j < kVec; ++j) dot += dys[i][j] * ys[i][j];
  });
  dot = team.reduce(dot, combine_sum);
  team.each_pack<kVec>(0, N, [&](int i, int col) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) dys[i][j] = p.scale * ys[i][j] * (dys[i][j] - dot);
    store(dx + begin + col, dys[i]);
  });
  if (N > 0 && team.rank() == 0) p.store_product(row, dot);
}

template <typename T, int kVec>
__global__ void __launch_bounds__(kSoftmaxThreads)
    softmax_backward_long_kernel(const T* __restrict__ dy, const T* __restrict__ y,
                                 T* __restrict__ dx, SoftmaxGradient p, RowTiling tiling) {
  Team team(tiling);
  const int64_t row = team.first_row(), begin = row * p.N;
  const int N = row < p.M ? p.N : 0;
  float dys[kVec], ys[kVec];
  float dot = 0.f;
  const int64_t piece = kHeld * team.size();
  for (int64_t start = 0; start < N; start += piece)
    team.each_pack<kVec>(start, N, [&](int, int64_t col) {
      load(dys, dy + begin + col);
      load(ys, y + begin + col);
#pragma unroll
      for (int i = 0; i < kVec; ++i) dot += dys[i] * ys[i];
    });
  dot = team.reduce(dot, combine_sum);
  for (int64_t start = 0; start < N; start += piece)
    team.each_pack<kVec>(start, N, [&](int, int64_t col) {
      load(dys, dy + begin + col);
      load(ys, y + begin + col);
#pragma unroll
      for (int i = 0; i < kVec; ++i) dys[i] = p.scale * ys[i] * (dys[i] - dot);
      store(dx + begin + col, dys);
    });
  if (N > 0 && team.rank() == 0) p.store_product(row, dot);
}

template <typename T, int kVec, typename Stream>
void launch_softmax_forward(const T* x, T* y, float* shares, const Scores& p,
                            const RowTiling& tiling, Stream stream) {
  if (tiling.is_held)
    LAUNCH_CLUSTER((softmax_forward_kernel<T, kVec>), tiling.grid(p.M), tiling.block(),
                   tiling.blocks, 0, stream, x, y, shares, p, tiling);
  else
    LAUNCH_CLUSTER((softmax_forward_long_kernel<T, kVec>), tiling.grid(p.M), tiling.block(),
                   tiling.blocks, 0, stream, x, y, shares, p, tiling);
}

template <typename T, int kVec, typename Stream>
void launch_softmax_backward(const T* dy, const T* y, T* dx, const SoftmaxGradient& p,
                             const RowTiling& tiling, Stream stream) {
  if (tiling.is_held)
    LAUNCH_CLUSTER((softmax_backward_kernel<T, kVec>), tiling.grid(p.M), tiling.block(),
                   tiling.blocks, 0, stream, dy, y, dx, p, tiling);
  else
    LAUNCH_CLUSTER((softmax_backward_long_kernel<T, kVec>), tiling.grid(p.M), tiling.block(),
                   tiling.blocks, 0, stream, dy, y, dx, p, tiling);
}

template <typename T, typename Stream>
void softmax_forward_rows(const T* x, T* y, float* shares, const Scores& p, int max_cluster,
                          Stream stream) {
  const RowTiling tiling = row_tiling(p.N, kSoftmaxThreads, max_cluster);
  if (rows_aligned<T>(p.N, x, y))
    launch_softmax_forward<T, kFullVec<T>>(x, y, shares, p, tiling, stream);
  else
    launch_softmax_forward<T, 1>(x, y, shares, p, tiling, stream);
}

template <typename T, typename Stream>
void softmax_backward_rows(const T* dy, const T* y, T* dx, const SoftmaxGradient& p,
                           int max_cluster, Stream stream) {
  const RowTiling tiling = row_tiling(p.N, kSoftmaxThreads, max_cluster);
  if (rows_aligned<T>(p.N, dy, y, dx))
    launch_softmax_backward<T, kFullVec<T>>(dy, y, dx, p, tiling, stream);
  else
    launch_softmax_backward<T, 1>(dy, y, dx, p, tiling, stream);
}

}  // namespace slimkernels
