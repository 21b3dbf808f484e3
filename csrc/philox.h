// The noise contract (ebmfast/rng.py is the specification): Philox4x32-10 (Salmon et al., SC'11), uniforms, Box-Muller.
//
// One text for every machine: templates over a lane type L that supplies the arithmetic of 1, 4, 8 or 16 lanes. ScalarLane below
// serves the host, the device and the tails; simd.h has the others. No contraction, no division, no STL.
//
// Known answers: counter 0, key 0 -> 6627e8d5 e169c58d bc57ac4c 9b00dbd8.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define EBMFAST_HD __host__ __device__ __forceinline__
#else
#define EBMFAST_HD inline __attribute__((always_inline))
#endif

namespace ebmfast {
namespace {

struct ScalarLane {
    static constexpr int width = 1;
    using F = float;
    using I = uint32_t;
    using Wide = uint64_t;  // a 32-bit word per 64-bit lane; the upper half may hold anything
    using M = bool;

    static EBMFAST_HD F set(float v) { return v; }
    static EBMFAST_HD I set_int(uint32_t v) { return v; }
    static EBMFAST_HD F load(const float* p) { return *p; }
    static EBMFAST_HD I load_int(const uint32_t* p) { return *p; }
    static EBMFAST_HD F load_bf16(const uint16_t* p) { return as_float(uint32_t(*p) << 16); }
    static EBMFAST_HD void store(float* p, F v) { *p = v; }
    static EBMFAST_HD void store_blocks(float* p, F a, F b, F c, F d) { p[0] = a, p[1] = b, p[2] = c, p[3] = d; }
    static EBMFAST_HD I block_order() { return 0; }

    static EBMFAST_HD I add(I a, I b) { return a + b; }
    static EBMFAST_HD I sub(I a, I b) { return a - b; }
    static EBMFAST_HD I bit_and(I a, I b) { return a & b; }
    static EBMFAST_HD I bit_xor(I a, I b) { return a ^ b; }
    template <int n> static EBMFAST_HD I shl(I a) { return a << n; }
    template <int n> static EBMFAST_HD I sar(I a) { return uint32_t(int32_t(a) >> n); }

    static EBMFAST_HD Wide widen(I a) { return a; }
    static EBMFAST_HD I narrow(Wide a) { return uint32_t(a); }
    static EBMFAST_HD Wide set_wide(uint32_t v) { return v; }
    static EBMFAST_HD Wide mul_wide(Wide a, uint32_t m) { return uint64_t(uint32_t(a)) * m; }
    static EBMFAST_HD Wide high(Wide a) { return a >> 32; }
    static EBMFAST_HD I narrow_high(Wide a) { return uint32_t(a >> 32); }
    static EBMFAST_HD Wide xor_wide(Wide a, Wide b) { return a ^ b; }
    static EBMFAST_HD Wide xor_wide(Wide a, Wide b, Wide c) { return a ^ b ^ c; }
    static EBMFAST_HD I xor_three(I a, I b, I c) { return a ^ b ^ c; }
    static EBMFAST_HD void store_wide(uint32_t* p, Wide a) { p[0] = uint32_t(a), p[1] = uint32_t(a >> 32); }
    static EBMFAST_HD Wide load_wide(const uint32_t* p) { return p[0] | uint64_t(p[1]) << 32; }

#if defined(__CUDA_ARCH__)
    static EBMFAST_HD I as_int(F a) { return __float_as_uint(a); }
    static EBMFAST_HD F as_float(I a) { return __uint_as_float(a); }
    static EBMFAST_HD F mul(F a, F b) { return __fmul_rn(a, b); }
    static EBMFAST_HD F add(F a, F b) { return __fadd_rn(a, b); }
    static EBMFAST_HD F sub(F a, F b) { return __fsub_rn(a, b); }
    static EBMFAST_HD F sqrt(F a) { return __fsqrt_rn(a); }
    static EBMFAST_HD F from_int(I a) { return __int2float_rn(int32_t(a)); }
    static EBMFAST_HD F plus_half(I a) { return __fadd_rn(__uint2float_rn(a), 0.5f); }
#else
    static EBMFAST_HD I as_int(F a) {
        I r;
        __builtin_memcpy(&r, &a, 4);
        return r;
    }
    static EBMFAST_HD F as_float(I a) {
        F r;
        __builtin_memcpy(&r, &a, 4);
        return r;
    }
    static EBMFAST_HD F mul(F a, F b) { return a * b; }
    static EBMFAST_HD F add(F a, F b) { return a + b; }
    static EBMFAST_HD F sub(F a, F b) { return a - b; }
    static EBMFAST_HD F sqrt(F a) { return __builtin_sqrtf(a); }
    static EBMFAST_HD F from_int(I a) { return float(int32_t(a)); }
    static EBMFAST_HD F plus_half(I a) { return float(a) + 0.5f; }
#endif
    // at_least(lo, t) is t < lo ? lo : t, so a NaN or an equal t stays as it is. at_most mirrors it.
    static EBMFAST_HD F at_least(F lo, F t) { return t < lo ? lo : t; }
    static EBMFAST_HD F at_most(F hi, F t) { return t > hi ? hi : t; }
    static EBMFAST_HD M finite(F a) { return (as_int(a) & 0x7f800000u) != 0x7f800000u; }
    static EBMFAST_HD M sign(I a) { return int32_t(a) < 0; }
    template <int n> static EBMFAST_HD M bit(I a) { return (a >> n & 1u) != 0; }
    static EBMFAST_HD F flip_sign(F a, I b) { return as_float(as_int(a) ^ (b & 0x80000000u)); }
    static EBMFAST_HD F select(M m, F a, F b) { return m ? a : b; }
    static EBMFAST_HD uint32_t bits(M m) { return m; }
    static EBMFAST_HD uint32_t not_finite(F a) { return !finite(a); }
    static EBMFAST_HD M less(F a, F b) { return a < b; }

    // Not part of the noise: used where results may differ by rounding (lane_math.h).
#if defined(__CUDA_ARCH__)
    static EBMFAST_HD F fma(F a, F b, F c) { return __fmaf_rn(a, b, c); }
    static EBMFAST_HD F fnma(F a, F b, F c) { return __fmaf_rn(-a, b, c); }
#else
    static EBMFAST_HD F fma(F a, F b, F c) { return a * b + c; }
    static EBMFAST_HD F fnma(F a, F b, F c) { return c - a * b; }
#endif
    static EBMFAST_HD F div(F a, F b) { return a / b; }
    // Nearest even, of |a| < 2^22, by an addition that leaves no fraction; a 2^n for whole n in [-126, 127].
    static EBMFAST_HD F round(F a) { return sub(add(a, 0x1.8p23f), 0x1.8p23f); }
    static EBMFAST_HD F times_power_of_2(F a, F n) { return mul(a, as_float(shl<23>(as_int(add(n, 0x1.8p23f)) + 127u))); }
    static EBMFAST_HD F reciprocal(F a) { return 1.0f / a; }
};

template <class L> struct Words {
    typename L::I w[4];
};

template <class L> struct Quad {
    typename L::F v[4];
};

struct Key {
    uint32_t k0, k1;
};

constexpr int kRounds = 10;
constexpr uint32_t kMultiply0 = 0xD2511F53u, kMultiply1 = 0xCD9E8D57u;

EBMFAST_HD Key next_round(Key key) { return {key.k0 + 0x9E3779B9u, key.k1 + 0xBB67AE85u}; }

template <class L> struct Counter {
    typename L::Wide c0, c1, c2, c3;

    EBMFAST_HD void round(Key key) {
        const typename L::Wide p0 = L::mul_wide(c0, kMultiply0), p1 = L::mul_wide(c2, kMultiply1);
        c0 = L::xor_wide(L::high(p1), c1, L::set_wide(key.k0));
        c2 = L::xor_wide(L::high(p0), c3, L::set_wide(key.k1));
        c1 = p1;
        c3 = p0;
    }

    EBMFAST_HD Words<L> last_round(Key key) const {
        const typename L::Wide p0 = L::mul_wide(c0, kMultiply0), p1 = L::mul_wide(c2, kMultiply1);
        return {{
            L::xor_three(L::narrow_high(p1), L::narrow(c1), L::set_int(key.k0)), L::narrow(p1),
            L::xor_three(L::narrow_high(p0), L::narrow(c3), L::set_int(key.k1)), L::narrow(p0),
        }};
    }
};

template <class L>
EBMFAST_HD Words<L> philox(typename L::Wide c0, typename L::Wide c1, typename L::Wide c2, typename L::Wide c3, Key key) {
    Counter<L> c{c0, c1, c2, c3};
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
    for (int round = 0; round < kRounds - 1; ++round) {
        c.round(key);
        key = next_round(key);
    }
    return c.last_round(key);
}

// Every round's key, kept in memory: there it costs less than an addition and a move from a general register.
struct KeySchedule {
    Key of_round[kRounds];

    explicit KeySchedule(Key key) {
        for (Key& k : of_round) k = key, key = next_round(key);
    }
};

// Counters (block, step, chain, top) of which only the chain differs between lanes. Of the four products of the first two rounds one
// depends on the chain, one on chain and step, which serve all blocks, and two on the block alone: numbers, not lanes.
template <class L> struct ChainCounter {
    typename L::Wide chain;                // chain kMultiply1
    typename L::Wide product, upper_half;  // of the second round's c0 and kMultiply0, and its upper half
};

template <class L> EBMFAST_HD ChainCounter<L> at_step(typename L::Wide chain, uint32_t step, const KeySchedule& keys) {
    const auto c0 = L::xor_wide(L::high(chain), L::set_wide(step), L::set_wide(keys.of_round[0].k0));
    const auto product = L::mul_wide(c0, kMultiply0);
    return {chain, product, L::high(product)};
}

template <class L> EBMFAST_HD Words<L> philox(const ChainCounter<L>& chains, uint32_t block, uint32_t top, const KeySchedule& keys) {
    const Key* key = keys.of_round;
    const uint64_t p0 = uint64_t(block) * kMultiply0, p1 = uint64_t(uint32_t(p0 >> 32) ^ top ^ key[0].k1) * kMultiply1;
    Counter<L> c{L::xor_wide(chains.chain, L::set_wide(uint32_t(p1 >> 32) ^ key[1].k0)), L::set_wide(uint32_t(p1)),
                 L::xor_wide(chains.upper_half, L::set_wide(uint32_t(p0) ^ key[1].k1)), chains.product};
#if !defined(__CUDACC__)
#pragma GCC unroll 10
#endif
    for (int round = 2; round < kRounds - 1; ++round) c.round(key[round]);
    return c.last_round(key[kRounds - 1]);
}

template <class L> EBMFAST_HD typename L::F horner(typename L::F p, typename L::F x, float c) {
    return L::add(L::mul(p, x), L::set(c));
}

// min(float(w) 2^-32 + 2^-33, 1 - 2^-24); a power of two changes no rounding.
template <class L> EBMFAST_HD typename L::F uniform(typename L::I w) {
    return L::at_most(L::set(1.0f - 0x1p-24f), L::mul(L::plus_half(w), L::set(0x1p-32f)));
}

// -2 ln(u 2^-power) of a positive normal u = m 2^(e + power), m in [sqrt(1/2), sqrt(2))
template <class L, int power = 0> EBMFAST_HD typename L::F minus_two_log(typename L::F u) {
    using F = typename L::F;
    using I = typename L::I;
    const I sqrt_half = L::set_int(0x3F3504F3u);
    const I bits = L::sub(L::as_int(u), L::set_int(0x3F3504F3u + (uint32_t(power) << 23)));
    const F e = L::from_int(L::template sar<23>(bits));
    const F f = L::sub(L::as_float(L::add(L::bit_and(bits, L::set_int(0x7FFFFFu)), sqrt_half)), L::set(1.0f));
    F q = horner<L>(L::set(-0x1.65c77cp-3f), f, 0x1.2504a0p-2f);
    q = horner<L>(q, f, -0x1.318526p-2f);
    q = horner<L>(q, f, 0x1.535d30p-2f);
    q = horner<L>(q, f, -0x1.98d2c0p-2f);
    q = horner<L>(q, f, 0x1.00049ap-1f);
    q = horner<L>(q, f, -0x1.5556f4p-1f);
    q = horner<L>(q, f, 0x1.fffffap-1f);
    q = horner<L>(q, f, -2.0f);
    return L::add(L::mul(e, L::set(-0x1.62e430p+0f)), L::mul(f, q));
}

// sqrt(-2 ln u), u = float(w) 2^-32 + 2^-33
template <class L> EBMFAST_HD typename L::F radius(typename L::I w) {
    return L::sqrt(minus_two_log<L, 32>(L::plus_half(w)));
}

// radius(w0) times the cosine and the sine of 2 pi w1 / 2^32
template <class L> EBMFAST_HD void box_muller(typename L::I w0, typename L::I w1, typename L::F& n0, typename L::F& n1) {
    using F = typename L::F;
    using I = typename L::I;
    const F x = L::mul(L::from_int(L::template shl<2>(w1)), L::set(0x1.921fb6p-32f));
    const F y = L::mul(x, x);
    F s = horner<L>(L::set(-0x1.994eb4p-13f), y, 0x1.110760p-7f);
    s = horner<L>(s, y, -0x1.555546p-3f);
    s = L::add(L::mul(x, L::mul(y, s)), x);
    F c = horner<L>(L::set(-0x1.647572p-10f), y, 0x1.553f94p-5f);
    c = horner<L>(c, y, -0x1.ffffbap-2f);
    c = L::add(L::mul(y, c), L::set(1.0f));
    // The quadrant is in the two top bits. Sine and cosine change places in odd ones; the sine is negative in 2 and 3, the cosine in 1 and 2.
    const I quadrant = L::add(w1, L::set_int(0x20000000u)), next = L::add(w1, L::set_int(0x60000000u));
    const auto swap = L::template bit<30>(quadrant);
    const F cosine = L::select(swap, s, c), sine = L::select(swap, c, s);
    const F r = radius<L>(w0);
    n0 = L::mul(r, L::flip_sign(cosine, next));
    n1 = L::mul(r, L::flip_sign(sine, quadrant));
}

template <class L> EBMFAST_HD Quad<L> normals(const Words<L>& w) {
    Quad<L> n;
    box_muller<L>(w.w[0], w.w[1], n.v[0], n.v[1]);
    box_muller<L>(w.w[2], w.w[3], n.v[2], n.v[3]);
    return n;
}

template <class L> EBMFAST_HD Quad<L> uniforms(const Words<L>& w) {
    return {{uniform<L>(w.w[0]), uniform<L>(w.w[1]), uniform<L>(w.w[2]), uniform<L>(w.w[3])}};
}

}  // namespace
}  // namespace ebmfast
