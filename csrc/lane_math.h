// Activations and elementary functions over a lane type (philox.h, simd.h): for energies, where results may differ by rounding
// between instruction sets. Every activation gets its value and its derivative from one exponential.
#pragma once

#include "philox.h"

namespace ebmfast {

enum class Activation : int { silu, relu, tanh, softplus, gelu, gelu_tanh };
constexpr int kActivations = 6;

namespace {

template <class L> EBMFAST_HD typename L::F fma_horner(typename L::F p, typename L::F x, float c) { return L::fma(p, x, L::set(c)); }

template <class L> EBMFAST_HD typename L::F absolute(typename L::F x) {
    return L::as_float(L::bit_and(L::as_int(x), L::set_int(0x7FFFFFFFu)));
}

template <class L> EBMFAST_HD typename L::F with_sign_of(typename L::F magnitude, typename L::F x) {
    return L::as_float(L::bit_xor(L::as_int(magnitude), L::bit_and(L::as_int(x), L::set_int(0x80000000u))));
}

// 2^t for t brought into [-126, 126]; NaN stays. t = n + r: r is exact, the polynomial is good to 1e-7.
template <class L> EBMFAST_HD typename L::F exponential2(typename L::F t) {
    using F = typename L::F;
    t = L::at_most(L::set(126.0f), L::at_least(L::set(-126.0f), t));
    const F n = L::round(t), r = L::sub(t, n);
    F p = fma_horner<L>(L::set(0x1.5bba14p-10f), r, 0x1.3cea88p-7f);
    p = fma_horner<L>(p, r, 0x1.c6b752p-5f);
    p = fma_horner<L>(p, r, 0x1.ebf9bcp-3f);
    p = fma_horner<L>(p, r, 0x1.62e42ap-1f);
    p = fma_horner<L>(p, r, 1.0f);
    return L::times_power_of_2(p, n);
}

// exp(x), to about 1e-7 (1 + |x|)
template <class L> EBMFAST_HD typename L::F exponential(typename L::F x) {
    return exponential2<L>(L::mul(x, L::set(0x1.715476p+0f)));
}

// ln of a positive normal number
template <class L> EBMFAST_HD typename L::F logarithm(typename L::F x) { return L::mul(L::set(-0.5f), minus_two_log<L>(x)); }

template <class L> struct Slope {
    typename L::F value, derivative;
};

// The slope is s + z s (1 - s), 1 - s as e s: no cancellation.
template <class L> EBMFAST_HD Slope<L> silu(typename L::F z) {
    using F = typename L::F;
    const F e = exponential2<L>(L::mul(z, L::set(-0x1.715476p+0f)));
    const F s = L::reciprocal(L::add(L::set(1.0f), e));
    const F value = L::mul(z, s);
    return {value, L::fma(value, L::mul(e, s), s)};
}

template <class L> EBMFAST_HD Slope<L> relu(typename L::F z) {
    const auto negative = L::less(z, L::set(0.0f));
    const auto positive = L::less(L::set(0.0f), z);
    // A NaN is neither: it stays, and its slope is 0 as torch has it.
    return {L::select(negative, L::set(0.0f), z), L::select(positive, L::set(1.0f), L::set(0.0f))};
}

// The series (Cephes tanhf) keeps small arguments exact, where (1 - e)/(1 + e) cancels; for large ones the slope is 4e/(1 + e)^2, where
// 1 - tanh^2 cancels.
template <class L> EBMFAST_HD Slope<L> tanh(typename L::F z) {
    using F = typename L::F;
    const F one = L::set(1.0f), a = absolute<L>(z);
    const F e = exponential<L>(L::mul(L::set(-2.0f), a));
    const F r = L::reciprocal(L::add(one, e));
    const F large = with_sign_of<L>(L::mul(L::sub(one, e), r), z);
    const F y = L::mul(z, z);
    F p = fma_horner<L>(L::set(-5.70498872745e-3f), y, 2.06390887954e-2f);
    p = fma_horner<L>(p, y, -5.37397155531e-2f);
    p = fma_horner<L>(p, y, 1.33314422036e-1f);
    p = fma_horner<L>(p, y, -3.33332819422e-1f);
    const F small = L::fma(L::mul(p, y), z, z);
    const auto near = L::less(a, L::set(0.625f));
    return {L::select(near, small, large), L::select(near, L::fnma(small, small, one), L::mul(L::mul(L::set(4.0f), e), L::mul(r, r)))};
}

// log(1 + exp z) = max(z, 0) + log1p(e), e = exp(-|z|); what 1 + e rounds away comes back over 1 + e.
template <class L> EBMFAST_HD Slope<L> softplus(typename L::F z) {
    using F = typename L::F;
    const F one = L::set(1.0f), zero = L::set(0.0f);
    const F e = exponential<L>(L::sub(zero, absolute<L>(z))), u = L::add(one, e), inverse = L::reciprocal(u);
    const F log1p = L::fma(L::sub(e, L::sub(u, one)), inverse, logarithm<L>(u));
    const F s = L::select(L::less(z, zero), L::mul(e, inverse), inverse);
    return {L::add(L::at_least(zero, z), log1p), s};
}

// z Phi(z), Phi through erfc(x) = t Q(t) exp(-x^2), t = 1/(1 + 0.3 x), x = |z|/sqrt 2; Q is a relative fit to 3e-8.
template <class L> EBMFAST_HD Slope<L> gelu(typename L::F z) {
    using F = typename L::F;
    const F a = absolute<L>(z), e = exponential<L>(L::mul(L::mul(z, z), L::set(-0.5f)));
    const F t = L::reciprocal(L::fma(a, L::set(0.3f * 0.70710678118654752f), L::set(1.0f)));
    F q = fma_horner<L>(L::set(-0x1.0914dap-3f), t, 0x1.f0bd66p-2f);
    q = fma_horner<L>(q, t, -0x1.05bfc0p-1f);
    q = fma_horner<L>(q, t, 0x1.17c168p-1f);
    q = fma_horner<L>(q, t, -0x1.7f8536p-4f);
    q = fma_horner<L>(q, t, 0x1.b72abap-3f);
    q = fma_horner<L>(q, t, 0x1.301778p-3f);
    q = fma_horner<L>(q, t, 0x1.5d93bep-3f);
    q = fma_horner<L>(q, t, 0x1.5a8016p-3f);
    const F tail = L::mul(L::mul(L::mul(t, q), e), L::set(0.5f));
    const F phi = L::select(L::less(z, L::set(0.0f)), tail, L::sub(L::set(1.0f), tail));
    return {L::mul(z, phi), L::fma(L::mul(z, L::set(0.39894228040143268f)), e, phi)};
}

// 0.5 z (1 + tanh u), u = sqrt(2/pi) (z + 0.044715 z^3)
template <class L> EBMFAST_HD Slope<L> gelu_tanh(typename L::F z) {
    using F = typename L::F;
    const F y = L::mul(z, z), one = L::set(1.0f), half = L::set(0.5f);
    const F k = L::set(0.79788456080286536f), c = L::set(0.79788456080286536f * 0.044715f);
    const Slope<L> t = tanh<L>(L::mul(z, L::fma(y, c, k)));
    const F phi = L::mul(half, L::add(one, t.value));
    const F slope = L::mul(L::mul(half, z), L::mul(t.derivative, L::fma(L::mul(y, L::set(3.0f)), c, k)));
    return {L::mul(z, phi), L::add(phi, slope)};
}

// A constant `a` leaves one branch.
template <class L> EBMFAST_HD Slope<L> activate(Activation a, typename L::F z) {
    switch (a) {
        case Activation::silu: return silu<L>(z);
        case Activation::relu: return relu<L>(z);
        case Activation::tanh: return tanh<L>(z);
        case Activation::softplus: return softplus<L>(z);
        case Activation::gelu: return gelu<L>(z);
        default: return gelu_tanh<L>(z);
    }
}

}  // namespace
}  // namespace ebmfast
