"""Samples as they are stored: PNG bytes, uint8 pixels, or floats."""

from __future__ import annotations

import io

import numpy as np
import torch
from torch import Tensor


def pixels(x: Tensor, data_range: tuple[float, float]) -> np.ndarray:
    """Images `[n, C, H, W]` in `data_range` as uint8 `[n, H, W, C]`; values outside are clamped."""
    low, high = data_range
    scaled = ((x.float() - low) / (high - low)).clamp(0, 1).mul(255).round().to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).contiguous().numpy()


def png(image: np.ndarray) -> bytes:
    """One image `[H, W, C]`, uint8, as a PNG file without metadata."""
    try:
        from PIL import Image
    except ImportError:
        raise ImportError('pictures need Pillow: pip install "ebmfast[generate]"') from None
    file = io.BytesIO()
    Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(file, "PNG", compress_level=6)
    return file.getvalue()


def unpng(data: bytes) -> np.ndarray:
    """A PNG file as uint8 `[H, W, C]`."""
    from PIL import Image
    found = np.array(Image.open(io.BytesIO(data)))
    return found if found.ndim == 3 else found[:, :, None]


def stored(x: Tensor, storage: str, data_range: tuple[float, float] | None) -> np.ndarray:
    """Samples as the array that is stored: uint8 `[n, H, W, C]`, or floats `[n, *S]`."""
    if storage in ("png", "uint8"):
        return pixels(x, data_range)
    return x.to(getattr(torch, storage)).contiguous().numpy()
