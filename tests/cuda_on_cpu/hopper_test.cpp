// The wrappers of hopper.cuh and wgmma.cuh in one small kernel, against plain loops, and tanh:
// products with each operand in each place and order, TMA of four and five dimensions. Bulk copies,
// stmatrix and turns are in attention_backward_fault.cpp. Prints the largest error, or what failed.
#include <cstdio>
#include <random>

#include "attention_sm90_parts.cuh"

using namespace slimkernels;

constexpr int kM = 64, kK_ = 128;

// out (64, N) = A (64, 128) @ B (128, N).
template <typename T, int N, int kForm>
__global__ void __launch_bounds__(256, 1)
    product_kernel(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map,
                   float* out) {
#ifdef SLIM_HOPPER
  unsigned char* const a = aligned_shared();
  unsigned char* const b = a + tile_bytes(kM, kK_);
  auto* const full = reinterpret_cast<Mbarrier*>(b + 128 * N * 2);
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x < kWarpGroup) {
    registers_shrink<24>();
    if (threadIdx.x == 0) {
      mbarrier_arrive_expect(full, tile_bytes(kM, kK_) + 128 * N * 2);
      // kForm 1: A is stored (128, 64), its M in a row. kForm 2, 3: B is (128, N), else (N, 128).
      const int a_rows = kForm == 1 ? kK_ : kM, b_rows = kForm >= 2 ? 128 : N;
      for (int c = 0; c < (kForm == 1 ? kM : kK_); c += 64)
        tma_load(a + c / 64 * panel_bytes(a_rows), &a_map, full, c, 0, 0, 0);
      for (int c = 0; c < (kForm >= 2 ? N : 128); c += 64)
        tma_load(b + c / 64 * panel_bytes(b_rows), &b_map, full, c, 0, 0, 1, 0);
    }
  } else {
    registers_grow<240>();
    mbarrier_wait(full, 0);
    float d[N / 2];
    uint32_t p[kK_ / 16][4];
    const int t = threadIdx.x % 128, row = t / 32 * 16 + t % 32 / 4;
    const uint32_t a_at = shared_address(a), b_at = shared_address(b);
    if (kForm == 3)
      for (int k = 0; k < kK_ / 16; ++k)
        for (int e = 0; e < 4; ++e) {
          const int r = row + e % 2 * 8, c = k * 16 + t % 4 * 2 + e / 2 * 8;
          const int byte =
              c / 64 * panel_bytes(kM) + r * 128 + ((c % 64 / 8) ^ (r % 8)) * 16 + c % 8 * 2;
          p[k][e] = *reinterpret_cast<const uint32_t*>(a + byte);
        }
    fence_registers(p);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kK_; k += 16) {
      const uint64_t of_a = kForm == 1 ? operand_mn(a_at, kK_, 0, k) : operand_k(a_at, kM, 0, k);
      const uint64_t of_b = kForm >= 2 ? operand_mn(b_at, 128, 0, k) : operand_k(b_at, N, 0, k);
      if constexpr (kForm == 0) wgmma<T, kK, kK>(d, of_a, of_b, k > 0);
      if constexpr (kForm == 1) wgmma<T, kMN, kK>(d, of_a, of_b, k > 0);
      if constexpr (kForm == 2) wgmma<T, kK, kMN>(d, of_a, of_b, k > 0);
      if constexpr (kForm == 3) wgmma<T, kMN>(d, p[k / 16], of_b, k > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    fence_registers(d);
    fence_registers(p);
    for (int i = 0; i < N / 2; i += 2) {
      float* const place = out + (row + i % 4 / 2 * 8) * N + i / 4 * 8 + t % 4 * 2;
      place[0] = d[i];
      place[1] = d[i + 1];
    }
  }
#endif
}

template <typename T, int N, int kForm>
void check_product() {
  std::mt19937 random(N + kForm);
  std::normal_distribution<float> normal;
  // Narrower than the box in both directions, so that zeros fill it.
  const int rows_a = kForm == 1 ? 120 : 60, columns_a = kForm == 1 ? 56 : 120;
  const int rows_b = kForm >= 2 ? 120 : N - 4, columns_b = kForm >= 2 ? N - 8 : 120;
  std::vector<T> a(rows_a * columns_a), b(2 * rows_b * columns_b);
  for (T& x : a) x = T(normal(random));
  for (T& x : b) x = T(normal(random));
  std::vector<float> out(kM * N, 0.f);
  const int box_a = kForm == 1 ? kK_ : kM, box_b = kForm >= 2 ? 128 : N;
  const auto a_map =
      tensor_map<T, 4>(a.data(), {columns_a, rows_a, 1, 1}, {columns_a, 8, 8}, {64, box_a, 1, 1});
  // Pairs of rows are a dimension of their own.
  const auto b_map =
      tensor_map<T, 5>(b.data(), {columns_b, 2, rows_b / 2, 2, 1},
                       {columns_b, 2 * columns_b, rows_b * columns_b, 8}, {64, 2, box_b / 2, 1, 1});
  const int bytes = kPanelAlignment + tile_bytes(kM, kK_) + 128 * N * 2 + 8;
  LAUNCH_CLUSTER((product_kernel<T, N, kForm>), dim3(1), dim3(256), 1, bytes, nullptr, a_map, b_map,
                 out.data());
  double worst = 0;
  for (int i = 0; i < kM; ++i)
    for (int n = 0; n < N; ++n) {
      double sum = 0;
      for (int k = 0; k < kK_; ++k) {
        const int ar = kForm == 1 ? k : i, ac = kForm == 1 ? i : k;
        const int br = kForm >= 2 ? k : n, bc = kForm >= 2 ? n : k;
        if (ar < rows_a && ac < columns_a && br < rows_b && bc < columns_b)
          sum += double(widen(a[ar * columns_a + ac])) * widen(b[(rows_b + br) * columns_b + bc]);
      }
      worst = std::max(worst, std::abs(sum - out[i * N + n]));
    }
  std::printf("%s n%d form %d: %g\n", sizeof(T) == 2 && kIsHalf<T> ? "f16" : "bf16", N, kForm,
              worst);
  if (!(worst < 1e-3)) throw std::runtime_error("wrong product");
}

// softcap: tanh and, from its gap, its slope, which 1 - tanh^2 would lose where tanh is almost 1.
void check_tanh() {
  for (double x = -30; x <= 30; x += 1e-3) {
    const float given = float(x), gap = tanh_gap(given);
    const double tanh = std::tanh(double(given)), cosh = std::cosh(double(given));
    const double slope = double(gap) * (2 - gap) * cosh * cosh;
    if (!(std::abs(tanh_of(given, gap) - tanh) <= 1e-6 * std::abs(tanh) &&
          std::abs(slope - 1) < 1e-5))
      throw std::runtime_error("tanh or its slope is wrong at " + std::to_string(x));
  }
}

int main() {
  try {
    check_tanh();
    check_product<__nv_bfloat16, 64, 0>();
    check_product<__half, 80, 0>();
    check_product<__nv_bfloat16, 128, 1>();
    check_product<__half, 128, 2>();
    check_product<__nv_bfloat16, 256, 3>();
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
}
