// Attention's Hopper gradients on three ragged sequences, causal, two heads on one key head, all of
// the second sequence NaN, for test_attention_backward_faults.py, which plants faults in a copy of
// the headers.
//
//     attention_backward_fault keys|queries [FAULT]     fails, and says why, if numbers are wrong
//
// keys: the walk that makes all gradients, three of its blocks at a time, which start in either
// order and must give the same bits.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>

static std::string fault;
static bool planted(const char* name) { return fault == name; }

#include "attention_sm90_backward.cuh"

using namespace slimkernels;

using T = __nv_bfloat16;
using Keys = KeyGradientTile<T, 64, true>;
using Queries = QueryGradientTile<T, 64>;
constexpr int kD = 64, kH = 2, kQueries = 100, kKeys = 580, kOffset = 500;
constexpr float kScale = 0.12f;
int cu_q[4] = {0, 70, 77, kQueries}, cu_k[4] = {0, 530, 540, kKeys};

struct Call {
  std::vector<T> q, k, v, dy, y;
  std::vector<float> lse;
  std::vector<double> dq, dk, dv;  // right ones

  Call()
      : q(kQueries * kH * kD),
        k(kKeys * kD),
        v(kKeys * kD),
        dy(q.size()),
        y(q.size()),
        lse(2 * kH * kQueries),
        dq(q.size()),
        dk(k.size()),
        dv(k.size()) {
    std::mt19937 random(0);
    std::normal_distribution<float> normal;
    for (auto* x : {&q, &k, &v, &dy})
      for (T& value : *x) value = T(normal(random));
    // One query whose lse is so low that P of an absent key, which is 0, would be infinite.
    for (int j = 0; j < cu_k[1]; ++j) k[j * kD] = T(4);
    q[60 * kH * kD] = T(-256);
    const auto spoil = [](std::vector<T>& x, const int (&cu)[4], int row) {
      std::fill(x.begin() + cu[1] * row, x.begin() + cu[2] * row, T(NAN));
    };
    for (auto* x : {&q, &dy, &y}) spoil(*x, cu_q, kH * kD);
    for (auto* x : {&k, &v}) spoil(*x, cu_k, kD);
    for (int h = 0; h < kH; ++h)
      std::fill(&lse[h * kQueries + cu_q[1]], &lse[h * kQueries + cu_q[2]], NAN);
    for (int sequence : {0, 2})
      for (int h = 0; h < kH; ++h)
        for (int i = cu_q[sequence]; i < cu_q[sequence + 1]; ++i) attend(sequence, h, i);
  }

  void attend(int sequence, int head, int i) {
    const int row = (i * kH + head) * kD, begin = cu_k[sequence];
    const int last = i - cu_q[sequence] + kOffset;
    const int end = std::min(cu_k[sequence + 1], begin + last + 1);
    std::vector<double> p, dp;
    double sum = 0, delta = 0;
    for (int j = begin; j < end; ++j) {
      double score = 0, product = 0;
      for (int d = 0; d < kD; ++d) {
        score += double(widen(q[row + d])) * widen(k[j * kD + d]);
        product += double(widen(dy[row + d])) * widen(v[j * kD + d]);
      }
      p.push_back(std::exp(score * kScale));
      dp.push_back(product);
      sum += p.back();
    }
    lse[head * kQueries + i] = std::log(sum);
    for (size_t n = 0; n < p.size(); ++n) delta += (p[n] /= sum) * dp[n];
    for (int d = 0; d < kD; ++d) {
      double out = 0;
      for (size_t n = 0; n < p.size(); ++n) {
        const int at = (begin + n) * kD + d;
        const double ds = p[n] * (dp[n] - delta) * kScale;
        out += p[n] * widen(v[at]);
        dv[at] += p[n] * widen(dy[row + d]);
        dk[at] += ds * widen(q[row + d]);
        dq[row + d] += ds * widen(k[at]);
      }
      y[row + d] = T(out);
    }
  }
};

TensorMap map(const std::vector<T>& x, int heads, int rows) {
  const int64_t tokens = x.size() / (heads * kD);
  return tensor_map<T, 4>(x.data(), {kD, tokens, heads, 1}, {heads * kD, kD, 8}, {64, rows, 1, 1});
}

// The largest error of the tokens that are not the second sequence's.
double error_of(const std::vector<T>& found, const std::vector<double>& right, const int (&cu)[4]) {
  const size_t row = right.size() / cu[3];
  double worst = 0;
  for (size_t i = 0; i < right.size(); ++i) {
    const int token = i / row;
    if (token >= cu[1] && token < cu[2]) continue;
    const double error = std::abs(right[i] - widen(found[i]));
    if (!(error <= worst)) worst = error;
    if (std::isnan(worst)) break;
  }
  return worst;
}

// What the launches are given, and write.
struct Launch {
  const Call& call;
  std::vector<float> known, sums;
  std::vector<int> counters;
  std::vector<T> dq, dk, dv;
  AttentionBackwardArguments arguments = {};

  explicit Launch(const Call& call)
      : call(call), known(call.lse.size()), dq(call.q.size()), dk(call.k.size()), dv(dk.size()) {
    arguments.shape = {3, kH, kH, kQueries, kKeys, -1, 0, kOffset, cu_q, cu_k, nullptr, nullptr};
    const int tiles = query_tiles(arguments.shape, Keys::kWalked) * kH;
    sums.assign(tiles * Keys::kWalked * kD, NAN);
    counters.assign(tiles + 1, 1);
    arguments.section = 1;
    arguments.scale = arguments.dq_scale = kScale;
    arguments.width = arguments.value_width = kD;
    arguments.lse = known.data();
    arguments.delta = &known[kH * kQueries];
    arguments.dq = dq.data();
    arguments.dk = dk.data();
    arguments.dv = dv.data();
    arguments.sums = sums.data();
    arguments.taken = counters.data();
    arguments.turns = &counters[1];
  }

  void make_delta() {
    const int64_t rows = kH * kQueries;
    const AttentionRows x = {call.dy.data(),
                             call.y.data(),
                             0,
                             kD,
                             kH * kD,
                             call.lse.data(),
                             &call.lse[rows],
                             nullptr,
                             known.data(),
                             &known[rows],
                             counters.data(),
                             rows,
                             int64_t(counters.size()),
                             kH,
                             kQueries,
                             kD,
                             true};
    LAUNCH(attention_delta_kernel<T>, dim3(rows / 32 + 1), dim3(kDeltaThreads), nullptr, x);
  }

  template <typename Kernel>
  void walk(Kernel kernel, int tiles, int bytes, int M, int N) {
    LAUNCH_CLUSTER(kernel, dim3(tiles), dim3(Keys::kThreads), 1, bytes, nullptr, map(call.q, kH, M),
                   map(call.k, 1, N), map(call.v, 1, N), map(call.dy, kH, M), arguments);
  }

  void walk_keys() {
    walk(attention_sm90_dkdv_kernel<Keys>, query_tiles(mirrored(arguments.shape), Keys::kOwn),
         WalkShared<Keys>::kBytes, Keys::kWalked, Keys::kOwn);
    LAUNCH(attention_dq_kernel<Keys>, dim3(query_tiles(arguments.shape, Keys::kWalked) * kH),
           dim3(2 * kWarpGroup), nullptr, arguments);
  }
  void walk_queries() {
    walk(attention_sm90_dq_kernel<Queries>, query_tiles(arguments.shape, Queries::kOwn) * kH,
         WalkShared<Queries>::kBytes, Queries::kOwn, Queries::kWalked);
  }
};

constexpr double kMostError = 0.03;

double run(bool of_keys) {
  const Call call;
  std::vector<float> before;  // sums of dq
  for (const char* order : {"forward", "reverse"}) {
    setenv("CUDA_ON_CPU_ORDER", order, 1);
    Launch launch(call);
    launch.make_delta();
    if (!of_keys) {
      launch.walk_queries();
      return error_of(launch.dq, call.dq, cu_q);
    }
    launch.walk_keys();
    // A sum, since a maximum would lose NaN.
    const double worst = error_of(launch.dq, call.dq, cu_q) + error_of(launch.dk, call.dk, cu_k) +
                         error_of(launch.dv, call.dv, cu_k);
    if (!(worst < kMostError)) return worst;
    if (!before.empty() && std::memcmp(before.data(), launch.sums.data(), before.size() * 4))
      throw std::runtime_error("bits depend on the order of blocks");
    before = launch.sums;
  }
  return 0;
}

int main(int argc, char** argv) {
  fault = argc > 2 ? argv[2] : "";
  setenv("CUDA_ON_CPU_RESIDENT", "3", 1);
  double worst;
  try {
    worst = run(argc > 1 && argv[1] == std::string("keys"));
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  if (worst < kMostError) return 0;
  std::printf("the largest error is %g\n", worst);
  return 1;
}
