// How the threads of a launch share rows, and their reductions.
//
// Tiling   A team of threads has a row, each thread kHeld elements of it in registers. The team is
//          8, 16 or 32 lanes of a warp, then a block, then a cluster of up to 16 blocks, whose
//          reductions go through each other's shared memory; so rows of up to kHeld * 1024 * 16 =
//          262144 elements are read once. Which it is are numbers that the kernel is given: one
//          instance of a kernel serves all. Longer rows, and before sm_90 those that do not fit one
//          block, are walked in pieces of kHeld * threads, twice.
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
  // Blocks of at most `teams` teams, which stride over the rows.
  dim3 grid(int64_t M, int64_t programs) const {
    const int64_t all = (M + rows - 1) / rows;
    return dim3(unsigned((all < programs ? all : programs) * blocks));
  }
};

// max_threads: a power of two that the kernel's __launch_bounds__ has room for.
inline RowTiling row_tiling(int64_t N, int max_threads, int max_cluster) {
  constexpr int kSmallBlock = 128;  // of rows that need a warp or less
  int threads = 8, blocks = 1;      // eight packs of 16 bytes are a line of the cache
  while (threads < max_threads && int64_t(threads) * kHeld < N) threads *= 2;
  while (blocks < max_cluster && int64_t(threads) * kHeld * blocks < N) blocks *= 2;
  const int rows = threads <= 32 ? kSmallBlock / threads : 1;
  return {threads, blocks, rows, int64_t(threads) * kHeld * blocks >= N};
}

// A thread's place among those that share its row, and what they reduce. All threads of a block
// must construct it and come to every reduction, those beyond the last row too.
class Team {
 public:
  __device__ explicit Team(const RowTiling& tiling) : threads_(tiling.threads) {
    blocks_ = tiling.blocks;
    block_ = blocks_ == 1 ? 0 : int(blockIdx.x) % blocks_;
    rank_ = block_ * threads_ + int(threadIdx.x) % threads_;
    // A block's shared memory can be written only once it runs.
    if (blocks_ > 1) cluster_barrier();
  }

  // Rows, first to last: the first of this team, and how far on the next one is.
  __device__ int64_t first_row() const {
    return int64_t(blockIdx.x / blocks_) * (blockDim.x / threads_) + threadIdx.x / threads_;
  }
  __device__ int64_t row_step() const {
    return int64_t(gridDim.x / blocks_) * (blockDim.x / threads_);
  }
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
    return warp_reduce(slots[threadIdx.x % warps], combine, warps);
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

  int threads_, blocks_, block_, rank_;
  int warp_rounds_ = 0, block_rounds_ = 0;
};

}  // namespace slimkernels
