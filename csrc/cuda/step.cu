// The fused step on NVIDIA GPUs: the arithmetic of philox.h and the order of ebmfast/reference.py, so the bits of both.
// Compiled for sm_80 and sm_90 in the tests; not yet run on a GPU.

#include "step.h"

#include <cuda_runtime.h>

#include "../philox.h"

namespace ebmfast {
namespace cuda {
namespace {

using L = ScalarLane;
constexpr int kThreads = 256;

struct Gradients {
    const void* address[kMaxGradients];
};

__device__ Quad<L> noise_of(const NoiseId& id, int64_t row, int64_t block, bool uniform) {
    const uint64_t chain = id.first_chain + uint64_t(row);
    const Key key{uint32_t(id.seed), uint32_t(id.seed >> 32)};
    const uint32_t top = id.stream << 28 | uint32_t(chain >> 32);
    const Words<L> w = philox<L>(id.first_block + uint32_t(block), id.step, uint32_t(chain), top, key);
    return uniform ? uniforms<L>(w) : normals<L>(w);
}

__device__ float gradient_at(const StepArgs& a, const Gradients& g, int k, int64_t i) {
    return a.bf16 ? L::load_bf16(static_cast<const uint16_t*>(g.address[k]) + i) : static_cast<const float*>(g.address[k])[i];
}

__device__ float combined(const StepArgs& a, const Gradients& g, int64_t row, int64_t i) {
    const int64_t stride = a.weights_per_chain ? a.batch : 1;
    const float* weights = a.weights + (a.weights_per_chain ? row : 0);
    float sum = L::mul(weights[0], gradient_at(a, g, 0, i));
    for (int k = 1; k < a.n_gradients; ++k) sum = L::add(sum, L::mul(weights[k * stride], gradient_at(a, g, k, i)));
    return a.clips ? L::at_most(a.clip, L::at_least(-a.clip, sum)) : sum;
}

__device__ bool frozen(const StepArgs& a, int64_t row, int64_t element) {
    return a.frozen != nullptr && a.frozen[row * a.frozen_stride + element] != 0;
}

// One thread for each Philox block.
__global__ void fill_blocks(FillArgs a, int64_t blocks) {
    const int64_t unit = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (unit >= a.batch * blocks) return;
    const int64_t row = unit / blocks, first = unit % blocks * 4;
    const Quad<L> z = noise_of(a.id, row, first / 4, a.uniform);
    for (int j = 0; j < 4 && first + j < a.size; ++j) a.out[row * a.size + first + j] = z.v[j];
}

// kNormLanes threads for each block of the sum of squares.
__global__ void norm_lanes(StepArgs a, Gradients g, int64_t blocks) {
    __shared__ double sums[kThreads];
    const int64_t unit = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / kNormLanes;
    const int lane = threadIdx.x % kNormLanes;
    double sum = 0;
    if (unit < a.batch * blocks) {
        const int64_t row = unit / blocks, first = unit % blocks * kNormBlock;
        for (int64_t e = first + lane; e < first + kNormBlock && e < a.size; e += kNormLanes) {
            const double value = frozen(a, row, e) ? 0.0 : double(combined(a, g, row, row * a.size + e));
            sum = __dadd_rn(sum, __dmul_rn(value, value));
        }
    }
    sums[threadIdx.x] = sum;
    for (int half = kNormLanes / 2; half > 0; half /= 2) {
        __syncthreads();
        if (lane < half) sums[threadIdx.x] = __dadd_rn(sums[threadIdx.x], sums[threadIdx.x + half]);
    }
    if (lane == 0 && unit < a.batch * blocks) a.squares[unit] = sums[threadIdx.x];
}

__global__ void norm_scales(StepArgs a, float* scale, float limit, int64_t blocks) {
    const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (row >= a.batch) return;
    double total = 0;
    for (int64_t j = 0; j < blocks; ++j) total = __dadd_rn(total, a.squares[row * blocks + j]);
    const double norm = __dsqrt_rn(total), factor = norm > limit ? __ddiv_rn(double(limit), norm) : 1.0;
    scale[row] = isfinite(norm) ? __double2float_rn(factor) : __int_as_float(0x7fffffff);
}

// One thread for each Philox block, as in fill_blocks.
__global__ void step_blocks(StepArgs a, Gradients g, int64_t blocks) {
    const int64_t unit = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (unit >= a.batch * blocks) return;
    const int64_t row = unit / blocks, first = unit % blocks * 4;
    if (a.faults != nullptr && a.faults[row] != 0) return;
    Quad<L> z{};
    if (a.noise != 0.0f) z = noise_of(a.id, row, first / 4, false);
    for (int j = 0; j < 4 && first + j < a.size; ++j) {
        if (frozen(a, row, first + j)) continue;
        const int64_t i = row * a.size + first + j;
        const float x = a.x[i];
        float t = x;
        if (a.n_gradients > 0) {
            float sum = combined(a, g, row, i);
            if (a.scale != nullptr) sum = L::mul(sum, a.scale[row]);
            t = L::sub(t, L::mul(a.drift, sum));
        }
        if (a.noise != 0.0f) t = L::add(t, L::mul(a.noise, z.v[j]));
        if (!L::finite(t)) {
            t = x;
            if (a.bad != nullptr) a.bad[row] = 1;
        }
        a.x[i] = a.clamps ? L::at_most(a.high, L::at_least(a.low, t)) : t;
    }
}

// After the step, so that a chain that turns bad is still moved everywhere else.
__global__ void record_faults(StepArgs a, Gradients g, int64_t* faults) {
    const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (row >= a.batch || a.bad[row] == 0) return;
    a.bad[row] = 0;
    int64_t culprit = 0;
    for (int k = 0; k < a.n_gradients && culprit == 0; ++k) {
        for (int64_t e = 0; e < a.size && culprit == 0; ++e) {
            if (!frozen(a, row, e) && !L::finite(gradient_at(a, g, k, row * a.size + e))) culprit = k + 1;
        }
    }
    faults[row] = ((int64_t(a.id.step) + 1) << 16) + culprit;
}

unsigned grid(int64_t threads) { return unsigned((threads + kThreads - 1) / kThreads); }

const char* last_error() {
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* fill(const FillArgs& a, void* stream) {
    const int64_t blocks = (a.size + 3) / 4;
    if (a.batch * blocks > 0) fill_blocks<<<grid(a.batch * blocks), kThreads, 0, cudaStream_t(stream)>>>(a, blocks);
    return last_error();
}

const char* step(const StepArgs& args, int64_t* faults, float norm_limit, float* scale, void* stream) {
    StepArgs a = args;
    const auto s = cudaStream_t(stream);
    const int64_t blocks = (a.size + 3) / 4, norm_blocks = (a.size + kNormBlock - 1) / kNormBlock;
    if (a.batch * blocks == 0) return nullptr;
    Gradients g{};
    for (int k = 0; k < a.n_gradients; ++k) g.address[k] = a.gradients[k];
    a.scale = nullptr;
    if (norm_limit >= 0 && a.n_gradients > 0) {
        norm_lanes<<<grid(a.batch * norm_blocks * kNormLanes), kThreads, 0, s>>>(a, g, norm_blocks);
        norm_scales<<<grid(a.batch), kThreads, 0, s>>>(a, scale, norm_limit, norm_blocks);
        a.scale = scale;
    }
    step_blocks<<<grid(a.batch * blocks), kThreads, 0, s>>>(a, g, blocks);
    if (faults != nullptr) record_faults<<<grid(a.batch), kThreads, 0, s>>>(a, g, faults);
    return last_error();
}

}  // namespace cuda
}  // namespace ebmfast
