// Launches on a CUDA stream; every pointer is device memory. Errors come back as text, null for none.
#pragma once

#include <cstdint>

#include "../kernels.h"

namespace ebmfast {
namespace cuda {

constexpr int kMaxGradients = 64;  // their addresses travel as a kernel argument

const char* fill(const FillArgs& args, void* stream);

// As StepPlan::run, in order on the stream and without waiting. args.bad [batch] must be 0 and is 0 again afterwards;
// args.scale and args.squares are scratch, null without norm clip (norm_limit < 0).
const char* step(const StepArgs& args, int64_t* faults, float norm_limit, float* scale, void* stream);

}  // namespace cuda
}  // namespace ebmfast
