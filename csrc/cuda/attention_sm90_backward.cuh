// The gradients of attention on Hopper. With P the probabilities and dP = dy @ v^T:
//
//     dv = P^T @ dy    dS = P * (dP - delta)    dq = scale * dS @ k    dk = scale * dS^T @ q
//     delta = rowsum(P * dP) - dlse = rowsum(dy * y) - dlse
//
// softcap's slope multiplies dS on its way to dq and dk.
//
// Tiling   One walk makes all three, of heads up to 128 wide: a block has a tile of keys of one key
//          head and walks the queries of every head that reads it
//          (attention_sm90_backward_keys.cuh). Its share of a tile's dq goes to float32 sums in
//          global memory (attention_sm90_backward_sums.cuh). Scores and dP come with keys as rows,
//          so that P and dS stay in the registers that dv and dk read; dS goes through shared
//          memory for dq, too. Launches: attention_delta_kernel, 8 to 32 lanes a row; the walk;
//          attention_dq_kernel, which rounds the sums. Two walks: heads 256 wide, whose dk and dv
//          leave a thread no register for dq, and calls that want no dq, or neither dk nor dv. One
//          makes dk and dv as above, the other dq: a block has a tile of queries and walks keys
//          (attention_sm90_backward_queries.cuh). In all a producer warp loads the tiles that are
//          walked through a ring of stages, by TMA, and each of two consumer warpgroups has 64 rows
//          of the block's tile; of keys 256 wide both have the same 64, and one makes their dk, the
//          other their dv.
// Order    dk and dv have one writer each, and so has dq of two walks. Of one walk, blocks add to a
//          tile of dq in turns, whose order is that in which they took their work: bits are the
//          same on every run, and a block waits only for blocks that have started.
// Traffic  One walk: k, v once; a tile of keys, q and dy once, and dq's sums read and written in
//          L2. 10 * D operations a score. Two: k, v, q, dy twice, mostly from L2; 14 * D, or
//          16 * D of heads 256 wide. The roof is the tensor cores.
// Numerics P comes from lse, in base 2 and rounded to float32, and delta from y as it was rounded:
//          below the roundings of P and dS to the operands' dtype. All sums are float32.
// Masks    As the forward's (attention_tiles.cuh): only tiles at an edge compare, and P of what is
//          hidden becomes 0. A query that sees nothing has an lse of +inf here. What follows the
//          last query or key of the tiles that are walked, and belongs to another sequence, is
//          overwritten with zeros.
// Launch   One tile a block, the heaviest first: what a block waits for at its start is small
//          beside a tile, and the hardware gives the next one to whoever is free. 384 threads, 83
//          to 226 KiB of dynamic shared memory. sm_90a only.
#pragma once
#include "attention_sm90_parts.cuh"

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
  // Of one walk: a tile of dq's sums for each tile_number(), how many tiles of keys are in it, and
  // how many blocks have taken their work.
  float* sums;
  int *turns, *taken;
};

// What is known of a row.
struct AttentionRows {
  const void *dy, *y;                   // any strides; without gaps
  int64_t dy_batch, dy_head, dy_token;  // of dy, in elements
  const float *lse, *lse_low, *dlse;    // the forward's, and the gradient of lse or null
  float *base2, *delta;                 // lse in base 2, +inf for rows that see nothing
  int* counters;                        // to be set to 0
  int64_t rows, counter_count;
  int heads, Tq, width;
  bool is_ragged;
};

// Any whole number of warps would do: the kernel waits for memory, and eight warps a block let a
// multiprocessor fill itself with few blocks.
constexpr int kDeltaThreads = 256;

// Lanes of 16 bytes each that share a row.
__host__ __device__ inline int delta_lanes(int width) {
  return width <= 64 ? 8 : width <= 128 ? 16 : 32;
}

template <typename T>
__global__ void __launch_bounds__(kDeltaThreads) attention_delta_kernel(AttentionRows x) {
  const int lanes = delta_lanes(x.width), column = threadIdx.x % lanes * 8;
  const int64_t row = int64_t(blockIdx.x) * (kDeltaThreads / lanes) + threadIdx.x / lanes;
  const bool is_present = row < x.rows;
  const int64_t step = int64_t(gridDim.x) * kDeltaThreads;
  for (int64_t i = int64_t(blockIdx.x) * kDeltaThreads + threadIdx.x; i < x.counter_count;
       i += step)
    x.counters[i] = 0;
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

// What all walks do with scores.

// A statistic of the two elements of a word (narrow_pair's) where queries are columns, and where
// they are this thread's rows.
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

template <int kCount, typename Statistic, typename Keep>
__device__ void weigh_capped(float (&s)[kCount], float scale, float softcap, const Statistic& lse,
                             const Keep& keep) {
  const float inner = scale / softcap, outer = softcap * kLog2E;
  int bits;
  memcpy(&bits, &softcap, sizeof bits);
  bool is_capped = true;
#pragma unroll
  for (int word = 0; word < kCount / 2; ++word) {
    // Four words a branch that is always taken, as the compiler does not know: side by side, as
    // ptxas would have them, all words need more registers than there are.
    if (word % 4 == 0) {
      asm volatile("" : "+r"(bits));
      is_capped = bits > 0;
    }
    if (!is_capped) continue;
    const float2 known = lse(word);
    float p[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float& x = s[2 * word + e];
      const float capped = x * inner, gap = tanh_gap(capped);
      p[e] = exp2_approximate(fmaf(tanh_of(capped, gap), outer, -(e ? known.y : known.x)));
      x = p[e] * fmaf(-gap, gap, 2.f * gap);  // 1 - tanh^2 would cancel where tanh is almost 1
    }
    keep(word, p[0], p[1]);
  }
}

// Products become P, which `keep` is shown by the word, and then P times softcap's slope; P of what
// is hidden is set to 0 after.
template <int kCount, typename Statistic, typename Keep>
__device__ void weigh(float (&s)[kCount], float scale, float softcap, const Statistic& lse,
                      const Keep& keep) {
  if (softcap > 0) return weigh_capped(s, scale, softcap, lse, keep);
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

// dS, rounded: an A operand of the next product. `weights`: what weigh() left.
template <typename T, int kCount, typename Statistic>
__device__ void dscores(uint32_t (&ds)[kCount / 8][4], const float (&weights)[kCount],
                        const float (&dp)[kCount], const Statistic& delta) {
#pragma unroll
  for (int word = 0; word < kCount / 2; ++word) {
    const float2 known = delta(word);
    const int i = 2 * word;
    ds[word / 4][word % 4] =
        narrow_pair(weights[i] * (dp[i] - known.x), weights[i + 1] * (dp[i + 1] - known.y), T{});
  }
}

// d += a @ b, beside products that are under way.
template <typename T, int kCount, int kSteps>
__device__ void issue_gradient(float (&d)[kCount], uint32_t (&a)[kSteps][4], uint32_t b) {
  fence_registers(a);  // else ptxas fences again between the steps, to pack there: C7519
  wgmma_fence();
  issue_added<T>(d, a, b);
}

// The i-th row of a tile's dq.
template <typename T>
__device__ T* dq_row(const AttentionBackwardArguments& arguments, const AttentionWork& work,
                     int i) {
  const AttentionShape& shape = arguments.shape;
  const int64_t row = row_of(shape, shape.heads, work.place.batch, work.tile.head,
                             work.place.q_begin + work.tile.first + i);
  return static_cast<T*>(arguments.dq) + row * arguments.width;
}

// A tile of keys: all is of the mirrored call, but for `seen`.
struct KeyGradientWork {
  QueryTile tile;
  SequencePlace place;
  int count;         // of its keys
  int seen;          // of those, not past key_lengths
  KeyTiles queries;  // none if nothing is seen
};

// The `index`-th of all.
template <typename Tile>
__device__ KeyGradientWork key_gradient_work(const AttentionBackwardArguments& arguments,
                                             int index) {
  KeyGradientWork work;
  const AttentionShape shape = mirrored(arguments.shape);
  work.tile = listed_tile(shape, arguments.section, index, Tile::kOwn);
  work.place = mirrored_place(arguments.shape, work.tile.sequence);
  work.count = smaller(work.place.q_count - work.tile.first, Tile::kOwn);
  const int all_seen = place_of(arguments.shape, work.tile.sequence).k_seen;
  work.seen = smaller(all_seen - work.tile.first, work.count);
  work.queries = {0, 0};
  if (work.seen > 0)
    work.queries = key_tiles(shape, work.place, work.tile.first, work.seen, Tile::kWalked);
  return work;
}

// A walk. A block has its own rows of two tensors and walks tiles of the other two, through a ring:
// k and v against q and dy, or the other way round. Of its own rows' gradients nothing leaves the
// registers before the end.

constexpr int kDqBuffers = 2;  // of dS and of dq, where one walk makes all

template <typename Tile>
struct WalkBarriers {
  Mbarrier own, tail;
  RingBarriers<Tile::kStages> ring;
  RingBarriers<kDqBuffers> dq;
  int work;  // of all blocks'; for these two, too, see attention_sm90_backward_sums.cuh

  __device__ void init() {
    mbarrier_init(&own, 1);
    mbarrier_init(&tail, 1);
    ring.init(Tile::kFillers, 4 * Tile::kGroups);
    if constexpr (Tile::kDqBytes > 0) dq.init(4 * Tile::kGroups, 1);
  }
};

// A block's shared memory: its rows, the stages, kDqBytes for dq of one walk, kStatistics float32 a
// walked row, the barriers.
template <typename Tile>
struct WalkShared {
  static constexpr int kOwnBytes = tile_bytes(Tile::kOwn, Tile::kWidth);
  static constexpr int kWalkedBytes = tile_bytes(Tile::kWalked, Tile::kWidth);
  static constexpr int kDqAt = 2 * kOwnBytes + 2 * Tile::kStages * kWalkedBytes;
  static constexpr int kStatisticsAt = kDqAt + Tile::kDqBytes;
  static constexpr int kBarriersAt =
      kStatisticsAt + Tile::kStatistics * Tile::kStages * Tile::kWalked * 4;
  static constexpr int kBytes = kPanelAlignment + kBarriersAt + int(sizeof(WalkBarriers<Tile>));

  unsigned char* start = aligned_shared();

  __device__ unsigned char* own(int which) const { return start + which * kOwnBytes; }
  __device__ unsigned char* walked(int which, int stage) const {
    return start + 2 * kOwnBytes + (which * Tile::kStages + stage) * kWalkedBytes;
  }
  __device__ unsigned char* dq() const { return start + kDqAt; }
  __device__ float* statistic(int which, int stage) const {
    return reinterpret_cast<float*>(start + kStatisticsAt) +
           (which * Tile::kStages + stage) * Tile::kWalked;
  }
  __device__ WalkBarriers<Tile>& barriers() const {
    return *reinterpret_cast<WalkBarriers<Tile>*>(start + kBarriersAt);
  }
};

// Where rows begin in a tensor.
struct RowsAt {
  int token, head, batch;
};

// One warp's.
template <typename Tile>
struct WalkProducer {
  WalkShared<Tile> shared;
  const TensorMap *own[2], *walked[2];
  RingPlace place;
  Tail tail;

  // is_cut: rows from `present` on are another sequence's.
  __device__ void load_own(const RowsAt& at, bool is_cut = false, int present = 0) {
    WalkBarriers<Tile>& barriers = shared.barriers();
    if (is_first_lane()) {
      Mbarrier* const landed = is_cut ? &barriers.tail : &barriers.own;
      mbarrier_arrive_expect(landed, 2 * shared.kOwnBytes);
#pragma unroll
      for (int which = 0; which < 2; ++which)
        load_panels<Tile::kWidth>(shared.own(which), own[which], landed, Tile::kOwn, at.token,
                                  at.head, at.batch);
    }
    if (is_cut)
      tail.clear<Tile::kOwn, Tile::kWidth>(&barriers.tail, &barriers.own, present, shared.own(0),
                                           shared.own(1));
  }

  // Into the ring's next stage; then finish_walked().
  __device__ void load_walked(const RowsAt& at, bool is_cut) {
    if (!is_first_lane()) return;
    WalkBarriers<Tile>& barriers = shared.barriers();
    const int stage = place.stage(Tile::kStages);
    Mbarrier* const landed = is_cut ? &barriers.tail : &barriers.ring.full[stage];
    barriers.ring.wait_empty(place);
    mbarrier_arrive_expect(landed, 2 * shared.kWalkedBytes);
#pragma unroll
    for (int which = 0; which < 2; ++which)
      load_panels<Tile::kWidth>(shared.walked(which, stage), walked[which], landed, Tile::kWalked,
                                at.token, at.head, at.batch);
  }

  // Behind a cut tile's `present` rows are another sequence's.
  __device__ void finish_walked(bool is_cut, int present) {
    const int stage = place.stage(Tile::kStages);
    if (is_cut)
      tail.clear<Tile::kWalked, Tile::kWidth>(&shared.barriers().tail,
                                              &shared.barriers().ring.full[stage], present,
                                              shared.walked(0, stage), shared.walked(1, stage));
    ++place.passed;
  }
};

// What consumers of all walks issue: the products of their rows, from `row` of the block's on,
// with a stage's.
template <typename Tile, int kCount>
__device__ void issue_own(float (&d)[kCount], const WalkShared<Tile>& shared, int which, int row,
                          int stage) {
  issue_transposed<typename Tile::T, Tile::kWidth>(d, shared_address(shared.own(which)), Tile::kOwn,
                                                   row,
                                                   shared_address(shared.walked(which, stage)));
}

}  // namespace slimkernels

#include "attention_sm90_backward_keys.cuh"
#include "attention_sm90_backward_queries.cuh"
