"""`prepare` and `sample`: the driver that runs a sampler over micro-batches of chains."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import torch

from . import backends, rng
from .chain import Chain, NotNative
from .composition import Expression
from .plan import Plan, check_conditions
from .quick import QuickCall
from .samplers import SAMPLERS, Annealed, Sampler
from .state import Fault, Interrupted, NonFiniteError, Report, Result, SampleState, Trace, TraceResult

CHECK_EVERY = 16  # steps between two looks at the fault flags; a faulty chain stops at once in the kernel
BATCH_BYTES = 8 << 20  # default size of a micro-batch's gradients: a share of the last-level cache
ON_NONFINITE = ("raise", "freeze", "restart")
ENGINES = ("auto", "step", "chain")


class StepInfo(NamedTuple):
    """What a callback gets after each step; `x` `[B, *S]` is the live state of chains `first_chain` onwards."""

    step: int
    first_chain: int
    x: torch.Tensor
    sigma: float | None


def sample(expr: Expression, n: int | None = None, shape=None, sampler: Sampler | None = None,
           steps: int | None = None, seed=None, *, conditions: Mapping | None = None, x: torch.Tensor | None = None,
           init: str | Callable | None = None, first_chain: int = 0, frozen_mask: torch.Tensor | None = None,
           batch_size: int | None = None, device=None, compute_dtype: torch.dtype | None = None,
           backend: str = "auto", engine: str = "auto", trace: Trace | int | None = None,
           callback: Callable | None = None, progress: bool = False, energies: bool = True, on_nonfinite: str = "raise",
           resume: SampleState | None = None, allow_improper: bool = False) -> Result:
    """Draw chains of the composition `expr`: `prepare(expr, sampler, ...)` and one call of it.

    Every chain runs x <- clamp(x - drift·∇E(x) + noise·z) for `steps` steps, E the composed energy and z the
    noise of (seed, chain, step, element): the same whatever `n`, `batch_size`, device or backend.

    Args:
        expr: a `Concept` or a composition of them.
        n: chains; taken from `x`, `resume` or `conditions` where those are given.
        shape: shape S of one chain; taken from `x` or `resume` where given.
        sampler: `Langevin(...)`, `Annealed(...)`, `MALA(...)` or `HMC(...)`.
        steps: steps to take, 0 or more (`Annealed` has its own number).
        seed: an integer in [0, 2^64), a torch.Generator, or None for one from torch's generator (see `report.seed`).
        conditions: `{slot: [n, C]}`, one row per chain.
        x: starting points `[n, *S]`, not modified. Without it, `init`.
        init: "uniform" over the models' data range, else the clamp, else [0, 1]; "normal", scaled to the first
            noise level under `Annealed`; or a callable of (chain ids `[B]`, shape) → `[B, *S]`. The default is
            "uniform", and "normal" under `Annealed`.
        first_chain: id of the first chain; a shard of a larger run passes its offset.
        frozen_mask: bool `S` or `[n, *S]`; where True, x never moves (inpainting).
        batch_size: chains per micro-batch; the default keeps gradients within 8 MiB.
        compute_dtype: bfloat16 or float16 runs the models under autocast; x stays float32.
        backend: "auto", "reference" or "cpu" (see `ebmfast doctor`).
        engine: "chain" runs whole chains in C++, "step" one batched forward-backward and one kernel per step; "auto" takes
            the chain engine where every leaf is a native energy (`ebmfast.energies`) on the cpu backend.
        trace: an int k keeps the energy per chain every k steps; `Trace(every=k, states=True)` also x.
        callback: called with a `StepInfo` after every step of every micro-batch.
        progress: show a progress bar.
        energies: evaluate the energies of the final states.
        on_nonfinite: "raise"; "freeze" stops such chains where they last were finite and reports them; "restart"
            draws them anew from their own stream.
        resume: the `state` of an earlier result (100 + 100 steps equal 200, bit for bit) or of `Interrupted`.
        allow_improper: sample a composition that is not grounded.

    Returns:
        `Result` with x `[n, *S]`, energy `[n]`, leaf_energies `[n, K]`, trace, acceptance `[n]`, state, report.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
        UngroundedNegationError: the composition has no normalisable density.
        NonFiniteError: an energy or state stopped being finite, and on_nonfinite is "raise".
        Interrupted: Ctrl-C; its `state` resumes.
    """
    run = prepare(expr, sampler, shape=shape, steps=steps, batch_size=batch_size, device=device,
                  compute_dtype=compute_dtype, backend=backend, engine=engine, energies=energies,
                  on_nonfinite=on_nonfinite, allow_improper=allow_improper)
    return run(n, seed, conditions=conditions, x=x, init=init, first_chain=first_chain, frozen_mask=frozen_mask,
               trace=trace, callback=callback, progress=progress, resume=resume)


def prepare(expr: Expression, sampler: Sampler | None = None, *, shape=None, steps: int | None = None,
            batch_size: int | None = None, device=None, compute_dtype: torch.dtype | None = None,
            backend: str = "auto", engine: str = "auto", energies: bool = True, on_nonfinite: str = "raise",
            allow_improper: bool = False) -> Run:
    """Check and plan a sampling run once; the result is called with `n`, `seed`, ... as in `sample`.

    Model parameters are read at every call, so sampling, an optimizer step, and sampling again equals a fresh
    process. Arguments and errors are those of `sample`.
    """
    plan = Plan(expr, compute_dtype)
    if not isinstance(sampler, SAMPLERS):
        raise TypeError(f"`sampler` must be Langevin(...), Annealed(...), MALA(...) or HMC(...), got {sampler!r}")
    levels = sampler.noise_levels()
    plan.check_sigmas(levels)
    if not allow_improper and sampler.clamp is None:
        expr.check_grounded(levels)
    if sampler.steps is not None and steps is not None:
        raise ValueError(f"`steps` belongs to the sampler here: {type(sampler).__name__} takes {sampler.steps}")
    if steps is not None:
        _check_int("steps", steps, 0)
    if batch_size is not None:
        _check_int("batch_size", batch_size, 1)
    if on_nonfinite not in ON_NONFINITE:
        raise ValueError(f"`on_nonfinite` must be one of {', '.join(ON_NONFINITE)}, got {on_nonfinite!r}")
    if engine not in ENGINES:
        raise ValueError(f"`engine` must be one of {', '.join(ENGINES)}, got {engine!r}")
    if backend != "auto":
        backends.resolve(backend, "cpu" if device is None else device)
    return Run(plan, sampler, None if shape is None else _shape(shape), steps, batch_size, device, backend, engine,
               energies, on_nonfinite)


@dataclass(frozen=True)
class _Call:
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


class Run:
    """A prepared sampling run; call it as often as you like."""

    def __init__(self, plan, sampler, shape, steps, batch_size, device, backend, engine, energies, on_nonfinite):
        self.plan, self.sampler, self.shape, self.steps = plan, sampler, shape, steps
        self.batch_size, self.device, self.backend_name, self.engine_name = batch_size, device, backend, engine
        self.energies, self.on_nonfinite = energies, on_nonfinite
        self._chains: dict[tuple[int, ...], Chain | NotNative] = {}
        self._quick: dict[int, QuickCall] = {}
        self._lock = threading.RLock()  # over the two

    def __getstate__(self):
        """A copy, or a pickle, recognises its modules anew."""
        return vars(self) | {"_chains": {}, "_quick": {}, "_lock": None}

    def __setstate__(self, state):
        vars(self).update(state, _lock=threading.RLock())

    def __call__(self, n: int | None = None, seed=None, *, steps: int | None = None,
                 conditions: Mapping | None = None, x: torch.Tensor | None = None,
                 init: str | Callable | None = None, first_chain: int = 0,
                 frozen_mask: torch.Tensor | None = None, trace: Trace | int | None = None,
                 callback: Callable | None = None, progress: bool = False,
                 resume: SampleState | None = None, quick: bool = True) -> Result:
        """Draw chains; arguments as in `sample`. `quick=False` keeps even a short, plain call on the general path."""
        plain = resume is None and trace is None and callback is None and frozen_mask is None and init is None
        if quick and x is not None and plain and not progress:
            call = self._quick.get(self.steps if steps is None else steps)
            result = None if call is None else call(n, seed, conditions, x, first_chain)
            if result is not None:
                return result
        with torch.inference_mode(False), torch.enable_grad():
            return self._run(n, seed, steps, conditions, x, init, first_chain, frozen_mask, trace, callback, progress,
                             resume)

    def _run(self, n, seed, steps, conditions, x, init, first_chain, frozen_mask, trace, callback, progress, resume):
        call = self._check(n, seed, steps, conditions, x, first_chain, resume)
        backend = self._backend(call)
        with ExitStack() as held:
            chain = self._chain(call, backend, held)
            return self._draw(call, backend, chain, init, frozen_mask, trace, callback, progress, resume)

    def _draw(self, call: _Call, backend, chain: Chain | None, init, frozen_mask, trace, callback, progress, resume) -> Result:
        initial = self._initial(call, backend, init)
        frozen = _frozen_mask(frozen_mask, call)
        trace = Trace(every=trace) if isinstance(trace, int) else trace
        chains = _Chains(self, call, backend, chain, initial, frozen, trace, callback)
        started = time.perf_counter()
        with _Interrupt() as stop:
            chains.run(stop, progress)
            if stop.requested:
                raise Interrupted(chains.state())
            energy, leaf_energies = chains.final_energies() if self.energies else (None, None)
        report = self.describe(
            backend=backend.name, info=backend.info(), engine="step" if chain is None else "chain", device=call.device,
            dtype=call.dtype, seed=call.seed, first_chain=call.first_chain, chains=call.n, steps=call.target - call.base,
            batch=chains.batch, seconds=time.perf_counter() - started, coefficients=chains.coefficients, faults=chains.faults_seen)
        if resume is None and QuickCall.fits(self, chain):
            self._quick[call.target] = QuickCall(self, chain, call.shape, call.target)
        return Result(chains.x, energy, leaf_energies, chains.trace_result(), chains.state(), report, chains.acceptance())

    def explain(self) -> str:
        """The plan, the sampler, and the backend and engine that would run on this machine."""
        backend = backends.resolve(self.backend_name, _device(self.device, self.plan))
        lines = [self.plan.explain(self.shape), f"sampler      {self.sampler!r}", f"backend      {backend.name}"]
        if self.engine_name == "step" or backend.name != "cpu":
            why = "as asked" if self.engine_name == "step" else f"the one of backend {backend.name}"
        elif self.sampler.native_options() is None:
            why = f"the one that {type(self.sampler).__name__} runs in"
        else:
            return "\n".join(lines)
        lines.append(f"engine       step, {why}")
        return "\n".join(lines)

    def _check(self, n, seed, steps, conditions, x, first_chain, resume) -> _Call:
        if resume is not None:
            return self._check_resume(n, seed, steps, conditions, x, first_chain, resume)
        conditions = {k: torch.as_tensor(v) for k, v in (conditions or {}).items()}
        shape, dtype, device = self.shape, torch.float32, self.device
        if x is not None:
            x = _check_x(x, shape, device)
            n = _agree("n", n, x.shape[0], "`x`")
            shape, dtype, device = tuple(x.shape[1:]), x.dtype, x.device
        elif n is None and conditions:
            n = next(iter(conditions.values())).shape[0] if next(iter(conditions.values())).ndim else None
        if shape is None:
            raise ValueError("`shape` of one chain is needed, for instance shape=(3, 64, 64), or a starting `x`")
        if n is None:
            raise ValueError("`n`, the number of chains, is needed, or a starting `x`")
        _check_int("n", n, 0)
        _check_int("first_chain", first_chain, 0)
        if first_chain > rng.MAX_CHAINS - n:
            raise ValueError(f"`first_chain` must be at most 2^60 - {n}, got {first_chain}")
        steps = self._steps(steps)
        device = _device(device, self.plan)
        return _Call(x, n, shape, dtype, device, rng.resolve_seed(seed), first_chain, 0, steps,
                     torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.int64, device=device),
                     check_conditions(self.plan.expression, conditions, n))

    def _check_resume(self, n, seed, steps, conditions, x, first_chain, state) -> _Call:
        if not isinstance(state, SampleState):
            raise TypeError(f"`resume` must be the `state` of a result, got {type(state).__name__}")
        if x is not None or first_chain:
            raise ValueError("`x` and `first_chain` come from the state when `resume` is given")
        if seed is not None and rng.resolve_seed(seed) != state.seed:
            raise ValueError(f"`seed` must be that of the state, {state.seed}, or be left out, got {seed}")
        n = _agree("n", n, state.x.shape[0], "`resume`")
        start = _check_x(state.x, self.shape, self.device)
        base, target = state.base, state.target
        asked = steps if steps is not None else self.steps
        if state.finished:
            if self.sampler.steps is not None:
                raise ValueError(f"`resume`: these chains have taken all {self.sampler.steps} steps of the sampler")
            base, target = state.target, state.target + self._steps(steps)
        elif self.sampler.steps is None and asked is not None and asked != target - base:
            raise ValueError(
                f"`resume` is an interrupted run of {target - base} steps: finish it first (the same `steps`, or none)")
        rows = check_conditions(self.plan.expression, conditions or state.conditions, n)
        return _Call(start, n, tuple(start.shape[1:]), start.dtype, start.device, state.seed, state.first_chain, base,
                     target, state.step.clone(), state.faults.to(start.device).clone(), rows)

    def _steps(self, steps: int | None) -> int:
        if self.sampler.steps is not None:
            if steps is not None:
                raise ValueError(f"`steps` belongs to the sampler: {type(self.sampler).__name__} takes {self.sampler.steps}")
            return self.sampler.steps
        steps = self.steps if steps is None else steps
        if steps is None:
            raise ValueError("`steps`, the number of steps, is needed")
        return _check_int("steps", steps, 0)

    def _backend(self, call: _Call):
        name = self.backend_name
        if call.dtype != torch.float32:
            if name not in ("auto", "reference"):
                raise ValueError(f"`x` must be float32 for the backend {name!r}, got {call.dtype}")
            name = "reference"
        return backends.resolve(name, call.device)

    def _chain(self, call: _Call, backend, held: ExitStack) -> Chain | None:
        """The chain engine, its parameters read anew and its lock `held`, or None for the step engine."""
        if self.engine_name == "step":
            return None
        found: Chain | NotNative
        if self.sampler.native_options() is None:
            found = NotNative(f"{type(self.sampler).__name__} accepts and rejects, which the step engine does")
        elif backend.name != "cpu":
            found = NotNative(f"it belongs to backend 'cpu', this run is on {backend.name!r}")
        else:
            with self._lock:
                found = self._chains.get(call.shape)
                if not isinstance(found, Chain) or not self._fresh(found, held):
                    found = self._recognise(call.shape, held)
        if isinstance(found, NotNative):
            if self.engine_name == "chain":
                raise ValueError(f"`engine` is \"chain\", which cannot run this composition: {found}")
            return None
        return found

    @staticmethod
    def _fresh(chain: Chain, held: ExitStack) -> bool:
        """Whether the chain engine still fits; it then belongs to this thread until `held` ends."""
        chain.lock.acquire()
        if not chain.refresh():
            chain.lock.release()
            return False
        held.callback(chain.lock.release)
        return True

    def _recognise(self, shape: tuple[int, ...], held: ExitStack) -> Chain | NotNative:
        try:
            found: Chain | NotNative = Chain(
                self.plan.expression, shape, self.plan.compute_dtype, **self.sampler.native_options())
            if not self._fresh(found, held):
                raise NotNative("a module changed while it was being recognised")
        except NotNative as reason:
            found = reason
        self._chains[shape] = found
        return found

    def _initial(self, call: _Call, backend, init):
        """A function (first row, count, step) → starting points of those chains."""
        if init is None:
            init = "normal" if isinstance(self.sampler, Annealed) else "uniform"
        low, high = self.plan.data_range or self.sampler.clamp or (0.0, 1.0)
        center = (low + high) / 2 if self.plan.data_range else 0.0
        scale = self.sampler.initial_scale()

        def draw(row: int, count: int, step: int) -> torch.Tensor:
            where = dict(seed=call.seed, step=step, stream=rng.INIT, first_chain=call.first_chain + row,
                         device=call.device)
            if init == "uniform":
                return backend.uniform(call.shape, count, **where).mul_(high - low).add_(low)
            if init == "normal":
                return backend.normal(call.shape, count, **where).mul_(scale).add_(center)
            ids = torch.arange(row, row + count, device=call.device) + call.first_chain
            x = init(ids, call.shape)
            return _check_x(x, call.shape, call.device, f"init(...) for {count} chains", count).to(torch.float32)

        if call.x is not None:
            if self.on_nonfinite == "restart" and callable(init):
                raise ValueError('on_nonfinite="restart" needs init="uniform" or "normal" to draw chains anew')
        elif not callable(init) and init not in ("uniform", "normal"):
            raise ValueError(f'`init` must be "uniform", "normal" or a callable, got {init!r}')
        return draw

    def describe(self, *, backend: str, info: Mapping, engine: str, device, dtype, seed: int, first_chain: int, chains: int,
                 steps: int, batch: int, seconds: float, coefficients, faults) -> Report:
        """The report of a call."""
        from . import __version__
        return Report(
            expression=repr(self.plan.expression), sampler=repr(self.sampler), backend=backend, engine=engine, backend_info=info,
            device=str(device), dtype=str(dtype).removeprefix("torch."),
            compute_dtype=str(self.plan.compute_dtype or dtype).removeprefix("torch."), seed=seed, first_chain=first_chain,
            chains=chains, steps=steps, micro_batch=batch, seconds=seconds, step_scale=repr(self.plan.expression.step_scale),
            effective_temperature=coefficients.temperature(),
            versions={"ebmfast": __version__, "torch": torch.__version__}, faults=sorted(faults, key=_by_step))


class _Chains:
    """The chains of one call, and the loop over micro-batches and steps."""

    def __init__(self, run: Run, call: _Call, backend, chain: Chain | None, initial, frozen, trace, callback):
        self.run_, self.call, self.backend, self.chain, self.frozen = run, call, backend, chain, frozen
        self.initial, self.trace, self.callback = initial, trace, callback
        self.batch = run.batch_size or (_default_batch(call, len(run.plan.leaves)) if chain is None else max(1, call.n))
        self.coefficients = run.sampler.coefficients(run.plan.expression, call.target - call.base, call.base)
        fresh = call.x is None
        self.x = torch.empty(call.n, *call.shape, dtype=call.dtype, device=call.device) if fresh else call.x.clone()
        if fresh:
            for rows in self._rows():
                self.x[rows] = initial(rows.start, rows.stop - rows.start, 0)
        self.step, self.faults = call.step.clone(), call.faults.clone()
        self.faults_seen: set[Fault] = set()
        self._kept: dict[int, list] = {}
        self._accepted: torch.Tensor | None = None

    def acceptance(self) -> torch.Tensor | None:
        """The share of a chain's proposals that it accepted in this call, `[n]`; None for samplers without."""
        return self._accepted

    def _rows(self):
        """Slices of chains that run together: at most a micro-batch, all at the same step."""
        cuts = [0, *(torch.nonzero(self.call.step.diff()).flatten() + 1).tolist(), self.call.n]
        for low, high in zip(cuts, cuts[1:]):
            for first in range(low, high, self.batch):
                yield slice(first, min(first + self.batch, high))

    def run(self, stop: _Interrupt, progress: bool) -> None:
        """Take every chain to the target step, unless `stop` is requested."""
        slices = list(self._rows())
        total = sum(max(0, self.call.target - int(self.step[s.start])) for s in slices)
        bar = _bar(total, progress)
        try:
            for rows in slices:
                self._run_slice(rows, stop, bar)
        finally:
            if bar is not None:
                bar.close()

    def _evaluator(self, rows: slice):
        conditions = {name: c[rows] for name, c in self.call.conditions.items()}
        if self.chain is not None:
            return self.chain.bind(conditions)
        return self.run_.plan.bind(self.x[rows], conditions)

    def _run_slice(self, rows: slice, stop: _Interrupt, bar) -> None:
        call, first = self.call, int(self.step[rows.start])
        if first >= call.target:
            return
        x, faults, evaluator = self.x[rows], self.faults[rows], self._evaluator(rows)
        frozen = self.frozen if self.frozen is None or self.frozen.ndim == len(call.shape) else self.frozen[rows]
        kernel = self.run_.sampler.bind(
            evaluator, self.backend, self.coefficients, call.base, seed=call.seed,
            first_chain=call.first_chain + rows.start, frozen_mask=frozen)
        state = kernel.init(x, first, faults)
        looked = first
        while state.step < call.target and not stop.requested:
            before = state.step
            state = kernel.advance(state, self._until(before, kernel.stride))
            if state.step - looked >= (1 if self.run_.on_nonfinite == "restart" else CHECK_EVERY):
                self._handle_faults(rows, kernel, state)
                looked = state.step
            if self.callback is not None or self.trace is not None:
                self._observe(rows, state.step - 1, evaluator)
            if bar is not None:
                bar.update(state.step - before)
        self.step[rows] = state.step
        self._handle_faults(rows, kernel, state)
        if hasattr(kernel, "accepted"):
            self._accepted = torch.zeros(call.n, device=call.device) if self._accepted is None else self._accepted
            self._accepted[rows] = kernel.accepted / max(state.step - first, 1)

    def _until(self, step: int, stride: int) -> int:
        """Where the next call of a kernel ends: after `stride` steps, or where something has to be looked at."""
        until = min(self.call.target, step + stride)
        if self.callback is not None:
            return step + 1
        if self.trace is not None:
            until = min(until, step - step % self.trace.every + self.trace.every)
        return until

    def _observe(self, rows: slice, t: int, evaluator) -> None:
        sigma = self.coefficients.sigma[t - self.call.base]
        if self.callback is not None:
            self.callback(StepInfo(t + 1, self.call.first_chain + rows.start, self.x[rows], sigma))
            if self.chain is not None and not self.chain.refresh():
                raise RuntimeError('a callback changed a model so that the chain engine cannot go on; pass engine="step"')
        if self.trace is None or (t + 1) % self.trace.every:
            return
        with torch.no_grad():
            x = self.x[rows]
            energy = self.run_.plan.program.evaluate(evaluator.energies(x, sigma), sigma) if self.trace.energy else None
        self._kept.setdefault(t + 1, []).append((rows.start, energy, x.clone() if self.trace.states else None))

    def _handle_faults(self, rows: slice, kernel, state) -> None:
        if not self.faults[rows].any():
            return
        found = [self._fault(row, int(self.faults[row])) for row in self._faulty(rows)]
        self.faults_seen.update(found)
        policy = self.run_.on_nonfinite
        if policy == "raise":
            raise NonFiniteError(sorted(found, key=_by_step), "energy gradient or state")
        if policy == "restart":
            self._restart(rows, kernel, state)

    def _restart(self, rows: slice, kernel, state) -> None:
        """Draw faulty chains anew, each at the step after its fault, until none is left."""
        while faulty := self._faulty(rows):
            for row in faulty:
                step = int(self.faults[row]) >> 16
                self.faults_seen.add(self._fault(row, int(self.faults[row])))
                drawn = self.initial(row, 1, step)[0]
                if self.frozen is not None:
                    held = self.frozen[row] if self.frozen.ndim == self.x.ndim else self.frozen
                    drawn = torch.where(held, self.x[row], drawn)
                self.x[row] = drawn
                self.faults[row] = 0
                kernel.catch_up(state, row - rows.start, step)

    def _faulty(self, rows: slice) -> list[int]:
        return (torch.nonzero(self.faults[rows]).flatten() + rows.start).tolist()

    def _fault(self, row: int, code: int) -> Fault:
        leaf = (code & 0xFFFF) - 1
        name = self.run_.plan.leaves[leaf].name if leaf >= 0 else None
        return Fault(self.call.first_chain + row, (code >> 16) - 1, name)

    @torch.no_grad()
    def final_energies(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Energies of the final states at the last noise level: `[n]` and `[n, K]`."""
        plan, sigma = self.run_.plan, self._last_sigma()
        leaves = self.x.new_empty(self.call.n, len(plan.leaves))
        energy = self.x.new_empty(self.call.n)
        for rows in self._rows():
            columns = self._evaluator(rows).energies(self.x[rows], sigma)
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
                           stack(2) if self.trace.states else None)

    def state(self) -> SampleState:
        """Where every chain stands; its `x` is the result's."""
        call = self.call
        return SampleState(self.x, self.step, self.faults, call.seed, call.first_chain, call.base, call.target,
                           dict(call.conditions))


def _by_step(fault: Fault) -> tuple[int, int]:
    return fault.step, fault.chain


class _Interrupt:
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


def _bar(total: int, progress: bool):
    if not progress:
        return None
    from tqdm import tqdm
    return tqdm(total=total, unit="step", desc="sampling")


def _check_int(name: str, value, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}")
    return value


def _shape(shape) -> tuple[int, ...]:
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    for size in shape:
        _check_int("shape", size, 1)
    return shape


def _device(device, plan: Plan) -> torch.device:
    """The device asked for, else that of the first model with parameters, else the CPU."""
    if device is None:
        modules = [leaf.source.model for leaf in plan.leaves if isinstance(leaf.source.model, torch.nn.Module)]
        device = next((p.device for m in modules for p in m.parameters()), "cpu")
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"`device` is {device}, and torch sees no such device here")
    return device


def _agree(name: str, given: int | None, found: int, source: str) -> int:
    if given is not None and given != found:
        raise ValueError(f"`{name}` is {given}, but {source} has {found} chains")
    return found


def _check_x(x, shape, device, name: str = "x", n: int | None = None) -> torch.Tensor:
    """Starting points as a finite, contiguous floating tensor `[n, *shape]`, detached."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"`{name}` must be a tensor, got {type(x).__name__}")
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"`{name}` must be float32 (or float64 with the reference backend), got {x.dtype}")
    if x.ndim < 1 or (shape is not None and tuple(x.shape[1:]) != tuple(shape)) or (n is not None and len(x) != n):
        want = "[n, *S]" if shape is None else f"[{'n' if n is None else n}, {', '.join(map(str, shape))}]"
        raise ValueError(f"`{name}` must be {want}, got {list(x.shape)}")
    if device is not None and x.device != torch.device(device):
        raise ValueError(f"`{name}` must be on {torch.device(device)}, got {x.device}")
    bad = ~torch.isfinite(x.detach()).reshape(len(x), x[0].numel() if len(x) else 0).all(1)
    if bad.any():
        raise ValueError(f"`{name}` must be finite, got NaN or infinity in rows {torch.nonzero(bad).flatten().tolist()[:8]}")
    return x.detach().contiguous()


def _frozen_mask(mask, call: _Call) -> torch.Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"`frozen_mask` must be a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
    if tuple(mask.shape) not in (call.shape, (call.n, *call.shape)):
        raise ValueError(f"`frozen_mask` must be {list(call.shape)} or {[call.n, *call.shape]}, got {list(mask.shape)}")
    return mask.to(call.device).contiguous()


def _default_batch(call: _Call, leaves: int) -> int:
    size = 4 * max(1, leaves)
    for s in call.shape:
        size *= s
    return max(1, min(call.n, BATCH_BYTES // size))
