// csrc/cuda/device.h without a device: what it says of sm_90, or of CUDA_ON_CPU_CAPABILITY, which
// is read at every call; one multiprocessor, so that small inputs fill it, or as many as
// CUDA_ON_CPU_MULTIPROCESSORS says.
#include "device.h"

#include <cstdlib>

namespace slimkernels {

std::string no_device() { return "kernels run on the CPU"; }

namespace {
int wanted(const char* name, int otherwise) {
  const char* number = std::getenv(name);
  return number ? std::atoi(number) : otherwise;
}
}  // namespace

int multiprocessors(int) { return wanted("CUDA_ON_CPU_MULTIPROCESSORS", 1); }

int capability(int) { return wanted("CUDA_ON_CPU_CAPABILITY", 90); }

int max_cluster(int device) { return capability(device) < 90 ? 1 : 16; }

}  // namespace slimkernels
