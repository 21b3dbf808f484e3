"""Worker processes of this machine: each asks for the next shard; shards of one that dies are given to another."""

from __future__ import annotations

import multiprocessing
import time
from collections import deque
from multiprocessing.connection import wait

from .. import formats
from ..maker import Flag, Maker
from ..session import Session
from ..shards import Committer
from . import devices, worker
from .stopping import Signals

AHEAD = 2  # shards that a worker has at once: one in the writer, one being sampled
PATIENCE = 60.0  # seconds for workers to end after a stop


class WorkerDied(RuntimeError):
    """Workers died again and again while they made the same shards."""


def run(session: Session, workers: int | None = None, *, show: bool = False, retries: int = 3,
        start_method: str | None = None) -> int | None:
    """Make what is left to do; returns the signal that stopped it, or None.

    `workers` processes (by default one per GPU, or per core and the plan's threads), or this process alone with 0.
    """
    todo = session.todo
    count = devices.count(session.plan, workers)
    if count == 0 or not todo:
        session.begin(max(count, 1), show)
        return in_process(session, todo) if todo else None
    session.begin(min(count, len(todo)), show)
    with Signals() as signals:
        pool = Pool(session, min(count, len(todo)), deque(todo), retries, _context(session.plan, start_method))
        try:
            pool.run(signals)
        finally:
            pool.close()
        return signals.number


def _context(plan, start_method: str | None):
    """How processes start: from one that has imported everything, where there is fork and no CUDA, else from nothing."""
    known = multiprocessing.get_all_start_methods()
    if start_method is None:
        start_method = "forkserver" if "forkserver" in known and plan.spec.run.device == "cpu" else "spawn"
    if start_method not in known:
        raise ValueError(f"`start_method` must be one of {', '.join(known)}, got {start_method!r}")
    context = multiprocessing.get_context(start_method)
    if start_method == "forkserver":
        context.set_forkserver_preload([__name__, f"{formats.__name__}.{plan.spec.output.format}"])
    return context


def in_process(session: Session, todo: list[int], device: str | None = None) -> int | None:
    """The same in this process: a rank, or `workers=0`."""
    flag, device = Flag(), device or devices.of(session.plan, 0)
    with Signals(flag) as signals:
        pipeline = worker.Pipeline(
            Maker(session.plan, device), Committer(session.plan, session.store, session.mark, device), flag,
            session.progress.advance, session.commit)
        try:
            for shard in todo:
                if signals.number is not None:
                    break
                try:
                    pipeline.make(shard)
                except worker.Dropped:
                    session.progress.dropped(shard)
            pipeline.settle()
        finally:
            pipeline.close()
        return signals.number


class Pool:
    """Workers, what each was given, and what is not given yet."""

    def __init__(self, session: Session, count: int, todo: deque[int], retries: int, context):
        self.session, self.todo, self.retries, self._context = session, todo, retries, context
        self.members = [self._start(i) for i in range(count)]
        self.tries: dict[int, int] = {}
        self.barren = 0  # workers that died in a row without a shard being committed
        self.stopping = False

    def _start(self, number: int) -> Member:
        plan, (ours, theirs) = self.session.plan, self._context.Pipe()
        device = devices.of(plan, number)
        process = self._context.Process(
            target=worker.main, args=(theirs, plan, self.session.store.url, f"{self.session.mark}-{number}", device),
            name=f"ebmfast worker {number}", daemon=True)
        process.start()
        theirs.close()
        return Member(number, process, ours)

    def run(self, signals: Signals) -> None:
        """Give out shards and commit what comes back until nothing is left, or a signal stops it."""
        while any(not m.ended for m in self.members):
            if signals.number is not None and not self.stopping:
                self.stop()
            handles = {}
            for member in self.members:
                if not member.ended:
                    handles |= {member.pipe: member, member.process.sentinel: member}
            for member in dict.fromkeys(handles[h] for h in wait(list(handles), timeout=0.5)):
                self._hear(member)
            if self.stopping and time.monotonic() > self.deadline:
                break

    def stop(self) -> None:
        """Tell every worker to drop what it samples and to finish what it writes."""
        self.stopping, self.deadline = True, time.monotonic() + PATIENCE
        for member in self.members:
            member.send("stop")

    def close(self) -> None:
        """End every worker, in one way or another."""
        for member in self.members:
            member.pipe.close()
            member.process.join(timeout=5 if member.ended else 0.1)
            if member.process.is_alive():
                member.process.kill()
                member.process.join()

    def _hear(self, member: Member) -> None:
        while not member.ended:
            try:
                if not member.pipe.poll():
                    break
                message = member.pipe.recv()
            except (EOFError, OSError):  # nothing more will come: what it sent before it died has been heard
                member.process.join(PATIENCE)
                self._died(member)
                return
            self._take(member, *message)

    def _take(self, member: Member, kind: str, *what) -> None:
        progress = self.session.progress
        match kind:
            case "ready":
                member.ready = True
                self._feed(member)
            case "batch":
                progress.advance(*what)
            case "done":
                self.session.commit(what[0])
                member.given.remove(what[0].shard)
                self.barren = 0
                self._feed(member)
            case "dropped":
                member.given.remove(what[0])
                progress.dropped(what[0])
            case "end":
                member.ended = True
            case "error":
                member.ended = True
                self.stop()
                raise what[0]

    def _feed(self, member: Member) -> None:
        while self.todo and len(member.given) < AHEAD and not self.stopping:
            shard = self.todo.popleft()
            member.given.append(shard)
            member.send(shard)
        if not self.todo and not member.given and not member.closing:
            member.closing = True
            member.send(None)

    def _died(self, member: Member) -> None:
        """Give its shards back, first in line, and start another in its place."""
        code, back = member.process.exitcode, list(member.given)
        how = f"signal {-code}" if code is not None and code < 0 else f"status {code}"
        member.ended, self.barren = True, self.barren + 1
        for shard in back:
            self.tries[shard] = self.tries.get(shard, 0) + 1
            self.session.progress.dropped(shard)
        if self.stopping:
            return
        worst = max((self.tries[s] for s in back), default=0)
        if worst > self.retries or self.barren > self.retries + len(self.members):
            raise WorkerDied(
                f"worker {member.number} died ({how}) while making shards {back or 'none'}, and so did others before it:"
                f" {self.retries} retries are spent. Committed shards are whole; look whether memory is out")
        self.todo.extendleft(reversed(back))
        self.session.say(f"worker {member.number} died ({how}); shards {back or 'none'} are given back")
        self.members[self.members.index(member)] = self._start(member.number)
        for other in self.members:  # those that had nothing left to do
            if other.ready and not other.closing and not other.ended:
                self._feed(other)


class Member:
    """A worker as its parent sees it."""

    def __init__(self, number: int, process, pipe):
        self.number, self.process, self.pipe = number, process, pipe
        self.given: list[int] = []
        self.ready = self.closing = self.ended = False

    def send(self, what) -> None:
        """Say something; a worker that is gone is noticed elsewhere."""
        try:
            self.pipe.send(what)
        except OSError:
            pass
