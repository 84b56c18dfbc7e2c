// Rotary position embedding of query and key: pairs of elements, turned by the token's angles.
//
// Tiling   Threads split the tokens; all heads of both tensors turn by the same row of the tables.
//          Query and key are read through strides, which may be those of one packed projection.
// Traffic  Each element is read and written once. Backward is the same pass with the opposite sign
//          of every angle.
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
  int64_t strides[2][3];                      // of query, of key: batch, token, head
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

// A position outside the tables, where Python could not look, gives NaN and reads no table.
template <typename T>
inline void turn(const T* x, T* y, const float* cos, const float* sin, const Problem& p,
                 int64_t position, bool interleaved, float sign) {
  const int64_t turned = 2 * p.half;
  if (position < 0 || position >= p.table_rows)
    for_vectors(turned, [&](int64_t i, auto n) { store(y + i, broadcast(kNaN), n); });
  else
    (interleaved ? turn_neighbours<T> : turn_halves<T>)(x, y, cos + position * p.half,
                                                        sin + position * p.half, sign, p.half);
  for_vectors(p.D - turned,
              [&](int64_t i, auto n) { store(y + turned + i, load(x + turned + i, n), n); });
}

template <typename T>
void rotate(const T* const* from, T* const* to, const float* cos, const float* sin,
            const int64_t* positions, const Problem& p, bool interleaved, float sign) {
  for_rows(p.B * p.T, (p.heads[0] + p.heads[1]) * p.D, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t b = token / p.T, t = token % p.T;
      const int64_t position =
          positions ? positions[b * p.position_strides[0] + t * p.position_strides[1]]
                    : p.offset + t;
      for (int which = 0; which < 2; ++which) {
        const int64_t H = p.heads[which], *stride = p.strides[which];
        const T* x = from[which] + b * stride[0] + t * stride[1];
        T* y = to[which] + token * H * p.D;
        for (int64_t h = 0; h < H; ++h)
          turn(x + h * stride[2], y + h * p.D, cos, sin, p, position, interleaved, sign);
      }
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
