// The seam between the glue (torch's stable ABI) and the kernel (CUDA only).
#pragma once

#include <vector>

#include "matrix.h"

namespace ucan_fast {

// Enqueues the scaling of all matrices (device pointers, current device) on a cudaStream_t.
// Returns nullptr, or CUDA's text for what went wrong.
const char* launch_attenuate(const std::vector<Matrix>& matrices, void* stream);

}  // namespace ucan_fast
