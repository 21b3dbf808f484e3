"""Weights and the card beside them: the contract between trainer, zoo and whoever samples."""
from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file

SAMPLING = {"levels": 16, "sigma_max": 4.0, "sigma_min": 0.06, "steps_per_level": 6, "drift": 0.3, "denoise": True,
            "prior_above": 0.15}
NEGATION_ALPHA = 0.3
CONTRASTIVE_ALPHA = 0.01
EXPERIMENTS = ("objects", "joint", "stage_position", "stage_shape", "stage_color")


def sha256(path: str | Path) -> str:
    """Hex digest of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def write_card(folder: Path, recipe, network: dict, config, weights: dict, command: str, minutes: float, scores: dict,
               resolution: int = 32, data: str = "") -> Path:
    """Write NAME.safetensors and NAME.json into `folder` and return the card's path.

    Weights are stored in float16 (they are loaded as float32), which halves the files; scores are of the stored weights.
    """
    path = Path(folder) / f"{recipe.name}.safetensors"
    save_file(stored(weights), str(path))
    low, high = config.levels.low, config.levels.high
    card = {
        "name": recipe.name,
        "kind": "experiment" if recipe.name in EXPERIMENTS else "noise-conditional energy",
        "about": recipe.about,
        "training": "hybrid: score matching and cross-entropy" if config.contrast_weight else "score matching",
        "frozen": list(recipe.frozen),
        "architecture": {"class": "ebmfast.models.NoiseConditionalEnergy", "arguments": network},
        "condition_dim": recipe.condition_dim,
        "labels": recipe.label_vectors(),
        "ranges": [list(r) for r in recipe.ranges],
        "data_range": [-1.0, 1.0],
        "shape": [3, resolution, resolution],
        "sigma": [low, high],
        "takes_sigma": True,
        "prior": True,
        "negation_alpha": NEGATION_ALPHA,
        "schedule": dict(SAMPLING, sigma_max=high, sigma_min=low, prior_above=recipe.prior_above),
        "data": data,
        "recipe": asdict(config),
        "command": command,
        "seed": config.seed,
        "iterations": config.iterations,
        "minutes": round(minutes, 1),
        "scores": scores,
        "sha256": sha256(path),
    }
    card_path = path.with_suffix(".json")
    card_path.write_text(json.dumps(card, indent=2) + "\n")
    return card_path


def write_contrastive_card(folder: Path, recipe, architecture: dict, config, model, command: str, minutes: float,
                           resolution: int, data: str, started_from: str | None) -> Path:
    """Write NAME.safetensors and NAME.json of an energy without noise level, trained by contrastive divergence.

    A network with spectral norms is stored folded, since that is what chains run on.
    """
    if hasattr(model, "folded"):
        model = model.folded()
        architecture = architecture | {"arguments": architecture["arguments"] | {"spectral": False}}
    path = Path(folder) / f"{recipe.name}.safetensors"
    save_file({k: v.detach().contiguous() for k, v in model.state_dict().items()}, str(path))
    card = {
        "name": recipe.name, "kind": "energy", "about": recipe.about,
        "training": "contrastive divergence" + (", started from a score-matched network" if started_from else ""),
        "frozen": list(recipe.frozen), "architecture": architecture, "condition_dim": recipe.condition_dim,
        "labels": recipe.label_vectors(), "ranges": [list(r) for r in recipe.ranges], "data_range": [0.0, 1.0],
        "shape": [3, resolution, resolution], "sigma": None, "takes_sigma": False, "prior": started_from is not None,
        "negation_alpha": CONTRASTIVE_ALPHA,
        "sampling": {"sampler": "Langevin.reference_code", "steps": config.steps, "drift": config.drift, "noise": config.noise,
                     "gradient_clip": config.gradient_clip},
        "data": data, "recipe": _finite(asdict(config)), "command": command, "seed": config.seed, "iterations": config.iterations,
        "minutes": round(minutes, 1), "sha256": sha256(path),
    }
    card_path = path.with_suffix(".json")
    card_path.write_text(json.dumps(card, indent=2) + "\n")
    return card_path


def _finite(options: dict) -> dict:
    """JSON knows no infinity: None, where there is no bound."""
    return {k: None if isinstance(v, float) and math.isinf(v) else v for k, v in options.items()}


def stored(weights: dict) -> dict:
    """Weights in the precision they are stored in."""
    return {k: v.detach().cpu().half().contiguous() for k, v in weights.items()}
