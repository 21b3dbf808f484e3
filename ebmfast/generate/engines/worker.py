"""A worker: samples one shard while a thread encodes and writes the one before."""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait

from .. import store as stores
from ..maker import Dropped, Flag, Maker, Rows
from ..manifest import Entry
from ..plan import DatasetPlan
from ..shards import Committer


class Pipeline:
    """Shards one after another; `commit(entry)` is called in a thread, and `failed()` where that goes wrong."""

    def __init__(self, maker: Maker, committer: Committer, flag: Flag, on_batch: Callable[[int, int], None],
                 commit: Callable[[Entry], None], failed: Callable[[], None] = lambda: None):
        self._maker, self._committer, self._flag, self._on_batch = maker, committer, flag, on_batch
        self._commit, self._failed = commit, failed
        self._writer = ThreadPoolExecutor(1, "ebmfast writer")
        self._pending: Future | None = None

    def make(self, shard: int) -> None:
        """Sample a shard and hand it to the writer, once that has finished the one before; raises what went wrong there."""
        rows = self._maker.sample(shard, self._flag, lambda count: self._on_batch(shard, count))
        self.settle()
        self._pending = self._writer.submit(self._write, rows)

    def _write(self, rows: Rows) -> None:
        try:
            self._commit(self._committer(rows))
        except BaseException:
            self._flag.requested = True  # what is being sampled could not be written either
            self._failed()
            raise

    def settle(self) -> None:
        """Wait for the writer."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """End the writer; what it has begun is finished."""
        self._writer.shutdown(wait=True)


def main(pipe: Connection, plan: DatasetPlan, url: str, owner: str, device: str) -> None:
    """The process of a worker. It gets shard numbers and None, the end; it sends what it does, and dies with its parent."""
    for ignored in (signal.SIGINT, signal.SIGTERM):  # the parent decides; terminals and schedulers signal the whole group
        signal.signal(ignored, signal.SIG_IGN)
    flag, orders, said = Flag(), _Orders(), threading.Lock()

    def send(*message) -> None:
        with said:
            pipe.send(message)

    threading.Thread(target=_listen, args=(pipe, orders, flag), daemon=True).start()
    try:
        pipeline = Pipeline(Maker(plan, device), Committer(plan, stores.at(url), owner, device), flag,
                            lambda shard, count: send("batch", shard, count), lambda entry: send("done", entry), orders.clear)
        send("ready")
        while (shard := orders.next()) is not None:
            try:
                pipeline.make(shard)
            except Dropped:
                send("dropped", shard)
        pipeline.settle()
        pipeline.close()
        send("end")
    except BaseException as error:
        error.add_note(traceback.format_exc())
        try:
            send("error", error)
        except Exception:  # an error that does not pickle
            send("error", RuntimeError(f"{type(error).__name__}: {error}"))


class _Orders:
    """Shard numbers in the order in which they come."""

    def __init__(self):
        self._known: list[int | None] = []
        self._came = threading.Condition()

    def put(self, order: int | None) -> None:
        with self._came:
            self._known.append(order)
            self._came.notify()

    def next(self) -> int | None:
        with self._came:
            while not self._known:
                self._came.wait()
            return self._known.pop(0)

    def clear(self) -> None:
        with self._came:
            self._known = [None]
            self._came.notify()


def _listen(pipe: Connection, orders: _Orders, flag: Flag) -> None:
    """Pass on what the parent says; without a parent there is nobody to work for."""
    parent = parent_process()
    while True:
        try:
            ready = wait([pipe, *([parent.sentinel] if parent is not None else [])])
            if pipe not in ready:
                os._exit(1)
            order = pipe.recv()
        except (EOFError, OSError):
            os._exit(1)
        if order == "stop":
            flag.requested = True
            orders.clear()
        else:
            orders.put(order)
