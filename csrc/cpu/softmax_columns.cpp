// Softmax, or its logarithm, over the middle dimension of x (M, N, inner): of columns, whose
// elements are `inner` apart. softmax.cpp has the formulas, and the kernels over rows.
//
// Tiling   Threads split the blocks of 64 to 256 neighbouring columns, the wider the fewer rows.
//          A block's scores, at most kTile, stay in the caches, in float32, until its sums are
//          known; one of more rows is taken by segments, twice, as long rows are.
// Traffic  Forward reads and writes each element once, but reads a block taken by segments twice.
//          Backward reads two elements for each that it writes, twice. Neighbours are read
//          together, since each row of a block is in a page of its own.
// Numerics As of rows. Here a seen -inf counts as the lowest number in the search for the maximum:
//          where that is -inf, nothing is seen.
#include "kernels.h"
#include "parallel.h"
#include "random.h"
#include "softmax.h"

namespace slimkernels::SLIM_ISA {
namespace {

constexpr int64_t kTile = 16384, kNarrow = 64, kWide = 256;

// How many columns a block has, and how many rows a segment of it.
struct Tile {
  int64_t width = kWide;
  explicit Tile(int64_t N) {
    while (width > kNarrow && N * width > kTile) width /= 2;
  }
  int64_t height() const { return kTile / width; }
};
constexpr float kLowest = -std::numeric_limits<float>::max();

// One number a column.
struct alignas(64) Line {
  float values[kWide];

  explicit Line(float value) {
    for (float& v : values) v = value;
  }
  vfloat at(int64_t i) const { return load(values + i, Full{}); }
  void set(int64_t i, vfloat v) { store(values + i, v, Full{}); }
};

// A block: the first columns of x (N, stride), as many as its user takes.
template <typename T, typename Mask>
struct Block {
  const T* x;
  int64_t stride;
  Mask mask;  // of the first row
  int64_t mask_step;
  float scale;

  Scores<T, Mask> row(int64_t n) const { return {x + n * stride, mask.from(n * mask_step), scale}; }
};

// Reads rows begin to begin + n into scores; returns the maxima, `peaks` among them.
template <typename In>
Line gather(const In& in, int64_t begin, int64_t n, int64_t width, Line peaks, float* scores,
            int64_t pitch) {
  for (int64_t r = 0; r < n; ++r) {
    const auto row = in.row(begin + r);
    for_vectors(width, [&](int64_t i, auto lanes) {
      const Score s = row.at(i, lanes);
      store(scores + r * pitch + i, s.value, Full{});
      const vfloat top = s.seen ? vmax(s.value, broadcast(kLowest)) : s.value;
      peaks.set(i, vmax(top, peaks.at(i)));
    });
  }
  return peaks;
}

inline vfloat log_of(vfloat v) {
  for (int i = 0; i < kLanes; ++i) v[i] = ::logf(v[i]);
  return v;
}

template <bool kLog, typename In, typename T>
void forward_block(const In& in, T* y, int64_t N, int64_t width) {
  alignas(64) float scores[kTile];
  const Tile tile(N);
  const int64_t pitch = tile.width, height = tile.height();
  Line peaks(-kInfinity), shifts(0.f), totals(0.f);
  for (int64_t begin = 0; begin < N; begin += height) {
    const int64_t n = clamp(N - begin, 0, height);
    const Line raised = gather(in, begin, n, width, peaks, scores, pitch);
    for_vectors(width, [&](int64_t i, auto) {
      // While nothing is seen, it adds exp(-inf - 0) = 0, not exp(-inf + inf) = NaN.
      const vfloat shift = raised.at(i) == -kInfinity ? vfloat{} : raised.at(i);
      vfloat total = {};
      for (int64_t r = 0; r < n; ++r) {
        float* score = scores + r * pitch + i;
        const vfloat e = exp_of_nonpositive(load(score, Full{}) - shift);
        if constexpr (!kLog) store(score, e, Full{});
        total += e;
      }
      totals.set(i, totals.at(i) * exp_of_nonpositive(peaks.at(i) - shift) + total);
      shifts.set(i, shift);
    });
    peaks = raised;
  }

  Line ends(0.f);  // what the sums make of each element; nothing where nothing is seen
  for_vectors(width, [&](int64_t i, auto) {
    const vfloat end = kLog ? log_of(totals.at(i)) : 1.f / totals.at(i);
    ends.set(i, peaks.at(i) == -kInfinity ? vfloat{} : end);
  });
  for (int64_t n = 0; n < N; ++n) {
    const auto row = in.row(n);
    for_vectors(width, [&](int64_t i, auto lanes) {
      vfloat v = N <= height ? load(scores + n * pitch + i, Full{}) : row.at(i, lanes).value;
      if constexpr (kLog) {
        v = (v - shifts.at(i)) - ends.at(i);
      } else {
        if (N > height) v = exp_of_nonpositive(v - shifts.at(i));
        v *= ends.at(i);
      }
      store(y + n * in.stride + i, v, lanes);
    });
  }
}

// body(m, first column, width) for every block.
template <typename Body>
void for_blocks(const SoftmaxProblem& p, Body body) {
  const int64_t most = Tile(p.N).width, blocks = (p.inner + most - 1) / most;
  for_rows(p.M * blocks, p.N * p.inner / blocks, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % blocks * most;
      body(task / blocks, first, clamp(p.inner - first, 0, most));
    }
  });
}

template <bool kLog, typename T, typename M>
void forward(const T* x, const M* mask, T* y, T* kept, const Dropout& dropout,
             const SoftmaxProblem& p, float scale) {
  for_blocks(p, [&](int64_t m, int64_t first, int64_t width) {
    const int64_t at = m * p.N * p.inner + first;
    T* out = (kept ? kept : y) + at;
    if (mask) {
      const M* start = mask + m * p.stride_outer + first * p.stride_col;
      const Block<T, Masked<M>> in{x + at, p.inner, {start, p.stride_col}, p.stride_middle, scale};
      forward_block<kLog>(in, out, p.N, width);
    } else {
      forward_block<kLog>(Block<T, Unmasked>{x + at, p.inner, {}, 0, scale}, out, p.N, width);
    }
    for (int64_t n = 0; kept && n < p.N; ++n) {
      const RowBits bits(dropout.seed, m * p.N + n);
      for_vectors(width, [&](int64_t i, auto lanes) {
        const vfloat v = load(out + n * p.inner + i, lanes);
        store(y + at + n * p.inner + i, dropout.apply(v, bits, first + i), lanes);
      });
    }
  });
}

template <bool kLog, bool kDropout, typename T>
void backward(const T* dy, const T* y, T* dx, const Dropout& dropout, const SoftmaxProblem& p,
              const Gradient<kLog>& gradient) {
  for_blocks(p, [&](int64_t m, int64_t first, int64_t width) {
    // body(i, place, dy, y, lanes) for the vectors of a row
    const auto for_row = [&](int64_t n, auto body) {
      const int64_t at = (m * p.N + n) * p.inner + first;
      const RowBits bits(dropout.seed, m * p.N + n);
      for_vectors(width, [&](int64_t i, auto lanes) {
        const vfloat g = load(dy + at + i, lanes);
        body(i, at + i, kDropout ? dropout.apply(g, bits, first + i) : g, load(y + at + i, lanes),
             lanes);
      });
    };
    Line totals(0.f);
    for (int64_t begin = 0; begin < p.N; begin += kTile / kNarrow) {
      Line sums(0.f);  // of a segment: one chain over all rows would round more
      for (int64_t n = begin; n < p.N && n < begin + kTile / kNarrow; ++n)
        for_row(n, [&](int64_t i, int64_t, vfloat g, vfloat v, auto) {
          sums.set(i, sums.at(i) + gradient.term(g, v));
        });
      for_vectors(width, [&](int64_t i, auto) { totals.set(i, totals.at(i) + sums.at(i)); });
    }
    for (int64_t n = 0; n < p.N; ++n)
      for_row(n, [&](int64_t i, int64_t at, vfloat g, vfloat v, auto lanes) {
        store(dx + at, gradient.dx(g, v, totals.at(i)), lanes);
      });
  });
}

}  // namespace

void softmax_columns_forward(const void* x, const void* mask, void* y, void* kept,
                             const int64_t* seed, const int64_t* problem, float scale,
                             double dropout_p) {
  const SoftmaxProblem p(problem);
  const Dropout dropout(seed, dropout_p, p.threshold);
  with_types(p, [&](auto zero, auto hidden) {
    using T = decltype(zero);
    using M = decltype(hidden);
    (p.log ? forward<true, T, M> : forward<false, T, M>)((const T*)x, (const M*)mask, (T*)y,
                                                         (T*)kept, dropout, p, scale);
  });
}

void softmax_columns_backward(const void* dy, const void* y, void* dx, const int64_t* seed,
                              const int64_t* problem, float scale, double dropout_p) {
  const SoftmaxProblem p(problem);
  const Dropout dropout(seed, dropout_p, p.threshold);
  with_type(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto run = [&](auto run_backward, auto gradient) {
      run_backward((const T*)dy, (const T*)y, (T*)dx, dropout, p, gradient);
    };
    if (p.log)
      run(backward<true, false, T>, Gradient<true>{scale, p.hides != 0});
    else
      run(seed ? backward<false, true, T> : backward<false, false, T>,
          Gradient<false>{scale, false});
  });
}

}  // namespace slimkernels::SLIM_ISA
