// What every kernel needs: float conversion, 128-bit loads and stores, and the launch.
//
// The same files are compiled by nvcc for the GPU and by g++ for the CPU, where
// tests/cuda_on_cpu/cuda_on_cpu.h runs each thread as a fiber under AddressSanitizer. What the two
// spell differently is here: launches, shared memory, clusters.
#pragma once
#include <cstdint>

#include "device.h"
#include "ops.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>
#include <string>

// Launches neither synchronise nor report: check_launch does, once an entry point.
#define LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)

// cluster_size neighbours of grid.x are a cluster, 1 for none; shared_bytes are for DYNAMIC_SHARED.
#define LAUNCH_CLUSTER(kernel, grid, block, cluster_size, shared_bytes, stream, ...) \
  slimkernels::launch_cluster(kernel, grid, block, cluster_size, shared_bytes, stream, __VA_ARGS__)

// An array that the threads of a block share: T name[n], and the bytes that the launch asked for.
#define SHARED_ARRAY(T, name, n) __shared__ __align__(16) T name[n]
#define DYNAMIC_SHARED(T, name)                                         \
  extern __shared__ __align__(128) unsigned char slim_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(slim_dynamic_shared)
#else
#include "cuda_on_cpu.h"
#define LAUNCH(kernel, grid, block, stream, ...) \
  cuda_on_cpu::launch(kernel, grid, block, 1, 0, stream, __VA_ARGS__)
#define LAUNCH_CLUSTER(kernel, grid, block, cluster_size, shared_bytes, stream, ...) \
  cuda_on_cpu::launch(kernel, grid, block, cluster_size, shared_bytes, stream, __VA_ARGS__)
#define SHARED_ARRAY(T, name, n)                   \
  T* const name = [] {                             \
    static char site;                              \
    return cuda_on_cpu::shared_array<T>(&site, n); \
  }()
#define DYNAMIC_SHARED(T, name) T* const name = cuda_on_cpu::dynamic_shared<T>()
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

// 2^x in one instruction ("ex2" in the PTX ISA), at most 2 units in the last place off; subnormal
// results are 0.
__device__ inline float exp2_approximate(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float y = exp2f(x);
  return y < 1.17549435e-38f ? 0.f : y;
#endif
}

// kVec neighbours: as many as 16 bytes, one instruction, hold where rows are aligned, else one. Of
// float32 beside a 16-bit type as many take two instructions.
template <typename T, int kVec>
struct alignas(sizeof(T) * kVec < 16 ? sizeof(T) * kVec : 16) Pack {
  T values[kVec];
};

template <int kVec, typename T>
__device__ void load(float (&values)[kVec], const T* from) {
  const Pack<T, kVec> pack = *reinterpret_cast<const Pack<T, kVec>*>(from);
#pragma unroll
  for (int i = 0; i < kVec; ++i) values[i] = widen(pack.values[i]);
}

// Two neighbours in one register, by one instruction.
__device__ inline unsigned narrow_pair(float a, float b, __half) {
  const __half2 pair = __floats2half2_rn(a, b);
  unsigned word;
  memcpy(&word, &pair, sizeof word);
  return word;
}
__device__ inline unsigned narrow_pair(float a, float b, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  unsigned word;
  memcpy(&word, &pair, sizeof word);
  return word;
}

// 16 bytes of values to global memory in one instruction: nvcc splits some stores of structs.
template <typename T>
__device__ void store_16_bytes(T* to, const float* values) {
  uint4 words;
  if constexpr (sizeof(T) == 4)
    memcpy(&words, values, sizeof words);
  else
    words =
        make_uint4(narrow_pair(values[0], values[1], T{}), narrow_pair(values[2], values[3], T{}),
                   narrow_pair(values[4], values[5], T{}), narrow_pair(values[6], values[7], T{}));
#ifdef __CUDACC__
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
               : "memory");
#else
  *reinterpret_cast<uint4*>(to) = words;
#endif
}

template <int kVec, typename T>
__device__ void store(T* to, const float (&values)[kVec]) {
  constexpr int kWide = 16 / sizeof(T);
  if constexpr (kVec % kWide == 0) {
#pragma unroll
    for (int i = 0; i < kVec; i += kWide) store_16_bytes(to + i, values + i);
  } else {
    Pack<T, kVec> pack;
#pragma unroll
    for (int i = 0; i < kVec; ++i) pack.values[i] = narrow<T>(values[i]);
    *reinterpret_cast<Pack<T, kVec>*>(to) = pack;
  }
}

template <typename T>
constexpr int kFullVec = 16 / sizeof(T);

// Whether every row of N elements of these arrays starts on a 16-byte boundary.
template <typename T, typename... Pointers>
bool rows_aligned(int64_t N, Pointers... pointers) {
  return N % kFullVec<T> == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

inline bool is_float32(int dtype) { return Dtype(dtype) == Dtype::kFloat32; }

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
  throw std::invalid_argument("no dtype has the number " + std::to_string(dtype));
}

#ifdef __CUDACC__

// Every thread of the cluster waits for all the others; what they wrote before, to any block's
// shared memory, is seen after. One block is its own cluster.
__device__ inline void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#else
  __syncthreads();
#endif
}

// Where block `rank` of the cluster has what this block has at `shared`.
template <typename T>
__device__ T* map_shared_rank(T* shared, int rank) {
#if __CUDA_ARCH__ >= 900
  T* mapped;
  asm("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(shared), "r"(rank));
  return mapped;
#else
  return shared;
#endif
}

inline void check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would report it again
  throw std::runtime_error(what + ": " + cudaGetErrorString(error));
}

// An error stays the thread's last one, for check_launch.
template <typename... Params, typename... Args>
void launch_cluster(void (*kernel)(Params...), dim3 grid, dim3 block, int cluster_size,
                    size_t shared_bytes, cudaStream_t stream, Args&&... args) {
  if (cluster_size > 8 &&  // the most that every device with clusters promises
      cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1))
    return;
  if (shared_bytes > 48 << 10 &&
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)))
    return;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {unsigned(cluster_size), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = cluster_size > 1;  // devices before sm_90 do not know the attribute
  cudaLaunchKernelEx(&config, kernel, Params(args)...);
}

// Launches go to `device` whatever the thread's current one is, which is restored.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    // Of the same device, too: on a new thread it gives the driver a context.
    check(cudaSetDevice(device), "cudaSetDevice(" + std::to_string(device) + ")");
    changed_ = previous_ != device;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

inline void check_launch(const char* op, int64_t M, int64_t N) {
  const std::string shape = "(" + std::to_string(M) + ", " + std::to_string(N) + ")";
  check(cudaGetLastError(), std::string(op) + " of " + shape);
}

#endif

}  // namespace slimkernels
