"""Underdamped Langevin dynamics without a Metropolis correction, by the BAOAB splitting.

    B  p <- p - (h/2) ∇E(x)
    A  x <- x + (h/2) p/m
    O  p <- c p + √((1 - c²) m T) z,   c = exp(-γh),   z ~ N(0, I)
    A, B again

The positions' law is off by O(h²) in general, by O(h⁴) at high friction, and not at all for harmonic energies.

Source: Leimkuhler and Matthews, Applied Mathematics Research eXpress 2013 (1), 34-56.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from .. import rng
from .base import Dynamics, check_mass, mass_like
from .langevin import LangevinInfo, LangevinState, StepByStep
from .schedule import Coefficients, Schedule, positive, value_at


@dataclass(frozen=True)
class BAOAB(Dynamics):
    """Underdamped Langevin dynamics, x' = p/m, p' = -∇E - γp + √(2γmT) ξ; one gradient per step.

    The momentum is a part of a chain's state: it starts as N(0, mT), and results and saved states carry it.

    Args:
        step_size: h, positive: a number, a sequence with one value per step, or a callable of the step. In units of x times
            the square root of mass per unit of energy; steps are stable below 2√(m/k), k the greatest curvature. Left out
            inside `Annealed`, which sets it.
        friction: γ, positive, per unit of time (that of h); inside `Annealed`, in units of 1/σ at each level σ.
        mass: m, a positive number or a tensor that broadcasts to one chain's shape S.
        temperature: T, positive, likewise a schedule.

    Raises:
        ValueError: a friction or mass that is not positive; at the call, a step size or temperature of 0.
    """

    step_size: Schedule | None = None
    friction: float = 1.0
    mass: float | torch.Tensor = field(default=1.0, hash=False, compare=False)
    temperature: Schedule = 1.0

    carried = ("momentum",)

    def __post_init__(self):
        self.settle()
        if not (math.isfinite(self.friction) and self.friction > 0):
            raise ValueError(f"`friction` must be positive, got {self.friction}")
        check_mass(self.mass)

    def coefficients(self, expression, steps: int, start: int = 0) -> Coefficients:
        """Drift h²/2 and noise h√T: those of Langevin dynamics that one step of mass 1 at infinite friction amounts to."""
        sizes = positive(self.step_size, "step_size", steps, start)
        heat = positive(self.temperature, "temperature", steps, start)
        return Coefficients([h * h / 2 for h in sizes], [h * math.sqrt(t) for h, t in zip(sizes, heat)], [None] * steps)

    def carry(self, x, backend, *, step, seed, first_chain, frozen_mask=None):
        """Momenta ~ N(0, mT) of chains that begin before step `step`, from their momentum stream."""
        p = backend.normal(x.shape[1:], len(x), seed=seed, step=step, stream=rng.MOMENTUM, first_chain=first_chain,
                           device=x.device).to(x.dtype)
        p.mul_(mass_like(self.mass, x).sqrt()).mul_(math.sqrt(value_at(self.temperature, step)))
        return {"momentum": p if frozen_mask is None else p.masked_fill_(frozen_mask, 0.0)}

    def bind(self, evaluator, backend, coefficients: Coefficients, start: int, **fixed) -> BAOABKernel:
        """`init` and `advance` on one micro-batch; `fixed`: seed, first_chain, frozen_mask."""
        return BAOABKernel(self, evaluator, backend, coefficients, start, **fixed)


class BAOABKernel(StepByStep):
    """Steps of one micro-batch: `init(x) -> state`, `step(state) -> (state, info)`.

    `step` updates `state.x`, `state.faults` and the momentum in place. Kicks and moves are the backend's fused step, which
    keeps a chain where it last was finite and names the leaf to blame.
    """

    def __init__(self, sampler: BAOAB, evaluator, backend, coefficients: Coefficients, start: int, *, seed: int,
                 first_chain: int, frozen_mask: torch.Tensor | None = None):
        self.sampler, self.evaluator, self.backend = sampler, evaluator, backend
        self.coefficients, self.start = coefficients, start
        self.noise_id = {"seed": seed, "first_chain": first_chain}
        self.frozen_mask = frozen_mask

    @property
    def captured(self) -> bool:
        """Whether gradients are replayed from a recording."""
        return getattr(self.evaluator, "replays", False)

    def init(self, x, step=None, faults=None, carried=None) -> LangevinState:
        """The state of chains `x` `[B, *S]` before step `step`."""
        step = self.start if step is None else step
        if faults is None:
            faults = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        if carried is None:
            carried = self.sampler.carry(x, self.backend, step=step, frozen_mask=self.frozen_mask, **self.noise_id)
        leaves = self.evaluator.n_gradients
        self._ones = torch.ones(leaves, dtype=torch.float32, device=x.device)
        self._one = self._ones.new_ones(1)
        options = dict(self.noise_id, frozen_mask=self.frozen_mask, faults=faults, gradient_dtype=x.dtype)
        self._kick = self.backend.prepare(carried["momentum"], n_gradients=leaves, **options)
        self._move = self.backend.prepare(x, n_gradients=1, **options)
        self._mass, self._velocity = mass_like(self.sampler.mass, x), torch.empty_like(x)
        self._spread = self._mass.sqrt()
        if self.frozen_mask is not None:
            self._spread = self._spread.expand_as(x).masked_fill(self.frozen_mask, 0.0)
        self._gradients = self._sigma = None
        return LangevinState(x, step, faults, carried)

    def catch_up(self, state: LangevinState, row: int, step: int) -> None:
        """A chain was drawn anew: so is its momentum, and what is known of gradients is not true any more."""
        frozen = self.frozen_mask
        frozen = frozen[row:row + 1] if frozen is not None and frozen.ndim == state.x.ndim else frozen
        where = dict(self.noise_id, first_chain=self.noise_id["first_chain"] + row)
        drawn = self.sampler.carry(state.x[row:row + 1], self.backend, step=step, frozen_mask=frozen, **where)
        state.carried["momentum"][row] = drawn["momentum"][0]
        self.forget()

    def forget(self) -> None:
        """States or models may have been changed: what is known of gradients is not true any more."""
        self._gradients = None

    def step(self, state: LangevinState) -> tuple[LangevinState, LangevinInfo]:
        """One step of every chain that has no fault."""
        x, t, faults, carried = state
        p, i = carried["momentum"], t - self.start
        drift, noise, sigma = self.coefficients.drift[i], self.coefficients.noise[i], self.coefficients.sigma[i]
        h, temperature = math.sqrt(2 * drift), noise * noise / (2 * drift)
        keep = math.exp(-self.sampler.friction * h / (sigma or 1.0))
        if self._gradients is None or sigma != self._sigma:
            self._gradients, _ = self.evaluator.gradients(x, sigma)
            self._sigma = sigma
        self._kick(self._gradients, self._ones, h / 2, 0.0, t)
        self._velocity.copy_(p)
        z = self.backend.normal(x.shape[1:], len(x), step=t, device=x.device, **self.noise_id).to(x.dtype)
        p.mul_(keep).add_(z.mul_(self._spread), alpha=math.sqrt((1 - keep * keep) * temperature))
        self._velocity.add_(p).div_(self._mass)  # twice the mean of before and after: both A at once
        self._move((self._velocity,), self._one, -h / 2, 0.0, t)
        self._gradients, energies = self.evaluator.gradients(x, sigma)
        self._kick(self._gradients, self._ones, h / 2, 0.0, t)
        return LangevinState(x, t + 1, faults, carried), LangevinInfo(energies)
