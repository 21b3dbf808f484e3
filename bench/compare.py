"""`python -m bench.compare BASE`: bench/suite against this tree and commit BASE, in turns; exits 1 where this tree is slower.

BASE is checked out and installed under build/compare, once per commit. The least time of each turn counts, as what else runs on a
machine only adds; ratios are of turns that follow each other, and their median is compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SUITE = ROOT / "bench" / "suite"


def install(base: str) -> Path:
    """The Python of commit `base`, checked out and installed under build/compare; a clone, as a worktree outlives its folder."""
    command = ["git", "rev-parse", "--verify", "--quiet", f"{base}^{{commit}}"]
    named = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if named.returncode:
        raise SystemExit(f"`BASE` must name a commit, got {base!r}")
    commit = named.stdout.strip()
    tree = ROOT / "build" / "compare" / commit[:12]
    if not (tree / "Makefile").exists():
        subprocess.run(["git", "clone", "--quiet", "--shared", "--no-checkout", ROOT, tree], check=True)
        subprocess.run(["git", "checkout", "--quiet", "--detach", commit], cwd=tree, check=True)
    print(f"installing {base} ({commit[:12]}) under {tree}", flush=True)
    subprocess.run(["make", "--silent", ".venv/.installed"], cwd=tree, check=True)
    python = tree / ".venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", "pytest-benchmark"], check=True)
    return python


def run(python: Path | str, out: Path, seconds: float) -> dict[str, float]:
    """The least seconds of each benchmark of the suite."""
    environment = {**os.environ, "EBMFAST_MEASURE": "0", "OMP_NUM_THREADS": "1"}
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", SUITE, "-c", os.devnull, SUITE,
               f"--benchmark-json={out}", f"--benchmark-max-time={seconds}", "--benchmark-disable-gc", "--benchmark-warmup=on"]
    done = subprocess.run([str(c) for c in command], cwd=out.parent, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{python} failed:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")
    return {b["name"]: b["stats"]["min"] for b in json.loads(out.read_text())["benchmarks"]}


def compared(ours: list[dict[str, float]], theirs: list[dict[str, float]], slack: float) -> tuple[str, list[str]]:
    """A table of ratios with their spread over turns, and the names that are slower by more than `slack`, and in every turn."""
    lines, slower = [f"{'':52}{'base':>12}{'here':>12}{'ratio':>8}{'over turns':>15}"], []
    for name in ours[0]:
        label, here = name.removeprefix("test_a_prepared_run"), statistics.median(t[name] for t in ours)
        ratios = [a[name] / b[name] for a, b in zip(ours, theirs) if name in b]
        if not ratios:
            lines.append(f"{label:52}{'-':>12}{1e3 * here:>9.3f} ms")
            continue
        ratio, base = statistics.median(ratios), statistics.median(t[name] for t in theirs)
        slower += [name] * (ratio > 1 + slack and min(ratios) > 1)
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        lines.append(f"{label:52}{1e3 * base:>9.3f} ms{1e3 * here:>9.3f} ms{ratio:>8.2f}{spread:>15}")
    return "\n".join(lines), slower


def main(argv: list[str] | None = None) -> int:
    """Compare and print; 1 where something is slower."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__.splitlines()[0])
    parser.add_argument("base", help="a commit, for instance main")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, help="per benchmark and turn (default: %(default)s)")
    parser.add_argument("--slack", type=float, default=0.1, help="what counts as slower (default: %(default)s)")
    options = parser.parse_args(argv)
    python, folder = install(options.base), ROOT / "build" / "compare"
    ours, theirs = [], []
    for k in range(options.rounds):
        print(f"turn {k + 1} of {options.rounds} ...", flush=True)
        theirs.append(run(python, folder / "base.json", options.seconds))
        ours.append(run(sys.executable, folder / "here.json", options.seconds))
    print("Ratios are this tree's time over the base's: more than 1 is slower here.")
    text, slower = compared(ours, theirs, options.slack)
    print(text)
    if slower:
        print(f"slower than {options.base} by more than {100 * options.slack:.0f} %: {', '.join(slower)}")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
