"""One shard's samples: a pure function of (plan, shard)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .. import sampling
from ..devices import Twin, with_models
from ..state import Interrupted
from . import models
from .conditions import Conditions
from .filters import Filters
from .plan import DatasetPlan, Shard, leaf_names, sampled
from .spec import PlanError


class Dropped(Exception):
    """The shard was given up because the run is to stop."""


@dataclass
class Flag:
    """A request to stop; samplers read it between steps."""

    requested: bool = False


@dataclass
class Rows:
    """The samples of a shard that are kept, and what became of the others.

    ids `[m]`, x `[m, *S]`, energy `[m]`, leaf_energies `[m, K]` (or None), conditions `{slot: [m, C]}`, labels `{slot: [m]}`.
    """

    shard: Shard
    name: str
    ids: Tensor
    x: Tensor
    energy: Tensor | None
    leaf_energies: Tensor | None
    leaves: list[str]
    conditions: dict[str, Tensor]
    labels: dict[str, list]
    data_range: tuple[float, float] | None
    quarantined: list[dict] = field(default_factory=list)
    rejected: list[dict] = field(default_factory=list)
    began: float = 0.0  # seconds since 1970
    seconds: float = 0.0


class Maker:
    """Samples shards of a plan on one device; models are loaded and runs are prepared once per composition."""

    def __init__(self, plan: DatasetPlan, device: str | None = None):
        self.plan, self.device = plan, device or plan.spec.run.device
        self._known = models.references(plan.spec)
        self._loaded: dict = {}
        self._prepared: dict[int, Prepared] = {}
        self._copies: dict[int, object] = {}  # of models, on a device that is not theirs

    def composition(self, number: int) -> Prepared:
        """What samples composition `number`."""
        if number not in self._prepared:
            self._prepared[number] = self._prepare(number)
        return self._prepared[number]

    def prepare_all(self) -> None:
        """Prepare every composition, so that what is wrong with a plan is seen before anything runs."""
        for number in range(len(self.plan.names)):
            self.composition(number)

    def _prepare(self, number: int) -> Prepared:
        plan, spec, run = self.plan, self.plan.spec, self.plan.spec.run
        _, expression, sampler, steps = sampled(spec, number, self._known, plan.base, self._loaded)
        if torch.device(self.device).type != "cpu":
            expression = with_models(expression, self._here)
        filters = Filters(spec, number, plan.names[number], expression, self._classifier, plan)
        wanted = spec.output.energy or spec.output.leaf_energies or filters.need_energies
        try:
            prepared = sampling.prepare(
                expression, sampler, shape=plan.shape, steps=steps, batch_size=plan.batch_size, device=self.device,
                compute_dtype=None if run.compute_dtype == "float32" else getattr(torch, run.compute_dtype),
                channels_last=run.channels_last, stack_models=run.stack_models, branches=run.branches, backend=run.backend,
                engine=run.engine, energies=wanted, on_nonfinite="freeze", allow_improper=run.allow_improper)
        except (ValueError, TypeError) as error:
            raise PlanError(f"compositions[{number}] ({plan.names[number]}): {error}") from None
        data_range = spec.output.data_range or prepared.plan.data_range or sampler.clamp
        if plan.storage in ("png", "uint8") and data_range is None:
            raise PlanError("output.data_range: is missing; it says which values are black and white, for instance [-1.0, 1.0]")
        rows = Conditions(spec.compositions[number], number, expression, plan.offsets[number], spec.seed, plan.base)
        return Prepared(prepared, rows, filters, tuple(data_range) if data_range else None)

    def _classifier(self, name: str) -> Callable:
        if name not in self._loaded:
            self._loaded[name] = models.load(name, self._known[name], self.plan.base, self.plan.spec.seed)
        return self._here(models.classifier(self._loaded[name]))

    def _here(self, model):
        """A model on this device: itself, or a copy."""
        if not isinstance(model, torch.nn.Module) or torch.device(self.device).type == "cpu":
            return model
        if id(model) not in self._copies:
            self._copies[id(model)] = Twin(model, torch.device(self.device)).copy
        return self._copies[id(model)]

    def sample(self, index: int, flag: Flag | None = None, on_batch: Callable[[int], None] | None = None,
               limit: int | None = None) -> Rows:
        """The rows of shard `index`; `on_batch` hears of every micro-batch how many of its samples belong to the shard.

        Raises `Dropped` once the flag is set. `limit` draws its first samples only.
        """
        shard, flag = self.plan.shard(index), flag or Flag()
        shard = shard if limit is None else replace(shard, count=min(limit, shard.count))
        prepared = self.composition(shard.composition)
        prepared.run.interrupt = lambda: nullcontext(flag)
        began, started, parts = time.time(), time.perf_counter(), []
        with fixed_kernels(self.plan.spec.run.threads):
            for first in range(0, shard.count, self.plan.batch_size):
                if flag.requested:
                    raise Dropped
                count = min(self.plan.batch_size, shard.count - first)
                parts.append(self._batch(prepared, shard.start + first, count))
                if on_batch is not None:
                    on_batch(count)
        return self._joined(shard, prepared, parts, began, time.perf_counter() - started)

    def _batch(self, prepared: Prepared, first: int, count: int) -> Batch:
        """A micro-batch, always of the plan's size: the chains that follow pad it, and are dropped."""
        ids = torch.arange(first, first + self.plan.batch_size)
        conditions, labels = prepared.conditions.rows(ids)
        try:
            result = prepared.run(len(ids), self.plan.spec.seed, conditions=conditions, first_chain=first,
                                  init=self.plan.spec.run.init, quick=False)
        except Interrupted:
            raise Dropped from None
        x = result.x.cpu()
        finite = torch.isfinite(x.flatten(1)).all(1) & (result.state.faults.cpu() == 0)
        energy, leaf_energies = result.energy, result.leaf_energies
        if energy is not None:
            energy, leaf_energies = energy.float().cpu(), leaf_energies.float().cpu()
            finite &= torch.isfinite(energy) & torch.isfinite(leaf_energies).all(1)
        blamed = {f.chain: f for f in result.report.faults}
        quarantined = [_blame(i, blamed.get(i)) for i in ids[:count][~finite[:count]].tolist()]
        keep, rejected = prepared.filters(ids, result.x, energy, leaf_energies, conditions, finite)
        keep[count:] = False
        for part in rejected:
            part["ids"] = [i for i in part["ids"] if i < first + count]
        picked = torch.nonzero(keep).flatten()
        return Batch(ids[picked], x[picked], energy if energy is None else energy[picked],
                     leaf_energies if leaf_energies is None else leaf_energies[picked],
                     {k: v[picked] for k, v in conditions.items()},
                     {k: [v[i] for i in picked.tolist()] if len(picked) < len(v) else v for k, v in labels.items()},
                     quarantined, [part for part in rejected if part["ids"]])

    def _joined(self, shard: Shard, prepared: Prepared, parts: list[Batch], began: float = 0.0, seconds: float = 0.0) -> Rows:
        def cat(pick):
            return None if pick(parts[0]) is None else torch.cat([pick(p) for p in parts])

        return Rows(
            shard, self.plan.names[shard.composition], cat(lambda p: p.ids), cat(lambda p: p.x), cat(lambda p: p.energy),
            cat(lambda p: p.leaf_energies), list(leaf_names(prepared.run.plan.expression)),
            {k: torch.cat([p.conditions[k] for p in parts]) for k in parts[0].conditions},
            {k: [label for p in parts for label in p.labels[k]] for k in parts[0].labels}, prepared.data_range,
            [q for p in parts for q in p.quarantined], _merged([r for p in parts for r in p.rejected]), began, seconds)


@dataclass
class Prepared:
    """What samples one composition."""

    run: sampling.Run
    conditions: Conditions
    filters: Filters
    data_range: tuple[float, float] | None


@dataclass
class Batch:
    """The kept rows of a micro-batch."""

    ids: Tensor
    x: Tensor
    energy: Tensor | None
    leaf_energies: Tensor | None
    conditions: dict[str, Tensor]
    labels: dict[str, list]
    quarantined: list[dict]
    rejected: list[dict]


def _blame(chain: int, fault) -> dict:
    if fault is None:
        return {"id": chain, "step": None, "leaf": None, "reason": "non-finite"}
    return {"id": chain, "step": fault.step, "leaf": fault.leaf, "reason": fault.reason}


def _merged(parts: list[dict]) -> list[dict]:
    """The rejections of one filter in one entry."""
    found: dict[str, list[int]] = {}
    for part in parts:
        found.setdefault(part["filter"], []).extend(part["ids"])
    return [{"filter": name, "ids": ids} for name, ids in found.items()]


@contextmanager
def fixed_kernels(threads: int) -> Iterator[None]:
    """Threads and precisions that the process may have set otherwise, for the length of a shard."""
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = torch.get_num_threads(), torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic
    changed = before[0] != threads
    if changed:
        torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest")
    cuda.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = False, False, False, True
    try:
        yield
    finally:
        if changed:
            torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(before[1])
        cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = before[2:]
