"""Interleaved timing: every variant is checked first, all take turns in one process. Results: JSON lines.

A variant that computes the wrong thing gets no time.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from .._native import core

__all__ = ["Variant", "append", "compare", "copy_bandwidth", "cpu_name", "machine", "quantiles", "sound"]


class Variant:
    """A named function to time. ``check`` raises if it computes the wrong thing."""

    def __init__(self, name: str, run: Callable[[], object], check: Callable[[], None]) -> None:
        self.name, self.run, self.check = name, run, check


def compare(
    variants: Iterable[Variant], *, rounds: int = 15, clock=time.perf_counter, measure=None
) -> dict[str, list[float]]:
    """Seconds per call of each variant, sorted; they take turns, after a check and a warm-up call of each.

    ``measure``, in the place of a clock: a function of a variant that runs it and returns seconds."""
    variants = list(variants)
    for variant in variants:
        variant.check()
        variant.run()
    seconds: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for _ in range(rounds):
        for variant in variants:
            if measure is not None:
                seconds[variant.name].append(measure(variant))
                continue
            start = clock()
            variant.run()
            seconds[variant.name].append(clock() - start)
    return {name: sorted(values) for name, values in seconds.items()}


def sound(makers: dict[str, Callable[[], Variant]], ours: tuple[str, ...] = ("ebmfast",)) -> tuple[list[Variant], dict[str, str]]:
    """The variants that are here and right, checked and warm, and why the others are not. What fails of `ours` raises."""
    found, trouble = [], {}
    for name, make in makers.items():
        try:
            variant = make()
            variant.name = name
            variant.check()
            variant.run()
        except Exception as error:
            if name in ours:
                raise
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            trouble[name] = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:160]
            continue
        found.append(Variant(name, variant.run, lambda: None))
    return found, trouble


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    fifths = statistics.quantiles(seconds, n=5)
    return {"median": statistics.median(seconds), "p20": fifths[0], "p80": fifths[3]}


def copy_bandwidth(n_bytes: int) -> Variant:
    """torch's copy of ``n_bytes``, which reads and writes that much: the roofline of a streaming kernel."""
    source, target = torch.ones(n_bytes // 4), torch.zeros(n_bytes // 4)

    def check() -> None:
        target.copy_(source)
        assert torch.equal(source, target)

    return Variant("copy", lambda: target.copy_(source), check)


def machine() -> dict[str, object]:
    """What a figure was taken on: processor, instruction set, threads, versions, commit, compiler, time."""
    build = core.build_info()
    return {
        "device": cpu_name(),
        "isa": core.isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "ebmfast": build["version"],
        "commit": build["commit"],
        "compiler": build["compiler"],
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def append(path: Path, lines: Iterable[dict[str, object]]) -> None:
    """Append results as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def cpu_name() -> str:
    """The processor's name, as far as the system tells it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
