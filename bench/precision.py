"""`python -m bench.precision`: what bfloat16 models do to samples, against float32 and against another seed.

For compositions of the bundled models: accuracy as the judge sees it, and the law of the composed energy (evaluated in
float32 for all): difference of means in standard errors, and the Kolmogorov-Smirnov distance. The row "float32, another seed" is
what chance alone does.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

import ebmfast as ef
from bench import timing
from bench.timing import record
from ebmfast.evaluation import TASKS, Settings, draw_conditions, evaluate, expression

SIGMA = 0.06  # of the energies that are compared


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference between the distribution functions of two samples (Kolmogorov-Smirnov)."""
    at = torch.cat([a, b]).sort().values
    below = [torch.searchsorted(s.sort().values, at, right=True) / len(s) for s in (a, b)]
    return float((below[0] - below[1]).abs().max())


def measure(name: str, n: int, settings: Settings, batch_size: int) -> None:
    families, judge, task = ef.zoo.concepts(), ef.zoo.load("judge"), TASKS[name]
    rows = draw_conditions(n, 1)
    used = {slot: rows[slot] for _, slot, _ in task.terms}
    expr = expression(task, settings, families)
    runs = {"float32": {}, "float32, another seed": {"seed": 1}, "bfloat16": {"compute_dtype": torch.bfloat16}}
    found, energies = {}, {}
    for label, options in runs.items():
        scores, x = evaluate(task, settings, families, judge, n, 1, options.pop("seed", 0), batch_size, **options)
        with torch.no_grad():
            parts = [expr.energy(x[i:i + 256], SIGMA, {k: v[i:i + 256] for k, v in used.items()}) for i in range(0, n, 256)]
        energies[label], found[label] = torch.cat(parts), scores
    base = energies["float32"]
    for label, e in energies.items():
        error = float(((e.var() + base.var()) / n).sqrt())
        found[label] |= {"energy_mean": float(e.mean()), "energy_std": float(e.std()),
                         "mean_shift_in_standard_errors": float(e.mean() - base.mean()) / error, "ks_distance": distance(e, base)}
    record("precision", {"task": name, "n": n, "ks_of_chance_5_percent": 1.36 * (2 / n) ** 0.5}, {"results": found})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.precision", description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=256, help="samples of each")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that everything runs; nothing is recorded")
    options = parser.parse_args()
    if options.smoke:
        timing.RESULTS = Path(tempfile.mkdtemp())
        measure("position AND color", 4, Settings(levels=2, steps_per_level=1), 4)
        return
    for name in ("position AND color", "position1 OR position2"):
        measure(name, options.n, Settings(), 128)


if __name__ == "__main__":
    main()
