// Attention forward on Hopper: y = softmax(q @ k^T * scale) @ v a head, FlashAttention-3's design
// (Shah et al. 2024).
//
// Tiling   A block stays for the whole launch and takes tiles of 64 queries a consumer warpgroup,
//          heaviest first (attention_tiles.cuh). A producer warp loads: the queries once a tile,
//          keys and values through rings of two stages each, last key tile first, by TMA. Consumers
//          issue the next tile's q @ k^T before they take this tile's exponentials, and take turns
//          at the tensor cores, so that one group's products run under another's exponentials.
//          p stays in registers from one product to the next.
// Traffic  q, y once, k and v once a query tile, mostly from L2. The roof is the tensor cores, and
//          close behind them exp2: 4 * D operations a score there, one of 16 a cycle here.
// Numerics As the Triton kernel: float32 maximum and sum a query, exp2 with log2(e) folded into the
//          scale, p rounded to the values' dtype for its product but not for its sum. lse comes in
//          two float32: log(sum(exp)), and what its rounding left out.
// Masks    A query sees one range of keys, whatever causality, windows, offsets and lengths say;
//          only tiles at an edge of it compare. Values that follow the last key and belong to
//          another sequence are overwritten with zeros: 0 * NaN would be NaN.
// Heads    Where queries are few, a tile has rows for all heads that read a key head, of each token
//          one after another: TMA gathers them, and row r is head r % packed of token r / packed.
// Launch   grid = min(multiprocessors, tiles), 128 threads more than the consumers have, 89 to 225
//          KiB of dynamic shared memory. sm_90a only.
#pragma once
#include "attention_sm90_parts.cuh"

namespace slimkernels {

// Of heads up to kD wide, narrower ones padded with zeros by TMA.
template <typename Element, int kD>
struct AttentionTile {
  using T = Element;
  static constexpr int kWidth = kD;
  static constexpr int kGroups = kD == 64 ? 3 : 2;  // consumer warpgroups
  static constexpr int kM = 64 * kGroups;
  static constexpr int kN = kD == 256 ? 80 : 128;
  static constexpr int kStages = 2;
  static constexpr int kThreads = kWarpGroup * (kGroups + 1);
  // Of the registers that the block starts with, the producer leaves the consumers what it can.
  static constexpr int kProducerRegisters = kGroups == 3 ? 32 : 40;
  static constexpr int kConsumerRegisters = kGroups == 3 ? 160 : 232;
  static_assert(fits_registers(kGroups, kProducerRegisters, kConsumerRegisters));

  static constexpr int kQueryBytes = tile_bytes(kM, kD);
  static constexpr int kKeyBytes = tile_bytes(kN, kD);
  static constexpr int kBarriersAt = kQueryBytes + 2 * kStages * kKeyBytes;
};

template <typename Tile>
struct AttentionBarriers {
  Mbarrier q_full, q_empty, tail;
  RingBarriers<Tile::kStages> k, v;

  __device__ void init() {
    constexpr int kConsumerWarps = 4 * Tile::kGroups;
    mbarrier_init(&q_full, 1);
    mbarrier_init(&q_empty, kConsumerWarps);
    mbarrier_init(&tail, 1);
    k.init(1, kConsumerWarps);
    v.init(1, kConsumerWarps);
  }
};

template <typename Tile>
constexpr int kAttentionSharedBytes =
    kPanelAlignment + Tile::kBarriersAt + int(sizeof(AttentionBarriers<Tile>));

struct AttentionArguments {
  AttentionShape shape;  // the packed call's
  AttentionSchedule schedule;
  int packed, tokens;  // heads of a token that a tile has rows for, and its tokens
  float scale;         // of q @ k^T; above 0
  float softcap;       // 0: none
  int value_width;     // columns of y, a multiple of 8
  void* y;             // (B, H, Tq, Dv), or (Tq, H, Dv) of ragged sequences
  float *lse, *low;    // (B, H, Tq), or (H, Tq)
};

// A block's shared memory.
template <typename Tile>
struct AttentionShared {
  unsigned char* start = aligned_shared();

  __device__ unsigned char* q() const { return start; }
  __device__ unsigned char* k(int stage) const {
    return start + Tile::kQueryBytes + stage * Tile::kKeyBytes;
  }
  __device__ unsigned char* v(int stage) const { return k(Tile::kStages + stage); }
  __device__ AttentionBarriers<Tile>& barriers() const {
    return *reinterpret_cast<AttentionBarriers<Tile>*>(start + Tile::kBarriersAt);
  }
};

// Calls run(work) for each tile that is this block's, as all its warps do alike.
template <typename Tile, typename Run>
__device__ void each_attention_work(const AttentionArguments& arguments, Run& run) {
  const AttentionShape& shape = arguments.shape;
  const int M = arguments.tokens, turns = block_turns(shape, arguments.schedule, M);
  for (int turn = 0; turn < turns; ++turn) {
    const QueryTile tile = tile_of_turn(shape, arguments.schedule, blockIdx.x, turn, M);
    if (tile.head >= 0) run(attention_work(shape, tile, M, Tile::kN));
  }
}

// One warp's.
template <typename Tile>
struct AttentionProducer {
  const AttentionArguments& arguments;
  const TensorMap *q_map, *k_map, *v_map;
  AttentionShared<Tile> shared;
  RingPlace k_place, v_place;
  Tail tail;
  uint32_t q_parity = 0;

  __device__ void load_queries(const AttentionWork& work) {
    AttentionBarriers<Tile>& barriers = shared.barriers();
    if (is_first_lane()) {
      mbarrier_wait(&barriers.q_empty, q_parity ^ 1);
      mbarrier_arrive_expect(&barriers.q_full,
                             tile_bytes(arguments.tokens * arguments.packed, Tile::kWidth));
      load_panels<Tile::kWidth>(shared.q(), q_map, &barriers.q_full, Tile::kM, 0,
                                work.place.q_begin + work.tile.first, work.tile.head,
                                work.place.batch);
    }
    q_parity ^= 1;
  }

  __device__ void load_keys(const AttentionWork& work, int tile) {
    AttentionBarriers<Tile>& barriers = shared.barriers();
    const int stage = k_place.stage(Tile::kStages);
    if (is_first_lane()) {
      barriers.k.wait_empty(k_place);
      load_tile(shared.k(stage), k_map, &barriers.k.full[stage], work, tile);
    }
    ++k_place.passed;
  }

  __device__ void load_values(const AttentionWork& work, int tile) {
    AttentionBarriers<Tile>& barriers = shared.barriers();
    const int stage = v_place.stage(Tile::kStages);
    Mbarrier* const full = &barriers.v.full[stage];
    const bool is_cut = has_foreign_tail(arguments.shape, work.place, tile, Tile::kN);
    if (is_first_lane()) {
      barriers.v.wait_empty(v_place);
      load_tile(shared.v(stage), v_map, is_cut ? &barriers.tail : full, work, tile);
    }
    if (is_cut)
      tail.clear<Tile::kN, Tile::kWidth>(&barriers.tail, full, work.place.k_seen - tile * Tile::kN,
                                         shared.v(stage));
    ++v_place.passed;
  }

  __device__ void load_tile(unsigned char* to, const TensorMap* map, Mbarrier* landed,
                            const AttentionWork& work, int tile) {
    mbarrier_arrive_expect(landed, Tile::kKeyBytes);
    load_panels<Tile::kWidth>(to, map, landed, Tile::kN, work.place.k_begin + tile * Tile::kN,
                              work.tile.head / arguments.shape.group, work.place.batch);
  }

  // Keys run one tile ahead of values, as the consumers' products do.
  __device__ void operator()(const AttentionWork& work) {
    if (work.keys.begin == work.keys.end) return;
    load_queries(work);
    load_keys(work, work.keys.end - 1);
    for (int tile = work.keys.end - 1; tile >= work.keys.begin; --tile) {
      if (tile > work.keys.begin) load_keys(work, tile - 1);
      load_values(work, tile);
    }
  }
};

}  // namespace slimkernels

#include "attention_sm90_consumer.cuh"
