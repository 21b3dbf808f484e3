"""Progress for people and for programs: a bar, and `_ebmfast/progress-OWNER.json`."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections import deque

from .manifest import HOME
from .store import Folder, Store

EVERY = 1.0  # seconds between two writes of the file; on an object store ten times that
WINDOW = 60.0  # seconds over which the rate is taken


class Progress:
    """Counts samples of this run; what earlier runs did counts as done but not for the rate."""

    def __init__(self, store: Store, owner: str, *, total: int, done: int, shards: int, shards_done: int, engine: str, workers: int,
                 show: bool):
        self._store, self._owner, self._name = store, owner, f"{HOME}/progress-{owner}.json"
        self.total, self.done, self.shards, self.shards_done = total, done, shards, shards_done
        self.rows = self.rejected = self.quarantined = 0
        self._running: dict[int, int] = {}  # samples of shards that are not committed, by shard
        self._engine, self._workers = engine, workers
        self._began, self._since, self._written = time.time(), done, 0.0
        self._recent: deque[tuple[float, int]] = deque([(time.monotonic(), done)])
        self._every = EVERY if isinstance(store, Folder) else 10 * EVERY
        self._bar = self._make_bar() if show else None
        self._turn = threading.RLock()  # in one process, samples come from one thread and commits from another

    def _make_bar(self):
        from tqdm import tqdm
        return tqdm(total=self.total, initial=self.done, unit=" samples", desc="generating", smoothing=0.1, file=sys.stderr)

    @property
    def seen(self) -> int:
        """Samples drawn, committed or not."""
        return self.done + sum(self._running.values())

    def advance(self, shard: int, samples: int) -> None:
        """`samples` more of a shard are drawn."""
        with self._turn:
            self._running[shard] = self._running.get(shard, 0) + samples
            self._show()

    def dropped(self, shard: int) -> None:
        """A shard has to be begun again."""
        with self._turn:
            self._running.pop(shard, None)
            self._show()

    def committed(self, shard: int, samples: int, entry) -> None:
        """A shard is in the manifest."""
        with self._turn:
            self._running.pop(shard, None)
            self.done += samples
            self.shards_done += 1
            self.rows += entry.rows
            self.rejected += entry.rejected
            self.quarantined += entry.quarantined
            self._show()

    def rate(self) -> float:
        """Samples per second over the last minute."""
        (then, before), (now, after) = self._recent[0], (time.monotonic(), self.seen)
        return (after - before) / (now - then) if now > then else 0.0

    def _show(self) -> None:
        now = time.monotonic()
        self._recent.append((now, self.seen))
        while len(self._recent) > 2 and now - self._recent[0][0] > WINDOW:
            self._recent.popleft()
        if self._bar is not None:
            self._bar.update(self.seen - self._bar.n)
            lost = {k: v for k, v in (("rejected", self.rejected), ("quarantined", self.quarantined)) if v}
            self._bar.set_postfix({"shards": f"{self.shards_done}/{self.shards}", **lost}, refresh=False)
        if now - self._written > self._every:
            self.write("running")

    def write(self, state: str) -> None:
        """Write the file; a disk that is full must not hide what filled it, so errors are left to the shards."""
        self._written, rate = time.monotonic(), self.rate()
        about = {
            "state": state, "samples": self.total, "samples_done": self.done, "samples_drawn": self.seen, "shards": self.shards,
            "shards_done": self.shards_done, "rows_this_run": self.rows, "rejected_this_run": self.rejected,
            "quarantined_this_run": self.quarantined, "samples_per_second": round(rate, 3),
            "eta_seconds": round((self.total - self.seen) / rate, 1) if rate > 0 and state == "running" else None,
            "engine": self._engine, "workers": self._workers, "host": socket.gethostname(), "pid": os.getpid(),
            "started": round(self._began, 3), "updated": round(time.time(), 3)}
        try:
            self._store.put(self._name, (json.dumps(about) + "\n").encode(), f"{self._owner}-{os.getpid()}")
        except OSError:
            pass

    def close(self, state: str) -> None:
        """Write the last state and leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
        self.write(state)
