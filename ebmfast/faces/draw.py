"""Schematic faces in CelebA's layout: what lets the reader, the training and the figures run where CelebA is not."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .celeba import ATTRIBUTES

OVERSAMPLING = 4
HAIR = {"Black_Hair": (28, 24, 26), "Brown_Hair": (96, 60, 34), "Blond_Hair": (214, 178, 92), "Gray_Hair": (160, 160, 162)}


@dataclass(frozen=True)
class Face:
    """What a schematic face shows; `style` (8 numbers in [0, 1]) moves all that attributes leave free."""

    smiling: bool
    male: bool
    young: bool
    wavy: bool
    glasses: bool
    beard: bool
    hair: str
    attractive: bool
    style: tuple[float, ...] = (0.5,) * 8

    def attributes(self) -> dict[str, bool]:
        """The official attributes that hold; all others do not."""
        found = {"Smiling": self.smiling, "Male": self.male, "Young": self.young, "Wavy_Hair": self.wavy,
                 "Straight_Hair": not self.wavy, "Eyeglasses": self.glasses, "No_Beard": not self.beard,
                 "Attractive": self.attractive, self.hair: True}
        return {name: found.get(name, False) for name in ATTRIBUTES}


def random_face(rng: np.random.Generator) -> Face:
    """A face at random: independent attributes, but for beards (men) and gray hair (the old)."""
    smiling, male, young, wavy, glasses, beard, attractive = (bool(v) for v in rng.uniform(size=7) < 0.5)
    colors = ["Black_Hair", "Brown_Hair", "Blond_Hair"] if young else list(HAIR)
    return Face(smiling, male, young, wavy, glasses, beard and male, colors[rng.integers(len(colors))], attractive,
                tuple(rng.uniform(size=8).tolist()))


def draw_face(face: Face, size: int = 64) -> np.ndarray:
    """A face as uint8 RGB [size, size, 3], antialiased: hair, head, eyes, brows, nose, mouth, and what its attributes add."""
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise ImportError("drawing faces needs Pillow, which is not installed: pip install 'ebmfast[images]'") from error
    scale = OVERSAMPLING * size
    picture = Image.new("RGB", (scale, scale), _background(face))
    pen = _Pen(ImageDraw.Draw(picture), scale, face)
    for part in (_hair_behind, _head, _hair_in_front, _eyes, _nose, _beard, _mouth, _age, _glasses):
        part(pen, face)
    return np.asarray(picture.resize((size, size), Image.Resampling.BOX))


class _Pen:
    """Drawing in units of the picture's side, about the head's centre."""

    def __init__(self, canvas, scale: int, face: Face):
        self.canvas, self.scale = canvas, scale
        self.x, self.y = 0.5 + 0.06 * (face.style[0] - 0.5), 0.54 + 0.06 * (face.style[1] - 0.5)
        self.width = 0.24 + 0.04 * (face.style[2] - 0.5) + (0.015 if face.male else 0.0)
        self.height = 0.31 + 0.04 * (face.style[3] - 0.5)
        tone = face.style[4]
        self.skin = tuple(int(a + (b - a) * tone) for a, b in zip((242, 206, 178), (150, 104, 76)))
        self.dark = tuple(int(0.55 * v) for v in self.skin)

    def points(self, *points):
        return [((self.x + u * self.width) * self.scale, (self.y + v * self.height) * self.scale) for u, v in points]

    def ellipse(self, u, v, ru, rv, fill=None, outline=None, width=0.0):
        self.canvas.ellipse(self.points((u - ru, v - rv), (u + ru, v + rv)), fill, outline, self.line_width(width))

    def line(self, points, fill, width):
        self.canvas.line(self.points(*points), fill, self.line_width(width), joint="curve")

    def polygon(self, points, fill):
        self.canvas.polygon(self.points(*points), fill)

    def arc(self, u, v, ru, rv, start, end, fill, width):
        self.canvas.arc(self.points((u - ru, v - rv), (u + ru, v + rv)), start, end, fill, self.line_width(width))

    def line_width(self, width: float) -> int:
        return max(1, round(width * self.scale)) if width else 0


def _background(face: Face) -> tuple[int, int, int]:
    u, v = face.style[5], face.style[6]
    return int(90 + 90 * u), int(110 + 80 * v), int(130 + 60 * (1 - u))


def _hair_behind(pen: _Pen, face: Face) -> None:
    color, drop = HAIR[face.hair], (-0.1 if face.male else 0.9)
    pen.ellipse(0, -0.25, 1.2, 0.98, color)
    if not face.male:
        pen.polygon([(-1.2, -0.25), (1.2, -0.25), (1.2, drop), (-1.2, drop)], color)
    if face.wavy:
        for side in (-1, 1):
            for k in range(5 if not face.male else 3):
                pen.ellipse(side * 1.15, -0.75 + 0.38 * k, 0.27, 0.2, color)


def _head(pen: _Pen, face: Face) -> None:
    pen.ellipse(0, 0, 1.0, 1.0, pen.skin)
    if face.male:  # a square jaw
        pen.polygon([(-0.86, 0.35), (0.86, 0.35), (0.55, 0.97), (-0.55, 0.97)], pen.skin)


def _hair_in_front(pen: _Pen, face: Face) -> None:
    color = HAIR[face.hair]
    pen.canvas.chord(pen.points((-1.0, -1.05), (1.0, 0.35)), 200, 340, color)
    if face.wavy:
        for k in range(6):
            pen.ellipse(-0.8 + 0.32 * k, -0.66 - 0.1 * (1 - abs(k - 2.5) / 2.5), 0.2, 0.16, color)


def _eyes(pen: _Pen, face: Face) -> None:
    iris = (60, 90, 130) if face.style[7] < 0.5 else (80, 56, 34)
    wide = 0.2 if face.attractive else 0.15
    for side in (-1, 1):
        pen.ellipse(0.4 * side, -0.12, wide, 0.6 * wide, (250, 250, 250))
        pen.ellipse(0.4 * side, -0.12, 0.08, 0.1, iris)
        if face.attractive:  # lashes and lips stand for it: the attribute is a matter of taste, the drawing is not
            pen.arc(0.4 * side, -0.1, wide + 0.03, 0.19, 200, 340, (20, 16, 16), 0.016)
        pen.line([(0.4 * side - 0.2, -0.33), (0.4 * side + 0.2, -0.35)], HAIR[face.hair], 0.02 if face.male else 0.011)


def _nose(pen: _Pen, face: Face) -> None:
    pen.line([(0.0, -0.05), (0.1, 0.24), (-0.05, 0.26)], pen.dark, 0.011)


def _beard(pen: _Pen, face: Face) -> None:
    if face.beard:
        color = HAIR[face.hair]
        pen.canvas.chord(pen.points((-0.85, 0.0), (0.85, 1.08)), 20, 160, color)
        pen.polygon([(-0.36, 0.42), (0.36, 0.42), (0.28, 0.33), (-0.28, 0.33)], color)


def _mouth(pen: _Pen, face: Face) -> None:
    lips = (196, 40, 60) if face.attractive else (150, 70, 70)
    if face.smiling:
        pen.canvas.chord(pen.points((-0.42, 0.28), (0.42, 0.8)), 10, 170, (250, 250, 250), lips, pen.line_width(0.014))
    else:
        pen.line([(-0.26, 0.58), (0.26, 0.58)], lips, 0.024 if face.attractive else 0.017)


def _age(pen: _Pen, face: Face) -> None:
    if not face.young:
        for v in (-0.56, -0.47):
            pen.line([(-0.42, v), (0.42, v)], pen.dark, 0.008)
        for side in (-1, 1):
            pen.line([(side * 0.34, 0.22), (side * 0.52, 0.55)], pen.dark, 0.01)
            pen.arc(0.4 * side, -0.02, 0.2, 0.12, 20, 160, pen.dark, 0.008)


def _glasses(pen: _Pen, face: Face) -> None:
    if face.glasses:
        for side in (-1, 1):
            pen.ellipse(0.4 * side, -0.12, 0.3, 0.2, outline=(18, 18, 22), width=0.017)
            pen.line([(side * 0.7, -0.14), (side * 0.98, -0.2)], (18, 18, 22), 0.015)
        pen.line([(-0.1, -0.14), (0.1, -0.14)], (18, 18, 22), 0.015)


def write_faces(root: str | Path, count: int = 2000, size: int = 64, seed: int = 0) -> Path:
    """Draw faces into `root` in CelebA's layout: `img_align_celeba/000001.jpg` and so on, and `list_attr_celeba.txt`.

    Face i is a function of (seed, i). Raises FileExistsError when there are an attribute file or pictures already, so that
    nobody's CelebA is written over.
    """
    from PIL import Image

    root = Path(root)
    table = root / "list_attr_celeba.txt"
    folder = root / "img_align_celeba"
    for path in (table, folder, folder.with_suffix(".zip")):
        if path.exists() and (path.is_file() or any(path.iterdir())):
            raise FileExistsError(f"{path} exists; choose another folder")
    if count < 1:
        raise ValueError(f"`count` must be 1 or more, got {count}")
    folder.mkdir(parents=True, exist_ok=True)
    lines = [str(count), " ".join(ATTRIBUTES)]
    for i in range(count):
        face = random_face(np.random.default_rng([seed, i]))
        name = f"{i + 1:06d}.jpg"
        Image.fromarray(draw_face(face, size)).save(folder / name, quality=95, subsampling=0)
        lines.append(name + "".join(f" {1 if held else -1:2d}" for held in face.attributes().values()))
    table.write_text("\n".join(lines) + "\n")
    return root
