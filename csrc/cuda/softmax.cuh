// Row softmax: y = exp(s - max(s)) / sum(exp(s - max(s))), s = x * scale + mask, with one more
// score in the sum if there are sinks.
//
// Tiling   rows.cuh: lanes, a block or a cluster hold a row in registers. Longer rows are walked in
//          pieces, twice: for (max, sum) and to be written; the second time they may come from L2.
// Traffic  N reads and N writes a row, backward 2 N reads: the roof is DRAM bandwidth. What
//          causality hides is not read; what the mask hides is. The mask is read through its
//          strides, so rows that share one find it in the caches.
// Numerics float32 whatever T is. Online: a thread's sum of exp(s - max) is rescaled when its
//          maximum rises, so that the threads exchange once. A row of -inf only gives NaN, as
//          torch.softmax does; one that sees nothing is zero.
// Launch   rows.cuh, one row a team.
#pragma once
#include "common.cuh"
#include "mask.cuh"
#include "reduce.cuh"
#include "rows.cuh"

namespace slimkernels {

// Two blocks fit a multiprocessor: one loads while the other stores. Single elements need more
// registers than packs of them: more addresses. The 1 in __launch_bounds__ keeps ptxas from
// spilling to make room for more blocks.
template <int kVec>
constexpr int kSoftmaxThreads = kVec == 1 ? 256 : 512;
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

// A row, as a thread makes scores of some of its elements.
template <typename T, int kVec>
struct ScoreRow {
  const Scores& call;
  const T* x;
  int visible;  // columns
  int64_t mask_start;

  __device__ ScoreRow(const Scores& call, const T* x, int64_t row)
      : call(call),
        x(x + row * call.N),
        visible(row < call.M ? call.visible(row) : 0),
        mask_start(0) {
    if (call.mask.values) mask_start = call.mask.start(row);
  }

  // Makes scores of kVec neighbours, -inf where hidden, and returns their maximum. There a seen
  // -inf counts as the lowest number: a maximum of -inf is that of a row which sees nothing.
  __device__ float score(float (&values)[kVec], int col) const {
    float added[kVec] = {}, max = -INFINITY;
    if (call.mask.values && col < visible) call.mask.template load<T>(added, mask_start, col);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const bool is_seen = col + i < visible && added[i] != -INFINITY;
      values[i] = is_seen ? values[i] * call.scale + added[i] : -INFINITY;
      if (is_seen) max = fmaxf(max, fmaxf(values[i], kLowest));
    }
    return max;
  }
};

template <typename T, int kVec>
__global__ void __launch_bounds__(kSoftmaxThreads<kVec>, 1)
    softmax_forward_kernel(const T* __restrict__ x, T* __restrict__ y, float* __restrict__ shares,
                           Scores call, RowTiling tiling) {
  Team team(tiling);
  const int64_t row = team.first_row();
  const int N =
      row < call.M ? call.N : 0;  // a team beyond the last row has only to meet the others
  const int step = kHeld * team.size();
  const ScoreRow<T, kVec> scores(call, x, row);
  Piece<kVec> piece;
  MaxSum total = {-INFINITY, 0.f};
  for (int start = 0; start < N; start += step) {
    // Apart from scoring, so that all loads are on their way before the first is waited for.
    team.each_pack<kVec>(start, scores.visible,
                         [&](int i, int col) { load(piece[i], scores.x + col); });
    team.each_pack<kVec>(start, N, [&](int i, int col) {
      const float max = fmaxf(total.max, scores.score(piece[i], col));
      total = add_exponentials<T>(total, max, piece[i]);
    });
  }
  total = team.reduce(total, combine_max_sum);
  float sink = 0.f;
  if (call.sinks.values && N > 0) {
    sink = call.sinks.of<T>(row);
    total = combine_max_sum(total, {sink, 1.f});
  }
  // A row that sees nothing is zero, one of -inf only 0 / 0.
  const float shift = total.max == -INFINITY ? 0.f : total.max;
  const float factor = total.max == -INFINITY ? 0.f : 1.f / total.sum;
  if (call.sinks.values && N > 0 && team.rank() == 0) shares[row] = expf(sink - shift) * factor;
  for (int start = 0; start < N; start += step) {
    team.each_pack<kVec>(start, N, [&](int i, int col) {
      if (!tiling.is_held) {
        if (col < scores.visible) load(piece[i], scores.x + col);
        scores.score(piece[i], col);
      }
#pragma unroll
      for (int j = 0; j < kVec; ++j)
        piece[i][j] = exp_of_nonpositive<T>(piece[i][j] - shift) * factor;
    });
    store_piece(y + row * call.N, piece, team, start, N);
  }
}

// What backward is told: dx = scale * y * (dy - dot), dot = sum(dy * y); a row's sink has the
// gradient -share * dot.
struct SoftmaxGradient {
  int64_t M;
  int N;
  float scale;
  const float* shares;  // (M,) or null
  float* products;      // (M,), the sinks' gradients row by row
};

template <typename T, int kVec>
__global__ void __launch_bounds__(kSoftmaxThreads<kVec>, 1)
    softmax_backward_kernel(const T* __restrict__ dy, const T* __restrict__ y, T* __restrict__ dx,
                            SoftmaxGradient call, RowTiling tiling) {
  Team team(tiling);
  const int64_t row = team.first_row();
  const int N = row < call.M ? call.N : 0;
  const int step = kHeld * team.size();
  dy += row * call.N;
  y += row * call.N;
  Piece<kVec> dys, ys;
  float dot = 0.f;
  for (int start = 0; start < N; start += step) {
    load_piece(dys, team, dy, start, N);
    load_piece(ys, team, y, start, N);
    each_element<kVec>([&](int i, int j) { dot += dys[i][j] * ys[i][j]; });
  }
  dot = team.reduce(dot, combine_sum);
  for (int start = 0; start < N; start += step) {
    if (!tiling.is_held) {
      load_piece(dys, team, dy, start, N);
      load_piece(ys, team, y, start, N);
    }
    each_element<kVec>(
        [&](int i, int j) { dys[i][j] = call.scale * ys[i][j] * (dys[i][j] - dot); });
    store_piece(dx + row * call.N, dys, team, start, N);
  }
  if (call.shares && N > 0 && team.rank() == 0) call.products[row] = -call.shares[row] * dot;
}

template <typename T, int kVec, typename Stream>
void launch_softmax_forward(const T* x, T* y, float* shares, const Scores& call, int max_cluster,
                            Stream stream) {
  const RowTiling tiling = row_tiling(call.N, kSoftmaxThreads<kVec>, max_cluster);
  LAUNCH_CLUSTER((softmax_forward_kernel<T, kVec>), tiling.grid(call.M), tiling.block(),
                 tiling.blocks, 0, stream, x, y, shares, call, tiling);
}

template <typename T, int kVec, typename Stream>
void launch_softmax_backward(const T* dy, const T* y, T* dx, const SoftmaxGradient& call,
                             int max_cluster, Stream stream) {
  const RowTiling tiling = row_tiling(call.N, kSoftmaxThreads<kVec>, max_cluster);
  LAUNCH_CLUSTER((softmax_backward_kernel<T, kVec>), tiling.grid(call.M), tiling.block(),
                 tiling.blocks, 0, stream, dy, y, dx, call, tiling);
}

template <typename T, typename Stream>
void softmax_forward_rows(const T* x, T* y, float* shares, const Scores& call, int max_cluster,
                          Stream stream) {
  if (rows_aligned<T>(call.N, x, y))
    launch_softmax_forward<T, kFullVec<T>>(x, y, shares, call, max_cluster, stream);
  else
    launch_softmax_forward<T, 1>(x, y, shares, call, max_cluster, stream);
}

template <typename T, typename Stream>
void softmax_backward_rows(const T* dy, const T* y, T* dx, const SoftmaxGradient& call,
                           int max_cluster, Stream stream) {
  if (rows_aligned<T>(call.N, dy, y, dx))
    launch_softmax_backward<T, kFullVec<T>>(dy, y, dx, call, max_cluster, stream);
  else
    launch_softmax_backward<T, 1>(dy, y, dx, call, max_cluster, stream);
}

}  // namespace slimkernels
