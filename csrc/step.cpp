#include "step.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "dispatch.h"
#include "pool.h"

namespace ebmfast {
namespace {

constexpr int64_t kSmallChain = 256;    // shorter chains share tiles
constexpr int64_t kWorthAThread = 32768;  // elements: about ten times what waking a thread costs

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int useful_threads(int64_t elements, int threads) {
    return int(std::max<int64_t>(1, std::min<int64_t>(threads, elements / kWorthAThread)));
}

bool finite_at(const StepArgs& a, int k, int64_t i) {
    if (a.bf16) return (static_cast<const uint16_t*>(a.gradients[k])[i] & 0x7f80) != 0x7f80;
    return std::isfinite(static_cast<const float*>(a.gradients[k])[i]);
}

// 1 + the first gradient that is not finite where the chain may move, 0 if all are.
int64_t blame(const StepArgs& a, int64_t chain) {
    for (int k = 0; k < a.n_gradients; ++k) {
        for (int64_t i = 0; i < a.size; ++i) {
            const bool moves = a.frozen == nullptr || a.frozen[chain * a.frozen_stride + i] == 0;
            if (moves && !finite_at(a, k, chain * a.size + i)) return k + 1;
        }
    }
    return 0;
}

}  // namespace

Tiling tile(int64_t batch, int64_t size) {
    if (batch == 0 || size == 0) return {0, 1, 1, 0};
    if (size < kSmallChain) {
        const int64_t padded = 4 * ceil_div(size, 4);
        const int64_t chains = kTile / padded;
        return {chains, 0, 1, ceil_div(batch, chains)};
    }
    const int64_t even = ceil_div(size, ceil_div(size, kTile));
    const int64_t elements = 64 * ceil_div(even, 64);  // whole Philox registers at every level
    const int64_t per_chain = ceil_div(size, elements);
    return {0, elements, per_chain, per_chain * batch};
}

void fill(float* out, int64_t batch, int64_t size, const NoiseId& id, bool uniform, int threads) {
    const FillArgs args{out, batch, size, id, uniform, tile(batch, size)};
    const Kernels& k = kernels();
    const auto work = [&](int64_t begin, int64_t end) { k.fill(args, begin, end); };
    parallel_for(args.tiling.tiles, useful_threads(batch * size, threads), work);
}

StepPlan::StepPlan(const StepArgs& args, int64_t* faults, float norm_limit) : args_(args), faults_(faults), norm_limit_(norm_limit) {
    args_.tiling = tile(args_.batch, args_.size);
    args_.faults = faults;
    args_.any_bad = &any_bad_;
    args_.bad = nullptr;
    args_.scale = nullptr;
    args_.squares = nullptr;
    if (faults != nullptr) {
        bad_.assign(size_t(args_.batch), 0);
        args_.bad = bad_.data();
    }
    if (norm_limit >= 0 && args_.n_gradients > 0) {
        squares_.resize(size_t(args_.batch * ceil_div(args_.size, kNormBlock)));
        scale_.resize(size_t(args_.batch));
        args_.squares = squares_.data();
        args_.scale = scale_.data();
    }
}

void StepPlan::run(const void* const* gradients, const float* weights, uint32_t step, float drift, float noise, int threads) {
    args_.gradients = gradients;
    args_.weights = weights;
    args_.id.step = step;
    args_.drift = drift;
    args_.noise = noise;
    threads = useful_threads(args_.batch * args_.size, threads);
    if (args_.scale != nullptr) norm_scales(threads);
    const Kernels& k = kernels();
    const auto work = [&](int64_t begin, int64_t end) { k.step(args_, begin, end); };
    parallel_for(args_.tiling.tiles, threads, work);
    if (any_bad_ != 0) record_faults();
}

void StepPlan::norm_scales(int threads) {
    const Kernels& k = kernels();
    const auto work = [&](int64_t begin, int64_t end) { k.norm_blocks(args_, begin, end); };
    parallel_for(int64_t(squares_.size()), threads, work);
    const int64_t blocks = ceil_div(args_.size, kNormBlock);
    for (int64_t b = 0; b < args_.batch; ++b) {
        double total = 0;
        for (int64_t j = 0; j < blocks; ++j) total += squares_[size_t(b * blocks + j)];
        const double norm = std::sqrt(total), limit = norm_limit_;
        const double factor = norm > limit ? limit / norm : 1.0;
        scale_[size_t(b)] = std::isfinite(norm) ? float(factor) : std::numeric_limits<float>::quiet_NaN();
    }
}

void StepPlan::record_faults() {
    any_bad_ = 0;
    for (int64_t b = 0; b < args_.batch; ++b) {
        if (bad_[size_t(b)] == 0) continue;
        bad_[size_t(b)] = 0;
        faults_[b] = ((int64_t(args_.id.step) + 1) << 16) + blame(args_, b);
    }
}

}  // namespace ebmfast
