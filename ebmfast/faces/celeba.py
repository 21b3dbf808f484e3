"""A reader of CelebA's official files: `img_align_celeba` (a folder or a zip) and `list_attr_celeba.txt`."""
from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ATTRIBUTES = tuple("""
5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose Black_Hair Blond_Hair Blurry Brown_Hair
Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee Gray_Hair Heavy_Makeup High_Cheekbones Male Mouth_Slightly_Open Mustache
Narrow_Eyes No_Beard Oval_Face Pale_Skin Pointy_Nose Receding_Hairline Rosy_Cheeks Sideburns Smiling Straight_Hair Wavy_Hair
Wearing_Earrings Wearing_Hat Wearing_Lipstick Wearing_Necklace Wearing_Necktie Young
""".split())

# Concepts by the name the package uses: the attribute, and whether it holds when the attribute does.
CONCEPTS = {
    "smiling": ("Smiling", True), "male": ("Male", True), "old": ("Young", False), "wavy_hair": ("Wavy_Hair", True),
    "black_hair": ("Black_Hair", True), "attractive": ("Attractive", True), "eyeglasses": ("Eyeglasses", True),
    "beard": ("No_Beard", False),
}


class CelebAError(ValueError):
    """The files are not what CelebA's are; the message names file and line."""


@dataclass
class FaceData:
    """images uint8 [N, 3, R, R]; attributes bool [N, A], named by `names`."""

    images: Tensor
    attributes: Tensor
    names: tuple[str, ...] = ATTRIBUTES

    def __len__(self) -> int:
        return len(self.images)

    def has(self, concept: str) -> Tensor:
        """Whether each face has a concept ("smiling", "old", ...) or an attribute by its official name: bool [N]."""
        attribute, positive = CONCEPTS.get(concept, (concept, True))
        if attribute not in self.names:
            raise ValueError(f"`concept` must be one of {', '.join(CONCEPTS)} or an attribute of the file, got {concept!r}")
        return self.attributes[:, self.names.index(attribute)] == positive

    def condition(self, concept: str) -> Tensor:
        """One-hot conditions [N, 2] of one concept: (no, yes)."""
        return F.one_hot(self.has(concept).long(), 2).float()


class CelebA:
    """CelebA's files in one folder; attributes are read and checked at once, pictures when `load` is called.

    Pictures are cut to their central square and resized (area-exact, antialiased), and kept as one file beside the originals, so
    that the second `load` of a resolution takes no time and no memory: pages are read as they are needed.

    Raises FileNotFoundError when a file is missing, and CelebAError for a malformed attribute file, with the line.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.attribute_file = self.root / "list_attr_celeba.txt"
        if not self.attribute_file.exists():
            raise FileNotFoundError(f"{self.attribute_file} is missing: put CelebA's attribute file there "
                                    "(or draw schematic faces into another folder: ebmfast faces draw FOLDER)")
        self.files, self.attributes, self.names = read_attributes(self.attribute_file)
        self.source = self._pictures()

    def __len__(self) -> int:
        return len(self.files)

    def load(self, resolution: int = 128, limit: int | None = None, workers: int = 4, progress: bool = False) -> FaceData:
        """The pictures at a resolution, the first `limit` of them, with their attributes.

        Raises CelebAError for a picture that is missing or cannot be decoded, with its name. Needs Pillow.
        """
        count = len(self.files) if limit is None else min(limit, len(self.files))
        path = self.root / f"cache-{resolution}-{self._digest(count)}.npy"
        if not path.exists():
            self._decode(path, resolution, count, workers, progress)
        images = torch.from_numpy(np.load(path, mmap_mode="c"))  # copy-on-write: nobody changes the file
        return FaceData(images, self.attributes[:count], self.names)

    def _pictures(self) -> Path:
        for name in ("img_align_celeba", "img_align_celeba.zip"):
            if (self.root / name).exists():
                return self.root / name
        raise FileNotFoundError(f"{self.root} has neither img_align_celeba nor img_align_celeba.zip")

    def _digest(self, count: int) -> str:
        state = os.stat(self.source)
        text = f"{self.source.name} {state.st_size} {state.st_mtime_ns} {self.files[:count]}"
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def _reader(self) -> Callable[[str], bytes]:
        if self.source.is_dir():
            return lambda name: (self.source / name).read_bytes()
        archive = zipfile.ZipFile(self.source)
        inside = {Path(n).name: n for n in archive.namelist()}
        return lambda name: archive.read(inside[name])

    def _decode(self, path: Path, resolution: int, count: int, workers: int, progress: bool) -> None:
        """Decode all pictures into one array file: complete or not at all."""
        from tqdm import tqdm

        read, files = self._reader(), self.files[:count]
        temporary = path.with_suffix(f".tmp{os.getpid()}")
        out = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=(count, 3, resolution, resolution))

        def one(i: int) -> None:
            out[i] = decode(self._bytes(read, files[i]), resolution, f"{self.source / files[i]}")

        try:
            with ThreadPoolExecutor(workers) as pool:
                for _ in tqdm(pool.map(one, range(count)), total=count, unit="picture", disable=not progress):
                    pass
            out.flush()
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _bytes(self, read, name: str) -> bytes:
        try:
            return read(name)
        except (FileNotFoundError, KeyError):
            raise CelebAError(f"{self.source} lacks {name}, which {self.attribute_file.name} lists "
                              f"(line {self.files.index(name) + 3})") from None


def read_attributes(path: str | Path) -> tuple[tuple[str, ...], Tensor, tuple[str, ...]]:
    """Files, attributes bool [N, A] and attribute names of `list_attr_celeba.txt`.

    Line 1 is the number of pictures, line 2 the attribute names, and each other line a file and 1 or -1 for every attribute.
    Raises CelebAError with the number of the line that breaks this.
    """
    path = Path(path)
    lines = path.read_text().splitlines()
    if len(lines) < 2:
        raise CelebAError(f"{path} has {len(lines)} lines; expected the number of pictures, then the names of the attributes")
    if not lines[0].strip().isdigit():
        raise CelebAError(f"{path}, line 1: expected the number of pictures, got {lines[0][:60]!r}")
    count, names = int(lines[0]), tuple(lines[1].split())
    if not names or len(set(names)) != len(names):
        raise CelebAError(f"{path}, line 2: expected the names of the attributes, each once, got {lines[1][:60]!r}")
    body = lines[2:]
    while body and not body[-1].strip():
        body.pop()
    if len(body) != count:
        raise CelebAError(f"{path}: line 1 says {count} pictures, but {len(body)} are listed")
    files, rows = [], np.empty((count, len(names)), dtype=bool)
    for i, line in enumerate(body):
        name, *values = line.split() or [""]
        if len(values) != len(names):
            raise CelebAError(f"{path}, line {i + 3}: expected a file and {len(names)} values, got {len(values)}: {line[:60]!r}")
        if wrong := [v for v in values if v not in ("1", "-1")]:
            raise CelebAError(f"{path}, line {i + 3}: values must be 1 or -1, got {wrong[0]!r} for {names[values.index(wrong[0])]}")
        if Path(name).name != name:
            raise CelebAError(f"{path}, line {i + 3}: expected the name of a file, got {name!r}")
        files.append(name)
        rows[i] = [v == "1" for v in values]
    if len(set(files)) != count:
        twice = next(f for f in files if files.count(f) > 1)
        raise CelebAError(f"{path} lists {twice} more than once")
    return tuple(files), torch.from_numpy(rows), names


def decode(data: bytes, resolution: int, name: str) -> np.ndarray:
    """A picture file as uint8 RGB [3, R, R]: its central square, resized."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ImportError("reading faces needs Pillow, which is not installed: pip install 'ebmfast[images]'") from error
    try:
        with Image.open(io.BytesIO(data)) as picture:
            picture = picture.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise CelebAError(f"{name} cannot be decoded: {error}") from error
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    picture = picture.resize((resolution, resolution), Image.Resampling.BOX if side % resolution == 0 else Image.Resampling.LANCZOS,
                             box=(left, top, left + side, top + side))
    return np.asarray(picture).transpose(2, 0, 1)
