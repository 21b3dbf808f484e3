// The chain engine's launch on NVIDIA GPUs: a block of threads for every 32 chains, its scratch in shared memory where that is enough.
// Compiled for sm_80 and sm_90 in the tests; the text of the kernel (chain_block.h) is tested on the host; not yet run on a GPU.

#include <cuda_runtime.h>

#include "chain_block.h"

namespace ebmfast {
namespace cuda {
namespace {

struct Threads {
    template <class F> __device__ void operator()(const F& f) const {
        f(int(threadIdx.x) / kLanes, int(threadIdx.x) % kLanes);
        __syncthreads();
    }
};

// `memory`: block_rows rows for each block of the grid, or null for shared memory.
__global__ void __launch_bounds__(kWarps * kLanes) chain_blocks(const __grid_constant__ ChainArgs a, float* memory, bool energies) {
    extern __shared__ float shared[];
    float* scratch = memory != nullptr ? memory + int64_t(blockIdx.x) * block_rows(a.rows) * kLanes : shared;
    for (int64_t first = int64_t(blockIdx.x) * kLanes; first < a.chains; first += int64_t(gridDim.x) * kLanes) {
        const int64_t left = a.chains - first;
        ChainBlock<Threads> block(a, first, int(left < kLanes ? left : kLanes), scratch, Threads());
        energies ? block.energies() : block.run();
    }
}

const char* text(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

}  // namespace

int64_t chain_memory(const ChainRows& rows) { return block_rows(rows) * kLanes * int64_t(sizeof(float)); }

const char* chain(const ChainArgs& args, bool energies, float* memory, int blocks, void* stream) {
    if (args.chains == 0) return nullptr;
    const size_t bytes = memory != nullptr ? 0 : size_t(chain_memory(args.rows));
    if (bytes > 48 * 1024) {
        const cudaError_t error = cudaFuncSetAttribute(chain_blocks, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
        if (error != cudaSuccess) return text(error);
    }
    chain_blocks<<<blocks, kWarps * kLanes, bytes, static_cast<cudaStream_t>(stream)>>>(args, memory, energies);
    return text(cudaGetLastError());
}

}  // namespace cuda
}  // namespace ebmfast
