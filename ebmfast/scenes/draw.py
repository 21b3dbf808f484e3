"""Scenes at random: what stands where, under which light, as a function of a data set's configuration and an index."""
from __future__ import annotations

import numpy as np

from .render import CAMERA_HEIGHT, POSITION_SCALE, SHAPES, UNSEEN_COLORS, UNSEEN_SHAPES, Scene, Thing

UNSEEN_SIZES = ((0.28, 0.38), (0.72, 0.82))
LAMP = (-3.0, -3.0, 6.7)
UNSEEN_LAMP = (3.0, -3.0, 6.7)
TRIES = 200


def draw_single(config, index: int) -> tuple[Scene, dict]:
    """A scene of one object or none, and its labels: position, size, and the indices of shape and colour (-1: none)."""
    rng = np.random.default_rng([config.seed, index])
    empty = rng.uniform() < config.empty_fraction
    shape, color = _kind(config, rng)
    x, y = rng.uniform(-1.0, 1.0, 2)
    size = rng.uniform(*config.size_range)
    rgb = _reflectance(config, color, rng)
    scene = _surroundings(config, rng)
    if config.variation == "size":
        size = rng.uniform(*UNSEEN_SIZES[rng.integers(len(UNSEEN_SIZES))])
    if config.variation == "color":
        rgb = list(UNSEEN_COLORS.values())[rng.integers(len(UNSEEN_COLORS))]
    name = UNSEEN_SHAPES[rng.integers(len(UNSEEN_SHAPES))] if config.variation == "type" else SHAPES[shape]
    scene = Scene(shape=None if empty else name, color=rgb, position=(float(x), float(y)), size=float(size), **scene)
    labels = {"position": (x, y), "size": size, "shape": -1 if empty else shape, "color": -1 if empty else color}
    return scene, labels


def draw_objects(config, index: int) -> tuple[Scene, dict]:
    """A scene of one to K objects that do not touch, or of none, and its labels: arrays [K, ...], -1 where there is none."""
    rng = np.random.default_rng([config.seed, index])
    most = len(config.objects)
    count = 0 if rng.uniform() < config.empty_fraction else 1 + int(rng.choice(most, p=config.objects))
    kinds = [_kind(config, rng) for _ in range(count)]
    sizes = rng.uniform(*config.size_range, count)
    places = _places(sizes, rng)
    colors = [_reflectance(config, color, rng) for _, color in kinds]
    scene = _surroundings(config, rng)
    things = tuple(Thing(SHAPES[s], c, tuple(map(float, p)), float(size))
                   for (s, _), c, p, size in zip(kinds, colors, places, sizes))
    labels = {"position": np.zeros((most, 2)), "size": np.zeros(most), "shape": np.full(most, -1), "color": np.full(most, -1)}
    for k, ((shape, color), place, size) in enumerate(zip(kinds, places, sizes)):
        for name, value in (("position", place), ("size", size), ("shape", shape), ("color", color)):
            labels[name][k] = value
    return Scene(None, (0.0, 0.0, 0.0), (0.0, 0.0), 0.0, others=things, **scene), labels


def _kind(config, rng) -> tuple[int, int]:
    """Indices of a shape and a colour, uniform over the pairs that are shown."""
    names, pairs = list(config.known_colors), set(config.pairs)
    while True:  # without restrictions the first draw holds, and is what older data sets drew
        shape, color = int(rng.integers(len(SHAPES))), int(rng.integers(len(names)))
        if (SHAPES[shape], names[color]) in pairs:
            return shape, color


def _reflectance(config, color: int, rng) -> tuple[float, float, float]:
    rgb = np.array(list(config.known_colors.values())[color]) + rng.uniform(-config.color_jitter, config.color_jitter, 3)
    return tuple(np.clip(rgb, 0.02, 0.98).tolist())


def _surroundings(config, rng) -> dict:
    """Lamp, sky, floor and camera."""
    centre = UNSEEN_LAMP if config.variation == "light" else LAMP
    light = np.array(centre) + rng.uniform(-config.light_jitter, config.light_jitter, 3)
    intensity, ambient, floor = (float(rng.uniform(*r)) for r in ((60.0, 80.0), (0.35, 0.45), (0.55, 0.65)))
    drawn = {"light": tuple(light.tolist()), "intensity": intensity, "ambient": ambient, "floor": floor}
    if config.camera_jitter:
        drawn["camera_height"] = CAMERA_HEIGHT + float(rng.uniform(-config.camera_jitter, config.camera_jitter))
    if config.tint_jitter:
        tints = 1.0 + rng.uniform(-config.tint_jitter, config.tint_jitter, (2, 3))
        drawn |= {"tint": tuple(tints[0].tolist()), "floor_tint": tuple(tints[1].tolist())}
    return drawn


def _places(sizes: np.ndarray, rng) -> np.ndarray:
    """Positions [count, 2], uniform where no two objects touch (sizes bound their half-widths)."""
    while True:
        found: list[np.ndarray] = []
        for size in sizes:
            for _ in range(TRIES):
                place = rng.uniform(-1.0, 1.0, 2)
                gaps = (POSITION_SCALE * np.linalg.norm(place - q) - 1.2 * (size + s) for q, s in zip(found, sizes))
                if all(gap > 0 for gap in gaps):
                    found.append(place)
                    break
            else:
                break
        if len(found) == len(sizes):
            return np.array(found).reshape(-1, 2)
