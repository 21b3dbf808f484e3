"""`python -m bench.scaling [--smoke]`: time of a call against chains, leaves, steps and dimension, one core, against the peers.

From one point (AND of 4 networks 2-64-64-1, 1024 chains, 20 steps), one number varies at a time. Every variant is checked at
every point before it is timed there.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from bench import timing
from bench.chain import one_core
from bench.timing import compare, quantiles, record
from ebmfast.benchmark import peers, quick

POINT = {"chains": 1024, "leaves": 4, "steps": 20, "dim": 2}
SWEEPS = {"chains": (16, 64, 256, 1024, 4096, 16384), "leaves": (1, 2, 4, 8, 16), "steps": (1, 4, 20, 100, 400),
          "dim": (2, 8, 32, 128, 512)}
WIDTH = 64
SECONDS = 8.0  # of timing per point


def case(chains: int, leaves: int, steps: int, dim: int) -> quick.Case:
    """The AND of so many networks dim-64-64-1."""
    nets = peers.networks(dim, WIDTH, leaves)
    return quick.Case("AND of networks", peers.composed(nets), peers.start(chains, dim), steps,
                      lambda x: sum(net(x) for net in nets), lambda: list(peers.jax_networks(nets)))


def measure(axis: str, value: int, wanted: list[str], seconds: float) -> None:
    """One point: seconds per call of everybody."""
    point = POINT | {axis: value}
    variants = quick.variants(case(**point), wanted)
    for variant in variants:
        variant.check()
    (once,) = [quantiles(v)["median"] for v in compare(variants[:1], rounds=3).values()]
    rounds = int(min(15, max(3, seconds / (5 * once * len(variants)))))
    times = {name: quantiles(found) for name, found in compare(variants, rounds=rounds).items()}
    forms = [name for name in times if name.startswith("jax")]
    if forms:
        times["jax"] = min((times.pop(name) for name in forms), key=lambda t: t["median"])
    record("scaling", {"axis": axis, "value": value, **point, "width": WIDTH}, {"seconds": times, "threads_used": 1})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="two points, to see that everything runs; nothing is recorded")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sweeps = {axis: values[:1] for axis, values in SWEEPS.items()} if options.smoke else SWEEPS
    if options.smoke:
        timing.RESULTS = Path(tempfile.mkdtemp())
    with one_core():
        for axis, values in sweeps.items():
            for value in values:
                measure(axis, value, quick.installed(False), 0.1 if options.smoke else SECONDS)


if __name__ == "__main__":
    main()
