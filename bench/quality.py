"""`python -m bench.quality [--smoke]`: distance to the exact law against wall time, ours and the peers', one core.

A fast chain that is wrong is worth nothing: each method runs 4096 chains from N(0, 2²) for 1, 2, 4, ... steps; the distance is
the total variation, over a grid of cells, between where its chains end and the exact law, known by quadrature. What exact
draws of that number would show is the floor. Everybody has the same target, start and step size, and for HMC as many leapfrog
steps; nobody is tuned beyond that. Energies of peers must be ours. Times are medians of turns taken in one process.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import ebmfast as ef
from bench import quality_methods, timing
from bench.chain import one_core
from bench.timing import Variant, compare, quantiles, record, sound

CHAINS, REACH, CELLS, FINE = 4096, 4.5, 18, 20
LADDER = (1, 2, 4, 8, 16, 32, 64, 128)
MOST_OF_HMC = 32  # steps: each is a trajectory


class Target:
    """A law in the plane, known by quadrature over a fine grid; its energy again in torch, and of one x `[2]` in JAX."""

    def __init__(self, name: str, expression: ef.Expression, step_size: float, energy=None, jax=None, leapfrog_step: float = 0.25):
        self.name, self.expression, self.step_size, self.leapfrog_step = name, expression, step_size, leapfrog_step
        self.energy, self.jax = energy, jax
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
    net = ef.energies.MLP(2, (64, 64)).requires_grad_(False)
    modes = ef.energies.GaussianMixture([[-1.2, 0.0], [1.2, 0.6]], covs=0.6)
    wide = ef.energies.Gaussian([-1.0, 0.0], [[1.0, 0.5], [0.5, 0.8]])
    narrow = ef.energies.Gaussian([1.0, 0.5], [[0.4, 0.0], [0.0, 0.6]])

    def crescent():
        import jax.numpy as jnp
        from jax.scipy.special import logsumexp

        layers = [(jnp.asarray(m.weight.numpy()), jnp.asarray(m.bias.numpy())) for m in (*net.layers, net.read_out)]
        means, precisions, logs = (jnp.asarray(b.numpy()) for b in (modes.means, modes.precisions, modes.log_weights))

        def energy(x):
            h = x
            for w, b in layers[:-1]:
                h = w @ h + b
                h = h / (1 + jnp.exp(-h))
            w, b = layers[-1]
            return 4.0 * (w @ h + b)[0] - logsumexp(logs - 0.5 * (jnp.square(x - means) * precisions).sum(1))

        return energy

    def either():
        import jax.numpy as jnp

        parts = [(jnp.asarray(g.mean.numpy()), jnp.asarray(g.precision.numpy())) for g in (wide, narrow)]
        return lambda x: -jnp.logaddexp(*(-0.5 * (x - m) @ p @ (x - m) for m, p in parts))

    names = [ef.Concept(m, name=n) for m, n in ((net, "net"), (modes, "modes"), (wide, "wide"), (narrow, "narrow"))]
    return [
        Target("AND of a mixture and 4 x a network", names[1] & 4.0 * names[0], 0.3, lambda x: modes(x) + 4.0 * net(x), crescent),
        Target("OR of two Gaussians", names[2] | names[3], 0.3, lambda x: -torch.logaddexp(-wide(x), -narrow(x)), either)]


def same_energy(target: Target, start: Tensor, name: str) -> None:
    """A peer's energy is ours, whatever its samples look like."""
    if name.startswith(("jax", "blackjax")):
        import jax
        import jax.numpy as jnp
        theirs = torch.from_numpy(jax.device_get(jax.vmap(target.jax())(jnp.asarray(start.numpy()))).copy())
    else:
        theirs = target.energy(start)
    torch.testing.assert_close(theirs, target.expression.energy(start), rtol=1e-4, atol=1e-4)


def measure(target: Target, ladder: tuple[int, ...], rounds: int) -> None:
    """Distance and time of every method after each number of steps."""
    start = 2.0 * torch.randn(CHAINS, 2, generator=torch.Generator().manual_seed(1))
    torch.compiler.reset()
    ways: dict[str, Callable] = {}

    def maker(name: str, make: Callable) -> Callable[[], Variant]:
        def variant() -> Variant:
            ways[name] = make()
            check = (lambda: None) if name.startswith("ebmfast") else partial(same_energy, target, start, name)
            return Variant(name, partial(ways[name], 2, 0), check)

        return variant

    makers = quality_methods.makers(target, start)
    found, trouble = sound({name: maker(name, make) for name, make in makers.items()},
                           tuple(name for name in makers if name.startswith("ebmfast")))
    curves: dict[str, list] = {v.name: [] for v in found}
    for steps in ladder:
        chosen = [name for name in curves if steps <= MOST_OF_HMC or not name.endswith("HMC")]
        times = compare([Variant(name, partial(ways[name], steps, 0), lambda: None) for name in chosen], rounds=rounds)
        for name in chosen:
            curves[name].append([steps, quantiles(times[name])["median"], target.distance(ways[name](steps, 7))])
    record("quality", {"case": target.name, "chains": CHAINS, "step_size": target.step_size, "leapfrog_step": target.leapfrog_step,
                       "leapfrogs": quality_methods.LEAPFROGS},
           {"curves": curves, "floor": target.floor(), "columns": ["steps", "seconds", "total variation"], "threads_used": 1,
            "not_timed": trouble})


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
