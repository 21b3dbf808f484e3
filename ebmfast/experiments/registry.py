"""The experiments by name: rows, what is counted in each, the floors to reach, and the paper's own figures."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .tree import All, Any, Count, Is, Node, Not

POSITION, POSITION_2, COLOR, COLOR_2 = Is("position", "p"), Is("position", "q"), Is("color", "c"), Is("color", "d")
SHAPE, SHAPE_2, SIZE = Is("shape", "f"), Is("shape", "g"), Is("size", "s")


@dataclass(frozen=True)
class Row:
    """One composition.

    Args:
        title: as in the table.
        tree: what is composed, and what makes a sample right.
        columns: what is counted, by column title.
        floors: figures to reach, by column title: (">=" or "<=", value).
        pairs: whether shapes and colours asked for are pairs that training showed ("seen") or did not ("unseen").
    """

    title: str
    tree: Node
    columns: Mapping[str, Node]
    floors: Mapping[str, tuple[str, float]] = field(default_factory=dict)
    pairs: str = "seen"

    @property
    def free(self) -> tuple[str, ...]:
        """Attributes of a single object that the composition says nothing about."""
        if any(isinstance(c, Count) for c in self.columns.values()):
            return ()
        return tuple(a for a in ("position", "size", "shape", "color") if a not in self.tree.concepts)


@dataclass(frozen=True)
class Experiment:
    """One table.

    Args:
        title: its heading.
        rows: its compositions.
        models: the folder of models it needs ("zoo" where the bundled ones will do), as an option of `ebmfast evaluate`.
        reader: what reads the samples: "judge" or "counter".
        paper: figures of the paper on its own scenes: column titles, then rows.
        note: said below the table.
    """

    title: str
    rows: tuple[Row, ...]
    models: str = "zoo"
    reader: str = "judge"
    paper: tuple[tuple[str, ...], ...] = ()
    note: str = ""


def _all_right(*parts: Is, floors=None) -> Row:
    columns = {p.concept: p for p in parts} | ({"all": All(*parts)} if len(parts) > 1 else {})
    return Row(" AND ".join(p.concept for p in parts), All(*parts) if len(parts) > 1 else parts[0], columns, floors or {})


def _objects(count: int, floor: float) -> Row:
    tree = All(*(Is("position", f"p{k + 1}") for k in range(count)))
    words = {2: "two", 3: "three"}
    return Row(f"{words[count]} positions", tree, {"counted right": Count(count)}, {"counted right": (">=", floor)})


TABLE_1 = Experiment("Table 1: position and colour", (
    Row("color", COLOR, {"position": POSITION, "color": COLOR}),
    Row("position", POSITION, {"position": POSITION, "color": COLOR}),
    Row("position AND color", All(POSITION, COLOR), {"position": POSITION, "color": COLOR, "all": All(POSITION, COLOR)},
        {"position": (">=", 0.97), "color": (">=", 0.97)}),
    Row("position AND NOT color", All(POSITION, Not(COLOR)), {"position": POSITION, "color": COLOR},
        {"position": (">=", 0.97), "color": ("<=", 0.03)}),
    Row("NOT position AND color", All(COLOR, Not(POSITION)), {"position": POSITION, "color": COLOR},
        {"position": ("<=", 0.03), "color": (">=", 0.97)}),
), paper=(
    ("row", "position", "color"), ("color", ".128", ".997"), ("position", ".984", ".201"),
    ("position AND color", ".801", ".8125"), ("position AND NOT color", ".872", ".096"),
    ("NOT position AND color", ".033", ".971")),
    note="A negated concept's column is the share of samples that still show it. Rows of one concept count the other against a"
         " condition that was not asked for.")

OR = Experiment("Disjunction", (
    Row("position 1 OR position 2", Any(POSITION, POSITION_2),
        {"position 1": POSITION, "position 2": POSITION_2, "either": Any(POSITION, POSITION_2)},
        {"either": (">=", 0.97), "position 1": (">=", 0.42), "position 2": (">=", 0.42)}),
    Row("color 1 OR color 2", Any(COLOR, COLOR_2), {"color 1": COLOR, "color 2": COLOR_2, "either": Any(COLOR, COLOR_2)}),
    Row("shape 1 OR shape 2", Any(SHAPE, SHAPE_2), {"shape 1": SHAPE, "shape 2": SHAPE_2, "either": Any(SHAPE, SHAPE_2)}),
), paper=(("row", "position 1", "position 2"), ("position 1", ".875", "0"), ("position 2", "0", ".817"),
          ("position 1 OR position 2", ".432", ".413")))

_FIRST, _SECOND = All(POSITION, COLOR), All(POSITION_2, COLOR_2)
NESTED = Experiment("Nested compositions", (
    Row("(position 1 AND color 1) OR (position 2 AND color 2)", Any(_FIRST, _SECOND),
        {"pair 1": _FIRST, "pair 2": _SECOND, "either": Any(_FIRST, _SECOND)},
        {"either": (">=", 0.90), "pair 1": (">=", 0.35), "pair 2": (">=", 0.35)}),
    Row("(shape 1 AND color 1) OR (shape 2 AND color 2)", Any(All(SHAPE, COLOR), All(SHAPE_2, COLOR_2)),
        {"pair 1": All(SHAPE, COLOR), "pair 2": All(SHAPE_2, COLOR_2),
         "either": Any(All(SHAPE, COLOR), All(SHAPE_2, COLOR_2))}),
    Row("shape AND (color 1 OR color 2) AND NOT position", All(SHAPE, Any(COLOR, COLOR_2), Not(POSITION)),
        {"shape": SHAPE, "either color": Any(COLOR, COLOR_2), "position": POSITION,
         "all": All(SHAPE, Any(COLOR, COLOR_2), Not(POSITION))}),
))

CONCEPTS = Experiment("Single concepts", tuple(_all_right(c) for c in (POSITION, COLOR, SHAPE, SIZE)))
THREE = Experiment("Three concepts", (_all_right(SHAPE, COLOR, POSITION, floors={"all": (">=", 0.92)}),))
FOUR = Experiment("Four concepts", (_all_right(SHAPE, COLOR, POSITION, SIZE, floors={"all": (">=", 0.80)}),))

OBJECTS = Experiment("Several objects: one position model under several positions", (
    _objects(2, 0.85), _objects(3, 0.70)), models="objects", reader="counter",
    note="Counted by a network trained on clean renders of up to three objects: it cannot tell three from more.")

_NEW = "Each stage was trained with the models before it frozen; the newest model brings the prior."
CONTINUAL = Experiment("Table 2: continual learning", (
    Row("after position", POSITION, {"position": POSITION}),
    Row("after shape", All(SHAPE, POSITION), {"position": POSITION, "shape": SHAPE}),
    Row("after color", All(COLOR, SHAPE, POSITION), {"position": POSITION, "shape": SHAPE, "color": COLOR},
        {"position": (">=", 0.92), "shape": (">=", 0.88), "color": (">=", 0.92)}),
), models="continual", paper=(
    ("row", "position", "shape", "color"), ("EBM after position", ".901", "", ""), ("EBM after shape", ".813", ".743", ""),
    ("EBM after color", ".781", ".703", ".521"), ("GAN after position", ".941", "", ""), ("GAN after shape", ".111", ".977", ""),
    ("GAN after color", ".117", ".476", ".984")), note=_NEW)

_PAIR = All(SHAPE, COLOR)
_PAIR_COLUMNS = {"shape": SHAPE, "color": COLOR, "both": _PAIR}
UNSEEN = Experiment("Compositional generalisation: pairs of shape and colour", (
    Row("seen pairs", _PAIR, _PAIR_COLUMNS, pairs="seen"),
    Row("unseen pairs", _PAIR, _PAIR_COLUMNS, {"both": (">=", 0.85)}, pairs="unseen"),
), models="pairs", note="No training picture of any model shows an unseen pair.")

EXPERIMENTS: dict[str, Experiment] = {
    "table1": TABLE_1, "or": OR, "concepts": CONCEPTS, "three": THREE, "four": FOUR, "nested": NESTED, "objects": OBJECTS,
    "continual": CONTINUAL, "unseen": UNSEEN,
}
EVERYWHERE = {"object present": (">=", 0.98), "free attributes": ("<=", 0.10)}
