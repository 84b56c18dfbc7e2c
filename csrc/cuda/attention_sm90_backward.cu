// The entry point of attention's gradients on Hopper: tensor maps, the tiles for the heads' width,
// the launches.
#include <algorithm>

#include "attention_sm90_backward.cuh"
#include "attention_sm90_host.cuh"

namespace slimkernels {

void attention_backward(const void* query, const void* key, const void* value, const void* dy,
                        const void* y, const float* lse, const float* dlse, float* known, void* dq,
                        void* dk, void* dv, const int* cu_seqlens_q, const int* cu_seqlens_k,
                        const int* key_lengths, const int* causal_offsets, int64_t B, int64_t H,
                        int64_t Hkv, int64_t Tq, int64_t Tk, int64_t D, int64_t Dv, int64_t q_batch,
                        int64_t q_head, int64_t q_token, int64_t k_batch, int64_t k_head,
                        int64_t k_token, int64_t v_batch, int64_t v_head, int64_t v_token,
                        int64_t dy_batch, int64_t dy_head, int64_t dy_token, int64_t left,
                        int64_t right, int64_t offset, float scale, float dq_scale, float softcap,
                        int dtype, int device, void* stream_) {
  const DeviceGuard guard(device);
  if (capability(device) != 90)  // elsewhere the kernels are empty
    throw std::runtime_error("attention_backward: compute capability 9.0 is needed");
  const auto stream = (cudaStream_t)stream_;
  const bool is_ragged = cu_seqlens_q != nullptr;
  const int64_t batch = is_ragged ? 1 : B, rows = batch * H * Tq;
  AttentionBackwardArguments arguments = {};
  AttentionShape& shape = arguments.shape;
  shape = {int(B),     int(H),      int(H / Hkv), int(Tq),      int(Tk),     int(left),
           int(right), int(offset), cu_seqlens_q, cu_seqlens_k, key_lengths, causal_offsets};
  arguments.scale = scale;
  arguments.dq_scale = dq_scale;
  arguments.softcap = softcap;
  arguments.width = int(D);
  arguments.value_width = int(Dv);
  arguments.lse = known;
  arguments.delta = known + rows;
  arguments.dq = dq;
  arguments.dk = dk;
  arguments.dv = dv;
  const int64_t q[3] = {q_batch, q_head, q_token}, k[3] = {k_batch, k_head, k_token},
                v[3] = {v_batch, v_head, v_token}, of_dy[3] = {dy_batch, dy_head, dy_token};
  const int width = int(std::max(D, Dv));

  const auto rows_first = [&](auto zero) {
    using T = decltype(zero);
    const int per_block = kDeltaThreads / delta_lanes(int(Dv));
    const AttentionRows of = {dy,   y,          dy_batch, dy_head, dy_token,
                              lse,  lse + rows, dlse,     known,   known + rows,
                              rows, int(H),     int(Tq),  int(Dv), is_ragged};
    LAUNCH(attention_delta_kernel<T>, dim3(unsigned((rows + per_block - 1) / per_block)),
           dim3(kDeltaThreads), stream, of);
  };
  const auto sections = [&](const AttentionShape& of, int works, int64_t tokens) {
    const int64_t bytes_of_head = 2 * 2 * int64_t(width) * tokens;  // of two 16-bit tensors
    return section_of(of, std::min(works, multiprocessors(device)), bytes_of_head, kL2Bytes);
  };
  const auto of_keys = [&](auto tile) {
    using Tile = decltype(tile);
    using T = typename Tile::T;
    const AttentionShape of = mirrored(shape);
    const int works = query_tiles(of, Tile::kN) * of.heads;
    arguments.section = sections(of, works, Tq * shape.group);
    LAUNCH_CLUSTER((attention_sm90_dkdv_kernel<Tile>), dim3(works), dim3(Tile::kThreads), 1,
                   kKeyGradientSharedBytes<Tile>, stream,
                   head_map<T>(query, D, Tq, H, batch, q, Tile::kM),
                   head_map<T>(key, D, Tk, Hkv, batch, k, Tile::kN),
                   head_map<T>(value, Dv, Tk, Hkv, batch, v, Tile::kN),
                   head_map<T>(dy, Dv, Tq, H, batch, of_dy, Tile::kM), arguments);
  };
  const auto of_queries = [&](auto tile) {
    using Tile = decltype(tile);
    using T = typename Tile::T;
    const int works = query_tiles(shape, Tile::kM) * shape.heads;
    arguments.section = sections(shape, works, Tk);
    LAUNCH_CLUSTER((attention_sm90_dq_kernel<Tile>), dim3(works), dim3(Tile::kThreads), 1,
                   kQueryGradientSharedBytes<Tile>, stream,
                   head_map<T>(query, D, Tq, H, batch, q, Tile::kM),
                   head_map<T>(key, D, Tk, Hkv, batch, k, Tile::kN),
                   head_map<T>(value, Dv, Tk, Hkv, batch, v, Tile::kN),
                   head_map<T>(dy, Dv, Tq, H, batch, of_dy, Tile::kM), arguments);
  };
  const auto with_dtype = [&](auto zero) {
    using T = decltype(zero);
    rows_first(zero);
    if (dk != nullptr && width <= 64) of_keys(KeyGradientTile<T, 64>{});
    if (dk != nullptr && width > 64) of_keys(KeyGradientTile<T, 128>{});
    if (dq != nullptr && width <= 64) of_queries(QueryGradientTile<T, 64>{});
    if (dq != nullptr && width > 64) of_queries(QueryGradientTile<T, 128>{});
  };
  if (Dtype(dtype) == Dtype::kFloat16)
    with_dtype(__half{});
  else
    with_dtype(__nv_bfloat16{});
  check_launch("attention_backward", rows, D);
}

}  // namespace slimkernels
