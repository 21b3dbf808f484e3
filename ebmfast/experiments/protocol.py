"""One composition, sampled and scored: the same protocol for our models, chance, real renders, a joint model and the paper's."""
from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import zoo
from ..composition import Expression, Slot, without
from ..samplers import Annealed, Langevin, Sampler
from ..sampling import sample
from ..weights import AboveSigma, PiecewiseSigma, Weight
from .conditions import Law, draw_conditions
from .measures import Cell, free_attributes, kernel_distance, share
from .registry import Row
from .tree import All, Any, Count, Is, Node, Not, Present, assign, compose

JOINT = ("shape", "color", "position", "size")  # the order in which one model conditioned on all takes them
READING_ERROR = 0.04  # of a judge in positions, a quarter of it in sizes: about three times what they are on average
TUNING_SEED = 0  # of the conditions on which settings were chosen; never reported


@dataclass(frozen=True)
class Settings:
    """What is chosen on other conditions than those reported: weights, priors, schedule.

    weights: weight of each concept's conditional energy against its prior (1 is Bayes' rule; above sharpens).
    odds: of the bounded negation (`ef.without`) where a conjunction has a negated concept; None divides by p^alpha:
    alpha: weight of a negated concept then, at noise levels above `alpha_above`; None is the models' own.
    prior_above: each model's own prior is taken out at noise levels above this one only; None is the card's.
    prior_weight: how much of each prior is taken out there, 1 by Bayes' rule; None is the card's.
    plain: priors stay where they are, as in the paper: a plain product.
    symmetric: ratios go over one prior that is blind to shifts of the channels (`zoo.symmetric_prior`) at every noise level;
        where a model has no prior, as `plain`.
    levels, steps_per_level, drift: of the annealing; None is the card's.
    """

    weights: tuple[tuple[str, Weight], ...] = ()
    odds: float | None = 10.0
    alpha: float | None = 0.3
    alpha_above: float = 1.0
    prior_above: float | None = None
    prior_weight: float | None = None
    plain: bool = False
    symmetric: bool = False
    levels: int | None = None
    steps_per_level: int | None = None
    drift: float | None = None

    @property
    def negation(self):
        """α of a negated concept."""
        return AboveSigma(self.alpha_above, self.alpha) if self.alpha is not None and self.alpha_above else self.alpha


SHARP_SHAPE = Settings(weights=(("shape", 2.0),))
PAIRS = Settings(weights=(("shape", 1.5), ("color", 2.0)), symmetric=True, levels=24)
CHOSEN: dict[str, Settings] = {  # by the title of a row
    "shape AND color AND position": SHARP_SHAPE,
    "shape AND color AND position AND size": replace(SHARP_SHAPE, levels=24),
    "(shape 1 AND color 1) OR (shape 2 AND color 2)": SHARP_SHAPE,
    "shape AND (color 1 OR color 2) AND NOT position": SHARP_SHAPE,
    "two positions": Settings(prior_weight=0.7, levels=24),
    "three positions": Settings(prior_weight=0.85),
    "after shape": SHARP_SHAPE,
    "after color": Settings(weights=(("shape", 2.0), ("position", 1.5)), levels=24),
    "seen pairs": PAIRS,
    "unseen pairs": PAIRS,
}


@dataclass(frozen=True)
class Models:
    """Families of one kind with their cards: what is composed, and how it is sampled.

    `method` names them in tables.
    """

    families: Mapping
    cards: Mapping[str, dict]
    method: str = "score matching"

    @classmethod
    def bundled(cls) -> Models:
        """The zoo's."""
        names = zoo.names()
        return cls(zoo.concepts(), {name: zoo.card(name) for name in names}, _method(zoo.card(names[0])))

    @classmethod
    def load(cls, folder: str | Path) -> Models:
        """Those of a folder of NAME.json with NAME.safetensors, whose cards have no judge among them.

        Raises ValueError where there are none.
        """
        families, cards = {}, {}
        for name, about in zoo.cards_in(folder).items():
            families[about["name"]] = zoo.family(about, zoo.load_from(folder, name))
            cards[about["name"]] = about
        return cls(families, cards, _method(next(iter(cards.values()))))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one picture."""
        return tuple(next(iter(self.cards.values()))["shape"])

    @property
    def law(self) -> Law:
        """The law of training labels, as far as the cards say."""
        about = self.cards.get("color", self.cards.get("joint", {}))
        palette = 20 if self.shape[-1] >= 64 else 6  # of the rendered sets
        colors = about["condition_dim"] - (6 if about["name"] == "joint" else 0) if about else palette
        shapes = list(self.cards["shape"]["labels"]) if "shape" in self.cards else []
        names = list(about.get("labels") or [])
        hidden = {tuple(p) for card in self.cards.values() for p in card.get("held_out", ())}
        held_out = tuple((shapes.index(s), names.index(c)) for s, c in sorted(hidden) if s in shapes and c in names)
        return Law(colors=colors, held_out=held_out)

    def sampler(self, settings: Settings) -> tuple[Sampler, int | None]:
        """The sampler that the cards name, with what the settings change, and its number of steps where it has none."""
        schedule = self.schedule
        if "sigma_max" not in schedule:
            clips = {"grad_clip_value": schedule["gradient_clip"]} if schedule.get("gradient_clip") else {}
            return Langevin.reference_code(schedule["step"], schedule["noise"], **clips), schedule["steps"]
        return Annealed.geometric(
            schedule["sigma_max"], schedule["sigma_min"], settings.levels or schedule["levels"], denoise=schedule["denoise"],
            steps_per_level=settings.steps_per_level or schedule["steps_per_level"],
            drift=settings.drift or schedule["drift"]), None

    @property
    def schedule(self) -> dict:
        """How the first of them is sampled; they agree."""
        return next(iter(self.cards.values()))["schedule"]

    @property
    def have_priors(self) -> bool:
        """Whether every one has an unconditional energy."""
        return all(card.get("prior") for card in self.cards.values())

    def adapted(self, settings: Settings) -> Settings:
        """The settings with what the cards leave open filled in, and without what these models cannot do: without priors a plain
        product and no bounded negation; without noise levels priors and α at all of them."""
        plain = settings.plain or not self.have_priors
        odds = settings.odds if self.have_priors else None
        if "sigma_max" not in self.schedule:
            return replace(settings, plain=plain, odds=odds, alpha=None, prior_above=0.0, prior_weight=settings.prior_weight or 1.0)
        above = self.schedule.get("prior_above", 0.0) if settings.prior_above is None else settings.prior_above
        weight = self.schedule.get("prior_weight", 1.0) if settings.prior_weight is None else settings.prior_weight
        symmetric = settings.symmetric and not plain
        return replace(settings, plain=plain, symmetric=symmetric, odds=odds, prior_above=above, prior_weight=weight)

    def pictures(self, x: Tensor) -> Tensor:
        """Samples in the range that readers expect, [-1, 1]."""
        low, high = next(iter(self.cards.values()))["data_range"]
        return x if (low, high) == (-1, 1) else (x - low) * (2 / (high - low)) - 1

    @property
    def hybrid(self) -> bool:
        """Whether any of them was trained with a cross-entropy term."""
        return any(map(_is_hybrid, self.cards.values()))



def _is_hybrid(card: dict) -> bool:
    recipe = card.get("recipe")
    return bool(card.get("hybrid", isinstance(recipe, dict) and recipe.get("contrast_weight", 0)))


def _method(card: dict) -> str:
    name = card.get("method", "score matching")
    return f"{name}, hybrid" if _is_hybrid(card) else name


def expression(row: Row, models: Models, settings: Settings) -> Expression:
    """The composition of a row through the public algebra, conditions left as slots."""
    settings, weights = models.adapted(settings), dict(settings.weights)
    kept, excluded = _excluded(row.tree) if settings.odds is not None else (row.tree, ())
    composed = compose(kept, models.families, lambda concept: weights.get(concept, 1.0), settings.negation)
    if settings.symmetric:
        composed = zoo.symmetric_prior(composed)
    elif not settings.plain:
        composed = zoo.own_priors(composed, settings.prior_above, settings.prior_weight)
    for part in excluded:
        family = models.families[part.concept]
        composed = without(composed, family[Slot(part.slot)], family.unconditional, settings.odds)
    return composed


def _excluded(tree) -> tuple[Node, tuple[Is, ...]]:
    """A conjunction without its negated concepts, and these; any other tree as it is."""
    if not isinstance(tree, All):
        return tree, ()
    excluded = tuple(p.part for p in tree.parts if isinstance(p, Not) and isinstance(p.part, Is))
    kept = tuple(p for p in tree.parts if not (isinstance(p, Not) and isinstance(p.part, Is)))
    return (All(*kept) if len(kept) > 1 else kept[0]), excluded


def density(row: Row, models: Models, settings: Settings) -> str:
    """What is sampled, in words."""
    settings, parts = models.adapted(settings), []
    if isinstance(row.tree, Any) or any(isinstance(p, Any) for p in getattr(row.tree, "parts", ())):
        parts.append("sum of densities")
    kept = _excluded(row.tree)[0] if settings.odds is not None else row.tree
    if len(list(kept.leaves())) > 1 and not (isinstance(row.tree, Any) and all(isinstance(p, Is) for p in row.tree.parts)):
        above = f" above sigma {settings.prior_above:g}" if settings.prior_above else ""
        part = "" if settings.prior_weight == 1.0 else f" with weight {settings.prior_weight:g}"
        own = f"product, each prior counted once{part}{above}"
        parts.append("plain product" if settings.plain else "product over a symmetric prior" if settings.symmetric else own)
    if has_not(row.tree) and settings.odds is not None:
        parts.append(f"bounded negation, odds {settings.odds:g}")
    elif has_not(row.tree):
        alpha = "the models' own" if settings.alpha is None else f"{settings.alpha:g}"
        above = f" above sigma {settings.alpha_above:g}" if settings.alpha is not None and settings.alpha_above else ""
        parts.append(f"alpha {alpha}{above}")
    if settings.weights:
        parts.append("weights " + ", ".join(f"{name} {w}" if isinstance(w, PiecewiseSigma) else f"{name} {w:g}"
                                            for name, w in settings.weights))
    parts += [f"{value:g} {words}" for value, words in ((settings.levels, "levels"), (settings.steps_per_level, "steps a level"))
              if value]
    return "; ".join(parts) or "p(x | c)"


def has_not(tree: Node) -> bool:
    """Whether something in it is negated."""
    return isinstance(tree, Not) or any(has_not(p) for p in getattr(tree, "parts", ()))


def _around(labels: Mapping[str, Tensor]) -> list[Mapping[str, Tensor]]:
    """Labels, and what a reader with small errors might take them for."""
    if "position" not in labels:
        return [labels]
    shifts = [torch.tensor([a, b]) * READING_ERROR for a, b in ((1, 1), (1, -1), (-1, 1), (-1, -1))]
    size = [s * READING_ERROR / 4 for s in (1, -1, 1, -1)]
    return [labels, *({**labels, "position": labels["position"] + s, "size": labels["size"] + t} for s, t in zip(shifts, size))]


def _stopped(report) -> list[int]:
    """Chains that diverged and were stopped."""
    return sorted({fault.chain for fault in report.faults})


@dataclass
class Scored:
    """One line of a table: who made the pictures, what of them is right, and the pictures."""

    row: str
    by: str
    cells: dict[str, Cell]
    density: str = ""
    temperature: float | None = None
    pictures: Tensor | None = None
    seconds: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Protocol:
    """How every line is drawn and scored.

    n: samples; conditions: how many random conditions they share; condition_seed draws these, and TUNING_SEED is for tuning;
    seed: of the chains. `real`: clean renders with labels that were not trained on, or None. `reader` reads pictures.
    """

    reader: object
    law: Law
    n: int = 1000
    conditions: int = 200
    condition_seed: int = 1
    seed: int = 0
    real: object | None = None
    batch_size: int = 64
    progress: bool = False
    options: Mapping = field(default_factory=dict)

    def __post_init__(self):
        if not 2 <= self.conditions <= self.n:
            raise ValueError(f"`conditions` must be from 2 to n = {self.n}, got {self.conditions}")

    def rows(self, row: Row) -> tuple[dict[str, Tensor], Tensor]:
        """Condition rows of every sample, and the number of its condition, `[n]`."""
        drawn = draw_conditions(self.conditions, self.condition_seed, self.law, row.pairs)
        group = torch.arange(self.n) * self.conditions // self.n
        return {name: values[group] for name, values in drawn.items()}, group

    def score(self, row: Row, seen: Mapping[str, Tensor], rows, group: Tensor) -> dict[str, Cell]:
        """The cells that follow from what was seen."""
        cells = {title: share(node.right(seen, rows), group) for title, node in row.columns.items()}
        cells["object present"] = share(Present().right(seen, rows), group)
        free = free_attributes(seen, self.law, row.free)
        if free:
            worst = max(free, key=lambda name: free[name].value)
            cells["free attributes"] = free[worst]
        return cells

    def sampled(self, row: Row, models: Models, settings: Settings | None = None, by: str | None = None) -> Scored:
        """Samples of the composition of `models`."""
        settings = settings or CHOSEN.get(row.title, Settings())
        rows, group = self.rows(row)
        composed = expression(row, models, settings)
        sampler, steps = models.sampler(settings)
        used = {slot: rows[slot] for slot in composed.slots}
        x, report = self._draw(composed, sampler, steps, used, models)
        return self._scored(row, by or models.method, x, rows, group, density(row, models, settings), report)

    def joint(self, row: Row, models: Models) -> Scored:
        """Samples of one model conditioned on everything, at labels for which the row holds and all else is free."""
        rows, group = self.rows(row)
        g = torch.Generator().manual_seed(self.condition_seed + 1)
        labels = assign(row.tree, rows, self.law, g)
        parts = {"position": labels["position"], "size": labels["size"][:, None],
                 "shape": F.one_hot(labels["shape"], self.law.shapes).float(),
                 "color": F.one_hot(labels["color"], self.law.colors).float()}
        sampler, steps = models.sampler(Settings())
        condition = torch.cat([parts[name] for name in JOINT], 1)
        x, report = self._draw(models.families["joint"][Slot("all")], sampler, steps, {"all": condition}, models)
        return self._scored(row, "one joint model", x, rows, group, "p(x | all labels)", report)

    def chance(self, row: Row) -> Scored:
        """What is right in scenes that have nothing to do with the conditions, read without error."""
        rows, group = self.rows(row)
        g = torch.Generator().manual_seed(self.condition_seed + 2)
        if any(isinstance(node, Count) for node in row.columns.values()):
            counts = self.real.count if self.real is not None else torch.arange(4)
            drawn = counts[torch.randint(len(counts), (self.n,), generator=g)]
            seen = {"count": drawn, "present": drawn > 0}
        else:
            seen = self.law.labels(self.n, g) | {"present": torch.ones(self.n, dtype=torch.bool)}
        cells = {title: share(node.right(seen, rows), group) for title, node in row.columns.items()}
        return Scored(row.title, "chance", cells)

    def renders(self, row: Row) -> Scored:
        """Real renders for which the row holds, read as samples are. Conditions without one are left out."""
        rows, group = self.rows(row)
        index = self._satisfying(row, rows, half=1)
        kept = index >= 0
        rows, group, index = {k: v[kept] for k, v in rows.items()}, group[kept], index[kept]
        if len(group.unique()) < 2:
            raise ValueError(f"fewer than two conditions of {row.title!r} have a render among {len(self.real)}: render more")
        x = self.real[index].pixels()
        self_distance = self._distance(row, self.real[index.unique()].pixels())
        left = self.conditions - len(group.unique())
        note = f"{left} of {self.conditions} conditions have no render" if left else ""
        cells = self.score(row, self.reader.read(x), rows, group) | self_distance
        return Scored(row.title, "real renders", cells, pictures=x[:64], note=note)

    def _satisfying(self, row: Row, rows, half: int) -> Tensor:
        """For every sample the index of a render for which the row holds, also if the reader were a little off; -1 where there is
        none. From the renders of even number, half 0, or of odd number."""
        data = self.real
        part = torch.arange(half, len(data), 2)
        count = getattr(data, "count", None)
        if count is not None:
            labels, present = {"count": count[part]}, count[part] > 0
            nodes = [node for node in row.columns.values() if isinstance(node, Count)]
        else:
            labels = {name: getattr(data, name)[part] for name in ("position", "size", "shape", "color")}
            present, nodes = labels["shape"] >= 0, [row.tree]
            if row.pairs == "seen":
                present = present & self.law.shown(labels["shape"], labels["color"])
        g = torch.Generator().manual_seed(self.condition_seed + 3 + half)
        index = torch.full((self.n,), -1)
        order = torch.rand(self.n, generator=g)
        for i in range(self.n):
            one = {k: v[i:i + 1].expand(len(part), *v.shape[1:]) for k, v in rows.items()}
            fits = present.clone()
            for node in nodes:
                for near in _around(labels):
                    fits &= node.holds(near, one)
            options = part[fits]
            if len(options):
                index[i] = options[int(order[i] * len(options))]
        return index

    def _draw(self, composed, sampler, steps, conditions, models: Models):
        start = time.perf_counter()
        options = {"on_nonfinite": "freeze", **self.options}
        result = sample(composed, n=self.n, shape=models.shape, sampler=sampler, steps=steps, conditions=conditions, seed=self.seed,
                        batch_size=self.batch_size, energies=False, progress=self.progress, **options)
        result.report.seconds = time.perf_counter() - start
        x = models.pictures(result.x)
        x[_stopped(result.report)] = 0.0
        return x, result.report

    def _scored(self, row: Row, by: str, x: Tensor, rows, group, words: str, report) -> Scored:
        seen, stopped = dict(self.reader.read(x)), _stopped(report)
        if stopped:
            seen |= {name: seen[name].clone() for name in ("present", "count") if name in seen}
            seen["present"][stopped] = False
            if "count" in seen:
                seen["count"][stopped] = 0
        cells = self.score(row, seen, rows, group)
        if self.real is not None:
            cells |= self._distance(row, x)
        note = f"{len(stopped)} of {len(x)} chains left the region where steps are stable: they count as showing nothing"
        return Scored(row.title, by, cells, words, report.effective_temperature[1], x[:64], round(report.seconds, 1),
                      note if stopped else "")

    def _distance(self, row: Row, x: Tensor) -> dict[str, Cell]:
        """The kernel distance of pictures to renders for which the row holds, none of them twice."""
        reference = self._satisfying(row, self.rows(row)[0], half=0).unique()
        wanted = self.real[reference[reference >= 0]].pixels()
        if min(len(x), len(wanted)) < 4:
            return {}
        orders = (torch.randperm(len(t), generator=torch.Generator().manual_seed(k)) for k, t in enumerate((x, wanted)))
        a, b = (self.reader.features(t)[order] for t, order in zip((x, wanted), orders))
        return {"kernel distance": kernel_distance(a, b)}
