"""Peers: the same chain in other libraries, each checked by noise-free steps that must land where ours do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import composition, energies, sampling
from ..samplers import Langevin
from .timing import Variant

DRIFT, NOISE = 1e-3, 0.02


def networks(dim: int, width: int, leaves: int = 4) -> list[energies.MLP]:
    """Networks dim-width-width-1, the same in every process."""
    torch.manual_seed(0)
    return [energies.MLP(dim, (width, width)).requires_grad_(False) for _ in range(leaves)]


def composed(nets, either: bool = False) -> composition.Expression:
    """Their AND, or with `either` their OR."""
    concepts = [composition.Concept(net, name=f"net{k}") for k, net in enumerate(nets)]
    return composition.any_of(concepts) if either else composition.all_of(concepts)


def start(chains: int, *shape: int) -> Tensor:
    """Starting points, the same in every process."""
    return torch.randn(chains, *shape, generator=torch.Generator().manual_seed(1))


def lands_with_ours(step_without_noise: Callable[[Tensor, int], Tensor], expr, x: Tensor) -> None:
    """Five noise-free steps of a peer end where ours do."""
    run = sampling.prepare(expr, Langevin(drift=DRIFT, noise=0.0), shape=x.shape[1:], steps=5, energies=False)
    torch.testing.assert_close(step_without_noise(x, 5), run(x=x, seed=0).x, rtol=1e-4, atol=1e-5)


def eager(energy: Callable[[Tensor], Tensor], expr, x: Tensor, steps: int) -> Variant:
    """The loop that one would write."""
    def draw(x: Tensor, n: int, noise: float) -> Tensor:
        for _ in range(n):
            leaf = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(energy(leaf).sum(), leaf)
            x = x - DRIFT * gradient + noise * torch.randn_like(x)
        return x.detach()

    return Variant("eager", lambda: draw(x, steps, NOISE), lambda: lands_with_ours(lambda y, n: draw(y, n, 0.0), expr, x))


def compiled(energy: Callable[[Tensor], Tensor], expr, x: Tensor, steps: int) -> Variant:
    """The same loop, a step of it under torch.compile: forward, backward, noise and update in one graph. Compiling is not timed."""
    torch.compiler.reset()
    gradient = torch.func.grad(lambda y: energy(y).sum())

    @torch.compile(fullgraph=True)
    def step(y: Tensor, noise: Tensor) -> Tensor:
        return y - DRIFT * gradient(y) + noise * torch.randn_like(y)

    @torch.no_grad()
    def draw(y: Tensor, n: int, noise: float) -> Tensor:
        scale = torch.tensor(noise)
        for _ in range(n):
            y = step(y, scale)
        return y

    return Variant("torch.compile", lambda: draw(x, steps, NOISE), lambda: lands_with_ours(lambda y, n: draw(y, n, 0.0), expr, x))


def torchebm(energy: Callable[[Tensor], Tensor], expr, x: Tensor, steps: int) -> Variant:
    """torchebm's sampler, unmodified."""
    from torchebm.core import BaseModel
    from torchebm.samplers import LangevinDynamics

    class Model(BaseModel):
        def forward(self, x):
            return energy(x)

    def draw(x, n, scale):
        return LangevinDynamics(Model(), step_size=DRIFT, noise_scale=scale).sample(x=x, n_steps=n)

    scale = NOISE / (2 * DRIFT) ** 0.5
    return Variant("torchebm", lambda: draw(x, steps, scale), lambda: lands_with_ours(lambda y, n: draw(y, n, 1e-30), expr, x))


def jax_chain(energy: Callable, expr, x: Tensor, steps: int, name: str = "jax") -> Variant:
    """The whole chain under jit; `energy` maps a batch `[B, D]` to `[B]` in jax.numpy."""
    import jax
    import jax.numpy as jnp

    gradient = jax.grad(lambda y: energy(y).sum())

    def draw(y, key, n, noise):
        def step(y, key):
            return y - DRIFT * gradient(y) + noise * jax.random.normal(key, y.shape), None

        return jax.lax.scan(step, y, jax.random.split(key, n))[0]

    compiled = jax.jit(draw, static_argnums=2)
    y, key = jnp.asarray(x.numpy()), jax.random.PRNGKey(0)

    def noise_free(x, n):
        return torch.from_numpy(jax.device_get(compiled(jnp.asarray(x.numpy()), key, n, 0.0)).copy())

    return Variant(name, lambda: compiled(y, key, steps, NOISE).block_until_ready(), lambda: lands_with_ours(noise_free, expr, x))


def jax_networks(nets, either: bool = False):
    """The composition of the networks in jax.numpy, leaf by leaf and stacked."""
    import jax
    import jax.numpy as jnp

    leaves = [[(jnp.asarray(m.weight.numpy().T), jnp.asarray(m.bias.numpy())) for m in (*net.layers, net.read_out)] for net in nets]
    stacked = [tuple(jnp.stack(parts) for parts in zip(*layers)) for layers in zip(*leaves)]

    def one(parameters, x):
        for w, b in parameters[:-1]:
            x = jax.nn.silu(x @ w + b)
        w, b = parameters[-1]
        return (x @ w + b)[..., 0]

    def combine(e):
        return -jax.nn.logsumexp(-e, axis=0) if either else e.sum(0)

    return (lambda x: combine(jnp.stack([one(p, x) for p in leaves]))), (lambda x: combine(jax.vmap(one, (0, None))(stacked, x)))
