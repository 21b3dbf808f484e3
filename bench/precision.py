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
from ebmfast.experiments import EXPERIMENTS, Row, Settings
from ebmfast.experiments.protocol import Models, Protocol, expression

SIGMA = 0.06  # of the energies that are compared


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference between the distribution functions of two samples (Kolmogorov-Smirnov)."""
    at = torch.cat([a, b]).sort().values
    below = [torch.searchsorted(s.sort().values, at, right=True) / len(s) for s in (a, b)]
    return float((below[0] - below[1]).abs().max())


def measure(row: Row, n: int, settings: Settings, batch_size: int) -> None:
    models = Models.bundled()
    composed = expression(row, models, settings)
    runs = {"float32": {}, "float32, another seed": {"seed": 1}, "bfloat16": {"options": {"compute_dtype": torch.bfloat16}}}
    found, energies = {}, {}
    for label, options in runs.items():
        protocol = Protocol(ef.zoo.load("judge"), models.law, n=n, conditions=max(2, n // 4), batch_size=batch_size, **options)
        rows, _ = protocol.rows(row)
        used = {slot: rows[slot] for slot in composed.slots}
        sampler, steps = models.sampler(settings)
        x, _ = protocol._draw(composed, sampler, steps, used, models)
        with torch.no_grad():
            parts = [composed.energy(x[i:i + 256], SIGMA, {k: v[i:i + 256] for k, v in used.items()}) for i in range(0, n, 256)]
        seen = protocol.reader.read(x)
        energies[label] = torch.cat(parts)
        found[label] = {title: float(node.right(seen, rows).float().mean()) for title, node in row.columns.items()}
    base = energies["float32"]
    for label, e in energies.items():
        error = float(((e.var() + base.var()) / n).sqrt())
        found[label] |= {"energy_mean": float(e.mean()), "energy_std": float(e.std()),
                         "mean_shift_in_standard_errors": float(e.mean() - base.mean()) / error, "ks_distance": distance(e, base)}
    record("precision", {"row": row.title, "n": n, "ks_of_chance_5_percent": 1.36 * (2 / n) ** 0.5}, {"results": found})


def rows() -> list[Row]:
    """An AND and an OR."""
    wanted = ("position AND color", "position 1 OR position 2")
    return [row for e in EXPERIMENTS.values() for row in e.rows if row.title in wanted][:2]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.precision", description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=256, help="samples of each")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that everything runs; nothing is recorded")
    options = parser.parse_args()
    if options.smoke:
        timing.RESULTS = Path(tempfile.mkdtemp())
        measure(rows()[0], 4, Settings(levels=2, steps_per_level=1), 4)
        return
    for row in rows():
        measure(row, options.n, Settings(), 128)


if __name__ == "__main__":
    main()
