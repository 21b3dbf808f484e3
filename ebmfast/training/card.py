"""Weights and the card beside them: the contract between trainer, zoo and whoever samples."""
from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file

from ..models import network_class

SAMPLING = {"levels": 16, "sigma_max": 4.0, "sigma_min": 0.06, "steps_per_level": 6, "drift": 0.3, "denoise": True,
            "prior_above": 0.15}
NEGATION_ALPHA = 0.3
CONTRASTIVE_ALPHA = 0.01


def sha256(path: str | Path) -> str:
    """Hex digest of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def write_card(folder: Path, recipe, network: dict, config, weights: dict, command: str, minutes: float, scores: dict,
               resolution: int = 32, data: str = "", held_out=()) -> Path:
    """Write NAME.safetensors and NAME.json into `folder` and return the card's path.

    Weights are stored in float16 (they are loaded as float32), which halves the files; scores are of the stored weights.
    """
    path = Path(folder) / f"{recipe.concept}.safetensors"
    save_file(stored(weights), str(path))
    low, high = config.levels.low, config.levels.high
    card = {
        "name": recipe.concept,
        "kind": "noise-conditional energy",
        "about": recipe.about,
        "method": "score matching",
        "hybrid": bool(config.contrast_weight),
        "frozen": list(recipe.frozen),
        "architecture": {"class": f"ebmfast.models.{network_class(network).__name__}", "arguments": network},
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
        "held_out": [list(pair) for pair in held_out],
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
                           resolution: int, data: str, started_from: str | None, held_out=()) -> Path:
    """Write NAME.safetensors and NAME.json of an energy without noise level, trained by contrastive divergence.

    A network with spectral norms is stored folded, since that is what chains run on.
    """
    if hasattr(model, "folded"):
        model = model.folded()
        architecture = architecture | {"arguments": architecture["arguments"] | {"spectral": False}}
    path = Path(folder) / f"{recipe.concept}.safetensors"
    save_file({k: v.detach().contiguous() for k, v in model.state_dict().items()}, str(path))
    card = {
        "name": recipe.concept, "kind": "energy", "about": recipe.about,
        "method": "contrastive divergence" + (", started from a score-matched network" if started_from else ""),
        "frozen": list(recipe.frozen), "architecture": architecture, "condition_dim": recipe.condition_dim,
        "labels": recipe.label_vectors(), "ranges": [list(r) for r in recipe.ranges], "data_range": [0.0, 1.0],
        "shape": [3, resolution, resolution], "sigma": None, "takes_sigma": False, "prior": started_from is not None,
        "negation_alpha": CONTRASTIVE_ALPHA,
        "schedule": contrastive_schedule(config),
        "data": data, "held_out": [list(pair) for pair in held_out], "recipe": _finite(asdict(config)),
        "command": command, "seed": config.seed,
        "iterations": config.iterations, "minutes": round(minutes, 1), "sha256": sha256(path),
    }
    card_path = path.with_suffix(".json")
    card_path.write_text(json.dumps(card, indent=2) + "\n")
    return card_path


def contrastive_schedule(config) -> dict:
    """How a model is sampled that was trained by contrastive divergence: its training's chain, five times as long as there.

    Where pictures were smoothed with noise of standard deviation s, one last step without noise takes it away, x - s^2 grad E
    (Tweedie's formula); step and noise are then lists, one number for each step.
    """
    steps = 5 * config.steps
    schedule = {"sampler": "Langevin.reference_code", "steps": steps, "step": config.drift, "noise": config.noise,
                "gradient_clip": config.gradient_clip}
    if config.smoothing:
        schedule["steps"] = steps + 1
        schedule["step"] = [config.drift] * steps + [config.smoothing**2]
        schedule["noise"] = [config.noise] * steps + [0.0]
    return schedule


def _finite(options: dict) -> dict:
    """JSON knows no infinity: None, where there is no bound."""
    return {k: None if isinstance(v, float) and math.isinf(v) else v for k, v in options.items()}


def stored(weights: dict) -> dict:
    """Weights in the precision they are stored in."""
    return {k: v.detach().cpu().half().contiguous() for k, v in weights.items()}
