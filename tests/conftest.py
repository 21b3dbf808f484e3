"""Shared fixtures. ``EBMFAST_REQUIRE=cpu,triton`` turns the skip of a missing backend into a failure."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest
import torch

from ebmfast import backends
from ebmfast._native import core

REQUIRED = {name for name in os.environ.get("EBMFAST_REQUIRE", "").split(",") if name}
# What parity is tested for: what can run here, and what must.
KERNELS = [
    n for n, reason in backends.available().items() if n != "reference" and (reason is None or n in REQUIRED)
]
LEVELS = [name for name, supported, _ in core.levels() if supported]


def require_backend(name: str) -> backends.Backend:
    """The backend; without it the test is skipped, or fails if EBMFAST_REQUIRE lists it."""
    reason = backends.available()[name]
    if reason is not None:
        (pytest.fail if name in REQUIRED else pytest.skip)(f"backend {name}: {reason}")
    return backends.resolve(name, backends.home(name))


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault("EBMFAST_CACHE", tempfile.mkdtemp(prefix="ebmfast-cache-"))  # not the user's
    unknown = REQUIRED - set(backends.NAMES)
    if unknown:
        raise pytest.UsageError(
            f"EBMFAST_REQUIRE: unknown backends {sorted(unknown)}; known: {backends.NAMES}"
        )


@pytest.fixture(params=LEVELS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction-set level that this CPU has."""
    before = core.isa()
    core.set_isa(request.param)
    yield request.param
    core.set_isa(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equality of shape, dtype and every bit: -0 differs from 0, and a NaN equals only its own payload."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    integer = {4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))
