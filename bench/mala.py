"""`python -m bench.mala`: MALA on a 32-dimensional composition of MLPs, effective samples per second against blackjax under jit.

Both take the same proposals in law (blackjax's step size is half of ours) on the same core; each must have the other's acceptance
and mean energy within sampling error before its time counts. The share of the multiply-add peak, measured in the same run, counts
matrix products alone: it says how much faster anything could be.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

import ebmfast as ef
from bench import timing
from bench.chain import composed, networks, one_core
from bench.timing import Variant, compare, quantiles, record
from ebmfast import diagnostics
from ebmfast._native import core

STEP_SIZE, DIM, PEAK_ROUNDS = 0.05, 32, 10**7


def target(width: int):
    """4 networks and a Gaussian that holds them."""
    nets = networks(DIM, width)
    return nets, composed(nets) & ef.Concept(ef.energies.Gaussian(torch.zeros(DIM), 1.0), name="base")


def blackjax_kernel(nets, chains: int, steps: int):
    """A function (x, seed, keep every) → (energies [T, chains], acceptance), jitted."""
    import blackjax
    import jax
    import jax.numpy as jnp

    def arrays(net):
        layers = [*net.layers, net.read_out]
        return [(jnp.array(m.weight.detach().numpy().T), jnp.array(m.bias.detach().numpy())) for m in layers]

    weights = [arrays(net) for net in nets]

    def energy(x):
        total = 0.5 * jnp.sum(x * x)
        for layers in weights:
            h = x
            for w, b in layers[:-1]:
                h = jax.nn.silu(h @ w + b)
            total = total + (h @ layers[-1][0] + layers[-1][1])[0]
        return total

    mala = blackjax.mala(lambda x: -energy(x), STEP_SIZE / 2)

    @jax.jit
    def run(x, key):
        def step(states, key):
            states, info = jax.vmap(mala.step)(jax.random.split(key, chains), states)
            return states, (-states.logdensity, info.is_accepted)

        return jax.lax.scan(step, jax.vmap(mala.init)(x), jax.random.split(key, steps))

    def draw(x, seed: int):
        states, (energies, accepted) = run(jnp.array(x.numpy()), jax.random.PRNGKey(seed))
        jax.block_until_ready(states)
        return states, energies, accepted

    return draw


def measure(chains: int, steps: int, width: int, rounds: int) -> None:
    nets, e = target(width)
    x = torch.randn(chains, DIM, generator=torch.Generator().manual_seed(1))
    run = ef.prepare(e, ef.MALA(STEP_SIZE), shape=(DIM,), steps=steps, energies=False)
    ready = run(x=x, seed=1).x
    traced = run(x=ready, seed=2, trace=1)
    peer = blackjax_kernel(nets, chains, steps)
    _, energies, accepted = peer(ready, 3)
    ours = traced.trace.energy.T, float(traced.acceptance.mean())
    theirs = torch.tensor(energies.tolist()).T, float(accepted.mean())

    def check() -> None:
        size = [float(diagnostics.ess(draws)) for draws in (ours[0], theirs[0])]
        error = sum(float(draws.var()) / n for draws, n in zip((ours[0], theirs[0]), size)) ** 0.5
        gap = abs(float(ours[0].mean() - theirs[0].mean()))
        if not (gap < 5 * error and abs(ours[1] - theirs[1]) < 0.02):
            raise AssertionError(f"energies differ by {gap:.3g} ({error:.3g} expected), acceptances are {ours[1]}, {theirs[1]}")

    seconds = {k: quantiles(v) for k, v in compare([
        Variant("ebmfast", lambda: run(x=ready, seed=2), check), Variant("blackjax", lambda: peer(ready, 3), lambda: None),
        Variant("peak", lambda: core.multiply_adds(PEAK_ROUNDS), lambda: None)], rounds=rounds).items()}
    peak = core.multiply_adds(PEAK_ROUNDS) / seconds["peak"]["p20"]
    work = 2 * 2 * sum(net.layers[0].weight.numel() + net.layers[1].weight.numel() for net in nets) * chains * steps
    rates = {name: float(diagnostics.ess(draws)) / seconds[name]["median"]
             for name, (draws, _) in (("ebmfast", ours), ("blackjax", theirs))}
    record("mala", {"case": f"AND of 4 MLPs {DIM}-{width}-{width}-1 and a Gaussian", "chains": chains, "steps": steps},
           {"us_per_step": {k: 1e6 * v["median"] / steps for k, v in seconds.items() if k != "peak"}, "acceptance": ours[1],
            "share_of_multiply_add_peak": {k: work / v["median"] / peak for k, v in seconds.items() if k != "peak"},
            "ess_of_energy_per_second": rates, "times_blackjax": rates["ebmfast"] / rates["blackjax"],
            "times_blackjax_per_step": seconds["blackjax"]["median"] / seconds["ebmfast"]["median"]})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.mala", description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that everything runs; nothing is recorded")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with one_core():
        if options.smoke:
            timing.RESULTS = Path(tempfile.mkdtemp())
            measure(16, 60, 8, 2)
            return
        for width in (32, 64, 128):
            for chains in (64, 1024):
                measure(chains, 300, width, 7)


if __name__ == "__main__":
    main()
