"""Annealed dynamics over noise levels, for energies E(x, condition, σ).

Source: Song and Ermon, NeurIPS 2019, algorithm 1; step sizes relative to σ², divided by the total weight M of
the composition. The composition is formed at every level. Samplers other than Langevin dynamics inside: Du et al.,
"Reduce, Reuse, Recycle", ICML 2023.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .._checks import positive_integer
from ..composition import Expression
from ..weights import weight_at
from .baoab import BAOAB
from .base import Dynamics
from .hmc import HMC
from .langevin import Langevin, LangevinKernel, LangevinState, StepByStep
from .mala import MALA
from .schedule import Coefficients

INNER = (Langevin, MALA, HMC, BAOAB)


@dataclass(frozen=True)
class Annealed(Dynamics):
    """A sampler that walks down a sequence of noise levels σ_1 > σ_2 > …

    At level σ, `steps_per_level` steps of `inner` with drift d = `drift`·σ²/M(σ); every leaf that takes one is called
    with `sigma=` σ. M is the expression's step scale. What d means depends on `inner`:

    - `Langevin`, and the proposals of `MALA`: x - d ∇E(x) + √(2 d T) z;
    - `HMC`, `BAOAB`: a step size ε = √(2 d), as one leapfrog step of mass 1 from a fresh momentum is the step above.
      One step of HMC is a whole trajectory. BAOAB carries its momentum from level to level, and its friction is in units
      of 1/σ, so that a step forgets as much at every level.

    MALA and HMC accept and reject at the level's own energies. With a `warmup`, a chain finds its step size anew at every
    level, beginning with the one above, in the level's first `warmup.steps` steps, and keeps it for the rest of the level: laws
    differ between levels in more than their scale. The steps after it leave the level's law invariant, so a run ends on the last
    level's; results show the acceptance and step sizes found there. (Tuning anew for each tempered law: Buchholz, Chopin and
    Jacob, Bayesian Analysis 2021.) With `denoise`, one last step without noise and drift σ²/M, never rejected: Tweedie's
    formula, exact for one noised density, a heuristic for compositions.

    Args:
        sigmas: noise levels in the order they are visited, positive, usually geometric and falling.
        steps_per_level: steps at each level.
        drift: step size as a fraction of σ².
        inner: `Langevin`, `MALA`, `HMC` or `BAOAB`, or an instance without a step size that carries the options:
            `temperature` (a number), clips, `clamp` or `bounds`, `n_leapfrog_steps`, `mass`, `friction`, `warmup` (of fewer steps
            than a level has).
        denoise: whether the last noise-free step is taken.

    Raises:
        ValueError: no levels, a level that is not positive, an `inner` with step sizes of its own, or a warm-up as long as a level.
    """

    sigmas: Sequence[float]
    steps_per_level: int = 6
    drift: float = 0.3
    inner: Langevin | MALA | HMC | BAOAB | type = Langevin
    denoise: bool = True

    def __post_init__(self):
        sigmas = tuple(float(s) for s in self.sigmas)
        if not sigmas or not all(math.isfinite(s) and s > 0 for s in sigmas):
            raise ValueError(f"`sigmas` must be one or more positive noise levels, got {sigmas}")
        object.__setattr__(self, "steps_per_level", positive_integer(self.steps_per_level, "`steps_per_level`"))
        if not (math.isfinite(self.drift) and self.drift > 0):
            raise ValueError(f"`drift` must be positive, got {self.drift}")
        if self.inner not in INNER and not isinstance(self.inner, INNER):
            raise TypeError(f"`inner` must be {', '.join(s.__name__ for s in INNER)} or an instance of one, got {self.inner!r}")
        inner = self.inner() if isinstance(self.inner, type) else self.inner
        if inner.step_size is not None or getattr(inner, "drift", None) is not None:
            raise ValueError("`inner` must not have step sizes: Annealed sets them at every level")
        warmup = getattr(inner, "warmup", None)
        if warmup is not None and warmup.steps >= self.steps_per_level:
            raise ValueError(
                f"the warm-up of `inner` must be shorter than a level of {self.steps_per_level} steps, got {warmup.steps}")
        heat = inner.temperature
        if not isinstance(heat, (int, float)):
            raise ValueError(f"`temperature` inside Annealed must be a number, got {heat!r}")
        if not isinstance(inner, Langevin) and not heat > 0:
            raise ValueError(f"`temperature` must be positive with {type(inner).__name__}, got {heat}")
        object.__setattr__(self, "sigmas", sigmas)
        object.__setattr__(self, "inner", inner)

    def __repr__(self):
        levels = ", ".join(f"{s:g}" for s in self.sigmas)
        if len(self.sigmas) > 4:
            levels = f"{self.sigmas[0]:g}, {self.sigmas[1]:.3g}, ..., {self.sigmas[-1]:g}"
        inner = "" if self.inner == Langevin() else f", inner={self.inner!r}"
        return (f"Annealed([{levels}], {len(self.sigmas)} levels x {self.steps_per_level} steps, drift={self.drift:g},"
                f" denoise={self.denoise}{inner})")

    @classmethod
    def geometric(cls, high: float, low: float, levels: int, **options: Any) -> Annealed:
        """`levels` noise levels from `high` to `low` in equal ratios."""
        if levels < 1 or (levels == 1 and high != low):
            raise ValueError(f"`levels` must be at least 2 to reach from {high} to {low}, got {levels}")
        ratio = (low / high) ** (1 / max(levels - 1, 1))
        return cls([high * ratio ** i for i in range(levels)], **options)

    @property
    def steps(self) -> int:
        """The number of steps of a whole run."""
        return len(self.sigmas) * self.steps_per_level + bool(self.denoise)

    @property
    def clamp(self) -> tuple[float, float] | None:
        """The bounds of the domain, where there are any."""
        return self.inner.clamp

    @property
    def needs_energies(self) -> bool:
        """Whether `inner` needs energies beside gradients."""
        return self.inner.needs_energies

    @property
    def carried(self) -> tuple[str, ...]:
        """What `inner` carries from step to step."""
        return self.inner.carried

    def carry(self, x, backend, **where):
        """What `inner` carries, where chains begin."""
        return self.inner.carry(x, backend, **where)

    def step_sizes(self, carried, coefficients: Coefficients) -> torch.Tensor | None:
        """Step sizes that chains adapted at the last level, `[n]`; None where they did not."""
        drift, noise, sigma = (v[:-1] if self.denoise else v for v in (coefficients.drift, coefficients.noise, coefficients.sigma))
        return self.inner.step_sizes(carried, Coefficients(drift, noise, sigma))

    def noise_levels(self) -> tuple[float, ...]:
        """Noise levels at which energies are taken."""
        return self.sigmas

    def initial_scale(self) -> float:
        """Standard deviation of `init="normal"`: the first noise level."""
        return self.sigmas[0]

    def native_options(self) -> dict | None:
        """What the chain engine has to know of a step beside its coefficients; None: it cannot take these steps."""
        return self.inner.native_options() if isinstance(self.inner, Langevin) else None

    def coefficients(self, expression: Expression, steps: int, start: int = 0) -> Coefficients:
        """Drift, noise and level of steps `start` to `start + steps - 1`."""
        heat, drift, noise, sigma = self.inner.temperature, [], [], []
        for level in self.sigmas:
            scale = level * level / (weight_at(expression.step_scale, level) or 1.0)
            drift += [self.drift * scale] * self.steps_per_level
            noise += [math.sqrt(2 * self.drift * scale * heat)] * self.steps_per_level
            sigma += [level] * self.steps_per_level
        if self.denoise:
            drift, noise, sigma = [*drift, scale], [*noise, 0.0], [*sigma, level]
        stop = start + steps
        return Coefficients(drift[start:stop], noise[start:stop], sigma[start:stop])

    def bind(self, evaluator, backend, coefficients: Coefficients, start: int, **fixed):
        """`init` and `advance` on one micro-batch: those of `inner`, and for the last step those of plain descent."""
        kernel = self.inner.bind(evaluator, backend, coefficients, start, **fixed)
        if not self.denoise or isinstance(self.inner, Langevin):
            return kernel
        clips = {name: getattr(self.inner, name, None) for name in ("grad_clip_value", "grad_clip_norm")}
        descent = Langevin(clamp=self.inner.clamp, **clips).bind(evaluator, backend, coefficients, start, **fixed)
        return DenoisingKernel(kernel, descent, self.steps - 1)


class DenoisingKernel(StepByStep):
    """Steps of `inner` up to step `last`, which is one of `descent`."""

    def __init__(self, inner, descent: LangevinKernel, last: int):
        self.inner, self.descent, self.last = inner, descent, last

    def init(self, x: torch.Tensor, step=None, faults=None, carried=None) -> LangevinState:
        """The state of chains `x` `[B, *S]` before step `step`."""
        state = self.inner.init(x, step, faults, carried)
        self.descent.init(state.x, state.step, state.faults)
        return state

    @property
    def captured(self) -> bool:
        """Whether gradients are replayed from a recording."""
        return self.inner.captured

    def acceptance(self):
        """The share of proposals that each chain accepted since `init`; the last step is none."""
        return self.inner.acceptance()

    def catch_up(self, state: LangevinState, row: int, step: int) -> None:
        """Bring a chain that starts anew at `step` to where the others are."""
        self.inner.catch_up(state, row, step)

    def forget(self) -> None:
        """States or models may have been changed: what is known of the target is not true any more."""
        self.inner.forget()

    def step(self, state: LangevinState):
        """One step of every chain that has no fault."""
        if state.step < self.last:
            return self.inner.step(state)
        after, info = self.descent.step(state)
        return after._replace(carried=state.carried), info
