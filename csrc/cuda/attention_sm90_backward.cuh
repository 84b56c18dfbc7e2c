// The gradients of attention on Hopper. With P the probabilities and dP = dy @ v^T:
//
//     dv = P^T @ dy    dS = P * (dP - delta)    dq = scale * dS @ k    dk = scale * dS^T @ q
//     delta = rowsum(P * dP) - dlse = rowsum(dy * y) - dlse
//
// softcap's slope multiplies dS on its way to dq and dk.
//
// Tiling   Three launches. attention_delta_kernel: 8 or 16 lanes a row. dk, dv
//          (attention_sm90_backward_keys.cuh): a block has a tile of keys of one key head and walks
//          the queries of every head that reads it. dq (attention_sm90_backward_queries.cuh): a
//          block has a tile of queries and walks the keys. In both a producer warp loads the tiles
//          that are walked through a ring of stages, by TMA, and each of two consumer warpgroups
//          has 64 rows of the block's tile. Scores and dP come with the rows of the result as rows
//          (transposed for dk and dv), so that P and dS stay in the registers that their next
//          product reads: nothing but loads goes through shared memory.
// Writers  Every result has one, so there are no atomics, no sums in memory and no waiting for
//          other blocks, and bits are the same on every run; for that the two walks take 7 products
//          a pair of tiles. One walk takes 5, but must write dS to shared memory and add dq up in
//          global memory, in float32 and in a fixed order: blocks wait for one another, by rules
//          that a test on a CPU cannot try. docs/attention.md has what that costs and saves.
// Traffic  dk, dv: k, v once, q and dy once a tile of keys. dq: q, dy once, k and v once a tile of
//          queries. Both mostly from L2. The roof is the tensor cores: 14 * D operations a score.
// Numerics P comes from lse, in base 2 and rounded to float32, and delta from y as it was rounded:
//          below the roundings of P and dS to the operands' dtype. All sums are float32.
// Masks    As the forward's (attention_tiles.cuh): only tiles at an edge compare. A query that sees
//          nothing or is past the end has an lse of +inf here, so that its P is 0. What follows the
//          last query or key of the tiles that are walked, and belongs to another sequence, is
//          overwritten with zeros.
// Launch   One tile a block, the heaviest first: what a block waits for at its start is small
//          beside a tile, and the hardware gives the next one to whoever is free. 384 threads, 83
//          to 209 KiB of dynamic shared memory. sm_90a only.
#pragma once
#include "attention_sm90.cuh"

namespace slimkernels {

struct AttentionBackwardArguments {
  AttentionShape shape;
  int section;             // heads that share L2, of this kernel's tiles
  float scale;             // of q @ k^T; above 0
  float dq_scale;          // the same but for the sign that went into q
  float softcap;           // 0: none
  int width, value_width;  // columns of dq and dk, and of dv; multiples of 8
  const float* lse;        // as AttentionRows has them; (B, H, Tq), or (H, Tq) of ragged sequences
  const float* delta;
  void *dq, *dk, *dv;  // (B, heads, T, width), or (T, heads, width)
};

// What is known of a row.
struct AttentionRows {
  const void *dy, *y;                   // any strides; without gaps
  int64_t dy_batch, dy_head, dy_token;  // of dy, in elements
  const float *lse, *lse_low, *dlse;    // the forward's, and the gradient of lse or null
  float *base2, *delta;                 // lse in base 2, +inf for rows that see nothing
  int64_t rows;
  int heads, Tq, width;
  bool is_ragged;
};

constexpr int kDeltaThreads = 256;

// Lanes of 16 bytes each that share a row.
__host__ __device__ inline int delta_lanes(int width) { return width <= 64 ? 8 : 16; }

template <typename T>
__global__ void __launch_bounds__(kDeltaThreads) attention_delta_kernel(AttentionRows x) {
  const int lanes = delta_lanes(x.width), column = threadIdx.x % lanes * 8;
  const int64_t row = int64_t(blockIdx.x) * (kDeltaThreads / lanes) + threadIdx.x / lanes;
  const bool is_present = row < x.rows;
  // Rows as y has them: (batch, head, token), or (token, head).
  const int64_t outer = row / (x.is_ragged ? x.heads : x.Tq);
  const int inner = int(row % (x.is_ragged ? x.heads : x.Tq));
  const int64_t head = x.is_ragged ? inner : outer % x.heads;
  const int64_t token = x.is_ragged ? outer : inner;
  const int64_t batch = x.is_ragged ? 0 : outer / x.heads;
  float sum = 0.f;
  if (is_present && column < x.width) {
    const int64_t at = batch * x.dy_batch + head * x.dy_head + token * x.dy_token + column;
    float dy[8], y[8];
    load(dy, static_cast<const T*>(x.dy) + at);
    load(y, static_cast<const T*>(x.y) + row * x.width + column);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = fmaf(dy[i], y[i], sum);
  }
  sum = warp_reduce(sum, combine_sum, lanes);
  if (!is_present || column > 0) return;
  const int64_t at = (batch * x.heads + head) * x.Tq + token;
  const bool is_empty = x.lse[at] == -INFINITY;
  x.base2[at] = is_empty ? INFINITY : fmaf(x.lse[at], kLog2E, x.lse_low[at] * kLog2E);
  x.delta[at] = is_empty ? 0.f : sum - (x.dlse == nullptr ? 0.f : x.dlse[at]);
}

// What both walks do with scores.

// A statistic of the two elements of a word (pack_pair's) where queries are columns, and where they
// are this thread's rows.
struct OfColumns {
  const float* at;  // this thread's first column

  __device__ float2 operator()(int word) const {
    return *reinterpret_cast<const float2*>(at + word / 2 * 8);
  }
};
struct OfRows {
  float rows[2];

  __device__ float2 operator()(int word) const { return {rows[word % 2], rows[word % 2]}; }
};

// Products become P, which `keep` is shown by the word, and then P times softcap's slope. A product
// of -inf is hidden.
template <int kCount, typename Statistic, typename Keep>
__device__ void weigh(float (&s)[kCount], float scale, float softcap, const Statistic& lse,
                      const Keep& keep) {
  if (softcap > 0) {
    const float inner = scale / softcap, outer = softcap * kLog2E;
#pragma unroll
    for (int word = 0; word < kCount / 2; ++word) {
      const float2 known = lse(word);
      float p[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = s[2 * word + e];
        const float t = tanh_of(x * inner);
        p[e] = exp2_approximate(fmaf(t, outer, -(e ? known.y : known.x)));
        if (x == -INFINITY) p[e] = 0.f;
        // Cancels where t is almost 1, by 1e-3 at 0.9999; a slope of its own does not fit in dq's
        // registers.
        x = p[e] * fmaf(-t, t, 1.f);
      }
      keep(word, p[0], p[1]);
    }
  } else {
    const float factor = scale * kLog2E;
#pragma unroll
    for (int word = 0; word < kCount / 2; ++word) {
      const float2 known = lse(word);
      float &low = s[2 * word], &high = s[2 * word + 1];
      low = exp2_approximate(fmaf(low, factor, -known.x));
      high = exp2_approximate(fmaf(high, factor, -known.y));
      keep(word, low, high);
    }
  }
}

// dS, rounded: an A operand of the next product.
template <typename T, int kCount, typename Statistic>
__device__ void dscores(uint32_t (&ds)[kCount / 8][4], const float (&p)[kCount],
                        const float (&dp)[kCount], const Statistic& delta) {
#pragma unroll
  for (int word = 0; word < kCount / 2; ++word) {
    const float2 known = delta(word);
    const int i = 2 * word;
    ds[word / 4][word % 4] =
        pack_pair<T>(p[i] * (dp[i] - known.x), p[i + 1] * (dp[i + 1] - known.y));
  }
}

// This thread's first row of its warpgroup's 64, the other being 8 below; and its first column.
__device__ inline int first_row() {
  return threadIdx.x % kWarpGroup / 32 * 16 + threadIdx.x % 32 / 4;
}
__device__ inline int first_column() { return threadIdx.x % 4 * 2; }

// Hides what this thread's rows, from `row` on in `place`, do not see of column tile `tile`.
template <int kCount>
__device__ void hide_edge(float (&s)[kCount], const AttentionShape& shape,
                          const SequencePlace& place, int row, int tile, int columns) {
  KeyRange seen[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    seen[r] = keys_of_query(shape, place, row + 8 * r);
    seen[r].first -= tile * columns + first_column();
    seen[r].end -= tile * columns + first_column();
  }
  hide_scores(s, seen);
}

// Both operands in shared memory, kWidth columns each: d = a[row ...] @ b^T.
template <typename T, int kWidth, int kCount>
__device__ void issue_transposed(float (&d)[kCount], uint32_t a, int a_rows, int row, uint32_t b) {
#pragma unroll
  for (int k = 0; k < kWidth; k += 16)
    wgmma<T, kK, kK>(d, operand_k(a, a_rows, row, k), operand_k(b, 2 * kCount, 0, k), k > 0);
  wgmma_commit();
}

// d += a @ b, b's rows one for each column of a.
template <typename T, int kCount, int kSteps>
__device__ void issue_added(float (&d)[kCount], uint32_t (&a)[kSteps][4], uint32_t b) {
  fence_registers(a);  // else ptxas fences again between the steps, to pack there: C7519
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
    wgmma<T, kMN>(d, a[step], operand_mn(b, 16 * kSteps, 0, 16 * step), true);
  wgmma_commit();
}

// Where row `token` of `head` begins, of `width` columns.
template <typename T>
__device__ T* row_of(void* start, const AttentionShape& shape, int batch, int head, int64_t token,
                     int width) {
  const bool is_ragged = shape.cu_seqlens_q != nullptr;
  const int64_t plane = int64_t(batch) * shape.heads + head;
  return static_cast<T*>(start) +
         (is_ragged ? token * shape.heads + head : plane * shape.Tq + token) * width;
}

}  // namespace slimkernels

#include "attention_sm90_backward_keys.cuh"
#include "attention_sm90_backward_queries.cuh"
