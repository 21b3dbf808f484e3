"""The micro-batch that is fastest per chain on this machine, where that is worth a measurement.

What a step of many chains leaves behind for its backward pass outgrows the caches of a CPU; fewer chains, and a model works on
fewer rows than it could. So a step of the largest micro-batch is timed, and one of half as many chains, and so on.
"""

from __future__ import annotations

import time
from collections.abc import Callable

MARGIN = 0.9  # a smaller micro-batch has to take less than this share of the time per chain
WORTH = 40  # measuring has to cost less than a run of that many steps of the largest micro-batch
SMALLEST = 2e-3  # seconds of a step, below which calls and not caches decide
PATIENCE = 0.1  # seconds; what takes longer is timed once


def candidates(most: int) -> list[int]:
    """Micro-batches from `most` down to a sixteenth of it, by halves."""
    sizes = [most]
    while len(sizes) < 5 and sizes[-1] > 1:
        sizes.append((sizes[-1] + 1) // 2)
    return sizes


def measure(step: Callable[[int], Callable[[], object]], most: int) -> list[float]:
    """Seconds of a step of each of `candidates(most)` chains, as long as halving helps; `step(rows)` prepares one."""
    times: list[float] = []
    for rows in candidates(most):
        work = step(rows)
        began = time.perf_counter()
        work()
        first = time.perf_counter() - began
        if not times and first < SMALLEST:
            return [first]
        best = first
        for _ in range(0 if first > PATIENCE else 4):
            began = time.perf_counter()
            work()
            best = min(best, time.perf_counter() - began)
        times.append(best)
        rates = [t / n for t, n in zip(times, candidates(most))]
        if len(rates) > 2 and rates[-1] > rates[-2] > rates[-3]:
            break
    return times


def fastest(times: list[float], most: int) -> int:
    """The micro-batch to run: the fastest per chain, but the largest one unless another gains more than a tenth."""
    rates = {n: t / n for n, t in zip(candidates(most), times)}
    best = min(rates, key=rates.get)
    return best if rates[best] < MARGIN * rates[most] else most


def describe(times: list[float], most: int) -> str:
    """What was measured, in words."""
    found = ", ".join(f"{n}: {1e3 * t / n:.3g}" for n, t in zip(candidates(most), times))
    return f"{fastest(times, most)} of at most {most} chains; ms per chain and step were measured as {found}"
