#include <cmath>

#include "chain_block.h"
#include "chain_registers.h"
#include "plan.h"

namespace ebmfast {
namespace cuda {
namespace {

struct Loop {
    bool reversed;

    template <class F> void warps(const F& f) const {
        for (int i = 0; i < kWarps; ++i) f(reversed ? kWarps - 1 - i : i);
    }
    template <int C, class F> bool any_element(const F& f) const {
        bool any = false;
        for (int i = 0; i < kThreads; ++i) {
            const int thread = reversed ? kThreads - 1 - i : i;
            any = f(thread % C, thread / C) || any;
        }
        return any;
    }
    template <int C, class F> void elements(const F& f) const {
        any_element<C>([&f](int chain, int part) { return f(chain, part), false; });
    }
};

// Shared memory holds NaN, as nothing says that it does not.
Aligned<float> poisoned(int bytes) {
    Aligned<float> memory(size_t(bytes) / sizeof(float));
    for (size_t i = 0; i < memory.size(); ++i) memory.data()[i] = NAN;
    return memory;
}

template <int C> void blocks(const Arguments& a, const Launch& l, bool energies, bool reversed) {
    const int64_t scratch = int64_t(a.rows.total) * row_stride(C);
    for (int b = 0; b < l.blocks; ++b) {
        const Aligned<float> shared = poisoned(l.shared_bytes);
        float* own = l.shared ? shared.data() : a.memory + b * scratch;
        ChainBlock<Loop, C> block(a, own, l.staged ? reinterpret_cast<uint32_t*>(shared.data() + (l.shared ? scratch : 0)) : nullptr, {reversed});
        block.stage();
        for (int64_t first = int64_t(b) * C; first < a.chain.chains; first += int64_t(l.blocks) * C) {
            energies ? block.energies(first) : block.run(first);
        }
    }
}

template <int Quads> void registers(const Arguments& a, const Launch& l, bool energies) {
    const int of_warp = kWarp >> a.shift;
    for (int64_t first = 0; first < a.chain.chains; first += of_warp) {
        const Aligned<float> shared = poisoned(l.shared_bytes / kRegisterWarps);
        ChainRegisters<Quads> warp(a, first, shared.data());
        energies ? warp.energies() : warp.run();
    }
}

}  // namespace

void emulate_jobs(const Job* jobs, int n) {
    for (int j = 0; j < n; ++j) {
        for (int64_t i = 0; i < jobs[j].count; ++i) do_job(jobs[j], i);
    }
}

void emulate_chains(const Arguments& a, const Launch& l, bool energies, bool reversed) {
    if (l.registers) {
        l.quads == 1 ? registers<1>(a, l, energies) : l.quads == 2 ? registers<2>(a, l, energies) : registers<4>(a, l, energies);
    } else {
        l.chains == 8 ? blocks<8>(a, l, energies, reversed)
        : l.chains == 16 ? blocks<16>(a, l, energies, reversed) : blocks<32>(a, l, energies, reversed);
    }
}

}  // namespace cuda
}  // namespace ebmfast
