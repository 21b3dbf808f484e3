"""`prepare` and `sample`: arguments are checked and a run is planned; `driver` runs it."""

from __future__ import annotations

import math
import operator
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch

from . import backends, batching, memory, rng
from ._checks import indexed
from .branches import Branches, DrawBranches
from .capture import GRAPHS, Captures
from .chain import Chain, NotNative
from .composition import Expression
from .cuda_chain import CHAINS, tf32_products
from .devices import ManyDevices
from .driver import Call, Chains, Interrupt, StepInfo, by_step
from .plan import Plan, as_mapping, check_conditions
from .quick import QuickCall
from .samplers import SAMPLERS, Annealed, Langevin, Sampler
from .state import Interrupted, Report, Result, SampleState, Trace

ON_NONFINITE = ("raise", "freeze", "restart")
ENGINES = ("auto", "step", "chain")

Device = str | torch.device | Sequence[str | torch.device] | None


def sample(expr: Expression, n: int | None = None, shape: int | Sequence[int] | None = None, sampler: Sampler | None = None,
           steps: int | None = None, seed: int | torch.Generator | None = None, *,
           conditions: Mapping[str, torch.Tensor] | None = None, x: torch.Tensor | None = None,
           init: str | Callable[..., torch.Tensor] | None = None, first_chain: int = 0, frozen_mask: torch.Tensor | None = None,
           batch_size: int | None = None, memory_limit: int | str | None = None, device: Device = None,
           compute_dtype: torch.dtype | None = None, channels_last: bool = False, compile: bool = False,
           stack_models: bool | str = "auto", branches: str | DrawBranches | None = None, check: bool = True,
           capture: bool = True, backend: str = "auto", engine: str = "auto", trace: Trace | int | None = None,
           callback: Callable[[StepInfo], object] | None = None, progress: bool = False, energies: bool = True,
           on_nonfinite: str = "raise", resume: SampleState | None = None, allow_improper: bool = False) -> Result:
    """Draw chains of the composition `expr`: `prepare(expr, sampler, ...)` and one call of it.

    Every chain runs x <- clamp(x - drift·∇E(x) + noise·z) for `steps` steps, E the composed energy and z the
    noise of (seed, chain, step, element): the same whatever `n`, `batch_size`, device or backend.

    Args:
        expr: a `Concept` or a composition of them.
        n: chains; taken from `x`, `resume` or `conditions` where those are given.
        shape: shape S of one chain; taken from `x` or `resume` where given.
        sampler: `Langevin(...)`, `Annealed(...)`, `MALA(...)`, `HMC(...)` or `BAOAB(...)`.
        steps: steps to take, 0 or more (`Annealed` has its own number).
        seed: an integer in [0, 2^64), a torch.Generator, or None for one from torch's generator (see `report.seed`).
        conditions: `{slot: [n, C]}`, one row per chain.
        x: starting points `[n, *S]`, not modified. Without it, `init`.
        init: "uniform" over the models' data range, else the clamp (next to its finite end), else [0, 1]; "normal", scaled
            to the first noise level under `Annealed`; or a callable of (chain ids `[B]`, shape) → `[B, *S]`. The default is
            "uniform", and "normal" under `Annealed`.
        first_chain: id of the first chain; a shard of a larger run passes its offset.
        frozen_mask: bool `S` or `[n, *S]`; where True, x never moves (inpainting).
        batch_size: chains per micro-batch, all of whose steps run before the next starts. The default keeps gradients
            within 8 MiB, and all of a step within half of the memory; on a CPU, longer runs of slower models take what
            is measured to be fastest of that and its halves (`EBMFAST_MEASURE=0`: no measuring). `run.explain()` shows the times.
        memory_limit: bytes, or text like "2GB": the micro-batch is the greatest whose step fits, as measured.
        device: where chains run; several, as ["cuda:0", "cuda:1"], share them in contiguous blocks, each with a copy of the
            models, and results come to the first.
        compute_dtype: bfloat16 or float16 runs the models under autocast; x stays float32.
        channels_last: models get images in that memory format.
        compile: models run under torch.compile; the modules themselves are not touched.
        stack_models: whether different models of one architecture run as one, their parameters stacked: "auto" where that
            is measured to be faster for this shape on this machine (once; kept in the user's cache folder, and
            EBMFAST_MEASURE=0 means branches), True, or False. `run.explain()` shows both times.
        branches: "draw" samples an OR at the root branch by branch: every chain draws one with probability
            softmax(log w + log Z), equal Z unless `DrawBranches(log_z=...)` gives them, and runs only that, at a K-th of
            the cost. The proportions are exact, where chains from noise get them wrong. See `log_partition`.
        check: on the first call of a model, see that the rows of a batch do not see each other.
        capture: on a CUDA device with backend="triton", Langevin steps are recorded once as a CUDA graph and replayed, of other
            samplers the models and the composition; what cannot be recorded runs as it is, and `report.uncaptured` and
            `run.explain()` say why. False never records. What a model computes on the host, from numbers that are not its
            parameters, is recorded as it was.
        backend: "auto", "reference", "cpu", "triton" or "cuda"; `ebmfast doctor` says which are there.
        engine: "chain" runs whole chains in C++ or CUDA, "step" one batched forward-backward and one kernel per step; "auto" takes
            the chain engine where every leaf is a native energy (`ebmfast.energies`), on the backends cpu and cuda.
        trace: an int k keeps the energy per chain every k steps; `Trace(every=k, states=True)` also x;
            `Trace(every=k, diagnostics=True)` split R̂ and effective sample sizes.
        callback: called with a `StepInfo` after every step of every micro-batch. It may change the states, and models (with
            several devices those of the first only: the others' copies follow at the next call).
        progress: show a progress bar, with the mean energy and the acceptance of the chains that run.
        energies: evaluate the energies of the final states.
        on_nonfinite: "raise"; "freeze" stops such chains where they last were finite and reports them; "restart"
            draws them anew from their own stream.
        resume: the `state` of an earlier result (100 + 100 steps equal 200, bit for bit) or of `Interrupted`.
        allow_improper: sample a composition that is not grounded.

    Returns:
        `Result` with x `[n, *S]`, energy `[n]`, leaf_energies `[n, K]`, trace, acceptance `[n]`, step_size `[n]`, state, report.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
        UngroundedNegationError: the composition has no normalisable density.
        NonFiniteError: an energy or state stopped being finite, and on_nonfinite is "raise"; RunawayError, one of them:
            energies fall without end (`ebmfast.guard` says when that is seen).
        Interrupted: Ctrl-C; its `state` resumes.
    """
    run = prepare(expr, sampler, shape=shape, steps=steps, batch_size=batch_size, memory_limit=memory_limit, device=device,
                  compute_dtype=compute_dtype, channels_last=channels_last, compile=compile, stack_models=stack_models,
                  branches=branches, check=check, capture=capture, backend=backend, engine=engine, energies=energies,
                  on_nonfinite=on_nonfinite, allow_improper=allow_improper)
    return run(n, seed, conditions=conditions, x=x, init=init, first_chain=first_chain, frozen_mask=frozen_mask,
               trace=trace, callback=callback, progress=progress, resume=resume)


def prepare(expr: Expression, sampler: Sampler | None = None, *, shape: int | Sequence[int] | None = None, steps: int | None = None,
            batch_size: int | None = None, memory_limit: int | str | None = None, device: Device = None,
            compute_dtype: torch.dtype | None = None, channels_last: bool = False, compile: bool = False,
            stack_models: bool | str = "auto", branches: str | DrawBranches | None = None, check: bool = True,
            capture: bool = True, backend: str = "auto", engine: str = "auto", energies: bool = True, on_nonfinite: str = "raise",
            allow_improper: bool = False) -> Run | ManyDevices:
    """Check and plan a sampling run once; the result is called with `n`, `seed`, ... as in `sample`.

    Model parameters are read at every call, so sampling, an optimizer step, and sampling again equals a fresh
    process. Arguments and errors are those of `sample`.
    """
    if isinstance(device, (list, tuple)):
        options = {k: v for k, v in locals().items() if k not in ("expr", "sampler", "device")}
        return ManyDevices(expr, device, lambda e, one: prepare(e, sampler, device=one, **options))
    stack = False if compile and stack_models == "auto" else stack_models
    ways = {"channels_last": channels_last, "compile": compile, "stack": stack}
    plan = Plan(expr, compute_dtype, **ways)
    if not isinstance(sampler, SAMPLERS):
        raise TypeError(f"`sampler` must be one of {', '.join(f'{s.__name__}(...)' for s in SAMPLERS)}, got {sampler!r}")
    if shape is not None:
        shape = _shape(shape)
        plan.check_shape(shape)
    levels = sampler.noise_levels()
    plan.check_sigmas(levels)
    if not allow_improper and sampler.clamp is None:
        expr.check_grounded(levels)
    if sampler.steps is not None and steps is not None:
        raise ValueError(f"`steps` belongs to the sampler here: {type(sampler).__name__} takes {sampler.steps}")
    if steps is not None:
        steps = _check_int("steps", steps, 0)
    if batch_size is not None:
        batch_size = _check_int("batch_size", batch_size, 1)
        if memory_limit is not None:
            raise ValueError("`batch_size` and `memory_limit` exclude each other")
    if memory_limit is not None:
        memory_limit = memory.as_bytes(memory_limit)
    if sampler.needs_energies:
        plan.check_energies(type(sampler).__name__)
    if branches is not None:
        draw = DrawBranches() if branches == "draw" else branches
        if not isinstance(draw, DrawBranches):
            raise ValueError(f'`branches` must be "draw", a DrawBranches or None, got {branches!r}')
        if engine == "chain":
            raise ValueError('`branches` runs in the step engine; leave out engine="chain"')
        branches, engine = Branches(plan, draw, ways, levels[-1] if levels else None), "step"
    if on_nonfinite not in ON_NONFINITE:
        raise ValueError(f"`on_nonfinite` must be one of {', '.join(ON_NONFINITE)}, got {on_nonfinite!r}")
    if engine not in ENGINES:
        raise ValueError(f"`engine` must be one of {', '.join(ENGINES)}, got {engine!r}")
    if backend != "auto":
        home = backends.home(backend) if backend in backends.NAMES else "cpu"
        backends.resolve(backend, home if device is None else device)
    return Run(plan, sampler, shape, steps, batch_size, device, backend, engine,
               energies and plan.has_energies, on_nonfinite, memory_limit, branches, check, capture)


class Run:
    """A prepared sampling run; call it as often as you like."""

    interrupt = Interrupt  # what turns Ctrl-C into a flag

    def __init__(self, plan, sampler, shape, steps, batch_size, device, backend, engine, energies, on_nonfinite,
                 memory_limit=None, branches: Branches | None = None, check: bool = True, capture: bool = True):
        self.plan, self.sampler, self.shape, self.steps = plan, sampler, shape, steps
        self.batch_size, self.device, self.backend_name, self.engine_name = batch_size, device, backend, engine
        self.energies, self.on_nonfinite, self.check = energies, on_nonfinite, check
        self.memory_limit, self.branches = memory_limit, branches
        self.captures = Captures(capture)
        self.fitting: dict = {}  # micro-batches that fit the memory: by shape, dtype and device
        self.halved: dict = {}  # micro-batches after memory was out: by shape and device
        self.rates: dict = {}  # measured seconds of smaller and smaller micro-batches: by shape, dtype and the largest one
        self._chains: dict[tuple[tuple[int, ...], torch.device], Chain | NotNative] = {}
        self._quick: dict[int, QuickCall] = {}
        self._lock = threading.RLock()  # over the two

    def __getstate__(self):
        """A copy, or a pickle, recognises its modules anew."""
        return vars(self) | {"_chains": {}, "_quick": {}, "_lock": None}

    def __setstate__(self, state):
        vars(self).update(state, _lock=threading.RLock())

    def __call__(self, n: int | None = None, seed: int | torch.Generator | None = None, *, steps: int | None = None,
                 conditions: Mapping[str, torch.Tensor] | None = None, x: torch.Tensor | None = None,
                 init: str | Callable[..., torch.Tensor] | None = None, first_chain: int = 0,
                 frozen_mask: torch.Tensor | None = None, trace: Trace | int | None = None,
                 callback: Callable[[StepInfo], object] | None = None, progress: bool = False,
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
        return self._take(call, init, frozen_mask, trace, callback, progress, resume)

    def _take(self, call: Call, init, frozen_mask, trace, callback, progress, resume=None) -> Result:
        backend = self._backend(call)
        with ExitStack() as held:
            chain = self._chain(call, backend, held)
            if self.captures.against(backend, call.device) is None:
                held.enter_context(self.captures.lock)
            return self._draw(call, backend, chain, init, frozen_mask, trace, callback, progress, resume)

    def _draw(self, call: Call, backend, chain: Chain | None, init, frozen_mask, trace, callback, progress, resume) -> Result:
        initial = self._initial(call, backend, init)
        frozen = _frozen_mask(frozen_mask, call)
        if call.x is not None:
            _check_inside(call.x, self._bounds, frozen, "`x`")
        trace = Trace(every=trace) if hasattr(trace, "__index__") else trace
        if not isinstance(trace, Trace | None):
            raise TypeError(f"`trace` must be a Trace, a number of steps or None, got {trace!r}")
        if trace is not None and trace.energy:
            self.plan.check_energies("Trace(energy=True)")
        chains = Chains(self, call, backend, chain, initial, frozen, trace, callback)
        if self.branches is not None:
            self.branches.check_temperature(*chains.coefficients.temperature())
        started = time.perf_counter()
        with self.interrupt() as stop:
            chains.run(stop, progress)
            if stop.requested:
                raise Interrupted(chains.state())
            energy, leaf_energies = chains.final_energies() if self.energies else (None, None)
        report = self.describe(
            backend=backend.name, info=backend.info(), engine="step" if chain is None else "chain", device=call.device,
            dtype=call.dtype, seed=call.seed, first_chain=call.first_chain, chains=call.n, steps=call.target - call.base,
            batch=chains.batch, seconds=time.perf_counter() - started, coefficients=chains.coefficients, faults=chains.faults_seen)
        report.halved_from = chains.halved_from
        report.captured = bool(chains.captured) and all(chains.captured)
        report.uncaptured = None if report.captured or call.device.type not in GRAPHS else chains.uncaptured
        if resume is None and QuickCall.fits(self, chain, call.target):
            self._quick[call.target] = QuickCall(self, chain, call.shape, call.target)
        return Result(chains.x, energy, leaf_energies, chains.trace_result(), chains.state(), report, chains.acceptance(),
                      chains.branch, chains.step_size())

    def explain(self) -> str:
        """The plan, the sampler, and the backend and engine that would run on this machine."""
        device = _device(self.device, self.plan)
        backend = backends.resolve(self.backend_name, device)
        lines = [self.plan.explain(self.shape, device), f"sampler      {self.sampler!r}", f"backend      {backend.name}"]
        lines += [f"micro-batch  {batching.describe(times, key[-1])}" for key, times in self.rates.items() if len(times) > 1]
        if self.engine_name == "step" or backend.name not in CHAINS:
            why = "as asked" if self.engine_name == "step" else f"the one of backend {backend.name}"
        elif (options := self.sampler.native_options()) is None:
            why = f"the one that {type(self.sampler).__name__} runs in"
        elif (refusal := CHAINS[backend.name].refusal(options)) is not None:
            why = refusal
        else:
            return "\n".join(lines)
        lines.append(f"engine       step, {why}")
        if device.type in GRAPHS:
            reason = self.captures.against(backend, device) or self.captures.reason
            whole = isinstance(getattr(self.sampler, "inner", self.sampler), Langevin)
            yes = f"yes, {'steps' if whole else 'models and composition'} as a CUDA graph"
            lines.append(f"captured     {yes if reason is None else f'no: {reason}'}")
        if self.branches is not None:
            shares = ", ".join(f"{p:.3g}" for p in self.branches.probabilities.tolist())
            lines.append(f"branches     drawn with probabilities {shares}; each chain runs its own")
        return "\n".join(lines)

    def _check(self, n, seed, steps, conditions, x, first_chain, resume) -> Call:
        self.plan.check_uncoupled()  # modes may have changed since the run was prepared
        if resume is not None:
            return self._check_resume(n, seed, steps, conditions, x, first_chain, resume)
        conditions = {k: torch.as_tensor(v) for k, v in as_mapping(conditions).items()}
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
        n, first_chain = _check_int("n", n, 0), _check_int("first_chain", first_chain, 0)
        if first_chain > rng.MAX_CHAINS - n:
            raise ValueError(f"`first_chain` must be at most 2^60 - {n}, got {first_chain}")
        self.plan.check_shape(shape)
        steps = self._steps(steps)
        device = _device(device, self.plan)
        return Call(x, n, shape, dtype, device, rng.resolve_seed(seed), first_chain, 0, steps,
                     torch.zeros(n, dtype=torch.int64, device="cpu"), torch.zeros(n, dtype=torch.int64, device=device),
                     check_conditions(self.plan.expression, conditions, n))

    def _check_resume(self, n, seed, steps, conditions, x, first_chain, state) -> Call:
        if not isinstance(state, SampleState):
            raise TypeError(f"`resume` must be the `state` of a result, got {type(state).__name__}")
        if x is not None or first_chain:
            raise ValueError("`x` and `first_chain` come from the state when `resume` is given")
        if seed is not None and rng.resolve_seed(seed) != state.seed:
            raise ValueError(f"`seed` must be that of the state, {state.seed}, or be left out, got {seed}")
        n = _agree("n", n, state.x.shape[0], "`resume`")
        start = _check_x(state.x, self.shape, self.device)
        base, target = state.base, state.target
        asked = steps if steps is not None else self.steps if self.sampler.steps is None else self.sampler.steps
        if state.finished:
            if self.sampler.steps is not None:
                raise ValueError(
                    f"`resume`: this run is finished, and {type(self.sampler).__name__} takes its {self.sampler.steps} steps from"
                    " the start: pass the state's `x` as `x`")
            base, target = state.target, state.target + self._steps(steps)
        elif asked is not None and asked != target - base:
            remedy = "the same `steps`, or none" if self.sampler.steps is None else "a sampler of as many"
            raise ValueError(f"`resume` is an interrupted run of {target - base} steps: finish it first ({remedy})")
        rows = check_conditions(self.plan.expression, conditions or state.conditions, n)
        return Call(start, n, tuple(start.shape[1:]), start.dtype, start.device, state.seed, state.first_chain, base,
                     target, state.step.clone(), state.faults.to(start.device).clone(), rows,
                     {name: values.to(start.device) for name, values in state.extra.items()})

    def _steps(self, steps: int | None) -> int:
        if self.sampler.steps is not None:
            if steps is not None:
                raise ValueError(f"`steps` belongs to the sampler: {type(self.sampler).__name__} takes {self.sampler.steps}")
            return self.sampler.steps
        steps = self.steps if steps is None else steps
        if steps is None:
            raise ValueError("`steps`, the number of steps, is needed")
        return _check_int("steps", steps, 0)

    def _backend(self, call: Call):
        name = self.backend_name
        if call.dtype != torch.float32:
            if name not in ("auto", "reference"):
                raise ValueError(f"`x` must be float32 for the backend {name!r}, got {call.dtype}")
            name = "reference"
        return backends.resolve(name, call.device)

    def _chain(self, call: Call, backend, held: ExitStack) -> Chain | None:
        """The chain engine, its parameters read anew and its lock `held`, or None for the step engine."""
        if self.engine_name == "step":
            return None
        found: Chain | NotNative
        if self.sampler.native_options() is None:
            found = NotNative(f"{self.sampler!r} takes its steps in the step engine")
        elif backend.name not in CHAINS:
            found = NotNative(f"it belongs to the backends {' and '.join(CHAINS)}, this run is on {backend.name!r}")
        else:
            with self._lock:
                found = self._chains.get((call.shape, call.device))
                if not isinstance(found, Chain) or not self._fresh(found, held):
                    found = self._recognise(CHAINS[backend.name], call, held)
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

    def _recognise(self, kind: type[Chain], call: Call, held: ExitStack) -> Chain | NotNative:
        try:
            found: Chain | NotNative = kind(
                self.plan.expression, call.shape, self.plan.compute_dtype, device=call.device, **self.sampler.native_options())
            if not self._fresh(found, held):
                raise NotNative("a module changed while it was being recognised")
        except NotNative as reason:
            found = reason
        self._chains[call.shape, call.device] = found
        return found

    @property
    def _bounds(self) -> tuple[float, float] | None:
        """Of a sampler that rejects what lies outside, so that chains have to start inside."""
        return getattr(getattr(self.sampler, "inner", self.sampler), "bounds", None)

    def _initial(self, call: Call, backend, init):
        """A function (first row, count, step) → starting points of those chains."""
        if init is None:
            init = "normal" if isinstance(self.sampler, Annealed) else "uniform"
        low, high = self.plan.data_range or _interval(*(self.sampler.clamp or (0.0, 1.0)))
        bounds = self._bounds
        center = (low + high) / 2 if self.plan.data_range else 0.0
        scale = self.sampler.initial_scale()

        def draw(row: int, count: int, step: int) -> torch.Tensor:
            where = dict(seed=call.seed, step=step, stream=rng.INIT, first_chain=call.first_chain + row,
                         device=call.device)
            if init == "uniform":
                x = backend.uniform(call.shape, count, **where).mul_(high - low).add_(low)
                return x if bounds is None else x.clamp_(*bounds)
            if init == "normal":
                x = backend.normal(call.shape, count, **where).mul_(scale).add_(center)
                return x if bounds is None else x.clamp_(*bounds)
            ids = torch.arange(row, row + count, device=call.device) + call.first_chain
            x = init(ids, call.shape)
            what = f"init(...) for {count} chains"
            x = _check_x(x, call.shape, call.device, what, count).to(torch.float32)
            _check_inside(x, bounds, None, what)
            return x

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
            effective_temperature=coefficients.temperature(), models=self.plan.ways(),
            versions={"ebmfast": __version__, "torch": torch.__version__}, faults=sorted(faults, key=by_step),
            gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else None, tf32=tf32_products(device, engine))


def _check_int(name: str, value, least: int) -> int:
    try:
        found = operator.index(value)  # numpy's integers too
    except TypeError:
        found = None
    if found is None or isinstance(value, bool):
        raise TypeError(f"`{name}` must be an integer, got {value!r}")
    if found < least:
        raise ValueError(f"`{name}` must be at least {least}, got {found}")
    return found


def _shape(shape) -> tuple[int, ...]:
    return tuple(_check_int("shape", size, 1) for size in ((shape,) if hasattr(shape, "__index__") else shape))


def _device(device, plan: Plan) -> torch.device:
    """The device asked for, else that of the first model with parameters, else the CPU."""
    device = plan.home if device is None else torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"`device` is {device}, and torch sees no such device here")
    return indexed(device)


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
    if 0 in x.shape[1:]:
        raise ValueError(f"`{name}` must not have chains without elements, got {list(x.shape)}")
    if device is not None and x.device != indexed(device):
        raise ValueError(f"`{name}` must be on {indexed(device)}, got {x.device}")
    bad = ~torch.isfinite(x.detach()).reshape(len(x), x[0].numel() if len(x) else 0).all(1)
    if bad.any():
        raise ValueError(f"`{name}` must be finite, got NaN or infinity in rows {torch.nonzero(bad).flatten().tolist()[:8]}")
    return x.detach().contiguous()


def _interval(low: float, high: float) -> tuple[float, float]:
    """Where chains are drawn within a clamp: next to the finite end where the other one is not."""
    if math.isinf(low):
        low = high - 1.0 if math.isfinite(high) else 0.0
    return low, low + 1.0 if math.isinf(high) else high


def _check_inside(x: torch.Tensor, bounds: tuple[float, float] | None, frozen: torch.Tensor | None, name: str) -> None:
    """Raise where chains would start outside of the bounds, where they would stay: what is outside is rejected."""
    if bounds is None:
        return
    outside = (x < bounds[0]) | (x > bounds[1])
    if frozen is not None:
        outside &= ~frozen
    bad = torch.nonzero(outside.reshape(len(x), -1).any(1)).flatten().tolist() if x.numel() else []
    if bad:
        raise ValueError(f"{name} must lie within `bounds`, {bounds[0]:g} to {bounds[1]:g}: rows {bad[:8]} do not")


def _frozen_mask(mask, call: Call) -> torch.Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"`frozen_mask` must be a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
    if tuple(mask.shape) not in (call.shape, (call.n, *call.shape)):
        raise ValueError(f"`frozen_mask` must be {list(call.shape)} or {[call.n, *call.shape]}, got {list(mask.shape)}")
    return mask.to(call.device).contiguous()
