// What the hosts of attention's Hopper kernels share.
#pragma once
#include "hopper.cuh"

namespace slimkernels {

// L2 has 50 MB, half of them for what the tiles at work read again and again.
constexpr int64_t kL2Bytes = 25 << 20;

// One of query, key, value and dy.
struct Heads {
  const void* start;
  int64_t columns, tokens, heads, batch;
  int64_t batch_stride, head_stride, token_stride;
};

// A dimension of one has any stride, even one that a map would refuse.
inline int64_t mapped_stride(int64_t size, int64_t stride, int64_t without_gaps) {
  return size > 1 ? stride : without_gaps;
}

// Its map, columns innermost, in boxes of `rows` tokens by one panel.
template <typename T>
TensorMap head_map(const Heads& x, int rows) {
  return tensor_map<T, 4>(static_cast<const T*>(x.start), {x.columns, x.tokens, x.heads, x.batch},
                          {mapped_stride(x.tokens, x.token_stride, x.columns),
                           mapped_stride(x.heads, x.head_stride, x.columns * x.tokens),
                           mapped_stride(x.batch, x.batch_stride, x.columns * x.tokens * x.heads)},
                          {kPanelColumns, rows, 1, 1});
}

// The same of queries, each token's next to one another for the `packed` heads that share a tile:
// columns, heads of a key head, tokens, key heads, batch.
template <typename T>
TensorMap packed_map(const Heads& q, int packed, int tokens) {
  const int64_t head = mapped_stride(q.heads, q.head_stride, q.columns * q.tokens);
  return tensor_map<T, 5>(static_cast<const T*>(q.start),
                          {q.columns, packed, q.tokens, q.heads / packed, q.batch},
                          {head, mapped_stride(q.tokens, q.token_stride, q.columns), head * packed,
                           mapped_stride(q.batch, q.batch_stride, q.columns * q.tokens * q.heads)},
                          {kPanelColumns, packed, tokens, 1, 1});
}

}  // namespace slimkernels
