"""CUDA graphs for tests without a GPU: a tape of operations and kernel launches, replayed over the same memory.

As in a CUDA graph, no Python of what was recorded runs again: numbers of the host are what they were when it was recorded.
"""

import contextlib
from unittest import mock

import torch
from ebmfast.kernels import step
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter


class Tape(TorchDispatchMode):
    """Records operations with their results."""

    def __init__(self):
        super().__init__()
        self.entries = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if "_local_scalar_dense" in str(function):
            raise RuntimeError("operation not permitted when stream is capturing")
        given = {t.untyped_storage().data_ptr() for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        made = [t if t.untyped_storage().data_ptr() not in given else None for t in tree_iter(out) if isinstance(t, torch.Tensor)]
        self.entries.append((function, args, kwargs, made))
        return out

    def launch(self, *args, **kwargs):
        with _disable_current_modes():
            self.launched(*args, **kwargs)
        self.entries.append((self.launched, args, kwargs, []))

    launched = staticmethod(step.launch)

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, made in self.entries:
            found = [t for t in tree_iter(function(*args, **kwargs)) if isinstance(t, torch.Tensor)]
            for old, new in zip(made, found):
                if old is not None:
                    old.copy_(new)


class Tapes:
    """In the place of `capture.CudaGraphs`, on the CPU."""

    def __init__(self, device):
        self.device, self.records, self.replays, self.forks, self.looks = device, 0, 0, 0, 0

    def record(self, function, warm_up):
        warm_up()
        tape = Tape()
        with mock.patch.object(step, "launch", tape.launch), tape:
            function()
        self.records += 1

        def replay():
            self.replays += 1
            tape.replay()

        return replay

    def fork(self, functions):
        self.forks += 1
        return [f() for f in functions]

    def join(self):
        pass

    def send(self, target, values):
        target.copy_(values)

    def look(self, flags):
        self.looks += 1
        seen = bool(flags.any())
        return lambda: seen


@contextlib.contextmanager
def tapes():
    """Inside, steps on the CPU are captured by tapes; yields them, by device."""
    from ebmfast import capture

    made = []

    def make(device):
        made.append(Tapes(device))
        return made[-1]

    with mock.patch.dict(capture.GRAPHS, {"cpu": make}):
        yield made
