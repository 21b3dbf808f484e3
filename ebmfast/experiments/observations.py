"""Several pictures of one scene: the object stays where and what it is, the surroundings change; or of one position."""
from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import scenes

KEPT = {"object": ("shape", "color", "position", "size", "others"), "position": ("position",)}
SEED = 40


def observe(count: int, each: int, same: str = "object", resolution: int = 32, root: str | Path = "data",
            samples: int = 25) -> tuple[Tensor, Tensor]:
    """`each` pictures of `count` scenes, `[count, each, 3, R, R]` in [-1, 1], and the objects' positions `[count, 2]`.

    With `same` "object" the pictures of a scene show one object in other surroundings; with "position" other objects at one
    position. Rendered once and cached under `root`. Raises ImportError without Mitsuba when they have to be rendered.
    """
    if same not in KEPT:
        raise ValueError(f"`same` must be one of {', '.join(KEPT)}, got {same!r}")
    config = replace(scenes.TEST, count=count * each, resolution=resolution, samples=samples, seed=SEED, empty_fraction=0.0)
    name = hashlib.sha256(json.dumps([asdict(config), each, same], sort_keys=True).encode()).hexdigest()[:12]
    path = Path(root) / f"observations-{name}.safetensors"
    if not path.exists():
        images, positions = zip(*(_scene(config, i, each, KEPT[same]) for i in range(count)))
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".tmp{os.getpid()}")
        save_file({"images": torch.stack(images), "position": torch.tensor(positions, dtype=torch.float32)}, str(partial))
        partial.replace(path)
    found = load_file(str(path))
    return found["images"].float() / 127.5 - 1.0, found["position"]


def _scene(config, index: int, each: int, kept: tuple[str, ...]):
    """Pictures `[each, 3, R, R]` uint8 of scene `index`, and where its object stands."""
    scene, labels = scenes.draw_scene(config, index)
    changing = [f.name for f in fields(scene) if f.name not in kept]
    pictures = []
    for k in range(each):
        other, _ = scenes.draw_scene(replace(config, seed=config.seed + 1), index * each + k)
        shown = replace(scene, **{name: getattr(other, name) for name in changing})
        pictures.append(torch.from_numpy(scenes.render(shown, config.resolution, config.samples, seed=index * each + k)))
    return torch.stack(pictures), tuple(map(float, labels["position"]))
