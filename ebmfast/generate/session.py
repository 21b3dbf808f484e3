"""One run on one data set: the lock, the plan's check, what is left to do, commits, and the end."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

from . import environment, lock
from . import plan as plans
from .engines import devices
from .manifest import HOME, Entry, Manifest
from .plan import DatasetPlan
from .progress import Progress
from .store import Stat, Store, leftovers

FOLDERS = ("data", "rejected", "quarantine", HOME, "")


class ChangedPlanError(ValueError):
    """The folder holds another plan's data set; the message shows the difference."""


class Stopped(KeyboardInterrupt):
    """The run was asked to stop and did; the message says how to go on. `signal` is the signal's number."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


def saved_plan(store: Store) -> DatasetPlan:
    """The plan of an existing data set, paths in it relative to where its file was."""
    try:
        text = store.read(f"{HOME}/plan.json").decode()
    except FileNotFoundError:
        raise FileNotFoundError(f"{store} is not a data set of `ebmfast generate`: it has no {HOME}/plan.json") from None
    origin = json.loads(store.read(f"{HOME}/origin.json"))
    return plans.from_identity(text, origin["base"], origin["source"])


class Session:
    """A data set that this process may write; use it in a `with` block."""

    def __init__(self, plan: DatasetPlan, store: Store, engine: str, *, rank: int | None = None, world: int = 1,
                 full_check: bool = False, say: Callable[[str], None] | None = None):
        self.plan, self.store, self.engine, self.rank, self.world = plan, store, engine, rank, world
        self.owner = "main" if rank is None else f"rank{rank}"
        self.mark = f"{self.owner}-{os.getpid()}"  # of temporary files
        self.full_check, self.say = full_check, say or (lambda text: print(text, file=sys.stderr))
        self.manifest = Manifest(store, self.owner)
        self.progress: Progress | None = None
        self._lock = None

    def __enter__(self) -> Session:
        self._check_plan()
        self._lock = lock.acquire(self.store, self.engine, self.rank)
        try:
            self._check_plan(write=True)
            for name in list(leftovers(self.store, FOLDERS, None if self.rank is None else f"{self.owner}-")):
                self.store.remove(name)
            self.manifest.read()
            for place in self.manifest.damaged:
                self.say(f"{place} ends early or is damaged; its shard is made again")
            self._check_committed()
            self._compare_machines()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self.progress is not None:
            self.progress.close(self._state(kind))
        self._lock.release()

    def _state(self, error: type | None) -> str:
        """How this run ended, for the progress file."""
        if error is not None and not issubclass(error, KeyboardInterrupt):
            return "failed"
        return "complete" if self.complete else "stopped" if self.todo else "this rank is done"

    def _check_plan(self, write: bool = False) -> None:
        """Raise if the folder is another plan's; write the plan where there is none."""
        name = f"{HOME}/plan.json"
        if self.store.exists(name):
            text = self.store.read(name).decode()
            if text != self.plan.text():
                raise ChangedPlanError(
                    f"{self.store} holds the data set of another plan. Take another --out, or the old plan, to go on with it:\n"
                    f"{self.plan.difference(text)}")
        elif foreign := [f for f in ("README.md", "preview.png") if self.store.exists(f)] + list(self.store.stats("data"))[:3]:
            raise ValueError(f"{self.store} has files of its own, {', '.join(foreign)}, and is no data set: take another --out")
        elif write:
            origin = {"base": str(self.plan.base), "source": self.plan.source}
            self.store.put(f"{HOME}/origin.json", json.dumps(origin).encode(), self.mark)
            self.store.put(name, self.plan.text().encode(), self.mark)

    def _mine(self, shard: int) -> bool:
        return self.rank is None or shard % self.world == self.rank

    def _check_committed(self) -> None:
        """Compare committed shards with what lies there, by size and time of writing, else by hash; what is wrong is made again."""
        found = {}
        for folder in ("data", "rejected", "quarantine"):
            found |= self.store.stats(folder)
        news = list(checked(self.store, self.manifest.entries, found, self.full_check, self._mine))
        for entry in news:
            if entry.revoked is not None:
                self.say(f"shard {entry.shard}: {entry.revoked}; it is made again")
        if news:
            self.manifest.append(news)

    def _compare_machines(self) -> None:
        """Say so where shards were made by other versions, or on another kind of machine, than this one."""
        here = environment.key(environment.describe(devices.of(self.plan, 0))) if self.todo else None
        others = {e.environment for e in self.manifest.entries.values()} - {here}
        if here is not None and others:
            self.say(f"shards were made on another kind of machine, or by other versions ({', '.join(sorted(others))}; see"
                     f" {HOME}/environment-*.json): those made here may differ from what they would have been there by rounding")

    @property
    def todo(self) -> list[int]:
        """Shards of this process that are not committed."""
        return [k for k in range(self.plan.shards) if k not in self.manifest.entries and self._mine(k)]

    @property
    def complete(self) -> bool:
        """Whether every shard of the plan is committed, as far as this process knows."""
        return len(self.manifest.entries) == self.plan.shards

    def begin(self, workers: int, show: bool) -> Progress:
        """The progress of this run."""
        mine = [k for k in range(self.plan.shards) if self._mine(k)]
        done = [k for k in mine if k in self.manifest.entries]
        count = sum(self.plan.shard(k).count for k in mine)
        self.progress = Progress(
            self.store, self.owner, total=count, done=sum(self.plan.shard(k).count for k in done), shards=len(mine),
            shards_done=len(done), engine=self.engine, workers=workers, show=show)
        self.progress.write("running")
        return self.progress

    def commit(self, entry: Entry) -> None:
        """Write a shard, whose files are in place, into the manifest."""
        self.manifest.append([entry])
        self.progress.committed(entry.shard, self.plan.shard(entry.shard).count, entry)

    def finish(self) -> bool:
        """Write the card if all shards are there, whoever made them; returns whether they are."""
        if self.rank is not None:
            self.manifest.read()
        if not self.complete:
            return False
        from . import card
        card.write(self.plan, self.store, self.manifest.entries, self.mark)
        return True


def checked(store: Store, entries: dict[int, Entry], found: dict[str, Stat], full: bool,
            mine: Callable[[int], bool] = lambda shard: True) -> Iterator[Entry]:
    """New lines for shards whose files are not what their entries say: revoked, or with new times where hashes are right."""
    for entry in list(entries.values()):
        if not mine(entry.shard):
            continue
        reason, files = None, []
        for file in entry.files:
            stat = found.get(file.name)
            if stat is None:
                reason = f"{file.name} is missing"
            elif stat.size != file.size:
                reason = f"{file.name} has {stat.size} bytes, not {file.size}"
            elif full or stat.stamp != file.stamp:
                digest = hashlib.sha256(store.read(file.name)).hexdigest()
                if digest != file.sha256:
                    reason = f"{file.name} hashes to {digest[:12]}..., not {file.sha256[:12]}..."
                files.append(replace(file, stamp=stat.stamp))
                continue
            files.append(file)
        if reason is not None:
            yield Entry(entry.shard, revoked=reason)
        elif tuple(files) != entry.files:
            yield replace(entry, files=tuple(files))


