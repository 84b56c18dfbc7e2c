// The entry point of attention on Hopper: tensor maps, the tile for the heads' width, the launch.
#include <algorithm>

#include "attention_sm90.cuh"
#include "attention_sm90_host.cuh"

namespace slimkernels {
namespace {

template <typename T, typename Run>
void with_width(int64_t width, Run run) {
  if (width <= 64)
    run(AttentionTile<T, 64>{});
  else if (width <= 128)
    run(AttentionTile<T, 128>{});
  else
    run(AttentionTile<T, 256>{});
}

template <typename Run>
void with_tile(int dtype, int64_t width, Run run) {
  if (Dtype(dtype) == Dtype::kFloat16)
    with_width<__half>(width, run);
  else
    with_width<__nv_bfloat16>(width, run);
}

template <typename Tile>
void launch_forward(Tile, const Heads& q, const Heads& k, const Heads& v,
                    AttentionArguments arguments, int device, void* stream) {
  using T = typename Tile::T;
  const int packed = packed_heads(arguments.shape, Tile::kM), tokens = Tile::kM / packed;
  const AttentionShape shape = packed_call(arguments.shape, packed);
  const int blocks = smaller(query_tiles(shape, tokens) * shape.heads, multiprocessors(device));
  const int64_t bytes_of_head = 2 * sizeof(T) * Tile::kWidth * k.tokens;
  arguments.shape = shape;
  arguments.schedule = {blocks, section_of(shape, blocks, bytes_of_head, kL2Bytes)};
  arguments.packed = packed;
  arguments.tokens = tokens;
  LAUNCH_CLUSTER(attention_sm90_forward_kernel<Tile>, dim3(blocks), dim3(Tile::kThreads), 1,
                 kAttentionSharedBytes<Tile>, (cudaStream_t)stream,
                 packed_map<T>(q, packed, tokens), head_map<T>(k, Tile::kN),
                 head_map<T>(v, Tile::kN), arguments);
}

}  // namespace

void attention_forward(const void* query, const void* key, const void* value, void* y, float* lse,
                       const int* cu_seqlens_q, const int* cu_seqlens_k, const int* key_lengths,
                       const int* causal_offsets, int64_t B, int64_t H, int64_t Hkv, int64_t Tq,
                       int64_t Tk, int64_t D, int64_t Dv, int64_t q_batch, int64_t q_head,
                       int64_t q_token, int64_t k_batch, int64_t k_head, int64_t k_token,
                       int64_t v_batch, int64_t v_head, int64_t v_token, int64_t left,
                       int64_t right, int64_t offset, float scale, float softcap, int dtype,
                       int device, void* stream) {
  const DeviceGuard guard(device);
  if (capability(device) != 90)  // elsewhere the kernel is empty
    throw std::runtime_error("attention_forward: compute capability 9.0 is needed");
  AttentionArguments arguments = {};
  arguments.shape = {int(B),       int(H),       int(H / Hkv), int(Tq),
                     int(Tk),      int(left),    int(right),   int(offset),
                     cu_seqlens_q, cu_seqlens_k, key_lengths,  causal_offsets};
  const int64_t batch = cu_seqlens_q == nullptr ? B : 1;
  arguments.scale = scale;
  arguments.softcap = softcap;
  arguments.value_width = int(Dv);
  arguments.y = y;
  arguments.lse = lse;
  arguments.low = lse + batch * H * Tq;
  const Heads q = {query, D, Tq, H, batch, q_batch, q_head, q_token};
  const Heads k = {key, D, Tk, Hkv, batch, k_batch, k_head, k_token};
  const Heads v = {value, Dv, Tk, Hkv, batch, v_batch, v_head, v_token};
  with_tile(dtype, std::max(D, Dv),
            [&](auto tile) { launch_forward(tile, q, k, v, arguments, device, stream); });
  check_launch("attention_forward", batch * H * Tq, D);
}

}  // namespace slimkernels
