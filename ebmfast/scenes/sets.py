"""The data sets that the package uses, by name."""
from __future__ import annotations

import json
from dataclasses import fields, replace

from .dataset import SceneConfig

# Each shape and each colour is seen in other pairs; none holds purple, which the continual sets need whole.
HELD_OUT = (("cube", "blue"), ("sphere", "green"), ("cylinder", "yellow"), ("cylinder", "red"))

TRAIN = SceneConfig(count=20_000, seed=0)
TEST = SceneConfig(count=2_000, seed=1)
OBJECTS = SceneConfig(count=16_000, seed=10, size_range=(0.3, 0.42), objects=(0.5, 0.35, 0.15), held_out=HELD_OUT)

SETS: dict[str, SceneConfig] = {
    "train": TRAIN,
    "test": TEST,
    "pairs": replace(TRAIN, held_out=HELD_OUT),
    "pairs-test": replace(TEST, held_out=HELD_OUT),
    "objects": OBJECTS,
    "objects-test": replace(OBJECTS, count=1_500, seed=11, held_out=(), objects=(1 / 3, 1 / 3, 1 / 3)),
    "objects-judge": replace(OBJECTS, count=8_000, seed=12, held_out=(), objects=(1 / 3, 1 / 3, 1 / 3)),
    "purple-cubes": SceneConfig(count=4_000, seed=20, shapes=("cube",), colors=("purple",)),
    "purple-shapes": SceneConfig(count=4_000, seed=21, colors=("purple",)),
    "purple-cubes-test": SceneConfig(count=500, seed=23, shapes=("cube",), colors=("purple",)),
    "purple-shapes-test": SceneConfig(count=500, seed=24, colors=("purple",)),
    "colors": SceneConfig(count=6_000, seed=22, held_out=HELD_OUT),
} | {f"vary-{name}": SceneConfig(count=500, seed=30, empty_fraction=0.0, variation=name)
     for name in ("color", "light", "size", "type")}

ABOUT = {
    "train": "one object, all pairs of shape and colour", "test": "the same, other pictures",
    "pairs": "one object, a fifth of the pairs never shown", "pairs-test": "the same, other pictures",
    "objects": "one to three smaller objects that do not touch", "objects-test": "the same, each count as often, all pairs",
    "objects-judge": "as objects-test, for the counter", "purple-cubes": "continual stage 1: purple cubes at positions",
    "purple-shapes": "continual stage 2: purple objects of all shapes", "purple-cubes-test": "stage 1, other pictures",
    "purple-shapes-test": "stage 2, other pictures", "colors": "continual stage 3: shapes in all colours",
    "vary-color": "colours never trained on", "vary-light": "the lamp on the other side", "vary-size": "smaller or larger",
    "vary-type": "slabs, capsules, snowmen",
}


def at_resolution(config: SceneConfig, resolution: int) -> SceneConfig:
    """The same set at another resolution; from 64 pixels on with 20 colours, camera height, and tints of light and floor."""
    if resolution < 64:
        return replace(config, resolution=resolution)
    return replace(config, resolution=resolution, palette=20, camera_jitter=0.15, tint_jitter=0.08)


def named(name: str, resolution: int = 32, count: int | None = None) -> SceneConfig:
    """A set by name, at a resolution, with another number of pictures if `count` is given; ValueError lists the names."""
    if name not in SETS:
        raise ValueError(f"no data set named {name!r}; there are {', '.join(SETS)}")
    config = at_resolution(SETS[name], resolution)
    return replace(config, count=count) if count else config


def command_of(config: SceneConfig, root) -> str:
    """The command that renders a data set."""
    for name, known in SETS.items():
        base = at_resolution(known, config.resolution)
        if replace(config, count=base.count, samples=base.samples, seed=base.seed) == base:
            changed = [f for f in ("count", "samples", "seed") if getattr(config, f) != getattr(base, f)]
            options = "".join(f" --{f} {getattr(config, f)}" for f in changed)
            size = "" if config.resolution == 32 else f" --resolution {config.resolution}"
            return f"ebmfast scenes {name} --root {root}{size}{options}"
    given = {f.name: getattr(config, f.name) for f in fields(config) if getattr(config, f.name) != f.default}
    return f"ebmfast scenes --root {root} --config '{json.dumps(given)}'"
