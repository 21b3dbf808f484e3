"""The Metropolis-adjusted Langevin algorithm: Langevin proposals, each accepted or rejected per chain.

    y = x - (λ/2) clip(∇E(x)) + √(λT) z,   accepted with probability min(1, p(y) q(x|y) / (p(x) q(y|x))),  p ∝ exp(-E/T)

Source: Roberts and Tweedie, Bernoulli 1996.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..chain import BoundChain
from .metropolis import Metropolis, MetropolisChain, MetropolisKernel, check_bounds, coefficients, plus, squared_norm
from .schedule import Coefficients, Schedule
from .warmup import DualAveraging


@dataclass(frozen=True)
class MALA(Metropolis):
    """Langevin dynamics without its step-size bias: the law of a chain tends to p^(1/T) for any step size.

    Args:
        step_size: λ, positive: a number, a sequence with one value per step, or a callable of the step. In units of
            x² per unit of energy. An acceptance near 0.57 is about best. Left out inside `Annealed`, which sets it.
        temperature: T, positive, likewise.
        bounds: `(low, high)` for every element: proposals outside are rejected.
        grad_clip_value: elementwise bound on the composed gradient; applied before the norm's.
        grad_clip_norm: bound on the L2 norm of the composed gradient, per chain. The proposal's density is that of the
            clipped drift, so the law stays exact.
        warmup: `DualAveraging(steps)`: each chain scales λ to the acceptance it is to have, then keeps it; see `r.step_size`.

    Raises:
        ValueError: a bound that is not one; at the call, a step size or temperature of 0.
    """

    step_size: Schedule | None = None
    temperature: Schedule = 1.0
    bounds: tuple[float, float] | None = None
    grad_clip_norm: float | None = None
    grad_clip_value: float | None = None
    warmup: DualAveraging | None = None

    best_acceptance = 0.574

    def __post_init__(self):
        self.settle()
        object.__setattr__(self, "bounds", check_bounds(self.bounds))
        for name in ("grad_clip_norm", "grad_clip_value"):
            bound = getattr(self, name)
            if bound is not None and not bound > 0:
                raise ValueError(f"`{name}` must be positive, got {bound}")

    def coefficients(self, expression, steps: int, start: int = 0) -> Coefficients:
        """Drift and noise of steps `start` to `start + steps - 1`."""
        return coefficients(*self.scales(steps, start))

    def step_sizes(self, carried, coefficients: Coefficients) -> torch.Tensor | None:
        """λ of the last step, as the warm-up left it, `[n]`."""
        scale = self.step_scale(carried)
        return None if scale is None else 2 * coefficients.drift[-1] * scale.square()

    def native_options(self) -> dict:
        """What the chain engine has to know of a step beside its coefficients."""
        return {"metropolis": "mala", "clamp": self.bounds, "clip_value": self.grad_clip_value, "clip_norm": self.grad_clip_norm}

    def bind(self, evaluator, backend, coefficients: Coefficients, start: int, **fixed) -> MALAKernel | MetropolisChain:
        """`init` and `advance` on one micro-batch; `fixed`: seed, first_chain, frozen_mask."""
        if isinstance(evaluator, BoundChain):
            return MetropolisChain(self, evaluator, coefficients, start, **fixed)
        return MALAKernel(self, evaluator, backend, coefficients, start, **fixed)


class MALAKernel(MetropolisKernel):
    """MALA steps of one micro-batch."""

    def init(self, x, step=None, faults=None, carried=None):
        # Adding the noise of a step to zeros leaves that noise, 0 where frozen, in memory that is there already.
        self._z = torch.empty_like(x)
        self._draw = self.backend.prepare(
            self._z, n_gradients=0, gradient_dtype=x.dtype, frozen_mask=self.frozen_mask, **self.noise_id)
        return super().init(x, step, faults, carried)

    def clipped(self, gradient):
        sampler = self.sampler
        if sampler.grad_clip_value is not None:
            gradient = gradient.clamp(-sampler.grad_clip_value, sampler.grad_clip_value)
        if sampler.grad_clip_norm is not None:
            norm = squared_norm(gradient).sqrt().clamp_min(sampler.grad_clip_norm)
            gradient = gradient * (sampler.grad_clip_norm / norm).reshape(-1, *[1] * (gradient.ndim - 1))
        return gradient

    def propose(self, x, here, t, drift, noise, temperature):
        z = self._z.zero_()
        self._draw((), None, 0.0, 1.0, t)
        y = plus(plus(x, -drift, here.gradient), noise, z)
        there = self.target(y)
        # With b the noise that leads back, z + b = (drift/noise) (g + g') = c; log q(x|y) - log q(y|x) = (z² - b²)/2 = c (z - c/2).
        c = (here.gradient + there.gradient).mul_(drift / noise)
        densities = z.sub_(c, alpha=0.5).mul_(c).reshape(len(z), -1).sum(1)
        return y, there, (here.energy - there.energy).div_(temperature).add_(densities)
