"""A data set of rendered scenes: made once in parallel, cached by its configuration, read without the renderer."""
from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from .render import COLORS, SHAPES, SIZE_RANGE, Scene, load_mitsuba, render

PART = 250
FORMAT = 1


@dataclass(frozen=True)
class SceneConfig:
    """Everything that decides the bytes of a data set; picture i is a function of (config, i) alone."""

    count: int = 20_000
    resolution: int = 32
    samples: int = 25
    seed: int = 0
    empty_fraction: float = 0.05
    light_jitter: float = 0.8
    color_jitter: float = 0.06

    def digest(self) -> str:
        """First 12 hex digits of the sha256 of the configuration, the renderer's format and the palette."""
        text = json.dumps([FORMAT, asdict(self), list(SHAPES), COLORS], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


TRAIN = SceneConfig(count=20_000, seed=0)
TEST = SceneConfig(count=2_000, seed=1)


@dataclass
class SceneData:
    """Pictures and labels: images uint8 [N, 3, R, R]; position [N, 2]; size [N]; shape, color int64 [N], -1 if empty."""

    images: torch.Tensor
    position: torch.Tensor
    size: torch.Tensor
    shape: torch.Tensor
    color: torch.Tensor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index) -> SceneData:
        return SceneData(*(t[index] for t in (self.images, self.position, self.size, self.shape, self.color)))

    def with_object(self) -> SceneData:
        """The part of the data whose pictures hold an object."""
        return self[self.shape >= 0]

    def condition(self, concept: str) -> torch.Tensor:
        """Condition vectors [N, C] of one concept: position (2), size (1), shape (one-hot 3), color (one-hot 6)."""
        if concept == "position":
            return self.position
        if concept == "size":
            return self.size[:, None]
        if concept == "shape":
            return torch.nn.functional.one_hot(self.shape, len(SHAPES)).float()
        if concept == "color":
            return torch.nn.functional.one_hot(self.color, len(COLORS)).float()
        raise ValueError(f"`concept` must be position, size, shape or color, got {concept!r}")

    def pixels(self) -> torch.Tensor:
        """Images as float32 in [-1, 1]."""
        return self.images.float() / 127.5 - 1.0


def draw_scene(config: SceneConfig, index: int) -> tuple[Scene, dict]:
    """Scene number `index` of a data set and its labels; the same for the same (config, index)."""
    rng = np.random.default_rng([config.seed, index])
    empty = rng.uniform() < config.empty_fraction
    shape, color = int(rng.integers(len(SHAPES))), int(rng.integers(len(COLORS)))
    x, y = rng.uniform(-1.0, 1.0, 2)
    size = rng.uniform(*SIZE_RANGE)
    rgb = np.array(list(COLORS.values())[color]) + rng.uniform(-config.color_jitter, config.color_jitter, 3)
    light = np.array([-3.0, -3.0, 6.7]) + rng.uniform(-config.light_jitter, config.light_jitter, 3)
    scene = Scene(
        shape=None if empty else SHAPES[shape],
        color=tuple(np.clip(rgb, 0.02, 0.98).tolist()),
        position=(float(x), float(y)),
        size=float(size),
        light=tuple(light.tolist()),
        intensity=float(rng.uniform(60.0, 80.0)),
        ambient=float(rng.uniform(0.35, 0.45)),
        floor=float(rng.uniform(0.55, 0.65)),
    )
    labels = {"position": (x, y), "size": size, "shape": -1 if empty else shape, "color": -1 if empty else color}
    return scene, labels


def _part_path(folder: Path, part: int) -> Path:
    return folder / f"part-{part:05d}.safetensors"


def _render_part(config: SceneConfig, folder: Path, part: int) -> int:
    """Render one part and commit it whole: written beside its place, then renamed."""
    indices = range(part * PART, min((part + 1) * PART, config.count))
    images, labels = [], []
    for i in indices:
        scene, label = draw_scene(config, i)
        images.append(render(scene, config.resolution, config.samples, seed=i))
        labels.append(label)
    tensors = {"images": torch.from_numpy(np.stack(images))}
    for key, dtype in (("position", np.float32), ("size", np.float32), ("shape", np.int64), ("color", np.int64)):
        tensors[key] = torch.from_numpy(np.array([label[key] for label in labels], dtype=dtype))
    path = _part_path(folder, part)
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    save_file(tensors, str(temporary))
    os.replace(temporary, path)
    return part


def _one_thread() -> None:
    import drjit

    drjit.set_thread_count(1)


def folder_of(config: SceneConfig, root: str | Path = "data") -> Path:
    """Where a data set is cached: ROOT/scenes-DIGEST."""
    return Path(root) / f"scenes-{config.digest()}"


def _missing(config: SceneConfig, folder: Path) -> list[int]:
    parts = range((config.count + PART - 1) // PART)
    return [p for p in parts if not _part_path(folder, p).exists()]


def generate(config: SceneConfig, root: str | Path = "data", workers: int | None = None, progress: bool = False) -> Path:
    """Render what is missing of a data set, in parallel processes, and return its folder.

    Parts of 250 pictures are committed one by one, so an interrupted run goes on where it stopped; the bytes do
    not depend on `workers`. Raises ImportError without Mitsuba when something is left to render.
    """
    folder = folder_of(config, root)
    missing = _missing(config, folder)
    if not missing:
        return folder
    load_mitsuba()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
    from tqdm import tqdm

    context = multiprocessing.get_context("spawn")
    bar = tqdm(total=len(missing) * PART, unit="picture", disable=not progress)
    with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=context, initializer=_one_thread) as pool:
        for future in [pool.submit(_render_part, config, folder, p) for p in missing]:
            future.result()
            bar.update(PART)
    bar.close()
    return folder


def load(config: SceneConfig, root: str | Path = "data") -> SceneData:
    """Read a rendered data set; needs no renderer.

    Raises FileNotFoundError, with the command that renders it, when parts of it are missing.
    """
    folder = folder_of(config, root)
    missing = _missing(config, folder)
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {len(missing)} parts; render them with: python -m ebmfast scenes --root {root} "
            f"--count {config.count} --resolution {config.resolution} --seed {config.seed}"
        )
    total = (config.count + PART - 1) // PART
    parts = [load_file(str(_part_path(folder, p))) for p in range(total)]
    return SceneData(**{k: torch.cat([p[k] for p in parts]) for k in ("images", "position", "size", "shape", "color")})
