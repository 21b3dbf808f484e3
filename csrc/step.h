// Langevin steps and fills on the CPU: raw pointers in, nothing checked here.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace ebmfast {

Tiling tile(int64_t batch, int64_t size);

void fill(float* out, int64_t batch, int64_t size, const NoiseId& id, bool uniform, int threads);

// Steps over one state: everything that stays the same from step to step. One thread at a time may run it.
class StepPlan {
public:
    // `args` without gradients, weights, coefficients, step and scratch; norm_limit < 0 for no norm clip.
    StepPlan(const StepArgs& args, int64_t* faults, float norm_limit);

    // gradients: n_gradients pointers; weights as announced in args.
    void run(const void* const* gradients, const float* weights, uint32_t step, float drift, float noise, int threads);

    const StepArgs& args() const { return args_; }

private:
    void norm_scales(int threads);
    void record_faults();

    StepArgs args_;
    int64_t* faults_;
    float norm_limit_;
    int any_bad_ = 0;
    std::vector<uint8_t> bad_;
    std::vector<double> squares_;
    std::vector<float> scale_;
};

}  // namespace ebmfast
