"""What samplers that accept or reject have in common: the target at a point, and one decision per chain.

A chain moves from x to its proposal y with probability min(1, exp(r)), r the log of the ratio of target densities
times that of proposal densities (Metropolis et al. 1953; Hastings 1970). Every chain decides for itself, with a
uniform of its own (`reference.metropolis_accept`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .. import reference
from .langevin import LangevinInfo, LangevinState, StepByStep
from .schedule import Coefficients, Schedule, values


class Point(NamedTuple):
    """The target where chains are: E(x) `[B]`, its gradient `[B, *S]` (0 where frozen) and leaf energies K × `[B]`."""

    energy: torch.Tensor
    gradient: torch.Tensor
    leaf_energies: list[torch.Tensor]


def check_bounds(bounds) -> tuple[float, float] | None:
    """`(low, high)` with low < high, or None."""
    if bounds is None:
        return None
    low, high = map(float, bounds)
    if not low < high:
        raise ValueError(f"`bounds` must be (low, high) with low < high, got {bounds}")
    return low, high


def positive(schedule: Schedule, name: str, steps: int, start: int) -> list[float]:
    """A schedule whose values are all positive."""
    found = values(schedule, name, steps, start)
    if any(v == 0 for v in found):
        raise ValueError(f"`{name}` must be positive at every step: proposals need noise")
    return found


class MetropolisKernel(StepByStep):
    """Steps of one micro-batch: `init(x) -> state`, `step(state) -> (state, info)`; `accepted` `[B]` counts.

    `step` updates `state.x` and `state.faults` in place. A chain whose energy or gradient is not finite where it
    stands has a fault; a proposal where they are not is rejected.
    """

    def __init__(self, sampler, evaluator, backend, coefficients: Coefficients, start: int, *, seed: int, first_chain: int,
                 frozen_mask: torch.Tensor | None = None):
        self.sampler, self.evaluator, self.backend = sampler, evaluator, backend
        self.coefficients, self.start = coefficients, start
        self.noise_id = {"seed": seed, "first_chain": first_chain}
        self.frozen_mask = frozen_mask
        evaluator.need_energies()

    def init(self, x: torch.Tensor, step: int | None = None, faults: torch.Tensor | None = None) -> LangevinState:
        """The state of chains `x` `[B, *S]` before step `step`."""
        if faults is None:
            faults = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        self.accepted = torch.zeros(x.shape[0], device=x.device)
        self._point: Point | None = None
        return LangevinState(x, self.start if step is None else step, faults)

    def catch_up(self, state: LangevinState, row: int, step: int) -> None:
        """A chain was drawn anew: what is known of its point is not true any more."""
        self._point = None

    def step(self, state: LangevinState) -> tuple[LangevinState, LangevinInfo]:
        """One proposal and one decision for every chain that has no fault."""
        x, t, faults = state
        if self._point is None:
            self._point = self._target(x, t, faults)
        here = self._point
        i = t - self.start
        drift, noise = self.coefficients.drift[i], self.coefficients.noise[i]
        y, there, log_ratio = self.propose(x, here, t, drift, noise, noise * noise / (2 * drift))
        allowed = (faults == 0) & self._inside(y)
        accept = reference.metropolis_accept(x, y, torch.where(allowed, log_ratio, -torch.inf), step=t, **self.noise_id)
        rows = accept.reshape(-1, *[1] * (x.ndim - 1))
        self._point = Point(torch.where(accept, there.energy, here.energy), torch.where(rows, there.gradient, here.gradient),
                            [torch.where(accept, b, a) for a, b in zip(here.leaf_energies, there.leaf_energies)])
        self.accepted += accept
        return LangevinState(x, t + 1, faults), LangevinInfo(self._point.leaf_energies)

    def propose(self, x, here: Point, t: int, drift: float, noise: float, temperature: float):
        """`(y, target at y, log ratio [B])`."""
        raise NotImplementedError

    def target(self, x: torch.Tensor) -> Point:
        """The target at `x`."""
        return self._target(x, 0, None)

    def _target(self, x, t: int, faults: torch.Tensor | None) -> Point:
        gradients, energies = self.evaluator.gradients(x)
        energies = [e.detach().to(x.dtype) for e in energies]
        energy = self.evaluator.total(energies)
        gradient = sum(gradients[1:], gradients[0].clone())
        if self.frozen_mask is not None:
            gradient = gradient.masked_fill(self.frozen_mask, 0.0)
        if faults is not None:
            self._record(faults, t, gradients, energies, energy, gradient)
        return Point(energy, self.clipped(gradient), energies)

    def clipped(self, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient that proposals use."""
        return gradient

    def _record(self, faults, t: int, gradients, energies, energy, gradient) -> None:
        """Stop chains whose target is not finite, and blame the first leaf whose energy or gradient is not."""
        bad = ~(torch.isfinite(energy) & torch.isfinite(gradient).flatten(1).all(1)) & (faults == 0)
        if not bad.any():
            return
        moves = torch.ones_like(gradient, dtype=torch.bool)
        if self.frozen_mask is not None:
            moves &= ~self.frozen_mask
        culprit = reference.blame([g.flatten(1) for g in gradients], moves.flatten(1))
        for k in reversed(range(len(energies))):
            culprit[~torch.isfinite(energies[k])] = k + 1
        faults.copy_(torch.where(bad, (t + 1 << 16) + culprit, faults))

    def _inside(self, y: torch.Tensor) -> torch.Tensor:
        if self.sampler.bounds is None:
            return torch.ones(len(y), dtype=torch.bool, device=y.device)
        low, high = self.sampler.bounds
        inside = (y >= low) & (y <= high)
        if self.frozen_mask is not None:
            inside |= self.frozen_mask
        return inside.flatten(1).all(1)


def squared_norm(rows: torch.Tensor) -> torch.Tensor:
    """|row|² of every chain, `[B]`."""
    return rows.flatten(1).square().sum(1)


class Metropolis:
    """What the driver asks of a sampler that accepts or rejects."""

    steps = None  # the call decides
    needs_energies = True

    @property
    def clamp(self) -> tuple[float, float] | None:
        """The bounds of the domain, where there are any: chains start and stay there."""
        return self.bounds

    def noise_levels(self) -> None:
        """Noise levels at which energies are taken: none."""

    def initial_scale(self) -> float:
        """Standard deviation of `init="normal"`."""
        return 1.0

    def native_options(self) -> None:
        """Nothing: the chain engine does not accept and reject."""

    @property
    def fixed_schedule(self) -> bool:
        """Whether the coefficients of a step are the same in every call."""
        return not (callable(self.step_size) or callable(self.temperature))

    def scales(self, steps: int, start: int) -> tuple[list[float], list[float]]:
        """Step sizes and temperatures of steps `start` to `start + steps - 1`."""
        return positive(self.step_size, "step_size", steps, start), positive(self.temperature, "temperature", steps, start)


def coefficients(squared_steps, temperatures) -> Coefficients:
    """Drift λ/2 and noise √(λT), λ the step size of Langevin dynamics that a step amounts to."""
    drift, noise = [s / 2 for s in squared_steps], [math.sqrt(s * t) for s, t in zip(squared_steps, temperatures)]
    return Coefficients(drift, noise, [None] * len(drift))
