"""How much memory a forward and backward pass takes, and the micro-batch that a limit allows."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

SPARE = 1.25  # what allocators and libraries take beside the tensors that are seen
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
         "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def as_bytes(limit) -> int:
    """A number of bytes, or text like "2GB" or "512 MiB"."""
    if isinstance(limit, str):
        found = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", limit)
        if found and found[2].upper() in UNITS:
            try:
                limit = int(float(found[1]) * UNITS[found[2].upper()])
            except ValueError:
                pass
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise ValueError(f'`memory_limit` must be a number of bytes or text like "2GB" or "512MiB", got {limit!r}')
    return limit


class _Live(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, while they live."""

    def __init__(self):
        super().__init__()
        self.peak = self._bytes = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage(), known)
        if self._bytes > self.peak:
            self._drop()
            self.peak = max(self.peak, self._bytes)
        return out

    def _add(self, storage, known) -> None:
        place = storage.data_ptr()
        found = self._storages.get(place)
        if place in known or (found is not None and not found[0].expired()):
            return  # a view, or written in place
        self._bytes += storage.nbytes() - (0 if found is None else found[1])
        self._storages[place] = StorageWeakRef(storage), storage.nbytes()

    def _drop(self) -> None:
        for place in [k for k, (storage, _) in self._storages.items() if storage.expired()]:
            self._bytes -= self._storages.pop(place)[1]


def peak(work: Callable[[], object], device: torch.device) -> int:
    """Bytes that `work` has alive at its worst, beside what was there before."""
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device)  # not the device: another thread may be capturing on it
        stream.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        stream.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    with _Live() as live:
        work()
    return live.peak


def fitting(work: Callable[[int], object], limit: int, device: torch.device) -> int:
    """The greatest micro-batch for which `work(rows)` stays within `limit` bytes, its memory being linear in the rows.

    Raises:
        ValueError: one chain alone needs more.
    """
    one = peak(lambda: work(1), device)
    three = peak(lambda: work(3), device)
    each = max(1, (three - one) // 2)
    fixed = max(0, one - each)
    rows = int((limit / SPARE - fixed) // each)
    if rows < 1:
        raise ValueError(f"`memory_limit` is {limit:,} bytes, and one chain of this composition needs about {int(SPARE * one):,}")
    return rows


def total(device: torch.device) -> int:
    """Bytes of memory of that device; what is free just now would make results depend on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(size, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        return size
