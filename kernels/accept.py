"""Accept or reject one proposal per chain; `ebmfast.reference.metropolis_accept` is its specification."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from ebmfast.kernels import blocks, philox
from ebmfast.kernels.fill import signed
from ebmfast.kernels.launch import launch

from ebmfast import rng

__all__ = ["accept"]


@triton.jit(do_not_specialize=["step", "seed", "first_chain", "batch"])
def _accept(
    x, proposal, log_ratio, accepted, step, seed: tl.int64, first_chain: tl.int64, batch: tl.int64, size,
    STREAM: tl.constexpr, STEP_ON_DEVICE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, _, element = blocks.indices(size, ROWS, COLUMNS)
    if STEP_ON_DEVICE:
        index = tl.load(step)
    else:
        index = tl.cast(step, tl.int64)
    word, _, _, _ = philox.words(row * 0, first_chain + row, index, seed, STREAM)
    ratio = tl.load(log_ratio + row, mask=row < batch, other=0.0)
    taken = philox.minus_two_log(philox.uniform(word)) > ratio * -2.0
    offset = row * size + element
    mask = (row < batch) & (element < size) & taken
    tl.store(x + offset, tl.load(proposal + offset, mask=mask, other=0.0), mask=mask)
    # Each tile along a chain computes the same decision; they all write it.
    tl.store(accepted + row, taken.to(tl.uint8), mask=row < batch)


def accept(
    x: torch.Tensor,
    proposal: torch.Tensor,
    log_ratio: torch.Tensor,
    accepted: torch.Tensor,
    *,
    seed: int,
    step: int | torch.Tensor,
    first_chain: int,
) -> None:
    """x, proposal float32 ``[B, *S]``, log_ratio float32 ``[B]``, accepted bool ``[B]`` (out); x changes in place. ``step`` is a
    number, or int64 ``[1]`` on the device for a captured graph."""
    batch, size = x.shape[0], math.prod(x.shape[1:])
    rows, columns, programs = blocks.tile(batch, size)
    launch(
        _accept, programs, x.device, x=x, proposal=proposal, log_ratio=log_ratio, accepted=accepted.view(torch.uint8), step=step,
        seed=signed(seed), first_chain=first_chain, batch=batch, size=size, STREAM=rng.ACCEPT,
        STEP_ON_DEVICE=isinstance(step, torch.Tensor), ROWS=rows, COLUMNS=columns,
    )  # fmt: skip
