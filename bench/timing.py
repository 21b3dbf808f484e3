"""Timing (`ebmfast.benchmark.timing`), and where results of these benches go: bench/results/*.jsonl."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ebmfast.benchmark.timing import Variant, append, compare, copy_bandwidth, machine, quantiles, sound

__all__ = ["Variant", "compare", "copy_bandwidth", "fastest", "quantiles", "record", "sound"]

RESULTS = Path(os.environ.get("EBMFAST_RESULTS") or Path(__file__).parent / "results")


def record(bench: str, case: dict[str, object], results: dict[str, object]) -> None:
    """Prints the results and appends them, with machine and versions, to bench/results/<bench>.jsonl."""
    append(RESULTS / f"{bench}.jsonl", [{"bench": bench, **case, **results, **machine()}])
    print(json.dumps({**case, **results}, indent=1))


def fastest(times: dict[str, dict[str, float]], prefix: str) -> dict[str, dict[str, float]]:
    """`times` with one entry in the place of all whose names start with `prefix`: the fastest."""
    forms = [t for name, t in times.items() if name.startswith(prefix)]
    rest = {name: t for name, t in times.items() if not name.startswith(prefix)}
    return rest | ({prefix: min(forms, key=lambda t: t["median"])} if forms else {})
