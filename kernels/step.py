"""The fused Langevin step; `ebmfast.reference.langevin_step` is its specification.

Up to four launches: the norm's sums of squares and its scale (only with a norm clip), the step, and the record of faults (only with
faults). Nothing waits for the device. Gradients come as a tuple of addresses, so that separate ones need no copy; the kernel is
compiled for each number of them, for each size of a chain (loop bounds are constants), not for each batch.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from ebmfast.kernels import blocks, philox
from ebmfast.kernels.fill import signed
from ebmfast.kernels.launch import launch

from ebmfast import reference

__all__ = ["CLOCK", "StepPlan", "clock"]

_INFINITY = tl.constexpr(float("inf"))
_EXPONENT = tl.constexpr(0x7F800000)
_NORM_BLOCK = tl.constexpr(reference.NORM_BLOCK)
_NORM_LANES = tl.constexpr(reference.NORM_LANES)
_NORM_UNITS = 8  # blocks of the norm's sum in one program
_SCALE_CHAINS = 128
CLOCK = 4  # int64: the step, the step that schedules start at, the seed, the first chain


def clock(step: int, start: int, seed: int, first_chain: int, device="cpu") -> torch.Tensor:
    """What a captured step reads from device memory: int64 ``[4]``."""
    return torch.tensor([step, start, signed(seed), first_chain], dtype=torch.int64, device=device)


@triton.jit
def _nonfinite(value):
    return (value.to(tl.int32, bitcast=True) & _EXPONENT) == _EXPONENT


@triton.jit
def _moving(frozen, row, element, inside, size, MASK_PER_CHAIN: tl.constexpr):
    if frozen is not None:
        if MASK_PER_CHAIN:
            address = frozen + (row * size + element)
        else:
            address = frozen + (row * 0 + element)
        return inside & (tl.load(address, mask=inside, other=1) == 0)
    else:
        return inside


@triton.jit
def _combined(gradients, weights, clip_value, row, offset, inside, batch, WEIGHTS_PER_CHAIN: tl.constexpr):
    """The clipped ``sum_k w_k g_k``, in ascending k."""
    for k in tl.static_range(len(gradients)):
        if WEIGHTS_PER_CHAIN:
            weight = tl.load(weights + (k * batch + row), mask=row < batch, other=0.0)
        else:
            weight = tl.load(weights + k)
        term = weight * tl.load(gradients[k] + offset, mask=inside, other=0.0).to(tl.float32)
        if k == 0:
            total = term
        else:
            total = total + term
    if clip_value is not None:
        total = tl.where(total < -clip_value, -clip_value, total)
        total = tl.where(total > clip_value, clip_value, total)
    return total


@triton.jit(do_not_specialize=["batch"])
def _squares(
    squares, gradients, weights, clip_value, frozen, batch: tl.int64, size,
    WEIGHTS_PER_CHAIN: tl.constexpr, MASK_PER_CHAIN: tl.constexpr, UNITS: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    """Sums of squares ``[B, blocks]`` in the order of `ebmfast.reference.clip_scale`."""
    norm_blocks = blocks.pieces(size, _NORM_BLOCK)
    unit = tl.cast(tl.program_id(0), tl.int64) * UNITS + tl.arange(0, UNITS)[:, None]
    row = unit // norm_blocks
    first = unit % norm_blocks * _NORM_BLOCK + tl.arange(0, _NORM_LANES)[None, :]
    lanes = tl.zeros([UNITS, _NORM_LANES], tl.float64)
    for turn in tl.range(0, TURNS, loop_unroll_factor=4):
        element = first + turn * _NORM_LANES
        moving = _moving(frozen, row, element, (row < batch) & (element < size), size, MASK_PER_CHAIN)
        g = _combined(gradients, weights, clip_value, row, row * size + element, moving, batch, WEIGHTS_PER_CHAIN)
        value = tl.where(moving, g, 0.0).to(tl.float64)
        lanes += value * value  # the product of two float32 is exact in float64
    # Sums of two, so that the order is the specification's and not the compiler's.
    half8 = tl.sum(tl.reshape(lanes, [UNITS, 2, 8]), axis=1)
    half4 = tl.sum(tl.reshape(half8, [UNITS, 2, 4]), axis=1)
    half2 = tl.sum(tl.reshape(half4, [UNITS, 2, 2]), axis=1)
    total = tl.sum(half2, axis=1)[:, None]
    tl.store(squares + unit, total, mask=row < batch)


@triton.jit(do_not_specialize=["batch"])
def _scales(scale, squares, limit, batch: tl.int64, NORM_BLOCKS: tl.constexpr, CHAINS: tl.constexpr):
    """``min(1, limit / ||g||)`` of each chain, NaN where the norm is not finite."""
    row = tl.cast(tl.program_id(0), tl.int64) * CHAINS + tl.arange(0, CHAINS)
    total = tl.zeros([CHAINS], tl.float64)
    for j in range(0, NORM_BLOCKS):
        total += tl.load(squares + (row * NORM_BLOCKS + j), mask=row < batch, other=0.0)
    norm = tl.sqrt(total)
    bound = tl.cast(limit, tl.float64)
    factor = tl.where(norm > bound, bound / norm, 1.0).to(tl.float32)
    tl.store(scale + row, tl.where(norm < _INFINITY, factor, float("nan")), mask=row < batch)


@triton.jit(do_not_specialize=["step", "seed", "first_chain", "batch"])
def _step(
    x, gradients, weights, drift, noise, step, schedule, seed: tl.int64, first_chain: tl.int64, clip_value, low, high, scale,
    frozen, faults, bad, batch: tl.int64, size,
    STREAM: tl.constexpr, WEIGHTS_PER_CHAIN: tl.constexpr, MASK_PER_CHAIN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, block, element = blocks.indices(size, ROWS, COLUMNS)
    inside = (row < batch) & (element < size)
    offset = row * size + element
    moving = _moving(frozen, row, element, inside, size, MASK_PER_CHAIN)
    if faults is not None:
        moving = moving & (tl.load(faults + row, mask=row < batch, other=1) == 0)
    if schedule is not None:  # step, drift and noise are addresses; step is a clock, which has seed and first chain too
        index = tl.load(step)
        entry = tl.minimum(index - tl.load(step + 1), schedule - 1)
        drift_now = tl.load(drift + entry)
        noise_now = tl.load(noise + entry)
        key = tl.load(step + 2)
        chain = tl.load(step + 3) + row
    else:
        index = tl.cast(step, tl.int64)
        drift_now = drift
        noise_now = noise
        key = seed
        chain = first_chain + row

    old = tl.load(x + offset, mask=inside, other=0.0)
    t = old
    if gradients is not None:
        g = _combined(gradients, weights, clip_value, row, offset, inside, batch, WEIGHTS_PER_CHAIN)
        if scale is not None:
            g = g * tl.load(scale + row, mask=row < batch, other=0.0)
        t = t - drift_now * g
    if noise_now != 0.0:
        t = t + noise_now * philox.normals(block, chain, index, key, STREAM)
    broken = _nonfinite(t)
    t = tl.where(broken, old, t)
    if low is not None:
        t = tl.where(t < low, low, t)
        t = tl.where(t > high, high, t)
    tl.store(x + offset, t, mask=moving)
    if bad is not None:
        tl.store(bad + (row + element * 0), tl.full([ROWS, 4 * COLUMNS], 1, tl.uint8), mask=moving & broken)


@triton.jit(do_not_specialize=["step", "batch"])
def _record_faults(
    faults, bad, gradients, frozen, step, schedule, batch: tl.int64, size,
    MASK_PER_CHAIN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Names the step and the first gradient that is not finite, for chains that `_step` marked; unmarks them."""
    row = (tl.cast(tl.program_id(0), tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    marked = tl.load(bad + row, mask=row < batch, other=0) != 0
    if tl.max(tl.max(marked.to(tl.int32), axis=1), axis=0) != 0:
        if schedule is not None:
            code = (tl.load(step) + 1) << 16
        else:
            code = (tl.cast(step, tl.int64) + 1) << 16
        culprit = tl.zeros([ROWS], tl.int64)
        if gradients is not None:
            for j in tl.static_range(len(gradients)):  # last to first, so that the first remains
                found = tl.zeros([ROWS, 4 * COLUMNS], tl.int32)
                for tile in range(0, TILES):
                    element = tl.cast(tile, tl.int64) * (4 * COLUMNS) + tl.arange(0, 4 * COLUMNS)[None, :]
                    moving = _moving(frozen, row, element, marked & (element < size), size, MASK_PER_CHAIN)
                    g = tl.load(gradients[len(gradients) - 1 - j] + (row * size + element), mask=moving, other=0.0)
                    found = found | _nonfinite(g.to(tl.float32)).to(tl.int32)
                culprit = tl.where(tl.max(found, axis=1) != 0, len(gradients) - j, culprit)
        tl.store(faults + row, code + culprit[:, None], mask=marked)
        tl.store(bad + row, tl.zeros([ROWS, 1], tl.uint8), mask=marked)


class StepPlan:
    """Everything of a step that stays the same; arguments as `ebmfast.backends.Backend.prepare` checked them."""

    def __init__(
        self,
        x: torch.Tensor,
        *,
        n_gradients: int,
        weights_per_chain: bool,
        seed: int,
        first_chain: int,
        stream: int,
        clamp: tuple[float, float] | None,
        grad_clip_value: float | None,
        grad_clip_norm: float | None,
        frozen_mask: torch.Tensor | None,
        faults: torch.Tensor | None,
    ) -> None:
        batch, size = x.shape[0], math.prod(x.shape[1:])
        self._device, self._n = x.device, n_gradients
        self._rows, self._columns, self._programs = blocks.tile(batch, size)
        self._limit = None if grad_clip_norm is None or n_gradients == 0 else float(grad_clip_norm)
        self._norm_blocks = -(-size // reference.NORM_BLOCK)
        clips = self._limit is not None
        self._squares = x.new_empty(batch, self._norm_blocks, dtype=torch.float64) if clips else None
        self._scale = x.new_empty(batch) if clips else None
        self._faults = faults
        self._bad = None if faults is None else torch.zeros(batch, dtype=torch.uint8, device=x.device)
        self._frozen = None if frozen_mask is None else frozen_mask.view(torch.uint8)
        self._mask_per_chain = frozen_mask is not None and frozen_mask.ndim == x.ndim
        self._per_chain = weights_per_chain
        self._clip_value = None if grad_clip_value is None else float(grad_clip_value)
        self._batch, self._size = batch, size
        low, high = (None, None) if clamp is None else map(float, clamp)
        self._step = {
            **{"x": x, "seed": signed(seed), "first_chain": first_chain, "STREAM": stream, "low": low, "high": high},
            **{"scale": self._scale, "faults": faults, "bad": self._bad, "ROWS": self._rows, "COLUMNS": self._columns},
        }

    def __call__(self, gradients, weights: torch.Tensor | None, drift, noise, step) -> None:
        """One step, in place. ``drift``, ``noise`` and ``step`` are numbers; or all three are tensors on the device, as a captured
        graph needs them: step is a `clock`, drift and noise are float32 ``[T]``, their first entries those of step ``start`` (the
        last entry holds after that). Seed and first chain are then the clock's. The caller moves it on."""
        gradients = tuple(gradients[k] for k in range(self._n)) or None
        schedule = len(drift) if isinstance(step, torch.Tensor) else None
        if schedule is None:
            drift, noise = float(drift), float(noise)
        shared = {"gradients": gradients, "frozen": self._frozen, "MASK_PER_CHAIN": self._mask_per_chain}
        shared |= {"batch": self._batch, "size": self._size}
        combine = {"weights": weights, "clip_value": self._clip_value, "WEIGHTS_PER_CHAIN": self._per_chain}
        if self._limit is not None:
            programs = -(-self._batch * self._norm_blocks // _NORM_UNITS)
            turns = -(-min(self._size, reference.NORM_BLOCK) // reference.NORM_LANES)
            launch(_squares, programs, self._device, squares=self._squares, UNITS=_NORM_UNITS, TURNS=turns, **shared, **combine)
            launch(
                _scales, -(-self._batch // _SCALE_CHAINS) if self._size else 0, self._device, scale=self._scale,
                squares=self._squares, limit=self._limit, batch=self._batch, NORM_BLOCKS=self._norm_blocks, CHAINS=_SCALE_CHAINS,
            )  # fmt: skip
        time = {"step": step, "schedule": schedule}
        launch(_step, self._programs, self._device, drift=drift, noise=noise, **time, **shared, **combine, **self._step)
        if self._faults is not None:
            programs, tiles = -(-self._batch // self._rows) if self._size else 0, -(-self._size // (4 * self._columns))
            record = {"faults": self._faults, "bad": self._bad, "ROWS": self._rows, "COLUMNS": self._columns, "TILES": tiles}
            launch(_record_faults, programs, self._device, **record, **time, **shared)
