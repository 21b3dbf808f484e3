"""Custom operators, so that `torch.compile` of user code can keep a step in its graph as one opaque node.

``torch.ops.ebmfast.langevin_step`` and ``torch.ops.ebmfast.normal``, wrapped by the functions of the same
name here. The driver does not need them: it calls a prepared plan (`ebmfast.backends`), which costs less.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ebmfast import _checks, backends, rng

__all__ = ["langevin_step", "normal"]

_LIBRARY = torch.library.Library("ebmfast", "DEF")
# seed: the 64 bits as a signed integer, the only kind that schemas have.
_LIBRARY.define(
    "langevin_step(Tensor(a!) x, Tensor[] gradients, Tensor? weights, float drift, float noise, *, int seed, "
    "int step, int first_chain=0, int stream=1, float[]? clamp=None, float? grad_clip_value=None, "
    "float? grad_clip_norm=None, Tensor? frozen_mask=None, Tensor(b!)? faults=None) -> ()"
)
_LIBRARY.define(
    "normal(SymInt[] shape, SymInt chains, *, int seed, int step, int stream=1, int first_chain=0, "
    "Device? device=None) -> Tensor"
)


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
    """One fused step in place, on the fastest backend for ``x``: see `ebmfast.reference.langevin_step`."""
    _checks.check_noise_id(seed=seed, step=step, stream=stream, first_chain=first_chain)
    torch.ops.ebmfast.langevin_step(
        x,
        list(gradients),
        weights,
        drift,
        noise,
        seed=_signed(seed),
        step=step,
        first_chain=first_chain,
        stream=stream,
        clamp=None if clamp is None else list(clamp),
        grad_clip_value=grad_clip_value,
        grad_clip_norm=grad_clip_norm,
        frozen_mask=frozen_mask,
        faults=faults,
    )


def normal(
    shape: Sequence[int],
    chains: int,
    *,
    seed: int,
    step: int,
    stream: int = rng.NOISE,
    first_chain: int = 0,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Standard normals, float32 ``[chains, *shape]``: see `ebmfast.rng.normal`."""
    _checks.check_noise_id(seed=seed, step=step, stream=stream, first_chain=first_chain)
    device = torch.device("cpu" if device is None else device)
    return torch.ops.ebmfast.normal(
        shape, chains, seed=_signed(seed), step=step, stream=stream, first_chain=first_chain, device=device
    )


def _signed(seed: int) -> int:
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def _step_kernel(x, gradients, weights, drift, noise, *, seed, clamp=None, **options) -> None:
    backend = backends.resolve("auto", x.device)
    clamp = None if clamp is None else tuple(clamp)
    backend.step(x, gradients, weights, drift, noise, seed=seed % (1 << 64), clamp=clamp, **options)


def _normal_kernel(shape, chains, *, seed, device=None, **options) -> torch.Tensor:
    device = torch.device("cpu" if device is None else device)
    return backends.resolve("auto", device).normal(
        shape, chains, seed=seed % (1 << 64), device=device, **options
    )


_LIBRARY.impl("langevin_step", _step_kernel, "CPU")
_LIBRARY.impl("langevin_step", _step_kernel, "CUDA")
_LIBRARY.impl("normal", _normal_kernel, "CompositeExplicitAutograd")


@torch.library.register_fake("ebmfast::langevin_step", lib=_LIBRARY)
def _step_fake(x, gradients, weights, drift, noise, **options) -> None:
    return None


@torch.library.register_fake("ebmfast::normal", lib=_LIBRARY)
def _normal_fake(shape, chains, *, device=None, **options) -> torch.Tensor:
    return torch.empty((chains, *shape), dtype=torch.float32, device=device)
