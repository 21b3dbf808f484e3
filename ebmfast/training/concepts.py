"""What each scene concept needs: how its condition enters the network, how long it trains, what its card says."""
from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from ..scenes.render import COLORS, POSITION_SCALE, SHAPES, SIZE_RANGE


def camera_homography(height: float = 0.5) -> list[float]:
    """Map (x, y, 1) of a position condition to homogeneous image coordinates (right, down) in [-1, 1].

    A pinhole camera sees the plane z = `height` through a 3x3 matrix; nine numbers, row-major.
    """
    origin, target = np.array([0.0, -5.2, 4.6]), np.array([0.0, -0.05, 0.25])
    forward = (target - origin) / np.linalg.norm(target - origin)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    down = -np.cross(right, forward)
    focal = 1.0 / math.tan(math.radians(31.0) / 2)
    rays = np.stack([focal * right, focal * down, forward])
    ground = np.array([[POSITION_SCALE, 0.0, 0.0], [0.0, POSITION_SCALE, 0.0], [0.0, 0.0, height]])
    ground[:, 2] -= origin
    return [round(float(v), 6) for v in (rays @ ground).ravel()]


@dataclass(frozen=True)
class ConceptRecipe:
    """Network arguments and training length of one concept; `labels` maps names to one-hot places."""

    name: str
    condition_dim: int
    iterations: int
    labels: tuple[str, ...] = ()
    ranges: tuple[tuple[float, float], ...] = ()
    network: dict = field(default_factory=dict)

    def label_vectors(self) -> dict[str, list[float]]:
        """Name -> condition vector; empty for a continuous concept."""
        return {n: [float(i == j) for j in range(self.condition_dim)] for i, n in enumerate(self.labels)}


RECIPES = {
    "position": ConceptRecipe(
        "position", 2, 3500, ranges=((-1.0, 1.0), (-1.0, 1.0)), network={"homography": camera_homography()}),
    "color": ConceptRecipe("color", len(COLORS), 3500, labels=tuple(COLORS)),
    "shape": ConceptRecipe("shape", len(SHAPES), 6500, labels=SHAPES, network={"widths": (32, 64, 96)}),
    "size": ConceptRecipe(
        "size", 1, 5500, ranges=(SIZE_RANGE,),
        network={"widths": (32, 64, 96), "center": 0.55, "scale": 0.15, "harmonics": 1}),
}
