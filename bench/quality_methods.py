"""The methods that `bench.quality` compares: functions of (steps, seed) → states `[n, 2]`, all with the target's step sizes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import ebmfast as ef
from bench.metropolis import hmc_step, mala_step, traced_gradient, with_gradient

LEAPFROGS = 5
Method = Callable[[int, int], Tensor]


def ours(target, start: Tensor, sampler) -> Method:
    """The prepared run."""
    run = ef.prepare(target.expression, sampler, shape=(2,), energies=False)
    return lambda steps, seed: run(x=start, steps=steps, seed=seed).x


def langevin_step(evaluate, h: float):
    """x − (h/2)∇E + √h z."""
    def step(x: Tensor, g: Tensor, e: Tensor):
        y = x - 0.5 * h * g + h**0.5 * torch.randn_like(x)
        return y, *evaluate(y), e

    return step


def loop(target, start: Tensor, kind, compiled: bool) -> Method:
    """The loop that one would write around a step; with `compiled`, the step is one graph."""
    evaluate = traced_gradient(target.energy) if compiled else with_gradient(target.energy)
    step = kind(evaluate)
    if compiled:
        step = torch.no_grad()(torch.compile(step, fullgraph=True))

    def draw(steps: int, seed: int) -> Tensor:
        torch.manual_seed(seed)
        x, (g, e) = start, evaluate(start)
        for _ in range(steps):
            x, g, e, _ = step(x, g, e)
        return x

    return draw


def torchebm(target, start: Tensor, name: str) -> Method:
    """torchebm's samplers, unmodified."""
    from torchebm.core import BaseModel
    from torchebm.samplers import HamiltonianMonteCarlo, LangevinDynamics

    class Model(BaseModel):
        def forward(self, x):
            return target.energy(x)

    sampler = LangevinDynamics(Model(), step_size=target.step_size / 2) if name == "Langevin" else \
        HamiltonianMonteCarlo(Model(), step_size=target.leapfrog_step, n_leapfrog_steps=LEAPFROGS)
    return lambda steps, seed: sampler.sample(x=start, n_steps=steps, generator=torch.Generator().manual_seed(seed))


def scanned(step: Callable, initial: Callable, start: Tensor) -> Method:
    """A loop of `step(key, state)` over chains in JAX, compiled once for every number of steps."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def run(x, key, steps):
        def body(i, carry):
            state, key = carry
            key, use = jax.random.split(key)
            return step(use, state), key

        return jax.lax.fori_loop(0, steps, body, (initial(x), key))[0]

    x = jnp.asarray(start.numpy())

    def draw(steps: int, seed: int) -> Tensor:
        state = jax.block_until_ready(run(x, jax.random.PRNGKey(seed), steps))
        return torch.from_numpy(jax.device_get(getattr(state, "position", state)).copy())

    return draw


def jax_langevin(target, start: Tensor) -> Method:
    """The update under jit."""
    import jax

    energy, h = target.jax(), target.step_size
    gradient = jax.grad(lambda x: jax.vmap(energy)(x).sum())
    return scanned(lambda key, x: x - 0.5 * h * gradient(x) + h**0.5 * jax.random.normal(key, x.shape), lambda x: x, start)


def blackjax(target, start: Tensor, name: str) -> Method:
    """blackjax's kernels, a vmap over chains."""
    import blackjax
    import jax
    import jax.numpy as jnp

    energy = target.jax()
    kernel = blackjax.mala(lambda x: -energy(x), target.step_size / 2) if name == "MALA" else \
        blackjax.hmc(lambda x: -energy(x), target.leapfrog_step, jnp.ones(2), LEAPFROGS)

    def step(key, states):
        return jax.vmap(kernel.step)(jax.random.split(key, len(start)), states)[0]

    return scanned(step, jax.vmap(kernel.init), start)


def makers(target, start: Tensor) -> dict[str, Callable[[], Method]]:
    """Every method by its name, "who sampler", each made when it is called."""
    h, far = target.step_size, target.leapfrog_step
    samplers = {"Langevin": ef.Langevin(step_size=h), "MALA": ef.MALA(h), "HMC": ef.HMC(far, LEAPFROGS)}
    kinds = {"Langevin": lambda e: langevin_step(e, h), "MALA": lambda e: mala_step(e, h),
             "HMC": lambda e: hmc_step(e, far, LEAPFROGS)}
    found: dict[str, Callable[[], Method]] = {}
    for name, sampler in samplers.items():
        found[f"ebmfast {name}"] = lambda sampler=sampler: ours(target, start, sampler)
        for compiled, who in ((False, "eager"), (True, "torch.compile")):
            found[f"{who} {name}"] = lambda kind=kinds[name], compiled=compiled: loop(target, start, kind, compiled)
        if name != "MALA":
            found[f"torchebm {name}"] = lambda name=name: torchebm(target, start, name)
        found["jax Langevin" if name == "Langevin" else f"blackjax {name}"] = \
            (lambda: jax_langevin(target, start)) if name == "Langevin" else (lambda name=name: blackjax(target, start, name))
    return found
