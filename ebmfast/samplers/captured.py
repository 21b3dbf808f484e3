"""Steps that are recorded once and replayed as a CUDA graph.

Of Langevin dynamics all of a step: forward, program, backward and the fused step. Everything that differs between steps,
micro-batches and calls is read from device memory: the clock (step, where schedules start, seed, first chain), drift, noise,
noise levels, states, faults, conditions, the frozen mask. Of other samplers forward, program and backward: x and the noise
level go in, and what else they do to x, a few operations, runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..weights import weight_at
from .langevin import LangevinInfo, LangevinKernel, LangevinState, StepByStep

UNROLLED = 8  # steps of a replay, where that many are left: a launch costs the host some 10 µs
STRIDE = 4 * UNROLLED  # steps between copies of the states, and between looks at faults
SPARE = 64  # entries of schedules beyond a call's steps, so that a rehearsal never reads past the end


class NotCapturable(RuntimeError):
    """These steps cannot be recorded; says why."""


class Buffers:
    """What recordings have in common: the models' part of a step, over memory that stays where it is."""

    def __init__(self, graphs, evaluator, x: Tensor):
        self.graphs, self.evaluator = graphs, evaluator
        self.where = {"device": x.device, "dtype": torch.float32}
        self.x, passes = x.clone(), evaluator.passes
        takes = any(p.group.source.takes_sigma for p in passes)
        self.levels = torch.ones(max(map(len, passes), default=1) * len(x), **self.where) if takes else None
        self.energies = torch.zeros(len(evaluator.plan.leaves), len(x), **self.where)  # of the leaves, in the last step
        self._replays: dict[object, Callable[[], None]] = {}
        self._signatures: dict[float | None, tuple] = {}

    def take(self, kernel) -> None:
        """What a micro-batch brings beside its states."""
        if kernel.evaluator is not self.evaluator:
            self.evaluator.assign(kernel.evaluator)
        self.evaluator.refresh()

    def _numbers(self, sigma: float | None) -> tuple:
        """The program's numbers at a noise level, where they depend on it."""
        plan = self.evaluator.plan
        if not plan.schedules:
            return ()
        if sigma not in self._signatures:
            self._signatures[sigma] = tuple(weight_at(v, sigma) for v in plan.program.values)
        return self._signatures[sigma]

    def _evaluate(self, sigma: float | None, watch=None):
        """Weighted gradients and energies of the leaves at x. `sigma` stands for all noise levels at which the program has the
        same numbers; models read theirs from `levels`."""
        kind, fork = self.x.device.type, len(self.evaluator.passes) > 1
        # Autocast without its cache, also where the caller's is on: copies of parameters must be made anew in each replay.
        with torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False):
            with self.evaluator.captured(self.levels, self.graphs.fork if fork else None), watch or nullcontext():
                found = self.evaluator.gradients(self.x, sigma)
        if fork:
            self.graphs.join()
        return found

    def _keep(self, energies: list[Tensor]) -> None:
        if energies:
            self.energies.copy_(torch.stack([e.detach().to(self.energies.dtype) for e in energies]))


class Recording(Buffers):
    """Buffers of a micro-batch, and the replays of its Langevin steps that were recorded over them.

    Args:
        graphs: the graph primitive, as `capture.CudaGraphs`.
        kernel: the first micro-batch's; its evaluator stays, and takes the conditions of later ones.
    """

    def __init__(self, graphs, kernel: LangevinKernel, state: LangevinState):
        super().__init__(graphs, kernel.evaluator, state.x)
        x, frozen, where = state.x, kernel.fixed["frozen_mask"], self.where
        self.faults = torch.zeros_like(state.faults)
        self.frozen = None if frozen is None else frozen.clone()
        self.clock = torch.zeros(4, dtype=torch.int64, device=x.device)
        self._tick = torch.tensor([1, 0, 0, 0], device=x.device)
        self._ones = torch.ones(self.evaluator.n_gradients, **where)
        self.drift, self.noise, self.sigma, self._zeros = (torch.zeros(self.capacity(kernel), **where) for _ in range(4))
        options = dict(seed=0, first_chain=0, frozen_mask=self.frozen, faults=self.faults, gradient_dtype=x.dtype)
        self._move = kernel.backend.prepare(self.x, n_gradients=self.evaluator.n_gradients, **kernel.options, **options)
        self._perturb = kernel.backend.prepare(self.x, n_gradients=0, **options) if kernel.sampler.noise_first else None
        self._sent = None

    @staticmethod
    def facts(kernel: LangevinKernel) -> tuple:
        """What else kernels must have in common to share a recording."""
        frozen = kernel.fixed["frozen_mask"]
        return "steps", None if frozen is None else frozen.ndim, Recording.capacity(kernel)

    @staticmethod
    def capacity(kernel: LangevinKernel) -> int:
        """Entries of the schedules: enough for this call, and seldom another number for the next."""
        return 1 << (len(kernel.coefficients.drift) + SPARE - 1).bit_length()

    def take(self, kernel: LangevinKernel) -> None:
        """What a micro-batch brings beside its states."""
        super().take(kernel)
        if self.frozen is not None:
            self.frozen.copy_(kernel.fixed["frozen_mask"])
        coefficients = kernel.coefficients
        if self._sent is not coefficients:
            for buffer, values in zip((self.drift, self.noise), coefficients.float32):
                self.graphs.send(buffer, _filled(values, len(buffer)))
            if coefficients.sigma and coefficients.sigma[0] is not None:
                sigma = torch.tensor(coefficients.sigma, dtype=torch.float32, device="cpu")
                self.graphs.send(self.sigma, _filled(sigma, len(self.sigma)))
            self._sent = coefficients

    def missing(self, kernel: LangevinKernel, steps: range) -> dict:
        """What steps need that is not recorded yet: kinds, and a noise level of each."""
        return {kind: sigma for kind, sigma in self._cut(kernel, steps) if kind not in self._replays}

    def rehearse(self, kernel: LangevinKernel, state: LangevinState, watch) -> None:
        """Two steps, not recorded; of the second the models' part is watched: the first makes what is made once and kept."""
        self._enter(kernel, state)
        for watched in (None, watch):
            self._step(self._sigma(kernel, state.step), watched)

    def record(self, kernel: LangevinKernel, state: LangevinState, kinds: dict) -> None:
        """Record what is missing; states are not changed."""
        for (signature, count), sigma in kinds.items():
            self._enter(kernel, state)

            def steps(count=count, sigma=sigma):
                for _ in range(count):
                    energies = self._step(sigma)
                self._keep(energies)

            self._replays[signature, count] = self.graphs.record(steps, partial(steps, 1))

    def run(self, kernel: LangevinKernel, state: LangevinState, until: int) -> None:
        """Steps up to, and without, step `until`, on the states of the caller."""
        self._enter(kernel, state)
        for kind, _ in self._cut(kernel, range(state.step, until)):
            self._replays[kind]()
        state.x.copy_(self.x)
        state.faults.copy_(self.faults)

    def _enter(self, kernel: LangevinKernel, state: LangevinState) -> None:
        from ebmfast.kernels.step import clock

        self.x.copy_(state.x)
        self.faults.copy_(state.faults)
        self.graphs.send(self.clock, clock(state.step, kernel.start, kernel.fixed["seed"], kernel.fixed["first_chain"]))

    def _cut(self, kernel: LangevinKernel, steps: range) -> list[tuple[tuple, float | None]]:
        """Steps as replays: ((the program's numbers, steps), noise level)."""
        found, t = [], steps.start
        while t < steps.stop:
            signature, until = self._numbers(self._sigma(kernel, t)), min(t + UNROLLED, steps.stop)
            alike = until == t + UNROLLED and all(self._numbers(self._sigma(kernel, s)) == signature for s in range(t + 1, until))
            count = UNROLLED if alike else 1
            found.append(((signature, count), self._sigma(kernel, t)))
            t += count
        return found

    @staticmethod
    def _sigma(kernel: LangevinKernel, step: int) -> float | None:
        return kernel.coefficients.sigma[step - kernel.start]

    def _step(self, sigma: float | None, watch=None) -> list[Tensor]:
        """One step in device memory; the leaves' energies."""
        noise = self.noise
        if self.levels is not None and sigma is not None:
            entry = (self.clock[:1] - self.clock[1:2]).clamp(0, len(self.sigma) - 1)
            self.levels.copy_(self.sigma.index_select(0, entry).expand_as(self.levels))
        if self._perturb is not None:
            self._perturb((), None, self._zeros, noise, self.clock)
            noise = self._zeros
        gradients, energies = self._evaluate(sigma, watch)
        self._move(gradients, self._ones, self.drift, noise, self.clock)
        self.clock.add_(self._tick)
        return energies


class At(NamedTuple):
    """Where gradients are asked for."""

    x: Tensor
    sigma: float | None


class GradientRecording(Buffers):
    """Buffers of a micro-batch, and replays that leave its weighted gradients `[K, B, *S]` and energies `[K, B]` in them."""

    def __init__(self, graphs, kernel: CapturedGradients, at: At):
        super().__init__(graphs, kernel.evaluator, at.x)
        self.gradients = torch.zeros(self.evaluator.n_gradients, *at.x.shape, **self.where)

    @staticmethod
    def facts(kernel: CapturedGradients) -> tuple:
        """What else users must have in common to share a recording."""
        return "gradients", kernel.evaluator.needs_energies

    def missing(self, kernel, sigma: float | None) -> dict:
        """What is needed and not recorded yet: the program's numbers, and a noise level of them."""
        numbers = self._numbers(sigma)
        return {} if numbers in self._replays else {numbers: sigma}

    def rehearse(self, kernel, at: At, watch) -> None:
        """Two evaluations, not recorded, of which the second is watched: the first makes what is made once and kept."""
        self._enter(at)
        for watched in (None, watch):
            self._step(at.sigma, watched)

    def record(self, kernel, at: At, kinds: dict) -> None:
        """Record what is missing."""
        for numbers, sigma in kinds.items():
            self._enter(at)
            step = partial(self._step, sigma)
            self._replays[numbers] = self.graphs.record(step, step)

    def run(self, at: At) -> tuple[Tensor, list[Tensor]]:
        """Gradients and energies there, in memory that the next call writes to."""
        self._enter(at)
        self._replays[self._numbers(at.sigma)]()
        return self.gradients, list(self.energies)

    def _enter(self, at: At) -> None:
        self.x.copy_(at.x)
        if self.levels is not None and at.sigma is not None:
            self.levels.fill_(at.sigma)

    def _step(self, sigma: float | None, watch=None) -> None:
        gradients, energies = self._evaluate(sigma, watch)
        for to, gradient in zip(self.gradients, gradients):
            to.copy_(gradient)
        self._keep(energies)


class CapturedGradients:
    """An evaluator whose gradients are replayed from a recording; where that cannot be, its own.

    A result is good until the next one is asked for."""

    recording = GradientRecording

    def __init__(self, evaluator, captures, *, watched: bool):
        self.evaluator, self.captures, self.watched = evaluator, captures, watched
        self.replays = True
        self._recording: GradientRecording | None = None

    def __getattr__(self, name: str):
        return getattr(self.evaluator, name)

    def gradients(self, x: Tensor, sigma: float | None = None):
        """As `Evaluator.gradients`."""
        at = At(x, sigma)
        if self.replays:
            if self._recording is None or self.watched or self._recording.missing(self, sigma):
                self._recording = self.captures.find(self, at, sigma)
            self.replays = self._recording is not None
        return self._recording.run(at) if self.replays else self.evaluator.gradients(x, sigma)


class CapturedKernel(StepByStep):
    """A Langevin kernel whose steps are replayed from a recording; where that cannot be, its own steps.

    `advance` copies states in and out, so what the caller does to them between calls counts.
    """

    def __init__(self, kernel: LangevinKernel, captures, *, watched: bool, at_once: bool):
        self.kernel, self.captures, self.watched, self.at_once = kernel, captures, watched, at_once
        self.stride = 1 if at_once else STRIDE
        self.captured = True
        self._recording: Recording | None = None
        self._look: Callable[[], bool] | None = None

    @property
    def evaluator(self):
        """The kernel's."""
        return self.kernel.evaluator

    def init(self, x: Tensor, step: int | None = None, faults: Tensor | None = None, *carried) -> LangevinState:
        """The state of chains `x` `[B, *S]` before step `step`."""
        return self.kernel.init(x, step, faults, *carried)

    def catch_up(self, state: LangevinState, row: int, step: int) -> None:
        """Bring a chain that starts anew at `step` to where the others are: it is there, for each step is looked at."""

    def step(self, state: LangevinState) -> tuple[LangevinState, None]:
        """One step of every chain that has no fault."""
        return self.advance(state, state.step + 1), None

    def advance(self, state: LangevinState, until: int) -> LangevinState:
        """Steps up to, and without, step `until`."""
        steps = range(state.step, until)
        if self.captured and steps:
            if self._recording is None or self.watched or self._recording.missing(self.kernel, steps):
                self._recording = self.captures.find(self.kernel, state, steps)
            self.captured = self._recording is not None
        if not self.captured:
            self.stride = self.kernel.stride
            state, self.info = self.kernel.advance(state, until), self.kernel.info
            return state
        try:
            self._recording.run(self.kernel, state, until)
        except RuntimeError as error:
            error.add_note(f"in captured steps {state.step} to {until - 1}; capture=False runs them one by one")
            raise
        self.info = LangevinInfo(list(self._recording.energies))
        return state._replace(step=until)

    def suspect(self, state: LangevinState) -> bool:
        """Whether faults have to be looked at: whether there were some at the last call. Waits for no step after that."""
        if not self.captured or self.at_once:
            return True
        before, self._look = self._look, self.captures.look(state.faults)
        return before is not None and before()


def _filled(values: Tensor, length: int) -> Tensor:
    """Values, the last repeated, as float32 `[length]`."""
    out = torch.zeros(length, dtype=torch.float32, device="cpu")
    out[:len(values)] = values
    if len(values):
        out[len(values):] = values[-1]
    return out
