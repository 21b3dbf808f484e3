"""One scene in, one picture out: objects on a floor, rendered with Mitsuba 3.

Mitsuba is imported when the first picture is rendered, never by importing this module.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SHAPES = ("cube", "sphere", "cylinder")
COLORS = {
    "red": (0.80, 0.10, 0.08),
    "green": (0.12, 0.62, 0.14),
    "blue": (0.10, 0.20, 0.80),
    "yellow": (0.85, 0.72, 0.08),
    "cyan": (0.08, 0.66, 0.72),
    "purple": (0.52, 0.12, 0.66),
}
COLORS_20 = COLORS | {
    "orange": (0.85, 0.38, 0.05), "pink": (0.88, 0.42, 0.60), "brown": (0.38, 0.20, 0.08), "white": (0.88, 0.88, 0.88),
    "gray": (0.35, 0.35, 0.35), "black": (0.04, 0.04, 0.04), "lime": (0.55, 0.85, 0.10), "navy": (0.04, 0.06, 0.32),
    "maroon": (0.36, 0.03, 0.06), "olive": (0.38, 0.38, 0.06), "teal": (0.03, 0.33, 0.33), "magenta": (0.85, 0.08, 0.62),
    "sky": (0.40, 0.62, 0.90), "peach": (0.92, 0.66, 0.48),
}
UNSEEN_COLORS = {"orange": (0.85, 0.38, 0.05), "white": (0.88, 0.88, 0.88), "black": (0.05, 0.05, 0.05)}
UNSEEN_SHAPES = ("slab", "capsule", "snowman")
SIZE_RANGE = (0.4, 0.7)
POSITION_SCALE = 1.2
CAMERA_HEIGHT = 4.6


@dataclass(frozen=True)
class Thing:
    """One object: position in [-1, 1], size in scene units."""

    shape: str
    color: tuple[float, float, float]
    position: tuple[float, float]
    size: float


@dataclass(frozen=True)
class Scene:
    """What is in one picture. `shape` None is a floor without this object; `others` stand on it too.

    Position in [-1, 1], size in scene units; `tint` and `floor_tint` multiply the light's and the floor's colour.
    """

    shape: str | None
    color: tuple[float, float, float]
    position: tuple[float, float]
    size: float
    light: tuple[float, float, float] = (-3.0, -3.0, 6.7)
    intensity: float = 70.0
    ambient: float = 0.4
    floor: float = 0.6
    others: tuple[Thing, ...] = ()
    tint: tuple[float, float, float] = (1.0, 1.0, 1.0)
    floor_tint: tuple[float, float, float] = (1.0, 1.0, 1.0)
    camera_height: float = CAMERA_HEIGHT

    @property
    def things(self) -> tuple[Thing, ...]:
        """All objects of the scene."""
        first = () if self.shape is None else (Thing(self.shape, self.color, self.position, self.size),)
        return first + self.others


def load_mitsuba():
    """Import Mitsuba with the scalar_rgb variant; ImportError names the extra that installs it."""
    try:
        import mitsuba
    except ImportError as error:
        raise ImportError(
            "rendering scenes needs Mitsuba 3, which is not installed: pip install 'ebmfast[scenes]'"
        ) from error
    mitsuba.set_variant("scalar_rgb")
    mitsuba.set_log_level(mitsuba.LogLevel.Error)
    return mitsuba


def _parts(mi, thing: Thing) -> list[dict]:
    """Mitsuba shapes of one object, standing on the floor z = 0, without material."""
    transform, s = mi.ScalarTransform4f, thing.size
    x, y = (POSITION_SCALE * p for p in thing.position)

    def box(half_x, half_y, half_z):
        place = transform().translate([x, y, half_z]).rotate([0, 0, 1], 25.0).scale([half_x, half_y, half_z])
        return {"type": "cube", "to_world": place}

    def ball(height, radius):
        return {"type": "sphere", "center": [x, y, height], "radius": radius}

    def tube(height, radius):
        return {"type": "cylinder", "p0": [x, y, 0.0], "p1": [x, y, height], "radius": radius}

    if thing.shape == "cube":
        return [box(0.85 * s, 0.85 * s, 0.85 * s)]
    if thing.shape == "sphere":
        return [ball(s, s)]
    if thing.shape == "cylinder":
        height, radius = 1.9 * s, 0.8 * s
        return [tube(height, radius), {"type": "disk", "to_world": transform().translate([x, y, height]).scale(radius)}]
    if thing.shape == "slab":
        return [box(1.2 * s, 0.7 * s, 0.4 * s)]
    if thing.shape == "capsule":
        return [tube(1.2 * s, 0.65 * s), ball(1.2 * s, 0.65 * s)]
    if thing.shape == "snowman":
        return [ball(0.75 * s, 0.75 * s), ball(1.75 * s, 0.5 * s)]
    raise ValueError(f"`shape` must be one of {SHAPES + UNSEEN_SHAPES} or None, got {thing.shape!r}")


def _objects(mi, scene: Scene) -> dict:
    """Mitsuba nodes of all objects."""
    nodes = {}
    for k, thing in enumerate(scene.things):
        material = {"type": "diffuse", "reflectance": {"type": "rgb", "value": list(thing.color)}}
        nodes |= {f"object{k}_{i}": {**part, "bsdf": material} for i, part in enumerate(_parts(mi, thing))}
    return nodes


def _camera(mi, height: float, resolution: int, samples: int, seed: int) -> dict:
    return {
        "type": "perspective",
        "fov": 31.0,
        "to_world": mi.ScalarTransform4f().look_at(
            origin=[0.0, -5.2, height], target=[0.0, -0.05, 0.25], up=[0.0, 0.0, 1.0]
        ),
        "film": {
            "type": "hdrfilm", "width": resolution, "height": resolution, "rfilter": {"type": "box"},
            "pixel_format": "rgb", "component_format": "float32",
        },
        "sampler": {"type": "stratified", "sample_count": samples, "seed": seed},
    }


def render(scene: Scene, resolution: int = 32, samples: int = 25, seed: int = 0) -> np.ndarray:
    """Render a scene: path tracing of depth 2, stratified samples, box filter, diffuse materials only.

    Returns uint8 sRGB [3, resolution, resolution]. The same arguments give the same bytes. Raises ImportError
    without Mitsuba and ValueError for an unknown shape.
    """
    mi = load_mitsuba()
    description = {
        "type": "scene",
        "integrator": {"type": "path", "max_depth": 2},
        "sensor": _camera(mi, scene.camera_height, resolution, samples, seed),
        "floor": {
            "type": "rectangle", "to_world": mi.ScalarTransform4f().scale(30.0),
            "bsdf": {"type": "diffuse", "reflectance": {"type": "rgb", "value": [scene.floor * t for t in scene.floor_tint]}},
        },
        "lamp": {
            "type": "point", "position": list(scene.light),
            "intensity": {"type": "rgb", "value": [scene.intensity * t for t in scene.tint]},
        },
        "sky": {"type": "constant", "radiance": {"type": "rgb", "value": [scene.ambient * t for t in scene.tint]}},
    }
    description.update(_objects(mi, scene))
    image = mi.render(mi.load_dict(description), seed=seed)
    return np.asarray(to_srgb(np.array(image))).transpose(2, 0, 1).copy()


def to_srgb(linear: np.ndarray) -> np.ndarray:
    """Linear radiance to uint8 sRGB (IEC 61966-2-1), clipped to [0, 1] first."""
    v = np.clip(linear.astype(np.float64), 0.0, 1.0)
    v = np.where(v <= 0.0031308, 12.92 * v, 1.055 * v ** (1 / 2.4) - 0.055)
    return np.round(255.0 * v).astype(np.uint8)
