"""Every backend's fused step against the specification, bit for bit, and that against its formula."""

from __future__ import annotations

import itertools
import math
import os
import signal
import threading

import pytest
import torch
from conftest import KERNELS, require_backend

from ebmfast import backends, reference, rng

NAN, INF = math.nan, math.inf
# The noise, every product and every sum is the same IEEE operation everywhere, so nothing may differ.
TOLERANCE = {torch.float32: 0.0, torch.bfloat16: 0.0}
# [B, *S]: nothing to do (no chain, no element); a single value; chains smaller than a Philox block, with
# sizes that are not multiples of 4 and batches that fill a tile and more; the sizes around which chains stop
# sharing tiles; several tiles with a tail; more than one block of the norm's sum.
SHAPES = [
    (0, 4), (3, 0), (1, 1), (300, 2), (65, 3), (64, 8), (9, 3, 7), (3, 255), (3, 256), (2, 257), (2, 1023),
    (2, 3, 37, 41),
]  # fmt: skip


def problem(shape, dtype=torch.float32, k=3, per_chain=False, seed=0, device="cpu"):
    """State, stacked gradients, weights: the same values on every device."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    gradients = torch.randn((k, *shape), generator=generator).to(dtype)
    weights = torch.randn((k, shape[0]) if per_chain else (k,), generator=generator)
    return x.to(device), gradients.to(device), weights.to(device)


def assert_equal(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 0.0) -> None:
    """Fails on NaN on either side."""
    assert got.shape == expected.shape and got.dtype == expected.dtype
    assert torch.isfinite(got).all() and torch.isfinite(expected).all()
    assert torch.equal(got, expected) if tolerance == 0 else bool(((got - expected).abs() <= tolerance).all())


@pytest.mark.parametrize("bad", [(1.0, NAN), (NAN, 1.0), (NAN, NAN), (INF, INF)])
def test_the_comparator_fails_on_nonfinite_values(bad):
    with pytest.raises(AssertionError):
        assert_equal(torch.tensor([bad[0]]), torch.tensor([bad[1]]), tolerance=1e9)


OPTIONS = {
    "plain": {},
    "clamp": {"clamp": (-0.5, 1.0)},
    "clip value": {"grad_clip_value": 0.25},
    "clip norm": {"grad_clip_norm": 2.0},
    "all": {"clamp": (-1.0, 1.0), "grad_clip_value": 0.5, "grad_clip_norm": 1.0, "stream": rng.MOMENTUM},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_parity(name, shape, dtype, options):
    backend = require_backend(name)
    for per_chain, masked in itertools.product((False, True), (False, True)):
        x, gradients, weights = problem(shape, dtype, per_chain=per_chain, device=backends.home(name))
        expected = x.clone()
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.4
        extra = {"frozen_mask": mask.to(x.device)} if masked else {}
        call = {"seed": 2**63 + 5, "step": 9, "first_chain": 2**32 - 3, **options, **extra}
        reference.langevin_step(expected, gradients, weights, 0.37, 0.61, **call)
        backend.step(x, gradients, weights, 0.37, 0.61, **call)
        assert_equal(x, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("k", [0, 1, 2, 65])
@pytest.mark.parametrize("shape", [(5, 3), (3, 1000)], ids=str)
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_parity_in_the_number_of_gradients(isa, k, shape, noise):
    """65: more than the addresses that fit on the stack."""
    x, gradients, weights = problem(shape, k=k, per_chain=True)
    expected = x.clone()
    weights = weights if k else None
    reference.langevin_step(expected, gradients, weights, 0.1, noise, seed=1, step=0)
    require_backend("cpu").step(x, gradients, weights, 0.1, noise, seed=1, step=0)
    assert_equal(x, expected)


def test_every_level_gives_the_same_bits(isa):
    for shape in ((70, 5), (3, 1023)):
        x, gradients, weights = problem(shape)
        expected = x.clone()
        call = {"seed": 1, "step": 0, "clamp": (-1, 1), "grad_clip_norm": 1.0}
        reference.langevin_step(expected, gradients, weights, 0.1, 0.3, **call)
        require_backend("cpu").step(x, gradients, weights, 0.1, 0.3, **call)
        assert_equal(x, expected)


def test_stacked_and_listed_gradients_are_the_same():
    x, gradients, weights = problem((7, 33))
    y = x.clone()
    cpu = require_backend("cpu")
    cpu.step(x, gradients, weights, 0.1, 0.3, seed=1, step=0)
    cpu.step(y, [g.clone() for g in gradients], weights, 0.1, 0.3, seed=1, step=0)
    assert_equal(x, y)


@pytest.mark.parametrize("shape", [(40_000, 3), (20, 10_000)], ids=str)
def test_threads_do_not_change_bits(threads, shape):
    results = []
    for n in (1, 2, 5):
        torch.set_num_threads(n)
        x, gradients, weights = problem(shape, k=2)
        require_backend("cpu").step(x, gradients, weights, 0.1, 0.3, seed=1, step=0, grad_clip_norm=1.0)
        results.append(x)
    assert_equal(results[0], results[1])
    assert_equal(results[0], results[2])


def test_the_formula():
    """Without noise: clamp(x - drift * sum w g); with it, the difference is noise * z."""
    x, gradients, weights = (t.double() for t in problem((4, 6)))
    y = x.clone()
    reference.langevin_step(y, gradients, weights, 0.5, 0.0, seed=1, step=2)
    expected = x - 0.5 * torch.einsum("k,kbs->bs", weights, gradients)
    torch.testing.assert_close(y, expected, rtol=1e-14, atol=1e-14)
    reference.langevin_step(y, [], None, 0.5, 0.25, seed=1, step=2)
    torch.testing.assert_close(
        y, expected + 0.25 * rng.normal((6,), 4, seed=1, step=2), rtol=1e-14, atol=1e-14
    )


@pytest.mark.parametrize("size", [5, 4096, 4097, 9000])
def test_norm_clip(size):
    g = torch.randn(3, size, generator=torch.Generator().manual_seed(0))
    g[1] *= 1e-4
    scale = reference.clip_scale(g, 1.0)
    torch.testing.assert_close((g * scale[:, None]).norm(dim=1)[[0, 2]], torch.ones(2), rtol=1e-6, atol=0)
    assert scale[1] == 1
    g[2, 0] = INF
    assert torch.isnan(reference.clip_scale(g, 1.0)).tolist() == [False, False, True]


@pytest.mark.parametrize("name", ["reference", *KERNELS])
@pytest.mark.parametrize("size", [3, 1000])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_faults(name, size, value, clip):
    backend = require_backend(name)
    x, gradients, weights = problem((6, size), device=backends.home(name))
    gradients[2, 1, 0] = value
    gradients[1, 3, size - 1] = value
    gradients[2, 3, 0] = value
    x[4, 1] = INF
    before, faults = x.clone(), torch.tensor([0, 0, 77, 0, 0, 0], device=x.device)
    backend.step(x, gradients, weights, 0.1, 0.3, seed=1, step=8, faults=faults, grad_clip_norm=clip)
    assert faults.tolist() == [0, 9 << 16 | 3, 77, 9 << 16 | 2, 9 << 16, 0]
    moved = x != before
    assert not moved[2].any(), "a chain that was faulty does not move"
    assert moved[0].all() and moved[5].all()
    assert not moved[1, 0] and not moved[3, 0] and not moved[3, size - 1] and not moved[4, 1]
    assert moved[1, 1:].all() if clip is None else not moved[1].any(), "without a finite norm nothing moves"
    again = x.clone()
    backend.step(x, gradients, weights, 0.1, 0.3, seed=1, step=9, faults=faults)
    assert faults.tolist()[1:5] == [9 << 16 | 3, 77, 9 << 16 | 2, 9 << 16], "the first fault is kept"
    assert torch.equal(x[1:5], again[1:5])


@pytest.mark.parametrize("name", ["reference", *KERNELS])
def test_nonfinite_values_without_a_fault_record_keep_the_old_value(name):
    x, gradients, weights = problem((2, 5), device=backends.home(name))
    gradients[0, 1, 2] = NAN
    before = x.clone()
    require_backend(name).step(x, gradients, weights, 0.1, 0.3, seed=1, step=0)
    assert (x == before).nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize("name", ["reference", *KERNELS])
@pytest.mark.parametrize("per_chain", [False, True])
def test_frozen_elements(name, per_chain):
    """They neither move, clamp, fault nor count in the norm; the noise of the others is what it was."""
    backend = require_backend(name)
    x, gradients, weights = problem((3, 2, 50), device=backends.home(name))
    mask = torch.zeros((3, 2, 50) if per_chain else (2, 50), dtype=torch.bool, device=x.device)
    mask[..., :10] = True
    x[..., 0] = 5.0
    free, before = x.clone(), x.clone()
    backend.step(free, gradients, weights, 0.1, 0.3, seed=1, step=0, clamp=(-1, 1))
    backend.step(x, gradients, weights, 0.1, 0.3, seed=1, step=0, clamp=(-1, 1), frozen_mask=mask)
    assert torch.equal(x[..., :10], before[..., :10]) and torch.equal(x[..., 10:], free[..., 10:])
    gradients[..., 0] = NAN
    faults = torch.zeros(3, dtype=torch.int64, device=x.device)
    backend.step(
        x, gradients, weights, 0.1, 0.3, seed=1, step=1, frozen_mask=mask, faults=faults, grad_clip_norm=1.0
    )
    assert faults.tolist() == [0, 0, 0] and torch.isfinite(x).all()


def test_a_chain_does_not_depend_on_its_batch():
    cpu = require_backend("cpu")
    for size in (5, 700):
        x, gradients, weights = problem((40, size))
        part, g = x[11:23].clone(), gradients[:, 11:23].contiguous()
        cpu.step(x, gradients, weights, 0.1, 0.3, seed=1, step=0, first_chain=100)
        cpu.step(part, g, weights, 0.1, 0.3, seed=1, step=0, first_chain=111)
        assert_equal(part, x[11:23])


def test_a_plan_is_reused():
    cpu = require_backend("cpu")
    x, gradients, weights = problem((9, 31))
    y = x.clone()
    plan = cpu.prepare(x, n_gradients=3, seed=4, clamp=(-2, 2))
    for step in range(3):
        plan(gradients, weights * (step + 1), 0.1 / (step + 1), 0.3, step)
        reference.langevin_step(
            y, gradients, weights * (step + 1), 0.1 / (step + 1), 0.3, seed=4, step=step, clamp=(-2, 2)
        )
    assert_equal(x, y)


def test_several_python_threads():
    """The pool serves one caller at a time; the others compute on their own thread."""
    cpu = require_backend("cpu")
    states = [problem((100, 1000), k=1, seed=i) for i in range(4)]
    expected = [s[0].clone() for s in states]
    for x, (_, g, w) in zip(expected, states, strict=True):
        cpu.step(x, g, w, 0.1, 0.3, seed=1, step=0)
    jobs = [
        threading.Thread(target=cpu.step, args=(*s, 0.1, 0.3), kwargs={"seed": 1, "step": 0}) for s in states
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    for (x, _, _), y in zip(states, expected, strict=True):
        assert_equal(x, y)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_fork(threads):
    """Bytes are compared without torch, whose own thread pool does not survive a fork."""
    torch.set_num_threads(2)
    cpu = require_backend("cpu")
    expected = cpu.normal((1000,), 200, seed=1, step=0).numpy().tobytes()  # the pool has started
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(0 if cpu.normal((1000,), 200, seed=1, step=0).numpy().tobytes() == expected else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


X = torch.zeros(2, 3)
G = torch.zeros(1, 2, 3)
W = torch.ones(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X.double()}, "`x` must be float32 on cpu, got float64 on cpu"),
        ({"x": torch.zeros(3, 2).T}, r"`x` must be contiguous, got strides \(1, 2\) for shape \[2, 3\]"),
        ({"gradients": G.half()}, r"`gradient_dtype` must be one of .* got torch.float16"),
        ({"gradients": torch.zeros(1, 2, 4)}, r"`gradients` must be of shape \[1, 2, 3\], got \[1, 2, 4\]"),
        ({"gradients": [torch.zeros(2, 4)]}, r"`gradients\[0\]` must be of shape \[2, 3\], got \[2, 4\]"),
        ({"gradients": [torch.zeros(3, 2).T]}, r"`gradients\[0\]` must be contiguous"),
        (
            {"gradients": [X, X.bfloat16()], "weights": torch.ones(2)},
            r"`gradients\[1\]` must be float32 on cpu, got bfl",
        ),
        ({"weights": torch.ones(2)}, r"`weights` must be of shape \[1\], got \[2\]"),
        ({"weights": torch.ones(1, 3)}, r"`weights` must be of shape \[1, 2\], got \[1, 3\]"),
        ({"weights": W.double()}, "`weights` must be float32 on cpu, got float64 on cpu"),
        ({"step": 2**32}, r"`step` must be in \[0, 2\^32\), got 4294967296"),
        ({"seed": -1}, r"`seed` must be in \[0, 2\^64\), got -1"),
        ({"first_chain": 2**60 - 1}, r"`first_chain` must be in \[0, 2\^60 - 2\]"),
        ({"stream": 16}, r"`stream` must be in \[0, 16\), got 16"),
        ({"clamp": (1, 0)}, r"`clamp` must be \(low, high\) with low <= high, got \(1, 0\)"),
        ({"grad_clip_norm": -1.0}, "`grad_clip_norm` must be None or a number >= 0, got -1.0"),
        ({"grad_clip_value": NAN}, "`grad_clip_value` must be None or a number >= 0, got nan"),
        ({"frozen_mask": torch.zeros(2, 3)}, "`frozen_mask` must be bool on cpu, got float32 on cpu"),
        (
            {"frozen_mask": torch.zeros(2, dtype=torch.bool)},
            r"`frozen_mask` must be of shape \[3\] or \[2, 3\], got \[2\]",
        ),
        ({"faults": torch.zeros(3, dtype=torch.int64)}, r"`faults` must be of shape \[2\], got \[3\]"),
    ],
)
def test_errors(change, message):
    call = {"x": X, "gradients": G, "weights": W, "drift": 0.1, "noise": 0.1, "seed": 0, "step": 0} | change
    with pytest.raises(ValueError, match=message):
        require_backend("cpu").step(**call)


def test_missing_weights_are_an_error():
    with pytest.raises(TypeError, match="`weights` must be a tensor, got NoneType"):
        require_backend("cpu").step(X, G, None, 0.1, 0.1, seed=0, step=0)


@pytest.mark.parametrize("name", backends.NAMES)
def test_presence(name):
    """The one place where a missing backend shows up, as a skip with its reason."""
    assert require_backend(name).name == name


def test_resolve():
    assert backends.resolve("auto", "cpu").name == "cpu"
    assert backends.resolve("reference", "meta").name == "reference"
    assert set(backends.available()) == set(backends.NAMES)
    with pytest.raises(
        ValueError, match="`backend` must be one of auto, reference, cpu, triton, cuda, got 'gpu'"
    ):
        backends.resolve("gpu", "cpu")
    with pytest.raises(
        backends.BackendUnavailableError, match="backend 'cpu' is not available: it cannot work on cuda"
    ):
        backends.resolve("cpu", "cuda")
