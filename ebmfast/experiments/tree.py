"""What a row of a table asks for: one tree that composes energies, says what is right, and draws labels that are.

`Is("color", "c")` holds where the colour of the object is what slot c says; `All`, `Any` and `Not` combine such statements.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..composition import Expression, Slot, all_of, any_of, negate
from ..evaluation import SIZE_TOLERANCE, near


class Node:
    """A statement about a picture, given rows of conditions."""

    def leaves(self) -> Iterator[Is]:
        """Its `Is` statements, in order."""
        for part in getattr(self, "parts", ()):
            yield from part.leaves()

    @property
    def concepts(self) -> tuple[str, ...]:
        """The concepts it speaks of."""
        return tuple(dict.fromkeys(leaf.concept for leaf in self.leaves()))

    @property
    def slots(self) -> tuple[str, ...]:
        """The slots that it needs."""
        return tuple(dict.fromkeys(leaf.slot for leaf in self.leaves()))

    def holds(self, seen: Mapping[str, Tensor], rows: Mapping[str, Tensor]) -> Tensor:
        """Where it is true, bool [N], of what was seen, disregarding whether there is an object at all."""
        raise NotImplementedError

    def right(self, seen: Mapping[str, Tensor], rows: Mapping[str, Tensor]) -> Tensor:
        """Where an object is seen and the statement holds, bool [N]."""
        return seen["present"] & self.holds(seen, rows)


@dataclass(frozen=True)
class Is(Node):
    """The concept has the value in the slot: positions and sizes within the tolerance, shapes and colours the same."""

    concept: str
    slot: str

    def leaves(self) -> Iterator[Is]:
        yield self

    def holds(self, seen, rows):
        wanted, value = rows[self.slot], seen[self.concept]
        if self.concept == "position":
            return near(value, wanted)
        if self.concept == "size":
            return (value - wanted[:, 0]).abs() <= SIZE_TOLERANCE
        return value == wanted.argmax(1)


@dataclass(frozen=True)
class All(Node):
    """Every part holds: AND, a product of densities."""

    parts: tuple[Node, ...]

    def __init__(self, *parts: Node):
        object.__setattr__(self, "parts", parts)

    def holds(self, seen, rows):
        return torch.stack([p.holds(seen, rows) for p in self.parts]).all(0)


@dataclass(frozen=True)
class Any(Node):
    """Some part holds: OR, a sum of densities."""

    parts: tuple[Node, ...]

    def __init__(self, *parts: Node):
        object.__setattr__(self, "parts", parts)

    def holds(self, seen, rows):
        return torch.stack([p.holds(seen, rows) for p in self.parts]).any(0)


@dataclass(frozen=True)
class Not(Node):
    """The part does not hold: a density is divided by its own to the power α."""

    part: Node

    @property
    def parts(self) -> tuple[Node, ...]:
        return (self.part,)

    def holds(self, seen, rows):
        return ~self.part.holds(seen, rows)


@dataclass(frozen=True)
class Count(Node):
    """So many objects are counted."""

    number: int

    def holds(self, seen, rows):
        return seen["count"] == self.number


@dataclass(frozen=True)
class Present(Node):
    """There is an object."""

    def holds(self, seen, rows):
        return seen["present"]


def compose(tree: Node, families: Mapping, weight: Callable = lambda concept: 1.0, alpha=None) -> Expression:
    """The composition of a tree over families, conditions left as slots; `alpha` None is each model's own."""
    match tree:
        case Is(concept=concept, slot=slot):
            return families[concept][Slot(slot)]
        case All(parts=parts):
            weights = [weight(p.concept) if isinstance(p, Is) else 1.0 for p in parts]
            return all_of([compose(p, families, weight, alpha) for p in parts], weights)
        case Any(parts=parts):
            return any_of([compose(p, families, weight, alpha) for p in parts])
        case Not(part=part):
            return negate(compose(part, families, weight, alpha), alpha)
    raise TypeError(f"{tree!r} has no energy")


def assign(tree: Node, rows: Mapping[str, Tensor], law, generator: torch.Generator, tries: int = 200) -> dict[str, Tensor]:
    """Labels of N objects for which the tree holds, drawn from the law: what is asked for exactly, all else free.

    Where a part of an OR is to hold, each of them is chosen as often. Returns position [N, 2], size [N], shape and color [N].
    """
    n = len(next(iter(rows.values())))
    labels = law.labels(n, generator)
    fixed = {name: torch.zeros(n, dtype=torch.bool) for name in labels}
    _fix(tree, rows, labels, fixed, torch.ones(n, dtype=torch.bool), generator)
    for _ in range(tries):
        wrong = ~tree.holds(labels, rows)
        if not wrong.any():
            return labels
        for name, fresh in law.labels(n, generator).items():
            change = wrong & ~fixed[name]
            labels[name][change] = fresh[change]
    raise ValueError(f"no labels were found for which {tree!r} holds")


def _fix(tree: Node, rows, labels, fixed, where: Tensor, generator) -> None:
    match tree:
        case Is(concept=concept, slot=slot):
            value = rows[slot]
            exact = value if concept == "position" else value[:, 0] if concept == "size" else value.argmax(1)
            labels[concept][where] = exact[where]
            fixed[concept] |= where
        case All(parts=parts):
            for part in parts:
                _fix(part, rows, labels, fixed, where, generator)
        case Any(parts=parts):
            chosen = torch.randint(len(parts), where.shape, generator=generator)
            for k, part in enumerate(parts):
                _fix(part, rows, labels, fixed, where & (chosen == k), generator)
