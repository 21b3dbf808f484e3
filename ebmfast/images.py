"""Grids of samples as PNG, with what made them written into the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch


def _pillow():
    try:
        from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
    except ImportError:
        raise ImportError('pictures need Pillow: pip install "ebmfast[images]"') from None
    return Image, ImageDraw, ImageFont, PngImagePlugin


def check() -> None:
    """Raise ImportError where pictures cannot be written."""
    _pillow()


def to_bytes(x: torch.Tensor, data_range: tuple[float, float]) -> torch.Tensor:
    """Images `[n, 3, H, W]` (or one channel) in `data_range` as uint8 `[n, H, W, 3]`; values outside are clamped."""
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"`x` must be images [n, 3, H, W] or [n, 1, H, W], got {list(x.shape)}")
    low, high = data_range
    scaled = ((x.detach().cpu().float() - low) / (high - low)).clamp(0, 1).mul(255).round().to(torch.uint8)
    return scaled.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)


def grid(rows: Sequence[torch.Tensor], titles: Sequence[str] | None = None, *, data_range=(0.0, 1.0), scale: int = 3,
         gap: int = 2):
    """A picture of rows of images (each `[n, C, H, W]`), every pixel `scale` wide, with a title above each row."""
    image, draw, font, _ = _pillow()
    rows = [to_bytes(r, data_range) for r in rows]
    height, width = rows[0].shape[1] * scale, rows[0].shape[2] * scale
    heading = 22 if titles else 0
    columns = max(len(r) for r in rows)
    sheet = image.new("RGB", (columns * (width + gap) + gap, len(rows) * (height + gap + heading) + gap), "white")
    pen, face = draw.Draw(sheet), font.load_default(size=14)
    for i, row in enumerate(rows):
        top = gap + i * (height + gap + heading)
        if titles:
            pen.text((gap + 1, top + 1), titles[i], fill="black", font=face)
        for j, pixels in enumerate(row):
            tile = image.fromarray(pixels.numpy()).resize((width, height), image.NEAREST)
            sheet.paste(tile, (gap + j * (width + gap), top + heading))
    return sheet


def save(picture, path, metadata: Mapping[str, str]) -> None:
    """Write a PNG whose text chunks hold `metadata`."""
    _, _, _, png = _pillow()
    info = png.PngInfo()
    for key, value in metadata.items():
        info.add_itxt(key, value)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, "PNG", pnginfo=info)


RAMP = torch.tensor([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]]) / 255.0  # dark to bright


def heat_map(values: torch.Tensor, low: float | None = None, high: float | None = None) -> torch.Tensor:
    """Numbers `[rows, columns]` as a picture `[3, rows, columns]` in [0, 1], from dark (`low`, or the least) to bright (`high`)."""
    if values.ndim != 2 or not torch.isfinite(values).any():
        raise ValueError(f"`values` must be [rows, columns] with a finite number in it, got {list(values.shape)}")
    finite = values[torch.isfinite(values)]
    low = float(finite.min()) if low is None else low
    high = float(finite.max()) if high is None else high
    place = ((values.double().clamp(low, high) - low) / max(high - low, 1e-12)).nan_to_num(0.0) * (len(RAMP) - 1)
    below = place.floor().long().clamp(0, len(RAMP) - 2)
    share = (place - below)[..., None]
    return (RAMP[below] * (1 - share) + RAMP[below + 1] * share).permute(2, 0, 1).float()


def read(path, size: tuple[int, int], data_range: tuple[float, float]) -> torch.Tensor:
    """A picture file as `[3, height, width]` in `data_range`; ValueError where it has another size (width, height)."""
    image, *_ = _pillow()
    with image.open(path) as file:
        if file.size != tuple(size):
            wanted, got = (f"{w}x{h}" for w, h in (size, file.size))
            raise ValueError(f"{path} must be {wanted} pixels, as the models' data are, got {got}")
        if file.mode.startswith(("I", "F")):  # converted, they would be cut off at white
            raise ValueError(f"{path} has pixels of more than 8 bits ({file.mode}): save it with 8")
        pixels = torch.frombuffer(bytearray(file.convert("RGB").tobytes()), dtype=torch.uint8)
    low, high = data_range
    return pixels.view(size[1], size[0], 3).permute(2, 0, 1).float() / 255 * (high - low) + low
