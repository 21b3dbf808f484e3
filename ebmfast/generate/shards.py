"""Making and committing one shard: sample, encode, write, hash."""

from __future__ import annotations

import hashlib
import json
import time

from . import environment, formats
from .maker import Maker, Rows
from .manifest import HOME, Entry, File
from .plan import DatasetPlan
from .store import Store


def contents(rows: Rows, plan: DatasetPlan) -> dict[str, bytes]:
    """The files of a shard by name, its rows last: lists of what was rejected and quarantined, where there are any."""
    index, found = rows.shard.index, {}
    for folder, lines in (("rejected", rows.rejected), ("quarantine", rows.quarantined)):
        if lines:
            found[f"{folder}/shard-{index:05d}.jsonl"] = "".join(json.dumps(line) + "\n" for line in lines).encode()
    found[formats.name(plan, index)] = formats.encode(rows, plan)
    return found


class Committer:
    """Writes shards to a store; `owner` marks temporary files of this run."""

    def __init__(self, plan: DatasetPlan, store: Store, owner: str, device: str):
        self.plan, self.store, self.owner = plan, store, owner
        self._about = environment.describe(device)
        self.environment = environment.key(self._about)
        self._told = False

    def __call__(self, rows: Rows) -> Entry:
        """Encode `rows` and put their files in place; the entry is for the manifest."""
        self._tell()
        began = time.perf_counter()
        files = contents(rows, self.plan)
        encoded = time.perf_counter()
        written = []
        for name, data in files.items():
            digest = hashlib.sha256(data).hexdigest()
            stat = self.store.put(name, data, self.owner)
            written.append(File(name, len(data), digest, stat.stamp))
        spent = {"began": rows.began, "sample": rows.seconds, "encode": encoded - began, "write": time.perf_counter() - encoded}
        seconds = {k: round(v, 4) for k, v in spent.items()}
        return Entry(rows.shard.index, len(rows.ids), tuple(reversed(written)), len(rows.quarantined),
                     sum(len(r["ids"]) for r in rows.rejected), self.environment, self.owner, seconds)

    def _tell(self) -> None:
        name = f"{HOME}/environment-{self.environment}.json"
        if not self._told and not self.store.exists(name):
            self.store.put(name, (json.dumps(self._about, indent=1, sort_keys=True) + "\n").encode(), self.owner)
        self._told = True


def make(maker: Maker, index: int) -> dict[str, bytes]:
    """The files of shard `index`, made anew."""
    return contents(maker.sample(index), maker.plan)
