// What a call may do to attention's scores beside scaling them: one row at a time, and only where
// the call asks for it.
//
// Computes  with position = i + offset, in this order
//             s = softcap * tanh(s / softcap)
//             s = s + bias[b, h, i, j] - slope[b, h] * |j - position| + relative[h, j - position]
//             s = -inf where the mask hides key j
//           and in backward, where ds is the gradient of the result, ds * (1 - tanh^2) for the
//           products and sums of ds for the bias and the relative bias.
// Numerics  Sums of ds over queries and heads are in float64: they are as long as a batch.
#pragma once
#include "attention.h"

namespace slimkernels::SLIM_ISA {

// A mask or a bias: element (sequence, head, i, j), strides 0 along what it is broadcast over.
struct Grid {
  const void* values;  // null if there is none
  int64_t sequence, head, i, j;

  template <typename T>
  const T* at(const Sequence& s, int64_t h, int64_t query, int64_t key) const {
    return (const T*)values + s.index * sequence + h * head + query * i + key * j;
  }
};

// One call's. Mirrors _variant() in slimkernels/backends/cpu/scaled_dot_product_attention.py.
struct Variant {
  Grid bias, mask;
  int64_t bias_dtype, bias_size[4];
  const float* slopes;
  int64_t slopes_sequence, slopes_head;  // strides
  const float* sinks;                    // (H,)
  const float* relative;                 // (H, 2 * reach + 1)
  int64_t reach;                         // farther keys share the last's
  float softcap = 0.f;                   // 0 for none
  bool modifies = false;                 // whether modify() does anything: sinks alone need it not

  Variant(const int64_t* numbers, float softcap) : bias{}, mask{} {
    if (numbers)
      std::memcpy((void*)this, numbers, offsetof(Variant, softcap));
    else
      std::memset((void*)this, 0, offsetof(Variant, softcap));
    this->softcap = softcap;
    modifies = bias.values || mask.values || slopes || relative || softcap != 0.f;
  }

  float sink(int64_t head) const { return sinks ? sinks[head] : -kInfinity; }
  int64_t distances() const { return 2 * reach + 1; }
};

// Query i of a sequence, and the n keys from `first` that its row of scores is about.
struct Row {
  const Sequence& sequence;
  int64_t head, i, first, n;
  int64_t distance() const { return first - (i + sequence.offset); }  // of the first key
};

inline float widened(float x) { return x; }
inline float widened(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <typename T>
inline void add_row(const T* x, int64_t stride, int64_t n, float* s) {
  if (stride == 1)
    for_vectors(n, [&](int64_t j, auto lanes) {
      store(s + j, load(s + j, Full{}) + load(x + j, lanes), lanes);
    });
  else
    for (int64_t j = 0; j < n; ++j) s[j] += widened(x[j * stride]);
}

// s = softcap * tanh(s / softcap); slope, if any, becomes the derivative.
inline void cap(float softcap, int64_t n, float* s, float* slope) {
  for_vectors(n, [&](int64_t j, auto lanes) {
    const Hyperbolic t = hyperbolic(load(s + j, Full{}) / softcap);
    store(s + j, softcap * t.value, lanes);
    if (slope) store(slope + j, t.slope, Full{});
  });
}

inline void subtract_distances(float slope, int64_t distance, int64_t n, float* s) {
  vfloat ahead;
  for (int i = 0; i < kLanes; ++i) ahead[i] = float(i);
  for_vectors(n, [&](int64_t j, auto lanes) {
    const vfloat d = ahead + float(distance + j);
    store(s + j, load(s + j, Full{}) - slope * (d < 0.f ? -d : d), lanes);
  });
}

// Which of n keys are near enough to their query for a place of their own in the relative bias;
// those before share the first's, and those after the last's.
inline Span near_keys(int64_t reach, int64_t distance, int64_t n) {
  const int64_t begin = clamp(-reach - distance, 0, n);
  return {begin, clamp(reach + 1 - distance, begin, n)};
}

inline void add_relative(const float* relative, int64_t reach, int64_t distance, int64_t n,
                         float* s) {
  const Span near = near_keys(reach, distance, n);
  const float *at = relative + reach + distance, first = relative[0], last = relative[2 * reach];
  for (int64_t j = 0; j < near.begin; ++j) s[j] += first;
  for (int64_t j = near.begin; j < near.end; ++j) s[j] += at[j];
  for (int64_t j = near.end; j < n; ++j) s[j] += last;
}

inline void hide(const uint8_t* shown, int64_t stride, int64_t n, float* s) {
  if (stride == 1)
    for (int64_t j = 0; j < n; ++j) s[j] = shown[j] ? s[j] : -kInfinity;
  else
    for (int64_t j = 0; j < n; ++j) s[j] = shown[j * stride] ? s[j] : -kInfinity;
}

// The scores of one row. slope, if not null, becomes softcap's derivative.
inline void modify(const Variant& v, const Row& row, float* s, float* slope) {
  if (v.softcap != 0.f) cap(v.softcap, row.n, s, slope);
  if (v.bias.values)
    with_type(int(v.bias_dtype), [&](auto zero) {
      using T = decltype(zero);
      add_row(v.bias.at<T>(row.sequence, row.head, row.i, row.first), v.bias.j, row.n, s);
    });
  if (v.slopes) {
    const int64_t at = row.sequence.index * v.slopes_sequence + row.head * v.slopes_head;
    subtract_distances(v.slopes[at], row.distance(), row.n, s);
  }
  if (v.relative)
    add_relative(v.relative + row.head * v.distances(), v.reach, row.distance(), row.n, s);
  if (v.mask.values)
    hide(v.mask.at<uint8_t>(row.sequence, row.head, row.i, row.first), v.mask.j, row.n, s);
}

inline float sum_of(const float* x, int64_t n) {
  return sum_over(n, [&](int64_t i, auto lanes) { return load(x + i, lanes); });
}

// ds of one row into sums (2 * reach + 1,) of its sequence and head.
inline void add_to_relative(const Variant& v, const Row& row, const float* ds, double* sums) {
  const int64_t distance = row.distance();
  const Span near = near_keys(v.reach, distance, row.n);
  double* at = sums + v.reach + distance;
  sums[0] += sum_of(ds, near.begin);
  for (int64_t j = near.begin; j < near.end; ++j) at[j] += ds[j];
  sums[2 * v.reach] += sum_of(ds + near.end, row.n - near.end);
}

// ds of one row into sums of the bias' last two dimensions, the first from row `begin` on.
inline void add_to_bias(const Variant& v, const Row& row, int64_t begin, const float* ds,
                        double* sums) {
  const int64_t I = v.bias_size[2], J = v.bias_size[3];
  double* at = sums + (I == 1 ? 0 : row.i - begin) * J + (J == 1 ? 0 : row.first);
  if (J == 1)
    *at += sum_of(ds, row.n);
  else
    for (int64_t j = 0; j < row.n; ++j) at[j] += ds[j];
}

// ds of one row, as it is, into the gradient of a bias that is broadcast over nothing.
template <typename T>
inline void write_to_bias(const Variant& v, const Row& row, const float* ds, T* dbias) {
  const int64_t* size = v.bias_size;
  const int64_t at = ((row.sequence.index * size[1] + row.head) * size[2] + row.i) * size[3];
  for_vectors(row.n, [&](int64_t j, auto lanes) {
    store(dbias + at + row.first + j, load(ds + j, Full{}), lanes);
  });
}

inline void store_one(float x, float* out) { *out = x; }
inline void store_one(float x, bf16* out) { store(out, broadcast(x), Part{1}); }

// out (B or 1, H or 1, n) = the sum of sums (B, H, n) over what is one there, in order.
template <typename T>
void reduce(const double* sums, int64_t B, int64_t H, int64_t n, bool over_b, bool over_h, T* out) {
  const int64_t heads = over_h ? 1 : H, rows = (over_b ? 1 : B) * heads;
  for_rows(rows * n, B * H / clamp(rows, 1, rows + 1), [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t b0 = at / n / heads, h0 = at / n % heads;
      double total = 0;
      for (int64_t b = over_b ? 0 : b0; b < (over_b ? B : b0 + 1); ++b)
        for (int64_t h = over_h ? 0 : h0; h < (over_h ? H : h0 + 1); ++h)
          total += sums[(b * H + h) * n + at % n];
      store_one(float(total), out + at);
    }
  });
}

}  // namespace slimkernels::SLIM_ISA
