"""`capture.CudaGraphs` against a stand-in for torch.cuda: pools, streams and workspaces around a capture, forks, failures.

What they have to mind is in PyTorch's sources: a pool that all its graphs have left cannot be used again, and a graph that goes
lets go of cuBLAS's workspace of its stream, which other graphs still write to: it has to lie in their pool."""

from __future__ import annotations

import contextlib
import gc
import itertools
from pathlib import Path

import pytest
import torch

import ebmfast
from ebmfast import capture
from ebmfast.guard import Guard
from ebmfast.samplers import Langevin


class Stream:
    """Has waited for some others since the last fork."""

    def __init__(self, device=None):
        self.waited: list[Stream] = []

    def wait_stream(self, other):
        self.waited.append(other)


class Cuda:
    """Streams, pools and captures, as far as `CudaGraphs` uses them."""

    def __init__(self):
        self.now = self.main = Stream()
        self.captures: list[tuple] = []  # (pool, stream)
        self.log: list[str] = []
        self.capturing = False
        pools = itertools.count()

        class Graph:
            def replay(self):
                pass

        @contextlib.contextmanager
        def stream(which):
            before, self.now = self.now, which
            yield
            self.now = before

        @contextlib.contextmanager
        def graph(graph, pool=None, stream=None, capture_error_mode="global"):
            self.captures.append((pool, stream))
            self.log.append("capture")
            before, self.now, self.capturing = self.now, stream, True
            try:
                yield
            finally:
                self.capturing = False
            self.now = before

        self.fakes = {
            "Stream": Stream, "CUDAGraph": Graph, "graph": graph, "stream": stream, "current_stream": lambda device=None: self.now,
            "set_stream": lambda which: setattr(self, "now", which), "device": lambda device: contextlib.nullcontext(),
            "graph_pool_handle": lambda: (0, next(pools)),
        }  # fmt: skip


@pytest.fixture
def cuda(monkeypatch):
    fake = Cuda()
    for name, value in fake.fakes.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: fake.log.append("clear"), raising=False)
    return fake


@pytest.fixture
def graphs(cuda):
    return capture.CudaGraphs(torch.device("cuda:0"))


def test_work_before_a_capture_runs_on_other_streams_than_the_capture(cuda, graphs):
    places = {True: set(), False: set()}

    def step():
        graphs.fork([lambda: places[cuda.capturing].add(cuda.now)] * 3)
        graphs.join()

    replay = graphs.record(step, step)
    assert len(places[True]) == len(places[False]) == 3 and not places[True] & places[False]
    assert cuda.now is cuda.main and callable(replay)
    assert cuda.log == ["clear", "capture", "clear"], "no workspace of before is recorded, and none of the pool's is left"
    (_, side), = cuda.captures
    assert side in places[True] and places[True] - {side} <= set(side.waited), "forks are joined"
    assert len(cuda.main.waited) == 1, "what comes next waits for the work before the capture"


def test_a_pool_is_shared_while_a_graph_is_in_it(cuda, graphs):
    kept = [graphs.record(int, int) for _ in range(3)]
    assert len(set(cuda.captures)) == 1
    kept.clear()
    gc.collect()
    kept.append(graphs.record(int, int))
    assert len(set(cuda.captures)) == 2 and cuda.captures[-1][1] is not cuda.captures[0][1]


def test_after_a_capture_that_fails_everything_is_new(cuda, graphs, monkeypatch):
    kept, told = graphs.record(int, int), []
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda device, pool: told.append((device, pool)), raising=False)

    def refused():
        if cuda.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        graphs.record(refused, refused)
    pool, side = cuda.captures[0]
    assert told == [(0, pool)] and cuda.now is cuda.main
    assert graphs.record(int, int) and kept
    assert cuda.captures[-1][0] != pool and cuda.captures[-1][1] is not side


def test_nothing_waits_for_a_whole_device():
    """CUDA forbids that while another thread captures on it, and the capture fails too."""
    for path in Path(ebmfast.__file__).parent.rglob("*.py"):
        assert "cuda.synchronize(" not in path.read_text(), path


def test_the_guard_asks_the_host_for_nothing_off_the_cpu():
    """On tensors without values whatever looked at one would raise: captured steps are guarded between replays, and not slowed."""
    sampler = Langevin(step_size=0.1)
    x = torch.zeros(4, 3, device="meta")
    state = ebmfast.samplers.langevin.LangevinState(x, 16, torch.zeros(4, dtype=torch.int64, device="meta"))
    guard, energy = Guard(sampler.coefficients(None, 200), None, x, 0), torch.zeros(4, device="meta")
    for step in (16, 64, 128, 192):
        guard.look(state._replace(step=step), energy, None)
    guard.begin_anew(2)
    guard.look(state._replace(step=300), energy, None)
