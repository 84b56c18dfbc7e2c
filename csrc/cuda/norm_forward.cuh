// total = residual + row_scale * dropout(x), y = (total - mean) * rstd * weight + bias; an RMSNorm
// has no mean, a plain norm's total is x.
//
// Tiling   rows.cuh: a team holds a row in registers; only one that is too long for that is read
//          twice.
// Traffic  reads N elements a row and writes N, with a residual 2 N and 2 N; the roof is DRAM
//          bandwidth.
// Numerics The variance is two-pass, and what centering left of the mean corrects both moments, as
//          in backends/triton/_rows.py; rows in pieces merge the moments of each piece (Chan,
//          Golub, LeVeque 1983). The statistics are those of the total as stored.
// Launch   a team a row.
#pragma once
#include "norm.h"
#include "ops.h"
#include "rows.cuh"

namespace slimkernels {

// Single elements need more registers than packs of them: more addresses.
template <int kVec>
constexpr int kForwardThreads = kVec == 1 ? 256 : 1024;

struct Moments {
  float count, mean, m2;  // m2 = sum((x - mean)^2)
};

__device__ inline Moments combine_moments(Moments a, Moments b) {
  const float count = a.count + b.count;
  if (count == 0.f) return a;
  const float far = b.mean - a.mean, share = b.count / count;
  return {count, a.mean + far * share, a.m2 + b.m2 + far * far * a.count * share};
}

template <int kVec>
__device__ float sum_of(Piece<kVec>& piece) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kHeld / kVec; ++i)
#pragma unroll
    for (int j = 0; j < kVec; ++j) sum += piece[i][j];
  return sum;
}

template <int kVec>
__device__ float square_sum_of(Piece<kVec>& piece) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kHeld / kVec; ++i)
#pragma unroll
    for (int j = 0; j < kVec; ++j) sum += piece[i][j] * piece[i][j];
  return sum;
}

// piece - mean, which past the row's end stays zero.
template <int kVec>
__device__ void center(Piece<kVec>& piece, const Team& team, float mean, int start, int N) {
  team.each_pack<kVec>(start, N, [&](int i, int) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) piece[i][j] -= mean;
  });
}

template <int kVec>
__device__ Moments moments_of(Piece<kVec> piece, const Team& team, int start, int N) {
  float count = 0.f;
  team.each_pack<kVec>(start, N, [&](int, int) { count += kVec; });
  if (count == 0.f) return {0.f, 0.f, 0.f};
  const float mean = sum_of(piece) / count;
  center(piece, team, mean, start, N);
  return {count, mean, square_sum_of(piece)};
}

// row_scale * dropout(piece), and as well what becomes of a gradient on its way back.
template <int kVec>
__device__ void drop_and_scale(Piece<kVec>& piece, const Team& team, const Dropout& dropout,
                               const float* row_scale, int64_t row, int start, int N) {
  if (dropout.seed) {
    const RowBits bits(*dropout.seed, row);
    team.each_pack<kVec>(start, N, [&](int i, int col) {
#pragma unroll
      for (int j = 0; j < kVec; ++j)
        piece[i][j] = bits.at(col + j) >= dropout.threshold ? piece[i][j] * dropout.scale : 0.f;
    });
  }
  if (row_scale) {
    const float scale = N ? row_scale[row] : 0.f;  // N is 0 beyond the last row
#pragma unroll
    for (int i = 0; i < kHeld / kVec; ++i)
#pragma unroll
      for (int j = 0; j < kVec; ++j) piece[i][j] *= scale;
  }
}

// Loads a piece of the total or, where there is a residual, makes and stores it.
template <typename T, int kVec>
__device__ void make_total(Piece<kVec>& total, const NormForward& norm, const Team& team,
                           int64_t row, int start, int N) {
  load_piece(total, team, static_cast<const T*>(norm.x) + row * norm.N, start, N);
  if (!norm.residual) return;
  Piece<kVec> residual;
  load_either<T>(residual, team, norm.residual, row * norm.N, start, N, norm.residual_is_wide);
  drop_and_scale(total, team, norm.dropout, norm.row_scale, row, start, N);
  const bool is_rounded = sizeof(T) < sizeof(float) && !norm.residual_is_wide;
#pragma unroll
  for (int i = 0; i < kHeld / kVec; ++i)
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      const float sum = residual[i][j] + total[i][j];
      total[i][j] = is_rounded ? widen(narrow<T>(sum)) : sum;
    }
  store_either<T>(norm.total, row * norm.N, total, team, start, N, norm.residual_is_wide);
}

// y = (piece - mean) * rstd * weight + bias
template <typename T, int kVec>
__device__ void write_output(Piece<kVec>& piece, const NormForward& norm, const Team& team,
                             float mean, float rstd, int64_t row, int start, int N) {
  Piece<kVec> parameter;
  if (norm.weight) load_either<T>(parameter, team, norm.weight, 0, start, N, norm.weight_is_wide);
#pragma unroll
  for (int i = 0; i < kHeld / kVec; ++i)
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      piece[i][j] = (piece[i][j] - mean) * rstd;
      if (norm.weight) piece[i][j] *= parameter[i][j] + norm.weight_offset;
    }
  if (norm.bias) {
    load_either<T>(parameter, team, norm.bias, 0, start, N, norm.bias_is_wide);
#pragma unroll
    for (int i = 0; i < kHeld / kVec; ++i)
#pragma unroll
      for (int j = 0; j < kVec; ++j) piece[i][j] += parameter[i][j];
  }
  store_piece(static_cast<T*>(norm.y) + row * norm.N, piece, team, start, N);
}

template <typename T, int kVec, bool kRms>
__global__ void __launch_bounds__(kForwardThreads<kVec>, 1)
    norm_forward_kernel(NormForward norm, RowTiling tiling) {
  Team team(tiling);
  const int64_t row = team.first_row();
  const int N = row < norm.M ? norm.N : 0, step = kHeld * team.size();
  Piece<kVec> total;
  Moments moments = {0.f, 0.f, 0.f};
  for (int start = 0; start < norm.N; start += step) {  // once, if the row is held
    make_total<T>(total, norm, team, row, start, N);
    if (kRms)
      moments.m2 += square_sum_of(total);
    else if (!tiling.is_held)
      moments = combine_moments(moments, moments_of(total, team, start, N));
  }

  const float count = float(norm.N);
  float mean = 0.f, shift = 0.f, variance;  // shift: what is still to be subtracted of the mean
  if (kRms) {
    variance = team.reduce(moments.m2, combine_sum) / count;
  } else if (tiling.is_held) {
    const float near = team.reduce(sum_of(total), combine_sum) / count;
    center(total, team, near, 0, N);
    SumPair sums = {sum_of(total), square_sum_of(total)};
    sums = team.reduce(sums, combine_sum_pair);
    shift = sums.first / count;
    variance = sums.second / count - shift * shift;
    variance = variance < 0.f ? 0.f : variance;
    mean = near + shift;
  } else {
    moments = team.reduce(moments, combine_moments);
    mean = shift = moments.mean;
    variance = moments.m2 / count;
  }
  const float rstd = rsqrtf(variance + norm.eps);

  for (int start = 0; start < norm.N; start += step) {
    if (!tiling.is_held && norm.residual)
      load_either<T>(total, team, norm.total, row * norm.N, start, N, norm.residual_is_wide);
    else if (!tiling.is_held)
      load_piece(total, team, static_cast<const T*>(norm.x) + row * norm.N, start, N);
    write_output<T>(total, norm, team, shift, rstd, row, start, N);
  }
  if (team.rank() == 0 && N) {
    if (!kRms) norm.mean[row] = mean;
    norm.rstd[row] = rstd;
  }
}

template <typename T, int kVec, bool kRms>
void launch_norm_forward(const NormForward& norm, int device, void* stream) {
  const RowTiling tiling = row_tiling(norm.N, kForwardThreads<kVec>, max_cluster(device));
  LAUNCH_CLUSTER((norm_forward_kernel<T, kVec, kRms>), tiling.grid(norm.M), tiling.block(),
                 tiling.blocks, 0, (cudaStream_t)stream, norm, tiling);
}

template <bool kRms>
void norm_forward(const void* x, const void* residual, const void* weight, const void* bias,
                  void* y, void* total, float* mean, float* rstd, const int64_t* seed,
                  const float* row_scale, int64_t M, int64_t N, float eps, float weight_offset,
                  int64_t threshold, float dropout_scale, int dtype, int residual_dtype,
                  int weight_dtype, int bias_dtype, int device, void* stream) {
  const DeviceGuard guard(device);
  const NormForward norm = {x,
                            residual,
                            weight,
                            bias,
                            y,
                            total,
                            mean,
                            rstd,
                            {seed, uint32_t(threshold), dropout_scale},
                            row_scale,
                            M,
                            int(N),
                            eps,
                            weight_offset,
                            is_float32(residual_dtype),
                            is_float32(weight_dtype),
                            is_float32(bias_dtype)};
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (rows_aligned<T>(N, x, residual, weight, bias, y, total))
      launch_norm_forward<T, kFullVec<T>, kRms>(norm, device, stream);
    else
      launch_norm_forward<T, 1, kRms>(norm, device, stream);
  });
  check_launch(kRms ? "rms_norm_forward" : "layer_norm_forward", M, N);
}

}  // namespace slimkernels
