"""`python -m bench.gpu_cases PART [--smoke] [--out FOLDER]`: what `bench/gpu` measures, one JSON line for each case.

Parts: step, captured, chain, cubes, small (nothing is timed: a few kernels for compute-sanitizer), table (the page of a
folder's lines). Variants of a case take turns in one process. Each is checked before it is timed; a wrong one gets no time,
a peer that is not installed is named absent. Times are CUDA events around a call, medians of several; JAX's, the clock's.
`--smoke` runs everything at tiny sizes on the CPU, with TRITON_INTERPRET=1, to see that it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

import ebmfast as ef
from bench.timing import Variant, compare, quantiles
from ebmfast import backends, energies, reference
from ebmfast._native import core

DRIFT, NOISE = 1e-3, 0.02
SMOKE = False
OUT = Path(__file__).parent / "results"


class Absent(Exception):
    """A variant that is not here; says why."""


def where() -> torch.device:
    return torch.device("cpu" if SMOKE else "cuda:0")


def wait() -> None:
    if not SMOKE:
        torch.cuda.synchronize()


def measure(variant: Variant) -> float:
    """Seconds on the device; of variants that it does not see (`clock`), on the clock."""
    wait()
    if SMOKE or getattr(variant, "clock", False):
        began = time.perf_counter()
        variant.run()
        wait()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    variant.run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@dataclass
class Case:
    """Variants by name, made when their turn comes; `floors`: {name of a result: (least, meaning)}."""

    name: str
    facts: dict
    makers: dict[str, Callable[[], Variant]]
    results: Callable[[dict], dict]
    floors: dict[str, float] = field(default_factory=dict)
    rounds: int = 15

    def run(self, part: str) -> None:
        found, trouble = [], {}
        for name, make in self.makers.items():
            try:
                variant = make()
                variant.name = name
                variant.check()
                variant.run()
                wait()
                found.append(variant)
            except (Absent, ImportError, backends.BackendUnavailableError) as error:
                trouble[name] = f"absent: {error}"
            except AssertionError as error:
                trouble[name] = f"wrong, so not timed: {_line(error)}"
            except Exception as error:  # a peer that fails is a result; the others are still measured
                trouble[name] = f"failed: {type(error).__name__}: {_line(error)}"
        for variant in found:
            variant.check = lambda: None  # it has been
        seconds = {k: quantiles(v) for k, v in compare(found, rounds=2 if SMOKE else self.rounds, measure=measure).items()}
        median = {k: v["median"] for k, v in seconds.items()}
        results = {}
        with contextlib.suppress(KeyError, ValueError, ZeroDivisionError):  # of a variant that has no time
            results = self.results(median)
        met = {k: results[k] >= least for k, least in self.floors.items() if k in results}
        record(part, {"case": self.name, **self.facts},
               {"seconds": seconds, **results, "floors": self.floors, "met": met, "not_timed": trouble})


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:300] if lines else "no message"


def record(part: str, case: dict, results: dict) -> None:
    """One line, written at once, so that what is cut loses nothing."""
    build = core.build_info()
    device = "cpu (smoke)" if SMOKE else torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "ebmfast": build["version"]}
    for name in ("triton", "jax", "torchebm"):
        if importlib.util.find_spec(name) is not None:
            with contextlib.suppress(Exception):
                from importlib.metadata import version
                versions[name] = version(name)
    line = {"bench": f"gpu {part}", **case, **results, "device": device, "versions": versions,
            "commit": os.environ.get("EBMFAST_COMMIT") or build["commit"],
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    OUT.mkdir(parents=True, exist_ok=True)
    with open(OUT / "gpu.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps({**case, **results}, indent=1), flush=True)


# rooflines


def copy_of(size: int) -> Callable[[], Variant]:
    def make() -> Variant:
        source, target = torch.randn(size, device=where()), torch.zeros(size, device=where())

        def check():
            target.copy_(source)
            assert torch.equal(source, target)

        return Variant("copy", lambda: target.copy_(source), check)

    return make


def write_of(size: int) -> Callable[[], Variant]:
    def make() -> Variant:
        target = torch.ones(size, device=where())
        return Variant("write", lambda: target.fill_(0.5), lambda: None)

    return make


def gemm(dtype: torch.dtype, tf32: bool = False) -> Callable[[], Variant]:
    size = 32 if SMOKE else 8192

    def make() -> Variant:
        a, b = (torch.randn(size, size, device=where(), dtype=dtype) for _ in range(2))

        def run():
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("high" if tf32 else before)
            a @ b
            torch.set_float32_matmul_precision(before)

        return Variant("gemm", run, lambda: None)

    return make


def rooflines() -> Case:
    size = 1 << (12 if SMOKE else 28)
    flops = 2 * (32 if SMOKE else 8192) ** 3
    return Case(
        "rooflines", {"bytes": 4 * size},
        {"copy": copy_of(size), "write": write_of(size), "gemm float32": gemm(torch.float32),
         "gemm tf32": gemm(torch.float32, True), "gemm bfloat16": gemm(torch.bfloat16)},
        lambda t: {"copy_GB_per_s": 8e-9 * size / t["copy"], "write_GB_per_s": 4e-9 * size / t["write"],
                   **{f"{k}_TFLOP_per_s": 1e-12 * flops / t[k] for k in t if k.startswith("gemm")}})


# the fused step, and noise


def fused_step(k: int, noise: float, dtype: torch.dtype) -> Case:
    chains, size = (6, 40) if SMOKE else (8192, 12288)
    clamp = (-3.0, 3.0)
    x, weights = torch.randn(chains, size, device=where()), torch.linspace(1.0, -0.5, k, device=where())
    gradients = torch.randn(k, chains, size, device=where()).to(dtype)

    def ours(name: str) -> Callable[[], Variant]:
        def make() -> Variant:
            backend = backends.resolve(name, where())
            plan = backend.prepare(x, n_gradients=k, gradient_dtype=dtype, seed=1, clamp=clamp)

            def check():
                part, few = x[:4].clone(), gradients[:, :4].contiguous()
                expected = part.cpu()
                backend.step(part, few, weights, 0.1, noise, seed=1, step=3, clamp=clamp)
                reference.langevin_step(expected, few.cpu(), weights.cpu(), 0.1, noise, seed=1, step=3, clamp=clamp)
                assert torch.equal(part.cpu(), expected), "the step differs from the reference"

            return Variant(name, lambda: plan(gradients, weights, 0.1, noise, 3), check)

        return make

    def plain() -> torch.Tensor:
        total = weights[0] * gradients[0].float()
        for w, g in zip(weights[1:], gradients[1:]):
            total = total + w * g.float()
        moved = x - 0.1 * total
        return (moved + noise * torch.randn_like(x) if noise else moved).clamp(*clamp)

    def eager() -> Variant:
        return Variant("eager", lambda: x.copy_(plain()), lambda: None)

    def compiled() -> Variant:
        function = torch.compile(plain, backend="eager" if SMOKE else "inductor")
        return Variant("torch.compile", lambda: x.copy_(function()), lambda: None)

    moved = x.numel() * (8 + k * dtype.itemsize)

    def results(t: dict) -> dict:
        step, copied = moved / t["triton"], 8 * x.numel() / t["copy"]
        return {"GB_per_s": step / 1e9, "copy_GB_per_s": copied / 1e9, "share_of_copy": step / copied,
                **{f"times_{n}": t[n] / t["triton"] for n in ("eager", "torch.compile") if n in t},
                **({"cuda_share_of_copy": moved / t["cuda"] / copied} if "cuda" in t else {})}

    makers = {"triton": ours("triton"), "cuda": ours("cuda"), "eager": eager, "torch.compile": compiled, "copy": copy_of(x.numel())}
    return Case(f"fused step, K = {k}", {"shape": [chains, size], "gradients": str(dtype)[6:], "noise": noise, "bytes": moved},
                makers, results, {"share_of_copy": 0.9} if noise and dtype == torch.float32 else {})


def noise_alone() -> Case:
    chains, size = (6, 40) if SMOKE else (8192, 12288)
    values = chains * size

    def ours(name: str) -> Callable[[], Variant]:
        def make() -> Variant:
            backend = backends.resolve(name, where())

            def check():
                got = backend.normal((size,), 4, seed=1, step=2, device=where()).cpu()
                assert torch.equal(got, ef.rng.normal((size,), 4, seed=1, step=2)), "normals differ from the specification"

            return Variant(name, lambda: backend.normal((size,), chains, seed=1, step=2, device=where()), check)

        return make

    def results(t: dict) -> dict:
        ratio, share = t["torch.randn"] / t["triton"], t["write"] / t["triton"]
        return {"values_per_ns": 1e-9 * values / t["triton"], "times_randn": ratio, "share_of_write": share,
                "floor_share": max(ratio / 3, share / 0.85)}

    makers = {"triton": ours("triton"), "cuda": ours("cuda"), "write": write_of(values),
              "torch.randn": lambda: Variant("randn", lambda: torch.randn(chains, size, device=where()), lambda: None)}
    return Case("noise alone", {"shape": [chains, size]}, makers, results, {"floor_share": 1.0})


# whole calls: ours, and the loops that people write


def composed(models) -> ef.Expression:
    return ef.all_of([ef.Concept(m, name=f"leaf{i}") for i, m in enumerate(models)])


def unit_drift(e, x) -> float:
    """A drift of which no element moves by more than 0.1, and not all by less: no check is passed by noise or rounding alone."""
    return 0.1 / float(e.gradient(x).abs().max())


def ours(e, x, steps: int, loose: float = 1e-4, needs_capture: bool = False, **options) -> Callable[[], Variant]:
    """A prepared run; a few of its steps are those of the reference backend, from the same noise."""

    def make() -> Variant:
        def prepared(n: int, drift: float, **more):
            sampler = ef.Langevin(drift=drift, noise=NOISE)
            return ef.prepare(e, sampler, shape=x.shape[1:], steps=n, energies=False, check=False, **more)

        try:
            run = prepared(steps, DRIFT, **options)
            first = run(x=x, seed=0)
        except (ValueError, backends.BackendUnavailableError) as error:
            raise Absent(_line(error)) from error

        def check():
            assert not needs_capture or SMOKE or first.report.captured, f"not captured: {first.report.uncaptured}"
            few = prepared(3, unit_drift(e, x), **options)(x=x, seed=3).x - x
            expected = prepared(3, unit_drift(e, x), backend="reference")(x=x, seed=3).x - x
            error = float((few - expected).norm() / expected.norm())
            assert error <= loose, f"moves differ by {error:.3g} of their norm, allowed {loose:g}"

        return Variant("ours", lambda: run(x=x, seed=0), check)

    return make


def lands(step: Callable, e, x, loose: float = 1e-4) -> None:
    """Steps without noise of a peer's loop, `step(x, drift, noise)`, end where ours do."""
    y, drift = x.clone(), unit_drift(e, x)
    expected = ef.prepare(e, ef.Langevin(drift=drift, noise=0.0), shape=x.shape[1:], steps=3, energies=False, backend="reference",
                          check=False)(x=x, seed=0).x
    for _ in range(3):
        y = step(y, drift, 0.0).clone()
    error = float((y - expected).norm() / (expected - x).norm())
    assert error <= loose, f"moves without noise differ by {error:.3g} of their norm, allowed {loose:g}"


class Loops:
    """The loops that users write: eager, under torch.compile, and that inside a CUDA graph."""

    def __init__(self, energy, e, x, steps: int, loose: float = 1e-4, dtype: torch.dtype | None = None):
        self.energy, self.e, self.x, self.steps, self.loose, self.dtype = energy, e, x, steps, loose, dtype
        # Compiled once for both variants.
        self.compiled = torch.compile(self._functional, backend="eager" if SMOKE else "inductor", dynamic=False)

    def _precision(self):
        kind = self.x.device.type
        return contextlib.nullcontext() if self.dtype is None else torch.autocast(kind, dtype=self.dtype, cache_enabled=False)

    def _eager(self, y, drift, noise):
        leaf = y.detach().requires_grad_()
        with self._precision():
            energy = self.energy(leaf)
        (gradient,) = torch.autograd.grad(energy.sum(), leaf)
        return y - drift * gradient + noise * torch.randn_like(y)

    def _functional(self, y, drift, noise):
        with self._precision():
            gradient = torch.func.grad(lambda z: self.energy(z).sum())(y)
        return y - drift * gradient + noise * torch.randn_like(y)

    def _step(self, y, drift, noise):
        return self.compiled(y, *(torch.full((), v, device=y.device) for v in (drift, noise)))

    def _loop(self, step) -> Variant:
        def whole():
            y = self.x
            for _ in range(self.steps):
                y = step(y, DRIFT, NOISE)
            return y

        return Variant("loop", whole, lambda: lands(step, self.e, self.x, self.loose))

    def eager(self) -> Variant:
        return self._loop(self._eager)

    def under_compile(self) -> Variant:
        return self._loop(self._step)

    def in_a_graph(self) -> Variant:
        if SMOKE:
            return self._loop(self._step)
        lands(self._step, self.e, self.x, self.loose)
        return Variant("graph", _graphed(self.compiled, self.x, self.steps), lambda: None)


def _graphed(compiled, x, steps: int, unrolled: int = 8) -> Callable[[], None]:
    y, drift, noise = x.clone(), torch.full((), DRIFT, device=x.device), torch.full((), NOISE, device=x.device)

    def several():
        for _ in range(unrolled):
            y.copy_(compiled(y, drift, noise))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        several()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        several()

    def run():
        y.copy_(x)
        for _ in range(steps // unrolled):
            graph.replay()

    return run


def torchebm(energy, e, x, steps: int) -> Callable[[], Variant]:
    def make() -> Variant:
        from torchebm.core import BaseModel
        from torchebm.samplers import LangevinDynamics

        class Model(BaseModel):
            def forward(self, x):
                return energy(x)

        def draw(y, n, drift, noise):
            scale = max(noise / (2 * drift) ** 0.5, 1e-30)
            return LangevinDynamics(Model(), step_size=drift, noise_scale=scale, device=y.device).sample(x=y, n_steps=n)

        return Variant("torchebm", lambda: draw(x, steps, DRIFT, NOISE), lambda: lands(lambda y, d, n: draw(y, 1, d, n), e, x))

    return make


def jax_scan(energy_of, models, e, x, steps: int) -> Callable[[], Variant]:
    """jit + lax.scan on JAX's own device. `energy_of(models on the CPU)` gives an energy in jax.numpy."""

    def make() -> Variant:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        import jax
        import jax.numpy as jnp

        energy = energy_of([copy.deepcopy(m).cpu().requires_grad_(False) for m in models])
        gradient = jax.grad(lambda y: energy(y).sum())

        def draw(y, key, n, drift, noise):
            def step(y, key):
                return y - drift * gradient(y) + noise * jax.random.normal(key, y.shape), None

            return jax.lax.scan(step, y, jax.random.split(key, n))[0]

        compiled = jax.jit(draw, static_argnums=2)
        first, key = jnp.asarray(x.cpu().numpy()), jax.random.PRNGKey(0)

        def one(y, drift, noise):
            moved = compiled(jnp.asarray(y.cpu().numpy()), key, 1, drift, noise)
            return torch.from_numpy(jax.device_get(moved).copy()).to(x.device)

        # JAX multiplies float32 in tf32 by itself: hence the tolerance.
        variant = Variant("jax", lambda: compiled(first, key, steps, DRIFT, NOISE).block_until_ready(),
                          lambda: lands(one, e, x, 1e-2))
        variant.clock = True
        return variant

    return make


def networks(dim: int, width: int) -> list[energies.MLP]:
    torch.manual_seed(0)
    return [energies.MLP(dim, (width, width)).requires_grad_(False).to(where()) for _ in range(4)]


def start(chains: int, dim: int) -> torch.Tensor:
    return torch.randn(chains, dim, generator=torch.Generator().manual_seed(1)).to(where())


def jax_networks(models):
    from bench.chain import jax_networks as both
    return both(models)[1]


SIZES = ((64, 8, 64), (256, 32, 128), (1024, 128, 256))  # chains, dimensions, width of two hidden layers


def sizes():
    return ((4, 3, 5),) if SMOKE else SIZES


def captured_case(chains: int, dim: int, width: int) -> Case:
    models, x, steps = networks(dim, width), start(chains, dim), 8 if SMOKE else 400
    e = composed(models)

    def energy(y):
        return sum(m(y) for m in models)

    loops = Loops(energy, e, x, steps)
    makers = {
        "captured": ours(e, x, steps, backend="triton", engine="step", needs_capture=True),
        "captured, branches": ours(e, x, steps, backend="triton", engine="step", needs_capture=True, stack_models=False),
        "not captured": ours(e, x, steps, backend="triton", engine="step", capture=False),
        "reference": ours(e, x, steps, backend="reference", engine="step"),
        "eager": loops.eager, "torch.compile": loops.under_compile, "torch.compile in a graph": loops.in_a_graph,
        "torchebm": torchebm(energy, e, x, steps),
    }

    def results(t: dict) -> dict:
        best = min(v for k, v in t.items() if k.startswith("captured"))
        peers = [t[k] for k in ("eager", "torch.compile", "torch.compile in a graph") if k in t]
        return {"us_per_step": {k: 1e6 * v / steps for k, v in t.items()},
                **({"times_best_peer": min(peers) / best} if peers else {}),
                **({"times_torchebm": t["torchebm"] / best} if "torchebm" in t else {})}

    return Case(f"AND of 4 MLPs, {chains} x {dim}", {"chains": chains, "dim": dim, "width": width, "steps": steps}, makers, results,
                {"times_best_peer": 1.5, "times_torchebm": 10.0})


def chain_case(chains: int, dim: int, width: int) -> Case:
    models, x, steps = networks(dim, width), start(chains, dim), 8 if SMOKE else 400
    e, options = composed(models), {"backend": "cpu" if SMOKE else "cuda", "engine": "chain"}
    makers = {"chain": ours(e, x, steps, **options),
              "captured": ours(e, x, steps, backend="triton", engine="step", needs_capture=True),
              "jax": jax_scan(jax_networks, models, e, x, steps)}
    if not SMOKE:
        makers["chain, bfloat16"] = ours(e, x, steps, loose=2e-2, compute_dtype=torch.bfloat16, **options)

    def results(t: dict) -> dict:
        return {"us_per_step": {k: 1e6 * v / steps for k, v in t.items()}, "times_captured": t["captured"] / t["chain"],
                **({"times_jax": t["jax"] / t["chain"]} if "jax" in t else {})}

    return Case(f"chain engine, AND of 4 MLPs, {chains} x {dim}", {"chains": chains, "dim": dim, "width": width, "steps": steps},
                makers, results, {"times_captured": 2.0 if dim == 128 else 5.0, "times_jax": 3.0})


def double_well() -> Case:
    chains, dim, steps = (4, 3, 4) if SMOKE else (4096, 32, 1000)
    x, well = start(chains, dim), energies.DoubleWell().to(where())
    e = ef.Concept(well, name="well")

    def of(models):
        import jax.numpy as jnp
        return lambda y: 2.0 * jnp.square(jnp.square(y) - 1).sum(-1)

    makers = {"chain": ours(e, x, steps, backend="cpu" if SMOKE else "cuda", engine="chain"),
              "captured": ours(e, x, steps, backend="triton", engine="step", needs_capture=True),
              "torchebm": torchebm(well, e, x, steps), "jax": jax_scan(of, [], e, x, steps)}

    def results(t: dict) -> dict:
        return {"ns_per_value_and_step": 1e9 * t["chain"] / (x.numel() * steps),
                **{f"times_{k}": t[k] / t["chain"] for k in ("captured", "torchebm", "jax") if k in t}}

    return Case("double well", {"chains": chains, "dim": dim, "steps": steps}, makers, results, {"times_torchebm": 1.0})


# the paper's networks


def cubes(count: int, width: int) -> list:
    try:
        from bench.cubes import cubes as made
    except ImportError as error:
        raise Absent(f"ebmfast.models has no CubesNet: {error}") from error
    return [m.to(where()).requires_grad_(False) for m in made(count, width)]


def cubes_case(chains: int) -> Case:
    size, width, steps = (16, 2, 1) if SMOKE else (64, 64, 16)
    models = cubes(4, width)
    torch.manual_seed(1)
    x = torch.rand(chains, 3, size, size).to(where())
    conditions = [torch.randn(3) for _ in models]
    e = ef.all_of([ef.Concept(m, c.tolist(), name=f"cubes{i}") for i, (m, c) in enumerate(zip(models, conditions))])
    rows = [c.to(where()).expand(chains, -1).contiguous() for c in conditions]

    def energy(y):
        return sum(m(y, c) for m, c in zip(models, rows))

    triton = {"backend": "triton", "batch_size": chains, "loose": 0.1, "compute_dtype": torch.bfloat16}
    full, half = Loops(energy, e, x, steps, 1e-2), Loops(energy, e, x, steps, 0.1, torch.bfloat16)
    makers = {
        "captured, bfloat16": ours(e, x, steps, needs_capture=True, **triton),
        "captured, bfloat16, channels_last": ours(e, x, steps, needs_capture=True, channels_last=True, **triton),
        "captured, float32": ours(e, x, steps, needs_capture=True, backend="triton", batch_size=chains, loose=1e-2),
        "eager, float32": full.eager, "eager, bfloat16": half.eager, "torch.compile, bfloat16": half.under_compile,
        "torch.compile in a graph, bfloat16": half.in_a_graph,
    }
    if not SMOKE:
        makers["captured, bfloat16, compiled"] = ours(e, x, steps, needs_capture=True, channels_last=True, compile=True, **triton)

    def results(t: dict) -> dict:
        best = min(v for k, v in t.items() if k.startswith("captured, bfloat16"))
        compiled = [v for k, v in t.items() if k.startswith("torch.compile")]
        return {"ms_per_step": {k: 1e3 * v / steps for k, v in t.items()}, "times_eager_float32": t["eager, float32"] / best,
                **({"times_compiled": min(compiled) / best} if compiled else {})}

    return Case(f"AND of 4 CubesNets, {chains} chains", {"chains": chains, "size": size, "width": width, "steps": steps}, makers,
                results, {"times_eager_float32": 5.0, "times_compiled": 1.2}, rounds=5)


def conditions_case(chains: int) -> Case:
    """Four conditions of one network in one pass, against four passes; both inside a graph, where there are graphs."""
    from ebmfast.plan import Plan

    size, width = (16, 2) if SMOKE else (64, 64)
    (model,) = cubes(1, width)
    torch.manual_seed(1)
    x, values = torch.rand(chains, 3, size, size).to(where()), torch.randn(4, 3)
    evaluators = [Plan(ef.all_of([ef.Concept(model, c.tolist()) for c in some]), torch.bfloat16).bind(x)
                  for some in (values, *values.split(1))]

    def together():
        with torch.enable_grad():
            return evaluators[0].gradients(x)[0]

    def in_turn():
        with torch.enable_grad():
            return [evaluator.gradients(x)[0][0] for evaluator in evaluators[1:]]

    def make(function) -> Callable[[], Variant]:
        def made() -> Variant:
            def check():
                a, b = (torch.stack(list(f())) for f in (together, in_turn))
                assert float((a - b).norm() / b.norm()) < 0.05, "one pass and four give different gradients"

            if SMOKE:
                return Variant("", function, check)
            from ebmfast.capture import CudaGraphs
            return Variant("", CudaGraphs(where()).record(function, function), check)

        return made

    facts = {"chains": chains, "size": size, "width": width, "dtype": "bfloat16"}
    return Case(f"4 conditions of one CubesNet, {chains} chains", facts,
                {"one pass": make(together), "four passes": make(in_turn)},
                lambda t: {"ms": {k: 1e3 * v for k, v in t.items()}, "times_four_passes": t["four passes"] / t["one pass"]},
                {"times_four_passes": 1.5 if chains == 16 else 1.0}, rounds=9)


# parts


def step() -> None:
    rooflines().run("step")
    for k in (1,) if SMOKE else (1, 4, 8):
        for noise in (0.2, 0.0):
            fused_step(k, noise, torch.float32).run("step")
    fused_step(2 if SMOKE else 4, 0.2, torch.bfloat16).run("step")
    noise_alone().run("step")


def captured() -> None:
    for size in sizes():
        captured_case(*size).run("captured")


def chain() -> None:
    for size in sizes():
        chain_case(*size).run("chain")
    double_well().run("chain")


def cubes_part() -> None:
    try:
        for chains in (2,) if SMOKE else (16, 64, 256):
            cubes_case(chains).run("cubes")
        for chains in (2,) if SMOKE else (16, 64):
            conditions_case(chains).run("cubes")
    except Absent as error:
        record("cubes", {"case": "CubesNet"}, {"not_timed": {"all": f"absent: {error}"}})


def small() -> None:
    """What compute-sanitizer watches: every kernel of both backends once, odd sizes, on fresh numbers, checked."""
    for name in ("triton",) if SMOKE else ("triton", "cuda"):
        try:
            backend = backends.resolve(name, where())
        except backends.BackendUnavailableError as error:
            print(f"{name}: {error}")
            continue
        x, gradients = torch.randn(5, 1021, device=where()), torch.randn(2, 5, 1021, device=where())
        gradients[1, 3, 1000] = torch.nan
        mask, faults = torch.rand(5, 1021, device=where()) < 0.2, torch.zeros(5, dtype=torch.int64, device=where())
        options = {"clamp": (-1.0, 1.0), "grad_clip_value": 0.5, "grad_clip_norm": 3.0, "seed": 1, "step": 2}
        expected, found = x.cpu(), faults.cpu()
        backend.step(x, gradients, torch.ones(2, device=where()), 0.1, 0.2, frozen_mask=mask, faults=faults, **options)
        reference.langevin_step(expected, gradients.cpu(), torch.ones(2), 0.1, 0.2, frozen_mask=mask.cpu(), faults=found, **options)
        assert torch.equal(x.cpu(), expected) and faults.tolist() == found.tolist(), name
        assert torch.equal(backend.normal((37,), 9, seed=1, step=2, device=where()).cpu(), ef.rng.normal((37,), 9, seed=1, step=2))
    models, x = networks(3, 17), start(5, 3)
    e = composed(models) | ef.Concept(energies.Gaussian(torch.zeros(3)).to(where()), name="gaussian")
    for engine, backend in (("step", "triton"), ("chain", "cpu" if SMOKE else "cuda")):
        try:
            run = ef.prepare(e, ef.Langevin(drift=DRIFT, noise=NOISE), shape=(3,), steps=3, engine=engine, backend=backend,
                             capture=False, check=False)
            got = run(x=x, seed=0).x
        except (ValueError, backends.BackendUnavailableError) as error:
            print(f"{engine} on {backend}: {error}")
            continue
        expected = ef.prepare(e, run.sampler, shape=(3,), steps=3, backend="reference", check=False)(x=x, seed=0).x
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    wait()
    print("small: every kernel that is here agrees with the reference")


def table() -> str:
    """A page of what the lines say, the last line of each case."""
    lines = [json.loads(line) for line in (OUT / "gpu.jsonl").read_text().splitlines()] if (OUT / "gpu.jsonl").exists() else []
    last = {(line["bench"], line["case"], line.get("gradients"), line.get("noise")): line for line in lines}
    text = ["# On a GPU", ""]
    text += [f"{device}, {versions}, commit {commit}" for device, versions, commit in dict.fromkeys(
        (line["device"], ", ".join(f"{k} {v}" for k, v in line["versions"].items()), line["commit"]) for line in last.values())]
    text += ["", "| case | result | floor | met | not timed |", "| --- | --- | --- | --- | --- |"]
    for line in last.values():
        facts = ", ".join(f"{k} {line[k]}" for k in ("gradients", "noise", "width") if k in line)
        numbers = {k: v for k, v in line.items() if isinstance(v, float) and k not in ("noise",)}
        shown = "; ".join(f"{k} {v:.3g}" for k, v in numbers.items())
        for kind in ("us_per_step", "ms_per_step", "ms"):
            if kind in line:
                shown += f"; {kind}: " + ", ".join(f"{k} {v:.3g}" for k, v in line[kind].items())
        floors = ", ".join(f"{k} {v:g}" for k, v in line.get("floors", {}).items())
        met = ", ".join(f"{k}: {'yes' if v else 'NO'}" for k, v in line.get("met", {}).items())
        trouble = "; ".join(f"{k} {v}" for k, v in line.get("not_timed", {}).items())
        case = f"{line['case']} ({facts})" if facts else line["case"]
        text.append(f"| {case} | {shown} | {floors} | {met} | {trouble} |".replace("\n", " "))
    (OUT / "gpu.md").write_text("\n".join(text) + "\n")
    return "\n".join(text)


PARTS = {"step": step, "captured": captured, "chain": chain, "cubes": cubes_part, "small": small, "table": lambda: None}


def main() -> None:
    global SMOKE, OUT
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_cases", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU, to see that everything runs")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of gpu.jsonl and gpu.md")
    options = parser.parse_args()
    SMOKE, OUT = options.smoke, options.out
    if SMOKE:
        torch.set_num_threads(1)
    if not SMOKE and not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device; --smoke runs tiny cases on the CPU")
    if SMOKE and os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("--smoke needs TRITON_INTERPRET=1")
    for part in options.parts:
        PARTS[part]()
    if options.parts != ["small"]:
        print(table())


if __name__ == "__main__":
    main()
