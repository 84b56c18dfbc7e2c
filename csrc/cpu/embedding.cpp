// Rows looked up in up to three tables, their sum, its LayerNorm and dropout; and the gradient of a
// table, dtable[v] = sum of dsum over v's tokens.
//
// Tiling   Threads split the rows; a row's sum stays in L1 until it is normalised. For a table's
//          gradient tokens are sorted by id, by counting, and cut into blocks that threads split.
//          The tokens of one id in one block are a run: an id with one run has its row of dtable
//          from there, the sums of longer ones' runs are kept and added up in a second pass. The
//          result depends on neither the number of threads nor who took which block.
// Traffic  Forward reads N elements a row for each table and writes N; small tables stay in the
//          cache. The sum is not stored: writing and reading it would be 2 N elements a row,
//          looking its parts up again is N from the large table. Backward reads dy and the parts
//          and writes dsum, which each table's gradient reads once. Dropout stores nothing.
// Numerics float32 up to y, which is rounded once, and so is dsum. The rest as in layer_norm.cpp.
#include "add_norm.h"
#include "kernels.h"

namespace slimkernels::SLIM_ISA {
namespace {

constexpr int64_t kRun = 32;  // tokens of a block; at most 2 partial sums in so many rows

// Mirrored by _lookups in slimkernels/backends/cpu/embedding.py.
struct Lookup {
  const int64_t* ids;
  const void* table;
  int64_t count;

  // What a row looks up; null where its id, which Python could not see, lies outside the table.
  template <typename X>
  const X* at(int64_t row, int64_t N) const {
    const int64_t id = ids[row];
    return id >= 0 && id < count ? (const X*)table + id * N : nullptr;
  }
};
struct Lookups {
  Lookup tokens, positions, segments;  // of the latter two ids may be null
};

// Stores the sum of a row's parts in total, and returns what its elements add up to.
template <typename T, typename R, typename Y>
float add_parts(const Lookups& from, int64_t row, Y* total, int64_t N) {
  const bool has_position = from.positions.ids, has_segment = from.segments.ids;
  const T* token = from.tokens.at<T>(row, N);
  const R* position = has_position ? from.positions.at<R>(row, N) : nullptr;
  const R* segment = has_segment ? from.segments.at<R>(row, N) : nullptr;
  if (!token || (has_position && !position) || (has_segment && !segment)) {
    for_vectors(N, [&](int64_t i, auto n) { store(total + i, broadcast(kNaN), n); });
    return kNaN;
  }
  return sum_over(N, [&](int64_t i, auto n) {
    vfloat v = load(token + i, n);
    if (position) v += load(position + i, n);
    if (segment) v += load(segment + i, n);
    store(total + i, v, n);
    return v;
  });
}

// A row in float32 for each thread.
class Rows {
 public:
  explicit Rows(int64_t N) : N_(N), values_(omp_get_max_threads() * N) {}
  float* mine() const { return values_.get() + omp_get_thread_num() * N_; }

 private:
  int64_t N_;
  Owned<float> values_;
};

// y may be x.
template <typename T, typename Y>
void drop_row(const T* x, Y* y, const Branch& branch, int64_t row, int64_t N) {
  const Dropout dropout = branch.dropout;
  const RowBits bits(dropout.seed, row);
  for_vectors(N,
              [&](int64_t i, auto n) { store(y + i, dropout.apply(load(x + i, n), bits, i), n); });
}

template <typename T, typename R>
void forward(const Lookups& from, const float* weight, const float* bias, T* y, float* mean,
             float* rstd, int64_t M, int64_t N, float eps, const Branch& branch) {
  const Rows rows(N);
  for_rows(M, N, [&](int64_t begin, int64_t end) {
    float* total = rows.mine();
    for (int64_t row = begin; row < end; ++row) {
      T* out = y + row * N;
      if (!mean && !branch.drops) {
        add_parts<T, R>(from, row, out, N);
        continue;
      }
      const float sum = add_parts<T, R>(from, row, total, N);
      if (mean) {
        const Centered norm = Centered::of(sum, total, N, eps);
        norm.save(mean, rstd, row);
        if (!branch.drops) {
          normalize(total, weight, bias, out, norm, N);
          continue;
        }
        normalize(total, weight, bias, total, norm, N);
      }
      drop_row(total, out, branch, row, N);
    }
  });
}

// dweight and dbias have chunks_for(M) rows, or are null.
template <typename T, typename R>
void backward(const T* dy, const Lookups& from, const float* weight, const float* mean,
              const float* rstd, R* dsum, float* dweight, float* dbias, int64_t M, int64_t N,
              const Branch& branch) {
  const Rows totals(N), kept(N);
  for_chunks(M, 2 * N, [&](int64_t chunk, int64_t begin, int64_t end) {
    float *total = totals.mine(), *survivors = kept.mine();
    for (int64_t row = begin; row < end; ++row) {
      add_parts<T, R>(from, row, total, N);
      const Centered norm = Centered::saved(mean, rstd, row);
      const auto differentiate = [&](const auto* dy_row) {
        const Pair means = means_of(dy_row, total, weight, norm, N);
        normalize_backward(dy_row, total, weight, norm, means,
                           dweight ? dweight + chunk * N : nullptr,
                           dbias ? dbias + chunk * N : nullptr, 0, N,
                           [=](int64_t i, vfloat v, auto n) { store(dsum + row * N + i, v, n); });
      };
      if (branch.drops) {
        drop_row(dy + row * N, survivors, branch, row, N);
        differentiate((const float*)survivors);
      } else {
        differentiate(dy + row * N);
      }
    }
  });
}

// The tokens whose gradient somebody gets, in the order of their ids, and each id's in their own.
class Sorted {
 public:
  Sorted(const int64_t* ids, int64_t M, int64_t count, int64_t padding_idx) : ids_(ids), order_(M) {
    const auto counts = [&](int64_t id) { return id >= 0 && id < count && id != padding_idx; };
    Owned<int64_t> next;  // of an id, where its next token goes
    next.allocate(count + 1, true);
    for (int64_t row = 0; row < M; ++row)
      if (counts(ids[row])) ++next[ids[row] + 1];
    for (int64_t id = 0; id < count; ++id) next[id + 1] += next[id];
    size_ = next[count];
    for (int64_t row = 0; row < M; ++row)
      if (counts(ids[row])) order_[next[ids[row]]++] = row;
  }
  int64_t size() const { return size_; }
  int64_t token(int64_t place) const { return order_[place]; }
  int64_t id(int64_t place) const { return ids_[order_[place]]; }
  // Whether the id at `place` is another than the one before, and where its run ends.
  bool begins(int64_t place) const { return place == 0 || id(place - 1) != id(place); }
  int64_t run_end(int64_t place) const {
    const int64_t last = clamp((place / kRun + 1) * kRun, 0, size_);
    int64_t end = place + 1;
    while (end < last && id(end) == id(place)) ++end;
    return end;
  }
  bool ends(int64_t end) const { return end == size_ || id(end) != id(end - 1); }

 private:
  const int64_t* ids_;
  Owned<int64_t> order_;
  int64_t size_;
};

// y = the sum of x over the tokens from begin to end.
template <typename D, typename Y>
void add_run(const D* x, const Sorted& sorted, int64_t begin, int64_t end, Y* y, int64_t N) {
  for_vectors(N, [&](int64_t i, auto n) {
    vfloat total = {};
    for (int64_t place = begin; place < end; ++place)
      total += load(x + sorted.token(place) * N + i, n);
    store(y + i, total, n);
  });
}

template <typename D, typename W>
void table_gradient(const D* dsum, const Sorted& sorted, W* dtable, int64_t N) {
  const int64_t size = sorted.size(), blocks = (size + kRun - 1) / kRun;
  // Of a block: the run of an id that began before it, or fills it, and that of one that goes on.
  const Owned<float> partials(blocks * 2 * N);
  const auto partial = [&](int64_t block, bool is_first) {
    return partials.get() + (2 * block + !is_first) * N;
  };
  for_rows(blocks, kRun * N, [&](int64_t first, int64_t last) {
    for (int64_t place = first * kRun; place < clamp(last * kRun, 0, size);) {
      const int64_t end = sorted.run_end(place);
      if (sorted.begins(place) && sorted.ends(end))
        add_run(dsum, sorted, place, end, dtable + sorted.id(place) * N, N);
      else
        add_run(dsum, sorted, place, end, partial(place / kRun, place % kRun == 0), N);
      place = end;
    }
  });
  for_rows(blocks, 2 * N, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t next = (block + 1) * kRun;
      if (next >= size || sorted.begins(next)) continue;
      int64_t begin = next - 1;
      while (begin > block * kRun && !sorted.begins(begin)) --begin;
      if (!sorted.begins(begin)) continue;
      int64_t end = block + 1;
      while (end < blocks && sorted.id(end * kRun) == sorted.id(begin)) ++end;
      for_vectors(N, [&](int64_t i, auto n) {
        vfloat total = load(partial(block, begin == block * kRun) + i, n);
        for (int64_t other = block + 1; other < end; ++other)
          total += load(partial(other, true) + i, n);
        store(dtable + sorted.id(begin) * N + i, total, n);
      });
    }
  });
}

}  // namespace

void embedding_forward(const int64_t* lookups, const void* weight, const void* bias, void* y,
                       float* mean, float* rstd, const int64_t* seed, int64_t M, int64_t N,
                       float eps, double dropout_p, int64_t threshold, int dtype, int wide_dtype,
                       int parameter_dtype) {
  const Widened w(weight, N, parameter_dtype), b(bias, N, parameter_dtype);
  const Branch branch(seed, dropout_p, threshold, nullptr);
  with_types(dtype, wide_dtype, [&](auto narrow, auto wide) {
    using T = decltype(narrow);
    forward<T, decltype(wide)>(*(const Lookups*)lookups, w.values(), b.values(), (T*)y, mean, rstd,
                               M, N, eps, branch);
  });
}

void embedding_backward(const void* dy, const int64_t* lookups, const void* weight,
                        const float* mean, const float* rstd, void* dsum, void* dweight,
                        void* dbias, const int64_t* seed, int64_t M, int64_t N, double dropout_p,
                        int64_t threshold, int dtype, int wide_dtype, int parameter_dtype) {
  const Widened w(weight, N, parameter_dtype);
  const ChunkSums dw(dweight, chunks_for(M), N), db(dbias, chunks_for(M), N);
  const Branch branch(seed, dropout_p, threshold, nullptr);
  with_types(dtype, wide_dtype, [&](auto narrow, auto wide) {
    using T = decltype(narrow);
    using R = decltype(wide);
    backward((const T*)dy, *(const Lookups*)lookups, w.values(), mean, rstd, (R*)dsum, dw.values(),
             db.values(), M, N, branch);
  });
  dw.write(dweight, parameter_dtype);
  db.write(dbias, parameter_dtype);
}

void embedding_table_backward(const void* dsum, const int64_t* ids, void* dtable, int64_t M,
                              int64_t N, int64_t count, int64_t padding_idx, int dtype,
                              int table_dtype) {
  const Sorted sorted(ids, M, count, padding_idx);
  with_type(dtype, [&](auto from) {
    with_type(table_dtype, [&](auto to) {
      table_gradient((const decltype(from)*)dsum, sorted, (decltype(to)*)dtable, N);
    });
  });
}

}  // namespace slimkernels::SLIM_ISA
