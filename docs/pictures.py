"""`python docs/pictures.py`: draws the pictures of docs/*.md (needs matplotlib)."""

import math
import warnings
from pathlib import Path

import torch

import ebmfast as ef

HERE = Path(__file__).parent


def branches() -> None:
    """An OR of two far modes of unequal weight: from noise, in proportion to basins; drawn, in proportion to mass."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    wide = ef.Concept(ef.energies.Gaussian(torch.tensor([-4.0, 0.0]), torch.diag(torch.tensor([1.0, 1.0]))), name="wide")
    narrow = ef.Concept(ef.energies.Gaussian(torch.tensor([4.0, 0.0]), torch.diag(torch.tensor([0.25, 0.25]))), name="narrow")
    expr = ef.any_of([wide, narrow], log_weights=[math.log(0.2), math.log(0.8)])
    log_z = [ef.log_partition(e, (2,), std=4.0, n=400, levels=300, step_size=0.3, seed=0)[0] for e in ef.root_branches(expr)]
    n, options = 3000, dict(shape=(2,), sampler=ef.MALA(0.3), steps=150, seed=1, init="normal", energies=False)
    found = {"from noise": ef.sample(expr, n, **options),
             'branches drawn, log Z from log_partition': ef.sample(expr, n, branches=ef.DrawBranches(log_z), **options)}
    masses = torch.softmax(torch.tensor([math.log(0.2), math.log(0.8) + math.log(0.25)]), 0)
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), sharex=True, sharey=True, layout="constrained")
    for axis, (title, r) in zip(axes, found.items()):
        share = float((r.x[:, 0] > 0).float().mean())
        axis.plot(*r.x.T, ".", markersize=2, alpha=0.5, color="#345")
        axis.set(title=f"{title}\n{1 - share:.3f} left, {share:.3f} right (exact {masses[0]:.3f}, {masses[1]:.3f})", aspect="equal")
        axis.title.set_fontsize(10)
    figure.savefig(HERE / "branches.png", dpi=110)


def calibration() -> None:
    """An OR of concepts from two networks, as their energies weigh it and as their densities do."""
    zoo = ef.zoo.concepts()
    pair = [zoo["shape"]("cube"), zoo["color"]("red")]
    _, sampler = ef.zoo.recommended(pair[0])
    with warnings.catch_warnings():  # where noise is low, a chain stays in its branch, whatever the constants
        warnings.filterwarnings("ignore", "the branches do not overlap")
        known = ef.calibrate(pair, (3, 32, 32), sampler=sampler, n=48)
    titles = ["shape('cube') | color('red'), constants as they are", "calibrated"]
    rows = [ef.sample(ef.any_of(e), 16, (3, 32, 32), sampler, seed=0, energies=False).x for e in (pair, list(known))]
    ef.images.save(ef.images.grid(rows, titles, data_range=(-1, 1)), HERE / "calibration.png", {"calibration": str(known)})


if __name__ == "__main__":
    branches()
    calibration()
