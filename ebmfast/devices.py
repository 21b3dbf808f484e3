"""One run on several devices: chains in contiguous blocks, a thread and a copy of the models for each device.

A chain's noise depends on seed and chain id, not on where it runs, so results are those of one device, up to the rounding of
models in batches of another size; with `batch_size`, blocks are whole micro-batches, and there is none on equal devices.
"""

from __future__ import annotations

import copy
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext

import torch
from torch import Tensor, nn

from ._checks import indexed
from .composition import Concept, Expression, LogSumExp, Sum, WithPrior
from .diagnostics import Stream, summarise
from .driver import Call, Interrupt, by_step
from .stacking import _HOOKS, _MODULE, _value
from .state import Interrupted, Result, SampleState, TraceResult


class Twin:
    """A copy of a module on another device, which is brought up to date and never changes the original."""

    def __init__(self, model: nn.Module, device: torch.device):
        self.model = model
        try:
            self.copy = copy.deepcopy(model).to(device)
        except RuntimeError as error:
            raise ValueError(f"{type(model).__name__} cannot be copied to {device}, which several devices need: {error}") from error
        for module in self.copy.modules():
            for name, value in vars(module).items():
                if name not in _MODULE and isinstance(value, Tensor):
                    vars(module)[name] = value.to(device)
        self._structure = _structure(model)

    def refresh(self) -> bool:
        """Take the numbers as they are now; False if the original is not built as it was."""
        if _structure(self.model) != self._structure:
            return False
        with torch.no_grad():
            for old, new in zip(_tensors(self.copy), _tensors(self.model), strict=True):
                old.copy_(new)
        return True


def _tensors(model: nn.Module) -> list[Tensor]:
    """Parameters, buffers and plain attributes that are tensors, in order."""
    found: dict[int, Tensor] = {}
    for module in model.modules():
        plain = (v for k, v in vars(module).items() if k not in _MODULE)
        for value in (*module._parameters.values(), *module._buffers.values(), *plain):
            if isinstance(value, Tensor):
                found.setdefault(id(value), value)
    return list(found.values())


def _structure(model: nn.Module) -> list:
    """What a copy must have in common with its original, beside the numbers in tensors."""
    found: list = []
    for name, module in model.named_modules(remove_duplicate=False):
        plain = {k: _value(v) for k, v in vars(module).items() if k not in _MODULE}
        hooks = [id(hook) for kind in _HOOKS for hook in getattr(module, kind, {}).values()]
        tensors = [(k, id(t), None if t is None else (t.shape, t.dtype, t.device))
                   for k, t in (*module._parameters.items(), *module._buffers.items())]
        found.append((name, id(module), module.training, plain, hooks, tensors))
    return found


def with_models(expression: Expression, change: Callable) -> Expression:
    """The same composition of other models: `change(model)`."""
    match expression:
        case Concept(source=source):
            other = Concept.__new__(Concept)
            gradient = None if source.gradient is None else change(source.gradient)
            other._set(dataclasses.replace(source, model=change(source.model), gradient=gradient), expression.condition,
                       expression.name, expression.family)
            return other
        case Sum(terms=terms):
            return dataclasses.replace(expression, terms=tuple((w, with_models(e, change)) for w, e in terms))
        case LogSumExp(children=children):
            return dataclasses.replace(expression, children=tuple(with_models(e, change) for e in children))
        case WithPrior():
            return dataclasses.replace(expression, expression=with_models(expression.expression, change),
                                       prior=with_models(expression.prior, change))
    raise TypeError(f"a composition has no such part: {expression!r}")


class Share:
    """The run of one device. The first uses the models themselves, where they are on that device already."""

    def __init__(self, expression: Expression, device: torch.device, first: bool, make: Callable):
        self.expression, self.device, self.make = expression, device, make
        self.stays = first and all(
            t.device == device for leaf in expression.leaves for t in _model_tensors(leaf.source.model))
        self.twins: dict[int, Twin] = {}
        self._build()

    def _build(self) -> None:
        self.twins = {}
        changed = self.expression if self.stays else with_models(self.expression, self._twin)
        self.run = self.make(changed, self.device)

    def _twin(self, model):
        if not isinstance(model, nn.Module):
            return model
        if id(model) not in self.twins:
            self.twins[id(model)] = Twin(model, self.device)
        return self.twins[id(model)].copy

    def refresh(self) -> None:
        """Models as they are now; copied anew where one is built differently."""
        if not all([twin.refresh() for twin in self.twins.values()]):
            self._build()


def _model_tensors(model) -> list[Tensor]:
    return _tensors(model) if isinstance(model, nn.Module) else []


class ManyDevices:
    """A prepared run on several devices; called as `Run`. Models are modules, or functions that work on every device."""

    def __init__(self, expression: Expression, devices: Sequence, make: Callable):
        """`make(expression, device)` prepares the run of one device."""
        self.devices = [_device(d) for d in devices]
        if not self.devices:
            raise ValueError("`device` must name one device or more, got an empty list")
        self.shares = [Share(expression, device, i == 0, make) for i, device in enumerate(self.devices)]
        self._lock = threading.Lock()

    @property
    def plan(self):
        """The first device's."""
        return self.shares[0].run.plan

    @property
    def sampler(self):
        """The sampler of every device."""
        return self.shares[0].run.sampler

    def explain(self) -> str:
        """As `Run.explain`, for the first device, and how chains are dealt out."""
        return f"{self.shares[0].run.explain()}\ndevices      {self._names()}: contiguous blocks of chains, a thread each"

    def _names(self) -> str:
        return ", ".join(map(str, self.devices))

    def __call__(self, n: int | None = None, seed=None, *, steps: int | None = None, conditions=None, x: Tensor | None = None,
                 init=None, first_chain: int = 0, frozen_mask: Tensor | None = None, trace=None, callback: Callable | None = None,
                 progress: bool = False, resume: SampleState | None = None, quick: bool = True) -> Result:
        """Draw chains; arguments as in `sample`. `x` and `resume` lie on the first device, and results do.

        A callback is called by one thread at a time."""
        with self._lock:
            for share in self.shares:
                share.refresh()
            call = self.shares[0].run._check(n, seed, steps, conditions, x, first_chain, resume)
            began = time.perf_counter()
            with Interrupt() as stop:
                work = Work(stop, callback)
                for share, rows in zip(self.shares, self._blocks(call.n)):
                    if rows.stop > rows.start or rows.start == 0:
                        work.start(share, _part(call, rows, share.device), init, _mask(frozen_mask, rows, call), trace, progress)
                results = work.results()
            return self._gathered(call, stop, results, time.perf_counter() - began)

    def _blocks(self, n: int) -> list[slice]:
        """Contiguous blocks of about equal size, whole micro-batches where their size is given."""
        unit, count = self.shares[0].run.batch_size or 1, len(self.shares)
        units = -(-n // unit)
        cuts = [min(n, unit * (units * i // count)) for i in range(count + 1)]
        return [slice(a, b) for a, b in zip(cuts, cuts[1:])] if units >= count else _each(n, unit, count)

    def _gathered(self, call: Call, stop: Interrupt, parts: list, seconds: float) -> Result:
        states = [p.state for p in parts]
        here = self.devices[0]
        state = dataclasses.replace(
            states[0], x=_joined([s.x for s in states], here), step=torch.cat([s.step for s in states]),
            faults=_joined([s.faults for s in states], here), first_chain=call.first_chain, conditions=dict(call.conditions))
        state.extra = {k: _joined([s.extra[k] for s in states], here) for k in state.extra}
        if stop.requested:
            raise Interrupted(state)
        reports = [p.report for p in parts]
        report = dataclasses.replace(
            reports[0], device=self._names(), chains=call.n, first_chain=call.first_chain, seconds=seconds,
            captured=all(r.captured for r in reports), uncaptured=next((r.uncaptured for r in reports if r.uncaptured), None),
            gpu=", ".join(dict.fromkeys(r.gpu for r in reports if r.gpu)) or None,
            tf32=tuple(dict.fromkeys(p for r in reports for p in r.tf32)),
            faults=sorted((f for r in reports for f in r.faults), key=by_step))
        return Result(state.x, *(_joined([getattr(p, name) for p in parts], here) for name in ("energy", "leaf_energies")),
                      _traces([p.trace for p in parts], state.faults), state, report,
                      _joined([p.acceptance for p in parts], here), _joined([p.branch for p in parts], torch.device("cpu")),
                      _joined([p.step_size for p in parts], here))


def _each(n: int, unit: int, count: int) -> list[slice]:
    """Fewer units than devices: one each, and nothing for the rest."""
    return [slice(min(n, i * unit), min(n, (i + 1) * unit)) for i in range(count)]


class Work:
    """The threads of a call. The first error stops all of them."""

    def __init__(self, stop: Interrupt, callback: Callable | None):
        self._stop, self._threads, self._callback = stop, [], callback
        self._found: dict[int, object] = {}
        self._errors: dict[int, BaseException] = {}
        self._turn = threading.Lock()

    def start(self, share: Share, call: Call, init, frozen, trace, progress: bool) -> None:
        """Begin a block of chains."""
        place, kind = len(self._threads), share.device.type
        if kind == "cuda":  # threads begin on another stream, and what they read must be there; another may be capturing already
            torch.cuda.current_stream(share.device).synchronize()
        ambient = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))

        def work() -> None:
            try:
                with ExitStack() as held:
                    if kind == "cuda":
                        held.enter_context(torch.cuda.device(share.device))
                    for context in (torch.inference_mode(False), torch.enable_grad(), ambient):
                        held.enter_context(context)
                    share.run.interrupt = lambda: nullcontext(self._stop)
                    callback = None if self._callback is None else self._called
                    self._found[place] = share.run._take(call, init, frozen, trace, callback, progress)
                    if kind == "cuda":
                        torch.cuda.current_stream().synchronize()
            except Interrupted as stopped:
                self._found[place] = stopped
            except BaseException as error:
                self._errors[place] = error
                self._stop.requested = True

        thread = threading.Thread(target=work, name=f"ebmfast {share.device}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _called(self, info) -> None:
        with self._turn:
            self._callback(info)

    def results(self) -> list:
        """Of every block a `Result`, or the `Interrupted` with its state; raises the error of the first block that has one."""
        for thread in self._threads:
            thread.join()
        if self._errors:
            raise self._errors[min(self._errors)]
        return [self._found[place] for place in range(len(self._threads))]


def _device(device) -> torch.device:
    device = torch.device(device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"`device` is {device}, and torch sees no such device here")
        device = indexed(device)
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"`device` is {device}, and torch sees {torch.cuda.device_count()} CUDA device(s) here")
    return device


def _part(call: Call, rows: slice, device: torch.device) -> Call:
    """A block of a call's chains."""
    return dataclasses.replace(
        call, x=None if call.x is None else call.x[rows].to(device), n=rows.stop - rows.start, device=device,
        first_chain=call.first_chain + rows.start, step=call.step[rows], faults=call.faults[rows].to(device),
        conditions={name: c[rows] for name, c in call.conditions.items()},
        extra={name: v[rows].to(device) for name, v in call.extra.items()})


def _mask(mask, rows: slice, call: Call):
    whole = isinstance(mask, Tensor) and tuple(mask.shape) == (call.n, *call.shape)
    return mask[rows] if whole and mask.ndim > len(call.shape) else mask


def _joined(tensors: list, device: torch.device) -> Tensor | None:
    return None if tensors[0] is None else torch.cat([t.to(device) for t in tensors])


def _traces(traces: list, faults: Tensor) -> TraceResult | None:
    """Chains side by side, at the steps that all of them passed in this call."""
    if traces[0] is None:
        return None
    device = faults.device
    steps = [t for t in traces[0].steps.tolist() if all(t in other.steps.tolist() for other in traces)]

    def side_by_side(name: str):
        if not steps or getattr(traces[0], name) is None:
            return None
        chosen = [getattr(t, name)[[t.steps.tolist().index(s) for s in steps]].to(device) for t in traces]
        return torch.cat(chosen, dim=1)

    result = TraceResult(torch.tensor(steps, dtype=torch.int64), side_by_side("energy"), side_by_side("x"))
    if all(t.moments for t in traces):
        streams = [_moved(stream, device) for t in traces for stream in t.moments[0]]
        result.diagnostics = summarise(streams, faults == 0, traces[0].moments[1])
    return result


def _moved(stream: Stream, device: torch.device) -> Stream:
    stream = copy.copy(stream)
    vars(stream).update({k: v.to(device) for k, v in vars(stream).items() if isinstance(v, Tensor)})
    return stream
