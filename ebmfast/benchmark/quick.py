"""A table of this machine's own: ebmfast against the libraries that are installed here.

Every line is a Langevin chain. ebmfast has to agree with the reference backend, and each peer, without noise, with ebmfast,
before anything is timed; variants take turns, and the table shows medians. Peers: the eager loop; torchebm and JAX (jit and
scan) where they are installed; torch.compile with --compile.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import composition, energies, sampling
from ..samplers import Langevin
from . import peers
from .timing import Variant, append, compare, machine, quantiles, sound

SECONDS = 85.0  # of timing with --quick: with checks and compiling, under two minutes
PEERS = ("eager", "torch.compile", "torchebm", "jax")


@dataclass
class Case:
    """A composition, where its chains start, the steps of a call, and its energy in torch and in JAX."""

    name: str
    expression: composition.Expression
    x: Tensor
    steps: int
    energy: Callable[[Tensor], Tensor]
    jax: Callable[[], list[Callable]] | None = None


class Pictures(nn.Module):
    """A small convolutional energy of pictures."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.SiLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.SiLU(), nn.Flatten(), nn.Linear(32 * 64, 1))

    def forward(self, x: Tensor) -> Tensor:
        """E(x), `[B]`, of x `[B, 3, 32, 32]`."""
        return self.layers(x)[:, 0]


def cases() -> Iterator[Case]:
    """What is measured, made when it is asked for."""
    yield _double_well()
    yield _networks("AND of 4 networks 2-64-64-1", 2, 64, 64, 200)
    yield _networks("OR of 4 networks 2-128-128-1", 2, 128, 1024, 20, either=True)
    yield _networks("AND of 4 networks 32-256-256-1", 32, 256, 1024, 4)
    torch.manual_seed(0)
    nets = [Pictures().requires_grad_(False) for _ in range(2)]
    both = composition.all_of([composition.Concept(net, name=f"net{k}") for k, net in enumerate(nets)])
    yield Case("AND of 2 convolutional networks", both, peers.start(16, 3, 32, 32), 10, lambda x: nets[0](x) + nets[1](x))


def _double_well() -> Case:
    well = energies.DoubleWell()

    def jax():
        import jax.numpy as jnp
        return [lambda y: 2.0 * jnp.square(jnp.square(y) - 1).sum(-1)]

    return Case("double well", composition.Concept(well, name="well"), 0.5 * peers.start(1024, 32), 200, well, jax)


def _networks(name: str, dim: int, width: int, chains: int, steps: int, either: bool = False) -> Case:
    nets = peers.networks(dim, width)

    def energy(x: Tensor) -> Tensor:
        found = torch.stack([net(x) for net in nets])
        return -torch.logsumexp(-found, 0) if either else found.sum(0)

    return Case(name, peers.composed(nets, either), peers.start(chains, dim), steps, energy,
                lambda: list(peers.jax_networks(nets, either)))


def ours(case: Case) -> Variant:
    """ebmfast, held to the reference backend."""
    def prepare(steps: int, **options):
        dynamics = Langevin(drift=peers.DRIFT, noise=peers.NOISE)
        return sampling.prepare(case.expression, dynamics, shape=case.x.shape[1:], steps=steps, energies=False, **options)

    run = prepare(case.steps)

    def check() -> None:
        few = case.x[:16]
        moved, expected = (prepare(3, **o)(x=few, seed=0).x - few for o in ({}, {"backend": "reference", "engine": "step"}))
        torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-5)

    return Variant("ebmfast", lambda: run(x=case.x, seed=0), check)


def makers(case: Case, wanted: list[str]) -> dict[str, Callable[[], Variant]]:
    """ebmfast and the peers that apply, each made when it is called."""
    given = case.energy, case.expression, case.x, case.steps
    plain = {"eager": peers.eager, "torch.compile": peers.compiled, "torchebm": peers.torchebm}
    found: dict[str, Callable[[], Variant]] = {"ebmfast": lambda: ours(case)}
    found |= {name: partial(make, *given) for name, make in plain.items() if name in wanted}
    if "jax" in wanted and case.jax is not None:
        found |= {f"jax{i}": partial(peers.jax_chain, energy, *given[1:]) for i, energy in enumerate(case.jax())}
    return found


def measure(case: Case, wanted: list[str], seconds: float) -> dict:
    """Seconds per call of everybody, timed for about `seconds`; a peer that is not right, or fails, gets the reason."""
    found, trouble = sound(makers(case, wanted))
    once = sum(times[0] for times in compare(found, rounds=1).values())
    rounds = int(min(15, max(3, seconds / once)))
    times = {name: quantiles(values) for name, values in compare(found, rounds=rounds).items()}
    forms = [name for name in times if name.startswith("jax")]
    if forms:  # the faster of its forms
        times["jax"] = min((times.pop(name) for name in forms), key=lambda t: t["median"])
    return {"case": case.name, "chains": len(case.x), "shape": list(case.x.shape[1:]), "steps": case.steps, "rounds": rounds,
            "seconds": times, "refused": {name.rstrip("01"): reason for name, reason in trouble.items()}}


def installed(compiling: bool) -> list[str]:
    """Peers that can be measured here."""
    found = [name for name in ("torchebm", "jax") if importlib.util.find_spec(name) is not None]
    return ["eager", *(["torch.compile"] if compiling else []), *found]


def table(lines: list[dict], wanted: list[str]) -> str:
    """The figures as text: ebmfast's time per call, and how many times as long each peer takes."""
    head = f"{'':34}{'chains':>8}{'steps':>7}{'ebmfast':>12}" + "".join(f"{name:>15}" for name in wanted)
    rows = [head]
    for line in lines:
        times = {name: t["median"] for name, t in line["seconds"].items()}
        cells = [f"{times[name] / times['ebmfast']:.2f} x" if name in times else "refused" if name in line["refused"] else "-"
                 for name in wanted]
        rows.append(f"{line['case']:34}{line['chains']:>8}{line['steps']:>7}{1e3 * times['ebmfast']:>9.2f} ms"
                    + "".join(f"{cell:>15}" for cell in cells))
    reasons = [f"{line['case']}, {name}: {reason}" for line in lines for name, reason in line["refused"].items()]
    return "\n".join([*rows, *reasons])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `ebmfast bench`."""
    parser.add_argument("--quick", action="store_true", help="about two minutes; without it, five times as long")
    parser.add_argument("--compile", action="store_true", help="the eager loop under torch.compile too (compiles for minutes)")
    parser.add_argument("--threads", type=int, help="threads, and on Linux cores, for everybody (default: torch's own)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append the figures as JSON lines")
    parser.add_argument("--seconds", type=float, help="seconds of timing, in the place of those of --quick")


def run(args) -> int:
    """Measure all cases and print the table."""
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"`--threads` must be at least 1, got {args.threads}")
    with _threads(args.threads):
        wanted, chosen = installed(args.compile), list(cases())
        budget = args.seconds if args.seconds is not None else SECONDS * (1 if args.quick else 5)
        print(f"peers here: {', '.join(wanted)}. Not measured: {', '.join(p for p in PEERS if p not in wanted) or 'none'}")
        lines = []
        for case in chosen:
            print(f"  {case.name} ...", flush=True, file=sys.stderr)
            lines.append(measure(case, wanted, budget / len(chosen)))
        about = machine()
        print(table(lines, wanted))
        print(f"{about['device']}, {about['isa']}, {about['threads']} thread(s), torch {about['torch']}, ebmfast"
              f" {about['ebmfast']}. A peer's time over ebmfast's; medians of turns taken in one process.")
        if args.out is not None:
            append(args.out, [{"bench": "quick", **line, **about} for line in lines])
            print(f"appended to {args.out}")
    return 0


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """So many threads, and no more cores: XLA has no number of threads to set, and takes every core that it sees at first."""
    before, cores = torch.get_num_threads(), os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    try:
        if count is not None:
            torch.set_num_threads(count)
            if cores:
                os.sched_setaffinity(0, set(sorted(cores)[:count]))
        yield
    finally:
        torch.set_num_threads(before)
        if cores:
            os.sched_setaffinity(0, cores)
