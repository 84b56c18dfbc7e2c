// Cross-entropy of logits (M, V) with class labels; csrc/cpu/cross_entropy.cpp has the formulas.
//
// Tiling   Forward: rows.cuh, but that a team walks its row rather than hold it, so that a cluster
//          of up to 8 blocks is for long rows only; then one block adds the rows up. Backward: a
//          warp or more a segment of a row. No atomics: the same bits on every run.
// Traffic  Forward reads the logits once, backward reads them once and writes dx once; ignored rows
//          are not read. The roof is DRAM bandwidth, 3 * M * V * sizeof(T) bytes in all.
// Numerics Online: a thread's sum of exp(z - max) is rescaled when its maximum rises, the threads
//          exchange (max, sum) pairs. lse stays in two float32, the maximum and the logarithm of
//          the sum: in one it would be wrong by 5e-4 at logits of 1e4. A sum of u (lse - z) is kept
//          as the sums of u (max - z), whose terms have one sign, and of u.
// Launch   forward: a team a row; backward: grid = segments of rows, 256 threads, 32 to 256 a row.
#pragma once
#include <algorithm>

#include "common.cuh"
#include "reduce.cuh"
#include "rows.cuh"

namespace slimkernels {

constexpr int kLossThreads = 256;

// What forward and backward are told of the loss.
struct Loss {
  const int64_t* target;
  const float* weight;  // (V,) or null
  float* stats;         // (3, M): max(z), log of the sum of exp(z - max), sum of u
  int64_t M;
  int V;
  int64_t ignore_index;
  float smoothing, z_loss, softcap;

  __device__ bool is_valid(int64_t label) const { return label >= 0 && label < V; }
  // What a row counts whose label is valid.
  __device__ float weight_of(int64_t label) const { return weight ? weight[label] : 1.f; }
  template <int kVec>
  __device__ void cap(float (&x)[kVec]) const {
#pragma unroll
    for (int i = 0; i < kVec; ++i) x[i] = capped(x[i]);
  }
  __device__ float capped(float x) const {
    return softcap > 0.f ? softcap * tanhf(x / softcap) : x;
  }
  // u of neighbouring classes: what smoothing spreads over them.
  template <int kVec>
  __device__ void load_shares(float (&u)[kVec], int64_t col) const {
    if (weight) return load(u, weight + col);
#pragma unroll
    for (int i = 0; i < kVec; ++i) u[i] = 1.f;
  }
};

// Of the logits that a thread has seen: (max, sum of exp(z - max)), and with smoothing the sums of
// u (max - z) and of u.
struct Seen {
  MaxSum total = {-INFINITY, 0.f};
  SumPair spread = {0.f, 0.f};

  // The first sum for a greater maximum; while nothing is spread, the old one may be -inf.
  __device__ SumPair spread_below(float max) const {
    const bool is_same = spread.second == 0.f || max == total.max;
    return {is_same ? spread.first : spread.first + spread.second * (max - total.max),
            spread.second};
  }

  template <typename T, int kVec>
  __device__ void add(const float (&z)[kVec], const Loss& p, int64_t col) {
    float max = total.max;
#pragma unroll
    for (int i = 0; i < kVec; ++i) max = fmaxf(max, z[i]);
    if (p.smoothing > 0.f) {
      const float shift = max == -INFINITY ? 0.f : max;
      float u[kVec];
      p.load_shares(u, col);
      spread = spread_below(max);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        spread.first += u[i] * (shift - z[i]);
        spread.second += u[i];
      }
    }
    total = add_exponentials<T>(total, max, z);
  }
};

// 1 - tanh(u)^2, which cancels where tanh is almost 1
__device__ inline float slope_of_tanh(float u) {
  const float e = expf(-2.f * fabsf(u));
  const float r = 1.f / (1.f + e);
  return 4.f * e * r * r;
}

// Whether argmax prefers this class to the label: it takes the first of the greatest logits, and
// NaN is the greatest.
__device__ inline bool beats(float x, int64_t col, float own, int64_t label) {
  if (own != own) return x != x && col < label;
  return !(x <= own) || (x == own && col < label);
}
template <int kVec>
__device__ bool any_beats(const float (&x)[kVec], int64_t col, float own, int64_t label) {
  bool any = false;
#pragma unroll
  for (int i = 0; i < kVec; ++i) any |= beats(x[i], col + i, own, label);
  return any;
}

// Where the results of forward go.
struct LossOutputs {
  float* losses;     // (M,)
  uint8_t* correct;  // (M,) or null

  __device__ void store(int64_t row, float loss, bool is_correct) const {
    losses[row] = loss;
    if (correct) correct[row] = is_correct;
  }
};

// The loss of a row whose sums are known, and its stats.
__device__ inline float finish_row(const Loss& p, int64_t row, int64_t label, float logit,
                                   const Seen& s) {
  // NaN for a row whose logits are all -inf, as in torch, and for a label out of range.
  const bool has_loss = p.is_valid(label) && s.total.max != -INFINITY;
  const float log_sum = has_loss ? logf(s.total.sum) : NAN;
  const float lse = s.total.max + log_sum;
  p.stats[row] = s.total.max;
  p.stats[p.M + row] = log_sum;
  p.stats[2 * p.M + row] = s.spread.second;
  if (!p.is_valid(label)) return NAN;
  float loss = (1.f - p.smoothing) * (log_sum + (s.total.max - p.capped(logit)));
  if (p.z_loss > 0.f) loss += p.z_loss * lse * lse;
  loss *= p.weight_of(label);
  if (p.smoothing > 0.f) loss += p.smoothing / p.V * (s.spread.second * log_sum + s.spread.first);
  return loss;
}

__device__ inline void ignore_row(const Loss& p, int64_t row, const LossOutputs& out) {
  p.stats[row] = p.stats[p.M + row] = p.stats[2 * p.M + row] = 0.f;
  out.store(row, 0.f, false);
}

// Single elements need more registers than packs of them: more addresses.
template <typename T, int kVec>
__global__ void __launch_bounds__(kLossThreads, kVec == 1 ? 2 : 4)
    cross_entropy_forward_kernel(const T* __restrict__ x, LossOutputs out, Loss p,
                                 RowTiling tiling) {
  Team team(tiling);
  const int64_t row = team.first_row();
  const bool is_row = row < p.M;
  const int64_t label = is_row ? p.target[row] : p.ignore_index;
  const int end = label != p.ignore_index ? p.V : 0;  // an ignored row is not read
  x += row * p.V;
  const float own = end && p.is_valid(label) ? widen(x[label]) : NAN;
  Seen seen;
  bool is_beaten = false;
  Piece<kVec> z;
  for (int start = 0; start < end; start += kHeld * team.size()) {
    // Apart, so that all loads are on their way before the first is waited for.
    team.each_pack<kVec>(start, end, [&](int i, int col) { load(z[i], x + col); });
    team.each_pack<kVec>(start, end, [&](int i, int col) {
      if (out.correct) is_beaten |= any_beats(z[i], col, own, label);
      if (p.softcap > 0.f) p.cap(z[i]);
      seen.add<T>(z[i], p, col);
    });
  }
  Seen all;
  all.total = team.reduce(seen.total, combine_max_sum);
  if (p.smoothing > 0.f)
    all.spread = team.reduce(seen.spread_below(all.total.max), combine_sum_pair);
  if (out.correct) is_beaten = team.reduce(float(is_beaten), combine_max) > 0.f;
  if (!is_row || team.rank() > 0) return;
  if (end)
    out.store(row, finish_row(p, row, label, own, all), p.is_valid(label) && !is_beaten);
  else
    ignore_row(p, row, out);
}

constexpr int kTotalThreads = 1024;

// The loss of all rows, and what their mean divides by, in one block: always the same sum.
__global__ void __launch_bounds__(kTotalThreads)
    cross_entropy_total_kernel(const float* __restrict__ losses, float* __restrict__ total,
                               float* __restrict__ divisor, bool is_mean, Loss p) {
  SumPair sums = {0.f, 0.f};  // of losses and of weights
  for (int64_t row = threadIdx.x; row < p.M; row += kTotalThreads) {
    sums.first += losses[row];
    const int64_t label = p.target[row];
    if (label != p.ignore_index && p.is_valid(label)) sums.second += p.weight_of(label);
  }
  sums = block_reduce<kTotalThreads / 32>(sums, combine_sum_pair);
  if (threadIdx.x > 0) return;
  // 0 / 0 = NaN where every row is ignored, as in torch
  *total = is_mean ? sums.first / sums.second : sums.first;
  *divisor = sums.second;
}

// What backward is told besides.
struct LossGradients {
  const float* dy;       // (M,) if per_row, else one number
  const float* dlse;     // (M,) or null
  const float* divisor;  // of a mean, else null
  bool per_row;
};

// With p = exp(z - lse): dz = own (p - 1 at the label) + even (mass p - u) + extra p. Sums of what
// cancels come before the factors, so that a p of 1 gives 0.
struct Slopes {
  float own, even, extra, mass, max, log_sum;

  // Of kVec neighbouring logits, in their place.
  template <int kVec>
  __device__ void apply(float (&x)[kVec], int64_t col, int64_t label, const Loss& p) const {
    float outer[kVec], u[kVec] = {};
#pragma unroll
    for (int i = 0; i < kVec; ++i) outer[i] = 1.f;
    if (p.softcap > 0.f) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) outer[i] = slope_of_tanh(x[i] / p.softcap);
      p.cap(x);
    }
    if (p.smoothing > 0.f) p.load_shares(u, col);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      // The maximum first: z - max is nearly exact, where lse in one float32 is not.
      const float probability = expf(x[i] - max - log_sum);
      const float dz = own * (probability - (label - col == i)) + extra * probability;
      x[i] = (dz + even * (mass * probability - u[i])) * outer[i];
    }
  }
};

__device__ inline Slopes slopes_of(const Loss& p, const LossGradients& g, int64_t row,
                                   int64_t label) {
  float dy = g.dy[g.per_row ? row : 0];
  if (g.divisor) dy /= *g.divisor;
  const float max = p.stats[row], log_sum = p.stats[p.M + row];
  const float scale = p.is_valid(label) ? dy * p.weight_of(label) : 0.f;
  return {scale * (1.f - p.smoothing),
          dy * p.smoothing / p.V,
          2.f * p.z_loss * scale * (max + log_sum) + (g.dlse ? g.dlse[row] : 0.f),
          p.stats[2 * p.M + row],
          max,
          log_sum};
}

// Four blocks must fit a multiprocessor, or there would be few loads on their way. A thread's packs
// share what it reads of the row.
constexpr int kSegmentThreads = 256, kSegmentPacks = 2;

template <typename T, int kVec>
__global__ void __launch_bounds__(kSegmentThreads, 4)
    cross_entropy_backward_kernel(const T* __restrict__ x, T* __restrict__ dx, LossGradients g,
                                  unsigned segments, Loss p) {
  const int64_t row = int64_t(blockIdx.x / segments) * blockDim.y + threadIdx.y;
  if (row >= p.M) return;
  const int64_t label = p.target[row];
  const bool is_kept = label != p.ignore_index;
  const Slopes s = is_kept ? slopes_of(p, g, row, label) : Slopes{};
  const int64_t step = blockDim.x * kVec;
  const int64_t begin = (blockIdx.x % segments) * step * kSegmentPacks + threadIdx.x * kVec;
  x += row * p.V + begin;
  dx += row * p.V + begin;
  const auto each_pack = [&](auto visit) {
#pragma unroll
    for (int i = 0; i < kSegmentPacks; ++i)
      if (begin + i * step < p.V) visit(i, i * step);
  };
  float values[kSegmentPacks][kVec] = {};  // 0 stands in ignored rows, which are not read
  if (is_kept) {
    each_pack([&](int i, int64_t at) { load(values[i], x + at); });
    each_pack([&](int i, int64_t at) { s.apply(values[i], begin + at, label, p); });
  }
  each_pack([&](int i, int64_t at) { store(dx + at, values[i]); });
}

// Blocks of a cluster have 16384 elements each, or more where there are no more blocks to be had.
inline RowTiling loss_tiling(int64_t V, int max_cluster) {
  RowTiling tiling = row_tiling(V, kLossThreads, 1);
  while (tiling.blocks < std::min(max_cluster, 8) && V > 16384 * int64_t(tiling.blocks))
    tiling.blocks *= 2;
  return tiling;
}

template <typename T, int kVec, typename Stream>
void launch_cross_entropy_forward(const T* x, const LossOutputs& out, const Loss& p,
                                  int max_cluster, Stream stream) {
  const RowTiling tiling = loss_tiling(p.V, max_cluster);
  LAUNCH_CLUSTER((cross_entropy_forward_kernel<T, kVec>), tiling.grid(p.M), tiling.block(),
                 tiling.blocks, 0, stream, x, out, p, tiling);
}

template <typename T, int kVec, typename Stream>
void launch_cross_entropy_backward(const T* x, T* dx, const LossGradients& g, const Loss& p,
                                   Stream stream) {
  int wide = 32;
  while (wide < kSegmentThreads && wide * kVec * kSegmentPacks < p.V) wide *= 2;
  const int64_t segment = int64_t(wide) * kVec * kSegmentPacks, rows = kSegmentThreads / wide;
  const int64_t segments = (p.V + segment - 1) / segment;
  const dim3 grid(unsigned((p.M + rows - 1) / rows * segments)), block(wide, unsigned(rows));
  LAUNCH((cross_entropy_backward_kernel<T, kVec>), grid, block, stream, x, dx, g,
         unsigned(segments), p);
}

template <typename T, typename Stream>
void cross_entropy_forward_rows(const T* x, const LossOutputs& out, const Loss& p, int max_cluster,
                                Stream stream) {
  if (!p.M) return;
  if (rows_aligned<T>(p.V, x, p.weight))
    launch_cross_entropy_forward<T, kFullVec<T>>(x, out, p, max_cluster, stream);
  else
    launch_cross_entropy_forward<T, 1>(x, out, p, max_cluster, stream);
}

template <typename Stream>
void cross_entropy_total(const float* losses, float* total, float* divisor, bool is_mean,
                         const Loss& p, Stream stream) {
  LAUNCH(cross_entropy_total_kernel, dim3(1), dim3(kTotalThreads), stream, losses, total, divisor,
         is_mean, p);
}

template <typename T, typename Stream>
void cross_entropy_backward_rows(const T* x, T* dx, const LossGradients& g, const Loss& p,
                                 Stream stream) {
  if (rows_aligned<T>(p.V, x, dx, p.weight))
    launch_cross_entropy_backward<T, kFullVec<T>>(x, dx, g, p, stream);
  else
    launch_cross_entropy_backward<T, 1>(x, dx, g, p, stream);
}

}  // namespace slimkernels
