"""Lines of bench/results: the newest of each case and processor, and what peers took as multiples of ours."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

PEERS = ("eager", "torch.compile", "torchebm", "jax", "blackjax")
NAMES = {"jax": "JAX"}


def name_of(peer: str) -> str:
    """As a reader knows it."""
    return NAMES.get(peer, peer)


def load(folder: Path) -> dict[str, list[dict]]:
    """All lines by bench, oldest first."""
    found: dict[str, list[dict]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            if line.strip():
                entry = json.loads(line)
                found.setdefault(entry["bench"], []).append(entry)
    return {bench: sorted(lines, key=lambda e: e.get("time", "")) for bench, lines in found.items()}


def newest(lines: Iterable[dict], *keys: str) -> list[dict]:
    """The last line of each case: what agrees in `keys`, processor and instruction set."""
    found = {}
    for line in lines:
        found[tuple(str(line.get(k)) for k in (*keys, "device", "isa"))] = line
    return list(found.values())


def machine(line: dict) -> str:
    """The machine of a line, in words."""
    used = line.get("threads_used", line.get("threads"))
    return f"{line['device']} ({line['isa']}), {used} thread{'s' if used != 1 else ''}, torch {line['torch']}"


def ratios(line: dict) -> dict[str, float]:
    """Each peer's time over ours; of JAX the faster form."""
    unit = line.get("seconds") or line.get("us") or {}
    times = {name: t["median"] for name, t in unit.items() if isinstance(t, dict)}
    if line["bench"] == "step" and "step" in times:  # as older lines call it
        times["ebmfast"] = times.pop("step")
    if "ebmfast" not in times:
        return {}
    forms = [t for name, t in times.items() if name.startswith("jax")]
    times |= {"jax": min(forms)} if forms else {}
    return {peer: times[peer] / times["ebmfast"] for peer in PEERS if peer in times}


def of_last_machine(lines: list[dict]) -> list[dict]:
    """Those of the processor that was measured last."""
    last = max(lines, key=lambda e: e.get("time", ""))
    return [e for e in lines if (e["device"], e["isa"]) == (last["device"], last["isa"])]


def comparisons(results: dict[str, list[dict]]) -> list[tuple[str, dict, dict[str, float]]]:
    """(case, line, ratios) of all benches that have peers."""
    lines = [*results.get("chain", ()), *results.get("quick", ()), *results.get("gpu chain", ())]
    found = [(f"{e['case']}{case_size(e)}", e, ratios(e)) for e in newest(lines, "bench", "case", "chains", "dim")]
    found += [("a step of a quadratic, 64 chains of 8", e, ratios(e)) for e in newest(results.get("overhead", ()), "chains")]
    found += [(f"{e['case']}, {e['chains']} chains", e, ratios(e))
              for e in newest(results.get("metropolis", ()), "case", "chains")]
    found += [(step_name(e), e, ratios(e)) for e in newest(results.get("step", ()), "K", "shape", "gradients", "noise")]
    found += [(f"{e['case']}, {e['chains']} chains", e, _cubes(e))
              for e in newest(results.get("cubes", ()), "case", "chains", "size") if "results" in e]
    return [(name, line, r) for name, line, r in found if r]


def case_size(line: dict) -> str:
    net = f" {line['dim']}-{line['width']}-{line['width']}-1" if "width" in line else ""
    return f"{net}, {line['chains']} chains"


def step_name(line: dict) -> str:
    return (f"fused step, K = {line['K']}, {'x'.join(map(str, line['shape']))}, {line['gradients'].removeprefix('torch.')}"
            f"{', noise' if line['noise'] else ''}")


def _cubes(line: dict) -> dict[str, float]:
    """Against our float32, everybody in NCHW."""
    times = {name: r["ms"] for name, r in line["results"].items()}
    return {peer: times[peer] / times["float32"] for peer in PEERS if peer in times}
