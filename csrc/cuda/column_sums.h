// The last step of a gradient that sums over rows: programs left partial sums, here they are added.
#pragma once
#include <cstdint>

namespace slimkernels {

// sums (N,) in dtype = the columns' sums of partials (P, N), always in the same order.
void column_sums(const float* partials, void* sums, int64_t P, int64_t N, int dtype, void* stream);

}  // namespace slimkernels
