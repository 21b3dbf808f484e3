"""The manifest: one JSON line for every committed shard, appended after its files are in place.

A process appends to files of its own, `_ebmfast/manifest-OWNER-NNNNN.jsonl`; readers merge them. A line that ends early (the
process was killed while it wrote) counts as not written. The last line about a shard is the one that holds.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace

from .store import Folder, Store, explained

HOME = "_ebmfast"
SEGMENT = 256  # lines per object, where nothing can be appended to


@dataclass(frozen=True)
class File:
    """A file of a shard; `stamp` is what its size and time of writing were when its hash was last seen to be right."""

    name: str
    size: int
    sha256: str
    stamp: str


@dataclass(frozen=True)
class Entry:
    """A committed shard; the first of `files` holds its rows. `revoked` says why it is to be made again."""

    shard: int
    rows: int = 0
    files: tuple[File, ...] = ()
    quarantined: int = 0
    rejected: int = 0
    environment: str = ""
    maker: str = ""  # the run, process and worker that made it
    seconds: dict = field(default_factory=dict)
    revoked: str | None = None
    time: int = 0  # nanoseconds since 1970; of two lines about a shard in different files, the later one holds

    def line(self) -> str:
        """The entry as a line of the manifest."""
        return json.dumps({k: v for k, v in asdict(self).items() if v is not None}, separators=(",", ":")) + "\n"

    @classmethod
    def read(cls, line: str) -> Entry | None:
        """The entry in a line, or None where the line is damaged."""
        try:
            data = json.loads(line)
            return cls(**data | {"files": tuple(File(**f) for f in data.get("files", ()))})
        except (ValueError, TypeError):
            return None


class Manifest:
    """The entries of a data set, and where this process appends its own."""

    def __init__(self, store: Store, owner: str):
        self.store, self.owner = store, owner
        self.entries: dict[int, Entry] = {}
        self.damaged: list[str] = []
        self._lines: list[str] = []
        self._segment = 0

    def read(self) -> Manifest:
        """Read what every process wrote; lines by file and place, the last one about a shard holds."""
        self.entries, self.damaged, own = {}, [], []
        written: dict[int, Entry] = {}
        names = sorted(n for n in self.store.stats(HOME) if n.startswith(f"{HOME}/manifest-") and n.endswith(".jsonl"))
        for name in names:
            lines = self.store.read(name).decode("utf-8", "replace").splitlines(keepends=True)
            good = []
            for number, line in enumerate(lines, 1):
                entry = Entry.read(line) if line.endswith("\n") else None
                if entry is None:
                    self.damaged.append(f"{name}, line {number}")
                    continue
                good.append(line)
                if entry.shard not in written or entry.time >= written[entry.shard].time:
                    written[entry.shard] = entry
            if name.startswith(f"{HOME}/manifest-{self.owner}-"):
                own.append((name, good))
        self.entries = {k: e for k, e in sorted(written.items()) if e.revoked is None}
        if own:
            name, self._lines = own[-1]
            self._segment = int(name.rpartition("-")[2].partition(".")[0])
        return self

    def append(self, entries: Iterable[Entry]) -> None:
        """Make entries last; raises OSError, leaving whole lines only, if they cannot be written."""
        entries = [replace(e, time=time.time_ns()) for e in entries]
        text = "".join(e.line() for e in entries)
        if isinstance(self.store, Folder):
            self._append_to_file(text)
        else:
            if len(self._lines) >= SEGMENT:
                self._segment, self._lines = self._segment + 1, []
            self.store.put(self._name(), "".join([*self._lines, text]).encode())
            self._lines.append(text)
        for entry in entries:
            if entry.revoked is None:
                self.entries[entry.shard] = entry
            else:
                self.entries.pop(entry.shard, None)

    def _name(self) -> str:
        return f"{HOME}/manifest-{self.owner}-{self._segment:05d}.jsonl"

    def _append_to_file(self, text: str) -> None:
        path = self.store.path / self._name()
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            whole = _whole_lines(file)
            if whole < file.seek(0, os.SEEK_END):
                file.truncate(whole)
            try:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
            except OSError as error:
                _cut_back(path, whole)
                raise explained(error, str(path), len(text)) from error


def _whole_lines(file) -> int:
    """Where the last whole line of a file ends."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 4096)
        file.seek(start)
        at = file.read(end - start).rfind(b"\n")
        if at >= 0:
            return start + at + 1
        end = start
    return 0


def _cut_back(path, size: int) -> None:
    try:
        os.truncate(path, size)
    except OSError:  # the reader drops a line that ends early
        pass
