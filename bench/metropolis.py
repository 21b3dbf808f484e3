"""`python -m bench.metropolis`: MALA and HMC on a 32-dimensional composition of networks against their peers, one core.

Peers: blackjax under jit, the eager loop, that loop with its step under torch.compile, and for HMC torchebm. All take the same
proposals in law; each must have our acceptance and mean energy within sampling error before its time counts. Compiling is not
timed. The share of the multiply-add peak, measured in the same run, counts matrix products alone: it says how much faster anything
could be.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import ebmfast as ef
from bench import timing
from bench.chain import composed, networks, one_core
from bench.timing import Variant, compare, quantiles, record, sound
from ebmfast import diagnostics
from ebmfast._native import core

DIM, PEAK_ROUNDS = 32, 10**7


@dataclass
class Way:
    """A sampler by the numbers that all peers take: our step size (blackjax's MALA takes half of it), leapfrog steps of HMC."""

    name: str
    step_size: float
    leapfrogs: int = 1

    @property
    def sampler(self):
        return ef.MALA(self.step_size) if self.name == "MALA" else ef.HMC(self.step_size, self.leapfrogs)


MALA, HMC = Way("MALA", 0.05), Way("HMC", 0.3, 5)


@dataclass
class Draws:
    """What a gate compares: energies `[chains, steps]` and the share of accepted proposals."""

    energies: Tensor
    acceptance: float

    def check(self, ours: Draws) -> None:
        size = [float(diagnostics.ess(d.energies)) for d in (ours, self)]
        error = sum(float(d.energies.var()) / n for d, n in zip((ours, self), size)) ** 0.5
        gap = abs(float(ours.energies.mean() - self.energies.mean()))
        accepted = [ours.acceptance, self.acceptance]
        chance = 5 * math.sqrt(2 * max(a * (1 - a) for a in accepted) / self.energies.numel())
        if not (gap < 5 * error and abs(accepted[0] - accepted[1]) < 0.01 + chance):
            raise AssertionError(f"energies differ by {gap:.3g} ({error:.3g} expected), acceptances are {accepted[0]:.3f} (ours)"
                                 f" and {accepted[1]:.3f}")


def with_gradient(energy: Callable[[Tensor], Tensor]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """x → (∇E, E), by autograd."""
    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
        leaf = x.detach().requires_grad_()
        e = energy(leaf)
        return torch.autograd.grad(e.sum(), leaf)[0], e.detach()

    return evaluate


def traced_gradient(energy: Callable[[Tensor], Tensor]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """x → (∇E, E), as torch.compile sees through it."""
    def summed(x: Tensor) -> tuple[Tensor, Tensor]:
        e = energy(x)
        return e.sum(), e

    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
        gradient, (_, e) = torch.func.grad_and_value(summed, has_aux=True)(x)
        return gradient, e

    return evaluate


def mala_step(evaluate, h: float):
    """x' = x − (h/2)∇E + √h z, accepted by Metropolis and Hastings, chain by chain (Roberts and Tweedie 1996)."""
    def step(x: Tensor, g: Tensor, e: Tensor):
        z = torch.randn_like(x)
        y = x - 0.5 * h * g + math.sqrt(h) * z
        gy, ey = evaluate(y)
        log_ratio = e - ey + 0.5 * z.square().sum(1) - (x - y + 0.5 * h * gy).square().sum(1) / (2 * h)
        taken = torch.rand_like(e).log() < log_ratio
        return torch.where(taken[:, None], y, x), torch.where(taken[:, None], gy, g), torch.where(taken, ey, e), taken

    return step


def hmc_step(evaluate, h: float, leapfrogs: int):
    """A leapfrog trajectory of unit mass, accepted chain by chain (Neal 2011)."""
    def step(x: Tensor, g: Tensor, e: Tensor):
        p = torch.randn_like(x)
        y, gy, ey, q = x, g, e, p
        for _ in range(leapfrogs):
            q = q - 0.5 * h * gy
            y = y + h * q
            gy, ey = evaluate(y)
            q = q - 0.5 * h * gy
        taken = torch.rand_like(e).log() < e - ey + 0.5 * (p.square().sum(1) - q.square().sum(1))
        return torch.where(taken[:, None], y, x), torch.where(taken[:, None], gy, g), torch.where(taken, ey, e), taken

    return step


class Case:
    """A target of 4 networks and a Gaussian that holds them, and everybody's chains from the same start."""

    def __init__(self, way: Way, chains: int, steps: int, width: int):
        self.way, self.chains, self.steps, self.width = way, chains, steps, width
        self.nets = networks(DIM, width)
        self.expression = composed(self.nets) & ef.Concept(ef.energies.Gaussian(torch.zeros(DIM), 1.0), name="base")
        self.run = ef.prepare(self.expression, way.sampler, shape=(DIM,), steps=steps, energies=False)
        self.start = self.run(x=torch.randn(chains, DIM, generator=torch.Generator().manual_seed(1)), seed=1).x
        traced = self.run(x=self.start, seed=2, trace=1)
        self.drawn = Draws(traced.trace.energy.T, float(traced.acceptance.mean()))

    def energy(self, x: Tensor) -> Tensor:
        return sum(net(x) for net in self.nets) + 0.5 * x.square().sum(1)

    def ours(self) -> Variant:
        """Our draws are held to exact laws in the tests; here, energies and acceptance to peers that share no code with them."""
        return Variant("", lambda: self.run(x=self.start, seed=2), lambda: None)

    def loop(self, evaluate, wrap=lambda f: f) -> Variant:
        kind = mala_step(evaluate, self.way.step_size) if self.way.name == "MALA" else \
            hmc_step(evaluate, self.way.step_size, self.way.leapfrogs)
        step = wrap(kind)

        def draw(keep: Callable) -> Tensor:
            x, (g, e) = self.start, evaluate(self.start)
            for _ in range(self.steps):
                x, g, e, taken = step(x, g, e)
                keep(e, taken)
            return x

        def check() -> None:
            kept = []
            draw(lambda e, taken: kept.append((e.detach().clone(), taken.float().mean())))
            Draws(torch.stack([e for e, _ in kept], 1), float(torch.stack([a for _, a in kept]).mean())).check(self.drawn)

        return Variant("", lambda: draw(lambda e, taken: None), check)

    def eager(self) -> Variant:
        return self.loop(with_gradient(self.energy))

    def compiled(self) -> Variant:
        torch.compiler.reset()
        return self.loop(traced_gradient(self.energy), lambda f: torch.no_grad()(torch.compile(f, fullgraph=True)))

    def torchebm(self) -> Variant:
        from torchebm.core import BaseModel
        from torchebm.samplers import HamiltonianMonteCarlo

        case = self

        class Model(BaseModel):
            def forward(self, x):
                return case.energy(x)

        sampler = HamiltonianMonteCarlo(Model(), step_size=self.way.step_size, n_leapfrog_steps=self.way.leapfrogs)

        def check() -> None:
            path, about = sampler.sample(x=self.start, n_steps=self.steps, return_trajectory=True, return_diagnostics=True)
            with torch.no_grad():
                energies = self.energy(path.reshape(-1, DIM)).reshape(self.chains, self.steps)
            Draws(energies, float(about["acceptance_rate"].mean())).check(self.drawn)

        return Variant("", lambda: sampler.sample(x=self.start, n_steps=self.steps), check)

    def blackjax(self) -> Variant:
        """vmap over chains, lax.scan over steps, all under jit."""
        import blackjax
        import jax
        import jax.numpy as jnp

        weights = [[(jnp.array(m.weight.numpy().T), jnp.array(m.bias.numpy())) for m in (*net.layers, net.read_out)]
                   for net in self.nets]

        def energy(x):
            total = 0.5 * jnp.sum(x * x)
            for layers in weights:
                h = x
                for w, b in layers[:-1]:
                    h = jax.nn.silu(h @ w + b)
                total = total + (h @ layers[-1][0] + layers[-1][1])[0]
            return total

        kernel = blackjax.mala(lambda x: -energy(x), self.way.step_size / 2) if self.way.name == "MALA" else \
            blackjax.hmc(lambda x: -energy(x), self.way.step_size, jnp.ones(DIM), self.way.leapfrogs)

        @jax.jit
        def run(x, key):
            def step(states, key):
                states, info = jax.vmap(kernel.step)(jax.random.split(key, self.chains), states)
                return states, (-states.logdensity, info.is_accepted)

            return jax.lax.scan(step, jax.vmap(kernel.init)(x), jax.random.split(key, self.steps))

        x, key = jnp.array(self.start.numpy()), jax.random.PRNGKey(3)

        def check() -> None:
            _, (energies, taken) = run(x, key)
            Draws(torch.from_numpy(jax.device_get(energies).T.copy()), float(taken.mean())).check(self.drawn)

        return Variant("", lambda: jax.block_until_ready(run(x, key)), check)

    def makers(self) -> dict[str, Callable[[], Variant]]:
        found = {"ebmfast": self.ours, "peak": lambda: Variant("", lambda: core.multiply_adds(PEAK_ROUNDS), lambda: None),
                 "eager": self.eager, "torch.compile": self.compiled, "blackjax": self.blackjax}
        return found | ({"torchebm": self.torchebm} if self.way.name == "HMC" else {})


def measure(way: Way, chains: int, steps: int, width: int, rounds: int) -> None:
    """One case; the draws of a peer that passes its gate have our law, so effective samples go by our draws."""
    case = Case(way, chains, steps, width)
    found, trouble = sound(case.makers(), ("ebmfast", "peak"))
    seconds = {k: quantiles(v) for k, v in compare(found, rounds=rounds).items()}
    peak = core.multiply_adds(PEAK_ROUNDS) / seconds.pop("peak")["p20"]
    products = 4 * sum(net.layers[0].weight.numel() + net.layers[1].weight.numel() for net in case.nets)
    work, size = products * chains * steps * way.leapfrogs, float(diagnostics.ess(case.drawn.energies))
    shares = {k: work / v["median"] / peak for k, v in seconds.items()}
    about = {"sampler": way.name, "step_size": way.step_size} | ({"leapfrogs": way.leapfrogs} if way.name == "HMC" else {})
    record("metropolis", {"case": f"{way.name}, AND of 4 networks {DIM}-{width}-{width}-1 and a Gaussian", "chains": chains,
                          "steps": steps, **about},
           {"seconds": seconds, "us_per_step": {k: 1e6 * v["median"] / steps for k, v in seconds.items()},
            "acceptance": case.drawn.acceptance, "share_of_multiply_add_peak": shares, "threads_used": 1, "not_timed": trouble,
            "ess_of_energy_per_second": {k: size / v["median"] for k, v in seconds.items()}})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.metropolis", description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that everything runs; nothing is recorded")
    parser.add_argument("--rounds", type=int, default=5, help="turns of everybody (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with one_core():
        if options.smoke:
            timing.RESULTS = Path(tempfile.mkdtemp())
            measure(MALA, 16, 60, 8, 2)
            measure(HMC, 16, 30, 8, 2)
            return
        for width in (32, 64, 128):
            for chains, steps in ((64, 300), (1024, 100)):
                measure(MALA, chains, steps, width, options.rounds)
        for chains, steps in ((64, 100), (1024, 20)):
            measure(HMC, chains, steps, 64, options.rounds)


if __name__ == "__main__":
    main()
