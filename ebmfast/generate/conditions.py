"""Conditions per sample: products of grids, tables, and random draws that depend on (seed, slot, sample id) alone."""

from __future__ import annotations

import csv
import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import rng
from ..composition import Family, Slot
from .spec import Composition, Draw, PlanError


class Conditions:
    """The conditions of one composition: `rows(ids)` gives every slot's vectors, and the labels they were given by.

    Grids form a product, the last one fastest; sample number i of the composition takes cell i modulo cells. Random draws are
    those of the noise contract's `user` stream, the step being the CRC-32 of the slot's name.
    """

    def __init__(self, composition: Composition, number: int, expression, offset: int, seed: int, base: Path):
        self.place, self.offset, self.seed = f"compositions[{number}]", offset, seed
        self.families = {leaf.condition.name: leaf.family for leaf in expression.leaves if isinstance(leaf.condition, Slot)}
        self.slots = expression.slots
        self.draws = dict(composition.conditions)
        table = _table(composition.table, base, self.place) if composition.table is not None else {}
        if unknown := sorted(set(table) - set(self.slots)):
            raise PlanError(f"{self.place}.table: {unknown[0]!r} is not a slot of the expression: {', '.join(self.slots)}")
        if twice := sorted(set(table) & set(self.draws)):
            raise PlanError(f"{self.place}.conditions.{twice[0]}: stands in the table too")
        if missing := [s for s in self.slots if s not in table and s not in self.draws]:
            raise PlanError(f"{self.place}.conditions.{missing[0]}: is missing, and the table has no such column")
        self.columns = {slot: self._values(slot, values, "table") for slot, values in table.items()}
        self.cells = math.prod(len(d.grid) for d in self.draws.values() if d.grid is not None)
        self.values = {slot: self._values(slot, given, name) for slot, draw in self.draws.items()
                       for name in ("grid", "choice", "value") if (given := _listed(draw, name)) is not None}
        for slot, draw in self.draws.items():
            if draw.uniform is not None:
                self._check_width(slot, len(draw.uniform.low), "uniform")
            if draw.normal is not None:
                self._check_width(slot, len(draw.normal.mean), "normal")
        keys = {slot: zlib.crc32(slot.encode()) for slot in self.draws}
        if len(set(keys.values())) < len(keys):
            raise PlanError(f"{self.place}.conditions: the CRC-32 of two slots' names collide; rename one of {', '.join(keys)}")
        self.steps = keys

    def _check_width(self, slot: str, width: int, what: str) -> None:
        family = self.families[slot]
        want = family.condition_dim if isinstance(family, Family) else None
        if want is not None and width != want:
            raise PlanError(f"{self.place}.conditions.{slot}.{what}: must have {want} number(s) for {family.name!r}, got {width}")

    def _values(self, slot: str, given: list, what: str) -> tuple[Tensor, list[str | None]]:
        """Vectors `[V, C]`, and the label of each that was given by one."""
        family, vectors = self.families[slot], []
        for value in given:
            if isinstance(value, str):
                labels = family.labels if isinstance(family, Family) else {}
                if value not in labels:
                    allowed = f"one of {', '.join(labels)}, or numbers" if labels else "numbers: the model has no labels"
                    raise PlanError(f"{self.place}.conditions.{slot}.{what}: must be {allowed}, got {value!r}")
                value = labels[value]
            vectors.append([float(value)] if isinstance(value, (int, float)) else [float(v) for v in value])
        if len(widths := {len(v) for v in vectors}) != 1:
            raise PlanError(f"{self.place}.conditions.{slot}.{what}: vectors must have one length, got {sorted(widths)}")
        self._check_width(slot, len(vectors[0]), what)
        return torch.tensor(vectors, dtype=torch.float32), [v if isinstance(v, str) else None for v in given]

    def rows(self, ids: Tensor) -> tuple[dict[str, Tensor], dict[str, list[str | None]]]:
        """Vectors `[B, C]` and labels (of slots that have some) of the samples with these ids, int64 `[B]`."""
        vectors, labels, stride = {}, {}, self.cells
        local = ids - self.offset
        picks: dict[str, Tensor] = {}
        for slot, draw in self.draws.items():
            if draw.grid is not None:
                stride //= len(draw.grid)
                picks[slot] = local % self.cells // stride % len(draw.grid)
            elif draw.choice is not None:
                picks[slot] = self._chosen(slot, draw, ids)
            elif draw.value is not None:
                picks[slot] = torch.zeros_like(ids)
        for slot in self.slots:
            if slot in self.columns:
                known, which = self.columns[slot], local % len(self.columns[slot][0])
            elif slot in picks:
                known, which = self.values[slot], picks[slot]
            else:
                vectors[slot] = self._drawn(slot, self.draws[slot], ids)
                continue
            vectors[slot] = known[0][which]
            if any(label is not None for label in known[1]):
                labels[slot] = np.array(known[1], dtype=object)[which.numpy()].tolist()
        return vectors, labels

    def _chosen(self, slot: str, draw: Draw, ids: Tensor) -> Tensor:
        weights = torch.tensor(draw.weights or [1.0] * len(draw.choice), dtype=torch.float64)
        edges = weights.cumsum(0) / weights.sum()
        last = int(torch.nonzero(weights).max())
        u = rng.uniform((1,), ids, seed=self.seed, step=self.steps[slot], stream=rng.USER)[:, 0].double()
        return torch.searchsorted(edges, u, right=True).clamp_max(last)

    def _drawn(self, slot: str, draw: Draw, ids: Tensor) -> Tensor:
        where = {"seed": self.seed, "step": self.steps[slot], "stream": rng.USER}
        if draw.uniform is not None:
            low, high = torch.tensor(draw.uniform.low), torch.tensor(draw.uniform.high)
            return low + (high - low) * rng.uniform(tuple(low.shape), ids, **where)
        mean = torch.tensor(draw.normal.mean)
        found = mean + draw.normal.std * rng.normal(tuple(mean.shape), ids, **where)
        low, high = draw.normal.low, draw.normal.high
        return found if low is None and high is None else found.clamp(low, high)


def _listed(draw: Draw, name: str) -> list | None:
    given = getattr(draw, name)
    return [given] if name == "value" and given is not None else given


def _table(table: str | list[dict], base: Path, place: str) -> dict[str, list]:
    """A table of conditions as columns: rows of the plan, or a .csv, .jsonl or .parquet file."""
    if isinstance(table, list):
        rows = table
    else:
        path = base / table
        readers = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
        try:
            rows = readers[path.suffix](path)
        except (OSError, ValueError) as error:
            raise PlanError(f"{place}.table: {path}: {error}") from None
    if not rows:
        raise PlanError(f"{place}.table: has no rows")
    names = list(rows[0])
    if ragged := next((i for i, row in enumerate(rows) if set(row) != set(names)), None):
        raise PlanError(f"{place}.table: row {ragged} has {', '.join(rows[ragged])}, the first has {', '.join(names)}")
    for number, row in enumerate(rows, 1):
        for name in names:
            value = row.get(name)
            numbers = value if isinstance(value, list) else [value]
            if value is None or any(v is None or (isinstance(v, float) and not math.isfinite(v)) for v in numbers):
                raise PlanError(f"{place}.table: row {number}, {name!r} must be a label or finite numbers, got {value!r}")
    return {name: [row[name] for row in rows] for name in names}


def _read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def _read_parquet(path: Path) -> list[dict]:
    import pyarrow.parquet as pq
    return pq.read_table(path).to_pylist()


def _read_csv(path: Path) -> list[dict]:
    """Columns `c` of labels or numbers; the numbers of a vector stand in columns `p.0`, `p.1`, ..."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    read = []
    for number, row in enumerate(rows, 1):
        out: dict = {}
        vectors: dict[str, dict[int, float]] = {}
        for key, text in row.items():
            if key is None or text is None:
                raise ValueError(f"row {number} has {'more' if key is None else 'fewer'} cells than the heading")
            name, dot, place = key.rpartition(".")
            if not (dot and place.isdigit()):
                out[key] = _number_or_label(text)
                continue
            try:
                vectors.setdefault(name, {})[int(place)] = float(text)
            except ValueError:
                raise ValueError(f"row {number}, {key} must be a number, got {text!r}") from None
        for name, numbers in vectors.items():
            if sorted(numbers) != list(range(len(numbers))):
                raise ValueError(f"the columns of {name!r} must be {name}.0, {name}.1, ..., got {sorted(numbers)}")
            out[name] = [numbers[k] for k in range(len(numbers))]
        read.append(out)
    return read


def _number_or_label(text: str):
    try:
        return float(text)
    except (TypeError, ValueError):
        return text
