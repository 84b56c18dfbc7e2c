// dk and dv of attention_sm90_backward.cuh, and dq if that is asked for: a block has a tile of keys
// and walks queries.
#pragma once
#include "attention_sm90_backward_sums.cuh"

namespace slimkernels {

template <typename Element, int kD, bool kWithDq>
struct KeyGradientTile {
  using T = Element;
  static constexpr int kWidth = kD;
  static constexpr bool kHasDq = kWithDq;
  static constexpr int kGroups = 2;
  // dk and dv of 64 keys 256 wide fill a thread's registers: there one group has dk, the other dv.
  static constexpr bool kIsSplit = kD == 256;
  static constexpr int kOwn = kIsSplit ? 64 : 64 * kGroups;  // keys
  static constexpr int kWalked = 64;                         // queries
  static constexpr int kStages = kIsSplit || (kHasDq && kD == 128) ? 2 : 3;
  static constexpr int kStatistics = 2;  // lse and delta
  static constexpr int kDqBytes =
      kHasDq ? kDqBuffers * (tile_bytes(kOwn, kWalked) + kWalked * kWidth * 4) : 0;
  static constexpr int kFillers = 2;  // of a stage: loads, and the producer's rows
  static constexpr int kThreads = kWarpGroup * (kGroups + 1);
  // Of the 168 a thread that 384 threads start with.
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static_assert(fits_registers(kGroups, kProducerRegisters, kConsumerRegisters));
};

// One warp's.
template <typename Tile>
struct KeyGradientProducer {
  const AttentionBackwardArguments& arguments;
  WalkProducer<Tile> producer;

  static constexpr int kRows = Tile::kWalked / 32;  // a lane's

  // lse and delta of the tile's queries; those of absent ones, which are hidden, must be finite.
  __device__ void copy_rows(const KeyGradientWork& work, int head, int tile, int stage) {
    const SequencePlace& place = work.place;
    const int first = tile * Tile::kWalked + threadIdx.x % 32;
    // In 32 bits, as there are at most 2^29: a register less.
    const int plane = place.batch * arguments.shape.heads + head;
    const int at = plane * arguments.shape.Tq + place.k_begin + first;
    float lse[kRows], delta[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const bool is_present = first + 32 * i < place.k_seen;
      lse[i] = is_present ? arguments.lse[at + 32 * i] : 0.f;
      delta[i] = is_present ? arguments.delta[at + 32 * i] : 0.f;
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      producer.shared.statistic(0, stage)[threadIdx.x % 32 + 32 * i] = lse[i];
      producer.shared.statistic(1, stage)[threadIdx.x % 32 + 32 * i] = delta[i];
    }
  }

  // Two arrivals: that of the tiles, and that of the rows, which all lanes have stored by then.
  __device__ void load_queries(const KeyGradientWork& work, int head, int tile) {
    const int stage = producer.place.stage(Tile::kStages);
    const int first = tile * Tile::kWalked;
    const bool is_cut =
        has_foreign_tail(mirrored(arguments.shape), work.place, tile, Tile::kWalked);
    producer.load_walked({work.place.k_begin + first, head, work.place.batch}, is_cut);
    __syncwarp();  // the stage is empty, as the first lane knows
    copy_rows(work, head, tile, stage);
    __syncwarp();
    producer.finish_walked(is_cut, work.place.k_seen - first);
    if (is_first_lane()) mbarrier_arrive(&producer.shared.barriers().ring.full[stage]);
  }

  __device__ void operator()(const KeyGradientWork& work) {
    if (work.queries.begin == work.queries.end) return;
    // dq is a sum over keys, so that others' may not be NaN.
    const bool is_cut = Tile::kHasDq && work.seen < Tile::kOwn;
    producer.load_own({work.place.q_begin + work.tile.first, work.tile.head, work.place.batch},
                      is_cut, work.seen);
    const AttentionShape turned = mirrored(arguments.shape);
    const int tiles = work.queries.end - work.queries.begin;
    const int first = work.tile.head * arguments.shape.group;
    for (int head = first; head < first + arguments.shape.group; ++head)
      for (int n = 0; n < tiles; ++n)
        load_queries(work, head, visited_tile(turned, work.queries, n));
  }
};

// One consumer warpgroup's: 64 keys, which are the rows of all its products.
template <typename Tile>
struct KeyGradientConsumer {
  using T = typename Tile::T;
  static constexpr int kScores = Tile::kWalked / 2, kOutputs = Tile::kWidth / 2;  // a thread's
  static constexpr int kSteps = Tile::kWalked / 16;

  const AttentionBackwardArguments& arguments;
  int group;  // among the consumers
  WalkShared<Tile> shared;
  RingPlace place;

  // Of its keys, in the tile.
  __device__ int own_row() const { return Tile::kIsSplit ? 0 : group * 64; }

  __device__ void free_stage(int stage) {
    __syncwarp();  // all lanes have read the stage's lse and delta, which no wgmma waits for
    release(&shared.barriers().ring.empty[stage]);
  }

  // Of this thread's first column of the stage's queries.
  __device__ OfColumns statistic(int which, int stage) const {
    return {shared.statistic(which, stage) + first_column()};
  }

  // From products to P times the slope, and to P as an operand.
  __device__ void probabilities(float (&s)[kScores], uint32_t (&p)[kSteps][4],
                                const KeyGradientWork& work, int stage, int tile) {
    const AttentionShape shape = mirrored(arguments.shape);
    weigh(s, arguments.scale, arguments.softcap, statistic(0, stage),
          [&](int word, float low, float high) {
            p[word / 4][word % 4] = narrow_pair(low, high, T{});
          });
    const auto hide = [&](int i) {
      s[i] = 0.f;
      p[i / 8][i / 2 % 4] &= i % 2 ? 0x0000ffffu : 0xffff0000u;
    };
    const int first = work.tile.first + own_row();
    const int keys[2] = {first + first_row(), first + first_row() + 8};
    if (is_edge(shape, work.place, first, 64, tile, Tile::kWalked))
      each_hidden<kScores>(shape, work.place, keys, tile, hide);
    if constexpr (Tile::kHasDq) {  // an absent key is 0, but P of it may be infinite
      if (own_row() + 64 <= work.seen) return;
#pragma unroll
      for (int i = 0; i < kScores; ++i)
        if (keys[row_of_element(i)] >= work.tile.first + work.seen) hide(i);
    }
  }

  // dk and dv, or one of them. dp runs under this group's exponentials, dv under its dS, and dk
  // while dq is handed over. dk is waited for, though the next scores could be issued behind it:
  // ptxas has no registers for ds beside them (C7512). The other group's products fill the gap.
  template <bool kHasDk, bool kHasDv>
  __device__ void walk(float (&dk)[kOutputs], float (&dv)[kOutputs], const KeyGradientWork& work) {
    float s[kScores], dp[kScores];
    uint32_t p[kSteps][4], ds[kSteps][4];
    mbarrier_wait(&shared.barriers().own, 0);
    const AttentionShape turned = mirrored(arguments.shape);
    const int tiles = work.queries.end - work.queries.begin;
    for (int left = tiles * arguments.shape.group, n = 0; left > 0; --left) {
      const int tile = visited_tile(turned, work.queries, n);
      const int stage = place.stage(Tile::kStages);
      const DqConsumer<Tile> of_dq = {shared, group, place};
      shared.barriers().ring.wait_full(place);
      ++place.passed;
      wgmma_fence();
      issue_own(s, shared, 0, own_row(), stage);
      if constexpr (kHasDk) issue_own(dp, shared, 1, own_row(), stage);
      wgmma_wait<kHasDk>();
      fence_registers(s);
      probabilities(s, p, work, stage, tile);
      if constexpr (kHasDv) issue_gradient<T>(dv, p, shared_address(shared.walked(1, stage)));
      if constexpr (kHasDk) {
        wgmma_wait<kHasDv>();
        fence_registers(dp);
        dscores<T>(ds, s, dp, statistic(1, stage));
        float dq[DqConsumer<Tile>::kOutputs];
        if constexpr (Tile::kHasDq) {
          of_dq.share(ds);
          of_dq.issue(dq);
        }
        issue_gradient<T>(dk, ds, shared_address(shared.walked(0, stage)));
        if constexpr (Tile::kHasDq) {
          wgmma_wait<1>();
          fence_registers(dq);
          of_dq.hand_over(dq);
        }
      }
      wgmma_wait<0>();
      fence_registers(dk);
      if constexpr (kHasDk && kHasDv) fence_registers(dv);
      fence_registers(p);
      fence_registers(ds);
      free_stage(stage);
      if (++n == tiles) n = 0;
    }
  }

  __device__ void store(float (&gradient)[kOutputs], void* start, int width, float factor,
                        const KeyGradientWork& work) {
    const AttentionShape shape = mirrored(arguments.shape);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = own_row() + first_row() + 8 * r;
      // A key past its length may be NaN; it has no gradient.
#pragma unroll
      for (int e = 0; e < kOutputs; ++e)
        if (row_of_element(e) == r && i >= work.seen) gradient[e] = 0.f;
      const int64_t row = row_of(shape, shape.heads, work.place.batch, work.tile.head,
                                 work.place.q_begin + work.tile.first + i);
      store_row(static_cast<T*>(start) + row * width, width, gradient, r, factor, i < work.count);
    }
  }

  __device__ void store_dk(float (&dk)[kOutputs], const KeyGradientWork& work) {
    store(dk, arguments.dk, arguments.width, arguments.scale, work);
  }
  __device__ void store_dv(float (&dv)[kOutputs], const KeyGradientWork& work) {
    store(dv, arguments.dv, arguments.value_width, 1.f, work);
  }

  __device__ void operator()(const KeyGradientWork& work) {
    const bool is_seen = work.queries.begin < work.queries.end;
    float dk[kOutputs] = {};
    if constexpr (Tile::kIsSplit) {
      if (group == 0) {
        if (is_seen) walk<true, false>(dk, dk, work);
        store_dk(dk, work);
      } else {
        float (&dv)[kOutputs] = dk;
        if (is_seen) walk<false, true>(dv, dv, work);
        store_dv(dv, work);
      }
    } else {
      float dv[kOutputs] = {};
      if (is_seen) walk<true, true>(dk, dv, work);
      store_dk(dk, work);
      store_dv(dv, work);
    }
  }
};

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    attention_sm90_dkdv_kernel(const __grid_constant__ TensorMap q_map,
                               const __grid_constant__ TensorMap k_map,
                               const __grid_constant__ TensorMap v_map,
                               const __grid_constant__ TensorMap dy_map,
                               const __grid_constant__ AttentionBackwardArguments arguments) {
#ifdef SLIM_HOPPER
  const WalkShared<Tile> shared;
  int index = blockIdx.x;
  if constexpr (Tile::kHasDq)
    if (threadIdx.x == 0) shared.barriers().work = atomicAdd(arguments.taken, 1);
  set_up(shared.barriers(), q_map, k_map, v_map, dy_map);
  if constexpr (Tile::kHasDq) index = shared.barriers().work;
  const KeyGradientWork work = key_gradient_work<Tile>(arguments, index);
  if (work.count <= 0) return;  // a tile that ragged sequences leave over
  in_roles<Tile>(
      [&] {
        KeyGradientProducer<Tile>{arguments, {shared, {&k_map, &v_map}, {&q_map, &dy_map}}}(work);
      },
      [&](int group) { KeyGradientConsumer<Tile>{arguments, group, shared}(work); },
      [&](int warp) {
        if constexpr (Tile::kHasDq) DqAdder<Tile>{arguments, shared, warp}(work);
      });
#else
  __trap();
#endif
}

}  // namespace slimkernels
