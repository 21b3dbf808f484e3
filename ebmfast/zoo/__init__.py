"""Trained energies that come with the package: weights in safetensors, and a card that says what they are.

`names()` lists the concepts, `card(name)` reads a card, `load(name)` gives the network in eval mode.
"""
from __future__ import annotations

import functools
import hashlib
import importlib
import json
from pathlib import Path

import torch
from torch import nn

_FOLDER = Path(__file__).parent


def names(kind: str = "noise-conditional energy") -> list[str]:
    """Names of the bundled models of one kind ("noise-conditional energy" or "judge"), sorted."""
    return sorted(p.stem for p in _FOLDER.glob("*.json") if json.loads(p.read_text())["kind"] == kind)


def card(name: str) -> dict:
    """The card of one model: what its condition means, its ranges, sampler settings, recipe, scores and hash.

    Raises ValueError for an unknown name and lists the known ones.
    """
    path = _FOLDER / f"{name}.json"
    if not name.isidentifier() or not path.exists():
        known = sorted(p.stem for p in _FOLDER.glob("*.json"))
        raise ValueError(f"no model named {name!r} in the zoo; there are {', '.join(known)}")
    return json.loads(path.read_text())


@functools.cache
def load(name: str) -> nn.Module:
    """The network of one model with its weights, in eval mode, frozen, on the CPU; one object per process.

    Raises ValueError for an unknown name, or when the weights do not hash to what the card says.
    """
    return load_from(_FOLDER, name)


def load_from(folder: str | Path, name: str) -> nn.Module:
    """The same from any folder that holds NAME.json and NAME.safetensors, as `ebmfast train` writes them."""
    from safetensors.torch import load as read

    folder = Path(folder)
    about = json.loads((folder / f"{name}.json").read_text())
    data = (folder / f"{name}.safetensors").read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != about["sha256"]:
        raise ValueError(f"{folder / name}.safetensors hashes to {digest}, its card says {about['sha256']}")
    module, _, cls = about["architecture"]["class"].rpartition(".")
    if module.split(".")[0] != "ebmfast":
        raise ValueError(f"the card of {name!r} names the class {module}.{cls}, which is not part of ebmfast")
    model = getattr(importlib.import_module(module), cls)(**about["architecture"]["arguments"])
    model.load_state_dict(read(data))
    return model.to(memory_format=torch.channels_last).eval().requires_grad_(False)


@functools.cache
def concepts() -> dict:
    """The bundled concept models as `{name: Family}`, with labels, ranges, α and prior from their cards."""
    return {name: family(card(name), load(name)) for name in names()}


def family(about: dict, model: nn.Module):
    """A trained model and its card as a `Family`."""
    from ..composition import Family

    return Family(model, about["name"], about["labels"] or None, unconditional=about["prior"],
                  condition_dim=about["condition_dim"], data_range=about["data_range"], sigma=about["sigma"],
                  negation_alpha=about["negation_alpha"])


def recommended(expression, about: dict | None = None):
    """The expression with its prior counted once, and the sampler that the cards name: `(expression, Annealed)`.

    The prior is the unconditional energy of the first leaf's model; a composition that needs none, or has one of
    its own (`with_prior`, or a leaf `.unconditional`), is returned as it is. Cards of other models go in `about`.
    """
    from ..composition import with_prior
    from ..samplers import Annealed

    families = [leaf.family for leaf in expression.leaves if leaf.family is not None]
    cards = [c for f in families if (c := (about or {}).get(f.name) or _card_or_none(f.name))]
    if not cards:
        raise ValueError(f"no model of {expression!r} has a card that names a schedule; pass a sampler of your own")
    schedule = cards[0]["schedule"]
    own = any(leaf.condition is None for leaf in expression.leaves)
    if not own and cards[0]["prior"]:
        counted = with_prior(expression, families[0].unconditional)
        expression = expression if counted.simplified == expression.simplified else counted
    return expression, Annealed.geometric(
        schedule["sigma_max"], schedule["sigma_min"], schedule["levels"], denoise=schedule["denoise"],
        steps_per_level=schedule["steps_per_level"], drift=schedule["drift"])


def _card_or_none(name: str) -> dict | None:
    return card(name) if name in names() else None
