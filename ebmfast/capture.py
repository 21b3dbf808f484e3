"""Steps recorded once as CUDA graphs: what is recorded, when a recording still fits, and why a run is not captured.

A recording reads and writes memory that stays where it is: `samplers.captured`. Parameters are not copied. The
kernels of a recording read them where they are, so an optimizer step, which changes them in place, is seen by the next
replay. A parameter that moved, or a module that is not what it was, makes another key, and steps are recorded anew.

Sources: PyTorch's notes on CUDA graphs (warm-up and capture on a side stream, private memory pools, autograd inside a
capture, autocast without its cache).
"""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from .evaluator import Evaluator
from .samplers.annealed import DenoisingKernel
from .samplers.captured import CapturedGradients, CapturedKernel, GradientRecording, NotCapturable, Recording
from .samplers.langevin import LangevinKernel
from .stacking import _HOOKS, _MODULE, _PLAIN

KEPT = 8  # recordings of a prepared run that are kept, the one used last longest
WARM_UP = 3  # steps before a capture; torch asks for them, so that libraries are initialised and kernels compiled
_capturing = threading.Lock()  # torch's allocator takes one capture of a process at a time


def free_memory() -> None:
    """Give memory that nothing uses back to the devices; waits until no thread captures, which that would break."""
    with _capturing:
        gc.collect()  # errors hold the frames, and so the tensors, of what failed
        torch.cuda.empty_cache()


class CudaGraphs:
    """The graph primitive of torch on one device, and what goes with it: forks, flags that are looked at later.

    All graphs share a memory pool. Nothing in it has to survive a replay, and replays follow each other on one stream. Work
    before a capture runs on streams of its own: what libraries keep by stream (cuBLAS its workspace) is then made inside the
    pool, and a graph that goes, which lets go of it, takes no memory from the others.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._pool = self._side = self._warm = None
        self._graphs: weakref.WeakSet = weakref.WeakSet()  # that are in the pool
        self._branches: dict = {}  # by the stream that forks to them
        self._forked = 0  # of them, how many the step at hand uses

    def record(self, function: Callable[[], None], warm_up: Callable[[], None]) -> Callable[[], None]:
        """What `function` launches, as a replay; `warm_up` runs the same kernels before, a few times."""
        with _capturing, torch.cuda.device(self.device):
            gc.collect()  # a graph that only the traceback of a failed recording holds does not count
            if not self._graphs:  # torch takes no pool again that all graphs have left
                self._pool, self._side, self._warm = torch.cuda.graph_pool_handle(), torch.cuda.Stream(), torch.cuda.Stream()
                self._branches.clear()
            here = torch.cuda.current_stream()
            self._warm.wait_stream(here)
            try:
                with torch.cuda.stream(self._warm):
                    for _ in range(WARM_UP):
                        warm_up()
            finally:
                here.wait_stream(self._warm)
            self._grow(self._side, len(self._branches.get(self._warm, ())))
            graph = torch.cuda.CUDAGraph()
            self._drop_workspaces()
            try:
                # thread_local: what threads of other devices do meanwhile does not spoil the capture.
                with torch.cuda.graph(graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"):
                    function()
            except BaseException:
                torch.cuda.set_stream(here)  # a capture that cannot be ended leaves its own stream in place
                self._recover()
                raise
            finally:
                self._drop_workspaces()
            self._graphs.add(graph)
            return graph.replay

    @staticmethod
    def _drop_workspaces() -> None:
        """cuBLAS takes new ones at its next call, of the pool in use then: graphs of two pools must not share one."""
        with contextlib.suppress(AttributeError):
            torch._C._cuda_clearCublasWorkspaces()

    def _recover(self) -> None:
        """After a capture that CUDA gave up torch still believes in it: the allocator is told its end, and a capture that
        succeeds resets the generators."""
        self._graphs = weakref.WeakSet()  # the next capture begins with another pool
        with contextlib.suppress(Exception):
            torch._C._cuda_endAllocateToPool(self.device.index or 0, self._pool)
        with contextlib.suppress(Exception):
            something = torch.zeros(1, device=self.device)
            with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
                something.add_(1)

    def fork(self, functions: Sequence[Callable]) -> list:
        """Results of the functions, which run side by side: the first here, each of the others on a stream of its own."""
        here, others = torch.cuda.current_stream(self.device), functions[1:]
        results, self._forked = [], 0
        try:
            for stream, function in zip(self._grow(here, len(others)), others):
                stream.wait_stream(here)
                self._forked += 1
                with torch.cuda.stream(stream):
                    results.append(function())
            results.insert(0, functions[0]())
        finally:
            self._wait()
        return results

    def join(self) -> None:
        """Wait, on this stream, for the streams that this step forked to; a backward pass goes back to them."""
        self._wait()
        self._forked = 0  # other streams are not in the next step's capture

    def _wait(self) -> None:
        here = torch.cuda.current_stream(self.device)
        for stream in self._branches.get(here, [])[:self._forked]:
            here.wait_stream(stream)

    def _grow(self, stream, count: int) -> list:
        """The streams that `stream` forks to, at least `count`."""
        branches = self._branches.setdefault(stream, [])
        branches += [torch.cuda.Stream(self.device) for _ in range(count - len(branches))]
        return branches

    def send(self, target: Tensor, values: Tensor) -> None:
        """Copy numbers of the host to the device without waiting for it."""
        target.copy_(values.pin_memory(), non_blocking=True)

    def look(self, flags: Tensor) -> Callable[[], bool]:
        """Whether any flag is set now, to be asked later: that waits for what was launched before this call, not after it."""
        with torch.cuda.device(self.device):
            seen = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True)
            seen.copy_(flags.any(), non_blocking=True)
            event = torch.cuda.Event(blocking=True)
            event.record()

        def answer() -> bool:
            event.synchronize()
            return bool(seen)

        return answer


GRAPHS: dict[str, Callable] = {"cuda": CudaGraphs}  # by type of device


class Watch(TorchDispatchMode):
    """Notes the first operation of a step that cannot be captured."""

    def __init__(self):
        super().__init__()
        self.reason: str | None = None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if self.reason is None:
            self.reason = _against(function, args, kwargs or {}, out)
        return out


def _against(function, args, kwargs, out) -> str | None:
    """Why an operation cannot be captured."""
    name = str(function)
    tensors = [t for t in tree_iter((args, kwargs, out)) if isinstance(t, Tensor)]
    if kwargs.get("generator") is not None:
        return f"a model draws from a generator of its own ({name})"
    if "aten.index" in name and name.split(".")[1] in ("index", "index_put", "index_put_", "_index_put_impl_"):
        bools = any(t.dtype in (torch.bool, torch.uint8) for t in tree_iter(args[1]) if isinstance(t, Tensor))
        return f"a model selects by a mask, the size of which the host waits for ({name})" if bools else None
    if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(getattr(function, "tags", ())):
        return f"a model waits for a result on the host ({name})"
    if len({t.device.type == "cpu" for t in tensors}) > 1 and name.startswith(("aten._to_copy", "aten.copy_")):
        return f"a model copies between host and device ({name})"
    if name.startswith("aten.lift_fresh") and any(t.device.type != "cpu" for t in tensors):
        return "a model makes a tensor of numbers (torch.tensor), which copies from the host; make it once, as a buffer"
    return None


class Captures:
    """The recordings of a prepared run: by shapes, options and everything of the models that a recording relies on."""

    def __init__(self, enabled: bool = True):
        self.enabled = enabled
        self.lock = threading.RLock()  # buffers of a recording serve one call at a time
        self.reason: str | None = None  # why the last steps were not captured
        self.recorded = 0  # recordings made, ever
        self._graphs: dict[torch.device, object] = {}
        self._kept: OrderedDict[tuple, Recording | GradientRecording] = OrderedDict()
        self._refused: OrderedDict[tuple, str] = OrderedDict()

    def __reduce__(self):
        return Captures, (self.enabled,)  # a copy records anew

    def against(self, backend, device: torch.device) -> str | None:
        """Why steps of that backend on that device are not captured; None if they are."""
        if not self.enabled:
            return "capture=False"
        if device.type not in GRAPHS:
            return f"there are CUDA graphs on CUDA devices only, this is {device}"
        if not backend.captures:
            return f"backend {backend.name!r} takes step and schedules from the host; backend=\"triton\" reads them on the device"
        return None

    def wrap(self, kernel, backend, device: torch.device, *, watched: bool, at_once: bool):
        """The kernel, replaying its steps, or the gradients that it asks for, from a recording where that can be.

        `watched`: models may change between steps. `at_once`: faults are looked at after every step.
        """
        self.reason = self.against(backend, device)
        parts = [kernel.inner, kernel.descent] if isinstance(kernel, DenoisingKernel) else [kernel]
        evaluator = getattr(parts[0], "evaluator", None)
        if self.reason is None and not isinstance(evaluator, Evaluator):
            own = "every chain runs a branch of its own"
            self.reason = own if evaluator is not None else f"{type(kernel).__name__} takes its gradients from elsewhere"
        if self.reason is not None:
            return kernel
        if isinstance(kernel, LangevinKernel):
            return CapturedKernel(kernel, self, watched=watched, at_once=at_once)
        gradients = CapturedGradients(evaluator, self, watched=watched)
        for part in parts:
            part.evaluator = gradients
        return kernel

    def find(self, kernel, state, steps) -> Recording | GradientRecording | None:
        """A recording that fits, ready for these chains; None, and the `reason`, if there cannot be one.

        `kernel`: one of Langevin steps, with their `state` and range; or `CapturedGradients`, with `At` and a noise level."""
        x, graphs = state.x, self._graphs.get(state.x.device)
        if graphs is None:
            graphs = self._graphs[x.device] = GRAPHS[x.device.type](x.device)
        kind = getattr(kernel, "recording", Recording)
        key = self._key(kind, kernel, state)
        if (reason := self._refused.get(key)) is None:
            recording = self._kept.pop(key, None)
            try:
                if recording is None:
                    recording = kind(graphs, kernel, state)
                recording.take(kernel)
                if steps := recording.missing(kernel, steps):
                    self._record(recording, kernel, state, steps)
                self._kept[key] = recording
                while len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
                self.reason = None
                return recording
            except torch.OutOfMemoryError:
                self.clear()
                raise
            except NotCapturable as error:
                reason = str(error)
            self._refused[key] = reason
            while len(self._refused) > 8 * KEPT:
                self._refused.popitem(last=False)
        self.reason = reason
        return None

    def look(self, flags: Tensor) -> Callable[[], bool]:
        """Whether any flag is set, to be asked later."""
        return self._graphs[flags.device].look(flags)

    def clear(self) -> None:
        """Let go of all recordings and their memory."""
        self._kept.clear()

    def _record(self, recording, kernel, state, steps) -> None:
        models = [group.source for group in kernel.evaluator.plan.groups]
        if not any(map(_compiled, models)) and not kernel.evaluator.plan.compile:  # torch.compile gives up under a mode
            before, watch = self._models(kernel), Watch()
            recording.rehearse(kernel, state, watch)
            if watch.reason is None and self._models(kernel) != before:
                watch.reason = "a model changes itself while it runs"
            if watch.reason is not None:
                raise NotCapturable(watch.reason)
        try:
            recording.record(kernel, state, steps)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            first = _first(error)
            if isinstance(first, torch.OutOfMemoryError):
                raise first from None
            raise NotCapturable(f"CUDA would not capture it: {_cause(error)}") from error
        self.recorded += 1

    def _key(self, kind, kernel, state) -> tuple:
        return (state.x.device, tuple(state.x.shape), kind.facts(kernel), kernel.evaluator.structure,
                _switches(state.x.device.type), self._models(kernel))

    @staticmethod
    def _models(kernel) -> tuple:
        sources = [group.source for group in kernel.evaluator.plan.groups]
        return identity([f for s in sources for f in (s.model, s.gradient) if f is not None], kernel.evaluator.device)


def _compiled(source) -> bool:
    return hasattr(source.model, "_orig_mod") or hasattr(source.model, "_torchdynamo_orig_callable")


def _first(error: BaseException) -> BaseException:
    """What went wrong first: errors of a capture come with one of its end."""
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return error


def _cause(error: BaseException) -> str:
    """The first line of what went wrong first."""
    error = _first(error)
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _switches(device: str) -> tuple:
    """Settings of torch that decide which kernels run."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    places = [(matmul, "allow_bf16_reduced_precision_reduction"), (matmul, "allow_fp16_reduced_precision_reduction")]
    places += [(cudnn, "enabled"), (cudnn, "benchmark"), (cudnn, "deterministic")]
    # Newer releases warn of the old names, and refuse them where the new ones were used.
    for place in (matmul, cudnn, getattr(cudnn, "conv", None), getattr(cudnn, "rnn", None)):
        places.append((place, "fp32_precision" if hasattr(place, "fp32_precision") else "allow_tf32"))
    found: list = [torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)]
    found.append(torch.are_deterministic_algorithms_enabled())
    found += [getattr(place, name, None) for place, name in places]
    return tuple(found)


def identity(models: Sequence, device: torch.device) -> tuple:
    """Everything of some models that a recording relies on: modules, flags, plain attributes, where tensors are.

    What a function refers to, in its closure or as a global, counts too. Not seen: state that a model keeps elsewhere.
    """
    seen: dict[int, object] = {}  # alive, so that no other object gets their ids
    return tuple(fact for model in models for fact in _facts(model, device, seen))


def _facts(value, device, seen: dict[int, object]) -> Iterator:
    if isinstance(value, Tensor):
        yield _place(value, device)
    elif isinstance(value, _PLAIN):
        yield type(value).__name__, repr(value)
    elif id(value) in seen:
        yield id(value)
    elif isinstance(value, (list, tuple, set, frozenset, dict)):
        seen[id(value)] = value
        yield type(value).__name__, len(value)
        for item in (x for pair in value.items() for x in pair) if isinstance(value, dict) else value:
            yield from _facts(item, device, seen)
    else:
        seen[id(value)] = value
        yield id(value)
        for part in _parts(value):
            yield from _facts(part, device, seen)


def _parts(value) -> Iterator:
    """What an object computes with, as far as can be seen."""
    if isinstance(value, nn.Module):
        yield value.training
        yield [id(hook) for hooks in _HOOKS for hook in getattr(value, hooks, {}).values()]
        yield value._parameters
        yield value._buffers
        yield value._modules
        yield {k: v for k, v in vars(value).items() if k not in _MODULE}
    elif isinstance(value, types.MethodType):
        yield value.__self__
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, types.FunctionType):
        yield value.__defaults__
        yield value.__kwdefaults__
        with contextlib.suppress(ValueError):  # a cell that is not filled yet
            found = inspect.getclosurevars(value)
            yield found.nonlocals
            yield {k: v for k, v in found.globals.items() if not isinstance(v, (types.ModuleType, type))}
    elif callable(value) and not isinstance(value, type) and type(value).__module__.split(".")[0] not in ("torch", "builtins"):
        yield getattr(value, "__dict__", None)


def _place(tensor: Tensor, device: torch.device) -> tuple:
    place = tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device
    if tensor.device == device:
        return place
    # A recording has the numbers of the host as they were.
    return (*place, tuple(tensor.flatten().tolist()) if tensor.numel() <= 64 else tensor._version)
