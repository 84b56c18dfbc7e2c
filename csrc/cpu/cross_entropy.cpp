// Cross-entropy of logits (M, V) with class labels: loss = lse(x) - x[label], and smoothing.
//
// Tiling   A task is one segment of one row, 16 KiB that stay in L1 between the search for its
//          maximum and the sum of its exponentials: few rows keep all threads busy, and the result
//          depends on neither their number nor who took which task.
// Traffic  Forward reads the logits once, backward reads them once and writes dx once. Rows that
//          are ignored are not read at all.
// Numerics lse is kept as the row's maximum and the logarithm of its sum of exp(x - maximum): in
//          one float32 it would be wrong by 5e-4 at 1e4, and so would exp(x - lse). What smoothing
//          needs, the mean of maximum - x, has terms of one sign only. The losses are added up in
//          double, first to last.
#include "kernels.h"
#include "memory.h"
#include "parallel.h"
#include "vec.h"

namespace slimkernels::SLIM_ISA {
namespace {

constexpr int64_t kSegment = 4096;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Partial {
  float peak, sum, gap;  // max(x), sum of exp(x - peak), sum of peak - x
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

template <typename T>
Partial scan(const T* x, int64_t n, bool smooth) {
  const float peak = max_of(x, n);
  // A segment of -inf adds exp(-inf - 0) = 0, not exp(-inf + inf) = NaN.
  const float shift = peak == -kInfinity ? 0.f : peak;
  const float sum = sum_over(
      n, [&](int64_t i, auto lanes) { return keep(exp(load(x + i, lanes) - shift), lanes); });
  if (!smooth) return {peak, sum, 0.f};
  const float gap =
      sum_over(n, [&](int64_t i, auto lanes) { return keep(shift - load(x + i, lanes), lanes); });
  return {peak, sum, gap};
}

template <typename Body>
void for_segments(int64_t M, int64_t V, Body body) {
  const int64_t segments = (V + kSegment - 1) / kSegment;
  const int64_t tasks = M * segments;
  // Dynamic, because the tasks of ignored rows are empty and those rows may be neighbours.
#pragma omp parallel for num_threads(threads_for(2 * M * V)) schedule(dynamic, 4)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t row = task / segments, begin = (task - row * segments) * kSegment;
    body(task, row, begin, begin + kSegment < V ? kSegment : V - begin);
  }
}

struct Row {
  float peak, log_sum, gap;  // gap: mean of peak - x
};

Row merge(const Partial* partials, int64_t V) {
  const int64_t segments = (V + kSegment - 1) / kSegment;
  float peak = -kInfinity, sum = 0.f, gap = 0.f;
  for (int64_t s = 0; s < segments; ++s) peak = partials[s].peak > peak ? partials[s].peak : peak;
  for (int64_t s = 0; s < segments; ++s) {
    const float n = s + 1 < segments ? kSegment : V - s * kSegment;
    const float below = partials[s].peak == peak ? 0.f : peak - partials[s].peak;
    sum += partials[s].sum * std::exp(-below);
    gap += partials[s].gap + n * below;
  }
  // Every logit -inf: 0 / 0, as in torch.
  return {peak, peak == -kInfinity ? kNaN : std::log(sum), gap / V};
}

template <typename T>
void forward(const T* x, const int64_t* target, float* losses, float* lse, int64_t M, int64_t V,
             int64_t ignore_index, float label_smoothing) {
  const int64_t segments = (V + kSegment - 1) / kSegment;
  const Owned<Partial> partials(M * segments);
  for_segments(M, V, [&](int64_t task, int64_t row, int64_t begin, int64_t n) {
    if (target[row] != ignore_index)
      partials[task] = scan(x + row * V + begin, n, label_smoothing > 0.f);
  });
  for (int64_t row = 0; row < M; ++row) {
    losses[row] = lse[row] = lse[M + row] = 0.f;
    const int64_t label = target[row];
    if (label == ignore_index) continue;
    const Row r = merge(&partials[row * segments], V);
    const bool valid = label >= 0 && label < V;
    lse[row] = r.peak;
    lse[M + row] = valid ? r.log_sum : kNaN;
    if (!valid) {
      losses[row] = kNaN;
      continue;
    }
    const float loss = r.log_sum + (r.peak - load(x + row * V + label, Part{1})[0]);
    losses[row] = label_smoothing > 0.f
                      ? (1.f - label_smoothing) * loss + label_smoothing * (r.log_sum + r.gap)
                      : loss;
  }
}

template <typename T>
void backward(const float* dy, int64_t dy_stride, const T* x, const int64_t* target,
              const float* lse, const float* divisor, T* dx, int64_t M, int64_t V,
              int64_t ignore_index, float label_smoothing) {
  const float even = label_smoothing / V;
  for_segments(M, V, [&](int64_t, int64_t row, int64_t begin, int64_t n) {
    T* out = dx + row * V + begin;
    if (target[row] == ignore_index) {
      std::memset(out, 0, n * sizeof(T));
      return;
    }
    const T* in = x + row * V + begin;
    const float peak = lse[row], log_sum = lse[M + row];
    const float scale = divisor ? dy[row * dy_stride] / *divisor : dy[row * dy_stride];
    const auto gradient = [&](vfloat v) { return scale * (exp(v - peak - log_sum) - even); };
    for_vectors(
        n, [&](int64_t i, auto lanes) { store(out + i, gradient(load(in + i, lanes)), lanes); });
    // The label's own element again, so that it is rounded once.
    const int64_t label = target[row] - begin;
    if (label < 0 || label >= n) return;
    const vfloat p = exp(load(in + label, Part{1}) - peak - log_sum);
    store(out + label, scale * (p - even - (1.f - label_smoothing)), Part{1});
  });
}

}  // namespace

void cross_entropy_forward(const void* x, const int64_t* target, float* losses, float* total,
                           float* lse, float* count, int64_t M, int64_t V, int64_t ignore_index,
                           float label_smoothing, int is_mean, int dtype) {
  with_type(dtype, [&](auto zero) {
    forward((const decltype(zero)*)x, target, losses, lse, M, V, ignore_index, label_smoothing);
  });
  double sum = 0.0;
  int64_t kept = 0;
  for (int64_t row = 0; row < M; ++row) {
    sum += losses[row];
    kept += target[row] != ignore_index;
  }
  *count = float(kept);
  *total = float(is_mean ? sum / double(kept) : sum);
}

void cross_entropy_backward(const float* dy, int64_t dy_stride, const void* x,
                            const int64_t* target, const float* lse, const float* divisor, void* dx,
                            int64_t M, int64_t V, int64_t ignore_index, float label_smoothing,
                            int dtype) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    backward(dy, dy_stride, (const T*)x, target, lse, divisor, (T*)dx, M, V, ignore_index,
             label_smoothing);
  });
}

}  // namespace slimkernels::SLIM_ISA
