"""Kernels for tests: noise of given words, which no counter at hand produces, and a size cut into pieces."""

import triton
import triton.language as tl
from ebmfast.kernels import blocks, philox


@triton.jit
def from_words(words, out, N: tl.constexpr):
    """Words int64 ``[2, N]`` -> the uniforms of the first row, and the two normals of each pair; out float32 ``[3, N]``."""
    i = tl.arange(0, N)
    w0 = tl.load(words + i).to(tl.uint32)
    w1 = tl.load(words + N + i).to(tl.uint32)
    n0, n1 = philox.box_muller(w0, w1)
    tl.store(out + i, philox.uniform(w0))
    tl.store(out + N + i, n0)
    tl.store(out + 2 * N + i, n1)


@triton.jit
def pieces_of(out, size, WIDTH: tl.constexpr):
    """Pieces of WIDTH that a size has; out int64 ``[1]``."""
    tl.store(out, tl.cast(blocks.pieces(size, WIDTH), tl.int64))
