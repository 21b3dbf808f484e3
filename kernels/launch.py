"""The one place where kernels are launched."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch

__all__ = ["OPTIONS", "compile_only", "launch"]

# Without fusion, a product and the sum it goes into are rounded apart, as the noise contract asks.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
_compiled: list | None = None


def launch(kernel, programs: int, device: torch.device, **arguments) -> None:
    """Runs ``programs`` programs of a kernel on ``device``, in stream order; with none, nothing happens."""
    if programs == 0:
        return
    if _compiled is not None:
        _compiled.append(kernel.warmup(**arguments, **OPTIONS, grid=(programs,)))
        return
    # Off the GPU this is Triton's interpreter: numpy, which warns of NaN and overflow.
    with torch.cuda.device(device) if device.type == "cuda" else np.errstate(all="ignore"):
        kernel[(programs,)](**arguments, **OPTIONS)


@contextlib.contextmanager
def compile_only() -> Iterator[list]:
    """Inside, launches compile for the target of Triton's active driver and run nothing; yields the compiled kernels."""
    global _compiled
    _compiled = []
    try:
        yield _compiled
    finally:
        _compiled = None
