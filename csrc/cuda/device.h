// What a launch must know of its device. Asked of the driver once and kept.
#pragma once
#include <string>

namespace slimkernels {

// Why no kernel can run here, in a sentence; empty if one can. Asked for by slimkernels.info, never
// at import: the answer takes the driver's start.
std::string no_device();

int multiprocessors(int device);

// The most blocks that can be a cluster; 1 where there are no clusters.
int max_cluster(int device);

// 10 * major + minor of the compute capability: 90 for sm_90.
int capability(int device);

}  // namespace slimkernels
