"""How the elements of a batch of chains are cut into programs.

A tile is ROWS chains by COLUMNS Philox blocks of four elements; program p has tile ``(p // tiles, p % tiles)``, where ``tiles`` is
the number of tiles along a chain.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

__all__ = ["BLOCKS", "Tile", "indices", "pieces", "tile"]

BLOCKS = 256  # Philox blocks in a tile: two for each thread of four warps


class Tile(NamedTuple):
    """Chains and Philox blocks of one program, and the number of programs."""

    rows: int
    columns: int
    programs: int


def tile(batch: int, size: int) -> Tile:
    """The tile for ``batch`` chains of ``size`` elements.

    Of all powers of two, the columns that cost least: idle lanes where the last tile of a chain sticks out, against rows so short
    that memory is read in small pieces (counted as two idle blocks for each row of a tile).
    """
    blocks = -(-size // 4)
    widths = [1 << i for i in range(BLOCKS.bit_length())]
    columns = min(widths, key=lambda c: (-(-blocks // c) * (c + 2), -c))
    rows = BLOCKS // columns
    return Tile(rows, columns, -(-batch // rows) * -(-blocks // columns))


@triton.jit
def pieces(size, WIDTH: tl.constexpr):
    """A size, 1 or more, over WIDTH, rounded up; `tl.cdiv` wraps for the last sizes below 2^31."""
    return (size - 1) // WIDTH + 1


@triton.jit
def indices(size, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of this program's tile: chains ``[ROWS, 1]``, Philox blocks ``[1, COLUMNS]``, elements ``[1, 4 COLUMNS]``; int64."""
    tiles = pieces(size, 4 * COLUMNS)
    program = tl.cast(tl.program_id(0), tl.int64)
    down, along = program // tiles, program % tiles
    row = down * ROWS + tl.arange(0, ROWS)
    block = along * COLUMNS + tl.arange(0, COLUMNS)
    element = along * (4 * COLUMNS) + tl.arange(0, 4 * COLUMNS)
    return row[:, None], block[None, :], element[None, :]
