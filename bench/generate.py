"""`python -m bench.generate [million | share | memory | resume ...] [--size 0.25]`: what data sets cost beyond sampling.

million  a plan of 10^6 samples of a composition of 2-D networks, against one call of the chain engine with as many threads
share    how much of the wall time sampling fills, for the bundled models and for `million`'s plan
memory   peak memory of a run, as n grows
resume   time until a run of 10 000 committed shards knows that nothing is left, hashes cached, and with a full check
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench.timing import record
from ebmfast.generate import generate, resolve
from ebmfast.generate import store as stores
from ebmfast.generate.maker import Maker, fixed_kernels
from ebmfast.generate.manifest import Manifest
from ebmfast.generate.session import Session

WORKERS = 2


def networks(n: int, shard_size: int = 50_000, steps: int = 100) -> dict:
    """AND of a mixture and two 2-64-64-1 networks, one with a condition per sample."""
    net = {"factory": "ebmfast.energies:MLP", "arguments": {"dim": 2, "widths": [64, 64]}}
    modes = {"factory": "ebmfast.energies:GaussianMixture", "arguments": {"means": [[-2.0, 0.0], [2.0, 0.0]], "covs": 0.3}}
    return {
        "n": n, "shard_size": shard_size, "shape": [2],
        "models": {
            "modes": modes, "a": net, "b": {**net, "arguments": net["arguments"] | {"condition_dim": 2}, "condition_dim": 2}},
        "compositions": [{"expression": "modes & 0.1*a & 0.1*b[Slot('c')]",
                          "conditions": {"c": {"uniform": {"low": [-1.0, -1.0], "high": [1.0, 1.0]}}}}],
        "sampler": {"kind": "langevin", "steps": steps, "step_size": 0.02}}


def pictures(n: int) -> dict:
    """A colour and a place from the bundled models, half of the usual steps."""
    return {"n": n, "shard_size": 32, "run": {"batch_size": 32}, "sampler": {"steps_per_level": 3},
            "compositions": [{"expression": "color[Slot('c')] & position[Slot('p')]", "conditions": {
                "c": {"grid": ["red", "green", "blue"]}, "p": {"uniform": {"low": [-0.8, -0.8], "high": [0.8, 0.8]}}}}]}


def timed(plan: dict, folder: Path, **options) -> float:
    """Seconds of a whole run, starts of processes and the card included."""
    began = time.perf_counter()
    assert generate(plan, folder, **options)
    return time.perf_counter() - began


def sampling_share(folder: Path) -> float:
    """Σ seconds of sampling / Σ seconds from a worker's second shard to its last: the first one prepares the run."""
    makers: dict[str, list[dict]] = {}
    for entry in Manifest(stores.at(folder), "reader").read().entries.values():
        makers.setdefault(entry.maker, []).append(entry.seconds)
    spent = passed = 0.0
    for shards in makers.values():
        shards = sorted(shards, key=lambda s: s["began"])[1:]
        spent += sum(s["sample"] for s in shards)
        passed += shards[-1]["began"] + shards[-1]["sample"] - shards[0]["began"] if shards else 0.0
    return spent / passed


def million(size: float) -> None:
    """The plan against the chain engine, in turns."""
    n = int(1_000_000 * size)
    plan = resolve(networks(n, int(50_000 * size)))
    run, conditions = (p := Maker(plan).composition(0)).run, p.conditions
    rows, _ = conditions.rows(torch.arange(n))

    def engine() -> float:
        began = time.perf_counter()
        with fixed_kernels(WORKERS):
            run(n, plan.spec.seed, conditions=rows, quick=False)
        return time.perf_counter() - began

    engine_seconds, data_seconds, alone = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(3 if size >= 1 else 2):
            engine_seconds.append(engine())
            data_seconds.append(timed(plan, Path(folder) / str(i), workers=WORKERS))
            entries = Manifest(stores.at(Path(folder) / str(i)), "reader").read().entries.values()
            alone.append(max(e.time for e in entries) * 1e-9 - min(e.seconds["began"] for e in entries))
        share = sampling_share(Path(folder) / "0")
    best = min(engine_seconds)
    record("generate", {"case": "million", "n": n, "steps": 100, "workers": WORKERS}, {
        "engine_seconds": engine_seconds, "data_seconds": data_seconds, "from_first_sample_seconds": alone,
        "ratio": min(data_seconds) / best, "ratio_without_start": min(alone) / best, "sampling_share": share})


def share(size: float) -> None:
    """Sampling's share of the wall time at steady state."""
    with tempfile.TemporaryDirectory() as folder:
        timed(pictures(32 * max(6, int(24 * size))), Path(folder) / "a", workers=WORKERS)
        timed(networks(max(200_000, int(1_000_000 * size)), 20_000), Path(folder) / "b", workers=WORKERS)
        found = {"bundled_models": "a", "networks_2d": "b"}
        found = {name: sampling_share(Path(folder) / where) for name, where in found.items()}
        record("generate", {"case": "share", "workers": WORKERS}, found)


PEAK = """
import json, resource, sys
from ebmfast.generate import generate
generate(json.loads(sys.argv[1]), sys.argv[2], workers=0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def memory(size: float) -> None:
    """Peak resident memory of one process that makes all of a data set, MiB, by n."""
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        for shards in (4, 16, 64):
            plan = networks(5_000 * shards, 5_000, 10)
            command = [sys.executable, "-c", PEAK, json.dumps(plan), f"{folder}/{shards}"]
            out = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks[5_000 * shards] = int(out.stdout) / 1024
    record("generate", {"case": "memory", "shard_size": 5_000}, {"peak_mib": peaks})


def resume(size: float) -> None:
    """Start of a run that finds everything done."""
    shards = int(10_000 * size)
    plan, times = resolve(networks(4 * shards, 4, 1) | {"run": {"batch_size": 4}}), {}
    with tempfile.TemporaryDirectory() as folder:
        times["make"] = timed(plan, Path(folder), workers=0)
        for name, full in (("cached", False), ("full_check", True)):
            os.sync()
            began = time.perf_counter()
            with Session(plan, stores.at(folder), "local", full_check=full) as session:
                assert session.complete
            times[name] = time.perf_counter() - began
    record("generate", {"case": "resume", "shards": shards}, {f"{k}_seconds": v for k, v in times.items()})


CASES = {"million": million, "share": share, "memory": memory, "resume": resume}


def main() -> None:
    """Run the cases that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[[], *CASES])
    parser.add_argument("--size", type=float, default=1.0, help="of the whole, 0.1 or more (default: %(default)s)")
    args = parser.parse_args()
    if not 0.1 <= args.size <= 1:
        parser.error(f"`--size` must be from 0.1 to 1, got {args.size}")
    for name in args.cases or CASES:
        CASES[name](args.size)


if __name__ == "__main__":
    main()
