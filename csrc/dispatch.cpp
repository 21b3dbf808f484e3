#include "dispatch.h"

#include <atomic>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace ebmfast {

extern const Kernels kernels_scalar;
extern const ChainKernels chain_scalar;
#if defined(__x86_64__)
extern const Kernels kernels_baseline, kernels_v3, kernels_v4, kernels_v4_bf16;
extern const ChainKernels chain_baseline, chain_v3, chain_v4, chain_v4_bf16;
#endif

namespace {

#if defined(__x86_64__)
constexpr bool has(unsigned word, std::initializer_list<int> bits) {
    for (int bit : bits) {
        if ((word >> bit & 1) == 0) return false;
    }
    return true;
}

// The x86-64 psABI level, 3 and 4 only if the operating system saves the registers; 5 is level 4 with AVX512-BF16.
int cpu_level() {
    unsigned eax, ebx, ecx, edx, ebx7, ecx_ext, ignored;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !has(ecx, {0, 9, 12, 13, 19, 20, 22, 23, 27, 28, 29})) return 1;
    if (!__get_cpuid_count(7, 0, &eax, &ebx7, &ignored, &edx) || !has(ebx7, {3, 5, 8})) return 1;
    if (!__get_cpuid(0x80000001, &eax, &ebx, &ecx_ext, &edx) || !has(ecx_ext, {5})) return 1;
    unsigned xcr0, high;
    __asm__("xgetbv" : "=a"(xcr0), "=d"(high) : "c"(0));
    if ((xcr0 & 0x6) != 0x6) return 1;
    if (!has(ebx7, {16, 17, 28, 30, 31}) || (xcr0 & 0xe6) != 0xe6) return 3;
    return __get_cpuid_count(7, 1, &eax, &ebx, &ignored, &edx) && has(eax, {5}) ? 5 : 4;
}
#endif

std::atomic<const Level*> chosen{nullptr};

const Level* highest() {
    const Level* best = nullptr;
    for (const Level& level : levels()) {
        if (level.supported) best = &level;
    }
    return best;
}

const Level& level_in_use() {
    const Level* level = chosen.load(std::memory_order_acquire);
    if (level != nullptr) return *level;
    const Level* best = highest();
    return chosen.compare_exchange_strong(level, best, std::memory_order_acq_rel) ? *best : *level;
}

}  // namespace

const std::vector<Level>& levels() {
#if defined(__x86_64__)
    static const int cpu = cpu_level();
    static const std::vector<Level> table = {
        {&kernels_scalar, &chain_scalar, true},
        {&kernels_baseline, &chain_baseline, true},
        {&kernels_v3, &chain_v3, cpu >= 3},
        {&kernels_v4, &chain_v4, cpu >= 4},
        {&kernels_v4_bf16, &chain_v4_bf16, cpu >= 5},
    };
#else
    static const std::vector<Level> table = {{&kernels_scalar, &chain_scalar, true}};
#endif
    return table;
}

const Kernels& kernels() { return *level_in_use().kernels; }

const ChainKernels& chain_kernels() { return *level_in_use().chain; }

void set_level(const std::string& name) {
    if (name.empty()) {
        chosen.store(highest());
        return;
    }
    std::string known;
    for (const Level& level : levels()) {
        if (name == level.kernels->name) {
            if (!level.supported) throw std::invalid_argument("this CPU cannot run instruction set '" + name + "'");
            chosen.store(&level);
            return;
        }
        known += std::string(known.empty() ? "" : ", ") + level.kernels->name;
    }
    throw std::invalid_argument("unknown instruction set '" + name + "'; known: " + known);
}

}  // namespace ebmfast
