"""Reading back: the rows of a data set as a torch `Dataset`, mapped into memory, not loaded."""

from __future__ import annotations

import bisect
import json
import mmap
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from . import formats, session
from . import store as stores
from .manifest import Manifest

KEPT = 8  # row groups, or files, that are held decoded or open


class ShardDataset(Dataset):
    """The rows of a data set that `generate` wrote, in the order of their ids; the committed ones, where it is not complete.

    An item is a dictionary: id, composition, x (float32 `[*S]`, or uint8 `[C, H, W]` where pictures or pixels are stored), and
    what the plan wrote: energy, leaf_energies `{leaf: number}`, conditions `{slot: float32 [C]}`, labels `{slot: text}`; what a
    composition has not is left out of these.

    Files of a folder are mapped into memory; Parquet decodes a row group at a time and keeps the last few, so reading in order, or
    a batch of neighbours, costs little. Workers of a `DataLoader` open files of their own.

    Args:
        path: the folder or fsspec URL.
        transform: a function of an item.
        columns: names of what an item is to hold; by default all.

    Raises:
        FileNotFoundError: no data set is there.
    """

    def __init__(self, path: str | Path, transform: Callable | None = None, columns: Sequence[str] | None = None):
        self.path, self.transform, self.columns = str(path), transform, None if columns is None else tuple(columns)
        store = stores.at(path)
        self.plan = session.saved_plan(store)
        self._entries = sorted(Manifest(store, "reader").read().entries.values(), key=lambda e: e.shard)
        self._ends = np.cumsum([e.rows for e in self._entries]).tolist()
        kind = {"parquet": ParquetFiles, "webdataset": TarFiles}[self.plan.spec.output.format]
        self._files = kind(store, self.plan)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict:
        count = len(self)
        index = index + count if index < 0 else index
        if not 0 <= index < count:
            raise IndexError(f"row {index} of {count}")
        at = bisect.bisect_right(self._ends, index)
        row = index - (self._ends[at - 1] if at else 0)
        item = self._files.item(self._entries[at].shard, row)
        if self.columns is not None:
            item = {k: item[k] for k in self.columns}
        return item if self.transform is None else self.transform(item)

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        """Several rows, read in the order in which they lie."""
        order = sorted(range(len(indices)), key=lambda i: indices[i])
        found = {i: self[indices[i]] for i in order}
        return [found[i] for i in range(len(indices))]


class _Files:
    """Open files by shard, the last few of them; none goes to another process."""

    def __init__(self, store: stores.Store, plan):
        self.store, self.plan = store, plan
        self._kept: OrderedDict = OrderedDict()

    def __getstate__(self):
        return vars(self) | {"_kept": OrderedDict()}

    def _cached(self, key, make: Callable):
        if key not in self._kept:
            self._kept[key] = make()
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def _map(self, shard: int):
        """The bytes of a shard: mapped, where it is a file here."""
        name = formats.name(self.plan, shard)
        if not isinstance(self.store, stores.Folder):
            return self.store.read(name)
        with self.store.open(name) as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


class ParquetFiles(_Files):
    """Rows of Parquet files, decoded by row group."""

    def item(self, shard: int, row: int) -> dict:
        """Row number `row` of a shard."""
        size = self.plan.row_group_size
        group = self._cached((shard, row // size), lambda: self._group(shard, row // size))
        return {name: pick(row % size) for name, pick in group.items()}

    def _group(self, shard: int, number: int) -> dict[str, Callable]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        from .formats import parquet

        file = self._cached(("file", shard), lambda: pq.ParquetFile(pa.BufferReader(pa.py_buffer(self._map(shard)))))
        table, plan = file.read_row_group(number), self.plan
        x = torch.from_numpy(np.array(parquet.samples(table, plan.storage, plan.shape)))
        x = x.permute(0, 3, 1, 2).contiguous() if plan.storage in ("png", "uint8") else x
        ids, names = table["id"].to_numpy(), table["composition"]
        found: dict[str, Callable] = {"id": lambda i: int(ids[i]), "composition": lambda i: names[i].as_py(), "x": lambda i: x[i]}
        if "energy" in table.column_names:
            energy = table["energy"].to_numpy()
            found["energy"] = lambda i: float(energy[i])
        for name, value in (("leaf_energies", float), ("conditions", torch.tensor), ("labels", str)):
            if name in table.column_names:
                column = table[name].combine_chunks()
                found[name] = lambda i, column=column, value=value: {
                    k: value(v) for k, v in column[i].as_py().items() if v is not None}
        return found


class TarFiles(_Files):
    """Samples of tar files, found by an index that is made when a file is first opened."""

    def item(self, shard: int, row: int) -> dict:
        """Sample number `row` of a shard."""
        from .formats import webdataset

        data, index = self._cached(shard, lambda: self._open(shard))
        (_, start, size), (name, at, length) = index[2 * row], index[2 * row + 1]
        about = json.loads(bytes(data[start:start + size]))
        x = torch.from_numpy(webdataset.read_array(name, bytes(data[at:at + length])))
        about["x"] = x.permute(2, 0, 1).contiguous() if self.plan.storage in ("png", "uint8") else x
        if "conditions" in about:
            about["conditions"] = {k: torch.tensor(v) for k, v in about["conditions"].items()}
        return about

    def _open(self, shard: int):
        """The bytes of a tar, and name, place and size of every member: two per sample."""
        data, index, at = self._map(shard), [], 0
        while at + 512 <= len(data) and (header := bytes(data[at:at + 512]))[0]:
            size = int(header[124:135], 8)
            index.append((header[:100].rstrip(b"\0").decode(), at + 512, size))
            at += 512 + -(-size // 512) * 512
        return data, index
