// Softmax of rows: y = exp(s - max(s)) / sum(exp(s - max(s))), s = x * scale + mask where a mask
// allows, and its logarithm, y = s - max(s) - log(sum(exp(s - max(s)))).
//
// Tiling   Threads split the rows. A row's scores stay in L1, in float32, until its sum is known; a
//          row longer than kSegment is taken by segments, twice: for its maximum and sum, and to be
//          written.
// Traffic  Forward reads and writes N elements a row; backward reads 2 N and writes N. Columns past
//          the last one that a row sees are not read. A row of the mask that neighbours share is
//          searched once for that column, and a bool one not read again if nothing before it is
//          hidden. Dropout reads the row that was just written, out of L1, and writes another.
// Numerics Subtracting the row's maximum bounds exp by 1; over segments the sum so far is rescaled
//          when the maximum rises. A row whose scores are all -inf is NaN, as in torch; one that
//          sees nothing is zero, its logarithm -inf. A head's sink gradient is added up in double,
//          first row to last.
#include "softmax.h"

#include "kernels.h"
#include "parallel.h"
#include "random.h"
#include "rows.h"

namespace slimkernels::SLIM_ISA {
namespace {

constexpr int64_t kSegment = 4096;
constexpr int64_t kDropoutWork = 2;  // with the random bits, in rows without

// The columns that a row sees: those below `end` that mask shows, all of those if it is null.
template <typename M>
struct Visible {
  int64_t end;
  const M* mask;
};

// What each row sees, asked row after row.
template <typename M>
class Sight {
 public:
  Sight(const void* mask, const SoftmaxProblem& p) : mask_((const M*)mask), p_(p) {}

  Visible<M> of(int64_t row) {
    const int64_t end = p_.period ? clamp(row % p_.period + 1, 0, p_.N) : p_.N;
    if (!mask_) return {end, nullptr};
    const int64_t block = row / p_.mask_inner;
    const M* start = mask_ + block / p_.mask_middle * p_.stride_outer +
                     block % p_.mask_middle * p_.stride_middle +
                     row % p_.mask_inner * p_.stride_inner;
    if (start != searched_) {
      searched_ = start;
      found_ = search(start);
    }
    return {end < found_.end ? end : found_.end, found_.mask};
  }

 private:
  static constexpr bool kIsBool = sizeof(M) == 1;

  Visible<M> search(const M* start) const {
    if (p_.stride_col == 0) return {hides(*start) ? 0 : p_.N, kIsBool ? nullptr : start};
    int64_t end = p_.N;
    if constexpr (kIsBool) {
      uint64_t eight;
      while (end >= 8 && (std::memcpy(&eight, start + end - 8, 8), eight == 0)) end -= 8;
    }
    while (end > 0 && hides(start[end - 1])) --end;
    return {end, kIsBool && !std::memchr(start, 0, end) ? nullptr : start};
  }

  const M *mask_, *searched_ = nullptr;
  const SoftmaxProblem& p_;
  Visible<M> found_ = {};
};

// The scores of columns begin to begin + n, up to a whole vector; returns the greatest, which NaN
// is not.
template <typename Row>
float gather(const Row& row, int64_t begin, int64_t n, float* scores) {
  vfloat most = broadcast(-kInfinity);
  for_vectors(n, [&](int64_t i, auto lanes) {
    const vfloat s = row.at(begin + i, lanes).value;
    store(scores + i, s, Full{});
    most = vmax(s, most);
  });
  return max(most);
}

// The sum of exp(score - shift), which take the scores' place if kStores.
template <bool kStores>
float exponentials(float* scores, int64_t n, float shift) {
  const int64_t whole = (n + kLanes - 1) / kLanes * kLanes;
  return sum_over(whole, [&](int64_t i, auto lanes) {
    const vfloat e = exp_of_nonpositive(load(scores + i, lanes) - shift);
    if constexpr (kStores) store(scores + i, e, lanes);
    return e;
  });
}

// Returns the share of the sink, a score -inf where there is none, in the row's sum.
template <bool kLog, typename Row, typename T>
float forward_row(const Row& row, float sink, T* y, int64_t end, int64_t N) {
  alignas(64) float scores[kSegment];
  float peak = sink, total = sink == -kInfinity ? 0.f : 1.f + 0.f * sink;  // NaN of infinity
  for (int64_t begin = 0; begin < end; begin += kSegment) {
    const int64_t n = clamp(end - begin, 0, kSegment);
    const float before = peak, here = gather(row, begin, n, scores);
    peak = here > before ? here : before;
    // While all scores are -inf, they add exp(-inf - 0) = 0, not exp(-inf + inf) = NaN.
    const float shift = peak == -kInfinity ? 0.f : peak;
    if (total != 0.f && peak != before) total *= exp_of_nonpositive(broadcast(before - shift))[0];
    total += exponentials<!kLog>(scores, n, shift);
  }
  if ((peak == -kInfinity || total != total) && !row.mask.shows_any(end)) {
    const vfloat nothing = broadcast(kLog ? -kInfinity : 0.f);
    for_vectors(N, [&](int64_t i, auto lanes) { store(y + i, nothing, lanes); });
    return 0.f;
  }
  total = peak == -kInfinity ? kNaN : total;
  const float inverse = 1.f / total, log = kLog ? ::logf(total) : 0.f;
  if (kLog)
    for_vectors(end, [&](int64_t i, auto lanes) {
      const vfloat s = end <= kSegment ? load(scores + i, lanes) : row.at(i, lanes).value;
      store(y + i, (s - peak) - log, lanes);
    });
  else if (end <= kSegment)
    for_vectors(end, [&](int64_t i, auto lanes) {
      store(y + i, load(scores + i, lanes) * inverse, lanes);
    });
  else
    for_vectors(end, [&](int64_t i, auto lanes) {
      store(y + i, exp_of_nonpositive(row.at(i, lanes).value - peak) * inverse, lanes);
    });
  // 0, but NaN in a row that holds one.
  const vfloat hidden = broadcast(kLog ? -kInfinity - log : 0.f * inverse);
  for_vectors(N - end, [&](int64_t i, auto lanes) { store(y + end + i, hidden, lanes); });
  return exp_of_nonpositive(broadcast(sink - peak))[0] * inverse;
}

template <typename T>
void drop(const T* kept, T* y, int64_t row, int64_t N, const Dropout& dropout) {
  const RowBits bits(dropout.seed, row);
  for_vectors(N, [&](int64_t i, auto lanes) {
    store(y + i, dropout.apply(load(kept + i, lanes), bits, i), lanes);
  });
}

template <bool kLog, typename T, typename M>
void forward(const T* x, const void* mask, const float* sinks, T* y, T* kept, float* shares,
             const Dropout& dropout, const SoftmaxProblem& p, float scale) {
  for_rows(p.M, (kept ? kDropoutWork : 1) * p.N, [&](int64_t begin, int64_t end) {
    Sight<M> sight(mask, p);
    for (int64_t row = begin; row < end; ++row) {
      const Visible<M> visible = sight.of(row);
      const float sink = sinks ? sinks[row / p.queries % p.heads] : -kInfinity;
      const T* in = x + row * p.N;
      T* out = (kept ? kept : y) + row * p.N;
      const float share =
          visible.mask
              ? forward_row<kLog>(Scores<T, Masked<M>>{in, {visible.mask, p.stride_col}, scale},
                                  sink, out, visible.end, p.N)
              : forward_row<kLog>(Scores<T, Unmasked>{in, {}, scale}, sink, out, visible.end, p.N);
      if (shares) shares[row] = share;
      if (kept) drop(out, y + row * p.N, row, p.N, dropout);
    }
  });
}

// The sum that softmax's gradient needs beside dy and y.
template <bool kLog, bool kDropout, typename T>
float backward_row(const T* dy, const T* y, T* dx, int64_t row, int64_t N, const Dropout& dropout,
                   const Gradient<kLog>& gradient) {
  const RowBits bits(dropout.seed, row);
  const auto dy_at = [&](int64_t i, auto lanes) {
    const vfloat g = load(dy + i, lanes);
    return kDropout ? dropout.apply(g, bits, i) : g;
  };
  const float total = sum_over(
      N, [&](int64_t i, auto lanes) { return gradient.term(dy_at(i, lanes), load(y + i, lanes)); });
  for_vectors(N, [&](int64_t i, auto lanes) {
    store(dx + i, gradient.dx(dy_at(i, lanes), load(y + i, lanes), broadcast(total)), lanes);
  });
  return total;
}

template <bool kLog, bool kDropout, typename T>
void backward(const T* dy, const T* y, const float* shares, T* dx, float* products,
              const Dropout& dropout, const SoftmaxProblem& p, const Gradient<kLog>& gradient) {
  for_rows(p.M, (kDropout ? kDropoutWork : 1) * p.N, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = row * p.N;
      const float total =
          backward_row<kLog, kDropout>(dy + at, y + at, dx + at, row, p.N, dropout, gradient);
      if (products) products[row] = -shares[row] * total;
    }
  });
}

// Each head's sum over batches and queries of (M,) products.
void add_up(const float* products, float* dsinks, const SoftmaxProblem& p) {
  for_rows(p.heads, p.M / p.heads, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) {
      double total = 0;
      for (int64_t row = head * p.queries; row < p.M; row += p.heads * p.queries)
        for (int64_t i = 0; i < p.queries; ++i) total += products[row + i];
      dsinks[head] = float(total);
    }
  });
}

}  // namespace

void softmax_forward(const void* x, const void* mask, const void* sinks, void* y, void* kept,
                     float* shares, const int64_t* seed, const int64_t* problem, float scale,
                     double dropout_p) {
  const SoftmaxProblem p(problem);
  const Widened wide_sinks(sinks, p.heads, p.sinks_dtype);
  const Dropout dropout(seed, dropout_p, p.threshold);
  with_types(p, [&](auto zero, auto hidden) {
    using T = decltype(zero);
    using M = decltype(hidden);
    (p.log ? forward<true, T, M> : forward<false, T, M>)((const T*)x, mask, wide_sinks.values(),
                                                         (T*)y, (T*)kept, shares, dropout, p,
                                                         scale);
  });
}

void softmax_backward(const void* dy, const void* y, const float* shares, void* dx, float* dsinks,
                      const int64_t* seed, const int64_t* problem, float scale, double dropout_p) {
  const SoftmaxProblem p(problem);
  const Dropout dropout(seed, dropout_p, p.threshold);
  Owned<float> products;
  if (dsinks) products.allocate(p.M);
  with_type(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto run = [&](auto run_backward, auto gradient) {
      run_backward((const T*)dy, (const T*)y, shares, (T*)dx, products.get(), dropout, p, gradient);
    };
    if (p.log)
      run(backward<true, false, T>, Gradient<true>{scale, p.hides != 0});
    else
      run(seed ? backward<false, true, T> : backward<false, false, T>,
          Gradient<false>{scale, false});
  });
  if (dsinks) add_up(products.get(), dsinks, p);
}

}  // namespace slimkernels::SLIM_ISA
