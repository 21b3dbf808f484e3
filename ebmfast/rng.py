"""The noise contract: which random number belongs to which element of which chain, bit for bit.

Every number is a pure function of ``(seed, stream, step, chain, element)``, so a chain sees the same noise in
any batch, slot, shard, worker or device. The counter-based generator is Philox4x32-10 (Salmon, Moraes, Dror
and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11):

    key     = (seed bits 0..31, seed bits 32..63)
    counter = (element // 4, step, chain bits 0..31, stream << 28 | chain bits 32..59)

``element`` is the row-major index in one chain's state. The four words of a call serve four consecutive
elements: one uniform per word, or one pair of normals per pair of words by Box-Muller. The float32 arithmetic
is made of separately rounded IEEE additions and multiplications and a correctly rounded square root, in the
order written here. This file is the specification: the C++, CUDA and Triton kernels reproduce its bits.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch

__all__ = [
    "ACCEPT",
    "INIT",
    "MOMENTUM",
    "NOISE",
    "USER",
    "box_muller",
    "minus_two_log",
    "normal",
    "philox",
    "resolve_seed",
    "uniform",
    "uniform_from_words",
    "words",
]

INIT, NOISE, MOMENTUM, ACCEPT, USER = range(5)

MAX_CHAINS = 1 << 60
MAX_ELEMENTS = 1 << 34
_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

# -2 ln(m 2^e) = e C + f Q(f), f = m - 1, m in [sqrt(1/2), sqrt(2)): relative error 3.0e-8 before rounding.
_LOG_C = float.fromhex("-0x1.62e430p+0")
_LOG_Q = tuple(
    float.fromhex(c)
    for c in (
        *("-0x1.65c77cp-3", "0x1.2504a0p-2", "-0x1.318526p-2", "0x1.535d30p-2", "-0x1.98d2c0p-2"),
        *("0x1.00049ap-1", "-0x1.5556f4p-1", "0x1.fffffap-1", "-0x1.0p+1"),
    )
)
# sin x = x + x (y S(y)), cos x = 1 + y C(y), y = x^2, |x| <= pi/4: 3.6e-9 and 3.2e-8 before rounding.
_SIN = tuple(map(float.fromhex, ("-0x1.994eb4p-13", "0x1.110760p-7", "-0x1.555546p-3")))
_COS = tuple(map(float.fromhex, ("-0x1.647572p-10", "0x1.553f94p-5", "-0x1.ffffbap-2")))
_ANGLE = float.fromhex("0x1.921fb6p-32")  # (pi/2) 2^-32
_SQRT_HALF_BITS = 0x3F3504F3


def philox(counter: Sequence, key: Sequence) -> tuple:
    """Philox4x32-10: four 32-bit words from a counter of four words and a key of two.

    Words are held in 64-bit integers. Works on ints, int64 tensors and int64 numpy arrays alike (products may
    wrap around 2^64, which leaves both halves right once masked).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = k0 + _WEYL[0] & _MASK, k1 + _WEYL[1] & _MASK
    return c0, c1, c2, c3


def words(
    n_elements: int,
    chains: int | torch.Tensor | Sequence[int],
    *,
    seed: int,
    step: int,
    stream: int = NOISE,
    first_chain: int = 0,
    first_element: int = 0,
    device: torch.device | str | None = None,
) -> tuple[torch.Tensor, int]:
    """The Philox words of elements ``first_element ..`` of each chain, int64 ``[n, blocks, 4]``, and how many
    leading words belong to earlier elements."""
    seed = resolve_seed(seed)
    _check_range("step", step, 1 << 32)
    _check_range("stream", stream, 16)
    _check_range("first_element", first_element, MAX_ELEMENTS)
    _check_range("first_element + elements", first_element + n_elements, MAX_ELEMENTS + 1)
    chain = _chain_ids(chains, first_chain, device)[:, None]
    first = first_element // 4
    last = (first_element + n_elements + 3) // 4
    block = torch.arange(first, max(first, last), dtype=torch.int64, device=chain.device)[None, :]
    zero = torch.zeros((), dtype=torch.int64, device=chain.device)
    counter = (block + 0 * chain, zero + step, chain & _MASK, (chain >> 32) | stream << 28)
    w = philox(counter, (seed & _MASK, seed >> 32))
    return torch.stack(torch.broadcast_tensors(*w), dim=-1), first_element - 4 * first


def uniform_from_words(w: torch.Tensor) -> torch.Tensor:
    """``min(float(w) 2^-32 + 2^-33, 1 - 2^-24)``, in (0, 1): all 32 bits of the word, float32."""
    return (w.to(torch.float32) * 2.0**-32 + 2.0**-33).clamp_max(1 - 2.0**-24)


def minus_two_log(u: torch.Tensor) -> torch.Tensor:
    """``-2 ln u`` of positive normal float32 u."""
    bits = u.view(torch.int32) - _SQRT_HALF_BITS
    exponent = (bits >> 23).to(torch.float32)
    f = ((bits & 0x7FFFFF) + _SQRT_HALF_BITS).view(torch.float32) - 1.0
    return exponent * _LOG_C + f * _horner(_LOG_Q, f)


def box_muller(w0: torch.Tensor, w1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two normals from two words: ``r cos a, r sin a`` with ``r = sqrt(-2 ln u(w0))``, ``a = 2 pi w1 /
    2^32``.

    Absolute error below 1e-6 (5 ulp); reaches out to 6.76.
    """
    # torch's float32 sqrt on the CPU (MKL) is not correctly rounded; through float64 it is, on every device.
    radius = minus_two_log(w0.to(torch.float32) * 2.0**-32 + 2.0**-33).double().sqrt().float()
    x = (((w1 & 0x3FFFFFFF) ^ 0x20000000) - 0x20000000 << 2).to(torch.int32).to(torch.float32) * _ANGLE
    y = x * x
    sin = x * (y * _horner(_SIN, y)) + x
    cos = y * _horner(_COS, y) + 1.0
    quadrant = (w1 + 0x20000000) >> 30 & 3
    odd = (quadrant & 1) == 1
    c, s = torch.where(odd, sin, cos), torch.where(odd, cos, sin)
    c = torch.where((quadrant == 1) | (quadrant == 2), -c, c)
    s = torch.where(quadrant >= 2, -s, s)
    return radius * c, radius * s


def normal(
    shape: Sequence[int],
    chains: int | torch.Tensor | Sequence[int],
    *,
    seed: int,
    step: int,
    stream: int = NOISE,
    first_chain: int = 0,
    first_element: int = 0,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Standard normals, float32 ``[n, *shape]``; ``shape`` is one chain's.

    ``chains`` is a count (ids ``first_chain ..``) or the chain ids themselves, below 2^60. ``first_element``
    starts the row-major numbering elsewhere than at 0. Raises ValueError for a seed, step, stream, chain or
    element outside its range.
    """
    n_elements = math.prod(shape)
    w, skip = words(
        n_elements,
        chains,
        seed=seed,
        step=step,
        stream=stream,
        first_chain=first_chain,
        first_element=first_element,
        device=device,
    )
    n0, n1 = box_muller(w[..., 0], w[..., 1])
    n2, n3 = box_muller(w[..., 2], w[..., 3])
    return _take(torch.stack((n0, n1, n2, n3), dim=-1), skip, n_elements, shape)


def uniform(
    shape: Sequence[int],
    chains: int | torch.Tensor | Sequence[int],
    *,
    seed: int,
    step: int,
    stream: int = NOISE,
    first_chain: int = 0,
    first_element: int = 0,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Uniforms in (0, 1), float32 ``[n, *shape]``; arguments as in `normal`."""
    n_elements = math.prod(shape)
    w, skip = words(
        n_elements,
        chains,
        seed=seed,
        step=step,
        stream=stream,
        first_chain=first_chain,
        first_element=first_element,
        device=device,
    )
    return _take(uniform_from_words(w), skip, n_elements, shape)


def resolve_seed(seed: int | torch.Generator | None) -> int:
    """A seed in ``[0, 2^64)``: the int itself, or one draw from the generator (None: torch's global one)."""
    if seed is None or isinstance(seed, torch.Generator):
        device = seed.device if seed is not None else "cpu"
        return int(torch.randint(0, 2**63 - 1, (), dtype=torch.int64, generator=seed, device=device))
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise TypeError(f"`seed` must be an int, a torch.Generator or None, got {seed!r}")
    _check_range("seed", operator.index(seed), 1 << 64)
    return operator.index(seed)


def _horner(coefficients: Sequence[float], x: torch.Tensor) -> torch.Tensor:
    result = x * coefficients[0] + coefficients[1]
    for c in coefficients[2:]:
        result = result * x + c
    return result


def _chain_ids(
    chains: int | torch.Tensor | Sequence[int], first_chain: int, device: torch.device | str | None
) -> torch.Tensor:
    if isinstance(chains, int):
        _check_range("chains", chains, MAX_CHAINS + 1)
        _check_range("first_chain", first_chain, MAX_CHAINS - chains + 1)
        return torch.arange(first_chain, first_chain + chains, dtype=torch.int64, device=device)
    ids = torch.as_tensor(chains, dtype=torch.int64, device=device)
    if ids.ndim != 1 or (
        ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < MAX_CHAINS - first_chain
    ):
        raise ValueError(f"`chains` must be a count or a 1-D list of ids in [0, 2^60), got {chains!r}")
    return ids + first_chain


def _take(values: torch.Tensor, skip: int, n_elements: int, shape: Sequence[int]) -> torch.Tensor:
    return values.flatten(1)[:, skip : skip + n_elements].reshape(values.shape[0], *shape)


def _check_range(name: str, value: int, limit: int) -> None:
    if not 0 <= value < limit:
        raise ValueError(f"`{name}` must be in [0, {limit}), got {value}")
