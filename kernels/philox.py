"""The noise contract (`ebmfast.rng` is the specification) as Triton functions: the same bits, compiled or interpreted.

A product and a sum stay two roundings because every launch says so (`launch.OPTIONS`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ebmfast import rng

__all__ = ["box_muller", "minus_two_log", "normals", "uniform", "words"]

_A = tl.constexpr(rng._MULTIPLIERS[0])
_B = tl.constexpr(rng._MULTIPLIERS[1])
_WEYL_A = tl.constexpr(rng._WEYL[0])
_WEYL_B = tl.constexpr(rng._WEYL[1])
_LOG_C = tl.constexpr(rng._LOG_C)
_LOG_Q = tl.constexpr(rng._LOG_Q)
_LOG_TERMS = tl.constexpr(len(rng._LOG_Q))
_SIN = tl.constexpr(rng._SIN)
_COS = tl.constexpr(rng._COS)
_TERMS = tl.constexpr(len(rng._SIN))
_ANGLE = tl.constexpr(rng._ANGLE)
_SQRT_HALF_BITS = tl.constexpr(rng._SQRT_HALF_BITS)
_UNIT = tl.constexpr(2.0**-32)
_HALF_UNIT = tl.constexpr(2.0**-33)
_MAX_UNIFORM = tl.constexpr(1 - 2.0**-24)


@triton.jit
def words(block, chain, step, seed, STREAM: tl.constexpr):
    """Philox4x32-10: four uint32 words for each pair of an element block (element // 4) and a chain.

    ``block`` and ``chain`` are int64 and are broadcast; ``step`` and ``seed`` (its 64 bits, signed) are scalars.
    """
    zero = (block + chain) * 0
    c0 = (block + zero).to(tl.uint32)
    c1 = (tl.cast(step, tl.int64) + zero).to(tl.uint32)
    c2 = (chain + zero).to(tl.uint32)
    c3 = (((chain >> 32) | (STREAM << 28)) + zero).to(tl.uint32)
    seed = tl.cast(seed, tl.int64)
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, _A)
        high2 = tl.umulhi(c2, _B)
        low0 = tl.mul(c0, _A, sanitize_overflow=False)
        low2 = tl.mul(c2, _B, sanitize_overflow=False)
        c0 = high2 ^ c1 ^ k0
        c2 = high0 ^ c3 ^ k1
        c1 = low2
        c3 = low0
        k0 = tl.add(k0, _WEYL_A, sanitize_overflow=False)
        k1 = tl.add(k1, _WEYL_B, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def uniform(word):
    """``min(float(w) 2^-32 + 2^-33, 1 - 2^-24)``."""
    u = word.to(tl.float32) * _UNIT + _HALF_UNIT
    return tl.where(u > _MAX_UNIFORM, _MAX_UNIFORM, u)


@triton.jit
def _polynomial(C: tl.constexpr, TERMS: tl.constexpr, x):
    p = x * C[0] + C[1]
    for i in tl.static_range(2, TERMS):
        p = p * x + C[i]
    return p


@triton.jit
def minus_two_log(u):
    """``-2 ln u`` of a positive normal float32."""
    bits = u.to(tl.int32, bitcast=True) - _SQRT_HALF_BITS
    exponent = (bits >> 23).to(tl.float32)
    f = ((bits & 0x7FFFFF) + _SQRT_HALF_BITS).to(tl.float32, bitcast=True) - 1.0
    return exponent * _LOG_C + f * _polynomial(_LOG_Q, _LOG_TERMS, f)


@triton.jit
def box_muller(w0, w1):
    """Two normals from two words."""
    radius = tl.sqrt_rn(minus_two_log(w0.to(tl.float32) * _UNIT + _HALF_UNIT))
    x = (w1 << 2).to(tl.int32, bitcast=True).to(tl.float32) * _ANGLE
    y = x * x
    sine = x * (y * _polynomial(_SIN, _TERMS, y)) + x
    cosine = y * _polynomial(_COS, _TERMS, y) + 1.0
    quadrant = tl.add(w1, 0x20000000, sanitize_overflow=False)  # in its two top bits
    odd = quadrant << 1
    swap = (odd >> 31) != 0
    # Signs by their bit: Triton's minus is a subtraction from 0, which loses the sign of 0.
    c = tl.where(swap, sine, cosine).to(tl.uint32, bitcast=True) ^ ((quadrant ^ odd) & 0x80000000)
    s = tl.where(swap, cosine, sine).to(tl.uint32, bitcast=True) ^ (quadrant & 0x80000000)
    return radius * c.to(tl.float32, bitcast=True), radius * s.to(tl.float32, bitcast=True)


@triton.jit
def _consecutive(v0, v1, v2, v3):
    """``[R, C]`` four times -> ``[R, 4 C]``: the values of a block lie side by side."""
    return tl.interleave(tl.interleave(v0, v2), tl.interleave(v1, v3))


@triton.jit
def normals(block, chain, step, seed, STREAM: tl.constexpr):
    """Standard normals ``[R, 4 C]`` of element blocks ``[1, C]`` and chains ``[R, 1]``."""
    w0, w1, w2, w3 = words(block, chain, step, seed, STREAM)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    return _consecutive(n0, n1, n2, n3)


@triton.jit
def uniforms(block, chain, step, seed, STREAM: tl.constexpr):
    """Uniforms in (0, 1), shapes as in `normals`."""
    w0, w1, w2, w3 = words(block, chain, step, seed, STREAM)
    return _consecutive(uniform(w0), uniform(w1), uniform(w2), uniform(w3))
