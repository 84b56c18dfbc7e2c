// RMSNorm, of a sum too: the instances of norm_forward.cuh and norm_backward.cuh without a mean.
#include "norm_backward.cuh"

namespace slimkernels {

template decltype(norm_forward<true>) norm_forward<true>;
template decltype(norm_backward<true>) norm_backward<true>;

}  // namespace slimkernels
