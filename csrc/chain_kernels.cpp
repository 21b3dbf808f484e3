// The chain engine of one instruction set: compiled once per level, EBMFAST_CHAIN_TABLE naming its table. As in kernels.cpp, no STL
// and nothing with external linkage but the table.

#include "chain_langevin.h"
#include "chain_metropolis.h"

namespace ebmfast {
namespace {

// A tile's chains have the same upper word of their ids: a carry cuts it in two.
void run(const ChainArgs& a, int64_t first, int count, int vectors, float* scratch) {
    const uint64_t until_carry = (uint64_t(1) << 32) - uint32_t(a.id.first_chain + uint64_t(first));
    if (until_carry < uint64_t(count)) {
        run(a, first, int(until_carry), vectors, scratch);
        run(a, first + int64_t(until_carry), count - int(until_carry), vectors, scratch);
        return;
    }
    if (a.dynamics == ChainDynamics::langevin) {
        vectors == 1 ? Langevin<1>(a, first, count, scratch).run() : Langevin<2>(a, first, count, scratch).run();
    } else {
        vectors == 1 ? Metropolis<1>(a, first, count, scratch).run() : Metropolis<2>(a, first, count, scratch).run();
    }
}

void energies(const ChainArgs& a, int64_t first, int count, int vectors, float* scratch) {
    vectors == 1 ? Tile<1>(a, first, count, scratch).energies() : Tile<2>(a, first, count, scratch).energies();
}

void activations(int activation, const float* z, float* value, float* slope, int64_t n) {
    __builtin_memcpy(value, z, size_t(n) * sizeof(float));
    for (int64_t i = 0; i < n; i += W) {
        activate_layer<1, true>(Activation(activation), {value + i, slope + i, 1, nullptr, nullptr, 0, nullptr, nullptr});
    }
}

// `rounds` times twelve independent multiply-adds of a register; returns the number of floating-point operations.
double multiply_adds(int64_t rounds) {
    constexpr int n = 12;  // enough to hide a latency of 4 on two units, and it fits 16 registers
    F sum[n];
#pragma GCC unroll 12
    for (int k = 0; k < n; ++k) sum[k] = V::set(float(k));
    const F a = V::set(0.999f), b = V::set(1e-3f);
    for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
        for (int k = 0; k < n; ++k) sum[k] = V::fma(sum[k], a, b);
    }
#pragma GCC unroll 12
    for (int k = 1; k < n; ++k) sum[0] = V::add(sum[0], sum[k]);
    float out[W];
    V::store(out, sum[0]);
    return 2.0 * n * W * double(rounds) + (out[0] == 123.0f ? 1.0 : 0.0);  // the sum is used
}

#if defined(__AVX512BF16__)
constexpr bool kBf16 = true;
#else
constexpr bool kBf16 = false;
#endif

}  // namespace

extern const ChainKernels EBMFAST_CHAIN_TABLE;
const ChainKernels EBMFAST_CHAIN_TABLE = {W, kPanel, kBf16, run, energies, activations, multiply_adds};

}  // namespace ebmfast
