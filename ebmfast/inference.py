"""Which conditions explain an observation: posteriors p(c | x) ∝ p(c) exp(-E(x | c)) by comparing energies.

Source: Du, Li and Mordatch, NeurIPS 2020, section 3.3 ("concept inference"). It takes partition functions of different conditions
as equal; `ebmfast.calibrate` says how far they are, and its branches bring their constants along.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from . import rng
from .composition import Calibrated, Concept, Expression, Slot, any_of
from .evaluator import as_rows
from .plan import Plan
from .samplers import MALA, DualAveraging, Sampler
from .state import Report
from .together import ROWS, Together

STARTS = 64  # random conditions of which chains start from the best
HYPOTHESIS = "hypothesis"


@dataclass(frozen=True)
class Inference:
    """Energies of every candidate for every scene, and what follows from them.

    Attributes:
        energy: E summed over the observations of a scene, float64 `[scenes, G_1, ..., G_m]`: an axis for each of `names`.
        names: the slots, or the names of hypotheses.
        candidates: per name its G candidates: condition rows `[G, C]`, or the expressions.
        log_prior: log p(c), of a shape that broadcasts to `[G_1, ..., G_m]`, or None: all alike.
        shapes: per name the shape of the `grid` that its candidates are on, the last number's axis first, where they are.
    """

    energy: Tensor
    names: tuple[str, ...]
    candidates: Mapping[str, Tensor | tuple[Expression, ...]]
    log_prior: Tensor | None = None
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def posterior(self) -> Tensor:
        """softmax(-E + log prior) over all candidates together, `[scenes, G_1, ..., G_m]`."""
        logits = -self.energy if self.log_prior is None else self.log_prior - self.energy
        return torch.softmax(logits.flatten(1), 1).view_as(logits)

    @property
    def index(self) -> Tensor:
        """The most probable combination, `[scenes, m]`: of equal priors the one of lowest energy."""
        flat = self.posterior.flatten(1).argmax(1)
        return torch.stack(torch.unravel_index(flat, self.energy.shape[1:]), 1)

    @property
    def best(self) -> dict:
        """Per name the most probable candidate of every scene: rows `[scenes, C]`, or a list of expressions."""
        found = {}
        for i, name in enumerate(self.names):
            options, index = self.candidates[name], self.index[:, i]
            found[name] = options[index] if isinstance(options, Tensor) else [options[k] for k in index.tolist()]
        return found

    def marginal(self, name: str) -> Tensor:
        """p(c_name | x), all other names summed out, `[scenes, G]`."""
        axis = 1 + self._axis(name)
        others = [d for d in range(1, self.energy.ndim) if d != axis]
        return self.posterior.sum(others) if others else self.posterior

    def mean(self, name: str) -> Tensor:
        """The posterior mean of condition rows, `[scenes, C]`."""
        rows = self.candidates[name]
        if not isinstance(rows, Tensor):
            raise ValueError(f"{name!r} are expressions, which have no mean")
        return (self.marginal(name) @ rows.double()).to(rows.dtype)

    def map(self, name: str, scene: int = 0) -> Tensor:
        """log p(c_name | x) of one scene on the grid of a slot, `[rows, columns]`, second number upwards."""
        self._axis(name)
        if len(self.shapes.get(name, ())) != 2:
            raise ValueError(f"the candidates of {name!r} are not a grid over two numbers: make them with ef.inference.grid")
        return self.marginal(name)[scene].log().view(self.shapes[name]).flip(0)

    def refined(self, name: str) -> Tensor:
        """Where log p(c_name | x) is greatest between the points of a grid, `[scenes, C]`: of the quadratic through the best point
        and its neighbours, within one cell; the best point itself at the rim, or where the quadratic has no maximum."""
        self._axis(name)
        if name not in self.shapes:
            raise ValueError(f"the candidates of {name!r} are not a grid: make them with ef.inference.grid")
        shape, rows = self.shapes[name], self.candidates[name]
        energies = -self.marginal(name).clamp_min(1e-300).log()
        if len(self.names) == 1:  # no rounding to 0
            energies = self.energy if self.log_prior is None else self.energy - self.log_prior
        found = rows[energies.argmin(1)].clone()
        spacing = (rows[-1] - rows[0]) / (torch.tensor(shape[::-1]) - 1).clamp_min(1)
        for s, energy in enumerate(energies):
            found[s] += _vertex(energy.view(shape)).flip(0).to(rows) * spacing
        return found

    def _axis(self, name: str) -> int:
        if name not in self.names:
            raise ValueError(f"`name` must be one of {', '.join(map(repr, self.names))}, got {name!r}")
        return self.names.index(name)


@dataclass(frozen=True)
class ConditionSamples:
    """Chains over continuous conditions.

    Attributes:
        samples: `{slot: [scenes, chains, C]}`, the last states.
        energy: of these, `[scenes, chains]`.
        acceptance: `[scenes, chains]`, or None.
        report: of the run.
    """

    samples: Mapping[str, Tensor]
    energy: Tensor
    acceptance: Tensor | None
    report: Report

    @property
    def best(self) -> dict[str, Tensor]:
        """The state of lowest energy of every scene, `{slot: [scenes, C]}`."""
        index = self.energy.argmin(1)
        return {name: rows[torch.arange(len(rows)), index] for name, rows in self.samples.items()}

    def mean(self, slot: str) -> Tensor:
        """The mean of the chains, `[scenes, C]`."""
        return self.samples[slot].mean(1)


@dataclass(frozen=True)
class Grid:
    """Condition rows `[G, C]` and the shape of the grid they are on, the last number's axis first."""

    rows: Tensor
    shape: tuple[int, ...]


def grid(ranges: Sequence[Sequence[float]], points: int | Sequence[int] = 20) -> Grid:
    """Candidates on a regular grid: the centres of `points` equal cells over each of `ranges` (low, high)."""
    points = [points] * len(ranges) if isinstance(points, int) else list(points)
    if len(points) != len(ranges) or min(points, default=0) < 1:
        raise ValueError(f"`points` must be positive, one for each of {len(ranges)} ranges, got {points}")
    axes = [low + (high - low) * (torch.arange(k) + 0.5) / k for (low, high), k in zip(ranges, points)]
    mesh = torch.meshgrid(*reversed(axes), indexing="ij")  # the first number varies fastest
    return Grid(torch.stack([m.flatten() for m in reversed(mesh)], 1), tuple(reversed(points)))


def _vertex(energy: Tensor) -> Tensor:
    """Offset from the least element of an array to the minimum of the quadratic through it and its neighbours, in cells."""
    at = torch.stack(torch.unravel_index(energy.argmin(), energy.shape))
    size = torch.tensor(energy.shape)
    if ((at == 0) | (at == size - 1)).any():
        return torch.zeros(len(size), dtype=energy.dtype)
    steps = torch.eye(len(size), dtype=torch.long)

    def value(offset):
        return energy[tuple(at + offset)]

    gradient = torch.stack([(value(e) - value(-e)) / 2 for e in steps])
    hessian = torch.stack([torch.stack([
        value(e) + value(-e) - 2 * value(0 * e) if i == j else (value(e + f) - value(e - f) - value(f - e) + value(-e - f)) / 4
        for j, f in enumerate(steps)]) for i, e in enumerate(steps)])
    if not (torch.linalg.eigvalsh(hessian) > 0).all():
        return torch.zeros_like(gradient)
    return -torch.linalg.solve(hessian, gradient).clamp(-1, 1)


def infer(x: Tensor, hypotheses: Expression | Sequence[Expression] | Mapping[str, Sequence[Expression]],
          conditions: Mapping | None = None, *, ranges: Mapping | None = None, sigma: float | None = None, draws: int = 1,
          scene: Tensor | Sequence[int] | str | None = None, log_prior: Tensor | None = None,
          sampler: Sampler | None = None, steps: int = 200, chains: int = 8, seed: int | torch.Generator | None = 0,
          batch_size: int = ROWS) -> Inference | ConditionSamples:
    """Which conditions explain observations: p(c | x_1, ..., x_N) ∝ p(c) exp(-Σ_n E(x_n | c)).

    Three ways to ask:

    - `infer(x, [a, b, c])`: which of several compositions; `{"color": [...], "shape": [...]}` several questions at once, whose
      energies add. Branches from `calibrate` count with their constants, once for each observation.
    - `infer(x, position[Slot("p")] & color[Slot("c")], {"p": grid([(-1, 1), (-1, 1)]), "c": rows})`: every combination of the
      candidates of every slot. Each leaf is evaluated once for each candidate of its own slot.
    - `infer(x, position[Slot("p")], ranges={"p": [(-1, 1), (-1, 1)]})`: chains over continuous conditions, uniform within `ranges`.

    Args:
        x: observations `[n, *S]`.
        hypotheses: expressions without slots, or one expression with them.
        conditions: `{slot: [G, C]}` or `{slot: grid(...)}`.
        ranges: `{slot: [(low, high), ...]}`, a pair for each number of the condition.
        sigma: the noise level at which energies are compared, where models take one.
        draws: how many noised copies of each observation energies are averaged over; 0 takes x as it is.
        scene: which scene each observation shows, `[n]` numbers from 0; "one": all the same; None: each its own.
        log_prior: log p(c) over the candidates.
        sampler: of continuous conditions, whose steps are in units of the ranges; the default is MALA with a warm-up.
        steps, chains: for each scene so many chains take so many steps; they start from the best of 64 random conditions.
        seed: of the noise.
        batch_size: pairs of observation and candidate in one evaluation.

    Returns:
        `Inference`, or `ConditionSamples` with `ranges`.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
    """
    x, members = _observations(x, scene)
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 0:
        raise ValueError(f"`draws` must be an integer, 0 or more, got {draws!r}")
    if isinstance(hypotheses, Expression):
        if not hypotheses.slots:
            raise ValueError(f"`hypotheses` must be several compositions, or one with slots, got {hypotheses!r}")
        if (conditions is None) == (ranges is None):
            raise ValueError("`conditions`, the candidates of every slot, or `ranges` must be given, and not both")
    elif conditions is not None or ranges is not None:
        raise ValueError("`conditions` and `ranges` fill slots of one expression; a list of hypotheses has none")
    seed = rng.resolve_seed(seed)
    copies = _noised(x, sigma, draws, seed)
    if ranges is not None:
        with torch.inference_mode(False):
            return _by_chains(copies, members, hypotheses, ranges, sigma, sampler, steps, chains, seed, batch_size)
    if isinstance(hypotheses, Expression):
        return _over_slots(copies, members, hypotheses, conditions, sigma, log_prior, batch_size)
    return _over_expressions(copies, members, hypotheses, sigma, log_prior, batch_size)


def _observations(x, scene) -> tuple[Tensor, Tensor]:
    """Observations and the scene of each, `[n]`."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2 or not len(x):
        got = f"{x.dtype} of shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"`x` must be one or more observations, a floating tensor [n, *S], got {got}")
    if scene is None:
        return x, torch.arange(len(x))
    members = torch.zeros(len(x), dtype=torch.long) if isinstance(scene, str) and scene == "one" else scene
    if isinstance(members, str):
        raise ValueError(f'`scene` must be "one", None or {len(x)} numbers, got {scene!r}')
    members = torch.as_tensor(members, dtype=torch.long)
    if members.shape != (len(x),) or set(members.tolist()) != set(range(int(members.max()) + 1)):
        raise ValueError(f"`scene` must be {len(x)} numbers from 0 on without gaps, got {members.tolist()}")
    return x, members


def _noised(x: Tensor, sigma: float | None, draws: int, seed: int) -> list[Tensor]:
    """Copies of the observations with noise of standard deviation sigma; x itself where there is none to add."""
    if sigma is None or draws == 0:
        return [x]
    where = dict(seed=seed, stream=rng.USER, device=x.device)
    return [x + sigma * rng.normal(tuple(x.shape[1:]), len(x), step=d, **where).to(x.dtype) for d in range(draws)]


def _by_scene(energy: Tensor, members: Tensor) -> Tensor:
    """Energies `[n, ...]` of observations, added up by scene."""
    out = energy.new_zeros(int(members.max()) + 1, *energy.shape[1:])
    return out.index_add_(0, members.to(energy.device), energy).cpu()


def _outer_sum(parts: Sequence[Tensor]) -> Tensor:
    """Energies `[s, G_1]`, `[s, G_2]`, ... as their sums `[s, G_1, G_2, ...]`."""
    total = parts[0]
    for part in parts[1:]:
        total = total[..., None] + part.view(len(part), *[1] * (total.ndim - 1), -1)
    return total


def _over_expressions(copies, members, hypotheses, sigma, log_prior, batch_size) -> Inference:
    questions = dict(hypotheses) if isinstance(hypotheses, Mapping) else {HYPOTHESIS: hypotheses}
    candidates: dict[str, tuple[Expression, ...]] = {name: tuple(options) for name, options in questions.items()}
    for name, options in candidates.items():
        if not options or not all(isinstance(e, Expression) for e in options):
            raise TypeError(f"`hypotheses` must be concepts and compositions, got {options!r} for {name!r}")
        if slots := [s for e in options for s in e.slots]:
            raise ValueError(f"`hypotheses` has the slot {slots[0]!r}; pass one expression and `conditions`")
        if len({e.relative_to if isinstance(e, Calibrated) else None for e in options}) > 1:
            raise ValueError(f"the constants of {name!r} do not compare: calibrate all of them, in one call, or none")
    flat = [e for options in candidates.values() for e in options]
    together = Together(flat, max(1, batch_size // len(flat)))
    together.plan.check_sigmas(None if sigma is None else [sigma])
    energy = sum(together.energies(x, sigma) for x in copies) / len(copies)
    parts = _by_scene(energy, members).split([len(options) for options in candidates.values()], 1)
    return Inference(_outer_sum(parts), tuple(candidates), candidates, log_prior)


def _over_slots(copies, members, expression: Expression, conditions: Mapping, sigma, log_prior, batch_size) -> Inference:
    if set(expression.slots) != set(conditions):
        raise ValueError(f"`conditions` must fill the slots {list(expression.slots)}, got {list(conditions)}")
    shapes = {name: c.shape for name, c in conditions.items() if isinstance(c, Grid)}
    rows = {name: _rows(name, conditions[name]) for name in expression.slots}
    plan = Plan(expression)
    plan.check_energies("inference")
    plan.check_sigmas(None if sigma is None else [sigma])
    total = 0.0
    for x in copies:
        leaves = _leaves(expression, x, rows, sigma, batch_size)
        if expression.program.has_or:
            leaves = list(torch.broadcast_tensors(*leaves))
        total = total + expression.program.evaluate(leaves, sigma)
    return Inference(_by_scene(total / len(copies), members), tuple(rows), rows, log_prior, shapes)


def _rows(name: str, candidates) -> Tensor:
    rows = torch.as_tensor(candidates.rows if isinstance(candidates, Grid) else candidates, dtype=torch.get_default_dtype())
    if rows.ndim != 2 or not len(rows) or not torch.isfinite(rows).all():
        raise ValueError(f"`conditions[{name!r}]` must be finite rows [G, C], got {list(rows.shape)}")
    return rows


@torch.no_grad()
def _leaves(expression: Expression, x: Tensor, rows: Mapping[str, Tensor], sigma, batch_size: int) -> list[Tensor]:
    """Energies of every leaf, float64 `[n, 1, ..., G, ..., 1]`: its candidates along the axis of its slot."""
    names, found = list(rows), {}
    slots = {leaf.condition.name if isinstance(leaf.condition, Slot) else None for leaf in expression.leaves}
    for slot in slots:
        leaves = [e for e in expression.leaves if (e.condition.name if isinstance(e.condition, Slot) else None) == slot]
        plan, count = Plan(any_of(leaves)), 1 if slot is None else len(rows[slot])
        columns: list[list[Tensor]] = [[] for _ in leaves]
        for pairs in torch.arange(len(x) * count).split(batch_size):
            given = {} if slot is None else {slot: rows[slot][pairs % count]}
            part = x[(pairs // count).to(x.device)]
            for column, energy in zip(columns, plan.bind(part, given).energies(part, sigma)):
                column.append(energy.double())
        axes = [len(x)] + [count if name == slot else 1 for name in names]
        found |= {leaf: torch.cat(column).view(axes) for leaf, column in zip(plan.leaves, columns)}
    return [found[leaf] for leaf in expression.leaves]


class _ScenePosterior(nn.Module):
    """Σ_n E(x_n | c) of the observations of a scene, as a function of the scaled condition: the energy that chains descend.

    State: u `[B, D]`, conditions of all slots side by side, each number scaled to [0, 1] over its range; condition: the number
    of the scene, `[B, 1]`.
    """

    def __init__(self, copies: list[Tensor], members: Tensor, expression: Expression, ranges: Mapping, sigma: float | None):
        super().__init__()
        order = members.argsort(stable=True)
        self.copies, self.counts = [x[order] for x in copies], members.bincount()
        self.starts = self.counts.cumsum(0) - self.counts
        self.expression, self.sigma = expression, sigma
        self.widths = [len(ranges[name]) for name in expression.slots]
        pairs = torch.tensor([pair for name in expression.slots for pair in ranges[name]], dtype=torch.float32)
        self.low, self.span = pairs[:, 0], pairs[:, 1] - pairs[:, 0]

    def rows(self, u: Tensor) -> dict[str, Tensor]:
        """Conditions `{slot: [B, C]}` of scaled ones."""
        parts = (self.low.to(u) + self.span.to(u) * u).split(self.widths, 1)
        return dict(zip(self.expression.slots, parts))

    def forward(self, u: Tensor, scene: Tensor) -> Tensor:
        """Energies `[B]`."""
        scene = scene[:, 0].round().long().cpu()
        counts = self.counts[scene]
        chain = torch.arange(len(u)).repeat_interleave(counts)
        within = torch.arange(len(chain)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        shown = self.starts[scene].repeat_interleave(counts) + within
        rows = {name: c[chain.to(u.device)] for name, c in self.rows(u).items()}
        total = u.new_zeros(len(u))
        for x in self.copies:
            leaves = [self._leaf(leaf, x[shown.to(x.device)], rows) for leaf in self.expression.leaves]
            energy = self.expression.program.evaluate(leaves, self.sigma)
            total = total.index_add(0, chain.to(u.device), energy.to(u))
        return total / len(self.copies)

    def _leaf(self, leaf: Concept, x: Tensor, rows) -> Tensor:
        source, condition = leaf.source, leaf.condition
        args = (x,)
        if condition is not None:
            given = rows[condition.name] if isinstance(condition, Slot) else x.new_tensor(condition).expand(len(x), -1)
            args = (x, given.to(x))
        options = {}
        if source.takes_sigma and self.sigma is not None:
            options["sigma"] = x.new_full((len(x),), self.sigma)
        if source.takes_keep and condition is not None:
            options["keep"] = x.new_ones(len(x))
        return as_rows(source.model(*args, **options), len(x), source.reduce, leaf.name)


def _by_chains(copies, members, expression: Expression, ranges: Mapping, sigma, sampler, steps, chains, seed,
               batch_size) -> ConditionSamples:
    from .sampling import sample

    if set(expression.slots) != set(ranges):
        raise ValueError(f"`ranges` must name the slots {list(expression.slots)}, got {list(ranges)}")
    for name, pairs in ranges.items():
        if not all(len(p) == 2 and p[0] < p[1] and all(map(math.isfinite, p)) for p in pairs):
            raise ValueError(f"`ranges[{name!r}]` must be pairs (low, high), one for each number of the condition, got {pairs!r}")
    plan = Plan(expression)
    plan.check_energies("inference")
    plan.check_sigmas(None if sigma is None else [sigma])
    if sampler is None:
        sampler = MALA(1e-3, bounds=(0.0, 1.0), warmup=DualAveraging(max(1, steps // 2)))
    posterior = _ScenePosterior(copies, members, expression, ranges, sigma)
    scenes, width = len(posterior.counts), sum(posterior.widths)
    density = Concept(posterior, Slot("scene"), "posterior")
    x = _best_of_random(posterior, scenes, width, chains, seed, batch_size)
    number = torch.arange(scenes, dtype=torch.float32).repeat_interleave(chains)[:, None]
    per_chain = int(posterior.counts.max())
    result = sample(density, x=x, sampler=sampler, steps=steps, seed=seed, conditions={"scene": number},
                    batch_size=max(1, batch_size // per_chain), check=False, allow_improper=True)
    shaped = {name: rows.view(scenes, chains, -1) for name, rows in posterior.rows(result.x).items()}
    acceptance = None if result.acceptance is None else result.acceptance.view(scenes, chains)
    return ConditionSamples(shaped, result.energy.view(scenes, chains), acceptance, result.report)


@torch.no_grad()
def _best_of_random(posterior: _ScenePosterior, scenes: int, width: int, chains: int, seed: int, batch_size: int) -> Tensor:
    """For every scene the `chains` best of random points in the unit cube, `[scenes · chains, width]`."""
    tries = max(STARTS, chains)
    u = rng.uniform((width,), scenes * tries, seed=seed, step=0, stream=rng.INIT)
    number = torch.arange(scenes).repeat_interleave(tries)[:, None].float()
    size = max(1, batch_size // int(posterior.counts.max()))
    energy = torch.cat([posterior(a, b) for a, b in zip(u.split(size), number.split(size))]).view(scenes, tries)
    best = energy.topk(chains, dim=1, largest=False).indices + tries * torch.arange(scenes)[:, None]
    return u[best.flatten()]
