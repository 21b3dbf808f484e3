"""Table 3: where is the object? Its position by comparing energies, on renders of kinds that were not trained on.

Errors are distances from the true position in per cent of the scene's width: positions span 2, so 1 % is 0.02. The nearest
point of a 20x20 grid is 1.9 % away on average.
"""
from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..composition import Slot
from ..inference import Inference, grid, infer
from .measures import Cell, mean
from .protocol import Models, Protocol, Scored

MOST = 300  # renders of each kind
WAYS = ("lowest on the grid", "between its points")
POINTS = 20  # per coordinate: the paper's grid
SIGMA = 0.2
SPAN = 2.0
UNIT = "errors are distances in per cent of the scene's width"
PAPER = (
    ("row", "colour", "light", "size", "type", "avg", "test"),
    ("EBM, 200 steps", "10.899", "6.307", "8.431", "6.304", "7.985", "3.903"),
    ("EBM, 400 steps", "4.084", "4.033", "6.853", "3.694", "4.666", "2.917"),
    ("ResNet", "20.002", "5.881", "10.378", "6.310", "10.643", "3.635"),
    ("PixelCNN", "60.607", "58.589", "33.889", "48.138", "50.306", "43.460"),
    ("EBM, 1 and 10 observations", "", "", "", "", "", "about 7 and 2"))
OBSERVATIONS = (1, 2, 3, 5, 10)


def errors(found: Tensor, truth: Tensor) -> Tensor:
    """Distances [N] between positions [N, 2], in per cent of the scene's width."""
    return (found - truth).norm(dim=1) * (100 / SPAN)


def posterior(x: Tensor, models: Models, sigma: float = SIGMA, seed: int = 0) -> Inference:
    """The energies of a 20x20 grid of positions for pictures [n, 3, R, R], noised once each."""
    card = models.cards["position"]
    return infer(x, models.families["position"][Slot("p")], {"p": grid(card["ranges"], POINTS)}, seed=seed,
                 sigma=sigma if card.get("takes_sigma", True) else None)


def estimates(found: Inference) -> dict[str, Tensor]:
    """Positions [scenes, 2]: the grid's point of lowest energy, and the lowest of the quadratic through it and its neighbours."""
    return {"lowest on the grid": found.best["p"], "between its points": found.refined("p")}


def by_kind(sets: Mapping[str, object], models: Models, protocol: Protocol) -> list[Scored]:
    """A line for each estimate, a column for each set of renders."""
    lines = {way: Scored("one observation", f"{models.method}, {way}", {}, density=f"p(c | x) at sigma {SIGMA:g}")
             for way in WAYS}
    lines["judge"] = Scored("one observation", "real renders: the judge's own reading", {})
    lines["chance"] = Scored("one observation", "chance", {})
    started = time.perf_counter()
    for name, data in sets.items():
        data = data.with_object()[slice(0, min(protocol.n, MOST))]
        x, truth = data.pixels(), data.position
        found = estimates(posterior(x, models, seed=protocol.seed))
        found["judge"] = protocol.reader.read(x)["position"]
        found["chance"] = protocol.law.labels(len(x), torch.Generator().manual_seed(protocol.condition_seed))["position"]
        for way, positions in found.items():
            lines[way].cells[name] = mean(errors(positions, truth), torch.arange(len(x)))
    for way in WAYS:
        lines[way].seconds = round(time.perf_counter() - started, 1)
        _average(lines[way], sets)
    return list(lines.values())


def _average(line: Scored, sets: Mapping) -> None:
    """The mean over the kinds that were held out."""
    held_out = [line.cells[name].value for name in sets if name != "test"]
    if held_out:
        line.cells["avg"] = Cell(sum(held_out) / len(held_out))


def by_observations(pictures: Tensor, truth: Tensor, models: Models, protocol: Protocol, of: str) -> list[Scored]:
    """A line for each number of observations [scenes, K, 3, R, R] of one scene, whose energies add up; `of` says of what."""
    lines, started = [], time.perf_counter()
    single = posterior(pictures.flatten(0, 1), models, seed=protocol.seed)
    energy = single.energy.view(*pictures.shape[:2], -1)
    seconds = round(time.perf_counter() - started, 1)
    for count in (k for k in OBSERVATIONS if k <= pictures.shape[1]):
        for way, positions in estimates(replace(single, energy=energy[:, :count].sum(1))).items():
            cell = mean(errors(positions, truth), torch.arange(len(truth)))
            title = f"{count} observation{'s' if count > 1 else ''} of {of}"
            lines.append(Scored(title, f"{models.method}, {way}", {"test": cell}, f"p(c | x_1 .. x_{count}) at sigma {SIGMA:g}",
                                seconds=seconds))
    return lines
