"""`python -m bench [--only PART ...]`: every measurement on the CPU, about 15 minutes on two idle cores.

Parts run one after the other, each in a process of its own. A peer that is not installed is named, and the rest goes on; a part
that fails does so alone, and the exit status says so at the end. Results are appended to bench/results, or $EBMFAST_RESULTS, as
JSON lines; `make report` renders them into docs/performance.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bench.timing import RESULTS

ROOT = Path(__file__).parents[1]
PEERS = ("torchebm", "jax", "blackjax")


@dataclass(frozen=True)
class Part:
    """One module, its arguments here, what it measures and about how many minutes that takes on an idle core."""

    module: str
    about: str
    minutes: float
    arguments: tuple[str, ...] = ()


PARTS = {
    "noise": Part("bench.noise", "nanoseconds per normal", 0.1),
    "step": Part("bench.step", "the fused step against copy bandwidth, torch.compile and JAX", 0.9),
    "overhead": Part("bench.overhead", "a step of a trivial energy", 0.3),
    "chain": Part("bench.chain", "the chain engine, share of the roofline", 3.0),
    "metropolis": Part("bench.metropolis", "MALA and HMC against blackjax", 2.0, ("--rounds", "3")),
    "cubes": Part("bench.cubes", "the paper's networks at 64x64, stacks of small ones", 2.7, ("--rounds", "3")),
    "scaling": Part("bench.scaling", "time against chains, leaves, steps and dimension", 2.4),
    "quality": Part("bench.quality", "distance to the exact law against time", 1.7),
    "generate": Part("bench.generate", "data sets against the chain engine", 0.8, ("million", "share", "memory", "--size", "0.2")),
}


def run(name: str, log: Path, verbose: bool) -> dict:
    """One part: its exit status, minutes on the clock and of processors; what it prints goes to `log`."""
    part, began = PARTS[name], time.monotonic()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", part.module, *part.arguments]
    with open(log, "w") as file:
        out = None if verbose else file
        code = subprocess.run(command, cwd=ROOT, stdout=out, stderr=out and subprocess.STDOUT, check=False).returncode
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"code": code, "minutes": (time.monotonic() - began) / 60, "cpu_minutes": cpu / 60}


def main(argv: list[str] | None = None) -> int:
    """Run the parts, say how each went; 1 where one failed."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--list", action="store_true", help="name the parts and run nothing")
    parser.add_argument("--verbose", action="store_true", help="show what parts print; else it goes to build/bench/*.log")
    options = parser.parse_args(argv)
    if options.list:
        for name, part in PARTS.items():
            print(f"{name:12}{part.minutes:4.1f} min  {part.about} (python -m {' '.join((part.module, *part.arguments))})")
        return 0
    missing = [peer for peer in PEERS if importlib.util.find_spec(peer) is None]
    if missing:
        print(f"not installed, so not measured: {', '.join(missing)} (pip install -c constraints.txt '.[bench]')", flush=True)
    logs, failed, spent = ROOT / "build" / "bench", [], 0.0
    logs.mkdir(parents=True, exist_ok=True)
    if (load := os.getloadavg()[0]) > 0.5:
        print(f"the load average is {load:.1f}: figures of a busy machine are ratios at best", flush=True)
    for k, name in enumerate(options.only, 1):
        part = PARTS[name]
        print(f"[{k}/{len(options.only)}] {name}: {part.about}, about {part.minutes:.1f} min when idle ...", end=" ", flush=True)
        done = run(name, logs / f"{name}.log", options.verbose)
        spent += done["minutes"]
        print(f"{done['minutes']:.1f} min ({done['cpu_minutes']:.1f} of processor)", flush=True)
        if done["code"]:
            failed.append(name)
            tail = (logs / f"{name}.log").read_text().strip().splitlines()[-3:]
            print(f"  failed with status {done['code']}, see {logs / f'{name}.log'}:", *tail, sep="\n  ", flush=True)
    print(f"{spent:.1f} min in all; results are in {RESULTS}, `make report` renders them"
          + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
