// dtotal = rstd * (g - mean(g) - xhat * mean(g * xhat)) with g = dy * weight, an RMSNorm's without
// mean(g); dresidual = dtotal + dsum, dx = row_scale * dropout(dresidual); dweight = sum(dy *
// xhat), dbias = sum(dy) over the rows.
//
// Tiling   rows.cuh. A few teams a multiprocessor stride over the rows and keep their share of
//          dweight and dbias in registers; of rows walked in pieces, in memory. column_sums.cu adds
//          the shares: no atomics, so the sum is the same on every run.
// Traffic  reads 2 N elements a row (dsum: 3 N) and writes N, or 2 N where dx is its own; DRAM
//          bandwidth is the roof. Shares add 2 * programs * N float32. Dropout draws its bits
//          again.
// Numerics dx comes from dresidual before it is rounded.
// Launch   min(norm_programs, rows) teams.
#pragma once
#include "column_sums.h"
#include "norm_forward.cuh"

namespace slimkernels {

// 128 registers a thread; single elements need more.
template <int kVec>
constexpr int kBackwardThreads = kVec == 1 ? 256 : 512;

// The weight of each element, 1 where there is none.
template <typename T, int kVec>
__device__ void load_weight(Piece<kVec>& weight, const NormBackward& norm, const Team& team,
                            int start) {
  if (norm.weight) load_either<T>(weight, team, norm.weight, 0, start, norm.N, norm.weight_is_wide);
#pragma unroll
  for (int i = 0; i < kHeld / kVec; ++i)
#pragma unroll
    for (int j = 0; j < kVec; ++j)
      weight[i][j] = norm.weight ? weight[i][j] + norm.weight_offset : 1.f;
}

// dy and xhat of a piece, both zero past the row's end.
template <typename T, int kVec>
__device__ void load_gradient(Piece<kVec>& dy, Piece<kVec>& xhat, const NormBackward& norm,
                              const Team& team, float mean, float rstd, int64_t row, int start,
                              int N) {
  load_piece(dy, team, static_cast<const T*>(norm.dy) + row * norm.N, start, N);
  load_either<T>(xhat, team, norm.total, row * norm.N, start, N, norm.residual_is_wide);
  center(xhat, team, mean, start, N);
#pragma unroll
  for (int i = 0; i < kHeld / kVec; ++i)
#pragma unroll
    for (int j = 0; j < kVec; ++j) xhat[i][j] *= rstd;
}

// Adds a row's share of dweight and dbias.
template <int kVec>
__device__ void add_shares(Piece<kVec>& dweight, Piece<kVec>& dbias, Piece<kVec>& dy,
                           Piece<kVec>& xhat) {
#pragma unroll
  for (int i = 0; i < kHeld / kVec; ++i)
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      dweight[i][j] += dy[i][j] * xhat[i][j];
      dbias[i][j] += dy[i][j];
    }
}

// As add_shares, to this team's shares in memory, which are zero before its first row.
template <int kVec>
__device__ void add_shares_in_memory(const NormBackward& norm, const Team& team, Piece<kVec>& dy,
                                     Piece<kVec>& xhat, int64_t row, int start, int N) {
  const int64_t offset = team.first_row() * norm.N;
  const int old = row == team.first_row() ? 0 : N;  // zero of them are read
  Piece<kVec> share;
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    float* shares = which ? norm.dbias : norm.dweight;
    if (!shares) continue;
    load_piece(share, team, shares + offset, start, old);
#pragma unroll
    for (int i = 0; i < kHeld / kVec; ++i)
#pragma unroll
      for (int j = 0; j < kVec; ++j) share[i][j] += which ? dy[i][j] : dy[i][j] * xhat[i][j];
    store_piece(shares + offset, share, team, start, N);
  }
}

template <int kVec>
__device__ SumPair gradient_sums(Piece<kVec>& dy, Piece<kVec>& xhat, Piece<kVec>& weight) {
  SumPair sums = {0.f, 0.f};
#pragma unroll
  for (int i = 0; i < kHeld / kVec; ++i)
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      const float g = dy[i][j] * weight[i][j];
      sums.first += g;
      sums.second += g * xhat[i][j];
    }
  return sums;
}

// dresidual, made in the place of dy, and dx.
template <typename T, int kVec>
__device__ void write_gradients(Piece<kVec>& dy, Piece<kVec>& xhat, Piece<kVec>& weight,
                                const NormBackward& norm, const Team& team, SumPair means,
                                float rstd, int64_t row, int start, int N) {
#pragma unroll
  for (int i = 0; i < kHeld / kVec; ++i)
#pragma unroll
    for (int j = 0; j < kVec; ++j)
      dy[i][j] = rstd * (dy[i][j] * weight[i][j] - means.first - xhat[i][j] * means.second);
  if (norm.dsum) {
    load_either<T>(xhat, team, norm.dsum, row * norm.N, start, N, norm.residual_is_wide);
#pragma unroll
    for (int i = 0; i < kHeld / kVec; ++i)
#pragma unroll
      for (int j = 0; j < kVec; ++j) dy[i][j] += xhat[i][j];
  }
  store_either<T>(norm.dresidual, row * norm.N, dy, team, start, N, norm.residual_is_wide);
  if (!norm.dx) return;
  drop_and_scale(dy, team, norm.dropout, norm.row_scale, row, start, N);
  store_piece(static_cast<T*>(norm.dx) + row * norm.N, dy, team, start, N);
}

// Writes this block's row of partial sums: each team has kHeld * size sums for the same columns.
template <int kVec>
__device__ void write_shares(float* partials, Piece<kVec>& share, const Team& team,
                             const RowTiling& tiling, int N) {
  float* const row = partials + int64_t(team.program()) * N;
  if (tiling.rows == 1) {
    store_piece(row, share, team, 0, N);
    return;
  }
  SHARED_ARRAY(float, shares, kHeld * 128);  // a block that has several rows has 128 threads
  const int length = kHeld * team.size();
  __syncthreads();  // the other parameter's shares have been read
  team.each_pack<kVec>(0, length, [&](int i, int col) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) shares[team.place() * length + col + j] = share[i][j];
  });
  __syncthreads();
  for (int col = threadIdx.x; col < N; col += blockDim.x) {
    float sums[4] = {};  // of four, eight or sixteen teams: half as deep as one sum, so more exact
    for (int other = 0; other < tiling.rows; other += 4)
#pragma unroll
      for (int k = 0; k < 4; ++k) sums[k] += shares[(other + k) * length + col];
    row[col] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
}

template <typename T, int kVec, bool kRms>
__global__ void __launch_bounds__(kBackwardThreads<kVec>)
    norm_backward_kernel(NormBackward norm, RowTiling tiling) {
  Team team(tiling);
  const int step = kHeld * team.size();
  const float count = float(norm.N);
  Piece<kVec> weight, dy, xhat, dweight = {}, dbias = {};
  if (tiling.is_held) load_weight<T>(weight, norm, team, 0);
  for (int64_t row = team.first_row(); team.block_is_at_work(row, norm.M); row += team.row_step()) {
    const int N = row < norm.M ? norm.N : 0;
    const float mean = kRms || !N ? 0.f : norm.mean[row], rstd = N ? norm.rstd[row] : 0.f;
    SumPair sums = {0.f, 0.f};
    for (int start = 0; start < norm.N; start += step) {  // once, if the row is held
      load_gradient<T>(dy, xhat, norm, team, mean, rstd, row, start, N);
      if (tiling.is_held) {
        add_shares(dweight, dbias, dy, xhat);
      } else {
        add_shares_in_memory(norm, team, dy, xhat, row, start, N);
        load_weight<T>(weight, norm, team, start);
      }
      sums = combine_sum_pair(sums, gradient_sums(dy, xhat, weight));
    }
    if (kRms)
      sums = {0.f, team.reduce(sums.second, combine_sum) / count};
    else
      sums = team.reduce(sums, combine_sum_pair);
    if (!kRms) sums = {sums.first / count, sums.second / count};
    for (int start = 0; start < norm.N; start += step) {
      if (!tiling.is_held) {
        load_gradient<T>(dy, xhat, norm, team, mean, rstd, row, start, N);
        load_weight<T>(weight, norm, team, start);
      }
      write_gradients<T>(dy, xhat, weight, norm, team, sums, rstd, row, start, N);
    }
  }
  if (!tiling.is_held) return;
  if (norm.dweight) write_shares(norm.dweight, dweight, team, tiling, norm.N);
  if (norm.dbias) write_shares(norm.dbias, dbias, team, tiling, norm.N);
}

template <int kVec>
RowTiling backward_tiling(int64_t N, int device) {
  return row_tiling(N, kBackwardThreads<kVec>, max_cluster(device));
}

template <typename T, int kVec, bool kRms>
void launch_norm_backward(const NormBackward& norm, int64_t programs, int device, void* stream) {
  const RowTiling tiling = backward_tiling<kVec>(norm.N, device);
  LAUNCH_CLUSTER((norm_backward_kernel<T, kVec, kRms>), dim3(unsigned(programs * tiling.blocks)),
                 tiling.block(), tiling.blocks, 0, (cudaStream_t)stream, norm, tiling);
}

template <bool kRms>
void norm_backward(const void* dy, const void* dsum, const void* total, const void* weight,
                   const float* mean, const float* rstd, void* dx, void* dresidual, void* dweight,
                   void* dbias, float* partials, int64_t programs, const int64_t* seed,
                   const float* row_scale, int64_t M, int64_t N, float weight_offset,
                   int64_t threshold, float dropout_scale, int dtype, int residual_dtype,
                   int weight_dtype, int bias_dtype, int device, void* stream) {
  const DeviceGuard guard(device);
  float* const dbias_shares = partials + (dweight ? programs * N : 0);
  const NormBackward norm = {dy,
                             dsum,
                             total,
                             weight,
                             mean,
                             rstd,
                             dresidual,
                             dx,
                             dweight ? partials : nullptr,
                             dbias ? dbias_shares : nullptr,
                             {seed, uint32_t(threshold), dropout_scale},
                             row_scale,
                             M,
                             int(N),
                             weight_offset,
                             is_float32(residual_dtype),
                             is_float32(weight_dtype)};
  if (M)
    with_type(dtype, [&](auto zero) {
      using T = decltype(zero);
      if (rows_aligned<T>(N, dy, dsum, total, weight, dresidual, dx, partials))
        launch_norm_backward<T, kFullVec<T>, kRms>(norm, programs, device, stream);
      else
        launch_norm_backward<T, 1, kRms>(norm, programs, device, stream);
    });
  if (dweight) column_sums(norm.dweight, dweight, programs, N, weight_dtype, stream);
  if (dbias) column_sums(norm.dbias, dbias, programs, N, bias_dtype, stream);
  check_launch(kRms ? "rms_norm_backward" : "layer_norm_backward", M, N);
}

}  // namespace slimkernels
