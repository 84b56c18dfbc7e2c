// What the hosts of attention's Hopper kernels share.
#pragma once
#include "hopper.cuh"

namespace slimkernels {

// L2 has 50 MB, half of them for what the tiles at work read again and again.
constexpr int64_t kL2Bytes = 25 << 20;

// (columns, tokens, heads, batch) of a tensor, innermost first, in boxes of `rows` by one panel.
template <typename T>
TensorMap head_map(const void* start, int64_t columns, int64_t tokens, int64_t heads, int64_t batch,
                   const int64_t (&strides)[3], int rows) {
  // A dimension of one has any stride, even one that the map would refuse.
  const auto stride = [&](int64_t size, int64_t given) { return size > 1 ? given : 8; };
  return tensor_map<T, 4>(
      static_cast<const T*>(start), {columns, tokens, heads, batch},
      {stride(tokens, strides[2]), stride(heads, strides[1]), stride(batch, strides[0])},
      {kPanelColumns, rows, 1, 1});
}

}  // namespace slimkernels
