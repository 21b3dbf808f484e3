"""The specification, in plain torch: slow, readable, any device. Every kernel is tested against it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ebmfast import rng

__all__ = ["NORM_BLOCK", "NORM_LANES", "blame", "clip_scale", "combine", "langevin_step", "metropolis_accept"]

NORM_BLOCK = 4096
NORM_LANES = 16


def langevin_step(
    x: torch.Tensor,
    gradients: torch.Tensor | Sequence[torch.Tensor],
    weights: torch.Tensor | None,
    drift: float,
    noise: float,
    *,
    seed: int,
    step: int,
    first_chain: int = 0,
    stream: int = rng.NOISE,
    clamp: tuple[float, float] | None = None,
    grad_clip_value: float | None = None,
    grad_clip_norm: float | None = None,
    frozen_mask: torch.Tensor | None = None,
    faults: torch.Tensor | None = None,
) -> None:
    r"""One fused Langevin step, in place:

    .. math:: x \leftarrow \mathrm{clamp}\Big(x - \mathrm{drift} \cdot \mathrm{clip}\Big(\sum_k w_k g_k\Big)
        + \mathrm{noise} \cdot z\Big), \qquad z \sim N(0, I)

    Every operation is one separately rounded operation of ``x.dtype``, in this order: ``g = w_0 g_0``, then
    ``g = g + w_k g_k`` for k = 1 ..; the elementwise clip; ``g = g * s`` with s from `clip_scale`; ``t = x -
    drift * g`` (not for K = 0); ``t = t + noise * z`` (not for noise = 0); an element whose t is not finite
    keeps its old value; clamp.

    Args:
        x: state ``[B, *S]``, float32 (kernels) or float64, contiguous; updated in place.
        gradients: ``[K, B, *S]``, or K tensors ``[B, *S]``, float32 or bfloat16. K = 0 is pure noise.
        weights: ``[K]`` or ``[K, B]`` float32; None only for K = 0.
        drift, noise: coefficients, rounded to float32 first.
        seed, step, first_chain, stream: name the noise (`ebmfast.rng`); row b is chain ``first_chain + b``.
        clamp: bounds applied last.
        grad_clip_value: each element of g is brought into ``[-c, c]``.
        grad_clip_norm: g of each chain is scaled to an L2 norm of at most c.
        frozen_mask: bool ``[*S]`` or ``[B, *S]``; True elements never move, cannot fault, and do not count in
            the norm.
        faults: int64 ``[B]``. A chain whose entry is not 0 on entry is left as it is. One with a non-finite t
            gets ``(step + 1) << 16 | (k + 1)``, k the first gradient that is not finite in an element that
            may move, or ``(step + 1) << 16`` if all of them are finite.
    """
    drift, noise = _float32(drift), _float32(noise)
    batch, size = x.shape[0], math.prod(x.shape[1:])
    flat = x.view(batch, size)
    gradients = [g.reshape(batch, size) for g in gradients]
    moves = torch.ones_like(flat, dtype=torch.bool)
    if frozen_mask is not None:
        moves &= ~frozen_mask.expand_as(x).reshape(batch, size)
    if faults is not None:
        moves &= (faults == 0)[:, None]

    t = flat
    if gradients:
        g = combine([g.to(x.dtype) for g in gradients], weights.to(x.dtype))
        if grad_clip_value is not None:
            g = _clamp(g, -_float32(grad_clip_value), _float32(grad_clip_value))
        if grad_clip_norm is not None:
            g = g * clip_scale(torch.where(moves, g, 0.0), _float32(grad_clip_norm))[:, None]
        t = t - drift * g
    if noise != 0:
        z = rng.normal(
            (size,), batch, seed=seed, step=step, stream=stream, first_chain=first_chain, device=x.device
        )
        t = t + noise * z.to(x.dtype)

    finite = torch.isfinite(t)
    t = torch.where(finite, t, flat)
    if clamp is not None:
        t = _clamp(t, _float32(clamp[0]), _float32(clamp[1]))
    flat.copy_(torch.where(moves, t, flat))
    if faults is not None:
        bad = (moves & ~finite).any(dim=1)
        faults.copy_(torch.where(bad, (step + 1 << 16) + blame(gradients, moves), faults))


def metropolis_accept(
    x: torch.Tensor,
    proposal: torch.Tensor,
    log_ratio: torch.Tensor,
    *,
    seed: int,
    step: int,
    first_chain: int = 0,
) -> torch.Tensor:
    r"""Accepts or rejects one proposal per chain, in place; returns what was accepted, bool ``[B]``:

    .. math:: x_b \leftarrow \mathrm{proposal}_b \quad \text{if} \quad \ln u_b < r_b, \qquad u_b \sim U(0, 1)

    u is element 0 of stream ACCEPT (`ebmfast.rng`), and the comparison is ``-2 ln u > -2 r`` with `rng.minus_two_log`,
    so that every backend decides alike. As u < 1, r >= 0 always accepts; NaN and -inf always reject.

    Args:
        x, proposal: ``[B, *S]`` of one dtype.
        log_ratio: r, the logarithm of the acceptance ratio, float32 ``[B]``.
        seed, step, first_chain: name the uniform; row b is chain ``first_chain + b``.
    """
    u = rng.uniform(
        (), x.shape[0], seed=seed, step=step, stream=rng.ACCEPT, first_chain=first_chain, device=x.device
    )
    accepted = rng.minus_two_log(u) > log_ratio * -2.0
    x.copy_(torch.where(accepted.view(-1, *[1] * (x.ndim - 1)), proposal, x))
    return accepted


def combine(gradients: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """``sum_k w_k g_k`` in ascending k, each operation rounded; g_k ``[B, N]``, w ``[K]`` or ``[K, B]``."""
    if weights.ndim == 2:
        weights = weights[:, :, None]
    total = weights[0] * gradients[0]
    for w, g in zip(weights[1:], gradients[1:], strict=True):
        total = total + w * g
    return total


def clip_scale(g: torch.Tensor, limit: float) -> torch.Tensor:
    """``min(1, limit / ||g||)`` of each row of ``[B, N]``; NaN where the norm is not finite: nothing moves.

    The order of the sum is part of the specification: blocks of 4096 elements; in a block, element i adds its
    square in float64 to lane i % 16, lanes are then folded in halves (l + 8, + 4, + 2, + 1); block sums are
    added in ascending order.
    """
    batch, size = g.shape
    blocks = -(-size // NORM_BLOCK)
    padded = torch.nn.functional.pad(g.double(), (0, blocks * NORM_BLOCK - size))
    squares = padded.square().view(batch, blocks, NORM_BLOCK // NORM_LANES, NORM_LANES)
    lanes = squares.new_zeros(batch, blocks, NORM_LANES)
    for row in squares.unbind(2):
        lanes = lanes + row
    while lanes.shape[2] > 1:
        half = lanes.shape[2] // 2
        lanes = lanes[:, :, :half] + lanes[:, :, half:]
    total = squares.new_zeros(batch)
    for block in lanes[:, :, 0].unbind(1):
        total = total + block
    norm = total.new_tensor(
        [math.sqrt(t) for t in total.tolist()]
    )  # math.sqrt is correctly rounded, torch's is not
    scale = torch.where(norm > limit, limit / norm, 1.0)
    return torch.where(torch.isfinite(norm), scale, math.nan).to(g.dtype)


def blame(gradients: Sequence[torch.Tensor], moves: torch.Tensor) -> torch.Tensor:
    """1 + the first gradient that is not finite in a moving element, 0 if there is none; int64 ``[B]``."""
    culprit = torch.zeros(moves.shape[0], dtype=torch.int64, device=moves.device)
    for k in reversed(range(len(gradients))):
        culprit[(moves & ~torch.isfinite(gradients[k])).any(dim=1)] = k + 1
    return culprit


def _clamp(t: torch.Tensor, low: float, high: float) -> torch.Tensor:
    t = torch.where(t < low, low, t)
    return torch.where(t > high, high, t)


def _float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()
