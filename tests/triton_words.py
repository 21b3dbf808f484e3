"""A kernel over given words: noise whose words no counter at hand produces."""

import triton
import triton.language as tl
from ebmfast.kernels import philox


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
