// dk and dv of attention_sm90_backward.cuh: a block has a tile of keys and walks queries.
#pragma once

namespace slimkernels {

template <typename Element, int kD>
struct KeyGradientTile {
  using T = Element;
  static constexpr int kWidth = kD;
  static constexpr int kGroups = 2;
  static constexpr int kN = 64 * kGroups;  // keys
  static constexpr int kM = 64;            // queries
  static constexpr int kStages = 3;
  static constexpr int kThreads = kWarpGroup * (kGroups + 1);
  // Of the 168 a thread that 384 threads start with.
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static_assert(fits_registers(kGroups, kProducerRegisters, kConsumerRegisters));

  static constexpr int kKeyBytes = tile_bytes(kN, kD);
  static constexpr int kQueryBytes = tile_bytes(kM, kD);
  static constexpr int kRowsAt = 2 * kKeyBytes + 2 * kStages * kQueryBytes;
  static constexpr int kBarriersAt = kRowsAt + 2 * kStages * kM * 4;
};

template <typename Tile>
struct KeyGradientBarriers {
  Mbarrier keys, tail;
  Mbarrier full[Tile::kStages], empty[Tile::kStages];
};

template <typename Tile>
constexpr int kKeyGradientSharedBytes =
    kPanelAlignment + Tile::kBarriersAt + int(sizeof(KeyGradientBarriers<Tile>));

template <typename Tile>
struct KeyGradientShared {
  unsigned char* start = aligned_shared();

  __device__ unsigned char* k() const { return start; }
  __device__ unsigned char* v() const { return start + Tile::kKeyBytes; }
  __device__ unsigned char* q(int stage) const {
    return start + 2 * Tile::kKeyBytes + stage * Tile::kQueryBytes;
  }
  __device__ unsigned char* dy(int stage) const { return q(Tile::kStages + stage); }
  __device__ float* lse(int stage) const {
    return reinterpret_cast<float*>(start + Tile::kRowsAt) + stage * Tile::kM;
  }
  __device__ float* delta(int stage) const { return lse(Tile::kStages + stage); }
  __device__ KeyGradientBarriers<Tile>& barriers() const {
    return *reinterpret_cast<KeyGradientBarriers<Tile>*>(start + Tile::kBarriersAt);
  }
};

// A tile of keys: all is of the mirrored call, but for `seen`.
struct KeyGradientWork {
  QueryTile tile;
  SequencePlace place;
  int count;         // of its keys
  int seen;          // of those, not past key_lengths
  KeyTiles queries;  // none if nothing is seen
};

template <typename Tile>
__device__ KeyGradientWork key_gradient_work(const AttentionBackwardArguments& arguments) {
  KeyGradientWork work;
  const AttentionShape shape = mirrored(arguments.shape);
  work.tile = listed_tile(shape, arguments.section, blockIdx.x, Tile::kN);
  work.place = mirrored_place(arguments.shape, work.tile.sequence);
  work.count = smaller(work.place.q_count - work.tile.first, Tile::kN);
  const int all_seen = place_of(arguments.shape, work.tile.sequence).k_seen;
  work.seen = smaller(all_seen - work.tile.first, work.count);
  work.queries = {0, 0};
  if (work.seen > 0)
    work.queries = key_tiles(shape, work.place, work.tile.first, work.seen, Tile::kM);
  return work;
}

// One warp's.
template <typename Tile>
struct KeyGradientProducer {
  const AttentionBackwardArguments& arguments;
  const TensorMap *q_map, *k_map, *v_map, *dy_map;
  KeyGradientShared<Tile> shared;
  RingPlace ring;
  uint32_t tail_parity = 0;

  __device__ bool is_first_lane() const { return threadIdx.x % 32 == 0; }

  __device__ void load_keys(const KeyGradientWork& work) {
    if (!is_first_lane()) return;
    Mbarrier* const landed = &shared.barriers().keys;
    const int token = work.place.q_begin + work.tile.first;
    mbarrier_arrive_expect(landed, 2 * Tile::kKeyBytes);
    load_panels<Tile>(shared.k(), k_map, landed, Tile::kN, token, work.tile.head, work.place.batch);
    load_panels<Tile>(shared.v(), v_map, landed, Tile::kN, token, work.tile.head, work.place.batch);
  }

  static constexpr int kRows = Tile::kM / 32;  // a lane's

  // Of the tile's queries; the absent ones have no P.
  __device__ void read_rows(float (&lse)[kRows], float (&delta)[kRows], const KeyGradientWork& work,
                            int head, int tile) {
    const SequencePlace& place = work.place;
    const int64_t plane = int64_t(place.batch) * arguments.shape.heads + head;
    const int first = tile * Tile::kM + threadIdx.x % 32;
    const int64_t at = plane * arguments.shape.Tq + place.k_begin + first;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const bool is_present = first + 32 * i < place.k_seen;
      lse[i] = is_present ? arguments.lse[at + 32 * i] : INFINITY;
      delta[i] = is_present ? arguments.delta[at + 32 * i] : 0.f;
    }
  }

  // Two arrivals: that of the tiles, and that of the rows, which all lanes have stored by then.
  __device__ void load_queries(const KeyGradientWork& work, int head, int tile) {
    KeyGradientBarriers<Tile>& barriers = shared.barriers();
    const int stage = ring.stage(Tile::kStages);
    float lse[kRows], delta[kRows];
    read_rows(lse, delta, work, head, tile);  // they come while this waits for a stage
    mbarrier_wait(&barriers.empty[stage], ring.parity(Tile::kStages) ^ 1);
    const bool is_cut = has_foreign_tail(mirrored(arguments.shape), work.place, tile, Tile::kM);
    Mbarrier* const landed = is_cut ? &barriers.tail : &barriers.full[stage];
    if (is_first_lane()) {
      const int token = work.place.k_begin + tile * Tile::kM, batch = work.place.batch;
      mbarrier_arrive_expect(landed, 2 * Tile::kQueryBytes);
      load_panels<Tile>(shared.q(stage), q_map, landed, Tile::kM, token, head, batch);
      load_panels<Tile>(shared.dy(stage), dy_map, landed, Tile::kM, token, head, batch);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      shared.lse(stage)[threadIdx.x % 32 + 32 * i] = lse[i];
      shared.delta(stage)[threadIdx.x % 32 + 32 * i] = delta[i];
    }
    __syncwarp();
    if (is_cut) {
      mbarrier_wait(&barriers.tail, tail_parity);
      tail_parity ^= 1;
      const int present = work.place.k_seen - tile * Tile::kM;
      clear_rows<Tile::kM, Tile::kWidth>(shared.q(stage), present);
      clear_rows<Tile::kM, Tile::kWidth>(shared.dy(stage), present);
      if (is_first_lane()) mbarrier_arrive(&barriers.full[stage]);
    }
    if (is_first_lane()) mbarrier_arrive(&barriers.full[stage]);
    ++ring.passed;
  }

  __device__ void operator()(const KeyGradientWork& work) {
    if (work.queries.begin == work.queries.end) return;
    load_keys(work);
    const int group = arguments.shape.group;
    for (int member = 0; member < group; ++member)
      for (int tile = work.queries.begin; tile < work.queries.end; ++tile)
        load_queries(work, work.tile.head * group + member, tile);
  }
};

// One consumer warpgroup's: 64 keys, which are the rows of all its products.
template <typename Tile>
struct KeyGradientConsumer {
  using T = typename Tile::T;
  static constexpr int kScores = Tile::kM / 2, kOutputs = Tile::kWidth / 2;  // a thread's
  static constexpr int kSteps = Tile::kM / 16;

  const AttentionBackwardArguments& arguments;
  int group;  // among the consumers
  KeyGradientShared<Tile> shared;
  RingPlace ring;

  __device__ void free_stage(int stage) {
    __syncwarp();  // all lanes have read the stage's lse and delta, which no wgmma waits for
    if (threadIdx.x % 32 == 0) mbarrier_arrive(&shared.barriers().empty[stage]);
  }

  __device__ void issue_scores(float (&s)[kScores], float (&dp)[kScores], int stage) {
    const int row = group * 64;
    issue_transposed<T, Tile::kWidth>(s, shared_address(shared.k()), Tile::kN, row,
                                      shared_address(shared.q(stage)));
    issue_transposed<T, Tile::kWidth>(dp, shared_address(shared.v()), Tile::kN, row,
                                      shared_address(shared.dy(stage)));
  }

  // From products to P times the slope, and P as an operand.
  __device__ void probabilities(float (&s)[kScores], uint32_t (&p)[kSteps][4],
                                const KeyGradientWork& work, int stage, int tile) {
    const AttentionShape shape = mirrored(arguments.shape);
    const int first = work.tile.first + group * 64;
    if (is_edge(shape, work.place, first, 64, tile, Tile::kM))
      hide_edge(s, shape, work.place, first + first_row(), tile, Tile::kM);
    weigh(
        s, arguments.scale, arguments.softcap, OfColumns{shared.lse(stage) + first_column()},
        [&](int word, float low, float high) { p[word / 4][word % 4] = pack_pair<T>(low, high); });
  }

  // dp runs under this group's exponentials, dv under its dS. dk is waited for, though the next
  // scores could be issued behind it: ptxas has no registers for ds beside them (C7512). The other
  // group's products fill the gap.
  __device__ void walk(float (&dk)[kOutputs], float (&dv)[kOutputs], const KeyGradientWork& work) {
    float s[kScores], dp[kScores];
    uint32_t p[kSteps][4], ds[kSteps][4];
    mbarrier_wait(&shared.barriers().keys, 0);
    const int tiles = work.queries.end - work.queries.begin;
    int tile = work.queries.begin;
    for (int left = tiles * arguments.shape.group; left > 0; --left) {
      const int stage = ring.stage(Tile::kStages);
      mbarrier_wait(&shared.barriers().full[stage], ring.parity(Tile::kStages));
      ++ring.passed;
      wgmma_fence();
      issue_scores(s, dp, stage);
      wgmma_wait<1>();
      fence_registers(s);
      probabilities(s, p, work, stage, tile);
      issue_added<T>(dv, p, shared_address(shared.dy(stage)));
      wgmma_wait<1>();
      fence_registers(dp);
      dscores<T>(ds, s, dp, OfColumns{shared.delta(stage) + first_column()});
      issue_added<T>(dk, ds, shared_address(shared.q(stage)));
      wgmma_wait<0>();
      fence_registers(dk);
      fence_registers(dv);
      fence_registers(p);
      fence_registers(ds);
      free_stage(stage);
      if (++tile == work.queries.end) tile = work.queries.begin;
    }
  }

  __device__ void store(float (&dk)[kOutputs], float (&dv)[kOutputs], const KeyGradientWork& work) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = group * 64 + first_row() + 8 * r;
      // A key past its length may be NaN; it has no gradient.
#pragma unroll
      for (int e = 0; e < kOutputs; ++e)
        if (row_of_element(e) == r && i >= work.seen) dk[e] = dv[e] = 0.f;
      const int64_t token = work.place.q_begin + work.tile.first + i;
      const auto row = [&](void* start, int width) {
        return row_of<T>(start, mirrored(arguments.shape), work.place.batch, work.tile.head, token,
                         width);
      };
      const int width = arguments.width, value_width = arguments.value_width;
      store_row(row(arguments.dk, width), width, dk, r, arguments.scale, i < work.count);
      store_row(row(arguments.dv, value_width), value_width, dv, r, 1.f, i < work.count);
    }
  }

  __device__ void operator()(const KeyGradientWork& work) {
    float dk[kOutputs] = {}, dv[kOutputs] = {};
    if (work.queries.begin < work.queries.end) walk(dk, dv, work);
    store(dk, dv, work);
  }
};

template <typename Tile>
__device__ void init_key_gradient_barriers(KeyGradientBarriers<Tile>& barriers) {
  mbarrier_init(&barriers.keys, 1);
  mbarrier_init(&barriers.tail, 1);
  for (int stage = 0; stage < Tile::kStages; ++stage) {
    mbarrier_init(&barriers.full[stage], 2);
    mbarrier_init(&barriers.empty[stage], 4 * Tile::kGroups);
  }
  fence_mbarrier_init();
}

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    attention_sm90_dkdv_kernel(const __grid_constant__ TensorMap q_map,
                               const __grid_constant__ TensorMap k_map,
                               const __grid_constant__ TensorMap v_map,
                               const __grid_constant__ TensorMap dy_map,
                               const __grid_constant__ AttentionBackwardArguments arguments) {
#ifdef SLIM_HOPPER
  const KeyGradientShared<Tile> shared;
  if (threadIdx.x == 0) {
    for (const TensorMap* map : {&q_map, &k_map, &v_map, &dy_map}) prefetch_map(map);
    init_key_gradient_barriers<Tile>(shared.barriers());
  }
  __syncthreads();
  const KeyGradientWork work = key_gradient_work<Tile>(arguments);
  if (work.count <= 0) return;  // a tile that ragged sequences leave over
  if (threadIdx.x < kWarpGroup) {
    registers_shrink<Tile::kProducerRegisters>();
    if (threadIdx.x < 32)
      KeyGradientProducer<Tile>{arguments, &q_map, &k_map, &v_map, &dy_map, shared}(work);
  } else {
    registers_grow<Tile::kConsumerRegisters>();
    KeyGradientConsumer<Tile>{arguments, int(threadIdx.x / kWarpGroup) - 1, shared}(work);
  }
#else
  __trap();
#endif
}

}  // namespace slimkernels
