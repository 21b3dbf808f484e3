"""Noise written out: `ebmfast.rng.normal` and `ebmfast.rng.uniform`."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from ebmfast.kernels import blocks, philox
from ebmfast.kernels.launch import launch

__all__ = ["fill", "signed"]


@triton.jit(do_not_specialize=["step", "seed", "first_chain", "first_block", "batch"])
def _fill(
    out, step: tl.int64, seed: tl.int64, first_chain: tl.int64, first_block: tl.int64, batch: tl.int64, size,
    STREAM: tl.constexpr, UNIFORM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, block, element = blocks.indices(size, ROWS, COLUMNS)
    if UNIFORM:
        values = philox.uniforms(first_block + block, first_chain + row, step, seed, STREAM)
    else:
        values = philox.normals(first_block + block, first_chain + row, step, seed, STREAM)
    tl.store(out + row * size + element, values, mask=(row < batch) & (element < size))


def fill(
    out: torch.Tensor, *, uniform: bool, seed: int, step: int, stream: int, first_chain: int, first_element: int
) -> None:
    """Writes the noise of chains ``first_chain ..`` into out ``[B, *S]``; ``first_element`` is a multiple of 4."""
    batch, size = out.shape[0], math.prod(out.shape[1:])
    rows, columns, programs = blocks.tile(batch, size)
    launch(
        _fill, programs, out.device, out=out, step=step, seed=signed(seed), first_chain=first_chain, first_block=first_element // 4,
        batch=batch, size=size, STREAM=stream, UNIFORM=uniform, ROWS=rows, COLUMNS=columns,
    )  # fmt: skip


def signed(seed: int) -> int:
    """The 64 bits of a seed as int64, the type that kernels take."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed
