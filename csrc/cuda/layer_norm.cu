// LayerNorm, of a sum too: the instances of norm_forward.cuh and norm_backward.cuh that keep a
// mean.
#include <algorithm>

#include "norm_backward.cuh"

namespace slimkernels {

template decltype(norm_forward<false>) norm_forward<false>;
template decltype(norm_backward<false>) norm_backward<false>;

int64_t norm_programs(int64_t M, int64_t N, int device) {
  const RowTiling tiling = backward_tiling<4>(N, device);
  const int64_t rows = (M + tiling.rows - 1) / tiling.rows, threads = tiling.block().x;
  // As many blocks as the registers have room for, of aligned rows; others need more of them.
  // Clusters, of which some may have to wait for others, are twice as many, to even that out.
  const int64_t blocks = multiprocessors(device) * (kBackwardThreads<4> / threads);
  const int64_t programs = tiling.blocks > 1 ? 2 * blocks / tiling.blocks : blocks;
  return std::min(rows, std::max(programs, int64_t(1)));
}

}  // namespace slimkernels
