// Attention's Hopper kernel on three ragged sequences, causal, two heads that share keys in a tile,
// the second sequence's values NaN and seen by nobody, for test_attention_faults.py, which plants
// faults in a copy of the headers.
//
//     attention_fault [FAULT]     turns one on; fails, and says why, if the numbers are wrong
#include <cstdio>
#include <random>
#include <string>

static std::string fault;
static bool planted(const char* name) { return fault == name; }

#include "attention_sm90.cuh"

using namespace slimkernels;

using T = __nv_bfloat16;
using Tile = AttentionTile<T, 128>;
constexpr int kD = 128, kH = 2, kQueries = 140, kKeys = 610;
constexpr float kScale = 0.09f;
int cu_q[4] = {0, 75, 75, kQueries}, cu_k[4] = {0, 330, 340, kKeys};
constexpr int kOffset = 245;

// The largest error of a sequence's outputs.
double error_of(int sequence, const std::vector<T>& q, const std::vector<T>& k,
                const std::vector<T>& v, const std::vector<T>& y) {
  double worst = 0;
  const int keys = cu_k[sequence + 1] - cu_k[sequence];
  for (int n = cu_q[sequence] * kH; n < cu_q[sequence + 1] * kH; ++n) {
    const int row = n * kD, i = n / kH - cu_q[sequence];
    double sum = 0;
    std::vector<double> out(kD);
    for (int j = 0; j < keys && j <= i + kOffset; ++j) {
      const int at = (cu_k[sequence] + j) * kD;
      double score = 0;
      for (int d = 0; d < kD; ++d) score += double(widen(q[row + d])) * widen(k[at + d]);
      const double p = std::exp(score * kScale);
      sum += p;
      for (int d = 0; d < kD; ++d) out[d] += p * widen(v[at + d]);
    }
    for (int d = 0; d < kD; ++d) {
      const double error = std::abs(out[d] / sum - widen(y[row + d]));
      if (!(error <= worst)) worst = error;
      if (std::isnan(worst)) return worst;
    }
  }
  return worst;
}

int main(int argc, char** argv) {
  fault = argc > 1 ? argv[1] : "";
  std::mt19937 random(0);
  std::normal_distribution<float> normal;
  std::vector<T> q(kQueries * kH * kD), k(kKeys * kD), v(kKeys * kD), y(q.size());
  std::vector<float> lse(2 * kH * kQueries);
  for (auto* x : {&q, &k, &v})
    for (T& value : *x) value = T(normal(random));
  std::fill(v.begin() + cu_k[1] * kD, v.begin() + cu_k[2] * kD, T(NAN));
  AttentionArguments arguments = {};
  arguments.shape = {3, 1, 1, kQueries, kKeys, -1, 0, kOffset, cu_q, cu_k, nullptr, nullptr};
  arguments.schedule = {2, 1};
  arguments.packed = kH;
  arguments.tokens = Tile::kM / kH;
  arguments.scale = kScale;
  arguments.value_width = kD;
  arguments.y = y.data();
  arguments.lse = lse.data();
  arguments.low = lse.data() + kH * kQueries;
  TensorMap q_map = tensor_map<T, 5>(q.data(), {kD, kH, kQueries, 1, 1}, {kD, kH * kD, 8, 8},
                                     {64, kH, Tile::kM / kH, 1, 1});
  q_map.swizzled = !planted("no swizzle");
  const auto map = [](const std::vector<T>& x) {
    return tensor_map<T, 4>(x.data(), {kD, kKeys, 1, 1}, {kD, 8, 8}, {64, Tile::kN, 1, 1});
  };
  try {
    LAUNCH_CLUSTER(attention_sm90_forward_kernel<Tile>, dim3(2), dim3(Tile::kThreads), 1,
                   kAttentionSharedBytes<Tile>, nullptr, q_map, map(k), map(v), arguments);
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  const double worst = std::max(error_of(0, q, k, v, y), error_of(2, q, k, v, y));
  if (worst < 0.02) return 0;
  std::printf("the largest error is %g\n", worst);
  return 1;
}
