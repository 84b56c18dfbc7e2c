// dq of attention_sm90_backward.cuh, where the walk that makes dk and dv makes it, too.
//
// Tiling   A block has dS of its keys and a tile of queries, from the registers of both consumer
//          groups, in shared memory, and each group multiplies all of it with half of k's columns.
//          That goes by shared memory, too, to one thread of a warp of its own, which adds it to
//          the tile's sums by one bulk copy; two such threads alternate. Two buffers of each: a
//          group that writes dS knows, by the barrier behind the tile before, that the other has
//          multiplied the one before that.
// Turns    Blocks add to a tile of queries in the order of turn_of, counted in `turns`; the first
//          overwrites what is there. No block waits for one that has yet to start, whatever order
//          the hardware starts them in: each takes its work, when it starts, from a count, and
//          turns follow that order. So of all blocks at work the one that came first never waits.
// Order    of the sums' floats: see sum_place. It suits the registers; only attention_dq_kernel,
//          which rounds the sums to dq, needs to know.
#pragma once

namespace slimkernels {

constexpr int kDScoresShared = 1;  // a named barrier

// Where four neighbouring registers of a thread, from 4 * word on, lie in a tile of sums, one of
// whose groups has `words` of them.
__device__ inline int sum_place(int group, int words, int word) {
  return ((group * words + word) * kWarpGroup + int(threadIdx.x) % kWarpGroup) * 4;
}

// A block's shared memory for dq: buffers of dS, keys down and queries across, then of dq.
template <typename Tile>
struct DqShared {
  static constexpr int kScoresBytes = tile_bytes(Tile::kOwn, Tile::kWalked);
  static constexpr int kSumFloats = Tile::kWalked * Tile::kWidth;
  static_assert(Tile::kDqBytes == kDqBuffers * (kScoresBytes + kSumFloats * 4));

  unsigned char* start;

  __device__ unsigned char* scores(int buffer) const { return start + buffer * kScoresBytes; }
  __device__ float* sum(int buffer) const {
    return reinterpret_cast<float*>(start + kDqBuffers * kScoresBytes) + buffer * kSumFloats;
  }
};

// What a consumer warpgroup does for dq, whose columns are divided among the groups.
template <typename Tile>
struct DqConsumer {
  using T = typename Tile::T;
  static constexpr int kColumns = Tile::kWidth / Tile::kGroups;
  static constexpr int kOutputs = kColumns / 2, kWords = kOutputs / 4;  // a thread's

  const WalkShared<Tile>& shared;
  int group;
  RingPlace filled;  // tiles of dq

  __device__ DqShared<Tile> buffers() const { return {shared.dq()}; }

  // dS of this group's keys, to where both groups read that of all.
  template <int kSteps>
  __device__ void share(const uint32_t (&ds)[kSteps][4]) const {
    const int lane = threadIdx.x % 32;
    const int row = group * 64 + threadIdx.x % kWarpGroup / 32 * 16 + lane % 16;
    unsigned char* const at = buffers().scores(filled.stage(kDqBuffers)) + row * kPanelRowBytes;
#pragma unroll
    for (int step = 0; step < kSteps; ++step)  // in a panel's swizzle
      store_matrices(at + ((2 * step + lane / 16) ^ (row % 8)) * 16, ds[step]);
    fence_proxy_async();
    named_barrier_sync(kDScoresShared, Tile::kGroups * kWarpGroup);
  }

  // dq = dS @ k, beside products that are under way.
  __device__ void issue(float (&dq)[kOutputs]) const {
    const uint32_t ds = shared_address(buffers().scores(filled.stage(kDqBuffers)));
    const uint32_t keys = shared_address(shared.own(0));
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < Tile::kOwn; k += 16)
      wgmma<T, kMN, kMN>(dq, operand_mn(ds, Tile::kOwn, 0, k),
                         operand_mn(keys, Tile::kOwn, group * kColumns, k), k > 0);
    wgmma_commit();
  }

  __device__ void hand_over(const float (&dq)[kOutputs]) const {
    RingBarriers<kDqBuffers>& ring = shared.barriers().dq;
    const int buffer = filled.stage(kDqBuffers);
    ring.wait_empty(filled);
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      uint4 bits;
      memcpy(&bits, &dq[4 * word], sizeof bits);
      store_shared(buffers().sum(buffer) + sum_place(group, kWords, word), bits);
    }
    fence_proxy_async();
    __syncwarp();
    release(&ring.full[buffer]);
  }
};

// One thread's, of as many warps as there are buffers: it adds what the consumers hand over in its
// buffer. One alone, which waits for global memory most of the time, would be slower than the
// products of narrow heads.
template <typename Tile>
struct DqAdder {
  const AttentionBackwardArguments& arguments;
  WalkShared<Tile> shared;
  int buffer;
  RingPlace filled;

  // To the `number`-th tile of sums, in its `turn`.
  __device__ void add(int number, int turn) {
    using Buffers = DqShared<Tile>;
    RingBarriers<kDqBuffers>& ring = shared.barriers().dq;
    const float* const from = Buffers{shared.dq()}.sum(buffer);
    float* const to = arguments.sums + int64_t(number) * Buffers::kSumFloats;
    ring.wait_full(filled);
    wait_turn(&arguments.turns[number], turn);
    if (turn == 0)
      bulk_store(to, from, Buffers::kSumFloats * 4);
    else
      bulk_add(to, from, Buffers::kSumFloats * 4);
    bulk_commit();
    bulk_wait_read();
    mbarrier_arrive(&ring.empty[buffer]);
    bulk_wait();
    pass_turn(&arguments.turns[number]);
  }

  __device__ void operator()(const KeyGradientWork& work) {
    if (buffer >= kDqBuffers || !is_first_lane()) return;
    const AttentionShape &shape = arguments.shape, turned = mirrored(shape);
    const SequencePlace place = place_of(shape, work.tile.sequence);
    const int tiles = work.queries.end - work.queries.begin;
    const QueryTile start = {work.tile.sequence, work.tile.head * shape.group, 0};
    int number = tile_number(shape, place, start, Tile::kWalked);
    for (int heads = shape.group; heads > 0; --heads) {
      for (int n = 0; n < tiles; ++n, ++filled.passed) {
        if (filled.stage(kDqBuffers) != buffer) continue;
        const int tile = visited_tile(turned, work.queries, n);
        add(number + tile, turn_of(shape, place, tile * Tile::kWalked, Tile::kWalked,
                                   work.tile.first / Tile::kOwn, Tile::kOwn));
      }
      number += numbers_of_head(shape, Tile::kWalked);
    }
  }
};

// A block has a tile of queries of one head, each of its warpgroups the columns of one that made
// them.
template <typename Tile>
__global__ void __launch_bounds__(Tile::kGroups* kWarpGroup)
    attention_dq_kernel(const __grid_constant__ AttentionBackwardArguments arguments) {
  using T = typename Tile::T;
  using Consumer = DqConsumer<Tile>;
  const AttentionShape& shape = arguments.shape;
  const QueryTile tile =
      listed_tile(shape, shape.sequences * shape.heads, blockIdx.x, Tile::kWalked);
  const AttentionWork work = attention_work(shape, tile, Tile::kWalked, Tile::kOwn);
  if (work.count <= 0) return;  // a tile that ragged sequences leave over
  const int group = threadIdx.x / kWarpGroup, column = group * Consumer::kColumns;
  float dq[Consumer::kOutputs] = {};
  if (work.keys.begin < work.keys.end) {  // else nobody has written its sums
    const int64_t number = tile_number(shape, work.place, tile, Tile::kWalked);
    const float* const sums = arguments.sums + number * DqShared<Tile>::kSumFloats;
#pragma unroll
    for (int word = 0; word < Consumer::kWords; ++word) {
      const float* const from = sums + sum_place(group, Consumer::kWords, word);
      const float4 four = *reinterpret_cast<const float4*>(from);
      memcpy(&dq[4 * word], &four, sizeof four);
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int i = first_row() + 8 * r;
    store_row(dq_row<T>(arguments, work, i) + column, arguments.width - column, dq, r,
              arguments.dq_scale, i < work.count);
  }
}

}  // namespace slimkernels
