"""Constants of branches: log Z(σ) with a standard error, from samples of all of them.

An OR weighs its branches by exp(-E), and a posterior over conditions compares E(x | c), so both need the constants
Z(σ) = ∫ exp(-E(x)) dx of whole branches, at every noise level. Models trained by score matching leave them free, and the constant
of an AND is not the product of its parts'.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import rng
from .composition import Calibrated, Expression, all_of
from .samplers import Annealed, Sampler
from .together import Together
from .weights import PiecewiseSigma, Weight


@dataclass(frozen=True)
class Calibration:
    """Branches with their constants; iterating gives the branches.

    Attributes:
        branches: the K compositions given, each as `Calibrated`.
        sigmas: the L noise levels, descending, or (None,) where there are none.
        log_z: log Z, `[L, K]`, up to a constant common to the K branches of a level: their mean is 0.
        error: its standard error, `[L, K]`; infinite where branches do not overlap.
        covariance: of the log Z, `[L, K, K]`: the variance of a difference is C_ii - 2 C_ij + C_jj.
        overlap: `[L]`, between 0 (some branches share no region) and 1 (all are alike).
        samples: how many of each branch went into it, `[K]`.
    """

    branches: tuple[Calibrated, ...]
    sigmas: tuple[float | None, ...]
    log_z: Tensor
    error: Tensor
    covariance: Tensor
    overlap: Tensor
    samples: tuple[int, ...] = field(default=())

    def __iter__(self):
        return iter(self.branches)

    def __len__(self):
        return len(self.branches)

    def __getitem__(self, index):
        return self.branches[index]

    def difference(self, i: int, j: int) -> tuple[Tensor, Tensor]:
        """log Z_i - log Z_j at every level and its standard error, `[L]` each."""
        c = self.covariance
        variance = (c[:, i, i] - 2 * c[:, i, j] + c[:, j, j]).clamp_min(0).nan_to_num(nan=math.inf)
        return self.log_z[:, i] - self.log_z[:, j], variance.sqrt()

    def __str__(self):
        names = [repr(b.expression) for b in self.branches]
        lines = [f"log Z up to a common constant, from {', '.join(map(str, self.samples))} samples"]
        lines += [f"  {i}: {name}" for i, name in enumerate(names)]
        for sigma, values, errors, overlap in zip(self.sigmas, self.log_z.tolist(), self.error.tolist(), self.overlap.tolist()):
            where = "" if sigma is None else f"sigma {sigma:<8.4g}"
            pairs = "  ".join(f"{v:+.3f} ± {e:.3f}" for v, e in zip(values, errors))
            lines.append(f"{where}{pairs}  overlap {overlap:.2g}")
        return "\n".join(lines)


def calibrate(expressions: Sequence[Expression], shape: Sequence[int] | int | None = None, *, sampler: Sampler | None = None,
              steps: int | None = None, data: Sequence[Tensor] | None = None, sigmas: Sequence[float] | None = None, n: int = 256,
              bridges: int = 0, seed: int | torch.Generator | None = 0,
              batch_size: int | None = None, **options: object) -> Calibration:
    """log Z(σ) of whole branches, relative to each other, stored in them as an energy offset.

    With N_k points of branch k, the log Z_k are those that maximise the likelihood of the branch that each point came from,

        P(k | x) = N_k exp(-E_k(x) - log Z_k) / Σ_j N_j exp(-E_j(x) - log Z_j),

    reverse logistic regression, whose estimating equations are those of the multistate Bennett acceptance ratio (MBAR). Sources:
    Geyer, 1994; Shirts and Chodera, J. Chem. Phys. 129, 124105 (2008), also for the covariance.

    Args:
        expressions: two branches or more, as they are to be sampled (with their priors), and without slots.
        shape: of one chain.
        sampler: draws the points of each branch, at every noise level of an `Annealed`, else after `steps` steps. They must come
            close to the branch's law: enough steps per level, `MALA` inside where the step is large.
        data: in the place of sampling, points of each branch, a tensor `[N_k, *S]` for each: labelled clean data, which are noised
            to each of `sigmas`; or samples of the energies themselves where `sigmas` is None.
        n: chains for each branch.
        bridges: for each branch but the first, so many compositions (1 - β) E_0 + β E_k on the way to it are sampled as well;
            for branches that do not overlap.
        seed: of the noise.
        batch_size: chains, and points of an evaluation, at a time.
        options: of `sample`.

    Returns:
        A `Calibration`, which iterates over the branches: `a, b = ef.calibrate([a, b], ...)`, then `a | b`.

    Raises:
        ValueError: an argument is wrong; a branch has slots.

    Warns where branches do not overlap: log Z is not determined there, and its error infinite.
    """
    branches = tuple(e.expression if isinstance(e, Calibrated) else e for e in expressions)
    _check(branches, sampler, data, sigmas, n, bridges)
    seed = rng.resolve_seed(seed)
    states = [*branches, *_bridges(branches, bridges)]
    if data is not None:
        levels = tuple(sorted(map(float, sigmas), reverse=True)) if sigmas is not None else (None,)
        points = [_noised(data, level, seed + i) for i, level in enumerate(levels)]
    else:
        levels, points = _sampled(states, shape, sampler, steps, n, seed, batch_size, options)
    together = Together(states, batch_size)
    found = [_level(together, part, level, len(branches)) for level, part in zip(levels, points)]
    log_z, covariance, overlap = (torch.stack([f[i] for f in found]) for i in range(3))
    error = covariance.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
    lost = [level for level, e in zip(levels, error) if not torch.isfinite(e).all()]
    if lost:
        where = "" if lost == [None] else f" at sigma {', '.join(f'{s:.3g}' for s in lost)}"
        warnings.warn(f"the branches do not overlap{where}: log Z is not determined there. `bridges` are states between them",
                      stacklevel=2)
    name = _digest(branches, levels, seed)
    done = tuple(Calibrated(b, _schedule(levels, log_z[:, k]), name) for k, b in enumerate(branches))
    return Calibration(done, levels, log_z, error, covariance, overlap, tuple(len(p) for p in points[0]))


def _check(branches, sampler, data, sigmas, n, bridges) -> None:
    if len(branches) < 2:
        raise ValueError(f"`expressions` must be two branches or more, got {len(branches)}")
    for branch in branches:
        if not isinstance(branch, Expression):
            raise TypeError(f"`expressions` must be concepts and compositions, got {branch!r}")
        if branch.slots:
            raise ValueError(
                f"{branch!r} has the slot {branch.slots[0]!r}: its constant depends on what fills it; write the condition out")
    if (sampler is None) == (data is None):
        raise ValueError("`sampler` or `data` must be given, and not both: where the points of each branch come from")
    if data is not None:
        if len(data) != len(branches) or not all(isinstance(d, Tensor) and len(d) for d in data):
            raise ValueError(f"`data` must be {len(branches)} tensors [N, *S], one for each branch, none of them empty")
        if bridges:
            raise ValueError("`bridges` are sampled; they need a `sampler` in the place of `data`")
    elif sigmas is not None:
        raise ValueError("`sigmas` go with `data`; a sampler has its own")
    if n < 2 or bridges < 0:
        raise ValueError(f"`n` must be at least 2 and `bridges` not negative, got {n} and {bridges}")


def _bridges(branches: tuple[Expression, ...], count: int) -> list[Expression]:
    """(1 - β) E_0 + β E_k for β at `count` places between 0 and 1, for every k > 0."""
    betas = [(i + 1) / (count + 1) for i in range(count)]
    return [all_of([branches[0], other], weights=[1 - b, b]) for other in branches[1:] for b in betas]


def _noised(data: Sequence[Tensor], level: float | None, seed: int) -> list[Tensor]:
    """Points of each branch with noise of standard deviation `level`, no noise twice."""
    if level is None:
        return [d.float() for d in data]
    points, first = [], 0
    for d in data:
        noise = rng.normal(tuple(d.shape[1:]), len(d), seed=seed % 2**64, step=0, stream=rng.USER, first_chain=first)
        points.append(d.float() + level * noise.to(d.device))
        first += len(d)
    return points


def _sampled(states, shape, sampler: Sampler, steps, n: int, seed: int, batch_size, options):
    """`(levels, points)`: of every noise level the states of `n` chains of each composition, after the level's last step."""
    from .sampling import sample

    levels = tuple(dict.fromkeys(sampler.noise_levels() or (None,)))
    points: list[list[Tensor]] = [[] for _ in levels]
    for k, state in enumerate(states):
        kept: dict[int, list[Tensor]] = {}

        def keep(info, kept=kept):
            if isinstance(sampler, Annealed):
                level, last = divmod(info.step - 1, sampler.steps_per_level)
                if last == sampler.steps_per_level - 1 and level < len(sampler.sigmas):
                    kept.setdefault(level, []).append(info.x.detach().clone())

        keep.only_looks = True  # type: ignore[attr-defined]
        result = sample(state, n, shape, sampler, steps, seed=(seed + k) % 2**64, energies=False, batch_size=batch_size,
                        callback=keep if levels != (None,) else None, **options)
        if levels == (None,):
            points[0].append(result.x)
        for level, parts in kept.items():
            place = levels.index(sampler.sigmas[level])
            if len(points[place]) > k:  # a level visited again: its last visit
                points[place].pop()
            points[place].append(torch.cat(parts))
    return levels, points


def _level(together: Together, points: list[Tensor], sigma: float | None, branches: int) -> tuple[Tensor, Tensor, Tensor]:
    """log Z `[K]`, covariance `[K, K]` and overlap at one noise level, from the points of every state."""
    energies = torch.cat([together.energies(p, sigma) for p in points]).cpu()
    if not torch.isfinite(energies).all():
        raise ValueError(f"energies are not finite at sigma {sigma}: the points left the region that the models know")
    counts = torch.tensor([len(p) for p in points], dtype=torch.float64)
    log_z, covariance, overlap = mbar(energies, counts)
    log_z, covariance = log_z[:branches], covariance[:branches, :branches]
    if torch.isfinite(covariance).all():
        center = torch.eye(branches, dtype=torch.float64) - 1 / branches
        covariance = center @ covariance @ center
    return log_z - log_z.mean(), covariance, overlap


def mbar(energies: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log Z `[K]` up to a constant, its covariance `[K, K]`, and the overlap of the states.

    Args:
        energies: E_k(x_n), float64 `[N, K]`, rows in the order of the states that the points came from.
        counts: points of each state, `[K]`, all positive, adding up to N.

    The overlap is 1 - λ₂ of the matrix Wᵀ W diag(N), W the weights of points in states (Klimovich et al. 2015); the covariance is
    infinite where fewer than two points in all lie in between.
    """
    log_counts = counts.log()
    f = _midpoints(energies, counts)
    f = _maximise(f, energies, counts)
    joint = log_counts + f - energies
    log_w = f - energies - torch.logsumexp(joint, 1, keepdim=True)  # of point n in state k
    w = log_w.exp()
    gram = w.T @ w
    root = counts.sqrt()
    eigenvalues = torch.linalg.eigvalsh(root[:, None] * gram * root)
    overlap = (1 - eigenvalues[-2]).clamp(0, 1)
    k = len(counts)
    if overlap * counts.sum() < 2:
        return -f, torch.full((k, k), math.inf, dtype=torch.float64), overlap
    # Θ = (G⁺ - diag(N))⁺ up to the direction in which all log Z move together, where it is set to 0.
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    middle = torch.eye(k, dtype=torch.float64) - (s[:, None] * v * counts) @ (v.T * s)
    theta = (v.T * s) @ torch.linalg.pinv(middle, rtol=1e-10, hermitian=True) @ (s[:, None] * v)
    return -f, theta, overlap


def _midpoints(energies: Tensor, counts: Tensor) -> Tensor:
    """Where to start: -log Z_k half way between what the points of state 0 and those of state k say."""
    parts = energies.split([int(c) for c in counts])
    first = [(parts[0][:, k] - parts[0][:, 0]).mean() for k in range(len(counts))]
    other = [(p[:, k] - p[:, 0]).mean() for k, p in enumerate(parts)]
    return torch.stack([(a + b) / 2 for a, b in zip(first, other)])


def _maximise(f: Tensor, energies: Tensor, counts: Tensor, iterations: int = 1000) -> Tensor:
    """The maximum of the concave likelihood Σ_n log softmax_k(log N_k + f_k - E_k)[its state]: of a Newton step and one of the
    self-consistent iteration, which goes on where the curvature is lost to rounding, the better one."""
    own = torch.repeat_interleave(torch.arange(len(counts)), counts.long())[:, None]
    log_counts = counts.log()

    def loss(f):
        return -torch.log_softmax(log_counts + f - energies, 1).gather(1, own).sum()

    for _ in range(iterations):
        p = torch.softmax(log_counts + f - energies, 1)
        moves = [_self_consistent(f, energies, log_counts) - f, _newton(p, counts)]
        losses = torch.stack([loss(f + move) for move in moves]).nan_to_num(nan=math.inf)
        move = moves[int(losses.argmin())]
        f = f + move
        if move.abs().max() < 1e-9:
            break
    return f


def _self_consistent(f: Tensor, energies: Tensor, log_counts: Tensor) -> Tensor:
    """f_k = -log Σ_n exp(-E_k) / Σ_j N_j exp(f_j - E_j), with f_0 = 0."""
    total = torch.logsumexp(log_counts + f - energies, 1, keepdim=True)
    f = -torch.logsumexp(-energies - total, 0)
    return f - f[0]


def _newton(p: Tensor, counts: Tensor) -> Tensor:
    """The Newton step at membership probabilities `p` `[N, K]`, of all f but the first."""
    hessian = (torch.diag(p.sum(0)) - p.T @ p)[1:, 1:]
    floor = 1e-12 * hessian.diagonal().max().clamp_min(1e-300)
    step, failed = torch.linalg.solve_ex(hessian + floor * torch.eye(len(hessian), dtype=p.dtype), (p.sum(0) - counts)[1:])
    step = torch.zeros_like(step) if failed else step
    return torch.cat([step.new_zeros(1), -step])


def _schedule(levels: tuple[float | None, ...], values: Tensor) -> Weight:
    """The values of descending levels as a weight, constant around each level, up to the geometric means between them."""
    if levels == (None,):
        return float(values[0])
    pairs = sorted(zip(levels, values.tolist()))
    edges = [math.sqrt(a * b) for (a, _), (b, _) in zip(pairs, pairs[1:])]
    return PiecewiseSigma(tuple(edges), tuple(v for _, v in pairs)) if edges else pairs[0][1]


def _digest(branches, levels, seed: int) -> str:
    """A short name of what was calibrated together."""
    return hashlib.sha256(repr((branches, levels, seed)).encode()).hexdigest()[:8]
