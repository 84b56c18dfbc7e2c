// csrc/cuda/device.h without a device: what it says of sm_90, or of CUDA_ON_CPU_CAPABILITY, which
// is read at every call; few multiprocessors, so that small inputs fill them.
#include "device.h"

#include <cstdlib>

namespace slimkernels {

std::string no_device() { return "kernels run on the CPU"; }

int multiprocessors(int) { return 1; }

int capability(int) {
  const char* wanted = std::getenv("CUDA_ON_CPU_CAPABILITY");
  return wanted ? std::atoi(wanted) : 90;
}

int max_cluster(int device) { return capability(device) < 90 ? 1 : 16; }

}  // namespace slimkernels
