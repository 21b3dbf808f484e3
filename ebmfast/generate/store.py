"""Where a data set lies: a folder, or any fsspec URL. Files appear whole or not at all.

In a folder a file is written beside its place as NAME.tmp-OWNER, flushed to disk, and renamed over it. On an object store a
put is atomic, so the key is written directly. Other remote file systems (sftp, smb, hdfs, ...) get a temporary key and a move.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ATOMIC_PUT = {"s3", "s3a", "gcs", "gs", "abfs", "abfss", "az", "adl", "oci", "oss", "hf", "memory", "r2"}
TRIES = 4
PAUSE = 0.2  # seconds before the second try; doubled after each


class Stat(NamedTuple):
    """Size in bytes, and what changes when a file is written again."""

    size: int
    stamp: str


class Store:
    """Files by relative name, "/" between folders."""

    url: str

    def read(self, name: str) -> bytes:
        """The whole of a file; FileNotFoundError without it."""
        raise NotImplementedError

    def put(self, name: str, data: bytes, owner: str = "") -> Stat:
        """Write a file whole, or leave things as they were."""
        raise NotImplementedError

    def stats(self, folder: str) -> dict[str, Stat]:
        """Every file directly in `folder`, by relative name."""
        raise NotImplementedError

    def remove(self, name: str) -> None:
        """Delete a file, if it is there."""
        raise NotImplementedError

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        raise NotImplementedError

    def open(self, name: str):
        """A binary file for reading."""
        raise NotImplementedError


class Folder(Store):
    """A folder of a file system of this machine."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.url = str(self.path)

    def __repr__(self):
        return self.url

    def read(self, name: str) -> bytes:
        """The whole of a file."""
        return (self.path / name).read_bytes()

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        return (self.path / name).exists()

    def open(self, name: str):
        """A binary file for reading."""
        return open(self.path / name, "rb")

    def put(self, name: str, data: bytes, owner: str = "") -> Stat:
        """Write beside, fsync, rename, fsync the folder."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.tmp-{owner or f'{socket.gethostname()}-{os.getpid()}'}")
        try:
            with open(partial, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                found = os.fstat(file.fileno())
            os.replace(partial, path)
        except OSError as error:
            _quietly(lambda: partial.unlink(missing_ok=True))
            raise explained(error, f"{path}", len(data)) from error
        sync_folder(path.parent)
        return Stat(found.st_size, str(found.st_mtime_ns))

    def stats(self, folder: str) -> dict[str, Stat]:
        """Every file directly in `folder`."""
        try:
            with os.scandir(self.path / folder) as entries:
                return {_joined(folder, e.name): Stat((s := e.stat()).st_size, str(s.st_mtime_ns)) for e in entries if e.is_file()}
        except FileNotFoundError:
            return {}

    def remove(self, name: str) -> None:
        """Delete a file, if it is there."""
        (self.path / name).unlink(missing_ok=True)


class Remote(Store):
    """Any fsspec file system. Every operation that fails is tried again, with growing pauses."""

    def __init__(self, url: str):
        try:
            import fsspec
        except ImportError as error:
            raise ImportError(f'{url} needs fsspec: pip install "ebmfast[generate]" ({error})') from None
        self.url = url.rstrip("/")
        self.fs, self.root = fsspec.core.url_to_fs(self.url)
        protocols = {self.fs.protocol} if isinstance(self.fs.protocol, str) else set(self.fs.protocol)
        self.atomic = bool(protocols & ATOMIC_PUT)
        self.fs.invalidate_cache()

    def __repr__(self):
        return self.url

    def _at(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def read(self, name: str) -> bytes:
        """The whole of a file."""
        return retried(lambda: self.fs.cat_file(self._at(name)))

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        return retried(lambda: self.fs.exists(self._at(name)))

    def open(self, name: str):
        """A binary file for reading."""
        return retried(lambda: self.fs.open(self._at(name), "rb"))

    def put(self, name: str, data: bytes, owner: str = "") -> Stat:
        """One put where that is atomic, else a temporary key and a move."""
        path = self._at(name)

        def write() -> None:
            if self.atomic:
                self.fs.pipe_file(path, data)
                return
            partial = f"{path}.tmp-{owner or f'{socket.gethostname()}-{os.getpid()}'}"
            self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            self.fs.pipe_file(partial, data)
            self.fs.mv(partial, path)

        retried(write)
        self.fs.invalidate_cache(path.rpartition("/")[0])
        return self._stat(retried(lambda: self.fs.info(path)))

    def stats(self, folder: str) -> dict[str, Stat]:
        """Every file directly in `folder`."""
        def look() -> list[dict]:
            try:
                return self.fs.ls(self._at(folder), detail=True)
            except FileNotFoundError:
                return []

        self.fs.invalidate_cache(self._at(folder))
        return {_joined(folder, e["name"].rpartition("/")[2]): self._stat(e) for e in retried(look) if e["type"] == "file"}

    def remove(self, name: str) -> None:
        """Delete a file, if it is there."""
        def delete() -> None:
            try:
                self.fs.rm_file(self._at(name))
            except FileNotFoundError:
                pass

        retried(delete)

    @staticmethod
    def _stat(info: dict) -> Stat:
        marks = ("ETag", "etag", "LastModified", "mtime", "modified", "updated", "created")
        stamp = next((info[k] for k in marks if info.get(k)), "")
        return Stat(info["size"] or 0, str(stamp))


def at(url: str | Path) -> Store:
    """The store at a path or an fsspec URL."""
    text = str(url)
    if text.startswith("file://"):
        return Folder(text.removeprefix("file://"))
    return Remote(text) if "://" in text else Folder(text)


def retried(action: Callable):
    """The result of `action`, tried up to `TRIES` times; what is missing or forbidden is not tried again."""
    for i in range(TRIES):
        try:
            return action()
        except (FileNotFoundError, PermissionError, NotImplementedError):
            raise
        except Exception as error:  # each protocol has errors of its own
            if i == TRIES - 1:
                raise OSError(f"after {TRIES} tries: {type(error).__name__}: {error}") from error
            time.sleep(PAUSE * 2**i)


def explained(error: OSError, path: str, size: int) -> OSError:
    """The same error with what it means for a data set."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OSError(error.errno, f"no space left for {path} ({size:,} bytes). Every committed shard is whole; free some space"
                       " and run the same command to go on")
    return OSError(error.errno, f"{error.strerror or error} while writing {path}")


def sync_folder(path: Path) -> None:
    """Make renames in a folder last, where the system can."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        _quietly(lambda: os.fsync(descriptor))
    finally:
        os.close(descriptor)


def leftovers(store: Store, folders: tuple[str, ...], owner: str | None = None) -> Iterator[str]:
    """Names of temporary files that a run left: all, or those of one owner."""
    mark = ".tmp-" if owner is None else f".tmp-{owner}"
    for folder in folders:
        for path in store.stats(folder):
            name = path.rpartition("/")[2]
            ours = name.startswith(("shard-", "README.md.", "preview.png.")) or folder.startswith("_")
            if mark in name and ours:
                yield path


def _joined(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _quietly(action: Callable[[], None]) -> None:
    try:
        action()
    except OSError:
        pass
