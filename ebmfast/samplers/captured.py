"""Langevin steps that are recorded once and replayed: forward, program, backward and the fused step in one CUDA graph.

Everything that differs between steps, micro-batches and calls is read from device memory: the clock (step, where schedules
start, seed, first chain), drift, noise, noise levels, states, faults, conditions, the frozen mask.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..weights import weight_at
from .langevin import LangevinInfo, LangevinKernel, LangevinState, StepByStep

UNROLLED = 8  # steps of a replay, where that many are left: a launch costs the host some 10 µs
STRIDE = 4 * UNROLLED  # steps between copies of the states, and between looks at faults
SPARE = 64  # entries of schedules beyond a call's steps, so that a rehearsal never reads past the end


class NotCapturable(RuntimeError):
    """These steps cannot be recorded; says why."""


class Recording:
    """Buffers of a micro-batch, and the replays that were recorded over them.

    Args:
        graphs: the graph primitive, as `capture.CudaGraphs`.
        kernel: the first micro-batch's; its evaluator stays, and takes the conditions of later ones.
    """

    def __init__(self, graphs, kernel: LangevinKernel, state: LangevinState):
        x, sampler, frozen = state.x, kernel.sampler, kernel.fixed["frozen_mask"]
        self.graphs, self.evaluator = graphs, kernel.evaluator
        self.x, self.faults = x.clone(), torch.zeros_like(state.faults)
        self.frozen = None if frozen is None else frozen.clone()
        self.clock = torch.zeros(4, dtype=torch.int64, device=x.device)
        self._tick = torch.tensor([1, 0, 0, 0], device=x.device)
        where = {"device": x.device, "dtype": torch.float32}
        self._ones = torch.ones(self.evaluator.n_gradients, **where)
        self.drift, self.noise, self.sigma, self._zeros = (torch.zeros(self.capacity(kernel), **where) for _ in range(4))
        passes = self.evaluator.passes
        takes = any(p.group.source.takes_sigma for p in passes)
        self.levels = torch.ones(max(map(len, passes), default=1) * len(x), **where) if takes else None
        options = dict(seed=0, first_chain=0, frozen_mask=self.frozen, faults=self.faults, gradient_dtype=x.dtype)
        self._move = kernel.backend.prepare(self.x, n_gradients=self.evaluator.n_gradients, **kernel.options, **options)
        self._perturb = kernel.backend.prepare(self.x, n_gradients=0, **options) if sampler.noise_first else None
        self.energies = torch.zeros(len(self.evaluator.plan.leaves), len(x), **where)  # of the leaves, in the last step
        self._replays: dict[tuple, Callable[[], None]] = {}
        self._signatures: dict[float | None, tuple] = {}
        self._sent = None

    @staticmethod
    def capacity(kernel: LangevinKernel) -> int:
        """Entries of the schedules: enough for this call, and seldom another number for the next."""
        return 1 << (len(kernel.coefficients.drift) + SPARE - 1).bit_length()

    def take(self, kernel: LangevinKernel) -> None:
        """What a micro-batch brings beside its states."""
        if kernel.evaluator is not self.evaluator:
            self.evaluator.assign(kernel.evaluator)
        self.evaluator.refresh()
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
                if energies:
                    self.energies.copy_(torch.stack([e.detach().to(self.energies.dtype) for e in energies]))

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
            signature, until = self._signature(kernel, t), min(t + UNROLLED, steps.stop)
            alike = until == t + UNROLLED and all(self._signature(kernel, s) == signature for s in range(t + 1, until))
            count = UNROLLED if alike else 1
            found.append(((signature, count), self._sigma(kernel, t)))
            t += count
        return found

    def _signature(self, kernel: LangevinKernel, step: int) -> tuple:
        """The program's numbers at a step, where they depend on it."""
        plan = self.evaluator.plan
        if not plan.schedules:
            return ()
        sigma = self._sigma(kernel, step)
        if sigma not in self._signatures:
            self._signatures[sigma] = tuple(weight_at(v, sigma) for v in plan.program.values)
        return self._signatures[sigma]

    @staticmethod
    def _sigma(kernel: LangevinKernel, step: int) -> float | None:
        return kernel.coefficients.sigma[step - kernel.start]

    def _step(self, sigma: float | None, watch=None) -> list[Tensor]:
        """One step in device memory; the leaves' energies. `sigma` stands for all noise levels at which the program has the
        same numbers."""
        kind, noise, fork = self.x.device.type, self.noise, len(self.evaluator.passes) > 1
        if self.levels is not None and sigma is not None:
            entry = (self.clock[:1] - self.clock[1:2]).clamp(0, len(self.sigma) - 1)
            self.levels.copy_(self.sigma.index_select(0, entry).expand_as(self.levels))
        if self._perturb is not None:
            self._perturb((), None, self._zeros, noise, self.clock)
            noise = self._zeros
        # Autocast without its cache, also where the caller's is on: copies of parameters must be made anew in each replay.
        with torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False):
            with self.evaluator.captured(self.levels, self.graphs.fork if fork else None):
                if watch is None:
                    gradients, energies = self.evaluator.gradients(self.x, sigma)
                else:
                    with watch:
                        gradients, energies = self.evaluator.gradients(self.x, sigma)
        if fork:
            self.graphs.join()
        self._move(gradients, self._ones, self.drift, noise, self.clock)
        self.clock.add_(self._tick)
        return energies


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
