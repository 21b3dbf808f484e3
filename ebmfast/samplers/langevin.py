"""Unadjusted Langevin dynamics.

    x <- clamp( x - drift · clip(∇E(x)) + noise · z ),   z ~ N(0, I)

Sources: Welling and Teh, ICML 2011; Du, Li and Mordatch, NeurIPS 2020, equation 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from time import perf_counter
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from ..chain import BoundChain
from ..composition import Expression
from .base import Dynamics
from .schedule import Coefficients, Schedule, values


class LangevinState(NamedTuple):
    """Chains `x` `[B, *S]`, the step they take next, per chain the fault that stopped it (0: none), and what else a
    chain carries from step to step (`Dynamics.carried`), `[B, ...]` each."""

    x: torch.Tensor
    step: int
    faults: torch.Tensor
    carried: Mapping[str, torch.Tensor] = MappingProxyType({})


class LangevinInfo(NamedTuple):
    """Leaf energies `K × [B]` at the point where the gradient was taken."""

    leaf_energies: list[torch.Tensor]


@dataclass(frozen=True)
class Langevin(Dynamics):
    """Unadjusted Langevin dynamics, in every convention in use.

    `Langevin(step_size=λ, temperature=T)` has drift λ/2 and noise √(λT), so that its law tends to
    p^(1/T) as λ → 0; `Langevin(drift=, noise=)` sets both coefficients of

        x <- clamp( x - drift · clip(∇E(x)) + noise · z )

    Args:
        step_size, temperature, drift, noise: numbers, sequences with one value per step, or callables of the
            step. Units: x² per unit of energy for `step_size` and `drift`, those of x for `noise`.
        noise_first: x <- x + noise · z, then the gradient there, then the drift and the clamp.
        clamp: `(low, high)` for every element, after each step.
        grad_clip_value: elementwise bound on the composed gradient; applied before the norm's.
        grad_clip_norm: bound on the L2 norm of the composed gradient, per chain.

    Raises:
        ValueError: both or neither of the two parametrisations, or a bound that is not one.
    """

    step_size: Schedule | None = None
    temperature: Schedule = 1.0
    drift: Schedule | None = None
    noise: Schedule | None = None
    noise_first: bool = False
    clamp: tuple[float, float] | None = None
    grad_clip_norm: float | None = None
    grad_clip_value: float | None = None

    def __post_init__(self):
        self.settle()
        free = (self.drift is not None, self.noise is not None)
        if self.step_size is not None and any(free):
            raise ValueError("Langevin takes `step_size` (and `temperature`) or `drift` and `noise`, not both")
        if any(free) and not all(free):
            raise ValueError("Langevin needs `drift` and `noise` together")
        if all(free) and self.temperature != 1.0:
            raise ValueError("`temperature` belongs to `step_size`; with `drift` and `noise` it is noise²/(2·drift)")
        if self.clamp is not None:
            low, high = map(float, self.clamp)
            if not low < high:
                raise ValueError(f"`clamp` must be (low, high) with low < high, got {self.clamp}")
            object.__setattr__(self, "clamp", (low, high))
        for name in ("grad_clip_norm", "grad_clip_value"):
            bound = getattr(self, name)
            if bound is not None and not bound > 0:
                raise ValueError(f"`{name}` must be positive, got {bound}")

    def __repr__(self):
        changed = (f for f in fields(self) if getattr(self, f.name) != f.default)
        return f"Langevin({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in changed)})"

    @classmethod
    def paper(cls, step_size: float = 1.0, **options: Any) -> Langevin:
        """The rule as printed: x - (λ/2)∇E + ω, ω ~ N(0, λ). Source: Du et al. 2020, equation 2."""
        return cls(step_size=step_size, **options)

    @classmethod
    def reference_code(cls, step: float = 100.0, sigma: float = 0.001, clamp: tuple[float, float] | None = (0.0, 1.0),
                       **options: Any) -> Langevin:
        """What the paper's code runs: noise first, drift and noise apart, clamped to the data range.

        Its effective temperature, σ²/(2·step) = 5e-9 at these settings, makes it descent, not sampling.
        """
        return cls(drift=step, noise=sigma, noise_first=True, clamp=clamp, **options)

    def native_options(self) -> dict:
        """What the chain engine has to know of a step beside its coefficients."""
        return {"noise_first": self.noise_first, "clamp": self.clamp, "clip_value": self.grad_clip_value,
                "clip_norm": self.grad_clip_norm}

    def coefficients(self, expression: Expression, steps: int, start: int = 0) -> Coefficients:
        """Drift and noise of steps `start` to `start + steps - 1`."""
        if self.step_size is None and self.drift is None:
            raise ValueError("Langevin needs `step_size`, or `drift` and `noise`")
        if self.step_size is None:
            drift, noise = values(self.drift, "drift", steps, start), values(self.noise, "noise", steps, start)
        else:
            sizes = values(self.step_size, "step_size", steps, start)
            heat = values(self.temperature, "temperature", steps, start)
            drift, noise = [s / 2 for s in sizes], [math.sqrt(s * t) for s, t in zip(sizes, heat)]
        return Coefficients(drift, noise, [None] * steps)

    def bind(self, evaluator, backend, coefficients: Coefficients, start: int, **fixed) -> LangevinKernel | ChainKernel:
        """`init` and `advance` on one micro-batch; `fixed`: seed, first_chain, frozen_mask."""
        if isinstance(evaluator, BoundChain):
            return ChainKernel(evaluator, coefficients, start, **fixed)
        return LangevinKernel(self, evaluator, backend, coefficients, start, fixed)


class Kernel:
    """What the driver asks of chains that run, with the answers of those that are never rejected."""

    stride = 1  # steps that `advance` is best asked for
    energies_here = False  # whether the energies of `info` are those where chains stand after the step
    knows_energy = False  # whether `energy` may be asked

    def acceptance(self) -> torch.Tensor | None:
        """The share of proposals that each chain accepted since `init`, `[B]`; None where every step is taken."""
        return None

    def forget(self) -> None:
        """States or models may have been changed: what is known of the target is not true any more."""


class StepByStep(Kernel):
    """Kernels that take one step at a time: `advance` is a loop over `step`."""

    info: LangevinInfo | None = None  # of the last step
    knows_energy = True

    @torch.no_grad()
    def energy(self, evaluator, sigma: float | None) -> torch.Tensor:
        """The composition's energy in the last step, `[B]`."""
        return evaluator.total([e.detach() for e in self.info.leaf_energies], sigma)

    def advance(self, state: LangevinState, until: int) -> LangevinState:
        """Steps up to, and without, step `until`."""
        while state.step < until:
            state, self.info = self.step(state)
        return state

    def suspect(self, state: LangevinState) -> bool:
        """Whether faults have to be looked at, which waits for the device."""
        return True


class LangevinKernel(StepByStep):
    """Langevin steps of one micro-batch: `init(x) -> state`, `step(state) -> (state, info)`.

    `step` updates `state.x` and `state.faults` in place.
    """

    def __init__(self, sampler: Langevin, evaluator, backend, coefficients: Coefficients, start: int, fixed: dict):
        self.sampler, self.evaluator, self.backend = sampler, evaluator, backend
        self.coefficients, self.start = coefficients, start
        self.fixed = fixed  # seed, first_chain, frozen_mask
        self.options = {name: getattr(sampler, name) for name in ("clamp", "grad_clip_value", "grad_clip_norm")}

    def init(self, x: torch.Tensor, step: int | None = None, faults: torch.Tensor | None = None,
             carried: Mapping | None = None) -> LangevinState:
        """The state of chains `x` `[B, *S]` before step `step`; prepares the backend for this very tensor."""
        if faults is None:
            faults = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        leaves = self.evaluator.n_gradients
        options = dict(self.fixed, faults=faults, gradient_dtype=x.dtype)
        self._ones = torch.ones(leaves, dtype=torch.float32, device=x.device)  # gradients come weighted
        self._move = self.backend.prepare(x, n_gradients=leaves, **self.options, **options)
        self._perturb = self.backend.prepare(x, n_gradients=0, **options) if self.sampler.noise_first else None
        return LangevinState(x, self.start if step is None else step, faults)

    def catch_up(self, state: LangevinState, row: int, step: int) -> None:
        """Bring a chain that starts anew at `step` to where the others are: it is there, for each step is looked at."""

    def step(self, state: LangevinState) -> tuple[LangevinState, LangevinInfo]:
        """One step of every chain that has no fault."""
        x, t, faults, _ = state
        i = t - self.start
        drift, noise, sigma = self.coefficients.drift[i], self.coefficients.noise[i], self.coefficients.sigma[i]
        if self._perturb is not None:
            self._perturb((), None, 0.0, noise, t)
            noise = 0.0
        gradients, energies = self.evaluator.gradients(x, sigma)
        self._move(gradients, self._ones, drift, noise, t)
        return LangevinState(x, t + 1, faults), LangevinInfo(energies)


class ChainKernel(Kernel):
    """Langevin steps of chains that run whole in the chain engine: `init(x) -> state`, `advance(state, until) -> state`.

    `advance` updates `state.x` and `state.faults` in place. `stride` keeps a call near `PATIENCE` seconds, so that
    interrupts and progress bars are served; it never changes a result.
    """

    PATIENCE = 0.05

    def __init__(self, bound: BoundChain, coefficients: Coefficients, start: int, *, seed: int, first_chain: int,
                 frozen_mask: torch.Tensor | None = None):
        self.chain, self.conditions = bound.chain, bound.conditions
        self.coefficients, self.start = coefficients, start
        self.seed, self.first_chain, self.frozen_mask = seed, first_chain, frozen_mask

    def init(self, x: torch.Tensor, step: int | None = None, faults: torch.Tensor | None = None,
             carried: Mapping | None = None) -> LangevinState:
        """The state of chains `x` `[B, *S]` before step `step`."""
        if faults is None:
            faults = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        self.stride = max(1, self.chain.steps_within(self.PATIENCE, x.shape[0]))
        return LangevinState(x, self.start if step is None else step, faults)

    def advance(self, state: LangevinState, until: int) -> LangevinState:
        """Steps up to, and without, step `until`."""
        began, steps = perf_counter(), until - state.step
        self._run(state.x, state.faults, state.step, until, slice(None))
        seconds = perf_counter() - began
        if self.chain.paced and (seconds > 2 * self.PATIENCE or (steps == self.stride and seconds < self.PATIENCE / 2)):
            self.stride = max(1, int(steps * self.PATIENCE / max(seconds, 1e-6)))
        return state._replace(step=until)

    def suspect(self, state: LangevinState) -> bool:
        """Whether faults have to be looked at."""
        return True

    def catch_up(self, state: LangevinState, row: int, step: int) -> None:
        """Bring a chain that starts anew at `step` to where the others are."""
        if step < state.step:
            rows = slice(row, row + 1)
            self._run(state.x[rows], state.faults[rows], step, state.step, rows)

    def _run(self, x: torch.Tensor, faults: torch.Tensor, step: int, until: int, rows: slice) -> None:
        drift, noise = self.coefficients.float32
        conditions, first = self.conditions, self.first_chain + (rows.start or 0)
        frozen = self.frozen_mask
        if rows.start is not None:
            conditions = [c[rows] for c in conditions]
            frozen = frozen[rows] if frozen is not None and frozen.ndim == x.ndim else frozen
        while step < until:
            i, stop = step - self.start, self.coefficients.same_level(step - self.start, until - self.start)
            self.chain.run(
                x, faults, conditions, drift[i:stop], noise[i:stop], self.coefficients.sigma[i], step=step, seed=self.seed,
                first_chain=first, frozen_mask=frozen, **self.native(rows))
            step = self.start + stop

    def native(self, rows: slice) -> dict:
        """What those chains' steps need beside."""
        return {}
