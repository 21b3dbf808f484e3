"""Figures of a table with their uncertainty: shares by condition, distances between sets of pictures, free attributes."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 2000
BLOCKS = 10


@dataclass(frozen=True)
class Cell:
    """A figure, and its 95 % interval or a standard error, whichever is known; `about` names what it is of."""

    value: float
    low: float | None = None
    high: float | None = None
    error: float | None = None
    about: str = ""


def share(held: Tensor, condition: Tensor, seed: int = 0) -> Cell:
    """The share of samples in which something holds, and its 95 % bootstrap interval over conditions.

    Args:
        held: bool [N]; condition: the number of the condition that each sample was drawn under, [N].

    Conditions are drawn with replacement, with all of their samples: those of one condition are alike.
    """
    count = torch.bincount(condition).double()
    hits = torch.bincount(condition, held.double(), minlength=len(count))
    hits, count = hits[count > 0], count[count > 0]
    g = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(count), (RESAMPLES, len(count)), generator=g)
    values = hits[chosen].sum(1) / count[chosen].sum(1)
    low, high = torch.quantile(values, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Cell(float(hits.sum() / count.sum()), low, high)


def mean(values: Tensor, group: Tensor, seed: int = 0) -> Cell:
    """The mean of values [N] and its 95 % bootstrap interval over groups [N]."""
    count, total = torch.bincount(group).double(), torch.bincount(group, values.double())
    total, count = total[count > 0], count[count > 0]
    chosen = torch.randint(len(count), (RESAMPLES, len(count)), generator=torch.Generator().manual_seed(seed))
    found = total[chosen].sum(1) / count[chosen].sum(1)
    low, high = torch.quantile(found, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Cell(float(total.sum() / count.sum()), low, high)


def kernel_distance(a: Tensor, b: Tensor) -> Cell:
    """The squared maximum mean discrepancy of features [N, D] and those of a reference [M, D] under the kernel (a·b/D + 1)³.

    Unbiased: for independent sets of one law the mean is 0. Features are divided by the root mean square of the reference's.
    The mean over 10 blocks and its standard error. Source: Binkowski et al., "Demystifying MMD GANs" (the kernel inception
    distance), ICLR 2018.
    """
    blocks = min(BLOCKS, len(a) // 2, len(b) // 2)
    if blocks < 2:
        raise ValueError(f"a kernel distance needs at least 4 pictures on each side, got {len(a)} and {len(b)}")
    scale = b.double().square().mean().sqrt().clamp_min(1e-12)
    pairs = zip((a.double() / scale).tensor_split(blocks), (b.double() / scale).tensor_split(blocks))
    values = torch.stack([_mmd(x, y) for x, y in pairs])
    return Cell(float(values.mean()), error=float(values.std() / blocks**0.5))


def _mmd(a: Tensor, b: Tensor) -> Tensor:
    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x):
        k = kernel(x, x)
        return (k.sum() - k.diagonal().sum()) / (len(x) * (len(x) - 1))

    return within(a) + within(b) - 2 * kernel(a, b).mean()


def free_attributes(seen: Mapping[str, Tensor], law, free: tuple[str, ...], seed: int = 0) -> dict[str, Cell]:
    """Total variation between attributes that were not asked for, where an object is seen, and their law in training.

    ½ Σ |share - probability| over colours, shapes, thirds of the range of sizes, 3x3 fields of positions. `error` is not an
    error: it is what as many exact draws would have on average.
    """
    here = seen["present"]
    n = int(here.sum())
    found = {}
    for name in free:
        bins, expected = _bins(seen[name][here], name, law), _probabilities(name, law)
        if not n:
            found[name] = Cell(1.0, about=name)
            continue
        counts = torch.bincount(bins, minlength=len(expected)).double()
        draws = torch.multinomial(expected, 200 * n, replacement=True, generator=torch.Generator().manual_seed(seed)).view(200, n)
        shares = torch.stack([(draws == k).double().mean(1) for k in range(len(expected))], 1)
        found[name] = Cell(float((counts / n - expected).abs().sum() / 2),
                           error=float((shares - expected).abs().sum(1).mean() / 2), about=name)
    return found


def _bins(values: Tensor, name: str, law) -> Tensor:
    if name == "position":
        cells = ((values + 1) * 1.5).floor().clamp(0, 2).long()
        return cells[:, 0] * 3 + cells[:, 1]
    if name == "size":
        low, high = law.size_range
        return ((values - low) / (high - low) * 3).floor().clamp(0, 2).long()
    return values


def _probabilities(name: str, law) -> Tensor:
    if name in ("shape", "color"):
        values = law.pairs("seen")[:, 0 if name == "shape" else 1]
        return torch.bincount(values, minlength=law.shapes if name == "shape" else law.colors).double() / len(values)
    bins = 9 if name == "position" else 3
    return torch.full((bins,), 1 / bins, dtype=torch.float64)
