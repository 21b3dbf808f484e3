"""The Metropolis-adjusted Langevin algorithm: Langevin proposals, each accepted or rejected per chain.

    y = x - (λ/2) clip(∇E(x)) + √(λT) z,   accepted with probability min(1, p(y) q(x|y) / (p(x) q(y|x))),  p ∝ exp(-E/T)

Source: Roberts and Tweedie, Bernoulli 1996.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .metropolis import Metropolis, MetropolisKernel, check_bounds, coefficients, squared_norm
from .schedule import Coefficients, Schedule


@dataclass(frozen=True)
class MALA(Metropolis):
    """Langevin dynamics without its step-size bias: the law of a chain tends to p^(1/T) for any step size.

    Args:
        step_size: λ, positive: a number, a sequence with one value per step, or a callable of the step. In units of
            x² per unit of energy. An acceptance near 0.57 is about best.
        temperature: T, positive, likewise.
        bounds: `(low, high)` for every element: proposals outside are rejected.
        grad_clip_value: elementwise bound on the composed gradient; applied before the norm's.
        grad_clip_norm: bound on the L2 norm of the composed gradient, per chain. The proposal's density is that of the
            clipped drift, so the law stays exact.

    Raises:
        ValueError: a bound that is not one; at the call, a step size or temperature of 0.
    """

    step_size: Schedule
    temperature: Schedule = 1.0
    bounds: tuple[float, float] | None = None
    grad_clip_norm: float | None = None
    grad_clip_value: float | None = None

    def __post_init__(self):
        object.__setattr__(self, "bounds", check_bounds(self.bounds))
        for name in ("grad_clip_norm", "grad_clip_value"):
            bound = getattr(self, name)
            if bound is not None and not bound > 0:
                raise ValueError(f"`{name}` must be positive, got {bound}")

    def coefficients(self, expression, steps: int, start: int = 0) -> Coefficients:
        """Drift and noise of steps `start` to `start + steps - 1`."""
        return coefficients(*self.scales(steps, start))

    def bind(self, evaluator, backend, coefficients: Coefficients, start: int, **fixed) -> MALAKernel:
        """`init` and `advance` on one micro-batch; `fixed`: seed, first_chain, frozen_mask."""
        return MALAKernel(self, evaluator, backend, coefficients, start, **fixed)


class MALAKernel(MetropolisKernel):
    """MALA steps of one micro-batch; proposals are made by the backend's fused step."""

    def init(self, x, step=None, faults=None):
        self._y = torch.empty_like(x)
        self._lost = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        self._one = torch.ones(1, device=x.device)
        self._move = self.backend.prepare(
            self._y, n_gradients=1, gradient_dtype=x.dtype, frozen_mask=self.frozen_mask, faults=self._lost, **self.noise_id)
        return super().init(x, step, faults)

    def clipped(self, gradient):
        sampler = self.sampler
        if sampler.grad_clip_value is not None:
            gradient = gradient.clamp(-sampler.grad_clip_value, sampler.grad_clip_value)
        if sampler.grad_clip_norm is not None:
            norm = squared_norm(gradient).sqrt().clamp_min(sampler.grad_clip_norm)
            gradient = gradient * (sampler.grad_clip_norm / norm).reshape(-1, *[1] * (gradient.ndim - 1))
        return gradient.contiguous()

    def propose(self, x, here, t, drift, noise, temperature):
        y = self._y.copy_(x)
        self._lost.zero_()
        self._move((here.gradient,), self._one, drift, noise, t)
        there = self.target(y)
        # log q(x|y) - log q(y|x), both Gaussians of variance noise²
        forth = squared_norm(y - x + drift * here.gradient)
        back = squared_norm(x - y + drift * there.gradient)
        log_ratio = (here.energy - there.energy) / temperature + (forth - back) / (2 * noise * noise)
        return y, there, torch.where(self._lost == 0, log_ratio, -torch.inf)
