"""Annealed Langevin dynamics over noise levels, for energies E(x, condition, σ).

Source: Song and Ermon, NeurIPS 2019, algorithm 1; step sizes relative to σ², divided by the total weight M of
the composition. The composition is formed at every level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..composition import Expression
from ..weights import weight_at
from .langevin import Langevin
from .schedule import Coefficients


@dataclass(frozen=True)
class Annealed:
    """Langevin dynamics that walks down a sequence of noise levels σ_1 > σ_2 > …

    At level σ, `steps_per_level` steps with drift d = `drift`·σ²/M(σ) and noise √(2 d T); every leaf that takes
    one is called with `sigma=` σ. M is the expression's step scale. With `denoise`, one last step without noise
    and drift σ²/M: Tweedie's formula, exact for one noised density, a heuristic for compositions.

    Args:
        sigmas: noise levels in the order they are visited, positive, usually geometric and falling.
        steps_per_level: steps at each level.
        drift: step size as a fraction of σ².
        inner: `Langevin`, or an instance that carries `noise_first`, `clamp`, clips and `temperature`.
        denoise: whether the last noise-free step is taken.

    Raises:
        ValueError: no levels, a level that is not positive, or an `inner` with step sizes of its own.
    """

    sigmas: Sequence[float]
    steps_per_level: int = 6
    drift: float = 0.3
    inner: Langevin | type[Langevin] = Langevin
    denoise: bool = True

    def __post_init__(self):
        sigmas = tuple(float(s) for s in self.sigmas)
        if not sigmas or not all(math.isfinite(s) and s > 0 for s in sigmas):
            raise ValueError(f"`sigmas` must be one or more positive noise levels, got {sigmas}")
        if int(self.steps_per_level) < 1:
            raise ValueError(f"`steps_per_level` must be at least 1, got {self.steps_per_level}")
        if not (math.isfinite(self.drift) and self.drift > 0):
            raise ValueError(f"`drift` must be positive, got {self.drift}")
        inner = self.inner() if isinstance(self.inner, type) else self.inner
        if not isinstance(inner, Langevin):
            raise TypeError(f"`inner` must be Langevin or an instance of it, got {self.inner!r}")
        if inner.step_size is not None or inner.drift is not None:
            raise ValueError("`inner` must not have step sizes: Annealed sets drift and noise at every level")
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
    def geometric(cls, high: float, low: float, levels: int, **options) -> Annealed:
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

    def noise_levels(self) -> tuple[float, ...]:
        """Noise levels at which energies are taken."""
        return self.sigmas

    def initial_scale(self) -> float:
        """Standard deviation of `init="normal"`: the first noise level."""
        return self.sigmas[0]

    def native_options(self) -> dict:
        """What the chain engine has to know of a step beside its coefficients."""
        return self.inner.native_options()

    @property
    def fixed_schedule(self) -> bool:
        """Whether the coefficients of a step are the same in every call."""
        return True

    def coefficients(self, expression: Expression, steps: int, start: int = 0) -> Coefficients:
        """Drift, noise and level of steps `start` to `start + steps - 1`."""
        heat = self.inner.temperature
        if not isinstance(heat, (int, float)):
            raise ValueError(f"`temperature` inside Annealed must be a number, got {heat!r}")
        drift, noise, sigma = [], [], []
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
        """`init` and `step` on one micro-batch, those of `inner`."""
        return self.inner.bind(evaluator, backend, coefficients, start, **fixed)
