// The kernels of one instruction set: compiled once per level with its own flags and EBMFAST_TABLE naming its table.
// No STL and nothing with external linkage but the table: the linker must never hand this level's code to another.

#include <stddef.h>

#include "kernels.h"
#include "simd.h"

namespace ebmfast {
namespace {

using V = VectorLane;
constexpr int kQuad = 4 * V::width;         // elements per Philox call of a register
constexpr int kPadded = kTile + 4 * 16;     // a call may write past the last element

struct Span {
    int64_t chain, chains, element, base;  // base = chain * size + element
    int count;
};

Span span_of(const Tiling& t, int64_t batch, int64_t size, int64_t tile) {
    if (t.chains > 0) {
        const int64_t chain = tile * t.chains, left = batch - chain;
        const int64_t chains = left < t.chains ? left : t.chains;
        return {chain, chains, 0, chain * size, int(chains * size)};
    }
    const int64_t chain = tile / t.tiles_per_chain, element = tile % t.tiles_per_chain * t.elements, left = size - element;
    return {chain, 1, element, chain * size + element, int(left < t.elements ? left : t.elements)};
}

Key key_of(uint64_t seed) { return {uint32_t(seed), uint32_t(seed >> 32)}; }

uint32_t top_word(const NoiseId& id, uint64_t chain) { return id.stream << 28 | uint32_t(chain >> 32); }

template <bool uniform> EBMFAST_HD void store_noise(const Words<V>& words, float* out) {
    const Quad<V> n = uniform ? uniforms<V>(words) : normals<V>(words);
    V::store_blocks(out, n.v[0], n.v[1], n.v[2], n.v[3]);
}

// Philox blocks first_block .. of one chain.
template <bool uniform>
void noise_of_chain(const NoiseId& id, uint64_t chain, uint32_t first_block, int blocks, float* out) {
    const Key key = key_of(id.seed);
    V::I block = V::add(V::set_int(first_block), V::block_order());
    int b = 0;
    if constexpr (V::width == 16) {  // two registers at a time, where there are enough of them
        using P = Twice<V>;
        const P::Wide step = P::set_wide(id.step), low = P::set_wide(uint32_t(chain)), top = P::set_wide(top_word(id, chain));
        for (; b + V::width < blocks; b += P::width) {
            const V::I next = V::add(block, V::set_int(V::width));
            const Words<P> words = philox<P>(P::widen({block, next}), step, low, top, key);
            const Quad<P> n = uniform ? uniforms<P>(words) : normals<P>(words);
            V::store_blocks(out + 4 * b, n.v[0].a, n.v[1].a, n.v[2].a, n.v[3].a);
            V::store_blocks(out + 4 * (b + V::width), n.v[0].b, n.v[1].b, n.v[2].b, n.v[3].b);
            block = V::add(next, V::set_int(V::width));
        }
    }
    const V::Wide step = V::set_wide(id.step), low = V::set_wide(uint32_t(chain)), top = V::set_wide(top_word(id, chain));
    for (; b < blocks; b += V::width) {
        store_noise<uniform>(philox<V>(V::widen(block), step, low, top, key), out + 4 * b);
        block = V::add(block, V::set_int(V::width));
    }
}

// Block and chain of each lane, for registers that span several small chains.
struct LaneTable {
    uint32_t block[kTile / 4 + 16], chain[kTile / 4 + 16];

    LaneTable(int64_t chains, int64_t blocks_per_chain) {
        constexpr int parts = V::width < 4 ? 1 : V::width / 4;
        int n = 0;
        for (int64_t c = 0; c < chains; ++c) {
            for (int64_t b = 0; b < blocks_per_chain; ++b, ++n) {
                const int group = n / V::width * V::width, m = n % V::width;
                const int lane = group + m % parts * 4 + m / parts;
                block[lane] = uint32_t(b);
                chain[lane] = uint32_t(c);
            }
        }
        for (const int end = (n + V::width - 1) / V::width * V::width; n < end; ++n) {
            const int group = n / V::width * V::width, m = n % V::width;
            block[group + m % parts * 4 + m / parts] = chain[group + m % parts * 4 + m / parts] = 0;
        }
    }
};

// All blocks of `chains` chains from `chain` on, chain after chain.
template <bool uniform>
void noise_of_chains(const NoiseId& id, uint64_t chain, int64_t chains, int blocks_per_chain, const LaneTable& table, float* out) {
    const uint64_t until_carry = (uint64_t(1) << 32) - uint32_t(chain);
    const int64_t now = uint64_t(chains) < until_carry ? chains : int64_t(until_carry);
    const Key key = key_of(id.seed);
    const V::I low = V::set_int(uint32_t(chain)), first_block = V::set_int(id.first_block);
    const V::Wide step = V::set_wide(id.step), top = V::set_wide(top_word(id, chain));
    const int blocks = int(now) * blocks_per_chain;
    for (int b = 0; b < blocks; b += V::width) {
        const V::Wide c0 = V::widen(V::add(first_block, V::load_int(table.block + b)));
        const V::Wide c2 = V::widen(V::add(low, V::load_int(table.chain + b)));
        store_noise<uniform>(philox<V>(c0, step, c2, top, key), out + 4 * b);
    }
    if (now < chains) {
        noise_of_chains<uniform>(id, chain + uint64_t(now), chains - now, blocks_per_chain, table, out + 4 * blocks);
    }
}

void copy(float* to, const float* from, int64_t n) { __builtin_memcpy(to, from, size_t(n) * sizeof(float)); }

// The noise of a span; `scratch` and `out` hold kPadded floats.
template <bool uniform>
void noise_of_span(const NoiseId& id, const Span& s, int64_t size, const LaneTable* table, float* scratch, float* out) {
    const uint64_t chain = id.first_chain + uint64_t(s.chain);
    if (table == nullptr) {
        noise_of_chain<uniform>(id, chain, id.first_block + uint32_t(s.element / 4), (s.count + 3) / 4, out);
        return;
    }
    const int blocks = int((size + 3) / 4);
    float* padded = size % 4 == 0 ? out : scratch;
    noise_of_chains<uniform>(id, chain, s.chains, blocks, *table, padded);
    if (padded != out) {
        for (int64_t c = 0; c < s.chains; ++c) {
            for (int64_t i = 0; i < size; ++i) out[c * size + i] = padded[c * 4 * blocks + i];
        }
    }
}

template <bool uniform> void fill_tiles(const FillArgs& a, int64_t begin, int64_t end) {
    alignas(64) float scratch[kPadded], out[kPadded];
    const LaneTable table(a.tiling.chains < a.batch ? a.tiling.chains : a.batch, a.tiling.chains > 0 ? (a.size + 3) / 4 : 0);
    for (int64_t tile = begin; tile < end; ++tile) {
        const Span s = span_of(a.tiling, a.batch, a.size, tile);
        const bool direct = a.tiling.chains == 0 && s.count % kQuad == 0;
        float* to = direct ? a.out + s.base : out;
        noise_of_span<uniform>(a.id, s, a.size, a.tiling.chains > 0 ? &table : nullptr, scratch, to);
        if (!direct) copy(a.out + s.base, out, s.count);
    }
}

void fill(const FillArgs& a, int64_t begin, int64_t end) {
    a.uniform ? fill_tiles<true>(a, begin, end) : fill_tiles<false>(a, begin, end);
}

template <class L, bool bf16> EBMFAST_HD typename L::F load_gradient(const void* p, int64_t i) {
    return bf16 ? L::load_bf16(static_cast<const uint16_t*>(p) + i) : L::load(static_cast<const float*>(p) + i);
}

template <class L> EBMFAST_HD typename L::F clip(typename L::F g, float limit) {
    return L::at_most(L::set(limit), L::at_least(L::set(-limit), g));
}

// out[begin, end) = clip(sum_k w_k g_k) with one weight per gradient, `unroll` registers at a time.
template <class L, bool bf16, int unroll>
int combine_shared(const StepArgs& a, int64_t base, const float* weights, int64_t stride, int begin, int end, float* out) {
    using F = typename L::F;
    constexpr int chunk = unroll * L::width;
    int i = begin;
    for (; i + chunk <= end; i += chunk) {
        F sum[unroll];
        const F first = L::set(weights[0]);
#pragma GCC unroll 4
        for (int u = 0; u < unroll; ++u) {
            sum[u] = L::mul(first, load_gradient<L, bf16>(a.gradients[0], base + i + u * L::width));
        }
        for (int k = 1; k < a.n_gradients; ++k) {
            const F w = L::set(weights[k * stride]);
#pragma GCC unroll 4
            for (int u = 0; u < unroll; ++u) {
                sum[u] = L::add(sum[u], L::mul(w, load_gradient<L, bf16>(a.gradients[k], base + i + u * L::width)));
            }
        }
#pragma GCC unroll 4
        for (int u = 0; u < unroll; ++u) L::store(out + i + u * L::width, a.clips ? clip<L>(sum[u], a.clip) : sum[u]);
    }
    return i;
}

// The same for one term with a weight per element: out = w g for the first, out + w g after it.
template <class L, bool bf16>
int combine_term(const void* gradient, int64_t base, const float* weights, bool first, int begin, int end, float* out) {
    int i = begin;
    for (; i + L::width <= end; i += L::width) {
        const typename L::F term = L::mul(L::load(weights + i), load_gradient<L, bf16>(gradient, base + i));
        L::store(out + i, first ? term : L::add(L::load(out + i), term));
    }
    return i;
}

template <bool bf16> void combine_span(const StepArgs& a, const Span& s, float* out) {
    if (s.chains == 1 || !a.weights_per_chain) {
        const float* weights = a.weights + (a.weights_per_chain ? s.chain : 0);
        const int64_t stride = a.weights_per_chain ? a.batch : 1;
        int i = combine_shared<V, bf16, 4>(a, s.base, weights, stride, 0, s.count, out);
        i = combine_shared<V, bf16, 1>(a, s.base, weights, stride, i, s.count, out);
        combine_shared<ScalarLane, bf16, 1>(a, s.base, weights, stride, i, s.count, out);
        return;
    }
    alignas(64) float spread[kTile];
    for (int k = 0; k < a.n_gradients; ++k) {
        float* p = spread;
        for (int64_t c = 0; c < s.chains; ++c) {
            const float w = a.weights[k * a.batch + s.chain + c];
            for (int64_t i = 0; i < a.size; ++i) *p++ = w;
        }
        const int i = combine_term<V, bf16>(a.gradients[k], s.base, spread, k == 0, 0, s.count, out);
        combine_term<ScalarLane, bf16>(a.gradients[k], s.base, spread, k == 0, i, s.count, out);
    }
    if (a.clips) {
        for (int i = 0; i < s.count; ++i) out[i] = clip<ScalarLane>(out[i], a.clip);
    }
}

void combine(const StepArgs& a, const Span& s, float* out) { a.bf16 ? combine_span<true>(a, s, out) : combine_span<false>(a, s, out); }

void scale_span(const StepArgs& a, const Span& s, float* g) {
    const int64_t n = s.count / s.chains;
    for (int64_t c = 0; c < s.chains; ++c) {
        const float factor = a.scale[s.chain + c];
        for (int64_t i = 0; i < n; ++i) g[c * n + i] *= factor;
    }
}

// Marks (sign bit) the elements that must stay: frozen ones and those of faulted chains. False if there are none.
bool mark_held(const StepArgs& a, const Span& s, uint32_t* held) {
    bool any = a.frozen != nullptr;
    if (a.faults != nullptr) {
        for (int64_t c = 0; c < s.chains; ++c) any |= a.faults[s.chain + c] != 0;
    }
    if (!any) return false;
    const int64_t n = s.count / s.chains;
    for (int64_t c = 0; c < s.chains; ++c) {
        const bool stays = a.faults != nullptr && a.faults[s.chain + c] != 0;
        const uint8_t* frozen = a.frozen != nullptr ? a.frozen + (s.chain + c) * a.frozen_stride + s.element : nullptr;
        for (int64_t i = 0; i < n; ++i) held[c * n + i] = stays || (frozen != nullptr && frozen[i] != 0) ? 0x80000000u : 0u;
    }
    return true;
}

void report(const StepArgs& a, const Span& s, int i, uint32_t bits) {
    for (; bits != 0; bits &= bits - 1) {
        const int64_t chain = (s.base + i + __builtin_ctz(bits)) / a.size;
        __atomic_store_n(a.bad + chain, uint8_t(1), __ATOMIC_RELAXED);
    }
    __atomic_store_n(a.any_bad, 1, __ATOMIC_RELAXED);
}

// x = clamp(x - drift g + noise z); g, z or held may be null.
template <class L>
int update(const StepArgs& a, const Span& s, const float* g, const float* z, const uint32_t* held, int begin) {
    using F = typename L::F;
    using M = typename L::M;
    constexpr uint32_t all = L::width == 32 ? ~0u : (1u << L::width) - 1;
    const F drift = L::set(a.drift), noise = L::set(a.noise), low = L::set(a.low), high = L::set(a.high);
    int i = begin;
    for (; i + L::width <= s.count; i += L::width) {
        float* p = a.x + s.base + i;
        const F x = L::load(p);
        F t = x;
        if (g != nullptr) t = L::sub(t, L::mul(drift, L::load(g + i)));
        if (z != nullptr) t = L::add(t, L::mul(noise, L::load(z + i)));
        const M finite = L::finite(t);
        const uint32_t lost = ~L::bits(finite) & all;
        t = L::select(finite, t, x);
        if (a.clamps) t = L::at_most(high, L::at_least(low, t));
        if (held != nullptr) {
            const M stays = L::sign(L::load_int(held + i));
            t = L::select(stays, x, t);
            if (__builtin_expect(lost != 0, 0) && a.bad != nullptr && (lost & ~L::bits(stays)) != 0) {
                report(a, s, i, lost & ~L::bits(stays));
            }
        } else if (__builtin_expect(lost != 0, 0) && a.bad != nullptr) {
            report(a, s, i, lost);
        }
        L::store(p, t);
    }
    return i;
}

void step(const StepArgs& a, int64_t begin, int64_t end) {
    alignas(64) float scratch[kPadded], noise[kPadded], gradient[kTile];
    alignas(64) uint32_t marks[kTile];
    const LaneTable table(a.tiling.chains < a.batch ? a.tiling.chains : a.batch, a.tiling.chains > 0 ? (a.size + 3) / 4 : 0);
    for (int64_t tile = begin; tile < end; ++tile) {
        const Span s = span_of(a.tiling, a.batch, a.size, tile);
        const float* z = nullptr;
        if (a.noise != 0.0f) {
            noise_of_span<false>(a.id, s, a.size, a.tiling.chains > 0 ? &table : nullptr, scratch, noise);
            z = noise;
        }
        const float* g = nullptr;
        if (a.n_gradients > 0) {
            combine(a, s, gradient);
            if (a.scale != nullptr) scale_span(a, s, gradient);
            g = gradient;
        }
        const uint32_t* held = mark_held(a, s, marks) ? marks : nullptr;
        update<ScalarLane>(a, s, g, z, held, update<V>(a, s, g, z, held, 0));
    }
}

// The sum of squares of the clipped combination in one block of one chain, in the order that reference.clip_scale defines.
double block_squares(const StepArgs& a, int64_t chain, int64_t first, int64_t count) {
    alignas(64) float g[kTile];
    alignas(64) double lanes[kNormLanes] = {};
    for (int64_t done = 0; done < count; done += kTile) {
        const int n = int(count - done < kTile ? count - done : kTile);
        const int64_t element = first + done;
        combine(a, {chain, 1, element, chain * a.size + element, n}, g);
        if (a.frozen != nullptr) {
            const uint8_t* frozen = a.frozen + chain * a.frozen_stride + element;
            for (int i = 0; i < n; ++i) g[i] = frozen[i] != 0 ? 0.0f : g[i];
        }
        const int padded = (n + kNormLanes - 1) / kNormLanes * kNormLanes;
        for (int i = n; i < padded; ++i) g[i] = 0.0f;
        for (int i = 0; i < padded; i += kNormLanes) {
            for (int l = 0; l < kNormLanes; ++l) lanes[l] += double(g[i + l]) * double(g[i + l]);
        }
    }
    for (int half = kNormLanes / 2; half > 0; half /= 2) {
        for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
    }
    return lanes[0];
}

void norm_blocks(const StepArgs& a, int64_t begin, int64_t end) {
    const int64_t blocks = (a.size + kNormBlock - 1) / kNormBlock;
    for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % blocks * kNormBlock, left = a.size - first;
        a.squares[i] = block_squares(a, i / blocks, first, left < kNormBlock ? left : kNormBlock);
    }
}

}  // namespace

extern const Kernels EBMFAST_TABLE;
const Kernels EBMFAST_TABLE = {EBMFAST_LEVEL, V::width, fill, step, norm_blocks};

}  // namespace ebmfast
