// How the threads of a launch share rows, and their reductions.
//
// Tiling   A team of threads has a row, each thread kHeld elements of it in registers. The team is
//          8, 16 or 32 lanes of a warp, then a block, then a cluster of up to 16 blocks, whose
//          reductions go through each other's shared memory; so rows of up to kHeld * 16 blocks,
//          262144 elements if those have 1024 threads, are read once. Which it is are numbers that
//          the kernel is given: one instance of a kernel serves all. Longer rows, and before sm_90
//          those that do not fit one block, are walked in pieces, twice.
// Traffic  Neighbouring threads have neighbouring packs of kVec elements, 16 bytes where rows are
//          aligned; a thread's packs are a team apart.
#pragma once
#include "reduce.cuh"

namespace slimkernels {

constexpr int kHeld = 16;
constexpr int kMaxCluster = 16;

struct RowTiling {
  int threads;   // of a block that share a row, a power of two
  int blocks;    // that share a row: a cluster, if more than one
  int rows;      // that a block has at a time: one, unless a warp or less has a row
  bool is_held;  // whether the team holds a row; else it walks it in pieces

  dim3 block() const { return dim3(unsigned(threads * rows)); }
  // Blocks of which each team has one row.
  dim3 grid(int64_t M) const { return dim3(unsigned((M + rows - 1) / rows * blocks)); }
};

// max_threads: a power of two that the kernel's __launch_bounds__ has room for.
inline RowTiling row_tiling(int64_t N, int max_threads, int max_cluster) {
  constexpr int kSmallBlock = 128;  // of rows that need a warp or less
  constexpr int kUsualBlock = 512;  // two fit a multiprocessor: one loads while the other reduces
  int threads = 8, blocks = 1;      // eight packs of 16 bytes are a line of the cache
  const auto is_short = [&] { return int64_t(threads) * kHeld * blocks < N; };
  while (threads < kUsualBlock && threads < max_threads && is_short()) threads *= 2;
  while (blocks < max_cluster && is_short()) blocks *= 2;
  while (threads < max_threads && is_short()) threads *= 2;
  return {threads, blocks, threads <= 32 ? kSmallBlock / threads : 1, !is_short()};
}

// A thread's place among those that share its row, and what they reduce. All threads of a block
// must construct it and come to every reduction, those beyond the last row too.
class Team {
 public:
  __device__ explicit Team(const RowTiling& tiling)
      : threads_(tiling.threads), blocks_(tiling.blocks), rows_(tiling.rows) {
    // Powers of two: a division takes as long as a trip to the cache.
    block_ = int(blockIdx.x) & (blocks_ - 1);
    place_ = int(threadIdx.x) >> __popc(threads_ - 1);
    rank_ = block_ * threads_ + (int(threadIdx.x) & (threads_ - 1));
    // A block's shared memory can be written only once it runs.
    if (blocks_ > 1) cluster_barrier();
  }

  // Among those of the launch, whose blocks of one row are one program.
  __device__ int program() const { return int(blockIdx.x) >> __popc(blocks_ - 1); }
  __device__ int programs() const { return int(gridDim.x) >> __popc(blocks_ - 1); }
  // Among those of this block.
  __device__ int place() const { return place_; }

  // The first row of this team, and how far on the next one is.
  __device__ int64_t first_row() const { return int64_t(program()) * rows_ + place_; }
  __device__ int64_t row_step() const { return int64_t(programs()) * rows_; }
  // Whether some team of this block has a row when this one is at `row`: until then all go on.
  __device__ bool block_is_at_work(int64_t row, int64_t M) const { return row - place_ < M; }
  __device__ int rank() const { return rank_; }
  __device__ int size() const { return threads_ * blocks_; }

  // Calls visit(i, col) for the packs, of kVec elements from column col on, that this thread has of
  // the piece of a row that begins at `start`. i is a constant once unrolled, an index of
  // registers.
  template <int kVec, typename Visit>
  __device__ void each_pack(int start, int N, Visit visit) const {
#pragma unroll
    for (int i = 0; i < kHeld / kVec; ++i) {
      const int col = start + (i * size() + rank_) * kVec;
      if (col < N) visit(i, col);
    }
  }

  // Every thread of the team gets `combine` over the team's values.
  template <typename T>
  __device__ T reduce(T value, T (*combine)(T, T)) {
    value = warp_reduce(value, combine, threads_);
    if (threads_ > 32) value = across_warps(value, combine);
    if (blocks_ > 1) value = across_blocks(value, combine);
    return value;
  }

 private:
  // Two sets of slots in turn: a fast thread may write the next reduction's while others still read
  // this one's, and none can be two barriers ahead.
  template <typename T>
  __device__ T across_warps(T value, T (*combine)(T, T)) {
    SHARED_ARRAY(T, partial, 2 * 32);
    const int warps = threads_ / 32;
    T* slots = partial + 32 * (warp_rounds_++ % 2);
    if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = value;
    __syncthreads();
    // Lanes beyond the warps repeat them, a power of two: a butterfly over the first few sums all.
    return warp_reduce(slots[threadIdx.x & (warps - 1)], combine, warps);
  }

  template <typename T>
  __device__ T across_blocks(T value, T (*combine)(T, T)) {
    SHARED_ARRAY(T, partial, 2 * kMaxCluster);
    T* slots = partial + kMaxCluster * (block_rounds_++ % 2);
    // Pushed, not pulled: after the barrier everything is near, and no block waits to end.
    if (int(threadIdx.x) < blocks_) *map_shared_rank(&slots[block_], int(threadIdx.x)) = value;
    cluster_barrier();
    value = slots[0];
    for (int block = 1; block < blocks_; ++block) value = combine(value, slots[block]);
    return value;
  }

  int threads_, blocks_, rows_, block_, place_, rank_;
  int warp_rounds_ = 0, block_rounds_ = 0;
};

// The elements of a piece of a row that one thread has, in float32.
template <int kVec>
struct Piece {
  float values[kHeld / kVec][kVec];

  __device__ float (&operator[](int i)) [kVec] { return values[i]; }
};

// Elements past the row's end are zero.
template <int kVec, typename T>
__device__ void load_piece(Piece<kVec>& piece, const Team& team, const T* row, int start, int N) {
  // Every load is on its way before the first is waited for.
  Pack<T, kVec> packs[kHeld / kVec] = {};
  team.each_pack<kVec>(start, N, [&](int i, int col) {
    packs[i] = *reinterpret_cast<const Pack<T, kVec>*>(row + col);
  });
#pragma unroll
  for (int i = 0; i < kHeld / kVec; ++i)
#pragma unroll
    for (int j = 0; j < kVec; ++j) piece[i][j] = widen(packs[i].values[j]);
}

template <int kVec, typename T>
__device__ void store_piece(T* row, Piece<kVec>& piece, const Team& team, int start, int N) {
  team.each_pack<kVec>(start, N, [&](int i, int col) { store(row + col, piece[i]); });
}

// Of a tensor in T or, if it is wide, float32; asked of the whole piece, not of each load.
template <typename T, int kVec>
__device__ void load_either(Piece<kVec>& piece, const Team& team, const void* tensor,
                            int64_t offset, int start, int N, bool is_wide) {
  if (sizeof(T) < sizeof(float) && is_wide)
    load_piece(piece, team, static_cast<const float*>(tensor) + offset, start, N);
  else
    load_piece(piece, team, static_cast<const T*>(tensor) + offset, start, N);
}

template <typename T, int kVec>
__device__ void store_either(void* tensor, int64_t offset, Piece<kVec>& piece, const Team& team,
                             int start, int N, bool is_wide) {
  if (sizeof(T) < sizeof(float) && is_wide)
    store_piece(static_cast<float*>(tensor) + offset, piece, team, start, N);
  else
    store_piece(static_cast<T*>(tensor) + offset, piece, team, start, N);
}

}  // namespace slimkernels
