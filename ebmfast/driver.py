"""The loop of a call: micro-batches, steps, faults, traces, interrupts."""

from __future__ import annotations

import math
import signal
import threading
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from . import batching, measured, memory, stacking
from .capture import free_memory
from .chain import Chain
from .coupling import check_rows
from .diagnostics import Diagnostics, Stream, summarise
from .guard import RAN_AWAY, Guard
from .samplers.langevin import StepByStep
from .state import Fault, NonFiniteError, RunawayError, SampleState, TraceResult

CHECK_EVERY = 16  # steps between two looks at the fault flags; a faulty chain stops at once in the kernel
BATCH_BYTES = 8 << 20  # default size of a micro-batch's gradients: a share of the last-level cache,
BATCH_BYTES_GPU = 512 << 20  # and what keeps a GPU busy
MEASURED_FROM = 1 << 20  # bytes of a micro-batch's gradients from which its memory is measured


class StepInfo(NamedTuple):
    """What a callback gets after each step; `x` `[B, *S]` is the live state of chains `first_chain` onwards."""

    step: int
    first_chain: int
    x: torch.Tensor
    sigma: float | None


@dataclass(frozen=True)
class Call:
    """One call's arguments after checking."""

    x: torch.Tensor | None  # where the chains start, or None to draw them
    n: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    seed: int
    first_chain: int
    base: int
    target: int
    step: torch.Tensor
    faults: torch.Tensor
    conditions: dict[str, torch.Tensor]
    extra: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def x_bytes(self) -> int:
        """Bytes of one chain's state."""
        return math.prod(self.shape) * self.dtype.itemsize


class Chains:
    """The chains of one call, and the loop over micro-batches and steps."""

    def __init__(self, run, call: Call, backend, chain: Chain | None, initial, frozen, trace, callback):
        self.run_, self.call, self.backend, self.chain, self.frozen = run, call, backend, chain, frozen
        self.initial, self.trace, self.callback = initial, trace, callback
        self._slices: list[slice] | None = None  # micro-batches, once they run
        self.batch = run.batch_size or (_default_batch(call, len(run.plan.leaves)) if chain is None else max(1, call.n))
        self.branch = None if run.branches is None else run.branches.draw(call.n, call.seed, call.first_chain)
        self.coefficients = run.sampler.coefficients(run.plan.expression, call.target - call.base, call.base)
        fresh = call.x is None
        self.x = torch.empty(call.n, *call.shape, dtype=call.dtype, device=call.device) if fresh else call.x.clone()
        if fresh:
            for rows in self._rows():
                self.x[rows] = initial(rows.start, rows.stop - rows.start, 0)
        if chain is None and run.batch_size is None:
            self.batch = self._fastest(self._fitting())
        self.halved_from: int | None = None
        self.batch = min(self.batch, run.halved.get((call.shape, call.device), self.batch))
        self.step, self.faults = call.step.clone(), call.faults.clone()
        self.faults_seen: set[Fault] = set()
        self.carried = self._carry()
        self.captured: list[bool] = []  # of every micro-batch that ran
        self.uncaptured: str | None = None  # why one was not
        self._kept: dict[int, list] = {}
        self._streams: dict[int, Stream] = {}
        self._accepted: torch.Tensor | None = None

    def acceptance(self) -> torch.Tensor | None:
        """The share of a chain's proposals that it accepted in this call, `[n]`; None for samplers without."""
        return self._accepted

    def step_size(self) -> torch.Tensor | None:
        """Step sizes that chains adapted, `[n]`; None where they did not."""
        return self.run_.sampler.step_sizes(self.carried, self.coefficients) if self.coefficients.drift else None

    def _carry(self) -> dict[str, torch.Tensor]:
        """What the sampler carries from step to step beside x: that of the state resumed, else as for chains that begin."""
        names, given, parts = self.run_.sampler.carried, self.call.extra, []
        if not names or all(name in given for name in names):
            return {name: given[name].clone() for name in names}
        for rows in self._rows():
            parts.append(self.run_.sampler.carry(
                self.x[rows], self.backend, step=int(self.step[rows.start]), seed=self.call.seed,
                first_chain=self.call.first_chain + rows.start, frozen_mask=self._frozen_rows(rows)))
        return {name: torch.cat([part[name] for part in parts]) for name in names} if parts else {}

    def _frozen_rows(self, rows: slice) -> torch.Tensor | None:
        return self.frozen if self.frozen is None or self.frozen.ndim == len(self.call.shape) else self.frozen[rows]

    def _rows(self):
        """Slices of chains that run together: at most a micro-batch, all at the same step."""
        if self._slices is not None:
            yield from self._slices
            return
        cuts = [0, *(torch.nonzero(self.call.step.diff()).flatten() + 1).tolist(), self.call.n]
        yield from _cut(map(slice, cuts, cuts[1:]), self.batch)

    def run(self, stop: Interrupt, progress: bool) -> None:
        """Take every chain to the target step, unless `stop` is requested."""
        slices = self._slices = list(self._rows())
        total = sum(max(0, self.call.target - int(self.step[s.start])) for s in slices)
        bar = Bar(total) if progress else None
        try:
            done = 0
            while done < len(slices):
                done += self._attempt(done, stop, bar)
        finally:
            if bar is not None:
                bar.close()

    def _attempt(self, i: int, stop: Interrupt, bar) -> bool:
        """Run a micro-batch. False if memory was out: micro-batches are half as large then, once, and this one is where it was."""
        rows, shown = self._slices[i], 0 if bar is None else bar.done
        tensors = [self.x, self.faults, *self.carried.values()]
        before = [t[rows].clone() for t in tensors]
        try:
            self._run_slice(rows, stop, bar)
            return True
        except torch.OutOfMemoryError as error:
            if self.halved_from is not None or rows.stop - rows.start == 1:
                size = rows.stop - rows.start
                error.add_note(f"with micro-batches of {size} chains; batch_size= or memory_limit= make them smaller")
                raise
        for tensor, values in zip(tensors, before):
            tensor[rows] = values
        for t, parts in self._kept.items():
            self._kept[t] = [part for part in parts if part[0] != rows.start]
        self._streams.pop(rows.start, None)
        if bar is not None:
            bar.go_back(shown)
        self._halve(i)
        return False

    def _halve(self, i: int) -> None:
        """Cut micro-batches in two from slice `i` on, say so, and remember it for later calls."""
        call, run, rest = self.call, self.run_, self._slices[i:]
        size = self.halved_from = rest[0].stop - rest[0].start
        self.batch = run.halved[call.shape, call.device] = -(-size // 2)
        self._slices[i:] = _cut(rest, self.batch)
        run.captures.clear()
        if call.device.type == "cuda":
            free_memory()
        warnings.warn(f"out of memory with micro-batches of {size} chains; going on with {self.batch}, which changes no noise",
                      stacklevel=2)

    def _fitting(self) -> int:
        """The micro-batch that `memory_limit` allows: without one the default, unless that takes half of the memory."""
        call, run, limit = self.call, self.run_, self.run_.memory_limit
        most = self.batch if limit is None else max(1, call.n)
        if call.n == 0 or (limit is None and most * call.x_bytes * len(run.plan.leaves) < MEASURED_FROM):
            return most
        key = call.shape, call.dtype, call.device
        if key not in run.fitting:
            run.fitting[key] = memory.fitting(
                lambda rows: self._trial(rows)(), limit or memory.total(call.device) // 2, call.device)
        return min(most, run.fitting[key])

    def _trial(self, rows: int):
        """A function that takes the models' part of a step of so many chains."""
        call, sigma = self.call, self.coefficients.sigma[0] if self.coefficients.sigma else None
        chosen = torch.arange(rows, device="cpu") % call.n
        x = self.x[chosen.to(call.device)]
        evaluator = self.run_.plan.bind(x, {name: c[chosen] for name, c in call.conditions.items()})

        def step():
            with torch.enable_grad():
                evaluator.gradients(x, sigma)

        return step

    def _fastest(self, most: int) -> int:
        """The micro-batch of at most `most` chains that is fastest on this CPU, where the run is long enough to find out."""
        call, run = self.call, self.run_
        steps = (call.target - call.base) * call.n / max(most, 1)
        plan, key = run.plan, (call.shape, call.dtype, most)
        if call.device.type != "cpu" or most < 2 or steps < batching.WORTH or plan.compile or self.branch is not None:
            return most
        if not measured.allowed():
            return most
        if key not in run.rates:
            kinds = [stacking.known(leaf.source.model) for leaf in plan.leaves]
            facts = "batch", plan.program.codes, kinds, *key, plan.compute_dtype, plan.channels_last, plan.stack

            def measure():
                return batching.measure(self._trial, most)

            own = None in kinds  # functions: nothing tells them apart in another process
            run.rates[key] = measure() if own else measured.once(measured.key(*facts, device=call.device), measure)
        return batching.fastest(run.rates[key], most)

    def _evaluator(self, rows: slice, whole: bool = False):
        """What evaluates those chains: `whole`, the composition even where every chain has a branch of its own."""
        conditions = {name: c[rows] for name, c in self.call.conditions.items()}
        if self.chain is not None:
            return self.chain.bind(conditions)
        if self.branch is not None and not whole:
            return self.run_.branches.bind(self.x[rows], conditions, self.branch[rows])
        return self.run_.plan.bind(self.x[rows], conditions)

    def _run_slice(self, rows: slice, stop: Interrupt, bar) -> None:
        call, first = self.call, int(self.step[rows.start])
        if first >= call.target:
            return
        x, faults, evaluator = self.x[rows], self.faults[rows], self._evaluator(rows)
        if self.run_.check and self.chain is None:
            check_rows(evaluator, x, self._sigma_of(first))
        kernel = self.run_.sampler.bind(
            evaluator, self.backend, self.coefficients, call.base, seed=call.seed,
            first_chain=call.first_chain + rows.start, frozen_mask=self._frozen_rows(rows))
        at_once = self.run_.on_nonfinite == "restart"
        kernel = self.run_.captures.wrap(
            kernel, self.backend, call.device, watched=self.callback is not None, at_once=at_once)
        state = kernel.init(x, first, faults, {name: values[rows] for name, values in self.carried.items()})
        bounds = self.run_.sampler.clamp
        free = bounds is None or not all(map(math.isfinite, bounds))  # within bounds nothing runs away
        watched = kernel.knows_energy and free and call.target - first > CHECK_EVERY
        guard = Guard(self.coefficients, self.run_.plan.data_range, x, first) if watched else None
        if at_once:
            self._restart(rows, kernel, state, guard, first)  # what a state that resumes brings
        looked = first
        while state.step < call.target and not stop.requested:
            before = state.step
            state = kernel.advance(state, self._until(before, kernel, guard))
            if state.step - looked >= (1 if at_once else CHECK_EVERY):
                if guard is not None and state.step >= guard.due:
                    sigma = self._sigma_of(state.step - 1)
                    guard.look(state, kernel.energy(evaluator, sigma), sigma)
                if kernel.suspect(state):
                    self._handle_faults(rows, kernel, state, guard)
                looked = state.step
            if self.callback is not None or self.trace is not None:
                self._observe(rows, state.step - 1, evaluator, kernel)
            if bar is not None:
                bar.update(state.step - before, kernel, evaluator, self.x[rows], self._sigma_of(state.step - 1))
        self.captured.append(getattr(kernel, "captured", False))
        self.uncaptured = self.uncaptured or self.run_.captures.reason
        self.step[rows] = state.step
        self._handle_faults(rows, kernel, state, guard)
        accepted = kernel.acceptance()
        if accepted is not None:
            if self._accepted is None:
                self._accepted = torch.zeros(call.n, dtype=torch.float32, device=call.device)
            self._accepted[rows] = accepted

    def _until(self, step: int, kernel, guard: Guard | None) -> int:
        """Where the next call of a kernel ends: after its stride, or where something has to be looked at."""
        until = min(self.call.target, step + kernel.stride)
        if guard is not None and not isinstance(kernel, StepByStep):  # strides of those are short, and recorded whole
            until = min(until, max(guard.due, step + 1))
        if self.callback is not None:
            return step + 1
        if self.trace is not None:
            until = min(until, step - step % self.trace.every + self.trace.every)
        return until

    def _observe(self, rows: slice, t: int, evaluator, kernel) -> None:
        sigma, trace = self._sigma_of(t), self.trace
        if self.callback is not None:
            before = None if getattr(self.callback, "only_looks", False) else (self.x[rows].clone(), self._versions())
            self.callback(StepInfo(t + 1, self.call.first_chain + rows.start, self.x[rows], sigma))
            if before is not None:
                evaluator.refresh()
                if before[1] is None or before[1] != self._versions() or not torch.equal(before[0], self.x[rows]):
                    kernel.forget()
        if trace is None or (t + 1) % trace.every:
            return
        with torch.no_grad():
            x, energy = self.x[rows], None
            if trace.energy or trace.diagnostics:
                known = kernel.energies_here and self.run_.on_nonfinite != "restart" and self.callback is None
                energies = kernel.info.leaf_energies if known else evaluator.energies(x, sigma)
                energy = evaluator.total(energies, sigma)
                energy = energy.clone() if known else energy
            if trace.diagnostics:
                self._diagnose(rows, t, x, energy)
        if trace.energy or trace.states:
            kept = rows.start, energy if trace.energy else None, x.clone() if trace.states else None
            self._kept.setdefault(t + 1, []).append(kept)

    def _versions(self) -> list[tuple[int, int]] | None:
        """What tells whether models were changed: the parameters' and buffers' own counts; None where there are functions."""
        models = [leaf.source.model for leaf in self.run_.plan.leaves]
        if not all(isinstance(m, torch.nn.Module) for m in models):
            return None
        return [(id(p), p._version) for m in models for p in (*m.parameters(), *m.buffers())]

    def _diagnose(self, rows: slice, t: int, x: torch.Tensor, energy: torch.Tensor) -> None:
        values = x if self.trace.summary is None else self.trace.summary(x)
        if values.shape[:1] != x.shape[:1]:
            raise ValueError(f"`summary` must give one row per chain, [{len(x)}, ...], got {list(values.shape)}")
        self._summary_shape = tuple(values.shape[1:])
        values = torch.cat([energy[:, None].double(), values.reshape(len(x), -1).double()], 1)
        if rows.start not in self._streams:
            draws = self.call.target // self.trace.every - t // self.trace.every
            self._streams[rows.start] = Stream(len(x), values.shape[1], draws, x.device)
        self._streams[rows.start].add(values)

    def _diagnostics(self) -> Diagnostics | None:
        if len(self._streams) < len(list(self._rows())):
            return None
        return summarise([self._streams[k] for k in sorted(self._streams)], self.faults == 0, self._summary_shape)

    def _sigma_of(self, step: int) -> float | None:
        return self.coefficients.sigma[step - self.call.base]

    def _handle_faults(self, rows: slice, kernel, state, guard: Guard | None) -> None:
        if not self.faults[rows].any():
            return
        found = [self._fault(row, int(self.faults[row])) for row in self._faulty(rows)]
        self.faults_seen.update(found)
        policy = self.run_.on_nonfinite
        if policy == "raise":
            error = RunawayError if any(f.reason == "ran away" for f in found) else NonFiniteError
            raise error(sorted(found, key=by_step), "energy gradient or state")
        if policy == "restart":
            self._restart(rows, kernel, state, guard)

    def _restart(self, rows: slice, kernel, state, guard: Guard | None, since: int = 0) -> None:
        """Draw faulty chains anew, each at the step after its fault and not before `since`, until none is left."""
        while faulty := self._faulty(rows):
            for row in faulty:
                step = max(int(self.faults[row]) >> 16, since)
                self.faults_seen.add(self._fault(row, int(self.faults[row])))
                drawn = self.initial(row, 1, step)[0]
                if self.frozen is not None:
                    held = self.frozen[row] if self.frozen.ndim == self.x.ndim else self.frozen
                    drawn = torch.where(held, self.x[row], drawn)
                self.x[row] = drawn
                self.faults[row] = 0
                kernel.catch_up(state, row - rows.start, step)
                if guard is not None:
                    guard.begin_anew(row - rows.start)

    def _faulty(self, rows: slice) -> list[int]:
        return (torch.nonzero(self.faults[rows]).flatten() + rows.start).tolist()

    def _fault(self, row: int, code: int) -> Fault:
        if code & 0xFFFF == RAN_AWAY:
            return Fault(self.call.first_chain + row, (code >> 16) - 1, None, "ran away")
        leaf, name = (code & 0xFFFF) - 1, None
        if leaf >= 0 and self.branch is not None:
            name = repr(self.run_.branches.expressions[int(self.branch[row])])
        elif leaf >= 0:
            name = self.run_.plan.leaves[leaf].name
        return Fault(self.call.first_chain + row, (code >> 16) - 1, name)

    @torch.no_grad()
    def final_energies(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Energies of the final states at the last noise level: `[n]` and `[n, K]`."""
        plan, sigma = self.run_.plan, self._last_sigma()
        leaves = self.x.new_empty(self.call.n, len(plan.leaves))
        energy = self.x.new_empty(self.call.n)
        for rows in _cut(self._rows(), self.batch):
            columns = self._evaluator(rows, whole=True).energies(self.x[rows], sigma)
            for k, column in enumerate(columns):
                leaves[rows, k] = column.to(leaves.dtype)
            energy[rows] = plan.program.evaluate(columns, sigma).to(energy.dtype) if columns else 0.0
        self._check_final(leaves)
        return energy, leaves

    def _last_sigma(self) -> float | None:
        levels = self.run_.sampler.noise_levels()
        return levels[-1] if levels else None

    def _check_final(self, leaves: torch.Tensor) -> None:
        bad = ~torch.isfinite(leaves)
        if not bad.any():
            return
        step = self.call.target
        found = [Fault(self.call.first_chain + row, step, self.run_.plan.leaves[k].name)
                 for row, k in torch.nonzero(bad).tolist()]
        known = {f.chain for f in self.faults_seen}
        if self.run_.on_nonfinite == "raise":
            raise NonFiniteError(found, "energy")
        self.faults_seen.update(f for f in found if f.chain not in known)

    def trace_result(self) -> TraceResult | None:
        """What was kept, chains side by side; only steps that every chain of the call passed."""
        if self.trace is None:
            return None
        slices = len(list(self._rows()))
        steps = sorted(t for t, parts in self._kept.items() if len(parts) == slices)

        def stack(which: int):
            rows = [torch.cat([p[which] for p in sorted(self._kept[t], key=lambda p: p[0])]) for t in steps]
            return torch.stack(rows) if rows else None

        return TraceResult(torch.tensor(steps, dtype=torch.int64), stack(1) if self.trace.energy else None,
                           stack(2) if self.trace.states else None, self._diagnostics() if self._streams else None,
                           ([self._streams[k] for k in sorted(self._streams)], self._summary_shape) if self._streams else ())

    def state(self) -> SampleState:
        """Where every chain stands; its `x` is the result's."""
        call = self.call
        return SampleState(self.x, self.step, self.faults, call.seed, call.first_chain, call.base, call.target,
                           dict(call.conditions), self.carried)


def _cut(slices, size: int) -> list[slice]:
    """Slices in pieces of at most `size`."""
    return [slice(first, min(first + size, s.stop)) for s in slices for first in range(s.start, s.stop, size)]


def by_step(fault: Fault) -> tuple[int, int]:
    return fault.step, fault.chain


class Interrupt:
    """Turns the first Ctrl-C into a flag that is read between steps; a second one interrupts at once."""

    def __init__(self):
        self.requested = False
        self._previous = None

    def __enter__(self):
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_):
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _handle(self, *_):
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


class Bar:
    """A progress bar; mean energy and acceptance are read, at most a few times a second, of the chains that run."""

    PATIENCE = 0.3  # seconds

    def __init__(self, total: int):
        from tqdm import tqdm
        self._bar, self._shown = tqdm(total=total, unit="step", desc="sampling"), 0.0

    @property
    def done(self) -> int:
        """Steps that are shown as done."""
        return self._bar.n

    def go_back(self, done: int) -> None:
        """Show fewer steps: some are taken again."""
        self._bar.update(done - self._bar.n)

    def update(self, steps: int, kernel, evaluator, x: torch.Tensor, sigma: float | None) -> None:
        """`steps` more steps are done."""
        self._bar.update(steps)
        now = time.monotonic()
        if now - self._shown < self.PATIENCE:
            return
        self._shown = now
        info = getattr(kernel, "info", None)
        with torch.no_grad():
            plan = getattr(evaluator, "plan", None)
            if info is not None:
                leaves = [e.detach() for e in info.leaf_energies]
            else:
                leaves = evaluator.energies(x, sigma) if plan is None or plan.has_energies else None
            energy = math.nan if leaves is None else float(evaluator.total(leaves, sigma).mean())
            acceptance = kernel.acceptance()
        shown = {"energy": f"{energy:.4g}"} if math.isfinite(energy) else {}  # scores have none
        if acceptance is not None:
            shown["acceptance"] = f"{float(acceptance.mean()):.2f}"
        self._bar.set_postfix(shown, refresh=False)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()


def _default_batch(call: Call, leaves: int) -> int:
    most = BATCH_BYTES_GPU if call.device.type == "cuda" else BATCH_BYTES
    return max(1, min(call.n, most // (call.x_bytes * max(1, leaves))))
