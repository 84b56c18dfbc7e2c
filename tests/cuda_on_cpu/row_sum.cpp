// The smallest user of csrc/cuda/rows.cuh, for test_faults.py: sums each row of an array of ones.
//
//     row_sum M N MAX_THREADS MAX_CLUSTER [FAULT]
//
// test_faults.py plants faults in a copy of the headers, of which `planted` turns on FAULT.
#include <cstdio>
#include <string>

static std::string fault;
static bool planted(const char* name) { return fault == name; }

#include "rows.cuh"

using namespace slimkernels;

template <int kVec>
void row_sum_kernel(const float* x, float* y, int64_t M, int N, RowTiling tiling) {
  Team team(tiling);
  for (int64_t row = team.first_row(); row < M + tiling.rows; row += team.row_step()) {
    float sum = 0.f;
    team.each_pack<kVec>(0, row < M ? N : 0, [&](int, int col) {
      float values[kVec];
      load(values, x + row * N + col);
      for (float value : values) sum += value;
    });
    sum = team.reduce(sum, combine_sum);
    if (team.rank() == team.size() - 1 && row < M) y[row] = sum;
  }
}

int main(int argc, char** argv) {
  const int M = std::atoi(argv[1]), N = std::atoi(argv[2]);
  const RowTiling tiling = row_tiling(N, std::atoi(argv[3]), std::atoi(argv[4]));
  fault = argc > 5 ? argv[5] : "";
  std::vector<float> x(M * N, 1.f), y(M, -1.f);
  try {
    // One program for all rows: teams take turns, the last beyond the last row.
    const dim3 grid(tiling.blocks);
    if (N % 4 == 0)
      LAUNCH_CLUSTER(row_sum_kernel<4>, grid, tiling.block(), tiling.blocks, 0, nullptr, x.data(),
                     y.data(), M, N, tiling);
    else
      LAUNCH_CLUSTER(row_sum_kernel<1>, grid, tiling.block(), tiling.blocks, 0, nullptr, x.data(),
                     y.data(), M, N, tiling);
  } catch (const std::runtime_error& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  for (int row = 0; row < M; ++row)
    if (y[row] != float(N)) return std::printf("row %d is %g\n", row, y[row]), 1;
  return 0;
}
