// What the hosts of attention's Hopper kernels share: tensor maps, and how many heads L2 holds.
#pragma once
#include <algorithm>

#include "attention_tiles.cuh"
#include "hopper.cuh"

namespace slimkernels {

// L2 holds 50 MB; keys and values of the heads that are at work should fill half of it.
constexpr int64_t kSectionBytes = 25 << 20;

// Query heads whose keys and values stay in L2 together: whole groups, at least one. Each token of
// either tensor has `width` columns.
inline int section_of(const AttentionShape& shape, int64_t width) {
  const int64_t bytes_of_group = 2 * 2 * width * larger(shape.Tk, 1);
  const int64_t all = int64_t(shape.sequences) * shape.heads;
  const int64_t groups = kSectionBytes / bytes_of_group;
  return int(std::min(all, std::max<int64_t>(groups, 1) * shape.group));
}

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
