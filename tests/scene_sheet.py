"""Thirty-two rendered test scenes and their labels, kept as one picture so that tests need no renderer."""

import json
from pathlib import Path

import torch
from PIL import Image

from ebmfast.scenes import SceneData

SHEET = Path(__file__).parent / "data" / "scenes.png"


def load() -> SceneData:
    """The scenes: none of them was trained on."""
    with Image.open(SHEET) as file:
        labels = json.loads(file.text["labels"])
        pixels = torch.frombuffer(bytearray(file.convert("RGB").tobytes()), dtype=torch.uint8)
    tiles = pixels.view(4, 32, 8, 32, 3).permute(0, 2, 4, 1, 3).reshape(32, 3, 32, 32)
    position, size = (torch.tensor(labels[k]) for k in ("position", "size"))
    shape, color = (torch.tensor(labels[k]) for k in ("shape", "color"))
    return SceneData(tiles.contiguous(), position, size, shape, color)
