"""A disjunction at the root, sampled branch by branch, and the constants that this needs.

With E = -logsumexp(-E_i + log w_i) the density is a mixture, p = Σ π_i p_i with π_i ∝ w_i Z_i and Z_i = ∫ exp(-E_i).
A chain that starts far from all modes falls into the basin of one of them, hardly ever with probability π_i, and
Langevin dynamics does not cross between far modes. Drawing the branch first and running only that is exact, and costs
a K-th of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import rng
from .composition import Calibrated, Concept, Expression, LogSumExp, all_of
from .plan import Plan
from .samplers import MALA
from .weights import weight_at

STEP = 0xFFFFFFFF  # of the uniform that draws a branch, in the stream of initial states: no chain starts anew there


@dataclass(frozen=True)
class DrawBranches:
    """Each chain runs one branch of the OR at the root, drawn with probability softmax(log w_i + log Z_i).

    Args:
        log_z: log Z_i of every branch, up to a common constant, in the order of `root_branches(expr)`: from closed forms,
            or `log_partition`. None takes them as equal, as the paper does, and right for branches that are `Calibrated`.
    """

    log_z: Sequence[float] | None = None

    def __post_init__(self):
        if self.log_z is not None:
            found = tuple(float(v) for v in self.log_z)
            if not all(map(math.isfinite, found)):
                raise ValueError(f"`log_z` must be finite, got {found}")
            object.__setattr__(self, "log_z", found)


def root_branches(expr: Expression) -> tuple[Expression, ...]:
    """The branches of the OR at the root of the simplified composition, in order.

    Raises:
        ValueError: there is none.
    """
    return _root(expr).children


def _root(expr: Expression) -> LogSumExp:
    root = expr.simplified
    root = root.expression if isinstance(root, Calibrated) else root
    if not isinstance(root, LogSumExp):
        raise ValueError(f'`branches` needs an OR at the root of the composition, and {expr!r} has none there')
    return root


def _check_constants(branches: Sequence[Expression], draw: DrawBranches) -> None:
    """Raise unless the constants of all branches are known, or of none."""
    known = [b for b in branches if isinstance(b, Calibrated)]
    if not known:
        return
    if draw.log_z is not None:
        raise ValueError("`log_z` is for branches without a constant of their own; these are calibrated")
    if len(known) < len(branches):
        raise ValueError(
            f"`branches` needs the constants of all branches or of none: {len(known)} of {len(branches)} are calibrated")


class Branches:
    """The branches of a planned composition, and the draw."""

    def __init__(self, plan: Plan, draw: DrawBranches, options: Mapping, sigma: float | None = None):
        root = _root(plan.expression)
        self.expressions, self.sharpness = root.children, root.sharpness
        _check_constants(self.expressions, draw)
        self.plans = [Plan(e, plan.compute_dtype, **options) for e in self.expressions]
        logs = [weight_at(w, sigma) for w in root.log_weights]
        if draw.log_z is not None and len(draw.log_z) != len(logs):
            raise ValueError(f"`log_z` must have one number for each of {len(logs)} branches, got {len(draw.log_z)}")
        logits = [w + z for w, z in zip(logs, draw.log_z or [0.0] * len(logs))]
        self.probabilities = torch.softmax(torch.tensor(logits, dtype=torch.float64), 0)
        self._edges = self.probabilities.cumsum(0)[:-1]

    def check_temperature(self, low: float, high: float) -> None:
        """Raise unless the law of a chain is the mixture of its branches: s·T = 1."""
        for heat in (low, high):
            if abs(self.sharpness * heat - 1) > 1e-4:
                raise ValueError(
                    f'`branches="draw"` needs sharpness·temperature = 1, where an OR is a mixture of its branches; sharpness is'
                    f" {self.sharpness:g} and the sampler's effective temperature {heat:g}")

    def draw(self, n: int, seed: int, first_chain: int) -> Tensor:
        """The branch of each chain, `[n]`: a function of seed and chain alone."""
        u = rng.uniform((1,), n, seed=seed, step=STEP, stream=rng.INIT, first_chain=first_chain)
        return torch.searchsorted(self._edges, u[:, 0].double(), right=True)

    def bind(self, x: Tensor, rows: Mapping[str, Tensor], branch: Tensor) -> DrawnEvaluator:
        """An evaluator of each chain's own branch."""
        return DrawnEvaluator(self, x, rows, branch)


class DrawnEvaluator:
    """Of every chain the branch that it drew, in the place of an `Evaluator`: one energy and one gradient."""

    n_gradients = 1

    def __init__(self, branches: Branches, x: Tensor, rows: Mapping[str, Tensor], branch: Tensor):
        self._parts = []
        for b, plan in enumerate(branches.plans):
            index = torch.nonzero(branch == b).flatten()
            if len(index):
                conditions = {s: rows[s][index.to(rows[s].device)] for s in plan.expression.slots}
                index = index.to(x.device)
                self._parts.append((index, plan.bind(x[index], conditions)))

    @property
    def passes(self) -> list:
        """All calls of models."""
        return [p for _, evaluator in self._parts for p in evaluator.passes]

    @property
    def parts(self) -> list:
        """`(rows, evaluator)` of every branch that some chain drew."""
        return self._parts

    def need_energies(self) -> None:
        """Gradients come with energies from now on."""
        for _, evaluator in self._parts:
            evaluator.need_energies()

    def refresh(self) -> None:
        """Parameters may have changed."""
        for _, evaluator in self._parts:
            evaluator.refresh()

    def energies(self, x: Tensor, sigma: float | None = None) -> list[Tensor]:
        """The energy of each chain's branch, `[B]`, as a list of one."""
        out = x.new_empty(x.shape[0])
        for index, evaluator in self._parts:
            out[index] = evaluator.total(evaluator.energies(x[index], sigma), sigma).to(out.dtype)
        return [out]

    def total(self, energies: list[Tensor], sigma: float | None = None) -> Tensor:
        """E(x) `[B]` of each chain's branch."""
        return energies[0]

    def gradients(self, x: Tensor, sigma: float | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """`([∇E(x)], [E(x)])` of each chain's branch; the energy is NaN where a leaf has none."""
        out, energy = torch.empty_like(x), x.new_empty(x.shape[0])
        for index, evaluator in self._parts:
            gradients, energies = evaluator.gradients(x[index], sigma)
            out[index] = sum(gradients[1:], gradients[0].clone()) if len(gradients) > 1 else gradients[0]
            energy[index] = evaluator.total([e.detach() for e in energies], sigma).to(energy.dtype)
        return [out], [energy]


def log_partition(expr: Expression, shape: Sequence[int], *, mean: float = 0.0, std: float = 1.0, n: int = 256, levels: int = 200,
                  step_size: float = 0.1, steps_per_level: int = 1,
                  seed: int | torch.Generator | None = 0, **options: object) -> tuple[float, float]:
    """log Z = log ∫ exp(-E(x)) dx by annealed importance sampling, and its standard error.

    Chains start from N(mean, std²) and go through E_β = (1 - β) E_0 + β E in `levels` equal steps of β, moved by MALA;
    log Z is the log-mean-exp of the accumulated weights Σ Δβ (E_0 - E) plus log Z_0 = d/2·log(2π std²).
    Source: Neal, Statistics and Computing 2001.

    Args:
        expr: the composition; `shape` of one chain.
        mean, std: of the Gaussian base, which should cover the modes.
        n: chains; more of them, or more levels, lower the error.
        step_size: of MALA, in units of x² per unit of energy.
        options: of `sample`: conditions, batch_size, backend ...

    Returns:
        log Z, and the standard error of it (delta method over chains).
    """
    from .plan import Plan
    from .sampling import _device, sample

    if isinstance(levels, bool) or not isinstance(levels, int) or levels < 1:
        raise ValueError(f"`levels` must be a positive integer, got {levels!r}")
    if not std > 0:
        raise ValueError(f"`std` must be positive, got {std}")
    seed, shape = rng.resolve_seed(seed), (shape,) if hasattr(shape, "__index__") else tuple(shape)
    size = math.prod(shape)
    base = Concept(lambda x: (x - mean).square().flatten(1).sum(1) / (2 * std**2), name="base")
    where = options.get("device")
    device = _device(where[0] if isinstance(where, (list, tuple)) else where, Plan(expr))
    x = mean + std * rng.normal(shape, n, seed=seed, step=0, stream=rng.INIT, device=device)
    logs = torch.zeros(n, dtype=torch.float64)
    conditions = options.get("conditions")
    for level in range(levels):
        with torch.no_grad():
            logs += (base.energy(x) - expr.energy(x, conditions=conditions)).double().cpu() / levels
        beta = (level + 1) / levels
        path = all_of([base, expr], weights=[1 - beta, beta]) if level + 1 < levels else expr
        x = sample(path, x=x, sampler=MALA(step_size), steps=steps_per_level, seed=(seed + level + 1) % 2**64, energies=False,
                   allow_improper=True, check=False, **options).x
    top = logs.max()
    weights = (logs - top).exp()
    error = float(weights.std() / weights.mean() / math.sqrt(n)) if n > 1 else math.inf
    return float(top + weights.mean().log()) + 0.5 * size * math.log(2 * math.pi * std**2), error
