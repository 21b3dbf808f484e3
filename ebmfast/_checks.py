"""Argument checks: made once, in Python, before any pointer leaves; a message names argument, must, is."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch

__all__ = ["check", "check_gradients", "check_noise_id", "check_state", "check_tensor", "check_weights", "indexed"]


def indexed(device: torch.device | str) -> torch.device:
    """"cuda" as the current one of them, as tensors name theirs; any other device as it is."""
    device = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" and device.index is None else device


def check(
    condition: bool, name: str, expectation: str, value: object, error: type[Exception] = ValueError
) -> None:
    """Raises ``error``: "`name` must be expectation, got value"."""
    if not condition:
        raise error(f"`{name}` must be {expectation}, got {value}")


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    *,
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    shapes: Sequence[Sequence[int]],
) -> None:
    """Dtype, device, shape (one of several) and contiguity of a tensor."""
    check(isinstance(tensor, torch.Tensor), name, "a tensor", type(tensor).__name__, TypeError)
    where = f"{' or '.join(_dtype(d) for d in dtypes)} on {device}"
    check(
        tensor.dtype in dtypes and tensor.device == device,
        name,
        where,
        f"{_dtype(tensor.dtype)} on {tensor.device}",
    )
    allowed = [list(shape) for shape in shapes]
    check(
        list(tensor.shape) in allowed, name, f"of shape {' or '.join(map(str, allowed))}", list(tensor.shape)
    )
    check(
        tensor.is_contiguous(),
        name,
        "contiguous",
        f"strides {tensor.stride()} for shape {list(tensor.shape)}",
    )


def check_state(
    x: torch.Tensor,
    dtypes: Sequence[torch.dtype],
    frozen_mask: torch.Tensor | None,
    faults: torch.Tensor | None,
) -> None:
    """What a prepared step keeps: x ``[B, *S]``, frozen_mask ``[*S]`` or ``[B, *S]``, faults ``[B]``."""
    check(isinstance(x, torch.Tensor), "x", "a tensor", type(x).__name__, TypeError)
    check(x.ndim >= 1, "x", "of shape [B, *S]", list(x.shape))
    check_tensor("x", x, dtypes=dtypes, device=x.device, shapes=[x.shape])
    if frozen_mask is not None:
        check_tensor(
            "frozen_mask", frozen_mask, dtypes=[torch.bool], device=x.device, shapes=[x.shape[1:], x.shape]
        )
    if faults is not None:
        check_tensor("faults", faults, dtypes=[torch.int64], device=x.device, shapes=[x.shape[:1]])


def check_gradients(
    x: torch.Tensor, gradients: torch.Tensor | Sequence[torch.Tensor], n: int, dtype: torch.dtype
) -> None:
    """n gradients of the shape of x: stacked ``[K, B, *S]``, or K tensors ``[B, *S]``."""
    if isinstance(gradients, torch.Tensor):
        check_tensor("gradients", gradients, dtypes=[dtype], device=x.device, shapes=[(n, *x.shape)])
        return
    check(len(gradients) == n, "gradients", f"{n} tensors", len(gradients))
    for k, gradient in enumerate(gradients):
        check_tensor(f"gradients[{k}]", gradient, dtypes=[dtype], device=x.device, shapes=[x.shape])


def check_weights(x: torch.Tensor, weights: torch.Tensor | None, n: int, per_chain: bool) -> None:
    """float32 ``[K]`` or ``[K, B]``; not needed without gradients."""
    if n > 0:
        shape = (n, x.shape[0]) if per_chain else (n,)
        check_tensor("weights", weights, dtypes=[torch.float32], device=x.device, shapes=[shape])


def check_noise_id(
    *, seed: int = 0, step: int = 0, stream: int = 0, first_chain: int = 0, chains: int = 0
) -> None:
    """The ranges of the noise contract (`ebmfast.rng`)."""
    check(0 <= seed < 1 << 64, "seed", "in [0, 2^64)", seed)
    check(0 <= step < 1 << 32, "step", "in [0, 2^32)", step)
    check(0 <= stream < 16, "stream", "in [0, 16)", stream)
    check(0 <= first_chain <= (1 << 60) - chains, "first_chain", f"in [0, 2^60 - {chains}]", first_chain)


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def positive_integer(value, what: str) -> int:
    """A whole number above 0, of numpy too; `what` names it in the error."""
    try:
        found = operator.index(value)
    except TypeError:
        found = 0
    if isinstance(value, bool) or found < 1:
        raise ValueError(f"{what} must be a positive integer, got {value!r}")
    return found
