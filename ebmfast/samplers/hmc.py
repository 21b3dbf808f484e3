"""Hamiltonian Monte Carlo: leapfrog trajectories from fresh momenta, accepted or rejected per chain.

    p ~ N(0, m T);  L times:  p <- p - (ε/2) ∇E(x),  x <- x + ε p/m,  p <- p - (ε/2) ∇E(x)
    accepted with probability min(1, exp(-(H(y, p') - H(x, p))/T)),  H = E + p²/(2m)

Sources: Duane et al., Physics Letters B 1987; Neal, Handbook of Markov Chain Monte Carlo 2011, chapter 5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from .. import rng
from .._checks import positive_integer
from ..chain import BoundChain
from .base import check_mass, mass_like
from .metropolis import Metropolis, MetropolisChain, MetropolisKernel, check_bounds, coefficients, plus
from .schedule import Coefficients, Schedule
from .warmup import DualAveraging


@dataclass(frozen=True)
class HMC(Metropolis):
    """Hamiltonian Monte Carlo with a diagonal mass; the law of a chain tends to p^(1/T).

    One step of the sampler is one trajectory of `n_leapfrog_steps` gradients.

    Args:
        step_size: ε, positive: a number, a sequence with one value per step, or a callable of the step. In units of x
            times the square root of mass per unit of energy. An acceptance near 0.65 is about best. Left out inside `Annealed`,
            which sets it.
        n_leapfrog_steps: L, 1 or more.
        mass: m, a positive number or a tensor that broadcasts to one chain's shape S.
        temperature: T, positive: as `step_size`.
        bounds: `(low, high)` for every element: trajectories that end outside are rejected.
        warmup: `DualAveraging(steps)`: each chain scales ε to the acceptance it is to have, then keeps it; see `r.step_size`.

    Raises:
        ValueError: L below 1, a mass that is not positive, a bound that is not one; at the call, a step size or
            temperature of 0.
    """

    step_size: Schedule | None = None
    n_leapfrog_steps: int = 10
    mass: float | torch.Tensor = field(default=1.0, hash=False, compare=False)
    temperature: Schedule = 1.0
    bounds: tuple[float, float] | None = None
    warmup: DualAveraging | None = None

    best_acceptance = 0.8
    stream = rng.MOMENTUM

    def __post_init__(self):
        self.settle()
        object.__setattr__(self, "bounds", check_bounds(self.bounds))
        object.__setattr__(self, "n_leapfrog_steps", positive_integer(self.n_leapfrog_steps, "`n_leapfrog_steps`"))
        check_mass(self.mass)

    def coefficients(self, expression, steps: int, start: int = 0) -> Coefficients:
        """Drift ε²/2 and noise ε√T: those of Langevin dynamics that one leapfrog step of mass 1 amounts to."""
        sizes, heat = self.scales(steps, start)
        return coefficients([s * s for s in sizes], heat)

    def step_sizes(self, carried, coefficients: Coefficients) -> torch.Tensor | None:
        """ε of the last step, as the warm-up left it, `[n]`."""
        scale = self.step_scale(carried)
        return None if scale is None else math.sqrt(2 * coefficients.drift[-1]) * scale

    def native_options(self) -> dict:
        """What the chain engine has to know of a step beside its coefficients."""
        return {"metropolis": "hmc", "clamp": self.bounds, "leapfrogs": self.n_leapfrog_steps, "mass": self.mass}

    def bind(self, evaluator, backend, coefficients: Coefficients, start: int, **fixed) -> HMCKernel | MetropolisChain:
        """`init` and `advance` on one micro-batch; `fixed`: seed, first_chain, frozen_mask."""
        if isinstance(evaluator, BoundChain):
            return MetropolisChain(self, evaluator, coefficients, start, **fixed)
        return HMCKernel(self, evaluator, backend, coefficients, start, **fixed)


class HMCKernel(MetropolisKernel):
    """Trajectories of one micro-batch."""

    def init(self, x, step=None, faults=None, carried=None):
        self._mass = mass_like(self.sampler.mass, x)
        return super().init(x, step, faults, carried)

    def propose(self, x, here, t, drift, noise, temperature):
        size = (2 * drift) ** 0.5
        p = self.backend.normal(x.shape[1:], len(x), step=t, stream=rng.MOMENTUM, device=x.device, **self.noise_id).to(x.dtype)
        p.mul_((self._mass * temperature).sqrt())
        if self.frozen_mask is not None:
            p.masked_fill_(self.frozen_mask, 0.0)
        before = self._kinetic(p)
        y, there, kick = x, here, size / 2
        for _ in range(self.sampler.n_leapfrog_steps):
            p = plus(p, -kick, there.gradient)
            y = plus(y, size, p / self._mass)
            there, kick = self.target(y), size  # two half kicks at one point are a whole one
        p = plus(p, -size / 2, there.gradient)
        return y, there, (here.energy - there.energy).add_(before).sub_(self._kinetic(p)).div_(temperature)

    def _kinetic(self, p: torch.Tensor) -> torch.Tensor:
        return (p.square() / (2 * self._mass)).reshape(len(p), -1).sum(1)
