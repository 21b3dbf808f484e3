"""A table as Markdown and as JSON, and its picture."""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .. import images
from .measures import Cell
from .protocol import Scored

SHOWN = 16  # pictures in a row


@dataclass
class Table:
    """The lines of an experiment, and what made them.

    Attributes:
        name, title: of the experiment.
        columns: titles of its figures, in order.
        lines: who made what, and what is right of it.
        protocol: facts that all lines share.
        floors: (row, column, ">=" or "<=", value): what the samples should reach.
        paper: the paper's own figures: column titles, then rows.
        note: said below.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    lines: list[Scored]
    protocol: Mapping[str, object]
    floors: Sequence[tuple[str, str, str, float]] = ()
    paper: Sequence[Sequence[str]] = ()
    note: str = ""
    unit: str = ""
    ours: str = "score matching"
    reached: list = field(default_factory=list)

    def __post_init__(self):
        ours: dict[str, Scored] = {}
        for line in self.lines:  # the first of a row: another line may be by the same method
            if line.by == self.ours:
                ours.setdefault(line.row, line)
        for row, column, sign, value in self.floors:
            cell = ours[row].cells.get(column) if row in ours else None
            if cell is not None:
                fine = cell.value >= value if sign == ">=" else cell.value <= value
                self.reached.append((row, column, sign, value, cell.value, fine))

    def markdown(self) -> str:
        """The table for people."""
        tail = ("density", "T", "seconds")
        lines = [f"## {self.title}", "", self._protocol(), ""]
        made = [line for line in self.lines if line.cells]
        lines += _rows([("composition", "made by", *self.columns, *tail)] + [self._line(line) for line in made])
        notes: dict[tuple[str, str], list[str]] = {}
        for line in self.lines:
            if line.note:
                notes.setdefault((line.by, line.note), []).append(line.row)
        if notes:
            lines += ["", *(f"- {by}: {note}" + ("" if len(rows) == len({x.row for x in self.lines}) else f" ({', '.join(rows)})")
                            for (by, note), rows in notes.items())]
        if self.reached:
            lines += ["", "Floors:", *(f"- {row}, {column} {sign} {value:g}: {got:.3f}, {'reached' if fine else 'missed'}"
                                       for row, column, sign, value, got, fine in self.reached)]
        if self.note:
            lines += ["", self.note]
        if self.paper:
            lines += ["", "The paper's own figures, on its own scenes (another data set, 64x64):", "", *_rows(self.paper)]
        return "\n".join(lines) + "\n"

    def data(self) -> dict:
        """The table for programs."""
        return {
            "experiment": self.name, "title": self.title, "unit": self.unit, "protocol": dict(self.protocol),
            "lines": [{
                "row": line.row, "by": line.by, "density": line.density, "effective_temperature": line.temperature,
                "seconds": line.seconds, "note": line.note,
                "cells": {k: {f: v for f, v in vars(c).items() if v not in (None, "")} for k, c in line.cells.items()},
            } for line in self.lines],
            "floors": [dict(zip(("row", "column", "sign", "floor", "value", "reached"), r)) for r in self.reached],
            "paper": [list(row) for row in self.paper], "note": self.note,
        }

    def write(self, folder: str | Path) -> list[Path]:
        """NAME.md, NAME.json and, where there are pictures, NAME.png in a folder; their paths."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{self.name}.md", folder / f"{self.name}.json"]
        paths[0].write_text(self.markdown())
        paths[1].write_text(json.dumps(self.data(), indent=2) + "\n")
        drawn = [line for line in self.lines if line.pictures is not None and len(line.pictures)]
        if drawn:
            titles = [f"{line.row}, {line.by}: {_summary(line)}" for line in drawn]
            sheet = images.grid([line.pictures[:SHOWN] for line in drawn], titles, data_range=(-1, 1), scale=_scale(drawn))
            paths.append(folder / f"{self.name}.png")
            images.save(sheet, paths[-1], {"title": self.title, "protocol": json.dumps(dict(self.protocol))})
        return paths

    def _protocol(self) -> str:
        facts = "; ".join(f"{k} {v}" for k, v in self.protocol.items())
        return f"{facts}{f'; {self.unit}' if self.unit else ''}."

    def _line(self, line: Scored) -> tuple[str, ...]:
        heat = "" if line.temperature is None else f"{line.temperature:.2g}"
        seconds = "" if line.seconds is None else f"{line.seconds:.0f}"
        return (line.row, line.by, *(_cell(line.cells.get(c)) for c in self.columns), line.density, heat, seconds)


def _scale(drawn) -> int:
    return 3 if drawn[0].pictures.shape[-1] <= 32 else 2


def _summary(line: Scored) -> str:
    shown = [f"{name} {cell.value:.3f}" for name, cell in line.cells.items() if name not in ("kernel distance", "free attributes")]
    return ", ".join(shown)


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    if cell.low is not None:
        return f"{cell.value:.3f} [{cell.low:.3f}, {cell.high:.3f}]"
    if cell.about:
        return f"{cell.value:.3f} ({cell.about}; exact draws {cell.error:.2f})" if cell.error is not None else f"{cell.value:.3f}"
    return f"{cell.value:.3f}" + (f" ± {cell.error:.3f}" if cell.error is not None else "")


def _rows(rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, its columns aligned; a bar within a cell is escaped."""
    rows = [[v.replace("|", "\\|") for v in r] for r in rows]
    width = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    text = ["| " + " | ".join(v.ljust(w) for v, w in zip(r, width)) + " |" for r in rows]
    return [text[0], "|" + "|".join("-" * (w + 2) for w in width) + "|", *text[1:]]
