"""Weights of a composition: plain numbers, or piecewise-constant functions of the noise level.

A schedule is data, never a callable, so that a composition hashes, compares and serialises.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real


@dataclass(frozen=True)
class PiecewiseSigma:
    """A weight that depends on the noise level σ.

    w(σ) = values[i]  for  edges[i-1] < σ <= edges[i],  with edges[-1] = 0 and edges[len] = ∞.

    Args:
        edges: noise levels, positive and strictly ascending, `m` of them.
        values: `m + 1` finite numbers, from the lowest noise levels to the highest.

    Raises:
        ValueError: the lengths do not match, or edges do not ascend, or a number is not finite.
    """

    edges: tuple[float, ...]
    values: tuple[float, ...]

    def __post_init__(self):
        object.__setattr__(self, "edges", tuple(float(e) for e in self.edges))
        object.__setattr__(self, "values", tuple(float(v) for v in self.values))
        if len(self.values) != len(self.edges) + 1:
            raise ValueError(
                f"`values` must have one entry more than `edges`, got {len(self.values)} values"
                f" for {len(self.edges)} edges")
        if not all(math.isfinite(v) for v in self.edges + self.values):
            raise ValueError(f"`edges` and `values` must be finite, got {self.edges} and {self.values}")
        if any(b <= a for a, b in zip((0.0, *self.edges), self.edges)):
            raise ValueError(f"`edges` must be positive and ascend strictly, got {self.edges}")

    def at(self, sigma: float) -> float:
        """The weight at noise level `sigma`."""
        return self.values[bisect_left(self.edges, sigma)]

    def __repr__(self):
        if len(self.edges) == 1 and self.values[0] == 0.0:
            value = "" if self.values[1] == 1.0 else f", value={self.values[1]:g}"
            return f"AboveSigma({self.edges[0]:g}{value})"
        return f"PiecewiseSigma({list(self.edges)}, {list(self.values)})"

    def __mul__(self, other):
        if isinstance(other, (Real, PiecewiseSigma)) and not isinstance(other, bool):
            return combine(lambda a, b: a * b, self, other)
        return NotImplemented

    def __rmul__(self, other):
        return self.__mul__(other)

    def __neg__(self):
        return combine(lambda a: -a, self)


Weight = float | PiecewiseSigma


def AboveSigma(threshold: float, value: float = 1.0) -> PiecewiseSigma:
    """The weight `value` while σ > `threshold`, and 0 below: w(σ) = value · 1[σ > threshold]."""
    return PiecewiseSigma((threshold,), (0.0, value))


def as_weight(value, name: str = "weight") -> Weight:
    """`value` as a finite float, or unchanged where it is a schedule; anything else raises."""
    if isinstance(value, PiecewiseSigma):
        return value
    if isinstance(value, bool) or not (isinstance(value, Real) or hasattr(value, "item")):
        raise TypeError(f"`{name}` must be a number, AboveSigma or PiecewiseSigma, got {value!r}")
    value = float(value)
    if not math.isfinite(value):
        raise ValueError(f"`{name}` must be finite, got {value}")
    return value


def weight_at(weight: Weight, sigma: float | None) -> float:
    """The number that `weight` is at noise level `sigma` (None where there is no noise level)."""
    if not isinstance(weight, PiecewiseSigma):
        return weight
    if sigma is None:
        raise ValueError(
            f"the weight {weight} depends on the noise level, and none was given:"
            " sample with Annealed(...), or pass `sigma=`")
    return weight.at(sigma)


def combine(function: Callable[..., float], *weights: Weight) -> Weight:
    """`function` of several weights, at every noise level; a plain float where it is constant."""
    edges = sorted({e for w in weights if isinstance(w, PiecewiseSigma) for e in w.edges})
    points = [*edges, math.inf]
    values = [function(*(weight_at(w, p) for w in weights)) for p in points]
    kept = [i for i in range(len(edges)) if values[i] != values[i + 1]]
    if not kept:
        return values[-1]
    return PiecewiseSigma(tuple(edges[i] for i in kept), tuple(values[i] for i in kept) + (values[-1],))


def add(weights: Sequence[Weight]) -> Weight:
    """The sum of several weights."""
    return combine(lambda *ws: math.fsum(ws), *weights) if weights else 0.0


def multiply(a: Weight, b: Weight) -> Weight:
    """The product of two weights."""
    return combine(lambda x, y: x * y, a, b)


def lowest(weight: Weight, sigmas: Sequence[float] | None = None) -> float:
    """The least value of a weight: over the noise levels `sigmas`, or over all of them."""
    if not isinstance(weight, PiecewiseSigma):
        return weight
    return min(weight.at(s) for s in sigmas) if sigmas else min(weight.values)


def to_data(weight: Weight):
    """A weight as JSON data."""
    if isinstance(weight, PiecewiseSigma):
        return {"edges": list(weight.edges), "values": list(weight.values)}
    return weight


def from_data(data) -> Weight:
    """A weight from JSON data."""
    if isinstance(data, dict):
        return PiecewiseSigma(tuple(data["edges"]), tuple(data["values"]))
    return as_weight(data)
