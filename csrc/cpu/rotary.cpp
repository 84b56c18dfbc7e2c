// Rotary position embedding of query and key: pairs of elements, turned by the token's angles.
//
// Tiling   Threads split the rows of D elements of all heads of both tensors; query and key are
//          read through strides, which may be those of one packed projection.
// Traffic  Each element is read and written once; the tables stay in the caches, since all heads
//          read the same. Backward is the same pass with the opposite sign of every angle.
// Numerics float32.
#include "kernels.h"
#include "parallel.h"
#include "vec.h"

namespace slimkernels::SLIM_ISA {
namespace {

// Mirrored by _problem in slimkernels/backends/cpu/rotary.py.
struct Problem {
  int64_t B, T, D, half, table_rows, offset;  // 2 * half elements of D are turned
  int64_t position_strides[2];                // of positions (B, T)
  int64_t heads[2];                           // of query, of key
  int64_t strides[2][3];                      // of query, of key: batch, head, token
};

// Pairs (i, i + half): with c and s of pair i, a' = a c - b s and b' = b c + a s.
template <typename T>
inline void turn_halves(const T* x, T* y, const float* cos, const float* sin, float sign,
                        int64_t half) {
  for_vectors(half, [&](int64_t i, auto n) {
    const vfloat a = load(x + i, n), b = load(x + half + i, n);
    const vfloat c = load(cos + i, n), s = load(sin + i, n) * sign;
    store(y + i, a * c - b * s, n);
    store(y + half + i, b * c + a * s, n);
  });
}

// Pairs (2 i, 2 i + 1), a vector of whole pairs at a time.
template <typename T>
inline void turn_neighbours(const T* x, T* y, const float* cos, const float* sin, float sign,
                            int64_t half) {
  vfloat signs;
  for (int i = 0; i < kLanes; ++i) signs[i] = i % 2 ? sign : -sign;
  for_vectors(2 * half, [&](int64_t i, auto n) {
    const Part pairs{n.count / 2};
    const vfloat v = load(x + i, n);
    const vfloat c = twice(load(cos + i / 2, pairs)), s = twice(load(sin + i / 2, pairs));
    store(y + i, v * c + swap_neighbours(v) * (s * signs), n);
  });
}

template <typename T>
void rotate(const T* const* from, T* const* to, const float* cos, const float* sin,
            const int64_t* positions, const Problem& p, bool interleaved, float sign) {
  const int64_t of_query = p.B * p.heads[0], lines = of_query + p.B * p.heads[1];
  const auto turn = interleaved ? turn_neighbours<T> : turn_halves<T>;
  const auto row = [&](const T* x, T* y, int64_t position) {
    if (position >= 0 && position < p.table_rows)
      turn(x, y, cos + position * p.half, sin + position * p.half, sign, p.half);
    else  // where Python could not look: loud, and inside the tables
      for (int64_t i = 0; i < 2 * p.half; ++i) store(y + i, broadcast(std::numeric_limits<float>::quiet_NaN()), Part{1});
    const int64_t rest = p.D - 2 * p.half;
    for_vectors(rest, [&](int64_t i, auto n) {
      store(y + 2 * p.half + i, load(x + 2 * p.half + i, n), n);
    });
  };
  for_rows(lines * p.T, p.D, [&](int64_t begin, int64_t end) {
    while (begin < end) {  // a line is one head of one sequence: T rows
      int64_t line = begin / p.T;
      const int64_t first = begin % p.T, last = clamp(first + end - begin, 0, p.T);
      const int which = line >= of_query;
      line -= which ? of_query : 0;
      const int64_t b = line / p.heads[which], h = line % p.heads[which];
      const int64_t* stride = p.strides[which];
      const T* x = from[which] + b * stride[0] + h * stride[1];
      T* y = to[which] + line * p.T * p.D;
      const int64_t* at = positions ? positions + b * p.position_strides[0] : nullptr;
      for (int64_t t = first; t < last; ++t)
        row(x + t * stride[2], y + t * p.D, at ? at[t * p.position_strides[1]] : p.offset + t);
      begin += last - first;
    }
  });
}

}  // namespace

void rotary(const void* query, const void* key, void* turned_query, void* turned_key,
            const float* cos, const float* sin, const int64_t* positions, const int64_t* problem,
            int interleaved, float sign, int dtype) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* from[] = {(const T*)query, (const T*)key};
    T* to[] = {(T*)turned_query, (T*)turned_key};
    rotate(from, to, cos, sin, positions, *(const Problem*)problem, interleaved, sign);
  });
}

}  // namespace slimkernels::SLIM_ISA
