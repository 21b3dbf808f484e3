"""`python -m bench.quality [--smoke]`: distance to the exact law against wall time, ours and the peers', one core.

A fast chain that is wrong is worth nothing: each method runs 4096 chains from N(0, 2²) for 1, 2, 4, ... steps; the distance is
the total variation, over a grid of cells, between where its chains end and the exact law, known by quadrature. What exact
draws of that number would show is the floor. Times are medians of turns taken in one process.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import ebmfast as ef
from bench import timing
from bench.chain import one_core
from bench.timing import Variant, compare, quantiles, record

CHAINS, REACH, CELLS, FINE = 4096, 4.5, 18, 20
LADDER = (1, 2, 4, 8, 16, 32, 64, 128)
MOST_OF_HMC = 32  # steps: each is a trajectory


class Target:
    """A law in the plane, known by quadrature over a fine grid."""

    def __init__(self, name: str, expression: ef.Expression, step_size: float):
        self.name, self.expression, self.step_size = name, expression, step_size
        points = (torch.arange(CELLS * FINE, dtype=torch.float64) + 0.5) / (CELLS * FINE) * 2 * REACH - REACH
        grid = torch.cartesian_prod(points, points).float()
        with torch.no_grad():
            density = torch.softmax(-expression.energy(grid).double(), 0).reshape(CELLS, FINE, CELLS, FINE).sum((1, 3))
        self.exact = density

    def distance(self, x: Tensor) -> float:
        """Total variation between the cells of x `[n, 2]` and the exact ones; what lies outside of the grid counts in full."""
        cells = ((x.double() + REACH) / (2 * REACH) * CELLS).floor().long()
        inside = ((cells >= 0) & (cells < CELLS)).all(1)
        counts = torch.zeros(CELLS * CELLS, dtype=torch.float64)
        counts.scatter_add_(0, cells[inside] @ torch.tensor([CELLS, 1]), torch.ones(int(inside.sum()), dtype=torch.float64))
        shares = counts.reshape(CELLS, CELLS) / len(x)
        return 0.5 * float((shares - self.exact).abs().sum() + (1 - shares.sum()))

    def floor(self) -> float:
        """The distance that exact draws show."""
        drawn = torch.multinomial(self.exact.flatten(), CHAINS, replacement=True, generator=torch.Generator().manual_seed(0))
        shares = torch.bincount(drawn, minlength=CELLS * CELLS).double() / CHAINS
        return 0.5 * float((shares.reshape(CELLS, CELLS) - self.exact).abs().sum())


def targets() -> list[Target]:
    """An AND whose law is a crescent of a mixture and a network, and an OR of overlapping Gaussians."""
    torch.manual_seed(3)
    net = ef.Concept(ef.energies.MLP(2, (64, 64)).requires_grad_(False), name="net")
    modes = ef.Concept(ef.energies.GaussianMixture([[-1.2, 0.0], [1.2, 0.6]], covs=0.6), name="modes")
    wide, narrow = (ef.Concept(ef.energies.Gaussian(m, c), name=n) for m, c, n in (
        ([-1.0, 0.0], [[1.0, 0.5], [0.5, 0.8]], "wide"), ([1.0, 0.5], [[0.4, 0.0], [0.0, 0.6]], "narrow")))
    return [Target("AND of a mixture and 4 x a network", modes & 4.0 * net, 0.3), Target("OR of two Gaussians", wide | narrow, 0.3)]


def methods(target: Target, start: Tensor) -> dict[str, Callable[[int, int], Tensor]]:
    """Functions of (steps, seed) → states `[n, 2]`."""
    size = target.step_size

    def ours(sampler) -> Callable[[int, int], Tensor]:
        run = ef.prepare(target.expression, sampler, shape=(2,), energies=False)
        return lambda steps, seed: run(x=start, steps=steps, seed=seed).x

    def eager(steps: int, seed: int) -> Tensor:
        x, generator = start, torch.Generator().manual_seed(seed)
        for _ in range(steps):
            leaf = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(target.expression.energy(leaf).sum(), leaf)
            x = x - size / 2 * gradient + size**0.5 * torch.randn(x.shape, generator=generator)
        return x.detach()

    found = {"ebmfast Langevin": ours(ef.Langevin(step_size=size)), "ebmfast MALA": ours(ef.MALA(size)),
             "ebmfast HMC": ours(ef.HMC(0.45, 5)), "eager Langevin": eager}
    if importlib.util.find_spec("torchebm") is None:
        return found
    from torchebm.core import BaseModel
    from torchebm.samplers import HamiltonianMonteCarlo, LangevinDynamics

    class Model(BaseModel):
        def forward(self, x):
            return target.expression.energy(x)

    def theirs(sampler) -> Callable[[int, int], Tensor]:
        return lambda steps, seed: sampler.sample(x=start, n_steps=steps, generator=torch.Generator().manual_seed(seed))

    return found | {"torchebm Langevin": theirs(LangevinDynamics(Model(), step_size=size / 2)),
                    "torchebm HMC": theirs(HamiltonianMonteCarlo(Model(), step_size=0.45, n_leapfrog_steps=5))}


def measure(target: Target, ladder: tuple[int, ...], rounds: int) -> None:
    """Distance and time of every method after each number of steps."""
    start = 2.0 * torch.randn(CHAINS, 2, generator=torch.Generator().manual_seed(1))
    ways = methods(target, start)
    curves: dict[str, list] = {name: [] for name in ways}
    for steps in ladder:
        chosen = {name: way for name, way in ways.items() if steps <= MOST_OF_HMC or not name.endswith("HMC")}
        variants = [Variant(name, partial(way, steps, 0), lambda: None) for name, way in chosen.items()]
        times = compare(variants, rounds=rounds)
        for name, way in chosen.items():
            curves[name].append([steps, quantiles(times[name])["median"], target.distance(way(steps, 7))])
    record("quality", {"case": target.name, "chains": CHAINS},
           {"curves": curves, "floor": target.floor(), "columns": ["steps", "seconds", "total variation"], "threads_used": 1})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="few steps, to see that everything runs; nothing is recorded")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.smoke:
        timing.RESULTS = Path(tempfile.mkdtemp())
    with one_core():
        for target in targets():
            measure(target, LADDER[:2] if options.smoke else LADDER, 2 if options.smoke else 3)


if __name__ == "__main__":
    main()
