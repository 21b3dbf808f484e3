"""Step-dependent coefficients, evaluated once before a chain starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real

import torch

Schedule = float | Sequence[float] | Callable[[int], float]


@dataclass(frozen=True)
class Coefficients:
    """What every step of a call does: entry `i` belongs to step `start + i`."""

    drift: list[float]
    noise: list[float]
    sigma: list[float | None]

    @cached_property
    def float32(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Drift and noise as kernels read them."""
        drift, noise = (torch.tensor(v, dtype=torch.float32, device="cpu") for v in (self.drift, self.noise))
        return drift, noise

    def same_level(self, i: int, stop: int) -> int:
        """The end of the longest stretch from entry `i` to `stop` that has one noise level."""
        level = self.sigma[i]
        if level is None:
            return stop
        return next((j for j in range(i + 1, stop) if self.sigma[j] != level), stop)

    def temperature(self) -> tuple[float, float]:
        """Least and greatest effective temperature noise²/(2·drift) over the steps with noise."""
        values = [n * n / (2 * d) if d else math.inf for d, n in zip(self.drift, self.noise) if n]
        return (min(values), max(values)) if values else (0.0, 0.0)


def values(schedule: Schedule, name: str, steps: int, start: int = 0) -> list[float]:
    """A schedule as `steps` floats: a number, a sequence of that length, or a callable of the step.

    A callable gets the absolute step (a resumed chain goes on counting); a sequence belongs to this call.

    Raises:
        ValueError: a sequence of another length; a value that is negative or not finite.
    """
    if callable(schedule):
        found = [float(schedule(start + i)) for i in range(steps)]
    elif isinstance(schedule, Real):
        found = [float(schedule)] * steps
    else:
        found = [float(v) for v in schedule]
        if len(found) != steps:
            raise ValueError(f"`{name}` must have one value per step, got {len(found)} for {steps} steps")
    for i, v in enumerate(found):
        if not math.isfinite(v) or v < 0:
            raise ValueError(f"`{name}` must be finite and not negative, got {v} at step {start + i}")
    return found


def positive(schedule: Schedule | None, name: str, steps: int, start: int = 0) -> list[float]:
    """A schedule that is given, and whose values are all positive."""
    if schedule is None:
        raise ValueError(f"the sampler needs `{name}` (only Annealed sets it by itself)")
    found = values(schedule, name, steps, start)
    if any(v == 0 for v in found):
        raise ValueError(f"`{name}` must be positive at every step")
    return found


def value_at(schedule: Schedule, step: int) -> float:
    """A schedule's value where a chain begins: before step `step`; the first one of a sequence."""
    if callable(schedule):
        return float(schedule(step))
    return float(schedule) if isinstance(schedule, Real) else float(next(iter(schedule), 1.0))
