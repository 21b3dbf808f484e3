"""One scene in, one picture out: a single object on a floor, rendered with Mitsuba 3.

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
SIZE_RANGE = (0.4, 0.7)
POSITION_SCALE = 1.2


@dataclass(frozen=True)
class Scene:
    """What is in one picture. `shape` None is an empty floor; position in [-1, 1], size in scene units."""

    shape: str | None
    color: tuple[float, float, float]
    position: tuple[float, float]
    size: float
    light: tuple[float, float, float] = (-3.0, -3.0, 6.7)
    intensity: float = 70.0
    ambient: float = 0.4
    floor: float = 0.6


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


def _object(mi, scene: Scene) -> dict:
    """Mitsuba nodes of the object, standing on the floor z = 0."""
    transform, s = mi.ScalarTransform4f, scene.size
    x, y = (POSITION_SCALE * p for p in scene.position)
    material = {"type": "diffuse", "reflectance": {"type": "rgb", "value": list(scene.color)}}
    if scene.shape == "cube":
        half = 0.85 * s
        place = transform().translate([x, y, half]).rotate([0, 0, 1], 25.0).scale(half)
        return {"object": {"type": "cube", "to_world": place, "bsdf": material}}
    if scene.shape == "sphere":
        return {"object": {"type": "sphere", "center": [x, y, s], "radius": s, "bsdf": material}}
    if scene.shape == "cylinder":
        radius, height = 0.8 * s, 1.9 * s
        side = {"type": "cylinder", "p0": [x, y, 0.0], "p1": [x, y, height], "radius": radius, "bsdf": material}
        cap = {"type": "disk", "to_world": transform().translate([x, y, height]).scale(radius), "bsdf": material}
        return {"object": side, "cap": cap}
    raise ValueError(f"`shape` must be one of {SHAPES} or None, got {scene.shape!r}")


def _camera(mi, resolution: int, samples: int, seed: int) -> dict:
    return {
        "type": "perspective",
        "fov": 31.0,
        "to_world": mi.ScalarTransform4f().look_at(
            origin=[0.0, -5.2, 4.6], target=[0.0, -0.05, 0.25], up=[0.0, 0.0, 1.0]
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
        "sensor": _camera(mi, resolution, samples, seed),
        "floor": {
            "type": "rectangle", "to_world": mi.ScalarTransform4f().scale(30.0),
            "bsdf": {"type": "diffuse", "reflectance": {"type": "rgb", "value": [scene.floor] * 3}},
        },
        "lamp": {
            "type": "point", "position": list(scene.light),
            "intensity": {"type": "rgb", "value": [scene.intensity] * 3},
        },
        "sky": {"type": "constant", "radiance": {"type": "rgb", "value": [scene.ambient] * 3}},
    }
    if scene.shape is not None:
        description.update(_object(mi, scene))
    image = mi.render(mi.load_dict(description), seed=seed)
    return np.asarray(to_srgb(np.array(image))).transpose(2, 0, 1).copy()


def to_srgb(linear: np.ndarray) -> np.ndarray:
    """Linear radiance to uint8 sRGB (IEC 61966-2-1), clipped to [0, 1] first."""
    v = np.clip(linear.astype(np.float64), 0.0, 1.0)
    v = np.where(v <= 0.0031308, 12.92 * v, 1.055 * v ** (1 / 2.4) - 0.055)
    return np.round(255.0 * v).astype(np.uint8)
