"""A checked plan: which sample ids belong to which composition and shard, and what identifies the data set."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from ..expressions import ExpressionError, parse
from . import models, sampler
from .spec import PlanError, Spec, check, read

FORMAT = "ebmfast-dataset-1"
BATCH_BYTES = 8 << 20  # of a micro-batch's gradients, where the plan does not say its size
MOST_BATCH = 4096
TABLES = (".csv", ".jsonl", ".parquet")
ROW_GROUP_BYTES = 1 << 20


@dataclass(frozen=True)
class Shard:
    """Samples `start` to `start + count - 1`, all of composition number `composition`."""

    index: int
    composition: int
    start: int
    count: int


@dataclass
class DatasetPlan:
    """A plan with its defaults resolved; it pickles, so that workers get it whole.

    Sample ids are chain ids: composition j has the ids from `offsets[j]` on. A shard holds samples of one composition.
    """

    spec: Spec
    base: Path  # what paths in the plan are relative to
    source: str = ""  # the file as it was written
    hashes: dict = field(default_factory=dict)  # of weights and tables
    shape: tuple[int, ...] = ()
    batch_size: int = 0
    leaves: tuple[str, ...] = ()  # of all compositions, as they are sampled
    slots: tuple[str, ...] = ()

    def __post_init__(self):
        spec = self.spec
        count = len(spec.compositions)
        self.counts = [c.n if c.n is not None else spec.n // count + (i < spec.n % count)
                       for i, c in enumerate(spec.compositions)]
        self.names = [c.name or c.expression for c in spec.compositions]
        self.offsets = [sum(self.counts[:i]) for i in range(count)]
        per = [-(-n // spec.shard_size) for n in self.counts]
        self._first = [sum(per[:i]) for i in range(count)]
        self.shards = sum(per)
        self.n = sum(self.counts)

    def shard(self, index: int) -> Shard:
        """Shard number `index`."""
        if not 0 <= index < self.shards:
            raise ValueError(f"`index` must be a shard, 0 to {self.shards - 1}, got {index}")
        j = max(i for i, first in enumerate(self._first) if first <= index and self.counts[i])
        done = (index - self._first[j]) * self.spec.shard_size
        return Shard(index, j, self.offsets[j] + done, min(self.spec.shard_size, self.counts[j] - done))

    @property
    def image(self) -> bool:
        """Whether samples are pictures, [1, H, W] or [3, H, W]."""
        return len(self.shape) == 3 and self.shape[0] in (1, 3)

    @property
    def storage(self) -> str:
        """How samples are stored: png, uint8, float32 or float16."""
        chosen = self.spec.output.x
        return ("png" if self.image else "float32") if chosen == "auto" else chosen

    @property
    def row_group_size(self) -> int:
        """Rows that a reader of Parquet takes at once."""
        if self.spec.output.row_group_size is not None:
            return self.spec.output.row_group_size
        width = {"png": 1, "uint8": 1, "float16": 2, "float32": 4}[self.storage]
        return max(1, min(self.spec.shard_size, ROW_GROUP_BYTES // (math.prod(self.shape) * width)))

    def identity(self) -> dict:
        """All that decides the bytes, as JSON data."""
        said = self.spec.model_dump(mode="json")
        said["run"]["batch_size"], said["shape"] = self.batch_size, list(self.shape)
        said["output"] |= {"x": self.storage, "row_group_size": self.row_group_size}
        columns = {"leaves": list(self.leaves), "slots": list(self.slots)}
        return {"format": FORMAT, "plan": said, "hashes": self.hashes, "columns": columns}

    def text(self) -> str:
        """`identity` as canonical text, the contents of plan.json. Keys are not sorted: the order of grids decides cells."""
        return json.dumps(self.identity(), indent=1) + "\n"

    @property
    def digest(self) -> str:
        """The sha256 of `text`."""
        return hashlib.sha256(self.text().encode()).hexdigest()

    def difference(self, other: str) -> str:
        """The lines in which `other`, a plan.json, differs from this plan."""
        names = {"fromfile": "the folder's plan", "tofile": "this plan"}
        lines = difflib.unified_diff(other.splitlines(), self.text().splitlines(), n=1, lineterm="", **names)
        return "\n".join(line for line in lines if not line.startswith("@@"))


def load(path: str | Path) -> DatasetPlan:
    """Read and check a plan file; raises `PlanError`."""
    path = Path(path)
    return resolve(read(path), path.resolve().parent, path.read_text(encoding="utf-8"))


def from_data(data: dict, base: str | Path = ".") -> DatasetPlan:
    """A plan given as a mapping, as in TOML; paths in it are relative to `base`."""
    return resolve(check(data), Path(base).resolve(), json.dumps(data, indent=2))


def from_identity(text: str, base: str | Path, source: str = "") -> DatasetPlan:
    """The plan that `DatasetPlan.text` wrote, as it was then: no model is loaded, no file is hashed."""
    said = json.loads(text)
    if said.get("format") != FORMAT:
        raise PlanError(f"plan.json: its format is {said.get('format')!r}, not {FORMAT!r}")
    spec, columns = check(said["plan"], "plan.json"), said["columns"]
    return DatasetPlan(spec, Path(base), source, said["hashes"], tuple(spec.shape), spec.run.batch_size,
                       tuple(columns["leaves"]), tuple(columns["slots"]))


def again(plan: DatasetPlan) -> DatasetPlan:
    """A plan that was read back, resolved anew: models and tables may have changed since."""
    return resolve(plan.spec, plan.base, plan.source)


def resolve(spec: Spec, base: Path, source: str = "") -> DatasetPlan:
    """Defaults filled in, names and files looked up, every expression parsed."""
    known = models.references(spec)
    names = [c.name or c.expression for c in spec.compositions]
    if doubled := next((n for n in names if names.count(n) > 1), None):
        raise PlanError(f"compositions: names must differ, got {doubled!r} twice; give one of them another `name`")
    used: set[str] = {f.classifier for f in spec.filters if f.classifier}
    leaves: list[tuple[str, ...]] = []
    slots: dict[str, None] = {}
    loaded: dict = {}
    for i, composition in enumerate(spec.compositions):
        written, expression = sampled(spec, i, known, base, loaded)[:2]
        _check_slots(composition, i, written)
        leaves.append(leaf_names(expression))
        slots |= dict.fromkeys(expression.slots)
    used |= set(loaded)
    for f, rule in enumerate(spec.filters):
        if unknown := [n for n in rule.compositions or [] if n not in names]:
            raise PlanError(f"filters[{f}].compositions: must be names of compositions, {', '.join(names)}, got {unknown[0]!r}")
    shapes = set()
    for name in sorted(used):
        about = models.card_of(name, known[name], base)
        if about is not None and "shape" in about:
            shapes.add(tuple(about["shape"]))
    if spec.shape is not None:
        shape = tuple(spec.shape)
    elif len(shapes) == 1:
        shape = shapes.pop()
    else:
        raise PlanError(f"shape: is missing, and the models' cards give {sorted(shapes) or 'none'}; write shape = [3, 32, 32]")
    hashes = {"models": {n: found for n in sorted(used) if (found := models.fingerprint(n, known[n], base))}}
    tables = {c.table: hashlib.sha256(_table_bytes(base, c.table, i)).hexdigest()
              for i, c in enumerate(spec.compositions) if isinstance(c.table, str)}
    if tables:
        hashes["tables"] = tables
    most = max(1, min(MOST_BATCH, BATCH_BYTES // (4 * math.prod(shape) * max(map(len, leaves)))))
    size = spec.run.batch_size or -(-spec.shard_size // -(-spec.shard_size // most))  # equal parts of a shard: little is padded
    columns = tuple(dict.fromkeys(name for names in leaves for name in names))
    plan = DatasetPlan(spec, base, source, hashes, shape, size, columns, tuple(slots))
    if plan.storage in ("png", "uint8") and not plan.image:
        raise PlanError(f"output.x: {plan.storage} needs images, shape [3, H, W] or [1, H, W], got shape {list(shape)}")
    return plan


def _table_bytes(base: Path, name: str, i: int) -> bytes:
    if not name.endswith(TABLES):
        raise PlanError(f"compositions[{i}].table: must end in {', '.join(TABLES)}, got {name!r}")
    try:
        return (base / name).read_bytes()
    except OSError as error:
        raise PlanError(f"compositions[{i}].table: {error}") from None


def sampled(spec: Spec, i: int, known: dict, base: Path, loaded: dict):
    """Composition number `i`: as it is written, as it is sampled (priors counted), its sampler, and steps.

    Models that it names are loaded once, into `loaded`.
    """

    class Named(dict):
        def __contains__(self, name):
            return name in known

        def __iter__(self):
            return iter(known)

        def __getitem__(self, name):
            if name not in loaded:
                loaded[name] = models.load(name, known[name], base, spec.seed)
            return loaded[name]

    try:
        written = parse(spec.compositions[i].expression, Named(known))
    except ExpressionError as error:
        raise PlanError(f"compositions[{i}].expression: {error}") from None
    named = {leaf.family.name for leaf in written.leaves if leaf.family is not None}
    cards = {n: card for n in sorted(named) if n in known and (card := models.card_of(n, known[n], base))}
    return written, *sampler.prepare(spec, i, written, cards)


def leaf_names(expression) -> tuple[str, ...]:
    """Names of an expression's leaves, as columns: a name that comes twice gets a number."""
    found: list[str] = []
    for leaf in expression.leaves:
        count = sum(name == leaf.name or name.startswith(f"{leaf.name} #") for name in found)
        found.append(f"{leaf.name} #{count + 1}" if count else leaf.name)
    return tuple(found)


def _check_slots(composition, i: int, expression) -> None:
    rows = composition.table if isinstance(composition.table, list) else []
    given = set(composition.conditions) | {k for row in rows for k in row}
    if unknown := sorted(given - set(expression.slots)):
        raise PlanError(
            f"compositions[{i}]: {unknown[0]!r} is not a slot of the expression, which has {', '.join(expression.slots) or 'none'}"
            f" (write model[Slot({unknown[0]!r})])")
    missing = [s for s in expression.slots if s not in given]
    if missing and not isinstance(composition.table, str):
        raise PlanError(f"compositions[{i}].conditions.{missing[0]}: is missing; the slot needs a grid, choice, uniform, normal,"
                        " value, or a column of a table")
