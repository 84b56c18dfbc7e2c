// What attention's three Hopper kernels are made of: rings of stages, loads, a block's roles, and
// what consumers do to products alike.
#pragma once
#include "attention_tiles.cuh"
#include "hopper.cuh"
#include "reduce.cuh"

namespace slimkernels {

// Barriers.

// A place in a ring of stages: how many it has passed.
struct RingPlace {
  unsigned passed = 0;

  __device__ int stage(int stages) const { return passed % stages; }
  __device__ uint32_t parity(int stages) const { return passed / stages & 1; }
};

template <int kStages>
struct RingBarriers {
  Mbarrier full[kStages], empty[kStages];

  // `fillers` arrive when a stage is full, `warps` when it is empty.
  __device__ void init(int fillers, int warps) {
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(&full[stage], fillers);
      mbarrier_init(&empty[stage], warps);
    }
  }
  __device__ void wait_full(const RingPlace& place) {
    mbarrier_wait(&full[place.stage(kStages)], place.parity(kStages));
  }
  __device__ void wait_empty(const RingPlace& place) {
    mbarrier_wait(&empty[place.stage(kStages)], place.parity(kStages) ^ 1);
  }
};

__device__ inline bool is_first_lane() { return threadIdx.x % 32 == 0; }

// By each warp of the consumers, since a warp that is done knows nothing of the others.
__device__ inline void release(Mbarrier* barrier) {
  if (is_first_lane()) mbarrier_arrive(barrier);
}

// A block: its first warpgroup is the producer, of which one warp loads; the others consume.

template <typename Barriers, typename... Maps>
__device__ void set_up(Barriers& barriers, const Maps&... maps) {
  if (threadIdx.x == 0) {
    (prefetch_map(&maps), ...);
    barriers.init();
    fence_mbarrier_init();
  }
  __syncthreads();
}

struct Nothing {
  __device__ void operator()(int) const {}
};

// Calls produce(), consume(which of the consumers), or assist(which of the producer's other warps).
template <typename Tile, typename Produce, typename Consume, typename Assist = Nothing>
__device__ void in_roles(const Produce& produce, const Consume& consume,
                         const Assist& assist = {}) {
  if (threadIdx.x < kWarpGroup) {
    registers_shrink<Tile::kProducerRegisters>();
    if (threadIdx.x < 32)
      produce();
    else
      assist(int(threadIdx.x / 32) - 1);
  } else {
    registers_grow<Tile::kConsumerRegisters>();
    consume(int(threadIdx.x / kWarpGroup) - 1);
  }
}

// The producer's warp. Its first lane loads. The others never wait for what only it waits for: a
// lane that came late would find the barrier two phases on, with the parity of the phase that it
// waits for.

// `at`: the coordinates after the column.
template <int kWidth, typename... At>
__device__ void load_panels(unsigned char* to, const TensorMap* map, Mbarrier* barrier, int rows,
                            At... at) {
#pragma unroll
  for (int column = 0; column < kWidth; column += kPanelColumns)
    tma_load(to + column / kPanelColumns * panel_bytes(rows), map, barrier, column, at...);
}

// By a warp: zeros from row `first` of a tile on, such that wgmma sees them. Unrolled, the loop
// would cost registers that a producer has not.
template <int kRows, int kWidth>
__device__ void clear_rows(unsigned char* tile, int first) {
  const int start = first * kPanelRowBytes + threadIdx.x % 32 * 16;
#pragma unroll 1
  for (int column = 0; column < kWidth; column += kPanelColumns, tile += panel_bytes(kRows))
#pragma unroll 1
    for (int byte = start; byte < panel_bytes(kRows); byte += 32 * 16)
      store_shared(tile + byte, uint4{0, 0, 0, 0});
  fence_proxy_async();
  __syncwarp();
}

// Tiles that end in another sequence's rows: they land at a barrier of their own, and the warp
// overwrites these rows with zeros before it hands the tiles on, for 0 * NaN would be NaN.
struct Tail {
  uint32_t parity = 0;

  // Rows from `first` on are another's.
  template <int kRows, int kWidth, typename... Tiles>
  __device__ void clear(Mbarrier* landed, Mbarrier* full, int first, Tiles... tiles) {
    mbarrier_wait(landed, parity);
    parity ^= 1;
    (clear_rows<kRows, kWidth>(tiles, first), ...);
    if (is_first_lane()) mbarrier_arrive(full);
  }
};

// One tile of queries.
struct AttentionWork {
  QueryTile tile;
  SequencePlace place;
  int count;  // of its tokens; none for tiles that ragged sequences leave over
  KeyTiles keys;
};

// Of M tokens, which see tiles of N keys.
__device__ inline AttentionWork attention_work(const AttentionShape& shape, const QueryTile& tile,
                                               int M, int N) {
  AttentionWork work = {tile, place_of(shape, tile.sequence), 0, {0, 0}};
  work.count = smaller(work.place.q_count - tile.first, M);
  if (work.count > 0) work.keys = key_tiles(shape, work.place, tile.first, work.count, N);
  return work;
}

// Consumers. A thread holds, of two rows (its first and the one 8 below), every fourth pair of
// columns. Four neighbouring lanes, a quad, have a row together. wgmma.cuh says which element is
// where.

__device__ inline int row_of_element(int i) { return i % 4 / 2; }
// Of the warpgroup's 64 rows, and of the columns.
__device__ inline int first_row() {
  return threadIdx.x % kWarpGroup / 32 * 16 + threadIdx.x % 32 / 4;
}
__device__ inline int first_column() { return threadIdx.x % 4 * 2; }

// 1 - |tanh(x)|, to a few units in its last place.
__device__ inline float tanh_gap(float x) {
  const float e = exp2_approximate(-2 * kLog2E * fabsf(x));
  return 2.f * e * reciprocal_approximate(1.f + e);
}

// tanh(x) to about 1e-6, from its gap; near 0, where 1 - gap cancels, by its series, which at 0.2
// leaves out 6e-8 of it.
__device__ inline float tanh_of(float x, float gap) {
  const float square = x * x;
  const float rest = fmaf(square, fmaf(square, -17.f / 315, 2.f / 15), -1.f / 3);
  return fabsf(x) < 0.2f ? fmaf(x * square, rest, x) : copysignf(1.f - gap, x);
}

// Calls hide(i) for the elements of kCount that this thread's rows do not see of column tile
// `tile`. `rows`: which of the sequence's they are.
template <int kCount, typename Hide>
__device__ void each_hidden(const AttentionShape& shape, const SequencePlace& place,
                            const int (&rows)[2], int tile, const Hide& hide) {
  KeyRange seen[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    seen[r] = keys_of_query(shape, place, rows[r]);
    seen[r].first -= tile * 2 * kCount + first_column();
    seen[r].end -= tile * 2 * kCount + first_column();
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int column = i / 4 * 8 + i % 2;
    const KeyRange& range = seen[row_of_element(i)];
    if (column < range.first || column >= range.end) hide(i);
  }
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
__device__ void issue_added(float (&d)[kCount], const uint32_t (&a)[kSteps][4], uint32_t b) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
    wgmma<T, kMN>(d, a[step], operand_mn(b, 16 * kSteps, 0, 16 * step), true);
  wgmma_commit();
}

// Which row of y, dq, dk or dv that is, of `heads` heads: (B, heads, T), or ragged (T, heads).
__device__ inline int64_t row_of(const AttentionShape& shape, int heads, int batch, int head,
                                 int64_t token) {
  const int64_t plane = int64_t(batch) * heads + head;
  return shape.cu_seqlens_q != nullptr ? token * heads + head : plane * shape.Tq + token;
}

// The four 32-bit words of each lane of a quad, transposed: lane n gets everyone's n-th.
__device__ inline void transpose_quad(uint32_t (&words)[4]) {
#pragma unroll
  for (int step = 1; step <= 2; ++step) {
    const bool upper = threadIdx.x & step;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & step) continue;
      uint32_t &low = words[i], &high = words[i + step];
      const uint32_t received = __shfl_xor_sync(kWholeWarp, upper ? low : high, step);
      (upper ? low : high) = received;
    }
  }
}

// Row r of a thread's two, times `factor`, 16 bytes a thread: the quad's threads swap their pairs
// of columns. Whole quads come here.
template <typename T, int kCount>
__device__ void store_row(T* row, int columns, const float (&o)[kCount], int r, float factor,
                          bool is_present) {
#pragma unroll
  for (int first = 0; first < 2 * kCount; first += 32) {
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int i = (first / 8 + j) * 4 + 2 * r;
      words[j] = narrow_pair(o[i] * factor, o[i + 1] * factor, T{});
    }
    transpose_quad(words);
    const int column = first + threadIdx.x % 4 * 8;
    if (is_present && column < columns)
      *reinterpret_cast<uint4*>(row + column) = uint4{words[0], words[1], words[2], words[3]};
  }
}

}  // namespace slimkernels
