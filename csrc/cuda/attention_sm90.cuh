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
// Launch   grid = min(multiprocessors, tiles), 128 threads more than the consumers have, about
//          220 KB of dynamic shared memory. sm_90a only.
#pragma once
#include "attention_tiles.cuh"
#include "hopper.cuh"
#include "reduce.cuh"

namespace slimkernels {

constexpr float kLog2E = 1.4426950408889634f;

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

struct AttentionBarriers {
  Mbarrier q_full, q_empty, tail;
  Mbarrier k_full[2], k_empty[2], v_full[2], v_empty[2];
};

template <typename Tile>
constexpr int kAttentionSharedBytes =
    kPanelAlignment + Tile::kBarriersAt + int(sizeof(AttentionBarriers));

struct AttentionArguments {
  AttentionShape shape;
  AttentionSchedule schedule;
  float scale;       // of q @ k^T; above 0
  float softcap;     // 0: none
  int value_width;   // columns of y, a multiple of 8
  void* y;           // (B, H, Tq, Dv), or (Tq, H, Dv) of ragged sequences
  float *lse, *low;  // (B, H, Tq), or (H, Tq)
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
  __device__ AttentionBarriers& barriers() const {
    return *reinterpret_cast<AttentionBarriers*>(start + Tile::kBarriersAt);
  }
};

// A place in a ring of stages: how many it has passed.
struct RingPlace {
  unsigned passed = 0;

  __device__ int stage(int stages) const { return passed % stages; }
  __device__ uint32_t parity(int stages) const { return passed / stages & 1; }
};

// One tile of queries of one head.
struct AttentionWork {
  QueryTile tile;
  SequencePlace place;
  int count;  // of its queries; none for tiles that ragged sequences leave over
  KeyTiles keys;
};

template <typename Tile>
__device__ AttentionWork attention_work(const AttentionShape& shape, const QueryTile& tile) {
  AttentionWork work = {tile, place_of(shape, tile.sequence), 0, {0, 0}};
  work.count = smaller(work.place.q_count - tile.first, Tile::kM);
  if (work.count > 0) work.keys = key_tiles(shape, work.place, tile.first, work.count, Tile::kN);
  return work;
}

// Calls run(work) for each tile that is this block's, as all its warps do alike.
template <typename Tile, typename Run>
__device__ void each_attention_work(const AttentionArguments& arguments, Run& run) {
  const AttentionShape& shape = arguments.shape;
  const int turns = block_turns(shape, arguments.schedule, Tile::kM);
  for (int turn = 0; turn < turns; ++turn) {
    const QueryTile tile = tile_of_turn(shape, arguments.schedule, blockIdx.x, turn, Tile::kM);
    if (tile.head >= 0) run(attention_work<Tile>(shape, tile));
  }
}

// The producer.

template <typename Tile>
__device__ void load_panels(unsigned char* to, const TensorMap* map, Mbarrier* barrier, int rows,
                            int token, int head, int batch) {
#pragma unroll
  for (int column = 0; column < Tile::kWidth; column += kPanelColumns)
    tma_load(to + column / kPanelColumns * panel_bytes(rows), map, barrier, column, token, head,
             batch);
}

// By a warp: zeros from row `first` of a tile on, such that wgmma sees them.
template <int kRows, int kWidth>
__device__ void clear_rows(unsigned char* tile, int first) {
  for (int column = 0; column < kWidth; column += kPanelColumns, tile += panel_bytes(kRows))
    for (int byte = first * kPanelRowBytes + threadIdx.x % 32 * 16; byte < panel_bytes(kRows);
         byte += 32 * 16)
      store_shared(tile + byte, uint4{0, 0, 0, 0});
  fence_proxy_async();
  __syncwarp();
}

// One warp's.
template <typename Tile>
struct AttentionProducer {
  const AttentionArguments& arguments;
  const TensorMap *q_map, *k_map, *v_map;
  AttentionShared<Tile> shared;
  RingPlace k_place, v_place;
  uint32_t q_parity = 0, tail_parity = 0;

  __device__ bool is_first_lane() const { return threadIdx.x % 32 == 0; }

  // The first lane loads. The others never wait for what only it waits for: a lane that came late
  // would find the barrier two phases on, with the parity of the phase that it waits for.
  __device__ void load_queries(const AttentionWork& work) {
    AttentionBarriers& barriers = shared.barriers();
    if (is_first_lane()) {
      mbarrier_wait(&barriers.q_empty, q_parity ^ 1);
      mbarrier_arrive_expect(&barriers.q_full, Tile::kQueryBytes);
      load_panels<Tile>(shared.q(), q_map, &barriers.q_full, Tile::kM,
                        work.place.q_begin + work.tile.first, work.tile.head, work.place.batch);
    }
    q_parity ^= 1;
  }

  __device__ void load_keys(const AttentionWork& work, int tile) {
    const int stage = k_place.stage(Tile::kStages);
    Mbarrier& full = shared.barriers().k_full[stage];
    if (is_first_lane()) {
      mbarrier_wait(&shared.barriers().k_empty[stage], k_place.parity(Tile::kStages) ^ 1);
      load_tile(shared.k(stage), k_map, &full, work, tile);
    }
    ++k_place.passed;
  }

  __device__ void load_values(const AttentionWork& work, int tile) {
    AttentionBarriers& barriers = shared.barriers();
    const int stage = v_place.stage(Tile::kStages);
    const bool is_cut = has_foreign_tail(arguments.shape, work.place, tile, Tile::kN);
    if (is_first_lane()) {
      mbarrier_wait(&barriers.v_empty[stage], v_place.parity(Tile::kStages) ^ 1);
      load_tile(shared.v(stage), v_map, is_cut ? &barriers.tail : &barriers.v_full[stage], work,
                tile);
    }
    if (is_cut) {
      mbarrier_wait(&barriers.tail, tail_parity);
      tail_parity ^= 1;
      clear_rows<Tile::kN, Tile::kWidth>(shared.v(stage), work.place.k_seen - tile * Tile::kN);
      if (is_first_lane()) mbarrier_arrive(&barriers.v_full[stage]);
    }
    ++v_place.passed;
  }

  __device__ void load_tile(unsigned char* to, const TensorMap* map, Mbarrier* landed,
                            const AttentionWork& work, int tile) {
    mbarrier_arrive_expect(landed, Tile::kKeyBytes);
    load_panels<Tile>(to, map, landed, Tile::kN, work.place.k_begin + tile * Tile::kN,
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
