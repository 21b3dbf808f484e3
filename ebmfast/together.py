"""Several compositions at the same points, in one batched evaluation: every leaf once, whatever shares it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .composition import Calibrated, Expression, any_of
from .plan import Plan

ROWS = 256  # of one evaluation, by default


class Together:
    """K compositions of shared leaves, evaluated at the same x.

    Args:
        expressions: each keeps its own program, over the leaves of all.
        batch_size: points per evaluation.
    """

    def __init__(self, expressions: Sequence[Expression], batch_size: int | None = None):
        self.expressions = tuple(expressions)
        self.plan = Plan(any_of(e.expression if isinstance(e, Calibrated) else e for e in self.expressions))
        index = {leaf: k for k, leaf in enumerate(self.plan.leaves)}
        self.columns = [[index[leaf] for leaf in e.leaves] for e in self.expressions]
        self.batch_size = batch_size or ROWS

    @torch.no_grad()
    def energies(self, x: Tensor, sigma: float | None = None, conditions: Mapping | None = None) -> Tensor:
        """E_k(x) of every composition, float64 `[n, K]`, of x `[n, *S]` under `conditions` `{slot: [n, C]}`."""
        rows = []
        for start in range(0, len(x), self.batch_size):
            part = slice(start, start + self.batch_size)
            given = {name: torch.as_tensor(value)[part] for name, value in (conditions or {}).items()}
            leaves = [e.double() for e in self.plan.bind(x[part], given).energies(x[part], sigma)]
            totals = [e.program.evaluate([leaves[k] for k in ks], sigma) for e, ks in zip(self.expressions, self.columns)]
            rows.append(torch.stack(totals, 1))
        return torch.cat(rows) if rows else x.new_zeros(0, len(self.expressions), dtype=torch.float64)
