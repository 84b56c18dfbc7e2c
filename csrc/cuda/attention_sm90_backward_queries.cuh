// dq of attention_sm90_backward.cuh: a block has a tile of queries and walks keys.
#pragma once

namespace slimkernels {

template <typename Element, int kD>
struct QueryGradientTile {
  using T = Element;
  static constexpr int kWidth = kD;
  static constexpr int kGroups = 2;
  static constexpr int kOwn = 64 * kGroups;  // queries
  // Keys: of 128, ptxas would run short of registers where heads are 128 wide; two stages of more
  // than 48 would not fit beside 256 wide queries.
  static constexpr int kWalked = kD == 64 ? 128 : kD == 128 ? 96 : 48;
  static constexpr int kStages = kD == 256 ? 2 : 3;
  static constexpr int kStatistics = 0, kFillers = 1, kDqBytes = 0;
  static constexpr int kThreads = kWarpGroup * (kGroups + 1);
  // Of the 168 a thread that 384 threads start with.
  static constexpr int kProducerRegisters = kD == 256 ? 24 : 40;
  static constexpr int kConsumerRegisters = kD == 256 ? 240 : 232;
  static_assert(fits_registers(kGroups, kProducerRegisters, kConsumerRegisters));
};

// One warp's.
template <typename Tile>
struct QueryGradientProducer {
  const AttentionShape& shape;
  WalkProducer<Tile> producer;

  __device__ void operator()(const AttentionWork& work) {
    const SequencePlace& place = work.place;
    if (work.keys.begin == work.keys.end) return;
    producer.load_own({place.q_begin + work.tile.first, work.tile.head, place.batch});
    for (int tile = work.keys.begin; tile < work.keys.end; ++tile) {
      const int first = tile * Tile::kWalked;
      const bool is_cut = has_foreign_tail(shape, place, tile, Tile::kWalked);
      producer.load_walked({place.k_begin + first, work.tile.head / shape.group, place.batch},
                           is_cut);
      producer.finish_walked(is_cut, place.k_seen - first);
    }
  }
};

// One consumer warpgroup's: 64 queries, which are the rows of all its products.
template <typename Tile>
struct QueryGradientConsumer {
  using T = typename Tile::T;
  static constexpr int kScores = Tile::kWalked / 2, kOutputs = Tile::kWidth / 2;  // a thread's
  static constexpr int kSteps = Tile::kWalked / 16;

  const AttentionBackwardArguments& arguments;
  int group;  // among the consumers
  WalkShared<Tile> shared;
  RingPlace place;

  // This thread's rows; absent ones have no P.
  __device__ void load_rows(OfRows& lse, OfRows& delta, const AttentionWork& work) {
    const AttentionShape& shape = arguments.shape;
    const int64_t plane = int64_t(work.place.batch) * shape.heads + work.tile.head;
    const int64_t at = plane * shape.Tq + work.place.q_begin + work.tile.first;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = group * 64 + first_row() + 8 * r;
      lse.rows[r] = i < work.count ? arguments.lse[at + i] : INFINITY;
      delta.rows[r] = i < work.count ? arguments.delta[at + i] : 0.f;
    }
  }

  __device__ void walk(float (&dq)[kOutputs], const AttentionWork& work) {
    const AttentionShape& shape = arguments.shape;
    WalkBarriers<Tile>& barriers = shared.barriers();
    float s[kScores], dp[kScores];
    uint32_t ds[kSteps][4] = {};
    OfRows lse, delta;
    load_rows(lse, delta, work);
    mbarrier_wait(&barriers.own, 0);
    const int first = work.tile.first + group * 64;
    int last = -1;  // stage whose keys dq may still read
    for (int tile = work.keys.begin; tile < work.keys.end; ++tile) {
      const int stage = place.stage(Tile::kStages);
      barriers.ring.wait_full(place);
      ++place.passed;
      wgmma_fence();
      issue_own(s, shared, 0, group * 64, stage);
      issue_own(dp, shared, 1, group * 64, stage);
      wgmma_wait<1>();
      fence_registers(s);
      fence_registers(ds);
      if (last >= 0) release(&barriers.ring.empty[last]);
      weigh(s, arguments.scale, arguments.softcap, lse, [](int, float, float) {});
      if (is_edge(shape, work.place, first, 64, tile, Tile::kWalked)) {
        const int queries[2] = {first + first_row(), first + first_row() + 8};
        each_hidden<kScores>(shape, work.place, queries, tile, [&](int i) { s[i] = 0.f; });
      }
      wgmma_wait<0>();
      fence_registers(dp);
      dscores<T>(ds, s, dp, delta);
      issue_gradient<T>(dq, ds, shared_address(shared.walked(0, stage)));
      last = stage;
    }
    wgmma_wait<0>();
    fence_registers(dq);
    fence_registers(ds);
  }

  __device__ void operator()(const AttentionWork& work) {
    float dq[kOutputs] = {};
    if (work.keys.begin < work.keys.end) walk(dq, work);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = group * 64 + first_row() + 8 * r;
      store_row(dq_row<T>(arguments, work, i), arguments.width, dq, r, arguments.dq_scale,
                i < work.count);
    }
  }
};

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    attention_sm90_dq_kernel(const __grid_constant__ TensorMap q_map,
                             const __grid_constant__ TensorMap k_map,
                             const __grid_constant__ TensorMap v_map,
                             const __grid_constant__ TensorMap dy_map,
                             const __grid_constant__ AttentionBackwardArguments arguments) {
#ifdef SLIM_HOPPER
  const WalkShared<Tile> shared;
  set_up(shared.barriers(), q_map, k_map, v_map, dy_map);
  const AttentionShape& shape = arguments.shape;
  const QueryTile tile = listed_tile(shape, arguments.section, blockIdx.x, Tile::kOwn);
  const AttentionWork work = attention_work(shape, tile, Tile::kOwn, Tile::kWalked);
  if (work.count <= 0) return;  // a tile that ragged sequences leave over
  in_roles<Tile>(
      [&] {
        QueryGradientProducer<Tile>{shape, {shared, {&q_map, &dy_map}, {&k_map, &v_map}}}(work);
      },
      [&](int group) { QueryGradientConsumer<Tile>{arguments, group, shared}(work); });
#else
  __trap();
#endif
}

}  // namespace slimkernels
