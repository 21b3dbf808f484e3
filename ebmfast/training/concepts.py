"""What each scene concept needs: how its condition enters the network, how long it trains, what its card says."""
from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

from ..scenes.render import COLORS, COLORS_20, POSITION_SCALE, SHAPES, SIZE_RANGE


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
    """What one model learns, from which data, with which network and for how long.

    `name` is what `ebmfast train` calls it, `concept` what expressions and files call it and the data its condition; `group` is
    the folder of the models that are composed with it. `labels` maps names to one-hot places. `frozen` models of the group take
    part in the energy that is trained, as E(x | c) - E(x), each under its own labels of the same pictures. `prior_of` names a
    model of the group, one with a view as this one: its E(x) is taken over as it is, and only the ratio is trained. `options`
    are those of `TrainConfig` that differ from its defaults.
    """

    name: str
    condition_dim: int
    iterations: int
    labels: tuple[str, ...] = ()
    ranges: tuple[tuple[float, float], ...] = ()
    network: dict = field(default_factory=dict)
    concept: str = ""
    group: str = "pairs"
    data: str = "pairs"
    test: str = "pairs-test"
    frozen: tuple[str, ...] = ()
    prior_of: str = ""
    options: dict = field(default_factory=dict)
    prior_above: float = 0.15
    about: str = ""

    def __post_init__(self):
        object.__setattr__(self, "concept", self.concept or self.name)

    def at(self, resolution: int, palette: int = 6) -> ConceptRecipe:
        """The recipe for pictures of another size or palette: one more scale from 64 pixels on, more colours."""
        recipe, extra = self, palette - len(COLORS)
        names = tuple(COLORS_20)[:palette]
        if extra and self.labels == tuple(COLORS):
            recipe = replace(recipe, condition_dim=palette, labels=names)
        if extra and self.name == "joint":
            ranges = ((0.0, 1.0),) * extra + self.ranges
            network = self.network | {"place": self.network["place"] + extra}
            network |= {k: (v,) * extra + self.network[k] for k, v in (("center", 0.0), ("scale", 1.0))}
            recipe = replace(recipe, condition_dim=self.condition_dim + extra, ranges=ranges, network=network)
        if resolution >= 64:
            prior = {"prior": LARGE} if "view" in recipe.network else {}
            recipe = replace(recipe, network=recipe.network | LARGE | prior, iterations=15_000)
        return recipe

    def label_vectors(self) -> dict[str, list[float]]:
        """Name -> condition vector; empty for a continuous concept."""
        return {n: [float(i == j) for j in range(self.condition_dim)] for i, n in enumerate(self.labels)}


LARGE = {"widths": (64, 96, 128, 128), "depths": (1, 1, 2, 2)}
PLACE = {"homography": camera_homography()}
WIDE = {"widths": (32, 64, 96)}
SMALL = {"widths": (24, 40, 56)}
LUMINANCE = {"view": "luminance", "prior": {}, "widths": (32, 56, 80)}
COARSE = {"view": "coarse", "prior": {}, "widths": (24, 36, 48)}
HUELESS = LUMINANCE | {"prior": SMALL}
SIZES = {"center": 0.55, "scale": 0.15, "harmonics": 1}
SHAPES_AND_COLORS = len(SHAPES) + len(COLORS)
JOINT = {**WIDE, **PLACE, "place": SHAPES_AND_COLORS, "center": (0.0,) * (SHAPES_AND_COLORS + 2) + (0.55,),
         "scale": (1.0,) * (SHAPES_AND_COLORS + 2) + (0.15,)}
UNIT = (-1.0, 1.0)

RECIPES = {r.name: r for r in (
    ConceptRecipe("position", 2, 4000, ranges=(UNIT, UNIT), network=PLACE, about="where the object is"),
    ConceptRecipe("color", len(COLORS), 4000, labels=tuple(COLORS), about="which of six colours"),
    ConceptRecipe("shape", len(SHAPES), 7000, labels=SHAPES, network=LUMINANCE, about="cube, sphere or cylinder"),
    ConceptRecipe("coarse_color", len(COLORS), 2500, labels=tuple(COLORS), network=COARSE, concept="color", prior_of="shape",
                  options={"contrast_every": 1, "contrast_rows": 32, "contrast_start": 0.0},
                  about="which of six colours, by means over 8x8 blocks, over the prior of shape"),
    ConceptRecipe("size", 1, 6000, ranges=(SIZE_RANGE,), network=WIDE | SIZES, about="how large"),
    ConceptRecipe(
        "objects", 2, 6000, ranges=(UNIT, UNIT), network=WIDE | PLACE, concept="position", group="objects", data="objects",
        test="objects-test", about="where one of one to three objects is"),
    ConceptRecipe(
        "joint", SHAPES_AND_COLORS + 3, 7000, ranges=(*((0.0, 1.0),) * SHAPES_AND_COLORS, UNIT, UNIT, SIZE_RANGE), network=JOINT,
        group="joint", about="one model under shape, color, position and size together: what compositions are compared with"),
    ConceptRecipe(
        "stage_position", 2, 3500, ranges=(UNIT, UNIT), network=HUELESS | PLACE, concept="position", group="continual",
        data="purple-cubes", test="purple-cubes-test", prior_above=0.0,
        about="continual learning, stage 1: positions of purple cubes"),
    ConceptRecipe(
        "stage_shape", len(SHAPES), 4000, labels=SHAPES, network=HUELESS, concept="shape", group="continual",
        data="purple-shapes", test="purple-shapes-test", frozen=("position",), prior_above=0.0,
        about="stage 2: shapes of purple objects, stage 1 frozen"),
    ConceptRecipe(
        "stage_color", len(COLORS), 4000, labels=tuple(COLORS), concept="color", group="continual", data="colors",
        test="pairs-test", frozen=("position", "shape"), prior_above=0.0, about="stage 3: colours, stages 1 and 2 frozen"),
)}

FACES = {r.name: r for r in (
    ConceptRecipe(name, 2, 30_000, labels=(f"not_{name}", name), group="faces", data="celeba", test="celeba", about=about)
    for name, about in (
        ("smiling", "faces: CelebA's Smiling"), ("male", "faces: CelebA's Male"),
        ("old", "faces: not CelebA's Young"), ("wavy_hair", "faces: CelebA's Wavy_Hair"),
        ("black_hair", "faces: CelebA's Black_Hair"), ("attractive", "faces: CelebA's Attractive"),
        ("eyeglasses", "faces: CelebA's Eyeglasses"), ("beard", "faces: not CelebA's No_Beard"))
)}
