"""What samplers that accept or reject have in common: the target at a point, and one decision per chain.

A chain moves from x to its proposal y with probability min(1, exp(r)), r the log of the ratio of target densities
times that of proposal densities (Metropolis et al. 1953; Hastings 1970). Every chain decides for itself, with a
uniform of its own (`reference.metropolis_accept`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .. import reference, rng
from ..chain import BoundChain
from .base import Dynamics
from .langevin import ChainKernel, LangevinInfo, LangevinState, StepByStep
from .schedule import Coefficients, positive

Coefficient = float | torch.Tensor  # one for all chains, or one per chain, `[B, 1, ...]`


class Point(NamedTuple):
    """The target where chains are: E(x) `[B]`, its gradient `[B, *S]` (0 where frozen) and leaf energies K × `[B]`."""

    energy: torch.Tensor
    gradient: torch.Tensor
    leaf_energies: list[torch.Tensor]

    def tensors(self) -> list[torch.Tensor]:
        """All of them."""
        return [self.energy, self.gradient, *self.leaf_energies]

    def copy(self) -> Point:
        """The same in memory of its own."""
        return Point(self.energy.clone(), self.gradient.clone(), [e.clone() for e in self.leaf_energies])


def check_bounds(bounds) -> tuple[float, float] | None:
    """`(low, high)` with low < high, or None."""
    if bounds is None:
        return None
    low, high = map(float, bounds)
    if not low < high:
        raise ValueError(f"`bounds` must be (low, high) with low < high, got {bounds}")
    return low, high


class MetropolisKernel(StepByStep):
    """Steps of one micro-batch: `init(x) -> state`, `step(state) -> (state, info)`.

    `step` updates `state.x` and `state.faults` in place. A chain whose energy or gradient is not finite where it
    stands has a fault; a proposal where they are not is rejected.
    """

    energies_here = True

    def __init__(self, sampler, evaluator, backend, coefficients: Coefficients, start: int, *, seed: int, first_chain: int,
                 frozen_mask: torch.Tensor | None = None):
        self.sampler, self.evaluator, self.backend = sampler, evaluator, backend
        self.coefficients, self.start = coefficients, start
        self.noise_id = {"seed": seed, "first_chain": first_chain}
        self.frozen_mask = frozen_mask
        evaluator.need_energies()

    def init(self, x: torch.Tensor, step: int | None = None, faults: torch.Tensor | None = None,
             carried=None) -> LangevinState:
        """The state of chains `x` `[B, *S]` before step `step`."""
        if faults is None:
            faults = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        self._accepted, self._proposed = torch.zeros(x.shape[0], dtype=torch.float32, device=x.device), 0
        self._point: Point | None = None
        self._sigma: float | None = None
        step = self.start if step is None else step
        if not carried:
            carried = self.sampler.carry(x, self.backend, step=step, **self.noise_id)
        self._dtype, self._ndim = x.dtype, x.ndim - 1
        self._scale: torch.Tensor | None = None  # [B, 1, ...]: factors on the step sizes
        self._warming = 0
        if self.sampler.warmup is not None:
            self._rescale(carried)
        return LangevinState(x, step, faults, carried)

    @property
    def captured(self) -> bool:
        """Whether gradients are replayed from a recording."""
        return getattr(self.evaluator, "replays", False)

    def acceptance(self) -> torch.Tensor:
        """The share of proposals that each chain accepted since `init`, or since a warm-up last ended, `[B]`."""
        return self._accepted / max(self._proposed, 1)

    def catch_up(self, state: LangevinState, row: int, step: int) -> None:
        """A chain was drawn anew: what is known of its point is not true any more."""
        self._point = None
        if self.sampler.warmup is not None:
            state.carried["warmup"][row] = 0.0
            self._rescale(state.carried)

    def step(self, state: LangevinState) -> tuple[LangevinState, LangevinInfo]:
        """One proposal and one decision for every chain that has no fault."""
        x, t, faults, carried = state
        i = t - self.start
        drift, noise, sigma = self.coefficients.drift[i], self.coefficients.noise[i], self.coefficients.sigma[i]
        if self.sampler.warmup is not None and i > 0 and sigma != self.coefficients.sigma[i - 1]:
            carried["warmup"].zero_()  # a level of its own scale
            self._rescale(carried)
        if self._point is None or sigma != self._sigma:
            self._sigma = sigma
            self._point = self._target(x, t, faults).copy()
        here = self._point
        temperature = noise * noise / (2 * drift)
        if self._scale is not None:
            drift, noise = drift * self._scale.square(), noise * self._scale
        y, there, log_ratio = self.propose(x, here, t, drift, noise, temperature)
        log_ratio = torch.where(torch.isfinite(there.energy), log_ratio, -torch.inf)
        if self.sampler.bounds is not None:
            log_ratio = torch.where(self._inside(y), log_ratio, -torch.inf)
        self._accepted += self.backend.accept(
            [x, *here.tensors()], [y, *there.tensors()], log_ratio, faults, step=t, **self.noise_id)
        self._proposed += 1
        if self._warming:
            self._adapt(carried, log_ratio)
        return LangevinState(x, t + 1, faults, carried), LangevinInfo(here.leaf_energies)

    def _rescale(self, carried) -> None:
        """Step sizes as the warm-up has them now."""
        self._warming = max(0, self.sampler.warmup.left(carried["warmup"]))
        scale = self.sampler.warmup.scale(carried["warmup"])
        self._scale = scale.to(self._dtype).reshape(-1, *[1] * self._ndim)

    def _adapt(self, carried, log_ratio: torch.Tensor) -> None:
        warmup, state = self.sampler.warmup, carried["warmup"]
        warmup.update(state, log_ratio.float(), warmup.target or self.sampler.best_acceptance)
        self._scale = warmup.scale(state).to(self._dtype).reshape(self._scale.shape)
        self._warming -= 1
        if not self._warming:
            self._accepted.zero_()
            self._proposed = 0

    def propose(self, x, here: Point, t: int, drift: Coefficient, noise: Coefficient, temperature: float):
        """`(y, target at y, log ratio [B])`; `y` may be anything where the log ratio is NaN."""
        raise NotImplementedError

    def target(self, x: torch.Tensor) -> Point:
        """The target at `x`, at the noise level of the step that is being taken."""
        return self._target(x, 0, None)

    def forget(self) -> None:
        """States or models may have been changed: what is known of the target is not true any more."""
        self._point = None

    def _target(self, x, t: int, faults: torch.Tensor | None) -> Point:
        gradients, energies = self.evaluator.gradients(x, self._sigma)
        energies = [e.detach() if e.dtype is x.dtype else e.detach().to(x.dtype) for e in energies]
        energy = self.evaluator.total(energies, self._sigma)
        gradient = gradients[0] if len(gradients) else torch.zeros_like(x)
        for k in range(1, len(gradients)):
            gradient = gradient + gradients[k]
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
        bad = ~(torch.isfinite(energy) & torch.isfinite(gradient).reshape(len(gradient), -1).all(1)) & (faults == 0)
        if not bad.any():
            return
        moves = torch.ones_like(gradient, dtype=torch.bool)
        if self.frozen_mask is not None:
            moves &= ~self.frozen_mask
        culprit = reference.blame([g.reshape(len(g), -1) for g in gradients], moves.reshape(len(moves), -1))
        for k in reversed(range(len(energies))):
            culprit[~torch.isfinite(energies[k])] = k + 1
        faults.copy_(torch.where(bad, (t + 1 << 16) + culprit, faults))

    def _inside(self, y: torch.Tensor) -> torch.Tensor:
        low, high = self.sampler.bounds
        inside = (y >= low) & (y <= high)
        if self.frozen_mask is not None:
            inside |= self.frozen_mask
        return inside.reshape(len(y), -1).all(1)


class MetropolisChain(ChainKernel):
    """Steps that accept or reject of chains that run whole in the chain engine.

    Where a call begins, the target is evaluated anew at the point where chains stand, which gives the same bits.
    """

    knows_energy = True

    def __init__(self, sampler, bound: BoundChain, coefficients: Coefficients, start: int, **fixed):
        super().__init__(bound, coefficients, start, **fixed)
        self.sampler = sampler

    def init(self, x: torch.Tensor, step: int | None = None, faults: torch.Tensor | None = None,
             carried=None) -> LangevinState:
        """The state of chains `x` `[B, *S]` before step `step`."""
        state, n = super().init(x, step, faults), len(x)
        # What C++ writes: float32 on the CPU, whatever torch's defaults are.
        self._accepted, self._energy = torch.zeros(2, n, dtype=torch.float32, device=x.device)
        self._proposed = 0
        if self.sampler.warmup is not None and not carried:
            carried = {"warmup": self.sampler.warmup.begin(n, x.device)}
        self._carried = carried or {}
        return state._replace(carried=self._carried)

    def acceptance(self) -> torch.Tensor:
        """The share of proposals that each chain accepted since `init`, or since the warm-up ended, `[B]`."""
        return self._accepted / max(self._proposed, 1)

    def energy(self, evaluator, sigma: float | None) -> torch.Tensor:
        """The composition's energy where chains stand, `[B]`."""
        return self._energy

    def advance(self, state: LangevinState, until: int) -> LangevinState:
        """Steps up to, and without, step `until`."""
        left = self._warming()
        if 0 < left < until - state.step:
            state, left = self.advance(state, state.step + left), 0
        steps = until - state.step
        state = super().advance(state, until)
        self._proposed += steps
        if left and not self._warming():
            self._accepted.zero_()
            self._proposed = 0
        return state

    def catch_up(self, state: LangevinState, row: int, step: int) -> None:
        """Bring a chain that starts anew at `step` to where the others are."""
        if self.sampler.warmup is not None:
            self._carried["warmup"][row] = 0.0
        super().catch_up(state, row, step)

    def native(self, rows: slice) -> dict:
        """What those chains' steps need beside: results, the streams, the warm-up."""
        found = {"accepted": self._accepted[rows].data_ptr(), "energies": self._energy[rows].data_ptr(),
                 "stream": self.sampler.stream, "accept_stream": rng.ACCEPT}
        w = self.sampler.warmup
        if w is not None:
            target = w.target or self.sampler.best_acceptance
            found |= {"warm_up": self._carried["warmup"][rows].data_ptr(), "adaptation": [w.steps, target, w.gamma, w.t0, w.kappa]}
        return found

    def _warming(self) -> int:
        warmup = self.sampler.warmup
        return 0 if warmup is None else max(0, warmup.left(self._carried["warmup"]))


def squared_norm(rows: torch.Tensor) -> torch.Tensor:
    """|row|² of every chain, `[B]`."""
    return rows.reshape(rows.shape[0], -1).square().sum(1)


def plus(x: torch.Tensor, a: Coefficient, y: torch.Tensor) -> torch.Tensor:
    """x + a y."""
    return torch.addcmul(x, y, a) if isinstance(a, torch.Tensor) else torch.add(x, y, alpha=a)


class Metropolis(Dynamics):
    """What the driver asks of a sampler that accepts or rejects."""

    needs_energies = True
    best_acceptance: float  # what a warm-up aims at unless told
    stream = rng.NOISE  # of what proposals are drawn from

    @property
    def carried(self) -> tuple[str, ...]:
        """What a warm-up has learnt, where there is one."""
        return () if self.warmup is None else ("warmup",)

    def carry(self, x, backend, **where):
        """The state of a warm-up that has not begun."""
        return {} if self.warmup is None else {"warmup": self.warmup.begin(len(x), x.device)}

    @property
    def clamp(self) -> tuple[float, float] | None:
        """The bounds of the domain, where there are any: chains start and stay there."""
        return self.bounds

    def step_scale(self, carried) -> torch.Tensor | None:
        """What the warm-up multiplies the step size by, `[n]`."""
        return None if self.warmup is None or "warmup" not in carried else self.warmup.scale(carried["warmup"])

    def scales(self, steps: int, start: int) -> tuple[list[float], list[float]]:
        """Step sizes and temperatures of steps `start` to `start + steps - 1`."""
        return positive(self.step_size, "step_size", steps, start), positive(self.temperature, "temperature", steps, start)


def coefficients(squared_steps, temperatures) -> Coefficients:
    """Drift λ/2 and noise √(λT), λ the step size of Langevin dynamics that a step amounts to."""
    drift, noise = [s / 2 for s in squared_steps], [math.sqrt(s * t) for s, t in zip(squared_steps, temperatures)]
    return Coefficients(drift, noise, [None] * len(drift))
