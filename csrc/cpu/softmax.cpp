// Softmax of rows: y = exp(s - max(s)) / sum(exp(s - max(s))), s = x * scale where a mask allows.
//
// Tiling   Threads split the rows. A row's scores stay in L1, in float32, until its sum is known; a
//          row longer than kSegment is taken by segments, twice: for its maximum and sum, and to be
//          written.
// Traffic  Forward reads and writes N elements a row; backward reads 2 N and writes N. Columns past
//          the last one that a row sees are not read. A row of the mask that neighbours share is
//          searched once for that column, and not read again if nothing before it is hidden.
// Numerics Subtracting the row's maximum bounds exp by 1; over segments the sum so far is rescaled
//          when the maximum rises. A row whose scores are all -inf is NaN, as in torch; one that
//          sees nothing is zero.
#include "kernels.h"
#include "parallel.h"
#include "vec.h"

namespace slimkernels::SLIM_ISA {
namespace {

constexpr int64_t kSegment = 4096;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// The columns that a row sees: those below `end` where mask is true, all of those if it is null.
struct Visible {
  int64_t end;
  const uint8_t* mask;

  bool any() const {
    if (!mask) return end > 0;
    for (int64_t i = 0; i < end; ++i)
      if (mask[i]) return true;
    return false;
  }
};

// What each row sees, asked row after row.
class Sight {
 public:
  Sight(const uint8_t* mask, const int64_t* mask_rows, int64_t N, int64_t period)
      : mask_(mask), N_(N), period_(period) {
    if (mask) std::memcpy(&middle_, mask_rows, 6 * sizeof(int64_t));
  }

  Visible of(int64_t row) {
    const int64_t end = period_ ? clamp(row % period_ + 1, 0, N_) : N_;
    if (!mask_) return {end, nullptr};
    const int64_t block = row / inner_;
    const uint8_t* start = mask_ + block / middle_ * stride_outer_ +
                           block % middle_ * stride_middle_ + row % inner_ * stride_inner_;
    if (start != searched_) {
      searched_ = start;
      found_ = search(start);
    }
    return {end < found_.end ? end : found_.end, found_.mask};
  }

 private:
  Visible search(const uint8_t* start) const {
    if (stride_col_ == 0) return {*start ? N_ : 0, nullptr};
    int64_t end = N_;
    uint64_t eight;
    while (end >= 8 && (std::memcpy(&eight, start + end - 8, 8), eight == 0)) end -= 8;
    while (end > 0 && !start[end - 1]) --end;
    return {end, std::memchr(start, 0, end) ? start : nullptr};
  }

  const uint8_t *mask_, *searched_ = nullptr;
  int64_t N_, period_;
  // In the order of MaskRows.
  int64_t middle_ = 1, inner_ = 1, stride_outer_, stride_middle_, stride_inner_, stride_col_;
  Visible found_ = {};
};

// All bits of a lane that stands for a column, and which the mask shows.
inline vint real(Full) { return vint{} == 0; }
inline vint real(Part part) {
  vint lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < part.count;
}
template <typename Lanes>
inline vint shown(const uint8_t* mask, Lanes lanes) {
  uint8_t bytes[16] = {};
  std::memcpy(bytes, mask, lanes.count);
  vint wide;
#if defined(__AVX512F__)  // GCC widens bytes one by one
  wide = (vint)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)bytes));
#elif defined(__AVX2__)
  wide = (vint)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)bytes));
#else
  for (int i = 0; i < kLanes; ++i) wide[i] = bytes[i];
#endif
  return wide != 0;
}

// A row's scores: -inf where hidden, and in lanes that stand for no column.
template <bool kMasked, typename T>
struct Scores {
  const T* x;
  const uint8_t* mask;
  float scale;

  template <typename Lanes>
  vfloat at(int64_t i, Lanes lanes) const {
    const vint seen = kMasked ? shown(mask + i, lanes) : real(lanes);
    return seen ? load(x + i, lanes) * scale : broadcast(-kInfinity);
  }
};

// The scores of columns begin to begin + n, up to a whole vector; returns the greatest, which NaN
// is not.
template <typename Row>
float gather(const Row& row, int64_t begin, int64_t n, float* scores) {
  vfloat most = broadcast(-kInfinity);
  for_vectors(n, [&](int64_t i, auto lanes) {
    const vfloat s = row.at(begin + i, lanes);
    store(scores + i, s, Full{});
    most = vmax(s, most);
  });
  return max(most);
}

// Scores to exp(score - shift), in place; returns their sum.
float exponentials(float* scores, int64_t n, float shift) {
  const int64_t whole = (n + kLanes - 1) / kLanes * kLanes;
  return sum_over(whole, [&](int64_t i, auto lanes) {
    const vfloat e = exp_of_nonpositive(load(scores + i, lanes) - shift);
    store(scores + i, e, lanes);
    return e;
  });
}

template <typename Row, typename T>
void forward_row(const Row& row, T* y, const Visible& visible, int64_t N) {
  const int64_t end = visible.end;
  alignas(64) float scores[kSegment];
  float peak = -kInfinity, total = 0.f;
  for (int64_t begin = 0; begin < end; begin += kSegment) {
    const int64_t n = clamp(end - begin, 0, kSegment);
    const float before = peak, here = gather(row, begin, n, scores);
    peak = here > before ? here : before;
    // While all scores are -inf, they add exp(-inf - 0) = 0, not exp(-inf + inf) = NaN.
    const float shift = peak == -kInfinity ? 0.f : peak;
    if (begin > 0 && peak != before) total *= exp_of_nonpositive(broadcast(before - shift))[0];
    total += exponentials(scores, n, shift);
  }
  if (peak == -kInfinity && !visible.any()) {
    std::memset(y, 0, N * sizeof(T));
    return;
  }
  const float inverse = peak == -kInfinity ? kNaN : 1.f / total;
  if (end <= kSegment)
    for_vectors(end, [&](int64_t i, auto lanes) {
      store(y + i, load(scores + i, lanes) * inverse, lanes);
    });
  else
    for_vectors(end, [&](int64_t i, auto lanes) {
      store(y + i, exp_of_nonpositive(row.at(i, lanes) - peak) * inverse, lanes);
    });
  // 0, but NaN in a row that holds one.
  const vfloat hidden = broadcast(0.f * inverse);
  for_vectors(N - end, [&](int64_t i, auto lanes) { store(y + end + i, hidden, lanes); });
}

template <typename T>
void backward_row(const T* dy, const T* y, T* dx, int64_t N, float scale) {
  const float dot =
      sum_over(N, [&](int64_t i, auto lanes) { return load(dy + i, lanes) * load(y + i, lanes); });
  for_vectors(N, [&](int64_t i, auto lanes) {
    store(dx + i, scale * load(y + i, lanes) * (load(dy + i, lanes) - dot), lanes);
  });
}

}  // namespace

void softmax_forward(const void* x, const uint8_t* mask, void* y, const int64_t* mask_rows,
                     int64_t M, int64_t N, int64_t period, float scale, int dtype) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    for_rows(M, N, [&](int64_t begin, int64_t end) {
      Sight sight(mask, mask_rows, N, period);
      for (int64_t row = begin; row < end; ++row) {
        const Visible visible = sight.of(row);
        const T* in = (const T*)x + row * N;
        if (visible.mask)
          forward_row(Scores<true, T>{in, visible.mask, scale}, (T*)y + row * N, visible, N);
        else
          forward_row(Scores<false, T>{in, nullptr, scale}, (T*)y + row * N, visible, N);
      }
    });
  });
}

void softmax_backward(const void* dy, const void* y, void* dx, int64_t M, int64_t N, float scale,
                      int dtype) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    for_rows(M, N, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        backward_row((const T*)dy + row * N, (const T*)y + row * N, (T*)dx + row * N, N, scale);
    });
  });
}

}  // namespace slimkernels::SLIM_ISA
