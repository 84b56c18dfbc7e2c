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

// Its map, columns innermost, in boxes of `rows` tokens by one panel.
template <typename T>
TensorMap head_map(const Heads& x, int rows) {
  // A dimension of one has any stride, even one that the map would refuse.
  const int64_t token = x.tokens > 1 ? x.token_stride : x.columns;
  const int64_t head = x.heads > 1 ? x.head_stride : x.columns * x.tokens;
  const int64_t batch = x.batch > 1 ? x.batch_stride : x.columns * x.tokens * x.heads;
  return tensor_map<T, 4>(static_cast<const T*>(x.start), {x.columns, x.tokens, x.heads, x.batch},
                          {token, head, batch}, {kPanelColumns, rows, 1, 1});
}

}  // namespace slimkernels
