"""Shards as Ray tasks. A task whose worker dies is tried again by Ray; the driver alone writes the manifest.

The folder or URL must be one that every node sees. Files are written by the tasks, and what crosses Ray's store is the plan and one
line per shard.
"""

from __future__ import annotations

import functools
import os
from collections import deque

from .. import store as stores
from ..manifest import Entry
from ..plan import DatasetPlan
from ..session import Session
from . import devices
from .stopping import Signals


def _ray():
    try:
        import ray
    except ImportError as error:
        raise ImportError(f'the ray engine needs Ray: pip install "ebmfast[ray]" ({error})') from None
    return ray


@functools.lru_cache(maxsize=2)
def _tools(digest: str, url: str, owner: str, device: str) -> dict:
    """What a Ray worker keeps between tasks of one plan; the first task fills it."""
    return {}


def make_shard(plan: DatasetPlan, digest: str, url: str, owner: str, shard: int) -> Entry:
    """The task: sample a shard and put its files in place."""
    from ..maker import Maker
    from ..shards import Committer

    owner, device = f"{owner}-{os.getpid()}", devices.of(plan, 0)
    tools = _tools(digest, url, owner, device)
    if not tools:
        tools["maker"], tools["commit"] = Maker(plan, device), Committer(plan, stores.at(url), owner, device)
    return tools["commit"](tools["maker"].sample(shard))


def run(session: Session, workers: int | None = None, *, show: bool = False, retries: int = 3,
        address: str | None = None) -> int | None:
    """Make what is left to do; returns the signal that stopped it, or None.

    `workers` bounds the tasks in flight (by default as many as the cluster runs at once). Without an `address` (or RAY_ADDRESS), a
    cluster of this machine is started and ended.
    """
    ray = _ray()
    plan = session.plan
    ours = not ray.is_initialized()
    if ours:
        address = address or os.environ.get("RAY_ADDRESS")
        here = {} if address else {"num_cpus": devices.count(plan, workers) * plan.spec.run.threads, "include_dashboard": False}
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **here)
    try:
        return _drive(ray, session, workers, show, retries)
    finally:
        if ours:
            ray.shutdown()


def _drive(ray, session: Session, workers: int | None, show: bool, retries: int) -> int | None:
    plan, todo = session.plan, deque(session.todo)
    needs = {"num_cpus": plan.spec.run.threads, "num_gpus": int(plan.spec.run.device == "cuda")}
    slots = workers or max(1, int(ray.cluster_resources().get("CPU", 1)) // plan.spec.run.threads)
    task = ray.remote(**needs, max_retries=retries)(make_shard)
    progress = session.begin(slots, show)
    shared, digest, url = ray.put(plan), plan.digest, session.store.url
    url = url if "://" in url else os.path.abspath(url)
    flying: dict = {}
    tries: dict[int, int] = {}
    with Signals() as signals:
        while (todo or flying) and signals.number is None:
            while todo and len(flying) < 2 * slots:  # one more for each worker, so that none waits for this loop
                shard = todo.popleft()
                flying[task.remote(shared, digest, url, session.owner, shard)] = shard
            done, _ = ray.wait(list(flying), timeout=0.5)
            for reference in done:
                shard = flying.pop(reference)
                try:
                    entry = ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause if error.cause is not None else error from None
                except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError) as error:
                    tries[shard] = tries.get(shard, 0) + 1
                    if tries[shard] > 1:
                        spent = f"in every one of {2 * (retries + 1)} tries"
                        raise RuntimeError(f"Ray workers died while making shard {shard}, {spent}: {error}") from None
                    session.say(f"a Ray worker died; shard {shard} is given back")
                    todo.appendleft(shard)
                    continue
                progress.advance(shard, plan.shard(shard).count)
                session.commit(entry)
        for reference in flying:
            ray.cancel(reference, force=True)
        return signals.number
