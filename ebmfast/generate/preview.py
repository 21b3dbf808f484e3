"""Contact sheets: a few samples of every composition, drawn anew or read from a data set."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from .. import images
from .engines import devices
from .maker import Maker
from .plan import DatasetPlan

MOST_ROWS = 24


def draw(plan: DatasetPlan, columns: int = 8):
    """A picture of the first `columns` samples of every composition, before filters; nothing is written."""
    small = dataclasses.replace(plan, batch_size=min(plan.batch_size, columns if plan.image else 2048))
    maker = Maker(small, devices.of(plan, 0))
    rows, titles, data_range = [], [], None
    for j in range(min(len(plan.names), MOST_ROWS)):
        if not plan.counts[j]:
            continue
        count = min(columns if plan.image else 2048, plan.counts[j])
        index = next(k for k in range(plan.shards) if plan.shard(k).composition == j)
        prepared = maker.composition(j)
        prepared.filters.rules = []
        rows.append(maker.sample(index, limit=count).x)
        titles.append(plan.names[j])
        data_range = prepared.data_range
    return sheet(plan, rows, titles, data_range)


def sheet(plan: DatasetPlan, rows: list[Tensor], titles: list[str], data_range) -> object:
    """Rows of pictures with titles; samples of two numbers are shown as densities."""
    if plan.image:
        scale = max(1, 96 // max(plan.shape[1:]))
        return images.grid(rows, titles, data_range=data_range or (0.0, 1.0), scale=scale)
    if math.prod(plan.shape) != 2:
        raise ValueError(f"a contact sheet needs images, or samples of two numbers, got shape {list(plan.shape)}")
    points = torch.cat([r.reshape(-1, 2) for r in rows])
    low, high = points.quantile(0.001, 0), points.quantile(0.999, 0)
    return images.grid([_density(r.reshape(-1, 2), low, high) for r in rows], titles, data_range=(1.0, 0.0), scale=3)


def _density(points: Tensor, low: Tensor, high: Tensor, bins: int = 96) -> Tensor:
    """Points in the plane as an image [1, 1, bins, bins] of their histogram, y upwards."""
    cells = ((points - low) / (high - low).clamp_min(1e-9) * bins).long()
    inside = ((cells >= 0) & (cells < bins)).all(1)
    x, y = cells[inside].unbind(1)
    counts = torch.bincount((bins - 1 - y) * bins + x, minlength=bins * bins).float().view(1, 1, bins, bins)
    return (counts / counts.max().clamp_min(1)).sqrt()
