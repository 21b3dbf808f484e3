"""`python -m bench.chain [CASE ...]`: the chain engine against its peers, one core unless the case says more.

Peers: the eager loop, that loop with its step under torch.compile, torchebm, and JAX (jit + scan) in two forms. Every variant is
checked before it is timed: ours against the reference backend, peers by noise-free steps that must land where ours do. Compiling is
not timed.
Flops count the products of matrices alone: 4 per weight, chain, leaf and step.
"""

from __future__ import annotations

import os
import resource
import sys
from contextlib import contextmanager

import torch

import ebmfast as ef
from bench.timing import Variant, compare, fastest, quantiles, record, sound
from ebmfast import energies, rng
from ebmfast._native import core
from ebmfast.benchmark import peers
from ebmfast.benchmark.peers import DRIFT, NOISE, composed, networks, start

PEAK_ROUNDS = 20_000_000
CORES = os.sched_getaffinity(0)


@contextmanager
def one_core():
    """Everything on one core: no flag keeps XLA from using all that it sees, and its threads inherit this."""
    os.sched_setaffinity(0, {min(CORES)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, CORES)


def ours(expr, x: torch.Tensor, steps: int, name: str = "ebmfast", threads: int = 1, **options) -> Variant:
    def make(n_steps: int, noise: float, **more):
        return ef.prepare(expr, ef.Langevin(drift=DRIFT, noise=noise), shape=x.shape[1:], steps=n_steps, energies=False, **more)

    run = make(steps, NOISE, engine="chain", **options)
    half = options.get("compute_dtype") is not None

    def call():
        torch.set_num_threads(threads)
        run(x=x, seed=0)
        torch.set_num_threads(1)

    def check():
        part = x[:64]
        got = make(3, NOISE, engine="chain", **options)(x=part, seed=0).x - part
        expected = make(3, NOISE, backend="reference")(x=part, seed=0).x - part
        torch.testing.assert_close(got, expected, rtol=2e-2 if half else 1e-4, atol=1e-4 if half else 1e-6)

    return Variant(name, call, check)


def peak() -> Variant:
    return Variant("fma_peak", lambda: core.multiply_adds(PEAK_ROUNDS), lambda: None)


def medians(variants, rounds: int) -> tuple[dict, dict]:
    times = {name: quantiles(values) for name, values in compare(variants, rounds=rounds).items()}
    return times, {name: t["median"] for name, t in times.items()}


def against(case: dict, own: dict, energy, expr, x: torch.Tensor, steps: int, jax_forms, rounds: int,
            more=lambda median: {}) -> None:
    """Our variants and every peer that is here, in turns; `jax_forms()` gives energies in jax.numpy, `more` further figures."""
    given = energy, expr, x, steps
    makers = {**own, "eager": lambda: peers.eager(*given), "torch.compile": lambda: peers.compiled(*given),
              "torchebm": lambda: peers.torchebm(*given), "jax": lambda: peers.jax_chain(jax_forms()[0], *given[1:])}
    if len(own) > 1 or "fma_peak" in own:  # networks: stacked as well
        makers["jax_stacked"] = lambda: peers.jax_chain(jax_forms()[1], *given[1:])
    found, trouble = sound(makers, tuple(own))
    times, median = medians(found, rounds)
    best = {name: t["median"] for name, t in fastest(times, "jax").items()}
    ratios = {f"ratio_to_{name}": best[name] / median["ebmfast"] for name in best if name not in own}
    record("chain", case, {"seconds": times, **ratios, **more(median), "threads_used": 1, "not_timed": trouble})


def double_well() -> None:
    x, steps, well = start(4096, 32), 1000, energies.DoubleWell()
    expr = ef.Concept(well)

    def forms():
        import jax.numpy as jnp
        return [lambda y: 2.0 * jnp.square(jnp.square(y) - 1).sum(-1)]

    against({"case": "double well", "chains": 4096, "dim": 32, "steps": steps}, {"ebmfast": lambda: ours(expr, x, steps)},
            well, expr, x, steps, forms, 3, lambda median: {"ns_per_value_and_step": median["ebmfast"] / (x.numel() * steps) * 1e9})


def network_case(name: str, dim: int, width: int, chains: int, steps: int, rounds: int = 5) -> None:
    nets, x = networks(dim, width), start(chains, dim)
    expr = composed(nets)
    flops = 4.0 * len(nets) * chains * steps * (dim * width + width * width)

    def shares(median: dict) -> dict:
        roofline = core.multiply_adds(1) * PEAK_ROUNDS / median["fma_peak"]
        return {"gflops": flops / median["ebmfast"] / 1e9, "fma_peak_gflops": roofline / 1e9,
                "share_of_fma_peak": flops / median["ebmfast"] / roofline}

    against({"case": name, "dim": dim, "width": width, "leaves": len(nets), "chains": chains, "steps": steps},
            {"ebmfast": lambda: ours(expr, x, steps), "fma_peak": peak}, lambda y: sum(net(y) for net in nets), expr, x, steps,
            lambda: peers.jax_networks(nets), rounds, shares)


def disjunction() -> None:
    nets, x, steps = networks(2, 128), start(8192, 2), 10
    either = composed(nets, either=True)
    against({"case": "OR of 4", "dim": 2, "width": 128, "chains": 8192, "steps": steps},
            {"ebmfast": lambda: ours(either, x, steps), "and": lambda: ours(composed(nets), x, steps, "and")},
            lambda y: -torch.logsumexp(-torch.stack([net(y) for net in nets]), 0), either, x, steps,
            lambda: peers.jax_networks(nets, either=True), 5, lambda median: {"or_over_and": median["ebmfast"] / median["and"]})


def bfloat16() -> None:
    if not core.chain_bf16():
        print("bfloat16: this CPU has no AVX512-BF16")
        return
    for dim, width, chains, steps in ((2, 128, 8192, 10), (32, 256, 4096, 5)):
        expr, x = composed(networks(dim, width)), start(chains, dim)
        times, median = medians([ours(expr, x, steps), ours(expr, x, steps, "bf16", compute_dtype=torch.bfloat16)], rounds=9)
        record("chain", {"case": "bfloat16 against float32", "dim": dim, "width": width, "chains": chains, "steps": steps},
               {"seconds": times, "speedup": median["ebmfast"] / median["bf16"], "threads_used": 1})


def threads() -> None:
    for name, expr, x, steps in (
        ("AND of 4 2-128-128-1", composed(networks(2, 128)), start(8192, 2), 10),
        ("AND of 4 2-64-64-1", composed(networks(2, 64)), start(64, 2), 500),
        ("double well", ef.Concept(energies.DoubleWell()), start(4096, 32), 4000),
    ):
        times, median = medians([ours(expr, x, steps), ours(expr, x, steps, "two_threads", threads=2)], rounds=9)
        record("chain", {"case": f"2 threads against 1: {name}", "chains": len(x), "steps": steps},
               {"seconds": times, "speedup": median["ebmfast"] / median["two_threads"], "threads_used": 2})


def linearity() -> None:
    """Twice and ten times the work takes twice and ten times as long; memory does not grow with steps."""
    x, nets = start(8192, 2), networks(2, 128, 8)
    four, eight = composed(nets[:4]), composed(nets)
    times, median = medians([
        ours(four, x, 10), ours(four, x, 1, "tenth_of_the_steps"), ours(eight, x, 10, "twice_the_leaves"),
        ours(four, start(16384, 2), 10, "twice_the_chains")], rounds=7)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ours(ef.Concept(energies.DoubleWell()), start(64, 4), 100_000).run()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    small = start(1024, 2)
    steps, median_steps = medians([ours(four, small, 1000), ours(four, small, 100, "hundred")], rounds=3)
    record("chain", {"case": "linearity", "dim": 2, "width": 128, "chains": 8192, "steps": 10},
           {"seconds": times | {"1000 steps of 1024 chains": steps["ebmfast"], "100 steps": steps["hundred"]},
            "steps_1000_over_100": median_steps["ebmfast"] / median_steps["hundred"] / 10,
            "leaves_8_over_4": median["twice_the_leaves"] / median["ebmfast"] / 2,
            "chains_16384_over_8192": median["twice_the_chains"] / median["ebmfast"] / 2,
            "kilobytes_for_100000_steps": grown, "threads_used": 1})


def call_overhead() -> None:
    """A prepared run in a training loop: what a call costs beyond the engine's own, weights as they were and changed."""
    nets, x = networks(2, 64), start(64, 2)
    run = ef.prepare(composed(nets), ef.Langevin(drift=DRIFT, noise=NOISE), shape=(2,), steps=1, energies=False)
    run(x=x, seed=0)
    chain = run._chains[(2,), torch.device("cpu")]
    drift, noise = torch.tensor([DRIFT]), torch.tensor([NOISE])
    y, faults, rounds = x.clone(), torch.zeros(64, dtype=torch.int64), 200

    def bare():
        for _ in range(rounds):
            chain.run(y, faults, [], drift, noise, None, step=0, seed=0, first_chain=0)

    def whole():
        for _ in range(rounds):
            run(x=x, seed=0)

    def changed():
        for i in range(rounds):
            for net in nets:
                net.layers[1].weight.data[0, 0] = float(i)
            run(x=x, seed=0)

    def writes():
        for i in range(rounds):
            for net in nets:
                net.layers[1].weight.data[0, 0] = float(i)

    with_energies = ef.prepare(run.plan.expression, run.sampler, shape=(2,), steps=1)
    with_energies(x=x, seed=0)

    def energies_too():
        for _ in range(rounds):
            with_energies(x=x, seed=0)

    variants = [Variant(f.__name__, f, lambda: None) for f in (bare, whole, energies_too, changed, writes)]
    times, median = medians(variants, rounds=15)
    record("chain", {"case": "a call of a prepared run", "dim": 2, "width": 64, "leaves": 4, "chains": 64, "steps": 1},
           {"microseconds_beyond_arithmetic": (median["whole"] - median["bare"]) / rounds * 1e6,
            "final_energies_cost": (median["energies_too"] - median["whole"]) / rounds * 1e6,
            "with_one_weight_matrix_of_each_leaf_changed": (median["changed"] - median["writes"] - median["bare"]) / rounds * 1e6,
            "seconds": times, "threads_used": 1})


def metropolis_call(sampler) -> None:
    """The same with MALA or HMC, and what the general path costs."""
    expr, x, rounds = composed(networks(2, 64)), start(64, 2), 200
    run = ef.prepare(expr, sampler, shape=(2,), steps=1, energies=False)
    run(x=x, seed=0)
    chain, (drift, noise) = run._chains[(2,), torch.device("cpu")], sampler.coefficients(expr, 1).float32
    y, faults, (accepted, energy) = x.clone(), torch.zeros(64, dtype=torch.int64), torch.zeros(2, 64)
    places = {"accepted": accepted.data_ptr(), "energies": energy.data_ptr(), "stream": sampler.stream, "accept_stream": rng.ACCEPT}

    def bare():
        for _ in range(rounds):
            chain.run(y, faults, [], drift, noise, None, step=0, seed=0, first_chain=0, **places)

    def whole():
        for _ in range(rounds):
            run(x=x, seed=0)

    def general():
        for _ in range(rounds):
            run(x=x, seed=0, quick=False)

    times, median = medians([Variant(f.__name__, f, lambda: None) for f in (bare, whole, general)], rounds=15)
    name = f"a call of a prepared run, {type(sampler).__name__}"
    record("chain", {"case": name, "dim": 2, "width": 64, "leaves": 4, "chains": 64, "steps": 1},
           {"microseconds_beyond_arithmetic": (median["whole"] - median["bare"]) / rounds * 1e6,
            "by_the_general_path": (median["general"] - median["bare"]) / rounds * 1e6, "seconds": times, "threads_used": 1})


CASES = {
    "double_well": double_well,
    "and_128": lambda: network_case("AND of 4", 2, 128, 8192, 10),
    "and_64": lambda: network_case("AND of 4, few chains", 2, 64, 64, 500),
    "and_256": lambda: network_case("AND of 4, wide", 32, 256, 4096, 5),
    "or_128": disjunction,
    "bfloat16": bfloat16,
    "threads": threads,
    "linearity": linearity,
    "call": call_overhead,
    "call_mala": lambda: metropolis_call(ef.MALA(0.05)),
    "call_hmc": lambda: metropolis_call(ef.HMC(0.05, 2)),
}


def main() -> None:
    torch.set_num_threads(1)
    unknown = [name for name in sys.argv[1:] if name not in CASES]
    if unknown:
        raise SystemExit(f"no case {unknown[0]!r}; there are {', '.join(CASES)}")
    for name in sys.argv[1:] or CASES:
        if name == "threads":
            threads()
            continue
        with one_core():
            CASES[name]()


if __name__ == "__main__":
    main()
