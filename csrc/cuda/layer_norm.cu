// LayerNorm, of a sum too: the instances of norm_forward.cuh and norm_backward.cuh that keep a
// mean.
#include <algorithm>

#include "norm_backward.cuh"

namespace slimkernels {

template decltype(norm_forward<false>) norm_forward<false>;
template decltype(norm_backward<false>) norm_backward<false>;

template <int kVec>
static int64_t programs_of(int64_t M, int64_t N, int device) {
  const RowTiling tiling = backward_tiling<kVec>(N, device);
  const int64_t rows = (M + tiling.rows - 1) / tiling.rows, threads = tiling.block().x;
  // As many blocks as the registers have room for. Clusters, of which some may have to wait for
  // others, are twice as many, to even that out.
  const int64_t blocks = multiprocessors(device) * (kBackwardThreads<kVec> / threads);
  const int64_t programs = tiling.blocks > 1 ? 2 * blocks / tiling.blocks : blocks;
  return std::min(rows, std::max(programs, int64_t(1)));
}

int64_t norm_programs(int64_t M, int64_t N, int dtype, int device) {
  // Rows of other lengths cannot all be aligned, and go element by element.
  const bool is_aligned = N % (is_float32(dtype) ? kFullVec<float> : kFullVec<__half>) == 0;
  // backward_tiling of packs does not depend on how many elements they have.
  return is_aligned ? programs_of<4>(M, N, device) : programs_of<1>(M, N, device);
}

}  // namespace slimkernels
