"""Times that were measured once and are kept in the user's cache folder, because choices between ways to compute rest on them.

`EBMFAST_CACHE` moves the folder; with `EBMFAST_MEASURE=0` nothing is measured, and every choice is the documented one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

MOST = 4096  # entries
_lock = threading.Lock()
_measuring = threading.RLock()  # threads of several devices choose alike: the first measures
_known: dict[str, list[float]] | None = None
_from: Path | None = None


def allowed() -> bool:
    """Whether anything may be measured."""
    return os.environ.get("EBMFAST_MEASURE") != "0"


def once(key: str, measure: Callable[[], Sequence[float]]) -> list[float]:
    """The seconds that `measure` found under this key, now or at any time before."""
    with _measuring:
        with _lock:
            found = _read().get(key)
        if found is None:
            found = [float(v) for v in measure()]
            with _lock:
                _add(key, found)
    return found


def key(*facts, device: torch.device) -> str:
    """What a measurement depends on: `facts`, the machine, the threads, torch."""
    cuda = device.type == "cuda"
    machine = torch.cuda.get_device_name(device) if cuda else f"{platform.processor()} {platform.machine()} {_cpu()}"
    return hashlib.sha256(repr((*facts, machine, torch.get_num_threads(), torch.__version__)).encode()).hexdigest()[:32]


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return ""


def path() -> Path:
    """The file, whose text is `{key: [seconds, ...]}`; where there is no home folder, none that exists."""
    folder = os.environ.get("EBMFAST_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "ebmfast")
    try:
        return Path(folder).expanduser() / "measured.json"
    except RuntimeError:  # a user that the machine does not know, as in containers
        return Path(os.devnull) / "measured.json"


def forget() -> None:
    """Read the file anew at the next question."""
    global _known
    _known = None


def _read() -> dict[str, list[float]]:
    global _known, _from
    if _known is None or _from != path():
        _from = path()
        try:
            found = {k: [float(v) for v in values] for k, values in json.loads(_from.read_text()).items()
                     if isinstance(values, list)}
            _known = {k: values for k, values in found.items() if values and all(map(math.isfinite, values))}
        except (OSError, ValueError, AttributeError, TypeError):
            _known = {}
    return _known


def _add(key: str, seconds: list[float]) -> None:
    known = _read()
    known[key] = seconds
    for old in list(known)[:-MOST]:
        del known[old]
    try:
        _from.parent.mkdir(parents=True, exist_ok=True)
        partial = _from.with_suffix(f".{os.getpid()}.tmp")
        partial.write_text(json.dumps(known))
        partial.replace(_from)
    except OSError:
        pass  # a folder that cannot be written to: measured again by the next process
