"""A data set of rendered scenes: made once in parallel, cached by its configuration, read without the renderer."""
from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from .draw import draw_objects, draw_single
from .render import COLORS, COLORS_20, SHAPES, SIZE_RANGE, Scene, load_mitsuba, render

PART = 250
FORMAT = 1
SINCE_FORMAT_1 = ("held_out", "shapes", "colors", "palette", "size_range", "objects", "variation", "camera_jitter", "tint_jitter")
VARIATIONS = ("color", "light", "size", "type")
LABELS = {"position": np.float32, "size": np.float32, "shape": np.int64, "color": np.int64}


@dataclass(frozen=True)
class SceneConfig:
    """Everything that decides the bytes of a data set; picture i is a function of (config, i) alone.

    Args:
        count, resolution, samples, seed: pictures, pixels per side, light paths per pixel, and what all draws depend on.
        empty_fraction: share of pictures without an object.
        light_jitter, color_jitter: half-widths of the uniform jitter of the lamp's place and of the objects' colours.
        held_out: (shape, colour) pairs that no picture shows.
        shapes, colors: what objects are drawn from; no colours are the whole palette.
        palette: 6 or 20 colours; decides the colour labels.
        size_range: of sizes, in scene units.
        objects: shares of scenes with 1, 2, ... objects; empty is one object each.
        variation: one of "color", "light", "size", "type" leaves the range of all other sets: for held-out tests.
        camera_jitter: half-width of the jitter of the camera's height, in scene units.
        tint_jitter: half-width of the jitter of the light's and the floor's colour.
    """

    count: int = 20_000
    resolution: int = 32
    samples: int = 25
    seed: int = 0
    empty_fraction: float = 0.05
    light_jitter: float = 0.8
    color_jitter: float = 0.06
    held_out: tuple[tuple[str, str], ...] = ()
    shapes: tuple[str, ...] = SHAPES
    colors: tuple[str, ...] = ()
    palette: int = 6
    size_range: tuple[float, float] = SIZE_RANGE
    objects: tuple[float, ...] = ()
    variation: str | None = None
    camera_jitter: float = 0.0
    tint_jitter: float = 0.0

    def __post_init__(self):
        if self.palette not in (6, 20):
            raise ValueError(f"`palette` must be 6 or 20 colours, got {self.palette}")
        for name in self.colors:
            if name not in self.known_colors:
                raise ValueError(f"`colors` must be among {', '.join(self.known_colors)}, got {name!r}")
        for shape in self.shapes:
            if shape not in SHAPES:
                raise ValueError(f"`shapes` must be among {', '.join(SHAPES)}, got {shape!r}")
        if self.variation not in (None, *VARIATIONS):
            raise ValueError(f"`variation` must be one of {', '.join(VARIATIONS)} or None, got {self.variation!r}")
        if not self.pairs:
            raise ValueError(f"`held_out` leaves no pair of shape and colour: {self.held_out}")

    @property
    def known_colors(self) -> dict[str, tuple[float, float, float]]:
        """The palette: name -> linear reflectance."""
        return COLORS if self.palette == 6 else COLORS_20

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(shape, colour) pairs that pictures show."""
        held_out = {tuple(pair) for pair in self.held_out}
        return [(s, c) for s in self.shapes for c in self.colors or self.known_colors if (s, c) not in held_out]

    def digest(self) -> str:
        """First 12 hex digits of the sha256 of the configuration, the renderer's format and the palette."""
        options = asdict(self)
        for field in fields(self):  # data sets made before an option existed keep their digest
            if field.name in SINCE_FORMAT_1 and getattr(self, field.name) == field.default:
                del options[field.name]
        text = json.dumps([FORMAT, options, list(SHAPES), self.known_colors], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass
class Labelled:
    """Pictures uint8 [N, 3, R, R] with labels, which are indexed together."""

    images: Tensor
    position: Tensor
    size: Tensor
    shape: Tensor
    color: Tensor
    n_colors: int = len(COLORS)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index) -> Self:
        return type(self)(*(t[index] for t in (self.images, self.position, self.size, self.shape, self.color)), self.n_colors)

    def pixels(self) -> Tensor:
        """Images as float32 in [-1, 1]."""
        return self.images.float() / 127.5 - 1.0


class SceneData(Labelled):
    """Pictures and labels: images uint8 [N, 3, R, R]; position [N, 2]; size [N]; shape, color int64 [N], -1 if empty."""

    def with_object(self) -> SceneData:
        """The part of the data whose pictures hold an object."""
        return self[self.shape >= 0]

    def condition(self, concept: str) -> Tensor:
        """Condition vectors [N, C] of one concept: position (2), size (1), shape (one-hot 3), color (one-hot, 6 or 20), or
        "joint": shape, color, position and size side by side."""
        if concept == "position":
            return self.position
        if concept == "size":
            return self.size[:, None]
        if concept == "shape":
            return F.one_hot(self.shape, len(SHAPES)).float()
        if concept == "color":
            return F.one_hot(self.color, self.n_colors).float()
        if concept == "joint":
            return torch.cat([self.condition(c) for c in ("shape", "color", "position", "size")], dim=1)
        raise ValueError(f"`concept` must be position, size, shape, color or joint, got {concept!r}")


class ObjectsData(Labelled):
    """Pictures of several objects: images uint8 [N, 3, R, R]; count [N]; position [N, K, 2]; size, shape, color [N, K].

    Objects are sorted to the front; where there is none, shape and color are -1.
    """

    @property
    def count(self) -> Tensor:
        """Objects in each picture, int64 [N]."""
        return (self.shape >= 0).sum(dim=1)

    def with_object(self) -> ObjectsData:
        """The part of the data whose pictures hold an object."""
        return self[self.count > 0]

    def pick(self, seed: int = 0) -> SceneData:
        """Every picture with the labels of one of its objects, chosen at random; those of an empty floor stay empty."""
        u = torch.rand(len(self), generator=torch.Generator().manual_seed(seed))
        index = (torch.arange(len(self)), (u * self.count.clamp_min(1)).long())
        labels = (t[index] for t in (self.position, self.size, self.shape, self.color))
        return SceneData(self.images, *labels, self.n_colors)


def draw_scene(config: SceneConfig, index: int) -> tuple[Scene, dict]:
    """Scene number `index` of a data set and its labels; the same for the same (config, index).

    Labels are those of `SceneData`, or with `config.objects` arrays [K, ...] as in `ObjectsData`.
    """
    return draw_objects(config, index) if config.objects else draw_single(config, index)


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
    for key, dtype in LABELS.items():
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


def load(config: SceneConfig, root: str | Path = "data") -> SceneData | ObjectsData:
    """Read a rendered data set, of several objects per picture as `ObjectsData`; needs no renderer.

    Raises FileNotFoundError, with the command that renders it, when parts of it are missing.
    """
    from .sets import command_of

    folder = folder_of(config, root)
    missing = _missing(config, folder)
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {len(missing)} parts; render them with: python -m {command_of(config, root)}")
    total = (config.count + PART - 1) // PART
    parts = [load_file(str(_part_path(folder, p))) for p in range(total)]
    tensors = {k: torch.cat([p[k] for p in parts]) for k in ("images", *LABELS)}
    return (ObjectsData if config.objects else SceneData)(**tensors, n_colors=config.palette)
