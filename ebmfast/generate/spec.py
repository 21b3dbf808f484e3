"""What a plan file may say: one model per table, checked by pydantic; the JSON schema comes from the same models."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

try:
    from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
except ImportError as error:
    raise ImportError(f'data sets need pydantic and pyarrow: pip install "ebmfast[generate]" ({error})') from None

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Vector = list[float]
Value = str | float | list[float]


class PlanError(ValueError):
    """A plan that cannot be run; the message names the key, the value and what is allowed."""


class Table(BaseModel):
    """A table of a plan: no other keys, no silent conversions, no infinities."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Uniform(Table):
    """Independent uniforms between `low` and `high`, per number of the condition."""

    low: Vector
    high: Vector

    @model_validator(mode="after")
    def _ordered(self):
        if len(self.low) != len(self.high) or any(a > b for a, b in zip(self.low, self.high)):
            raise ValueError(f"`low` and `high` must have one length, and low <= high, got {self.low} and {self.high}")
        return self


class Normal(Table):
    """Independent normals, per number of the condition, clipped to `low` and `high` where they are given."""

    mean: Vector
    std: float = Field(ge=0)
    low: float | None = None
    high: float | None = None


class Draw(Table):
    """Where the condition of a slot comes from: exactly one of `grid`, `choice`, `uniform`, `normal`, `value`.

    Values are labels of the slot's model, numbers, or vectors.
    """

    grid: list[Value] | None = Field(None, min_length=1, description="one axis of the product over all grids of the composition")
    choice: list[Value] | None = Field(None, min_length=1, description="one of these at random, per sample")
    weights: list[float] | None = Field(None, description="relative probabilities of `choice`")
    uniform: Uniform | None = None
    normal: Normal | None = None
    value: Value | None = Field(None, description="the same for every sample")

    @model_validator(mode="after")
    def _one(self):
        given = [k for k in ("grid", "choice", "uniform", "normal", "value") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(f"needs exactly one of grid, choice, uniform, normal, value, got {' and '.join(given) or 'none'}")
        if self.weights is not None:
            if self.choice is None or len(self.weights) != len(self.choice):
                raise ValueError("`weights` must have one entry for each of `choice`")
            if min(self.weights) < 0 or sum(self.weights) <= 0:
                raise ValueError(f"`weights` must not be negative, and not all 0, got {self.weights}")
        return self


class Composition(Table):
    """One expression, and how many samples of it under which conditions."""

    expression: str = Field(description="as in `ebmfast sample`; Slot('c') leaves a condition open")
    name: str | None = Field(None, description="as it stands in the data set; by default the expression")
    n: Count | None = Field(None, description="samples of this composition")
    prior: Literal["auto", "none"] = Field("auto", description="auto: counted once, as the models' cards say; none: a plain sum")
    conditions: dict[str, Draw] = Field(default_factory=dict, description="by slot")
    table: str | list[dict[str, Value]] | None = Field(
        None, min_length=1, description="rows of conditions, or a .csv, .jsonl or .parquet file: sample i takes row i modulo rows")


class Model(Table):
    """A model that expressions and filters can name: one of `zoo`, `card`, `factory`."""

    zoo: str | None = Field(None, description="a bundled model")
    card: str | None = Field(None, description="NAME.json beside NAME.safetensors, as `ebmfast train` writes them")
    factory: str | None = Field(None, pattern=r"^[\w.]+:\w+$", description="module:function or class; imported, so it runs code")
    arguments: dict[str, Any] = Field(default_factory=dict, description="of the factory")
    weights: str | None = Field(None, description="safetensors for what the factory returns")
    labels: dict[str, Vector] | None = None
    condition_dim: Count | None = None
    unconditional: bool = False
    data_range: Vector | None = Field(None, min_length=2, max_length=2)
    sigma: Vector | None = Field(None, min_length=2, max_length=2)
    negation_alpha: float | None = Field(None, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _short(cls, data):
        """`"zoo:color"` is short for `{zoo = "color"}`, `"module:name"` for `{factory = "module:name"}`."""
        if isinstance(data, str):
            kind, _, name = data.partition(":")
            return {"zoo": name} if kind == "zoo" else {"factory": data}
        return data

    @model_validator(mode="after")
    def _one(self):
        given = [k for k in ("zoo", "card", "factory") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(f"needs exactly one of zoo, card, factory, got {' and '.join(given) or 'none'}")
        extra = [k for k, field in type(self).model_fields.items()
                 if k not in ("zoo", "card") and getattr(self, k) != field.get_default(call_default_factory=True)]
        if self.factory is None and extra:
            raise ValueError(f"{', '.join(extra)} belong to a factory; the card of a {given[0]} model says them")
        return self


class Ramp(Table):
    """A schedule over the steps, from `start` to `stop`, in equal differences or equal ratios."""

    start: Positive
    stop: Positive
    spacing: Literal["linear", "geometric"] = "geometric"

    def values(self, steps: int) -> list[float]:
        """One value per step."""
        t = [i / max(steps - 1, 1) for i in range(steps)]
        if self.spacing == "linear":
            return [self.start + (self.stop - self.start) * u for u in t]
        return [self.start * (self.stop / self.start) ** u for u in t]


Schedule = Positive | list[Positive] | Ramp


class Recommended(Table):
    """The sampler that the first model's card names; the keys change parts of it."""

    kind: Literal["recommended"] = "recommended"
    levels: Count | None = None
    steps_per_level: Count | None = None
    drift: Positive | None = None


class LangevinTable(Table):
    """`ef.Langevin`: `step_size` and `temperature`, or `drift` and `noise`."""

    kind: Literal["langevin"]
    steps: int = Field(ge=0)
    step_size: Schedule | None = None
    temperature: float | None = Field(None, ge=0)
    drift: Schedule | None = None
    noise: Schedule | None = None
    noise_first: bool = False
    clamp: Vector | None = Field(None, min_length=2, max_length=2)
    grad_clip_norm: Positive | None = None
    grad_clip_value: Positive | None = None


class Warmup(Table):
    """`ef.DualAveraging`."""

    steps: Count
    target: float | None = Field(None, gt=0, lt=1)


class MALATable(Table):
    """`ef.MALA`."""

    kind: Literal["mala"]
    steps: int = Field(ge=0)
    step_size: Schedule
    temperature: Positive = 1.0
    bounds: Vector | None = Field(None, min_length=2, max_length=2)
    grad_clip_norm: Positive | None = None
    grad_clip_value: Positive | None = None
    warmup: Warmup | None = None


class HMCTable(Table):
    """`ef.HMC`."""

    kind: Literal["hmc"]
    steps: int = Field(ge=0)
    step_size: Schedule
    n_leapfrog_steps: Count = 10
    mass: Positive = 1.0
    temperature: Positive = 1.0
    bounds: Vector | None = Field(None, min_length=2, max_length=2)
    warmup: Warmup | None = None


class BAOABTable(Table):
    """`ef.BAOAB`."""

    kind: Literal["baoab"]
    steps: int = Field(ge=0)
    step_size: Schedule
    friction: Positive = 1.0
    mass: Positive = 1.0
    temperature: Positive = 1.0


class Inner(Table):
    """The sampler inside `annealed`, without a step size."""

    kind: Literal["langevin", "mala", "hmc", "baoab"] = "langevin"
    temperature: float | None = Field(None, ge=0)
    clamp: Vector | None = Field(None, min_length=2, max_length=2)
    bounds: Vector | None = Field(None, min_length=2, max_length=2)
    grad_clip_norm: Positive | None = None
    grad_clip_value: Positive | None = None
    n_leapfrog_steps: Count | None = None
    mass: Positive | None = None
    friction: Positive | None = None


class AnnealedTable(Table):
    """`ef.Annealed`: `sigmas`, or `levels` of them in equal ratios from `sigma_max` to `sigma_min`."""

    kind: Literal["annealed"]
    sigmas: list[Positive] | None = Field(None, min_length=1)
    sigma_max: Positive | None = None
    sigma_min: Positive | None = None
    levels: Count | None = None
    steps_per_level: Count = 6
    drift: Positive = 0.3
    denoise: bool = True
    inner: Inner = Inner()

    @model_validator(mode="after")
    def _levels(self):
        ladder = [self.sigma_max, self.sigma_min, self.levels]
        if (self.sigmas is None) == any(v is None for v in ladder) or (self.sigmas and any(v is not None for v in ladder)):
            raise ValueError("needs either sigmas, or all of sigma_max, sigma_min and levels")
        return self


SAMPLERS = {"recommended": Recommended, "langevin": LangevinTable, "mala": MALATable, "hmc": HMCTable, "baoab": BAOABTable,
            "annealed": AnnealedTable}
Sampler = Annotated[
    Recommended | LangevinTable | MALATable | HMCTable | BAOABTable | AnnealedTable, Field(discriminator="kind")]


class Run(Table):
    """What decides the kernels, and so the bits: the same for every worker."""

    batch_size: Count | None = Field(None, description="samples per micro-batch; the last one is padded")
    threads: Count = Field(1, description="threads per worker")
    device: Literal["cpu", "cuda"] = "cpu"
    backend: str = "auto"
    engine: Literal["auto", "step", "chain"] = "auto"
    compute_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    channels_last: bool = False
    stack_models: bool = False
    branches: Literal["draw"] | None = None
    init: Literal["uniform", "normal"] | None = None
    allow_improper: bool = False


class Filter(Table):
    """A sample is kept if a number is within `min` and `max`: an energy, a leaf's, or a classifier's verdict.

    Of a verdict `[B, C]`, `column` chooses; `equals` asks that its greatest entry is that of a slot (or has that index),
    `near` that every number is within `within` of a slot's.
    """

    energy: Literal["total"] | None = None
    leaf: str | None = Field(None, description="a leaf of the composition, as `--dry-run` lists them")
    classifier: str | None = Field(None, description="one of [models], or zoo:NAME")
    output: str | None = Field(None, description="which of the classifier's outputs, where it returns several by name")
    column: int | None = Field(None, ge=0)
    min: float | None = None
    max: float | None = None
    equals: str | int | None = Field(None, description="a slot, or an index")
    near: str | None = Field(None, description="a slot")
    within: float | None = Field(None, gt=0)
    compositions: list[str] | None = Field(None, description="names of those it applies to; by default all")

    @model_validator(mode="after")
    def _one(self):
        given = [k for k in ("energy", "leaf", "classifier") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(f"needs exactly one of energy, leaf, classifier, got {' and '.join(given) or 'none'}")
        if self.classifier is None and any(getattr(self, k) is not None for k in ("output", "column", "equals", "near", "within")):
            raise ValueError("output, column, equals, near and within belong to a classifier")
        if (self.near is None) != (self.within is None):
            raise ValueError("`near` and `within` belong together")
        tests = [self.min is not None or self.max is not None, self.equals is not None, self.near is not None]
        if sum(tests) != 1:
            raise ValueError("needs one test: min or max or both, or equals, or near with within")
        return self


class Output(Table):
    """What is written, and how."""

    format: Literal["parquet", "webdataset"] = "parquet"
    x: Literal["auto", "png", "uint8", "float32", "float16"] = Field(
        "auto", description="how samples are stored; auto: png for images, else float32")
    data_range: Vector | None = Field(
        None, min_length=2, max_length=2, description="black and white of images; by default the models'")
    energy: bool = True
    leaf_energies: bool = True
    conditions: bool = True
    row_group_size: Count | None = Field(None, description="rows that Parquet readers take at once")


class Spec(Table):
    """A plan: what to sample, how, and what to write."""

    n: Count | None = Field(None, description="samples, shared evenly by the compositions")
    seed: int = Field(0, ge=0, lt=1 << 64)
    shard_size: Count = Field(description="samples per shard, before filters")
    shape: list[Count] | None = Field(None, description="of one sample; by default that of the models' cards")
    models: dict[str, Model] = Field(default_factory=dict, description="by name; bundled models need no entry")
    compositions: list[Composition] = Field(min_length=1)
    sampler: Sampler = Field(default_factory=Recommended)
    run: Run = Run()
    filters: list[Filter] = Field(default_factory=list)
    output: Output = Output()

    @model_validator(mode="after")
    def _counts(self):
        own = [c.n is not None for c in self.compositions]
        if self.n is None and not all(own):
            raise ValueError("needs `n` at the top, or in every composition")
        if self.n is not None and any(own):
            raise ValueError("`n` stands at the top or in the compositions, not both")
        return self


def schema() -> dict:
    """The JSON schema of plan files."""
    return Spec.model_json_schema() | {"title": "ebmfast generate plan"}


def read(path: str | Path) -> Spec:
    """The plan in a TOML (or JSON) file.

    Raises:
        FileNotFoundError: there is no such file.
        PlanError: it is not a plan; every wrong key is named, with its value and what is allowed.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".json":
            import json
            data = json.loads(text)
        else:
            data = tomllib.loads(text)
    except ValueError as error:
        raise PlanError(f"{path}: not a {path.suffix.lstrip('.').upper() or 'TOML'} file: {error}") from None
    return check(data, str(path))


def check(data: dict, source: str = "plan") -> Spec:
    """A mapping as a `Spec`; raises `PlanError`."""
    if not isinstance(data, dict):
        raise PlanError(f"{source}: a plan must be a table of keys, got {type(data).__name__}")
    if isinstance(sampler := data.get("sampler"), dict) and "kind" not in sampler:
        data = data | {"sampler": {"kind": "recommended"} | sampler}
    try:
        return Spec.model_validate(data)
    except ValidationError as error:
        lines = [f"  {_message(e)}" for e in _distinct(error.errors(include_url=False))]
        raise PlanError(f"{source} is not a plan:\n" + "\n".join(lines)) from None


def _distinct(errors: list[dict]) -> list[dict]:
    """One error for each place: of the members of a union, what fits none of them is said once."""
    found: dict[tuple, list[dict]] = {}
    for error in errors:
        found.setdefault(tuple(p for p in error["loc"] if not _is_member(p)), []).append(error)
    places = list(found)
    kept = []
    for place, same in found.items():
        inner = any(len(p) > len(place) and p[:len(place)] == place for p in places)
        if not (inner and same[0]["type"].endswith("_type")):
            kept.append({**same[0], "loc": place, "kinds": same[0]["loc"], "alternatives": same})
    return kept


MEMBERS = {"recommended", "langevin", "mala", "hmc", "baoab", "annealed", "Ramp", "str", "float", "int"}


def _is_member(part) -> bool:
    """Whether a part of a location names a member of a union, not a key: pydantic mixes the two."""
    return isinstance(part, str) and (part in MEMBERS or "[" in part or part.startswith("constrained-"))


def _message(error: dict) -> str:
    place = _place(error["loc"])
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        allowed = _keys_at(error["loc"][:-1], error["kinds"])
        near = difflib.get_close_matches(str(error["loc"][-1]), allowed, n=1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        return f"{place}: no such key{meant}; allowed are {', '.join(allowed)}"
    if kind == "missing":
        return f"{place}: is missing"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return f"{place}.kind: must be one of {context.get('expected_tags', '')}, got {context.get('tag', 'none')!r}"
    if kind in ("value_error", "assertion_error"):
        return f"{place or 'the plan'}: {context.get('error', error['msg'])}"
    wants = list(dict.fromkeys(_want(e) for e in error.get("alternatives", [error])))
    return f"{place}: must be {' or '.join(wants)}, got {error['input']!r}"


NOUNS = {"int": "an integer", "float": "a number", "string": "a text", "bool": "true or false", "list": "a list", "dict": "a table",
         "model": "a table", "finite": "a finite number"}


def _want(error: dict) -> str:
    context, kind = error.get("ctx", {}), error["type"]
    match kind:
        case "literal_error":
            return f"one of {context['expected']}"
        case "greater_than_equal":
            return f"at least {context['ge']}"
        case "greater_than":
            return f"greater than {context['gt']:g}"
        case "less_than":
            return f"less than {context['lt']}"
        case "string_pattern_mismatch":
            return 'of the form "zoo:name" or "module:function"'
        case "too_short":
            return f"at least {context['min_length']} long"
        case "too_long":
            return f"at most {context['max_length']} long"
    return NOUNS.get(kind.split("_")[0], error["msg"])


def _place(loc: tuple) -> str:
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _keys_at(loc: tuple, kinds: tuple) -> list[str]:
    """The keys that a table of the plan may have, by its place; `kinds` has the kind of sampler in it."""
    names = {(): Spec, ("compositions",): Composition, ("compositions", "conditions"): Draw, ("models",): Model,
             ("run",): Run, ("filters",): Filter, ("output",): Output, ("sampler", "warmup"): Warmup, ("sampler", "inner"): Inner,
             ("compositions", "conditions", "uniform"): Uniform, ("compositions", "conditions", "normal"): Normal}
    path = tuple(p for p in loc if not isinstance(p, int))
    if path[:1] == ("models",):
        path = path[:1]
    if path[:2] == ("compositions", "conditions"):
        path = path[:2] + path[3:]
    if path == ("sampler",):
        return list(SAMPLERS[kinds[1]].model_fields)
    return list(names[path].model_fields) if path in names else []
