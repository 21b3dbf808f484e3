// The chain engine's launches on NVIDIA GPUs. Compiled for sm_80 and sm_90 in the tests; the text of the kernels (chain_block.h,
// chain_registers.h, tables.h) is tested on the host; not yet run on a GPU.

#include <cuda_runtime.h>

#include <mutex>

#include "chain_block.h"
#include "chain_registers.h"
#include "plan.h"

namespace ebmfast {
namespace cuda {
namespace {

struct Threads {
    template <class F> __device__ void warps(const F& f) const {
        f(int(threadIdx.x) / kWarp);
        __syncthreads();
    }
    template <int C, class F> __device__ void elements(const F& f) const {
        f(int(threadIdx.x) % C, int(threadIdx.x) / C);
        __syncthreads();
    }
    template <int C, class F> __device__ bool any_element(const F& f) const {
        return __syncthreads_or(f(int(threadIdx.x) % C, int(threadIdx.x) / C)) != 0;
    }
};

// Shared: scratch lies there, known to the compiler.
template <int C, bool Shared> __global__ void __launch_bounds__(kThreads, 2) chain_blocks(const __grid_constant__ Arguments a, bool energies) {
    extern __shared__ Words4 shared[];
    const int64_t floats = int64_t(a.rows.total) * row_stride(C);
    float* own = reinterpret_cast<float*>(shared);
    float* scratch = Shared ? own : a.memory + int64_t(blockIdx.x) * floats;
    uint32_t* staged = a.staged ? reinterpret_cast<uint32_t*>(own + (Shared ? floats : 0)) : nullptr;
    ChainBlock<Threads, C> block(a, scratch, staged, Threads());
    block.stage();
    for (int64_t first = int64_t(blockIdx.x) * C; first < a.chain.chains; first += int64_t(gridDim.x) * C) {
        energies ? block.energies(first) : block.run(first);
    }
}

template <int Quads> __global__ void __launch_bounds__(kRegisterWarps* kWarp, 1) chain_registers(const __grid_constant__ Arguments a, bool energies) {
    extern __shared__ Words4 shared[];
    const int warp = int(threadIdx.x) / kWarp, of_warp = kWarp >> a.shift;
    const int64_t first = (int64_t(blockIdx.x) * kRegisterWarps + warp) * of_warp;
    if (first >= a.chain.chains) return;  // the whole warp
    float* scratch = reinterpret_cast<float*>(shared) + warp * warp_scratch(a.n_units, a.n_nodes, 1 << a.shift);
    ChainRegisters<Quads> chains(a, first, scratch);
    energies ? chains.energies() : chains.run();
}

__global__ void __launch_bounds__(kThreads) chain_jobs(const Job* jobs, int n) {
    for (int j = blockIdx.y; j < n; j += gridDim.y) {
        const Job& job = jobs[j];
        for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < job.count; i += int64_t(gridDim.x) * kThreads) do_job(job, i);
    }
}

std::string text(const char* kernel, cudaError_t error) {
    return error == cudaSuccess ? "" : std::string("chain kernel ") + kernel + ": " + cudaGetErrorString(error);
}

template <class Kernel>
std::string start(const char* name, Kernel kernel, const Arguments& a, const Launch& l, int threads, bool energies, void* stream) {
    static std::mutex one_at_a_time;  // the limit belongs to the kernel, not to a launch: other threads must not lower it in between
    const std::lock_guard<std::mutex> guard(one_at_a_time);
    if (l.shared_bytes > 48 * 1024) {
        const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, l.shared_bytes);
        if (error != cudaSuccess) return text(name, (cudaGetLastError(), error));
    }
    kernel<<<unsigned(l.blocks), unsigned(threads), size_t(l.shared_bytes), static_cast<cudaStream_t>(stream)>>>(a, energies);
    return text(name, cudaGetLastError());
}

}  // namespace

std::string limits_of(int device, Device& limits) {
    cudaError_t error = cudaDeviceGetAttribute(&limits.processors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    return text("attributes", (cudaGetLastError(), error));
}

std::string launch_jobs(const Job* jobs, int n, int64_t most_items, void* stream) {
    const int64_t across = (most_items + kThreads - 1) / kThreads;
    const dim3 grid(unsigned(across < 1024 ? across : 1024), unsigned(n < 65535 ? n : 65535));
    chain_jobs<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(jobs, n);
    return text("chain_jobs", cudaGetLastError());
}

std::string launch_chains(const Arguments& a, const Launch& l, bool energies, void* stream) {
    const auto blocks = [&](const char* name, auto with_shared, auto without) {
        return start(name, l.shared ? with_shared : without, a, l, kThreads, energies, stream);
    };
    const auto registers = [&](const char* name, auto kernel) { return start(name, kernel, a, l, kRegisterWarps * kWarp, energies, stream); };
    if (l.registers) {
        return l.quads == 1   ? registers("chain_registers<1>", chain_registers<1>)
               : l.quads == 2 ? registers("chain_registers<2>", chain_registers<2>)
                              : registers("chain_registers<4>", chain_registers<4>);
    }
    return l.chains == 8    ? blocks("chain_blocks<8>", chain_blocks<8, true>, chain_blocks<8, false>)
           : l.chains == 16 ? blocks("chain_blocks<16>", chain_blocks<16, true>, chain_blocks<16, false>)
                            : blocks("chain_blocks<32>", chain_blocks<32, true>, chain_blocks<32, false>);
}

}  // namespace cuda
}  // namespace ebmfast
