"""Conditions at random, and the law of labels that models were trained on."""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..evaluation import POSITION_TOLERANCE, near
from ..scenes.render import SHAPES, SIZE_RANGE

CLEARANCE = 0.9  # between objects of one scene, in units of positions: two of the largest size do not touch


@dataclass(frozen=True)
class Law:
    """The law of labels: position uniform in [-1, 1]², size uniform, shape and colour uniform over the pairs shown.

    `held_out` are pairs (shape, colour) of indices that no training picture shows.
    """

    colors: int = 6
    shapes: int = len(SHAPES)
    size_range: tuple[float, float] = SIZE_RANGE
    held_out: tuple[tuple[int, int], ...] = ()

    def pairs(self, which: str) -> Tensor:
        """(shape, colour) pairs [P, 2]: the "seen", or the "unseen" ones."""
        hidden = set(self.held_out)
        seen = [(s, c) for s in range(self.shapes) for c in range(self.colors) if (s, c) not in hidden]
        return torch.tensor(seen if which == "seen" else sorted(hidden), dtype=torch.long).view(-1, 2)

    def shown(self, shape: Tensor, color: Tensor) -> Tensor:
        """Which objects are of a pair that training showed, bool [N]."""
        table = torch.ones(self.shapes, self.colors, dtype=torch.bool)
        for s, c in self.held_out:
            table[s, c] = False
        return table[shape, color]

    def labels(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Labels of n objects as they occur in training: position [n, 2], size [n], shape and color [n]."""
        pairs = self.pairs("seen")
        shape, color = pairs[torch.randint(len(pairs), (n,), generator=generator)].unbind(1)
        low, high = self.size_range
        return {"position": torch.rand(n, 2, generator=generator) * 2 - 1,
                "size": low + (high - low) * torch.rand(n, generator=generator), "shape": shape.clone(), "color": color.clone()}


def draw_conditions(n: int, seed: int, law: Law | None = None, pairs: str = "seen") -> dict[str, Tensor]:
    """Random conditions, one row each: positions "p" and "q" apart by more than 0.8 in some coordinate; positions "p1", "p2",
    "p3" apart by more than 0.9; different colours "c" and "d" and different shapes "f" and "g" (one-hot); sizes "s".

    (f, c) and (g, d) are pairs that training showed, or with `pairs` "unseen" the first is one that it did not.
    """
    law = law or Law()
    g = torch.Generator().manual_seed(seed)
    p, q = _places(n, g), _places(n, g)
    while (close := near(p, q, 2 * POSITION_TOLERANCE)).any():
        q[close] = _places(int(close.sum()), g)
    shape, color = _pairs(n, law, pairs, g).unbind(1)
    other = _pairs(n, law, "seen", g)
    while (alike := (other[:, 0] == shape) | (other[:, 1] == color)).any():
        other[alike] = _pairs(int(alike.sum()), law, "seen", g)
    other_shape, other_color = other.unbind(1)
    low, high = law.size_range
    size = low + (high - low) * torch.rand(n, 1, generator=g)
    three = _apart(n, g)
    return {"p": p, "q": q, "c": F.one_hot(color, law.colors).float(), "d": F.one_hot(other_color, law.colors).float(),
            "f": F.one_hot(shape, law.shapes).float(), "g": F.one_hot(other_shape, law.shapes).float(), "s": size,
            **{f"p{k + 1}": three[:, k] for k in range(3)}}


def _pairs(n: int, law: Law, which: str, g: torch.Generator) -> Tensor:
    """(shape, colour) pairs [n, 2]."""
    options = law.pairs(which)
    if not len(options):
        raise ValueError(f"there are no {which} pairs of shape and colour: these models were trained on all of them")
    return options[torch.randint(len(options), (n,), generator=g)]


def _places(n: int, g: torch.Generator) -> Tensor:
    return torch.rand(n, 2, generator=g) * 2 - 1


def _apart(n: int, g: torch.Generator) -> Tensor:
    """Three positions [n, 3, 2], no two of them closer than objects may stand."""
    found = torch.rand(n, 3, 2, generator=g) * 2 - 1
    while True:
        gaps = (found[:, :, None] - found[:, None]).norm(dim=3) + 9.0 * torch.eye(3)
        close = gaps.amin((1, 2)) < CLEARANCE
        if not close.any():
            return found
        found[close] = torch.rand(int(close.sum()), 3, 2, generator=g) * 2 - 1
