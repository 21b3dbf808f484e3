"""Data sets of composed samples: a plan in, shards out, whatever happens in between.

    ebmfast.generate.generate("plan.toml", "out")  # or: ebmfast generate plan.toml --out out
    ebmfast.load_dataset("out")                    # a torch Dataset

A shard is a pure function of (plan, shard number): `plan` resolves plans, `maker` samples shards, `formats` turn them into bytes,
`store` puts these in place, `manifest` and `session` know what is done, and `engines` are who does it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .reader import ShardDataset


def generate(plan: str | Path | Mapping | None, out: str | Path, *, engine: str = "auto", workers: int | None = None,
             rank: int | None = None, world_size: int | None = None, retries: int = 3, start_method: str | None = None,
             full_check: bool = False, progress: bool = False, say: Callable[[str], None] | None = None) -> bool:
    """Make the data set of a plan in `out`, or what is missing of it; returns whether it is complete.

    Shards are byte-identical whatever the engine, the number of workers, their order, and how often the run was interrupted.

    Args:
        plan: a TOML file, a mapping of the same keys, or None for the plan of an existing data set.
        out: a folder or an fsspec URL.
        engine: "local", "torchrun", "ray", or "auto": torchrun where its environment variables are set, else local.
        workers: processes of the local engine (0: this process), or Ray tasks at once. By default one per GPU or core.
        rank, world_size: of the torchrun engine, where the environment does not say.
        retries: how often the shards of a worker that died are tried again.
        start_method: how the local engine starts processes: "spawn", "forkserver" or "fork". By default forkserver on a CPU where
            the system has it, else spawn; both import the caller's script, which needs `if __name__ == "__main__":`.
        full_check: hash every committed shard, not only those whose size or time of writing changed.
        progress: show a bar.
        say: where messages about damage and workers that died go; by default to stderr.

    Raises:
        PlanError: the plan is wrong; the message names the key, the value and what is allowed.
        ChangedPlanError: `out` holds another plan's data set.
        LockedError: another run is writing there.
        OSError: no space left, or a folder that cannot be written. Committed shards are whole.
        Stopped: Ctrl-C or SIGTERM; the same call goes on.
    """
    from . import engines
    from . import plan as plans
    from . import store as stores
    from .maker import Maker
    from .session import Session, Stopped, saved_plan

    store, engine = stores.at(out), engines.chosen(engine)
    resolved = plans.again(saved_plan(store)) if plan is None else resolve(plan)
    Maker(resolved).prepare_all()  # what is wrong with a plan is said here, before a worker starts
    local_rank = 0
    if engine == "torchrun":
        from .engines import torchrun
        rank, world_size, local_rank = torchrun.place(rank, world_size)
    with Session(resolved, store, engine, rank=rank, world=world_size or 1, full_check=full_check, say=say) as session:
        if engine == "torchrun":
            stopped = torchrun.run(session, local_rank, show=progress)
        elif engine == "ray":
            from .engines import ray
            stopped = ray.run(session, workers, show=progress, retries=retries)
        else:
            from .engines import local
            stopped = local.run(session, workers, show=progress, retries=retries, start_method=start_method)
        if stopped is not None:
            raise Stopped(f"stopped with {len(session.manifest.entries)} of {resolved.shards} shards committed;"
                          " the same command goes on from there", stopped)
        return session.finish()


def resolve(plan: str | Path | Mapping):
    """A plan file or mapping as a checked `DatasetPlan`."""
    from . import plan as plans
    if isinstance(plan, plans.DatasetPlan):
        return plan
    return plans.from_data(dict(plan)) if isinstance(plan, Mapping) else plans.load(os.fspath(plan))


def load_dataset(path: str | Path, transform: Callable | None = None, columns: Sequence[str] | None = None) -> ShardDataset:
    """The samples of a data set as a memory-mapped torch `Dataset`, in the order of their ids.

    Items are dictionaries: `id`, `composition`, `x`, and what the plan wrote of `energy`, `leaf_energies`, `conditions`, `labels`.

    Args:
        path: the folder or fsspec URL that `ebmfast generate` wrote.
        transform: a function of an item.
        columns: names of what an item is to hold; by default all.

    Raises:
        FileNotFoundError: no data set is there.
    """
    from .reader import ShardDataset
    return ShardDataset(path, transform, columns)
