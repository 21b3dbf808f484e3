"""The loops of three papers' code, over ebmfast's engines, under their own names and signatures.

* `AnnealedULASampler`, `AnnealedMALASampler`, `AnnealedUHASampler` and `AnnealedCHASampler`: the samplers of "Reduce,
  Reuse, Recycle" (Du et al., ICML 2023), which take gradients of log p.
* `get_sample_q`: the SGLD of JEM (Grathwohl et al., ICLR 2020), whose f is -E.
* `paper_loop`: what the code of Du, Li and Mordatch (NeurIPS 2020) runs, noise first.

Deviations, each from an error in the original: MALA and CHA decide for every chain by itself, where the originals take
one decision for the whole batch; MALA's proposal has the density of its noise, variance 2·ss, where the original divides
by 2·ss²; leapfrog steps leave momenta as they were given, where the original changes them in place, so that its kinetic
energies cancel; and CHA turns a momentum round where a proposal is rejected, without which a momentum that is kept in
part does not leave the law as it is.

Noise is ebmfast's, from a seed that torch's global generator (or `generator=`) gives at every call. Chains that are not
finite raise `NonFiniteError`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import rng, sampling
from .._checks import indexed
from ..backends import resolve
from ..composition import Concept, Expression, all_of
from ..samplers import MALA, Langevin
from ..state import Fault, NonFiniteError

__all__ = ["AnnealedCHASampler", "AnnealedMALASampler", "AnnealedUHASampler", "AnnealedULASampler", "get_sample_q", "paper_loop"]

Energy = Expression | Callable[..., Tensor]
WHOLE = 1 << 62  # chains per micro-batch: model arguments belong to the whole batch


class _Density:
    """log p under the arguments of the present call, as a leaf: energies and gradients, of one evaluation each."""

    def __init__(self, function: Callable):
        self.function = function
        self.ts, self.args = None, {}
        self._known: tuple[Tensor, Tensor] | None = None

    def score(self, x: Tensor) -> Tensor:
        """∇log p(x), from a function that returns that alone."""
        return self.function(x, self.ts, **self.args)

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log p(x) `[B]` and its gradient, from a function that returns both."""
        value, gradient = self.function(x, self.ts, **self.args)
        value = torch.as_tensor(value)
        if value.ndim == 0 and len(x) == 1:
            value = value[None]
        if value.shape != x.shape[:1]:
            raise ValueError(f"`gradient_function` must return log p of every chain, [{len(x)}], got {list(value.shape)}: a sum"
                             " over the batch cannot decide for a chain")
        return value, gradient

    def energy(self, x: Tensor) -> Tensor:
        """-log p(x)."""
        value, gradient = self.both(x)
        self._known = x, gradient
        return -value

    def gradient(self, x: Tensor) -> Tensor:
        """-∇log p(x), known where `energy` was asked for the same x just before."""
        known, self._known = self._known, None
        return -(known[1] if known is not None and known[0] is x else self.both(x)[1])


class _Annealed:
    """A sampler with a step size for each of `num_steps` densities."""

    def __init__(self, num_steps: int, num_samples_per_step: int, step_sizes: Sequence[float],
                 gradient_function: Callable[..., Any], *, generator: torch.Generator | None = None) -> None:
        if len(step_sizes) != num_steps:
            raise ValueError(f"`step_sizes` must have one value per step, {num_steps}, got {len(step_sizes)}")
        self._num_steps, self._num_samples_per_step, self._step_sizes = num_steps, num_samples_per_step, step_sizes
        self._generator = generator
        self._density = _Density(gradient_function)
        self._size = math.nan
        self._runs: dict[torch.Size, sampling.Run] = {}

    def _prepare(self, shape: torch.Size) -> sampling.Run:
        raise NotImplementedError

    def sample_step(self, x: Tensor, t: int, ts: Any, model_args: Mapping[str, Any]) -> Tensor:
        """`num_samples_per_step` steps at density `t` from x `[B, *S]`; the model is called with `ts` and `model_args`."""
        self._density.ts, self._density.args, self._size = ts, dict(model_args), float(self._step_sizes[t])
        if x.shape[1:] not in self._runs:
            self._runs[x.shape[1:]] = self._prepare(x.shape[1:])
        start = x.detach() if x.dtype in (torch.float32, torch.float64) else x.detach().float()
        run = self._runs[x.shape[1:]]
        return run(x=start, steps=self._num_samples_per_step, seed=rng.resolve_seed(self._generator)).x.to(x.dtype)


class AnnealedULASampler(_Annealed):
    """x <- x + ss ∇log p(x) + √(2 ss) z, ss = `step_sizes[t]`; `gradient_function(x, ts, **model_args)` returns ∇log p.

    Raises:
        ValueError: not one step size per step.
    """

    def _prepare(self, shape):
        leaf = Concept(self._density.score, name="log p", takes_sigma=False, returns="score")
        dynamics = Langevin(drift=lambda _: self._size, noise=lambda _: math.sqrt(2 * self._size))
        return sampling.prepare(leaf, dynamics, shape=tuple(shape), check=False, batch_size=WHOLE, energies=False)


class AnnealedMALASampler(_Annealed):
    """`AnnealedULASampler`'s steps, accepted or rejected per chain; `gradient_function` returns log p `[B]` and ∇log p.

    Raises:
        ValueError: not one step size per step; at the call, log p that is not one number per chain.
    """

    def _prepare(self, shape):
        density = self._density
        leaf = Concept(density.energy, name="log p", takes_sigma=False, gradient=density.gradient)
        dynamics = MALA(step_size=lambda _: 2 * self._size)
        return sampling.prepare(leaf, dynamics, shape=tuple(shape), check=False, batch_size=WHOLE, energies=False)


class _Hamiltonian:
    """Leapfrog steps whose momenta are kept in part: v <- γ v + √(1 - γ²) M z."""

    def __init__(self, num_steps: int, num_samples_per_step: int, step_sizes: Sequence[float], damping_coeff: float,
                 mass_diag_sqrt: Sequence[float | Tensor], num_leapfrog_steps: int, gradient_function: Callable[..., Any], *,
                 generator: torch.Generator | None = None) -> None:
        if len(step_sizes) != num_steps:
            raise ValueError(f"`step_sizes` must have one value per step, {num_steps}, got {len(step_sizes)}")
        if not 0 <= damping_coeff <= 1:
            raise ValueError(f"`damping_coeff` must be in [0, 1], got {damping_coeff}")
        self._num_steps, self._num_samples_per_step, self._step_sizes = num_steps, num_samples_per_step, step_sizes
        self._damping_coeff, self._mass_diag_sqrt, self._num_leapfrog_steps = damping_coeff, mass_diag_sqrt, num_leapfrog_steps
        self._generator = generator
        self._density = _Density(gradient_function)

    def _momenta(self, x: Tensor, step: int, seed: int) -> Tensor:
        backend = resolve("auto", indexed(x.device))
        return backend.normal(x.shape[1:], len(x), step=step, stream=rng.MOMENTUM, device=x.device, seed=seed, first_chain=0).to(x)

    def _refreshed(self, v: Tensor, x: Tensor, mass, step: int, seed: int) -> Tensor:
        kept = self._damping_coeff
        return v * kept + math.sqrt(1 - kept**2) * mass * self._momenta(x, step, seed)

    def _leapfrog(self, x: Tensor, v: Tensor, gradient: Tensor, size: float, mass) -> tuple[Tensor, Tensor, Tensor]:
        for _ in range(self._num_leapfrog_steps):
            half = v + 0.5 * size * gradient
            x = x + size * half / mass**2
            gradient = self._slope(x)
            v = half + 0.5 * size * gradient
        return x, v, gradient

    def _slope(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _begin(self, x: Tensor, t: int, ts, model_args: Mapping):
        self._density.ts, self._density.args = ts, dict(model_args)
        mass, seed = self._mass_diag_sqrt[t], rng.resolve_seed(self._generator)
        return float(self._step_sizes[t]), mass, seed, self._momenta(x, 0, seed) * mass


class AnnealedUHASampler(_Hamiltonian):
    """Unadjusted leapfrog steps; `gradient_function(x, ts, **model_args)` returns ∇log p.

    Args:
        mass_diag_sqrt: M, the square root of the diagonal mass, one per density: numbers, or tensors that broadcast to x.
        damping_coeff: γ, the share of a momentum that is kept.
        num_leapfrog_steps: leapfrog steps per momentum.

    Raises:
        ValueError: not one step size per step, or γ outside [0, 1].
    """

    def _slope(self, x):
        return self._density.score(x)

    @torch.no_grad()
    def sample_step(self, x: Tensor, t: int, ts: Any, model_args: Mapping[str, Any]) -> Tensor:
        """`num_samples_per_step` trajectories at density `t` from x `[B, *S]`."""
        size, mass, seed, v = self._begin(x, t, ts, model_args)
        x = x.detach()
        for i in range(self._num_samples_per_step):
            v = self._refreshed(v, x, mass, i + 1, seed)
            x, v, _ = self._leapfrog(x, v, self._slope(x), size, mass)
            _check_finite(x, i)
        return x


def _check_finite(x: Tensor, step: int) -> None:
    bad = torch.nonzero(~torch.isfinite(x).flatten(1).all(1)).flatten().tolist()
    if bad:
        raise NonFiniteError([Fault(row, step, None) for row in bad], "state")


class AnnealedCHASampler(_Hamiltonian):
    """`AnnealedUHASampler`'s trajectories, accepted or rejected per chain; `gradient_function` returns log p `[B]` and ∇log p.

    Raises:
        ValueError: not one step size per step, or γ outside [0, 1]; at the call, log p that is not one number per chain.
    """

    def _slope(self, x):
        self._value, gradient = self._density.both(x)
        return gradient

    @torch.no_grad()
    def sample_step(self, x: Tensor, t: int, ts: Any, model_args: Mapping[str, Any]) -> Tensor:
        """`num_samples_per_step` proposals at density `t` from x `[B, *S]`."""
        size, mass, seed, v = self._begin(x, t, ts, model_args)
        x, chains = x.detach(), torch.arange(len(x), device=x.device)
        gradient, rows = self._slope(x), (-1, *[1] * (x.ndim - 1))
        value = self._value

        def kinetic(v: Tensor) -> Tensor:
            return 0.5 * (v / mass).square().flatten(1).sum(1)

        for i in range(self._num_samples_per_step):
            v = self._refreshed(v, x, mass, i + 1, seed)
            y, w, slope = self._leapfrog(x, v, gradient, size, mass)
            ratio = self._value - value + kinetic(v) - kinetic(w)
            uniform = rng.uniform((1,), chains, seed=seed, step=i, stream=rng.ACCEPT, device=x.device)[:, 0]
            accepted = uniform.log() < ratio
            value = torch.where(accepted, self._value, value)
            chosen = accepted.reshape(rows)
            x, v, gradient = (torch.where(chosen, a, b) for a, b in ((y, x), (w, -v), (slope, gradient)))
        return x


def get_sample_q(args: Any, device: str | torch.device) -> Callable[..., Tensor]:
    """JEM's `sample_q(f, replay_buffer, y=None, n_steps=args.n_steps)`: x <- x + lr ∇f(x, y) + std z, f = -E.

    `args` has batch_size, n_steps, sgld_lr, sgld_std, reinit_freq, n_classes, and im_sz and n_ch where they are not 32 and 3.
    Chains start from the buffer `[N, n_ch, im_sz, im_sz]`, of class y's part of it where y is given, and anew from U(-1, 1) with
    probability `reinit_freq`; an empty buffer starts all anew. Their ends are written back. Chains run with f in eval mode; unlike
    in JEM's code, every module of f then has its own mode back.
    """
    shape = (getattr(args, "n_ch", 3), getattr(args, "im_sz", 32), getattr(args, "im_sz", 32))
    called = {"f": None, "y": None}
    leaf = Concept(lambda x: -called["f"](x, y=called["y"]), name="-f", takes_sigma=False)
    dynamics = Langevin(drift=args.sgld_lr, noise=args.sgld_std)
    run = sampling.prepare(leaf, dynamics, shape=shape, check=False, batch_size=WHOLE, energies=False)

    def begin(replay_buffer: Tensor, count: int, y: Tensor | None):
        fresh = torch.empty(count, *shape).uniform_(-1, 1)
        if len(replay_buffer) == 0:
            return fresh, None
        size = len(replay_buffer) if y is None else len(replay_buffer) // args.n_classes
        rows = torch.randint(0, size, (count,))
        rows = rows if y is None else y.cpu() * size + rows
        anew = torch.rand(count) < args.reinit_freq
        return torch.where(anew[:, None, None, None], fresh, replay_buffer[rows].to(fresh)), rows

    def sample_q(f, replay_buffer, y: Tensor | None = None, n_steps: int = args.n_steps) -> Tensor:
        modes = [(m, m.training) for m in f.modules()]
        f.eval()
        try:
            start, rows = begin(replay_buffer, args.batch_size if y is None else len(y), y)
            called.update(f=f, y=y)
            x = run(x=start.to(device), steps=n_steps, seed=None).x
        finally:
            called.update(f=None, y=None)
            for module, mode in modes:
                module.training = mode
        if rows is not None:
            replay_buffer[rows] = x.to(replay_buffer)
        return x

    return sample_q


def paper_loop(energy: Energy | Sequence[Energy], x: Tensor, num_steps: int = 60, step_lr: float = 100.0, noise: float = 0.001,
               clip: tuple[float, float] | None = (0.0, 1.0), grad_clip: float | None = None,
               generator: torch.Generator | None = None) -> Tensor:
    """x <- x + σ z; x <- clip(x - step_lr ∇E(x)): noise first, drift and noise apart (Du, Li and Mordatch 2020, their code).

    Args:
        energy: a composition, a model E(x) `[B]`, or several, whose energies add up.
        x: starting points `[n, *S]`, not modified.
        num_steps, step_lr, noise, clip: steps, drift, σ and the range of data; None does not clip.
        grad_clip: elementwise bound on the gradient.
        generator: what the seed is drawn from; torch's global generator if None.
    """
    expr = energy
    if not isinstance(energy, Expression):
        models = energy if isinstance(energy, list | tuple) else [energy]
        expr = all_of([m if isinstance(m, Expression) else Concept(m) for m in models])
    dynamics = Langevin.reference_code(step_lr, noise, clip, grad_clip_value=grad_clip)
    return sampling.sample(expr, sampler=dynamics, steps=num_steps, x=x, seed=generator, energies=False).x
