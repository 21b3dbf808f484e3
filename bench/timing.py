"""Timing (`ebmfast.benchmark.timing`), and where results of these benches go: bench/results/*.jsonl."""

from __future__ import annotations

import json
from pathlib import Path

from ebmfast.benchmark.timing import Variant, append, compare, copy_bandwidth, machine, quantiles

__all__ = ["Variant", "compare", "copy_bandwidth", "quantiles", "record"]

RESULTS = Path(__file__).parent / "results"


def record(bench: str, case: dict[str, object], results: dict[str, object]) -> None:
    """Prints the results and appends them, with machine and versions, to bench/results/<bench>.jsonl."""
    append(RESULTS / f"{bench}.jsonl", [{"bench": bench, **case, **results, **machine()}])
    print(json.dumps({**case, **results}, indent=1))
