"""`python -m bench.compare BASE`: bench/suite against this tree and commit BASE, in turns; exits 1 where this tree is slower.

BASE is checked out and installed under build/compare, once per commit. The least time of each round counts, its median over
rounds is compared: what else runs on a machine only adds.
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
    """The Python of commit `base`, checked out and installed under build/compare."""
    named = ["git", "rev-parse", "--verify", f"{base}^{{commit}}"]
    commit = subprocess.run(named, cwd=ROOT, capture_output=True, text=True, check=True)
    tree = ROOT / "build" / "compare" / commit.stdout.strip()[:12]
    if not tree.exists():
        subprocess.run(["git", "worktree", "add", "--detach", tree, base], cwd=ROOT, check=True)
    subprocess.run(["make", ".venv/.installed"], cwd=tree, check=True)
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
    """A table of ratios, and the names that are slower by more than `slack`."""
    lines, slower = [f"{'':60}{'base':>12}{'here':>12}{'ratio':>8}"], []
    for name in ours[0]:
        base = [t[name] for t in theirs if name in t]
        here = statistics.median(t[name] for t in ours)
        if not base:
            lines.append(f"{name:60}{'-':>12}{1e3 * here:>9.3f} ms")
            continue
        ratio = here / statistics.median(base)
        slower += [name] * (ratio > 1 + slack)
        lines.append(f"{name:60}{1e3 * statistics.median(base):>9.3f} ms{1e3 * here:>9.3f} ms{ratio:>8.2f}")
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
    for _ in range(options.rounds):
        theirs.append(run(python, folder / "base.json", options.seconds))
        ours.append(run(sys.executable, folder / "here.json", options.seconds))
    text, slower = compared(ours, theirs, options.slack)
    print(text)
    if slower:
        print(f"slower than {options.base} by more than {100 * options.slack:.0f} %: {', '.join(slower)}")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
