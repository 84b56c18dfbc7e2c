// Many tensors in one call: a table of addresses and sizes, and how threads share their elements.
#pragma once
#include "parallel.h"
#include "vec.h"

namespace slimkernels::SLIM_ISA {

// A table of int64: one row a column of tensors, `count` wide; the last row has their sizes.
// Mirrors table() in slimkernels/backends/cpu/_tensor_lists.py. Address 0 stands for a column's
// absence.
struct TensorLists {
  const int64_t* table;
  int64_t count;
  int size_row;

  template <typename T>
  T* at(int row, int64_t tensor) const {
    return (T*)table[row * count + tensor];
  }
  int64_t size(int64_t tensor) const { return table[size_row * count + tensor]; }
  int64_t elements() const {
    int64_t total = 0;
    for (int64_t i = 0; i < count; ++i) total += size(i);
    return total;
  }
};

// Tensors are cut at multiples of this many elements, whatever the number of threads: an element
// falls into a whole or a partial vector by its place in the tensor alone.
inline constexpr int64_t kChunk = 16384;

inline int64_t chunks_of(int64_t size) { return (size + kChunk - 1) / kChunk; }

inline int64_t chunks_of(const TensorLists& lists) {
  int64_t total = 0;
  for (int64_t i = 0; i < lists.count; ++i) total += chunks_of(lists.size(i));
  return total;
}

// body(tensor, begin, end, chunk) over the chunks of all tensors, in equal parts.
template <typename Body>
void for_tensor_chunks(const TensorLists& lists, Body body) {
  const int64_t chunks = chunks_of(lists);
  const int threads = threads_for(lists.elements());
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int part = 0; part < threads; ++part) {
    const int64_t first = chunks * part / threads, last = chunks * (part + 1) / threads;
    int64_t tensor = 0, before = 0;  // chunks of the tensors before this one
    for (int64_t chunk = first; chunk < last; ++chunk) {
      while (chunk - before >= chunks_of(lists.size(tensor)))
        before += chunks_of(lists.size(tensor++));
      const int64_t begin = (chunk - before) * kChunk;
      body(tensor, begin, clamp(begin + kChunk, 0, lists.size(tensor)), chunk);
    }
  }
}

// How gradients enter an update: multiplied, or not at all. Mirrors slimkernels/ops/grad_norm.py's
// (norm, coefficient, applies), of which null stands for no clipping.
struct Clip {
  float coefficient;
  bool applies;
  Clip(const float* clip, int maximize) {
    coefficient = (clip ? clip[1] : 1.f) * (maximize ? -1.f : 1.f);
    applies = !clip || clip[2] != 0.f;
  }
};

// The value to update: the float32 master of a parameter in fewer bits, unless somebody has written
// the parameter since, or the parameter itself where it has no master.
template <typename T, typename Lanes>
inline vfloat load_master(const float* master, const T* param, int64_t i, Lanes n) {
  const vfloat narrow = load(param + i, n);
  if constexpr (sizeof(T) == sizeof(float)) return narrow;
  if (!master) return narrow;
  const vfloat wide = load(master + i, n);
  return from_bf16(to_bf16(wide)) == narrow ? wide : narrow;
}

template <typename T, typename Lanes>
inline void store_master(float* master, T* param, int64_t i, vfloat value, Lanes n) {
  store(param + i, value, n);
  if constexpr (sizeof(T) != sizeof(float))
    if (master) store(master + i, value, n);
}

}  // namespace slimkernels::SLIM_ISA
