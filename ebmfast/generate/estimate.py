"""What a plan will cost, from a few measured steps: time, disk, memory."""

from __future__ import annotations

import dataclasses
import time

import torch

from ..samplers import Annealed
from . import environment, formats
from .engines import devices
from .maker import Batch, Maker, fixed_kernels
from .plan import DatasetPlan

BUDGET = 10.0  # seconds of measurement per composition


class _Enough(Exception):
    pass


@dataclasses.dataclass
class Cost:
    """Of one composition: seconds of one worker, steps of a chain, seconds of a step of a micro-batch, bytes per row."""

    name: str
    leaves: tuple[str, ...]
    n: int
    steps: int
    step_seconds: float
    seconds: float
    row_bytes: float
    explained: str


def measure(plan: DatasetPlan) -> list[Cost]:
    """The cost of every composition, measured here on one worker's threads."""
    maker = Maker(plan, devices.of(plan, 0))
    return [_measure(maker, j) for j in range(len(plan.names)) if plan.counts[j]]


def _measure(maker: Maker, number: int) -> Cost:
    plan, prepared = maker.plan, maker.composition(number)
    run, first = prepared.run, plan.offsets[number]
    steps = run.sampler.steps if run.steps is None else run.steps
    conditions, _ = prepared.conditions.rows(torch.arange(first, first + plan.batch_size))
    times: list[float] = []

    def callback(info) -> None:
        times.append(time.perf_counter())
        if times[-1] - times[0] > BUDGET:
            raise _Enough

    whole, short = run.sampler, run.sampler
    if isinstance(whole, Annealed):  # once through the levels: leaves may drop out at some of them
        short = dataclasses.replace(whole, steps_per_level=1, denoise=False)
    with fixed_kernels(plan.spec.run.threads):
        run.sampler = short
        began = time.perf_counter()
        try:
            run(plan.batch_size, plan.spec.seed, conditions=conditions, first_chain=first, init=plan.spec.run.init,
                callback=callback)
        except _Enough:
            pass
        finally:
            run.sampler = whole
        began = times[0] if len(times) > 1 else began
        each = ((times[-1] - began) / max(1, len(times) - 1)) if times else 0.0
    batches = sum(-(-plan.shard(k).count // plan.batch_size) for k in range(plan.shards) if plan.shard(k).composition == number)
    rows = _rows(maker, number)
    return Cost(plan.names[number], tuple(rows.leaves), plan.counts[number], steps, each, each * steps * batches,
                len(formats.encode(rows, plan)) / len(rows.ids), run.explain())


def _rows(maker: Maker, number: int):
    """A micro-batch of starting points as rows, to see how large they are when encoded."""
    plan, prepared = maker.plan, maker.composition(number)
    leaves = len(prepared.run.plan.leaves)
    ids = torch.arange(plan.offsets[number], plan.offsets[number] + plan.batch_size)
    conditions, labels = prepared.conditions.rows(ids)
    shard = next(s for k in range(plan.shards) if (s := plan.shard(k)).composition == number)
    low, high = prepared.data_range or (-1.0, 1.0)
    x = low + (high - low) * torch.rand(len(ids), *plan.shape, generator=torch.Generator().manual_seed(0))
    part = Batch(ids, x, torch.rand(len(ids)), torch.rand(len(ids), leaves), conditions, labels, [], [])
    return maker._joined(shard, prepared, [part])


def report(plan: DatasetPlan, workers: int | None) -> str:
    """The estimate as text, for `--dry-run`; nothing is written."""
    costs, count = measure(plan), max(1, devices.count(plan, workers))
    about = environment.describe(plan.spec.run.device)
    lines = [f"{plan.n:,} samples of {list(plan.shape)} in {plan.shards:,} shards of up to {plan.spec.shard_size:,}, as"
             f" {plan.spec.output.format} ({plan.storage}), micro-batches of {plan.batch_size}"]
    for cost in costs:
        lines += [f"  {cost.name}: {cost.n:,} samples, {cost.steps} steps of {1e3 * cost.step_seconds:.3g} ms,"
                  f" {_time(cost.seconds)} of one worker", f"    leaves: {', '.join(cost.leaves)}"]
    total = sum(c.seconds for c in costs)
    size = sum(c.row_bytes * c.n for c in costs)
    shard = max(c.row_bytes for c in costs) * plan.spec.shard_size
    count = min(count, plan.shards)
    lines += [f"time    {_time(total)} of one worker; {_time(total / count)} with {count}, if they do not slow each other down",
              f"disk    at most {_size(size)} before filters; a shard {_size(shard)}, as noise: pictures compress better",
              f"machine {about['device']} ({about['isa']}), {plan.spec.run.threads} thread(s) per worker"]
    return "\n".join(lines)


def _time(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.2g} s"


def _size(count: float) -> str:
    for unit, length in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= length:
            return f"{count / length:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
