"""The algebra of energy-based models: leaves, AND, OR, NOT, weights and priors.

Every formula follows from densities p(x) ∝ exp(-E(x)) (Du, Li and Mordatch, NeurIPS 2020, section 3):

    a & b               E = E_a + E_b                  p ∝ p_a · p_b
    a | b               E = -logsumexp(-E_a, -E_b)     p ∝ p_a + p_b
    a & ~b              E = E_a - α E_b                p ∝ p_a / p_b^α
    2.0 * a             E = 2 E_a                      p ∝ p_a^2
    with_prior(a & b, p)  E = E_p + (E_a - E_p) + (E_b - E_p)

The update rules printed beside OR and NOT in that paper have the opposite sign and would climb the energy;
the densities are right, and they are what is implemented here.
"""

from __future__ import annotations

import difflib
import inspect
import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Real
from typing import NoReturn

import torch

from .program import Program
from .weights import Weight, add, as_weight, combine, from_data, lowest, multiply, to_data

PAPER_ALPHA = 0.01
IF_MEANT = " If you mean it, bound the domain (clamp=(lo, hi)) or pass allow_improper=True"

Condition = float | Sequence[float] | torch.Tensor
Pair = Sequence[float]  # (low, high)


class UngroundedNegationError(ValueError):
    """A composition whose density cannot be normalised, because what is negated outweighs the rest."""


@dataclass(frozen=True)
class Slot:
    """A condition that is filled per chain: `conditions={name: rows}` with rows `[n, C]`."""

    name: str

    def __post_init__(self):
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"a Slot needs a non-empty name, got {self.name!r}")


@dataclass(frozen=True, eq=False)
class Source:
    """A model and how it is called: what all concepts of one model have in common."""

    model: Callable
    name: str
    takes_sigma: bool
    takes_keep: bool
    reduce: str | None = None
    data_range: tuple[float, float] | None = None
    sigma: tuple[float, float] | None = None
    negation_alpha: float | None = None
    returns: str = "energy"
    gradient: Callable | None = None
    shape: tuple[int, ...] | None = None

    @property
    def key(self) -> tuple:
        """What two sources must share for their leaves to be one leaf, or one batched call."""
        return (id(self.model), self.takes_sigma, self.takes_keep, self.reduce, self.returns, self.gradient)

    @property
    def gives_gradient(self) -> bool:
        """Whether gradients come from a function, not from autograd."""
        return self.returns != "energy" or self.gradient is not None


RETURNS = ("energy", "gradient", "score")


def _source(model, name, takes_sigma, reduce, data_range, sigma, negation_alpha, returns, gradient, shape) -> Source:
    if not callable(model):
        raise TypeError(f"`model` must be a module or a function energy(x) or energy(x, condition), got {model!r}")
    if returns not in RETURNS:
        raise ValueError(f"`returns` must be one of {', '.join(RETURNS)}, got {returns!r}")
    if gradient is not None and (returns != "energy" or not callable(gradient)):
        raise ValueError("`gradient` must be a function gradient(x) or gradient(x, condition), beside a model of energies")
    if reduce not in (None, "sum"):
        raise ValueError(f'`reduce` must be None or "sum", got {reduce!r}')
    function = model.forward if isinstance(model, torch.nn.Module) else model
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        parameters = {}
    for label, pair in (("data_range", data_range), ("sigma", sigma)):
        if pair is not None and not (len(pair) == 2 and pair[0] < pair[1]):
            raise ValueError(f"`{label}` must be a pair (low, high), got {pair!r}")
    return Source(
        model, name, "sigma" in parameters if takes_sigma is None else bool(takes_sigma), "keep" in parameters,
        reduce, None if data_range is None else tuple(map(float, data_range)),
        None if sigma is None else tuple(map(float, sigma)),
        None if negation_alpha is None else as_weight(negation_alpha, "negation_alpha"), returns, gradient,
        None if shape is None else tuple(map(int, shape)))


class Expression:
    """A composition of energies. Immutable and hashable; build it with `&`, `|`, `~` and `*`.

    `leaves` are the unique concepts of the simplified tree, in order of first appearance; they are the
    columns of `leaf_energies`. Methods that evaluate take `x` `[B, *S]` of any floating dtype, `sigma` (a
    number, the noise level) where a model or a weight depends on one, and `conditions` (`{slot: [B, C]}`).
    """

    def __and__(self, other: Expression) -> Expression:
        if not isinstance(other, Expression):
            return NotImplemented
        return Sum(tuple(t for e in (self, other) for t in (e.terms if isinstance(e, Sum) and e.scale is None else ((1.0, e),))))

    def __or__(self, other: Expression) -> Expression:
        if not isinstance(other, Expression):
            return NotImplemented
        found = [(e.children, e.log_weights) if isinstance(e, LogSumExp) and e.sharpness == 1.0 else ((e,), (0.0,))
                 for e in (self, other)]  # flat, so that a chain of a thousand is no deeper than one of two
        return any_of(*(sum(parts, ()) for parts in zip(*found)))

    def __invert__(self) -> Expression:
        return negate(self)

    def __mul__(self, weight: Weight) -> Expression:
        if isinstance(weight, Expression):
            raise TypeError("two expressions cannot be multiplied; `a & b` multiplies their densities")
        return Sum(((as_weight(weight), self),))

    def __rmul__(self, weight: Weight) -> Expression:
        return self.__mul__(weight)

    def __bool__(self) -> NoReturn:
        raise TypeError(
            "a composition has no truth value: `a and b` would silently be `b`. Write `a & b`, `a | b`, `~a`")

    @cached_property
    def simplified(self) -> Expression:
        """The same energy as nested weighted sums and logsumexps, flattened, equal leaves merged."""
        return _simplify(self)

    def simplify(self) -> Expression:
        """The same energy as nested weighted sums and logsumexps, flattened, equal leaves merged."""
        return self.simplified

    @cached_property
    def leaves(self) -> tuple[Concept, ...]:
        """Unique leaves of the simplified tree in order of first appearance."""
        return tuple(dict.fromkeys(_walk(self.simplified)))

    @cached_property
    def program(self) -> Program:
        """The simplified tree in postfix order, as small arrays that kernels read."""
        return _pack(self.simplified, {leaf: k for k, leaf in enumerate(self.leaves)})

    @cached_property
    def slots(self) -> tuple[str, ...]:
        """Names of the slots that `conditions=` has to fill, in order of first appearance."""
        found = (leaf.condition.name for leaf in self.leaves if isinstance(leaf.condition, Slot))
        return tuple(dict.fromkeys(found))

    @cached_property
    def tail_weight(self) -> Weight:
        """T of the grounding rule: leaf 1; weighted sum Σ wᵢ T(childᵢ); OR min T. Grounded where T > 0."""
        return _tail_weight(self.simplified)

    @cached_property
    def step_scale(self) -> Weight:
        """M that divides annealed steps: leaf 1; sum Σ max(wᵢ, 0)·Mᵢ; OR max Mᵢ; 1 under a prior."""
        return _step_scale(self)

    def check_grounded(self, sigmas: Sequence[float] | None = None) -> None:
        """Raise `UngroundedNegationError` unless T > 0 at every one of the noise levels `sigmas`.

        T > 0 is necessary, not sufficient: a negated concept narrower than what grounds it can still win.
        """
        tail = lowest(self.tail_weight, sigmas)
        if tail > 0:
            return
        raise UngroundedNegationError(
            f"{self!r} is not grounded: its weights add up to {tail:g} far from the data, so exp(-E) has no"
            " finite integral and chains run away. A negation needs something it is taken from: write"
            f" `a & ~b` with a smaller alpha (`negate(b, alpha=0.1)`), and in an OR ground every branch.{IF_MEANT}")

    def energy(self, x: torch.Tensor, sigma: float | None = None,
               conditions: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """E(x) of the composition, `[B]`, differentiable with respect to `x` and to the models."""
        columns = self.leaf_energies(x, sigma, conditions).unbind(1)
        return self.program.evaluate(columns, sigma) if columns else x.new_zeros(x.shape[0])

    def leaf_energies(self, x: torch.Tensor, sigma: float | None = None,
                      conditions: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """E_k(x) of every leaf, `[B, K]`, columns as in `leaves`."""
        from .plan import Plan
        columns = Plan(self).bind(x, conditions).energies(x, sigma)
        return torch.stack(columns, dim=1) if columns else x.new_zeros(x.shape[0], 0)

    def gradient(self, x: torch.Tensor, sigma: float | None = None,
                 conditions: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """∇E(x) = Σ_k w_k(x) ∇E_k(x), `[B, *S]`, w = ∂E/∂E_k; from one batched forward-backward."""
        from .plan import Plan
        with torch.inference_mode(False), torch.enable_grad():
            x = x.clone() if isinstance(x, torch.Tensor) and x.is_inference() else x
            return Plan(self).bind(x, conditions).gradient(x, sigma)

    def explain(self) -> str:
        """What will be evaluated: the simplified tree, its leaves, and how they are batched."""
        from .plan import Plan
        return Plan(self).explain()

    def to_json(self) -> str:
        """The tree as JSON, models by name; `from_json` reads it back.

        Raises:
            ValueError: two models, or two concepts without a family, have one name, so that nobody could tell them apart.
        """
        known: dict[str, object] = {}
        for leaf in self.leaves:
            name, what = (leaf.name, leaf) if leaf.family is None else (leaf.family.name, leaf.source.key)
            if known.setdefault(name, what) != what:
                raise ValueError(f"two models or concepts are named {name!r}: give them names, as in Concept(model, name=...)")
        return json.dumps(_to_data(self))


@dataclass(frozen=True, eq=False, repr=False)
class Concept(Expression):
    """One energy E(x) or E(x | condition): a leaf of a composition.

    Args:
        model: an `nn.Module` or function `energy(x)` or `energy(x, condition)` → `[B]` or `[B, 1]`; a model
            with a parameter `sigma` is called with `sigma=` `[B]`, the noise level. Never modified.
        condition: a vector of numbers `[C]`, a number, a `Slot`, or None.
        name: what reports and errors call it.
        reduce: `"sum"` adds up whatever else the model returns per chain; None raises on other shapes.
        takes_sigma: overrides what the model's signature says.
        data_range, sigma: the model's range of x, and of noise levels, where known.
        negation_alpha: α of `~concept`; None is the paper's 0.01.
        returns: "energy"; or what the model returns in its place, shaped as x: "score", ∇log p = -∇E, or "gradient", ∇E.
            Such concepts compose in sums (AND, NOT), which need no energies, and results have none.
        gradient: a function of the model's arguments that returns ∇E, `[B, *S]`, used in the place of autograd.
        shape: S, where the model knows x of one shape only; others are refused.

    Two concepts of the same model under the same condition are the same leaf.
    """

    source: Source
    condition: tuple[float, ...] | Slot | None
    name: str
    family: Family | None = field(default=None)

    def __init__(self, model: Callable[..., torch.Tensor], condition: Condition | Slot | None = None, name: str | None = None, *,
                 reduce: str | None = None, takes_sigma: bool | None = None, data_range: Pair | None = None,
                 sigma: Pair | None = None, negation_alpha: Weight | None = None, returns: str = "energy",
                 gradient: Callable[..., torch.Tensor] | None = None, shape: Sequence[int] | None = None) -> None:
        name = name or getattr(model, "__name__", None) or type(model).__name__
        source = _source(model, name, takes_sigma, reduce, data_range, sigma, negation_alpha, returns, gradient, shape)
        self._set(source, _as_condition(condition, name), name, None)

    def _set(self, source, condition, name, family):
        for key, value in (("source", source), ("condition", condition), ("name", name), ("family", family)):
            object.__setattr__(self, key, value)

    def __eq__(self, other):
        if not isinstance(other, Concept):
            return NotImplemented
        return self.source.key == other.source.key and self.condition == other.condition

    def __hash__(self):
        return hash((self.source.key, self.condition))

    def __repr__(self):
        return self.name


class Family:
    """All concepts of one conditional model E(x | condition).

    Args:
        model: a module or function called as in `Concept`; one with a parameter `keep` (`[B]`, 1 with
            condition, 0 without) evaluates conditioned and unconditional rows in one batch.
        name: what expressions call it.
        labels: `{label: condition vector}`; then `family("label")` is a concept.
        unconditional: whether the model has an unconditional energy (called with `condition=None`).
        condition_dim: the width C of a condition; taken from `labels` where they are given.
        data_range, sigma, negation_alpha, takes_sigma, reduce, returns, gradient, shape: as in `Concept`.
        ranges: (low, high) of every number of a condition, as far as the model was trained; others draw a warning.

    `family("red")`, `family(0.2, 0.8)`, `family([0.2, 0.8])` and `family[Slot("c")]` are concepts.
    """

    def __init__(self, model: Callable[..., torch.Tensor], name: str, labels: Mapping[str, Condition] | None = None, *,
                 unconditional: bool = False, condition_dim: int | None = None, data_range: Pair | None = None,
                 sigma: Pair | None = None, negation_alpha: Weight | None = None, takes_sigma: bool | None = None,
                 reduce: str | None = None, returns: str = "energy",
                 gradient: Callable[..., torch.Tensor] | None = None, shape: Sequence[int] | None = None,
                 ranges: Sequence[Pair] | None = None) -> None:
        self.name = name
        self.labels = {str(k): _as_condition(v, f"{name}[{k!r}]") for k, v in (labels or {}).items()}
        widths = {len(v) for v in self.labels.values()} | ({condition_dim} if condition_dim else set())
        if len(widths) > 1:
            raise ValueError(f"conditions of {name!r} must have one width, got {sorted(widths)}")
        self.condition_dim = widths.pop() if widths else None
        self.ranges = tuple((float(low), float(high)) for low, high in ranges or ())
        if self.ranges and self.condition_dim not in (None, len(self.ranges)):
            raise ValueError(f"`ranges` of {name!r} must be {self.condition_dim} pairs (low, high), got {len(self.ranges)}")
        self.source = _source(model, name, takes_sigma, reduce, data_range, sigma, negation_alpha, returns, gradient, shape)
        self._unconditional = unconditional

    def __repr__(self):
        return f"Family({self.name!r})"

    @property
    def unconditional(self) -> Concept:
        """The model's energy without a condition, E(x)."""
        if not self._unconditional:
            raise ValueError(f"{self.name!r} has no unconditional energy: Family(..., unconditional=True) says it has")
        return self._concept(None, f"{self.name}.unconditional")

    def __getitem__(self, slot: Slot) -> Concept:
        if not isinstance(slot, Slot):
            raise TypeError(f"{self.name}[...] takes an ef.Slot, got {slot!r}; write {self.name}({slot!r})")
        return self._concept(slot, f"{self.name}[{slot.name}]")

    def __call__(self, *condition: str | Condition | Slot) -> Concept:
        if len(condition) == 1:
            condition = condition[0]
        if isinstance(condition, str):
            return self._concept(self._label(condition), f"{self.name}({condition!r})")
        if isinstance(condition, Slot):
            return self[condition]
        vector = _as_condition(condition, self.name)
        if not vector:
            raise ValueError(f"{self.name}() needs a label or a condition")
        if self.condition_dim is not None and len(vector) != self.condition_dim:
            raise ValueError(
                f"a condition of {self.name!r} must have {self.condition_dim} numbers, got {len(vector)}")
        text = f"{self.name}({', '.join(f'{v:g}' for v in vector)})"
        if any(not low - 1e-6 <= value <= high + 1e-6 for value, (low, high) in zip(vector, self.ranges)):
            known = ", ".join(f"{low:g} to {high:g}" for low, high in self.ranges)
            warnings.warn(f"{text} lies outside the conditions that its model was trained on: {known}", stacklevel=2)
        return self._concept(vector, text)

    def _not_a_concept(self, *_) -> NoReturn:
        """What operators of expressions do with a family."""
        label = repr(next(iter(self.labels))) if self.labels else ", ".join(["0.5"] * (self.condition_dim or 1))
        raise TypeError(f"{self.name} is a family of concepts and needs a condition, as in {self.name}({label})")

    __and__ = __rand__ = __or__ = __ror__ = __invert__ = __mul__ = __rmul__ = __iter__ = _not_a_concept

    def _label(self, label: str) -> tuple[float, ...]:
        if label in self.labels:
            return self.labels[label]
        near = difflib.get_close_matches(label, self.labels, n=3)
        known = f"its labels are {', '.join(self.labels)}" if self.labels else "it has no labels; pass numbers"
        meant = f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
        raise ValueError(f"{self.name!r} has no label {label!r}{meant}: {known}")

    def _concept(self, condition, name) -> Concept:
        concept = Concept.__new__(Concept)
        concept._set(self.source, condition, name, self)
        return concept


def _as_condition(condition, name: str):
    if condition is None or isinstance(condition, Slot):
        return condition
    if hasattr(condition, "tolist"):
        condition = condition.tolist()
    if isinstance(condition, Real):
        condition = [condition]
    try:
        values = tuple(float(v) for v in condition)
    except (TypeError, ValueError):
        raise ValueError(f"the condition of {name} must be a vector of numbers, got {condition!r}") from None
    if not all(math.isfinite(v) for v in values):
        raise ValueError(f"the condition of {name} must be finite, got {values}")
    return values


@dataclass(frozen=True, repr=False)
class Sum(Expression):
    """E = Σ wᵢ Eᵢ. `scale` is the step scale where simplification has to remember it."""

    terms: tuple[tuple[Weight, Expression], ...]
    scale: Weight | None = field(default=None, compare=False)

    def __repr__(self):
        if not self.terms:
            return "all_of([])"
        return " & ".join(_term_text(w, e) for w, e in self.terms)


@dataclass(frozen=True, repr=False)
class LogSumExp(Expression):
    """E = -(1/s) logsumexp(-s Eᵢ + log wᵢ)."""

    children: tuple[Expression, ...]
    log_weights: tuple[Weight, ...]
    sharpness: float = 1.0

    def __repr__(self):
        if self.sharpness == 1.0 and not any(self.log_weights) and len(self.children) > 1:
            return " | ".join(_bracketed(c, len(getattr(c, "terms", ())) > 1) for c in self.children)
        inside = ", ".join(map(repr, self.children))
        weights = f", log_weights={list(self.log_weights)}" if any(self.log_weights) else ""
        sharp = f", sharpness={self.sharpness:g}" if self.sharpness != 1.0 else ""
        return f"any_of([{inside}]{weights}{sharp})"


@dataclass(frozen=True, repr=False)
class Calibrated(Expression):
    """A composition whose constant is known: E'(x) = E(x) + log Z(σ), so that its density is exp(-E').

    In an OR such branches count by their densities; `branches="draw"` and `infer` need no further constants. `calibrate` makes
    them from models, and closed forms can be written down.

    Args:
        expression: a whole branch, as it is to be sampled: priors are inside, for they change its constant.
        log_z: log Z, a number or a schedule over the noise level.
        relative_to: names the set of branches among which log Z is known up to a common constant; "": log Z is absolute.
    """

    expression: Expression
    log_z: Weight
    relative_to: str = ""

    def __post_init__(self):
        _expressions([self.expression], "Calibrated")
        if isinstance(self.expression, Calibrated):
            raise ValueError(f"{self.expression.expression!r} is calibrated already: take its `expression` to do so anew")
        object.__setattr__(self, "log_z", as_weight(self.log_z, "log_z"))

    def __repr__(self):
        relative = f", relative_to={self.relative_to!r}" if self.relative_to else ""
        return f"Calibrated({self.expression!r}, {self.log_z!r}{relative})"


@dataclass(frozen=True, repr=False)
class WithPrior(Expression):
    """Every conjunction of total weight W gets -(W - 1)·weight·E_p."""

    expression: Expression
    prior: Expression
    weight: Weight = 1.0

    def __repr__(self):
        weight = "" if self.weight == 1.0 else f", weight={self.weight!r}"
        return f"with_prior({self.expression!r}, {self.prior!r}{weight})"


def _bracketed(expression: Expression, when: bool) -> str:
    return f"({expression!r})" if when else repr(expression)


def _term_text(weight: Weight, expression: Expression) -> str:
    bare = repr(expression)  # once: at every level of a tree
    infix_or = isinstance(expression, LogSumExp) and " | " in bare
    if weight == 1.0:
        return f"({bare})" if infix_or else bare
    text = f"({bare})" if infix_or or isinstance(expression, Sum) else bare
    if isinstance(weight, float) and weight < 0:
        return f"~{text}" if -weight == _own_alpha(expression) else f"negate({bare}, alpha={-weight:g})"
    return f"{weight:g}*{text}" if isinstance(weight, float) else f"{weight!r}*{text}"


def _expressions(items: Iterable, what: str) -> tuple[Expression, ...]:
    items = tuple(items)
    for item in items:
        if not isinstance(item, Expression):
            raise TypeError(f"{what} takes concepts and expressions, got {item!r}")
    if not items:
        raise ValueError(f"{what} needs at least one expression")
    return items


def all_of(expressions: Iterable[Expression], weights: Sequence[Weight] | None = None) -> Expression:
    """Conjunction: E = Σ wᵢ Eᵢ, p ∝ ∏ pᵢ^wᵢ. Weights are numbers or schedules over the noise level."""
    items = _expressions(expressions, "all_of")
    weights = [1.0] * len(items) if weights is None else [as_weight(w, "weights") for w in weights]
    if len(weights) != len(items):
        raise ValueError(f"`weights` must have {len(items)} entries, got {len(weights)}")
    return Sum(tuple(zip(weights, items)))


def any_of(expressions: Iterable[Expression], log_weights: Sequence | None = None,
           sharpness: float = 1.0) -> Expression:
    """Disjunction: E = -(1/s) logsumexp(-s Eᵢ + log wᵢ); with s = 1 the mixture Σ wᵢ exp(-Eᵢ).

    At temperature T the chain is a mixture of the tempered branches only if s·T = 1; with s ≠ 1
    `log_weights` are not mixture weights. Branches count by their unnormalised densities: models trained
    apart have unknown partition functions, which `log_weights` (numbers, or schedules over the noise level) can balance, and
    `calibrate` estimates.
    """
    items = _expressions(expressions, "any_of")
    logs = [0.0] * len(items) if log_weights is None else [as_weight(v, "log_weights") for v in log_weights]
    if len(logs) != len(items):
        raise ValueError(f"`log_weights` must have {len(items)} entries, got {len(logs)}")
    sharpness = _number(sharpness, "sharpness")
    if sharpness <= 0:
        raise ValueError(f"`sharpness` must be positive, got {sharpness}")
    if len({e.relative_to for e in items if isinstance(e, Calibrated)}) > 1:
        raise ValueError("any_of needs constants that compare: these branches were calibrated apart; calibrate them in one call")
    return LogSumExp(items, tuple(logs), sharpness)


def negate(expression: Expression, alpha: Weight | None = None) -> Expression:
    """Negation: E = -α E_b, so `a & negate(b, α)` has p ∝ p_a / p_b^α.

    `alpha` None is the model's own `negation_alpha` (the least of them where `expression` has several
    leaves), else the paper's 0.01. De Morgan's laws do not hold for these densities.
    """
    (expression,) = _expressions([expression], "negate")
    alpha = _own_alpha(expression) if alpha is None else as_weight(alpha, "alpha")
    if lowest(alpha) < 0:
        raise ValueError(f"`alpha` must not be negative, got {alpha}")
    return Sum(((-alpha, expression),))


def without(expression: Expression, concept: Expression, prior: Expression, odds: float = 10.0) -> Expression:
    """Bounded negation: p(x) ∝ p_a(x) / (1 + odds · p_b(x) / p(x)), E = E_a + E_p - (-log(exp(-E_p) + odds · exp(-E_b))).

    `a & ~b` divides by p_b^α, which for ever prefers what is least like b, also in all that b does not speak of. This factor is 1
    wherever x is not like b, and 1 / odds of p / p_b where it is: only what shows b is pushed away.

    Args:
        expression: a, what the negation is taken from; `concept`: b.
        prior: p(x), of b's own model, so that p_b / p is what this model knows about b.
        odds: how much less likely x becomes where it is as likely under b as without.
    """
    expression, concept, prior = _expressions([expression, concept, prior], "without")
    odds = _number(odds, "odds")
    if odds <= 0:
        raise ValueError(f"`odds` must be positive, got {odds}")
    either = LogSumExp((prior, concept), (0.0, math.log(odds)))
    return Sum(((1.0, expression), (1.0, prior), (-1.0, either)), expression.step_scale)


def with_prior(expression: Expression, prior: Expression, weight: Weight = 1.0) -> Expression:
    """Count the prior once: every conjunction of total weight W gets -(W - 1)·E_p.

    So a conjunction becomes p(x) ∏ᵢ (p(x|cᵢ)/p(x))^wᵢ, that is E_p + Σ wᵢ (Eᵢ - E_p); in it an OR counts 1
    and a NOT -α. `weight` scales the correction, `AboveSigma(0.5)` applies it above that noise level only.
    """
    expression, prior = _expressions([expression, prior], "with_prior")
    return WithPrior(expression, prior, as_weight(weight))


def _number(value, name: str) -> float:
    value = as_weight(value, name)
    if not isinstance(value, float):
        raise TypeError(f"`{name}` must be a number, got {value!r}")
    return value


def _own_alpha(expression: Expression) -> Weight:
    alphas = {leaf.source.negation_alpha for leaf in _walk(expression)}
    return min((PAPER_ALPHA if a is None else a for a in alphas), key=lowest, default=PAPER_ALPHA)


def _children(expression: Expression) -> tuple[Expression, ...]:
    match expression:
        case Sum(terms=terms):
            return tuple(e for _, e in terms)
        case LogSumExp(children=children):
            return children
        case Calibrated(expression=inner):
            return (inner,)
        case WithPrior(expression=inner, prior=prior):
            return (inner, prior)
    return ()


def _walk(expression: Expression):
    if isinstance(expression, Concept):
        yield expression
    for child in _children(expression):
        yield from _walk(child)


def _simplify(expression: Expression) -> Expression:
    match expression:
        case Sum(terms=terms):
            return _flat_sum([(w, e.simplified) for w, e in terms], expression.step_scale)
        case LogSumExp(children=children):
            return _flat_or([c.simplified for c in children], expression.log_weights, expression.sharpness)
        case Calibrated(expression=inner, log_z=log_z, relative_to=relative_to):
            return Calibrated(inner.simplified, log_z, relative_to)
        case WithPrior(expression=inner, prior=prior, weight=weight):
            return _with_prior(inner.simplified, prior.simplified, weight, expression.step_scale)
    return expression


def _flat_sum(terms, scale: Weight) -> Expression:
    merged: dict[Expression, list[Weight]] = {}
    for weight, child in terms:
        for inner, leaf in child.terms if isinstance(child, Sum) else ((1.0, child),):
            merged.setdefault(leaf, []).append(multiply(weight, inner))
    kept = tuple((w, e) for e, ws in merged.items() if (w := add(ws)) != 0.0)
    if len(kept) == 1 and kept[0][0] == 1.0 and kept[0][1].step_scale == scale:
        return kept[0][1]
    return Sum(kept, scale)


def _flat_or(children, log_weights, sharpness: float) -> Expression:
    merged: dict[Expression, Weight] = {}
    for child, log_weight in zip(children, log_weights):
        same = isinstance(child, LogSumExp) and child.sharpness == sharpness
        for branch, inner in zip(child.children, child.log_weights) if same else ((child, 0.0),):
            total = add([log_weight, inner])
            merged[branch] = combine(_logaddexp, merged[branch], total) if branch in merged else total
    if len(merged) == 1 and not any(merged.values()):
        return next(iter(merged))
    return LogSumExp(tuple(merged), tuple(merged.values()), sharpness)


def _logaddexp(a: float, b: float) -> float:
    return max(a, b) + math.log1p(math.exp(-abs(a - b)))


def _with_prior(expression: Expression, prior: Expression, weight: Weight, scale: Weight) -> Expression:
    match expression:
        case LogSumExp(children=children):
            branches = [_with_prior(c, prior, weight, c.step_scale) for c in children]
            return _flat_or(branches, expression.log_weights, expression.sharpness)
        case Sum(terms=terms):
            total = add([w for w, _ in terms])
            extra = combine(lambda t, w: -(t - 1.0) * w, total, weight)
            inner = [(w, _with_prior(e, prior, weight, e.step_scale)) for w, e in terms]
            return _flat_sum([*inner, (extra, prior)], scale)
        case Calibrated():
            raise ValueError(
                f"a prior changes the constant of {expression!r}, which was calibrated without it: calibrate"
                " with_prior(branch, prior) instead")
    return expression


def _tail_weight(expression: Expression) -> Weight:
    match expression:
        case Sum(terms=terms):
            return add([multiply(w, _tail_weight(e)) for w, e in terms])
        case LogSumExp(children=children):
            return combine(min, *map(_tail_weight, children)) if len(children) > 1 else _tail_weight(children[0])
        case Calibrated(expression=inner):
            return _tail_weight(inner)
    return 1.0


def _step_scale(expression: Expression) -> Weight:
    match expression:
        case Sum(terms=terms, scale=scale):
            if scale is not None:
                return scale
            return add([multiply(combine(lambda v: max(v, 0.0), w), e.step_scale) for w, e in terms])
        case LogSumExp(children=children):
            scales = [c.step_scale for c in children]
            return combine(max, *scales) if len(scales) > 1 else scales[0]
        case Calibrated(expression=inner):
            return inner.step_scale
        case WithPrior(expression=inner, weight=weight):
            return combine(lambda w, m: w + (1.0 - w) * m, weight, inner.step_scale)
    return 1.0


def _pack(expression: Expression, index: Mapping[Concept, int]) -> Program:
    codes: list[tuple[int, int]] = []
    values: list[Weight] = []

    def visit(node: Expression):
        match node:
            case Sum(terms=terms):
                for _, child in terms:
                    visit(child)
                codes.append((Program.SUM, len(terms)))
                values.extend(w for w, _ in terms)
            case LogSumExp(children=children):
                logs = []
                for child, log_weight in zip(children, node.log_weights):
                    known = isinstance(child, Calibrated)
                    visit(child.expression if known else child)
                    logs.append(add([log_weight, multiply(-node.sharpness, child.log_z)]) if known else log_weight)
                codes.append((Program.LOGSUMEXP, len(children)))
                values.extend((node.sharpness, *logs))
            case Calibrated(expression=inner, log_z=log_z):
                visit(inner)
                codes.append((Program.LOGSUMEXP, 1))  # of one energy: E - log w
                values.extend((1.0, multiply(-1.0, log_z)))
            case _:
                codes.append((Program.LEAF, index[node]))

    visit(expression)
    return Program(tuple(codes), tuple(values), len(index))


def _to_data(expression: Expression) -> dict:
    match expression:
        case Concept(condition=condition, family=family):
            if family is None:
                return {"concept": expression.name}
            if isinstance(condition, Slot):
                return {"family": family.name, "slot": condition.name}
            if condition is None:
                return {"family": family.name, "unconditional": True}
            label = next((k for k, v in family.labels.items() if v == condition), None)
            return {"family": family.name, **({"label": label} if label else {"condition": list(condition)})}
        case Sum(terms=terms, scale=scale):
            extra = {} if scale is None else {"scale": to_data(scale)}
            return {"sum": [[to_data(w), _to_data(e)] for w, e in terms], **extra}
        case LogSumExp(children=children, log_weights=logs, sharpness=sharpness):
            return {"or": [_to_data(c) for c in children], "log_weights": [to_data(w) for w in logs], "sharpness": sharpness}
        case Calibrated(expression=inner, log_z=log_z, relative_to=relative_to):
            return {"calibrated": _to_data(inner), "log_z": to_data(log_z), "relative_to": relative_to}
        case WithPrior(expression=inner, prior=prior, weight=weight):
            return {"with_prior": [_to_data(inner), _to_data(prior)], "weight": to_data(weight)}
    raise TypeError(f"{expression!r} is not an expression")


def by_name(models: Mapping[str, Family | Concept] | Iterable[Family | Concept]) -> Mapping[str, Family | Concept]:
    """Models by name, or an error where two have one."""
    if isinstance(models, Mapping):
        return models
    found: dict[str, Family | Concept] = {}
    for model in models:
        if found.setdefault(model.name, model) is not model:
            raise ValueError(f"two of `models` are named {model.name!r}: give them names, or pass a mapping")
    return found


def from_json(text: str, models: Mapping[str, Family | Concept] | Iterable[Family | Concept]) -> Expression:
    """The expression that `to_json` wrote, its models looked up by name in `models`.

    Raises:
        ValueError: the text is not such a document, or names a model that `models` lacks.
    """
    models = by_name(models)
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not a composition in JSON: {error}") from None
    return _from_data(data, models)


def _from_data(data, models) -> Expression:
    match data:
        case {"concept": name} | {"family": name} if name not in models:
            raise ValueError(f"the composition needs a model named {name!r}; given are {', '.join(models) or 'none'}")
        case {"concept": name}:
            return models[name]
        case {"family": name, "slot": slot}:
            return models[name][Slot(slot)]
        case {"family": name, "unconditional": True}:
            return models[name].unconditional
        case {"family": name, "label": label}:
            return models[name](label)
        case {"family": name, "condition": [*condition]}:
            return models[name](condition)
        case {"sum": [*terms]}:
            scale = from_data(data["scale"]) if "scale" in data else None
            return Sum(tuple((from_data(w), _from_data(e, models)) for w, e in terms), scale)
        case {"or": [*children], "log_weights": [*logs], "sharpness": sharpness}:
            return any_of([_from_data(c, models) for c in children], [from_data(w) for w in logs], sharpness)
        case {"calibrated": expression, "log_z": log_z, "relative_to": str(relative_to)}:
            return Calibrated(_from_data(expression, models), from_data(log_z), relative_to)
        case {"with_prior": [expression, prior], "weight": weight}:
            return with_prior(_from_data(expression, models), _from_data(prior, models), from_data(weight))
    raise ValueError(f"not a composition in JSON: {data!r}")
