// What a launch must know of its device.
#include <cuda_runtime_api.h>

#include <atomic>
#include <stdexcept>

#include "device.h"

namespace slimkernels {
namespace {

constexpr int kDevices = 64;  // more than one machine has; others are asked about every time

// An attribute of a device: cached, since a question to the driver takes longer than a launch's
// other host work. What is kept is one more, so that zero stands for not yet asked.
int cached(std::atomic<int> (&known)[kDevices], int device, cudaDeviceAttr attribute) {
  const bool is_kept = 0 <= device && device < kDevices;
  const int kept = is_kept ? known[device].load(std::memory_order_relaxed) : 0;
  if (kept) return kept - 1;
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, attribute, device);
  if (error != cudaSuccess) {
    cudaGetLastError();  // or the next launch would report it again
    throw std::runtime_error("device " + std::to_string(device) + ": " + cudaGetErrorString(error));
  }
  if (is_kept) known[device].store(value + 1, std::memory_order_relaxed);
  return value;
}

std::atomic<int> processors[kDevices], majors[kDevices], minors[kDevices];

}  // namespace

std::string no_device() {
  int count = 0, driver = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  cudaGetLastError();  // without a driver every call fails: leave no error behind
  if (error == cudaSuccess && count > 0) return "";
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0)
    return "this machine has no CUDA driver";
  if (error == cudaSuccess || error == cudaErrorNoDevice) return "this machine has no CUDA device";
  return std::string("CUDA cannot start: ") + cudaGetErrorString(error);
}

int multiprocessors(int device) {
  return cached(processors, device, cudaDevAttrMultiProcessorCount);
}

int capability(int device) {
  return 10 * cached(majors, device, cudaDevAttrComputeCapabilityMajor) +
         cached(minors, device, cudaDevAttrComputeCapabilityMinor);
}

int max_cluster(int device) {
  const int major = capability(device) / 10;
  if (major < 9) return 1;
  // 8 is what all promise, and the data centre's devices take 16: where one of their 8 groups of
  // multiprocessors must have as many, as it need not in a smaller device or a slice of one.
  return major <= 10 && multiprocessors(device) > 8 * 15 ? 16 : 8;
}

}  // namespace slimkernels
