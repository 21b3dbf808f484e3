"""`python -m bench.scaling [--smoke]`: time of a call against chains, leaves, steps and dimension, one core, against the peers.

From one point (AND of 4 networks 2-64-64-1, 1024 chains, 20 steps), one number varies at a time. Every variant is checked at
every point before it is timed there; compiling is not timed.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from bench import timing
from bench.chain import one_core
from bench.timing import record
from ebmfast.benchmark import peers, quick

POINT = {"chains": 1024, "leaves": 4, "steps": 20, "dim": 2}
SWEEPS = {"chains": (16, 128, 1024, 8192), "leaves": (1, 2, 4, 8, 16), "steps": (1, 20, 100, 400), "dim": (2, 32, 128, 512)}
WIDTH = 64
SECONDS = 4.0  # of timing per point


def case(chains: int, leaves: int, steps: int, dim: int) -> quick.Case:
    """The AND of so many networks dim-64-64-1."""
    nets = peers.networks(dim, WIDTH, leaves)
    return quick.Case("AND of networks", peers.composed(nets), peers.start(chains, dim), steps,
                      lambda x: sum(net(x) for net in nets), lambda: list(peers.jax_networks(nets)))


def sweep(sweeps: dict[str, tuple[int, ...]], wanted: list[str], seconds: float) -> None:
    """Every point once, also the one that all sweeps share."""
    measured: dict[tuple, dict] = {}
    for axis, values in sweeps.items():
        for value in values:
            point = POINT | {axis: value}
            key = tuple(point.values())
            if key not in measured:
                found = quick.measure(case(**point), wanted, seconds)
                measured[key] = {"seconds": found["seconds"], "threads_used": 1, "not_timed": found["refused"]}
            record("scaling", {"axis": axis, "value": value, **point, "width": WIDTH}, measured[key])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="two points, to see that everything runs; nothing is recorded")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sweeps = {axis: values[:1] for axis, values in SWEEPS.items()} if options.smoke else SWEEPS
    if options.smoke:
        timing.RESULTS = Path(tempfile.mkdtemp())
    with one_core():
        sweep(sweeps, quick.installed(True), 0.1 if options.smoke else SECONDS)


if __name__ == "__main__":
    main()
