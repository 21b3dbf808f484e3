"""`python -m bench.overhead`: one Langevin step of a trivial energy, 64 chains of 8, against every peer; one core.

The driver's own time is what a step takes beyond the energy's forward and backward pass alone. Each must have the variance of the
discretised chain before it is timed.
"""

from __future__ import annotations

import torch

import ebmfast as ef
from bench.chain import one_core
from bench.timing import Variant, compare, quantiles, record, sound

CHAINS, SIZE, STEPS, ETA = 64, 8, 500, 0.05
SIGMA = (2 * ETA) ** 0.5


def energy(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x.square().sum(1)


def checked(draw, x: torch.Tensor) -> Variant:
    """The stationary variance 1/(1 - η/2) of the discretised chain, at five standard errors."""
    def check() -> None:
        found, expected = draw(torch.zeros(4000, SIZE)), 1 / (1 - ETA / 2)
        if not abs(float(found.var()) - expected) < 5 * expected * (2 / found.numel()) ** 0.5:
            raise AssertionError(f"the variance must be {expected:.4f}, got {float(found.var()):.4f}")

    return Variant("", lambda: draw(x), check)


def eager(x: torch.Tensor) -> torch.Tensor:
    for _ in range(STEPS):
        leaf = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(energy(leaf).sum(), leaf)
        x = x - ETA * gradient + SIGMA * torch.randn_like(x)
    return x


def compiled():
    """The eager loop, a step of it in one graph."""
    torch.compiler.reset()
    gradient = torch.func.grad(lambda y: energy(y).sum())

    @torch.compile(fullgraph=True, dynamic=False)
    def step(y: torch.Tensor) -> torch.Tensor:
        return y - ETA * gradient(y) + SIGMA * torch.randn_like(y)

    @torch.no_grad()
    def draw(y: torch.Tensor) -> torch.Tensor:
        for _ in range(STEPS):
            y = step(y)
        return y

    return draw


def torchebm():
    from torchebm.core import BaseModel
    from torchebm.samplers import LangevinDynamics

    class Quadratic(BaseModel):
        def forward(self, x):
            return energy(x)

    peer = LangevinDynamics(Quadratic(), step_size=ETA)
    return lambda x: peer.sample(x=x, n_steps=STEPS)


def jax_variant(x: torch.Tensor) -> Variant:
    """All steps in one scan, which has no driver to speak of: what a step can cost when nothing but arithmetic is left."""
    import jax
    import jax.numpy as jnp

    gradient = jax.grad(lambda y: 0.5 * jnp.square(y).sum())

    @jax.jit
    def run(y, key):
        def step(y, key):
            return y - ETA * gradient(y) + SIGMA * jax.random.normal(key, y.shape), None

        return jax.lax.scan(step, y, jax.random.split(key, STEPS))[0]

    y, key = jnp.asarray(x.numpy()), jax.random.PRNGKey(0)
    check = checked(lambda s: torch.from_numpy(jax.device_get(run(jnp.asarray(s.numpy()), key)).copy()), x).check
    return Variant("", lambda: run(y, key).block_until_ready(), check)


def makers() -> dict:
    x = torch.randn(CHAINS, SIZE)
    sampler, ones = ef.Langevin(drift=ETA, noise=SIGMA), torch.ones(CHAINS)
    run = ef.prepare(ef.Concept(energy, name="quadratic"), sampler, shape=(SIZE,), steps=STEPS, energies=False)

    def model_alone() -> None:
        for _ in range(STEPS):
            leaf = x.detach().requires_grad_()
            torch.autograd.grad(energy(leaf), leaf, ones)

    return {"model alone": lambda: Variant("", model_alone, lambda: None),
            "ebmfast": lambda: checked(lambda s: run(x=s, seed=0).x, x),
            "eager": lambda: checked(eager, x), "torch.compile": lambda: checked(compiled(), x),
            "torchebm": lambda: checked(torchebm(), x), "jax": lambda: jax_variant(x)}


def main() -> None:
    torch.set_num_threads(1)
    with one_core():
        found, trouble = sound(makers(), ("model alone", "ebmfast"))
        times = {name: quantiles(s) for name, s in compare(found, rounds=15).items()}
    per_step = {name: {k: v / STEPS * 1e6 for k, v in t.items()} for name, t in times.items()}
    case = {"chains": CHAINS, "size": SIZE, "steps": STEPS, "unit": "microseconds per step, one thread"}
    driver = per_step["ebmfast"]["median"] - per_step["model alone"]["median"]
    share = {"share_of_torchebm": times["ebmfast"]["median"] / times["torchebm"]["median"]} if "torchebm" in times else {}
    record("overhead", case, {"us": per_step, **share, "driver_us": driver, "not_timed": trouble})


if __name__ == "__main__":
    main()
