// dq of attention_sm90_backward.cuh: a block has a tile of queries and walks keys.
#pragma once

namespace slimkernels {

template <typename Element, int kD>
struct QueryGradientTile {
  using T = Element;
  static constexpr int kWidth = kD;
  static constexpr int kGroups = 2;
  static constexpr int kM = 64 * kGroups;         // queries
  static constexpr int kN = kD == 64 ? 128 : 96;  // keys; of 128, ptxas would run short
  static constexpr int kStages = 3;
  static constexpr int kThreads = kWarpGroup * (kGroups + 1);
  // Of the 168 a thread that 384 threads start with.
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  static_assert(fits_registers(kGroups, kProducerRegisters, kConsumerRegisters));

  static constexpr int kQueryBytes = tile_bytes(kM, kD);
  static constexpr int kKeyBytes = tile_bytes(kN, kD);
  static constexpr int kBarriersAt = 2 * kQueryBytes + 2 * kStages * kKeyBytes;
};

template <typename Tile>
struct QueryGradientBarriers {
  Mbarrier queries, tail;
  Mbarrier full[Tile::kStages], empty[Tile::kStages];
};

template <typename Tile>
constexpr int kQueryGradientSharedBytes =
    kPanelAlignment + Tile::kBarriersAt + int(sizeof(QueryGradientBarriers<Tile>));

template <typename Tile>
struct QueryGradientShared {
  unsigned char* start = aligned_shared();

  __device__ unsigned char* q() const { return start; }
  __device__ unsigned char* dy() const { return start + Tile::kQueryBytes; }
  __device__ unsigned char* k(int stage) const {
    return start + 2 * Tile::kQueryBytes + stage * Tile::kKeyBytes;
  }
  __device__ unsigned char* v(int stage) const { return k(Tile::kStages + stage); }
  __device__ QueryGradientBarriers<Tile>& barriers() const {
    return *reinterpret_cast<QueryGradientBarriers<Tile>*>(start + Tile::kBarriersAt);
  }
};

// One warp's.
template <typename Tile>
struct QueryGradientProducer {
  const AttentionShape& shape;
  const TensorMap *q_map, *k_map, *v_map, *dy_map;
  QueryGradientShared<Tile> shared;
  RingPlace ring;
  uint32_t tail_parity = 0;

  __device__ bool is_first_lane() const { return threadIdx.x % 32 == 0; }

  __device__ void load_queries(const AttentionWork& work) {
    if (!is_first_lane()) return;
    Mbarrier* const landed = &shared.barriers().queries;
    const int token = work.place.q_begin + work.tile.first, batch = work.place.batch;
    mbarrier_arrive_expect(landed, 2 * Tile::kQueryBytes);
    load_panels<Tile>(shared.q(), q_map, landed, Tile::kM, token, work.tile.head, batch);
    load_panels<Tile>(shared.dy(), dy_map, landed, Tile::kM, token, work.tile.head, batch);
  }

  // Only the first lane waits for consumers, as in AttentionProducer.
  __device__ void load_keys(const AttentionWork& work, int tile) {
    QueryGradientBarriers<Tile>& barriers = shared.barriers();
    const int stage = ring.stage(Tile::kStages);
    const bool is_cut = has_foreign_tail(shape, work.place, tile, Tile::kN);
    if (is_first_lane()) {
      mbarrier_wait(&barriers.empty[stage], ring.parity(Tile::kStages) ^ 1);
      Mbarrier* const landed = is_cut ? &barriers.tail : &barriers.full[stage];
      const int token = work.place.k_begin + tile * Tile::kN, batch = work.place.batch;
      const int head = work.tile.head / shape.group;
      mbarrier_arrive_expect(landed, 2 * Tile::kKeyBytes);
      load_panels<Tile>(shared.k(stage), k_map, landed, Tile::kN, token, head, batch);
      load_panels<Tile>(shared.v(stage), v_map, landed, Tile::kN, token, head, batch);
    }
    if (is_cut) {
      mbarrier_wait(&barriers.tail, tail_parity);
      tail_parity ^= 1;
      const int present = work.place.k_seen - tile * Tile::kN;
      clear_rows<Tile::kN, Tile::kWidth>(shared.k(stage), present);
      clear_rows<Tile::kN, Tile::kWidth>(shared.v(stage), present);
      if (is_first_lane()) mbarrier_arrive(&barriers.full[stage]);
    }
    ++ring.passed;
  }

  __device__ void operator()(const AttentionWork& work) {
    if (work.keys.begin == work.keys.end) return;
    load_queries(work);
    for (int tile = work.keys.begin; tile < work.keys.end; ++tile) load_keys(work, tile);
  }
};

// One consumer warpgroup's: 64 queries, which are the rows of all its products.
template <typename Tile>
struct QueryGradientConsumer {
  using T = typename Tile::T;
  static constexpr int kScores = Tile::kN / 2, kOutputs = Tile::kWidth / 2;  // a thread's
  static constexpr int kSteps = Tile::kN / 16;

  const AttentionBackwardArguments& arguments;
  int group;  // among the consumers
  QueryGradientShared<Tile> shared;
  RingPlace ring;

  __device__ void free_stage(int stage) {
    if (threadIdx.x % 32 == 0) mbarrier_arrive(&shared.barriers().empty[stage]);
  }

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

  __device__ void issue_scores(float (&s)[kScores], float (&dp)[kScores], int stage) {
    const int row = group * 64;
    issue_transposed<T, Tile::kWidth>(s, shared_address(shared.q()), Tile::kM, row,
                                      shared_address(shared.k(stage)));
    issue_transposed<T, Tile::kWidth>(dp, shared_address(shared.dy()), Tile::kM, row,
                                      shared_address(shared.v(stage)));
  }

  __device__ void walk(float (&dq)[kOutputs], const AttentionWork& work) {
    const AttentionShape& shape = arguments.shape;
    float s[kScores], dp[kScores];
    uint32_t ds[kSteps][4] = {};
    OfRows lse, delta;
    load_rows(lse, delta, work);
    mbarrier_wait(&shared.barriers().queries, 0);
    const int first = work.tile.first + group * 64;
    int last = -1;  // stage whose keys dq may still read
    for (int tile = work.keys.begin; tile < work.keys.end; ++tile) {
      const int stage = ring.stage(Tile::kStages);
      mbarrier_wait(&shared.barriers().full[stage], ring.parity(Tile::kStages));
      ++ring.passed;
      wgmma_fence();
      issue_scores(s, dp, stage);
      wgmma_wait<1>();
      fence_registers(s);
      fence_registers(ds);
      if (last >= 0) free_stage(last);
      if (is_edge(shape, work.place, first, 64, tile, Tile::kN))
        hide_edge(s, shape, work.place, first + first_row(), tile, Tile::kN);
      weigh(s, arguments.scale, arguments.softcap, lse, [](int, float, float) {});
      wgmma_wait<0>();
      fence_registers(dp);
      dscores<T>(ds, s, dp, delta);
      issue_added<T>(dq, ds, shared_address(shared.k(stage)));
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
      const int64_t token = work.place.q_begin + work.tile.first + i;
      T* const row = row_of<T>(arguments.dq, arguments.shape, work.place.batch, work.tile.head,
                               token, arguments.width);
      store_row(row, arguments.width, dq, r, arguments.dq_scale, i < work.count);
    }
  }
};

template <typename Tile>
__device__ void init_query_gradient_barriers(QueryGradientBarriers<Tile>& barriers) {
  mbarrier_init(&barriers.queries, 1);
  mbarrier_init(&barriers.tail, 1);
  for (int stage = 0; stage < Tile::kStages; ++stage) {
    mbarrier_init(&barriers.full[stage], 1);
    mbarrier_init(&barriers.empty[stage], 4 * Tile::kGroups);
  }
  fence_mbarrier_init();
}

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    attention_sm90_dq_kernel(const __grid_constant__ TensorMap q_map,
                             const __grid_constant__ TensorMap k_map,
                             const __grid_constant__ TensorMap v_map,
                             const __grid_constant__ TensorMap dy_map,
                             const __grid_constant__ AttentionBackwardArguments arguments) {
#ifdef SLIM_HOPPER
  const QueryGradientShared<Tile> shared;
  if (threadIdx.x == 0) {
    for (const TensorMap* map : {&q_map, &k_map, &v_map, &dy_map}) prefetch_map(map);
    init_query_gradient_barriers<Tile>(shared.barriers());
  }
  __syncthreads();
  const AttentionShape& shape = arguments.shape;
  const AttentionWork work =
      attention_work<Tile>(shape, listed_tile(shape, arguments.section, blockIdx.x, Tile::kM));
  if (work.count <= 0) return;  // a tile that ragged sequences leave over
  if (threadIdx.x < kWarpGroup) {
    registers_shrink<Tile::kProducerRegisters>();
    if (threadIdx.x < 32)
      QueryGradientProducer<Tile>{shape, &q_map, &k_map, &v_map, &dy_map, shared}(work);
  } else {
    registers_grow<Tile::kConsumerRegisters>();
    QueryGradientConsumer<Tile>{arguments, int(threadIdx.x / kWarpGroup) - 1, shared}(work);
  }
#else
  __trap();
#endif
}

}  // namespace slimkernels
