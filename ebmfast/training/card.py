"""Weights and the card beside them: the contract between trainer, zoo and whoever samples."""
from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file

SAMPLING = {"levels": 16, "sigma_max": 4.0, "sigma_min": 0.06, "steps_per_level": 6, "drift": 0.3, "denoise": True,
            "prior_above": 0.15}
NEGATION_ALPHA = 0.3


def sha256(path: str | Path) -> str:
    """Hex digest of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def write_card(folder: Path, recipe, network: dict, config, weights: dict, command: str, minutes: float,
               error: float) -> Path:
    """Write NAME.safetensors and NAME.json into `folder` and return the card's path."""
    path = Path(folder) / f"{recipe.name}.safetensors"
    save_file({k: v.contiguous() for k, v in weights.items()}, str(path))
    low, high = config.levels.low, config.levels.high
    card = {
        "name": recipe.name,
        "kind": "noise-conditional energy",
        "architecture": {"class": "ebmfast.models.NoiseConditionalEnergy", "arguments": network},
        "condition_dim": recipe.condition_dim,
        "labels": recipe.label_vectors(),
        "ranges": [list(r) for r in recipe.ranges],
        "data_range": [-1.0, 1.0],
        "shape": [3, 32, 32],
        "sigma": [low, high],
        "takes_sigma": True,
        "prior": True,
        "negation_alpha": NEGATION_ALPHA,
        "schedule": dict(SAMPLING, sigma_max=high, sigma_min=low),
        "data": "one object on a floor, 20 000 pictures of 32x32 rendered with Mitsuba 3: ebmfast scenes --seed 0",
        "recipe": asdict(config),
        "command": command,
        "seed": config.seed,
        "iterations": config.iterations,
        "minutes": round(minutes, 1),
        "scores": {"test_error": round(error, 4)},
        "sha256": sha256(path),
    }
    card_path = path.with_suffix(".json")
    card_path.write_text(json.dumps(card, indent=2) + "\n")
    return card_path
