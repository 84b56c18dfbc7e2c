// What every kernel needs: float conversion, 128-bit loads and stores, and the launch.
//
// The same headers are compiled by nvcc for the GPU and by g++ for the CPU, where
// tests/cuda_on_cpu.h runs each thread as a fiber under AddressSanitizer. LAUNCH is the one
// spelling that differs.
#pragma once
#include <cstdint>

#include "ops.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>
#include <string>

#define LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#else
#include "cuda_on_cpu.h"
#define LAUNCH(kernel, grid, block, stream, ...) \
  cuda_on_cpu::launch(kernel, grid, block, __VA_ARGS__)
#endif

namespace slimkernels {

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ T narrow(float x);
template <>
__device__ inline float narrow<float>(float x) {
  return x;
}
template <>
__device__ inline __half narrow<__half>(float x) {
  return __float2half(x);
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16(x);
}

// kVec neighbours that move in one instruction: 16 bytes where rows are aligned, else one element.
template <typename T, int kVec>
struct alignas(sizeof(T) * kVec) Pack {
  T values[kVec];
};

template <int kVec, typename T>
__device__ void load(float (&values)[kVec], const T* from) {
  const Pack<T, kVec> pack = *reinterpret_cast<const Pack<T, kVec>*>(from);
#pragma unroll
  for (int i = 0; i < kVec; ++i) values[i] = widen(pack.values[i]);
}

template <int kVec, typename T>
__device__ void store(T* to, const float (&values)[kVec]) {
  Pack<T, kVec> pack;
#pragma unroll
  for (int i = 0; i < kVec; ++i) pack.values[i] = narrow<T>(values[i]);
  *reinterpret_cast<Pack<T, kVec>*>(to) = pack;
}

template <typename T>
constexpr int kFullVec = 16 / sizeof(T);

// Whether every row of N elements of these arrays starts on a 16-byte boundary.
template <typename T, typename... Pointers>
bool rows_aligned(int64_t N, Pointers... pointers) {
  return N % kFullVec<T> == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// Calls run(T{}) for the C++ type of a dtype.
template <typename Run>
void with_type(int dtype, Run run) {
  switch (Dtype(dtype)) {
    case Dtype::kFloat32:
      return run(float{});
    case Dtype::kFloat16:
      return run(__half{});
    case Dtype::kBFloat16:
      return run(__nv_bfloat16{});
  }
}

#ifdef __CUDACC__

inline void check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would report it again
  throw std::runtime_error(what + ": " + cudaGetErrorString(error));
}

// Launches go to `device` whatever the thread's current one is, which is restored.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    check(cudaSetDevice(device), "cudaSetDevice(" + std::to_string(device) + ")");
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

inline void check_launch(const char* op, int64_t M, int64_t N) {
  const std::string shape = "(" + std::to_string(M) + ", " + std::to_string(N) + ")";
  check(cudaGetLastError(), std::string(op) + " of " + shape);
}

#endif

}  // namespace slimkernels
