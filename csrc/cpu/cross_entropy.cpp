// Cross-entropy of logits (M, V) with class labels or probabilities, and its smoothing, z-loss and
// softcap.
//
// Computes z = softcap tanh(x / softcap), or x; lse = log(sum of exp(z)). With a label
//            loss = w[label] ((1 - smoothing) (lse - z[label]) + z_loss lse^2)
//                   + smoothing / V * sum of w (lse - z),
//          with probabilities q
//            loss = sum of u (lse - z) + z_loss lse^2,  u = w ((1 - smoothing) q + smoothing / V).
// Tiling   A task is one segment of one row, 16 KiB that stay in L1 between the search for its
//          maximum and the sum of its exponentials: few rows keep all threads busy, and the result
//          depends on neither their number nor who took which task.
// Traffic  Forward reads the logits once, backward reads them once and writes dx once. Rows that
//          are ignored are not read at all.
// Numerics lse is kept as the row's maximum and the logarithm of its sum of exp(x - maximum): in
//          one float32 it would be wrong by 5e-4 at 1e4, and so would exp(x - lse). A sum of
//          u (lse - z) is kept as the sums of u (maximum - z), whose terms have one sign, and of u.
//          The losses are added up in double, first to last.
#include <type_traits>

#include "elementary.h"
#include "kernels.h"
#include "memory.h"
#include "parallel.h"

namespace slimkernels::SLIM_ISA {
namespace {

constexpr int64_t kSegment = 4096;

struct Problem {
  const void* target;
  const float* weight;
  int64_t M, V, ignore_index;
  float smoothing, z_loss, softcap;
  int target_dtype;

  bool has_labels() const { return target_dtype < 0; }
  int64_t label(int64_t row) const { return ((const int64_t*)target)[row]; }
  bool ignores(int64_t row) const { return has_labels() && label(row) == ignore_index; }
  bool is_valid(int64_t row) const { return !has_labels() || (label(row) >= 0 && label(row) < V); }
  // What a row that is valid counts.
  float row_weight(int64_t row) const { return has_labels() && weight ? weight[label(row)] : 1.f; }
  int64_t segments() const { return (V + kSegment - 1) / kSegment; }
};

// The u of a segment's classes: what is spread over them all. Lanes that stand for no class are for
// the caller to clear.
struct Nothing {};
struct Evenly {
  vfloat at(int64_t, Full) const { return broadcast(1.f); }
  vfloat at(int64_t, Part) const { return broadcast(1.f); }
};
struct ByWeight {
  const float* weight;
  template <typename Lanes>
  vfloat at(int64_t i, Lanes lanes) const {
    return load(weight + i, lanes);
  }
};
template <typename Q>
struct ByProbability {
  const Q* q;
  const float* weight;
  float keep, even;
  template <typename Lanes>
  vfloat at(int64_t i, Lanes lanes) const {
    const vfloat u = keep * load(q + i, lanes) + even;
    return weight ? u * load(weight + i, lanes) : u;
  }
};

// Calls body with a function of (row, first column) that gives the u from there on.
template <typename Body>
void with_shares(const Problem& p, Body body) {
  if (!p.has_labels())
    with_type(p.target_dtype, [&](auto zero) {
      using Q = decltype(zero);
      body([&](int64_t row, int64_t begin) {
        const Q* q = (const Q*)p.target + row * p.V + begin;
        return ByProbability<Q>{q, p.weight ? p.weight + begin : nullptr, 1.f - p.smoothing,
                                p.smoothing / p.V};
      });
    });
  else if (p.smoothing == 0.f)
    body([](int64_t, int64_t) { return Nothing{}; });
  else if (p.weight)
    body([&](int64_t, int64_t begin) { return ByWeight{p.weight + begin}; });
  else
    body([](int64_t, int64_t) { return Evenly{}; });
}

struct Partial {
  float peak, sum, gap, mass;  // max(z), sums of exp(z - peak), of u (peak - z), of u
  float highest;               // max(x), which a softcap may round to what others have
};

template <typename T>
float max_of(const T* x, int64_t n) {
  vfloat peaks[4];
  for (vfloat& peak : peaks) peak = broadcast(-kInfinity);
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int k = 0; k < 4; ++k) peaks[k] = vmax(peaks[k], load(x + i + k * kLanes, Full{}));
  for (; i + kLanes <= n; i += kLanes) peaks[0] = vmax(peaks[0], load(x + i, Full{}));
  float peak = max(vmax(vmax(peaks[0], peaks[1]), vmax(peaks[2], peaks[3])));
  for (; i < n; ++i) {
    const float value = load(x + i, Part{1})[0];
    peak = value > peak ? value : peak;
  }
  return peak;
}

template <typename T, typename Share>
Partial scan(const T* x, int64_t n, const Share& share) {
  const float peak = max_of(x, n);
  // A segment of -inf adds exp(-inf - 0) = 0, not exp(-inf + inf) = NaN.
  const float shift = peak == -kInfinity ? 0.f : peak;
  const float sum = sum_over(n, [&](int64_t i, auto lanes) {
    return keep(exp_of_nonpositive(load(x + i, lanes) - shift), lanes);
  });
  if constexpr (std::is_same_v<Share, Nothing>) {
    return {peak, sum, 0.f, 0.f, peak};
  } else {
    const Pair spread = sum_over(n, [&](int64_t i, auto lanes) {
      const vfloat u = keep(share.at(i, lanes), lanes);
      return vpair{keep(u * (shift - load(x + i, lanes)), lanes), u};
    });
    return {peak, sum, spread.first, spread.second, peak};
  }
}

template <typename T, typename Share>
Partial scan_capped(const T* x, int64_t n, float softcap, const Share& share) {
  alignas(64) float capped[kSegment];
  for_vectors(n, [&](int64_t i, auto lanes) {
    store(capped + i, softcap * hyperbolic(load(x + i, lanes) / softcap).value, lanes);
  });
  Partial partial = scan(capped, n, share);
  partial.highest = max_of(x, n);
  return partial;
}

template <typename Body>
void for_segments(const Problem& p, Body body) {
  const int64_t segments = p.segments(), tasks = p.M * segments;
  // Dynamic, because the tasks of ignored rows are empty and those rows may be neighbours.
#pragma omp parallel for num_threads(threads_for(2 * p.M * p.V)) schedule(dynamic, 4)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t row = task / segments, begin = (task - row * segments) * kSegment;
    body(task, row, begin, begin + kSegment < p.V ? kSegment : p.V - begin);
  }
}

// A row from its segments, with log(sum) in sum's place.
Partial merge(const Partial* partials, int64_t segments) {
  Partial all = {-kInfinity, 0.f, 0.f, 0.f, -kInfinity};
  for (int64_t s = 0; s < segments; ++s)
    all.peak = partials[s].peak > all.peak ? partials[s].peak : all.peak;
  for (int64_t s = 0; s < segments; ++s) {
    const Partial& part = partials[s];
    const float below = part.peak == all.peak ? 0.f : all.peak - part.peak;
    all.sum += part.sum * std::exp(-below);
    all.gap += part.gap;
    if (below > 0.f && part.mass != 0.f) all.gap += part.mass * below;
    all.mass += part.mass;
  }
  // Every logit -inf: 0 / 0, as in torch.
  all.sum = all.peak == -kInfinity ? kNaN : std::log(all.sum);
  return all;
}

// Whether argmax gives the label: its logit is the first of the greatest, and NaN is the greatest.
template <typename T>
bool is_argmax(const T* x, int64_t V, int64_t label) {
  const auto at = [&](int64_t i) { return load(x + i, Part{1})[0]; };
  const float own = at(label);
  const bool is_nan = own != own;
  for (int64_t i = 0; i < label; ++i)
    if (is_nan ? at(i) != at(i) : !(at(i) < own)) return false;
  for (int64_t i = label + 1; i < V && !is_nan; ++i)
    if (!(at(i) <= own)) return false;
  return true;
}

// The same from the segments' maxima, and the logits before it in the label's segment alone.
template <typename T>
bool is_correct(const T* x, const Partial* partials, int64_t label, const Partial& r,
                const Problem& p) {
  if (!std::isfinite(r.sum))
    return is_argmax(x, p.V, label);  // there may be NaN, which maxima miss
  const float own = load(x + label, Part{1})[0];
  const int64_t home = label / kSegment, begin = home * kSegment;
  for (int64_t s = 0; s < p.segments(); ++s)
    if (s < home ? partials[s].highest >= own : partials[s].highest > own) return false;
  return label == begin || max_of(x + begin, label - begin) < own;
}

template <typename T>
float loss_of(const T* x, int64_t row, const Partial& r, const Problem& p) {
  const float lse = r.peak + r.sum, spread = r.mass * r.sum + r.gap;
  const float squared = p.z_loss > 0.f ? p.z_loss * lse * lse : 0.f;
  if (!p.has_labels()) return spread + squared;
  float logit = load(x + p.label(row), Part{1})[0];
  if (p.softcap > 0.f) logit = p.softcap * hyperbolic(broadcast(logit / p.softcap)).value[0];
  const float loss = r.sum + (r.peak - logit), w = p.row_weight(row);
  if (p.smoothing == 0.f) return w * (loss + squared);
  return w * ((1.f - p.smoothing) * loss + squared) + p.smoothing / p.V * spread;
}

template <typename T>
void forward(const T* x, float* losses, float* stats, uint8_t* correct, const Problem& p) {
  const int64_t M = p.M, segments = p.segments();
  const Owned<Partial> partials(M * segments);
  with_shares(p, [&](auto shares) {
    for_segments(p, [&](int64_t task, int64_t row, int64_t begin, int64_t n) {
      if (p.ignores(row)) return;
      const T* in = x + row * p.V + begin;
      const auto share = shares(row, begin);
      partials[task] = p.softcap > 0.f ? scan_capped(in, n, p.softcap, share) : scan(in, n, share);
    });
  });
  for (int64_t row = 0; row < M; ++row) {
    losses[row] = stats[row] = stats[M + row] = stats[2 * M + row] = 0.f;
    if (correct) correct[row] = 0;
    if (p.ignores(row)) continue;
    const Partial* parts = &partials[row * segments];
    const Partial r = merge(parts, segments);
    const bool is_valid = p.is_valid(row);
    if (correct && is_valid) correct[row] = is_correct(x + row * p.V, parts, p.label(row), r, p);
    stats[row] = r.peak;
    stats[M + row] = is_valid ? r.sum : kNaN;
    stats[2 * M + row] = r.mass;
    losses[row] = is_valid ? loss_of(x + row * p.V, row, r, p) : kNaN;
  }
}

// With p = exp(z - lse): dz = own (p - 1 at the label) + even (mass p - u) + extra p. Sums of what
// cancels come before the factors, so that a p of 1 gives 0.
struct Slopes {
  float own, even, extra, mass, peak, log_sum;
};

Slopes slopes_of(int64_t row, float dy, float dlse, const float* stats, const Problem& p) {
  const float peak = stats[row], log_sum = stats[p.M + row], mass = stats[2 * p.M + row];
  const float squared = p.z_loss > 0.f ? 2.f * p.z_loss * (peak + log_sum) : 0.f;
  if (!p.has_labels()) return {0.f, dy, dy * squared + dlse, mass, peak, log_sum};
  const float scale = dy * (p.is_valid(row) ? p.row_weight(row) : 1.f);
  return {scale * (1.f - p.smoothing),
          dy * p.smoothing / p.V,
          scale * squared + dlse,
          mass,
          peak,
          log_sum};
}

template <typename T, typename Share>
void gradient(const T* x, T* dx, int64_t n, const Slopes& s, float softcap, int64_t label,
              const Share& share) {
  const auto slope = [&](vfloat v, int64_t i, auto lanes, float hit) {
    vfloat outer = broadcast(1.f);
    if (softcap > 0.f) {
      const Hyperbolic h = hyperbolic(v / softcap);
      v = softcap * h.value;
      outer = h.slope;
    }
    const vfloat p = exp_of_nonpositive(v - s.peak - s.log_sum);  // log_sum >= log(exp(0))
    vfloat dz = s.own * (p - hit) + s.extra * p;
    if constexpr (!std::is_same_v<Share, Nothing>) dz += s.even * (s.mass * p - share.at(i, lanes));
    return dz * outer;
  };
  const bool has_label = label >= 0 && label < n;
  // Read before dx, which may be x, is written.
  const vfloat logit = has_label ? load(x + label, Part{1}) : vfloat{};
  for_vectors(n, [&](int64_t i, auto lanes) {
    store(dx + i, slope(load(x + i, lanes), i, lanes, 0.f), lanes);
  });
  // The label's own element again, so that it is rounded once.
  if (has_label) store(dx + label, slope(logit, label, Part{1}, 1.f), Part{1});
}

template <typename T>
void backward(const float* dy, int64_t dy_stride, const float* dlse, const T* x, const float* stats,
              const float* divisor, T* dx, const Problem& p) {
  with_shares(p, [&](auto shares) {
    for_segments(p, [&](int64_t, int64_t row, int64_t begin, int64_t n) {
      const int64_t at = row * p.V + begin;
      if (p.ignores(row)) {
        std::memset(dx + at, 0, n * sizeof(T));
        return;
      }
      const float dloss = divisor ? dy[row * dy_stride] / *divisor : dy[row * dy_stride];
      const Slopes slopes = slopes_of(row, dloss, dlse ? dlse[row] : 0.f, stats, p);
      const int64_t label = p.has_labels() ? p.label(row) - begin : -1;
      gradient(x + at, dx + at, n, slopes, p.softcap, label, shares(row, begin));
    });
  });
}

}  // namespace

void cross_entropy_forward(const void* x, const void* target, const float* weight, float* losses,
                           float* total, float* stats, float* divisor, uint8_t* correct, int64_t M,
                           int64_t V, int64_t ignore_index, float label_smoothing, float z_loss,
                           float softcap, int is_mean, int dtype, int target_dtype) {
  const Problem p = {target,          weight, M,       V,           ignore_index,
                     label_smoothing, z_loss, softcap, target_dtype};
  with_type(dtype,
            [&](auto zero) { forward((const decltype(zero)*)x, losses, stats, correct, p); });
  double sum = 0.0, weights = 0.0;
  for (int64_t row = 0; row < M; ++row) {
    sum += losses[row];
    if (!p.ignores(row) && p.is_valid(row)) weights += p.row_weight(row);
  }
  *divisor = float(weights);
  *total = float(is_mean ? sum / weights : sum);
}

void cross_entropy_backward(const float* dy, int64_t dy_stride, const float* dlse, const void* x,
                            const void* target, const float* weight, const float* stats,
                            const float* divisor, void* dx, int64_t M, int64_t V,
                            int64_t ignore_index, float label_smoothing, float z_loss,
                            float softcap, int dtype, int target_dtype) {
  const Problem p = {target,          weight, M,       V,           ignore_index,
                     label_smoothing, z_loss, softcap, target_dtype};
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    backward(dy, dy_stride, dlse, (const T*)x, stats, divisor, (T*)dx, p);
  });
}

}  // namespace slimkernels::SLIM_ISA
