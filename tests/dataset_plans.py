"""Small plans of native energies, and what tests compare of the data sets that they give."""

from __future__ import annotations

import hashlib
from pathlib import Path

NORMAL = {"factory": "ebmfast.energies:GaussianMixture", "arguments": {"means": [[-2.0, 0.0], [2.0, 0.0]], "covs": 0.3}}
NET = {"factory": "ebmfast.energies:MLP", "arguments": {"dim": 2, "widths": [8], "condition_dim": 2}, "condition_dim": 2,
       "labels": {"a": [1.0, 0.0], "b": [0.0, 1.0]}}


def points(n: int = 200, shard_size: int = 30, batch_size: int = 16, **changes) -> dict:
    """Two compositions of points in the plane, one over a grid of labels, one with random conditions."""
    plan = {
        "n": n, "seed": 3, "shard_size": shard_size, "shape": [2], "models": {"modes": NORMAL, "net": NET},
        "compositions": [
            {"name": "grid", "expression": "modes & 0.1*net[Slot('c')]", "conditions": {"c": {"grid": ["a", "b"]}}},
            {"name": "drawn", "expression": "modes & net[Slot('p')]",
             "conditions": {"p": {"uniform": {"low": [0.0, 0.0], "high": [1.0, 2.0]}}}}],
        "sampler": {"kind": "langevin", "steps": 5, "step_size": 0.05}, "run": {"batch_size": batch_size}}
    return plan | changes


def slow(shards: int = 40, steps: int = 1500) -> dict:
    """A plan whose shards take some hundredths of a second each."""
    return points(8 * shards * 16, 128, 64, sampler={"kind": "langevin", "steps": steps, "step_size": 0.01})


def pictures(n: int = 24, **changes) -> dict:
    """Pictures of the bundled models, by a schedule too short to show much."""
    plan = {
        "n": n, "seed": 1, "shard_size": 8, "run": {"batch_size": 4}, "sampler": {"levels": 3, "steps_per_level": 1},
        "compositions": [
            {"name": "colours", "expression": "color[Slot('c')] & position[Slot('p')]",
             "conditions": {"c": {"grid": ["red", "blue"]}, "p": {"uniform": {"low": [-0.5, -0.5], "high": [0.5, 0.5]}}}},
            {"name": "cube", "expression": "shape('cube')"}]}
    return plan | changes


def contents(folder: Path) -> dict[str, str]:
    """The hash of every file that a plan decides, by name."""
    names = [p for part in ("data", "rejected", "quarantine") for p in sorted((folder / part).glob("*"))]
    names += [p for p in (folder / "README.md", folder / "preview.png") if p.exists()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in names}
