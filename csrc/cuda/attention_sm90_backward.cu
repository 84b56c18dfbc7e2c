// The entry point of attention's gradients on Hopper: tensor maps, the tiles for the heads' width,
// the launches.
#include <algorithm>

#include "attention_sm90_backward.cuh"
#include "attention_sm90_host.cuh"

namespace slimkernels {
namespace {

struct Operands {
  Heads q, k, v, dy;

  int64_t width() const { return std::max(q.columns, v.columns); }
};

constexpr int kMostOneWalk = 128;  // wide

// Blocks of one head that start together wait for one another, the last one as many turns as they
// are: with more heads in a section they are fewer, though L2 may not hold those.
constexpr int kMostWaiting = 8;

// What the kernels share in global memory: dq's sums, lse and delta, counters.
struct Room {
  int64_t sums = 0, known, counters = 0;  // elements

  Room(const AttentionShape& shape, int64_t rows, int64_t width, bool wants_all) : known(2 * rows) {
    constexpr int kQueries = KeyGradientTile<__half, 128, true>::kWalked;  // as of all
    const int64_t tiles = int64_t(query_tiles(shape, kQueries)) * shape.heads;
    if (!wants_all || width > kMostOneWalk) return;
    sums = tiles * kQueries * (width <= 64 ? 64 : 128);
    counters = tiles + 1;
  }
  int64_t bytes() const { return 4 * (sums + known + counters); }
};

template <typename T>
void launch_delta(const AttentionRows& x, cudaStream_t stream) {
  const int rows = kDeltaThreads / delta_lanes(x.width);  // of a block
  LAUNCH(attention_delta_kernel<T>, dim3(unsigned((x.rows + rows - 1) / rows)), dim3(kDeltaThreads),
         stream, x);
}

// `shape` may be a mirrored one, each of whose key heads reads `bytes_of_head`. M, N: queries and
// keys of a tile.
template <typename Tile, typename Kernel>
void launch_walk(Tile, Kernel kernel, const AttentionShape& shape, int64_t bytes_of_head, int M,
                 int N, const Operands& x, AttentionBackwardArguments arguments, int device,
                 cudaStream_t stream) {
  using T = typename Tile::T;
  const int works = query_tiles(shape, Tile::kOwn) * shape.heads;
  const int blocks = smaller(works, multiprocessors(device));
  arguments.section = section_of(shape, blocks, bytes_of_head, kL2Bytes);
  if (Tile::kDqBytes > 0)
    arguments.section =
        clamped(blocks / kMostWaiting, arguments.section, shape.sequences * shape.heads);
  LAUNCH_CLUSTER(kernel, dim3(works), dim3(Tile::kThreads), 1, WalkShared<Tile>::kBytes, stream,
                 head_map<T>(x.q, M), head_map<T>(x.k, N), head_map<T>(x.v, N),
                 head_map<T>(x.dy, M), arguments);
}

template <typename T, int kD>
void launch_one_walk(const Operands& x, const AttentionBackwardArguments& arguments, int device,
                     cudaStream_t stream) {
  using Keys = KeyGradientTile<T, kD, true>;
  const AttentionShape& shape = arguments.shape;
  const int64_t bytes_of_token = (2 * sizeof(T) + sizeof(float)) * kD;  // of q, dy and dq's sums
  launch_walk(Keys{}, attention_sm90_dkdv_kernel<Keys>, mirrored(shape),
              bytes_of_token * x.q.tokens * shape.group, Keys::kWalked, Keys::kOwn, x, arguments,
              device, stream);
  LAUNCH(attention_dq_kernel<Keys>, dim3(query_tiles(shape, Keys::kWalked) * shape.heads),
         dim3(Keys::kGroups * kWarpGroup), stream, arguments);
}

template <typename T, int kD>
void launch_walks(const Operands& x, const AttentionBackwardArguments& arguments, int device,
                  cudaStream_t stream) {
  if constexpr (kD <= kMostOneWalk)
    if (arguments.sums != nullptr) return launch_one_walk<T, kD>(x, arguments, device, stream);
  using Keys = KeyGradientTile<T, kD, false>;
  using Queries = QueryGradientTile<T, kD>;
  const AttentionShape& shape = arguments.shape;
  const int64_t bytes_of_token = 2 * sizeof(T) * kD;  // of k and v, or of q and dy
  if (arguments.dk != nullptr)
    launch_walk(Keys{}, attention_sm90_dkdv_kernel<Keys>, mirrored(shape),
                bytes_of_token * x.q.tokens * shape.group, Keys::kWalked, Keys::kOwn, x, arguments,
                device, stream);
  if (arguments.dq != nullptr)
    launch_walk(Queries{}, attention_sm90_dq_kernel<Queries>, shape, bytes_of_token * x.k.tokens,
                Queries::kOwn, Queries::kWalked, x, arguments, device, stream);
}

template <typename T>
void launch_backward(const AttentionRows& rows, const Operands& x,
                     const AttentionBackwardArguments& arguments, int device, cudaStream_t stream) {
  launch_delta<T>(rows, stream);
  if (x.width() <= 64)
    launch_walks<T, 64>(x, arguments, device, stream);
  else if (x.width() <= 128)
    launch_walks<T, 128>(x, arguments, device, stream);
  else
    launch_walks<T, 256>(x, arguments, device, stream);
}

}  // namespace

int64_t attention_backward_bytes(int64_t B, int64_t H, int64_t Tq, int64_t D, int64_t Dv,
                                 bool is_ragged, bool wants_all) {
  const int starts = 0;  // ragged: only whether there are any counts
  AttentionShape shape = {};
  shape.sequences = int(B);
  shape.heads = int(H);
  shape.Tq = int(Tq);
  shape.cu_seqlens_q = is_ragged ? &starts : nullptr;
  return Room(shape, (is_ragged ? 1 : B) * H * Tq, std::max(D, Dv), wants_all).bytes();
}

void attention_backward(const void* query, const void* key, const void* value, const void* dy,
                        const void* y, const float* lse, const float* dlse, void* room, void* dq,
                        void* dk, void* dv, const int* cu_seqlens_q, const int* cu_seqlens_k,
                        const int* key_lengths, const int* causal_offsets, int64_t B, int64_t H,
                        int64_t Hkv, int64_t Tq, int64_t Tk, int64_t D, int64_t Dv, int64_t q_batch,
                        int64_t q_head, int64_t q_token, int64_t k_batch, int64_t k_head,
                        int64_t k_token, int64_t v_batch, int64_t v_head, int64_t v_token,
                        int64_t dy_batch, int64_t dy_head, int64_t dy_token, int64_t left,
                        int64_t right, int64_t offset, float scale, float dq_scale, float softcap,
                        int dtype, int device, void* stream) {
  const DeviceGuard guard(device);
  if (capability(device) != 90)  // elsewhere the kernels are empty
    throw std::runtime_error("attention_backward: compute capability 9.0 is needed");
  const bool is_ragged = cu_seqlens_q != nullptr;
  const int64_t batch = is_ragged ? 1 : B, rows = batch * H * Tq;
  const AttentionShape shape = {int(B),       int(H),       int(H / Hkv), int(Tq),
                                int(Tk),      int(left),    int(right),   int(offset),
                                cu_seqlens_q, cu_seqlens_k, key_lengths,  causal_offsets};
  const Room parts(shape, rows, std::max(D, Dv), dq != nullptr && dk != nullptr);
  float* const sums = parts.sums > 0 ? static_cast<float*>(room) : nullptr;
  float* const base2 = static_cast<float*>(room) + parts.sums;
  float* const delta = base2 + rows;
  int* const counters = reinterpret_cast<int*>(base2 + parts.known);
  const AttentionBackwardArguments arguments = {shape,  0,       scale, dq_scale,     softcap,
                                                int(D), int(Dv), base2, delta,        dq,
                                                dk,     dv,      sums,  counters + 1, counters};
  const AttentionRows of_rows = {
      dy,    y,        dy_batch, dy_head,        dy_token, lse,     lse + rows, dlse,     base2,
      delta, counters, rows,     parts.counters, int(H),   int(Tq), int(Dv),    is_ragged};
  const Operands x = {{query, D, Tq, H, batch, q_batch, q_head, q_token},
                      {key, D, Tk, Hkv, batch, k_batch, k_head, k_token},
                      {value, Dv, Tk, Hkv, batch, v_batch, v_head, v_token},
                      {dy, Dv, Tq, H, batch, dy_batch, dy_head, dy_token}};
  if (Dtype(dtype) == Dtype::kFloat16)
    launch_backward<__half>(of_rows, x, arguments, device, (cudaStream_t)stream);
  else
    launch_backward<__nv_bfloat16>(of_rows, x, arguments, device, (cudaStream_t)stream);
  check_launch("attention_backward", rows, D);
}

}  // namespace slimkernels
