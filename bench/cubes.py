"""`python -m bench.cubes`: compositions of the paper's CubesNet at 64x64 and of small networks, models against machine.

Cases: an AND of 4 distinct CubesNets, 16 chains: ours as it is, channels_last, bfloat16, compiled; against the eager float32
NCHW loop, its step under torch.compile, and torchebm. The driver's own time per step is what a step takes beyond the models'
forward and backward pass alone. Several conditions of one CubesNet against passes one after the other, and in the micro-batch
that is measured to be fastest. Stacked parameters against branches for small networks. Rooflines, measured in the same run:
float32 and bfloat16 matrix products.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import unittest.mock
from contextlib import contextmanager
from pathlib import Path

import torch

import ebmfast as ef
from bench import timing
from bench.timing import Variant, compare, quantiles, record, sound
from ebmfast import batching
from ebmfast.models import CubesNet
from ebmfast.plan import Plan

DRIFT, NOISE = 1e-3, 1e-2


def cubes(count: int, width: int) -> list[CubesNet]:
    torch.manual_seed(0)
    models = [CubesNet(3, width=width).folded() for _ in range(count)]
    with torch.no_grad():  # the second convolutions start near 0; trained ones do not
        for model in models:
            for block in model.blocks:
                block.conv2.weight.normal_(0, 1 / (3 * block.conv2.weight.shape[1] ** 0.5))
    return models


def flops(model, x: torch.Tensor, condition: torch.Tensor) -> int:
    """Of one forward and backward pass with respect to x: each product has one counterpart going back."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x, condition)
    return 2 * counter.get_total_flops()


def gemm_rate(dtype: torch.dtype, size: int) -> tuple[Variant, int]:
    a, b = (torch.randn(size, size, dtype=dtype) for _ in range(2))
    return Variant(f"gemm_{str(dtype)[6:]}", lambda: a @ b, lambda: None), 2 * size**3


def eager_step(models, conditions, x: torch.Tensor) -> torch.Tensor:
    """The loop that users write, one step of it."""
    leaf = x.detach().requires_grad_()
    energy = sum(m(leaf, c) for m, c in zip(models, conditions))
    (gradient,) = torch.autograd.grad(energy.sum(), leaf)
    return x - DRIFT * gradient + NOISE * torch.randn_like(x)


def agreement(run, want: torch.Tensor, x, loose: float):
    """A check that one step without noise moves where the eager gradient says."""

    def check() -> None:
        moved = run(x=x, seed=0).x - x
        error = float((moved - want).norm() / want.norm())
        if not error <= loose:
            raise AssertionError(f"moves differ by {error:.3g} of their norm, allowed {loose:g}")

    return check


def compiled_step(models, conditions):
    """The same step in one graph."""
    torch.compiler.reset()
    gradient = torch.func.grad(lambda y: sum(m(y, c) for m, c in zip(models, conditions)).sum())

    @torch.compile(fullgraph=True)
    def step(x: torch.Tensor, drift: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return x - drift * gradient(x) + noise * torch.randn_like(x)

    return torch.no_grad()(lambda x, drift, noise: step(x, torch.tensor(drift), torch.tensor(noise)))


def torchebm_step(models, conditions):
    """One step of torchebm's sampler, unmodified."""
    from torchebm.core import BaseModel
    from torchebm.samplers import LangevinDynamics

    class Model(BaseModel):
        def forward(self, x):
            return sum(m(x, c) for m, c in zip(models, conditions)).flatten()  # it takes [B] alone

    model = Model()
    return lambda x, drift, noise: LangevinDynamics(model, step_size=drift, noise_scale=noise / (2 * drift) ** 0.5).sample(
        x=x, n_steps=1)


def peer_makers(models, rows, x: torch.Tensor, gradient: torch.Tensor, unit: float) -> dict:
    """Peers that step as users would; each must move along the gradient. JAX has no CubesNet that would be the same code."""
    def maker(make):
        def variant() -> Variant:
            step = make(models, rows)

            def check() -> None:
                moved, want = step(x, unit, 1e-30) - x, -unit * gradient
                error = float((moved - want).norm() / want.norm())
                if not error <= 1e-4:
                    raise AssertionError(f"moves differ by {error:.3g} of their norm, allowed 1e-4")

            return Variant("", lambda: step(x, DRIFT, NOISE), check)

        return variant

    return {"torch.compile": maker(compiled_step), "torchebm": maker(torchebm_step)}


def distinct(chains: int, size: int, width: int, rounds: int, compiled: bool, gemm: int) -> None:
    models, count = cubes(4, width), 4
    torch.manual_seed(1)
    x, conditions = torch.rand(chains, 3, size, size), [torch.randn(3) for _ in range(count)]
    e = ef.all_of([ef.Concept(m, c.tolist(), name=f"cubes{i}") for i, (m, c) in enumerate(zip(models, conditions))])
    rows = [c.expand(chains, -1) for c in conditions]
    leaf = x.clone().requires_grad_()
    gradient = torch.autograd.grad(sum(m(leaf, c) for m, c in zip(models, rows)).sum(), leaf)[0]
    unit = float(1 / gradient.abs().max())  # a step of which no move is lost in rounding

    ways = {"float32": {}, "float32 channels_last": {"channels_last": True}, "bfloat16": {"compute_dtype": torch.bfloat16},
            "bfloat16 channels_last": {"compute_dtype": torch.bfloat16, "channels_last": True}}
    if compiled:
        ways |= {f"{name} compiled": options | {"compile": True} for name, options in list(ways.items())[1::2]}
    variants = [Variant("eager", lambda: eager_step(models, rows, x), lambda: None)]
    for name, options in ways.items():
        exact = ef.prepare(e, ef.Langevin(drift=unit, noise=0.0), steps=1, energies=False, **options)
        noisy = ef.prepare(e, ef.Langevin(drift=DRIFT, noise=NOISE), steps=1, energies=False, **options)
        check = agreement(exact, -unit * gradient, x, 0.05 if "bfloat16" in name else 1e-4)
        variants.append(Variant(name, lambda run=noisy: run(x=x, seed=0), check))
        evaluator = Plan(e, options.get("compute_dtype"), **{k: v for k, v in options.items() if k != "compute_dtype"}).bind(x)

        def models_alone(evaluator=evaluator):
            with torch.enable_grad():
                evaluator.gradients(x)

        variants.append(Variant(f"{name}, models alone", models_alone, lambda: None))
    more, trouble = sound(peer_makers(models, rows, x, gradient, unit))
    variants += more
    products = [gemm_rate(d, gemm) for d in (torch.float32, torch.bfloat16)]
    seconds = {k: quantiles(v) for k, v in compare([*variants, *(v for v, _ in products)], rounds=rounds).items()}
    peak = {v.name: n / seconds[v.name]["p20"] for v, n in products}
    work = count * flops(models[0], x, rows[0])
    results = {}
    for name in ["eager", *(v.name for v in more), *ways]:
        rate = peak["gemm_bfloat16" if "bfloat16" in name else "gemm_float32"]
        results[name] = {"ms": 1e3 * seconds[name]["median"], "times_eager": seconds["eager"]["median"] / seconds[name]["median"],
                         "share_of_gemm_rate": work / seconds[name]["median"] / rate}
        if name in ways:
            alone = seconds[f"{name}, models alone"]["median"]
            results[name]["driver_share"] = seconds[name]["median"] / alone - 1
    record("cubes", {"case": "4 distinct CubesNets", "chains": chains, "size": size, "width": width},
           {"gflop": work / 1e9, "gemm_gflops": {k: v / 1e9 for k, v in peak.items()}, "results": results, "not_timed": trouble})


def conditions(chains: int, size: int, width: int, rounds: int) -> None:
    (model,) = cubes(1, width)
    torch.manual_seed(1)
    x, values = torch.rand(chains, 3, size, size), torch.randn(4, 3)
    evaluator = Plan(ef.all_of([ef.Concept(model, c.tolist()) for c in values])).bind(x)
    rows = [c.expand(chains, -1) for c in values]

    def together():
        with torch.enable_grad():
            return evaluator.gradients(x)[0]

    def in_turn():
        out = []
        for c in rows:
            leaf = x.detach().requires_grad_()
            out.append(torch.autograd.grad(model(leaf, c).sum(), leaf)[0])
        return out

    def check():
        torch.testing.assert_close(torch.stack(list(together())), torch.stack(in_turn()), rtol=1e-3, atol=1e-5)

    seconds = compare([Variant("one pass", together, check), Variant("in turn", in_turn, lambda: None)], rounds=rounds)
    seconds = {k: quantiles(v) for k, v in seconds.items()}
    record("cubes", {"case": "4 conditions of one CubesNet", "chains": chains, "size": size, "width": width},
           {"ms": {k: 1e3 * v["median"] for k, v in seconds.items()},
            "one_pass_times_faster": seconds["in turn"]["median"] / seconds["one pass"]["median"]})


def micro_batches(chains: int, size: int, width: int, rounds: int, steps: int = 2) -> None:
    """Four conditions of one CubesNet: `4 * chains` rows in one pass, and the micro-batch that a longer run measures and takes."""
    (model,) = cubes(1, width)
    torch.manual_seed(1)
    x, values = torch.rand(chains, 3, size, size), torch.randn(4, 3)
    e, sampler = ef.all_of([ef.Concept(model, c.tolist()) for c in values]), ef.Langevin(drift=DRIFT, noise=NOISE)
    with fresh_measurements():
        run = ef.prepare(e, sampler, steps=steps, energies=False)
        chosen = run(x=x, seed=0).report.micro_batch
    (times,) = run.rates.values()
    tried = {n: 1e3 * t / n for n, t in zip(batching.candidates(chains), times)}
    whole, part = (ef.prepare(e, sampler, steps=steps, energies=False, batch_size=n) for n in (chains, chosen))

    def check():
        torch.testing.assert_close(part(x=x, seed=0).x, whole(x=x, seed=0).x, rtol=1e-3, atol=1e-4)

    variants = [Variant("whole", lambda: whole(x=x, seed=0), check), Variant("measured", lambda: part(x=x, seed=0), lambda: None)]
    median = {k: quantiles(v)["median"] / steps for k, v in compare(variants, rounds=rounds).items()}
    record("cubes", {"case": "4 conditions of one CubesNet, measured micro-batch", "chains": chains, "size": size, "width": width},
           {"micro_batch": chosen, "ms_per_chain_as_measured": tried, "ms_per_step": {k: 1e3 * t for k, t in median.items()},
            "times_faster": median["whole"] / median["measured"]})


@contextmanager
def fresh_measurements():
    """A cache folder of its own, so that what is to be measured is, in runs of any length."""
    patch = unittest.mock.patch
    with tempfile.TemporaryDirectory() as folder, patch.object(batching, "WORTH", 1):
        with patch.dict(os.environ, {"EBMFAST_CACHE": folder, "EBMFAST_MEASURE": "1"}):
            yield


def stacks(rounds: int, chains=(16, 256, 4096), dims=(2, 32), count: int = 4) -> None:
    """MLPs that the chain engine is kept from: what planning does for any small network."""
    for n, dim in itertools.product(chains, dims):
        torch.manual_seed(0)
        models = [torch.nn.Sequential(torch.nn.Linear(dim, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64), torch.nn.SiLU(),
                                      torch.nn.Linear(64, 1)) for _ in range(count)]
        e, x = ef.all_of([ef.Concept(m, name=f"m{i}") for i, m in enumerate(models)]), torch.randn(n, dim)
        evaluators = {s: Plan(e, stack=s).bind(x) for s in (True, False)}

        def run(stack, evaluators=evaluators, x=x):
            with torch.enable_grad():
                return evaluators[stack].gradients(x)[0]

        def check(run=run):
            torch.testing.assert_close(torch.stack(list(run(True))), torch.stack(list(run(False))), rtol=1e-4, atol=1e-6)

        seconds = compare([Variant("stacked", lambda run=run: run(True), check),
                           Variant("branches", lambda run=run: run(False), lambda: None)], rounds=rounds)
        record("cubes", {"case": f"{count} MLPs {dim}-64-64-1, step engine", "chains": n},
               {"us": {k: 1e6 * quantiles(v)["median"] for k, v in seconds.items()}})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cubes", description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that everything runs; nothing is recorded")
    parser.add_argument("--compile", action="store_true", help="ours also under torch.compile")
    parser.add_argument("--rounds", type=int, default=5, help="turns of everybody (default: %(default)s)")
    options = parser.parse_args()
    if options.smoke:
        timing.RESULTS = Path(tempfile.mkdtemp())
        distinct(2, 16, 2, 2, options.compile, 32)
        conditions(2, 16, 2, 2)
        micro_batches(4, 16, 2, 2)
        stacks(2, (3,), (2,))
        return
    distinct(16, 64, 64, options.rounds, options.compile, 2048)
    conditions(16, 64, 64, options.rounds)
    micro_batches(16, 64, 64, options.rounds)
    stacks(6 * options.rounds)


if __name__ == "__main__":
    main()
