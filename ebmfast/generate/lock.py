"""One run at a time on a data set.

In a folder, `flock` on `_ebmfast/lock`: it ends with the process that holds it, however that ends. Ranks of one job share it, and
each holds a lock of its own rank. On an object store, which knows no locks, it is an object that is written anew every `BEAT`
seconds; one that has not been for `STALE` seconds belongs to a run that is gone. Two runs that start there within the same moment
are seen by reading the object again after `SETTLE` seconds; a network that hides writes for longer than that is not covered.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time

from .manifest import HOME
from .store import Folder, Store

BEAT, STALE, SETTLE = 20.0, 120.0, 0.5


class LockedError(RuntimeError):
    """Another run is writing this data set; the message says which."""


def holder(store: Store) -> dict | None:
    """Who wrote the lock file last: host, pid, engine, since."""
    try:
        return json.loads(store.read(f"{HOME}/lock"))
    except (OSError, ValueError):
        return None


def _refuse(store: Store, found: dict | None, what: str = "") -> LockedError:
    found = found or {}
    pid, host, engine, since = (found.get(k, "?") for k in ("pid", "host", "engine", "since"))
    return LockedError(f"{store}{what} is being written by process {pid} on {host} ({engine} engine, since {since}). Wait for it or"
                       f" stop it; `ebmfast generate --status --out {store}` shows how far it is")


def acquire(store: Store, engine: str, rank: int | None = None):
    """Take the lock, or raise `LockedError`; `release()` of the result gives it back."""
    kind = FolderLock if isinstance(store, Folder) else RemoteLock
    return kind(store, engine, rank)


def held(store: Store) -> bool:
    """Whether a run holds the lock now."""
    if not isinstance(store, Folder):
        found = holder(store)
        return found is not None and time.time() - found.get("beat", 0) < STALE
    import fcntl
    try:
        with open(store.path / HOME / "lock", "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _about(engine: str) -> dict:
    return {"host": socket.gethostname(), "pid": os.getpid(), "engine": engine, "since": time.strftime("%Y-%m-%d %H:%M:%S %Z")}


class FolderLock:
    """A lock of the operating system."""

    def __init__(self, store: Folder, engine: str, rank: int | None):
        self._files = []
        home = store.path / HOME
        home.mkdir(parents=True, exist_ok=True)
        self._take(store, home / "lock", engine, shared=rank is not None)
        if rank is not None:
            try:
                self._take(store, home / f"lock-rank-{rank}", engine, what=f", rank {rank},")
            except LockedError:
                self.release()
                raise

    def _take(self, store: Folder, path, engine: str, shared: bool = False, what: str = "") -> None:
        import fcntl
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError:
            found = os.pread(descriptor, 4096, 0)
            os.close(descriptor)
            try:
                found = json.loads(found)
            except ValueError:
                found = None
            raise _refuse(store, found, what) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(_about(engine)).encode(), 0)
        self._files.append(descriptor)

    def release(self) -> None:
        """Give the lock back."""
        while self._files:
            os.close(self._files.pop())


class RemoteLock:
    """An object that says who holds the data set, written anew while the run lives."""

    def __init__(self, store: Store, engine: str, rank: int | None):
        self._store, self._name = store, f"{HOME}/lock" if rank is None else f"{HOME}/lock-rank-{rank}"
        self._about = _about(engine) | {"token": secrets.token_hex(8)}
        names = [f"{HOME}/lock", self._name] if rank is not None else [
            f"{HOME}/lock", *(n for n in store.stats(HOME) if n.startswith(f"{HOME}/lock-rank-"))]
        for name in names:
            self._check(name)
        self._beat()
        time.sleep(SETTLE)
        self._check(self._name)
        self._over = threading.Event()
        threading.Thread(target=self._keep, name="ebmfast lock", daemon=True).start()

    def _check(self, name: str) -> None:
        try:
            found = json.loads(self._store.read(name))
        except (FileNotFoundError, ValueError):
            return
        if found.get("token") != self._about["token"] and time.time() - found.get("beat", 0) < STALE:
            raise _refuse(self._store, found)

    def _beat(self) -> None:
        self._store.put(self._name, json.dumps(self._about | {"beat": time.time()}).encode())

    def _keep(self) -> None:
        while not self._over.wait(BEAT):
            try:
                self._beat()
            except OSError:  # tried several times already; the next beat may get through
                continue

    def release(self) -> None:
        """Give the lock back."""
        self._over.set()
        self._store.remove(self._name)
