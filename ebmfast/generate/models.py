"""The models of a plan: families, concepts and classifiers by name."""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import sys
from pathlib import Path

import torch
from torch import nn

from .. import zoo
from ..composition import Concept, Expression, Family
from .spec import Model, PlanError, Spec


def references(spec: Spec) -> dict[str, Model]:
    """Every model by name: the bundled ones, those of the plan, and classifiers written as zoo:NAME."""
    found = {name: Model(zoo=name) for name in zoo.names()} | dict(spec.models)
    for i, f in enumerate(spec.filters):
        if f.classifier is not None and f.classifier not in found:
            kind, _, name = f.classifier.partition(":")
            if kind != "zoo" or not name:
                raise PlanError(f"filters[{i}].classifier: must be one of {', '.join(found)}, or zoo:NAME, got {f.classifier!r}")
            found[f.classifier] = Model(zoo=name)
    return found


MEANING = ("architecture", "condition_dim", "labels", "data_range", "shape", "sigma", "takes_sigma", "prior", "negation_alpha",
           "schedule")  # what of a card makes samples


def fingerprint(name: str, model: Model, base: Path) -> dict:
    """What a model's weights, and what of its card makes samples, hash to; empty where it has none of its own."""
    try:
        if model.zoo is not None:
            about = zoo.card(model.zoo)
            return {"sha256": about["sha256"], "card": _meaning(about)}
        file = model.weights if model.card is None else str(Path(model.card).with_suffix(".safetensors"))
        found = {} if file is None else {"sha256": hashlib.sha256((base / file).read_bytes()).hexdigest()}
        return found if model.card is None else found | {"card": _meaning(json.loads((base / model.card).read_text()))}
    except (OSError, ValueError) as error:
        raise PlanError(f"models.{name}: {error}") from None


def _meaning(about: dict) -> str:
    """The hash of what a card says of how its model is called and sampled."""
    return hashlib.sha256(json.dumps({k: about.get(k) for k in MEANING}, sort_keys=True).encode()).hexdigest()


def card_of(name: str, model: Model, base: Path) -> dict | None:
    """The card of a model, where it has one."""
    try:
        if model.zoo is not None:
            return zoo.card(model.zoo)
        return None if model.card is None else json.loads((base / model.card).read_text())
    except (OSError, ValueError) as error:
        raise PlanError(f"models.{name}: {error}") from None


def load(name: str, model: Model, base: Path, seed: int):
    """A model of the plan: a `Family`, a `Concept`, or a module that is a classifier.

    A factory runs with torch's generator seeded by the plan, so that what it draws is the same in every worker.
    """
    try:
        about = card_of(name, model, base)
        if about is not None:
            folder = zoo._FOLDER if model.zoo is not None else (base / model.card).parent
            module = zoo.load(model.zoo) if model.zoo is not None else zoo.load_from(folder, Path(model.card).stem)
            return module if about["kind"] == "judge" else zoo.family(about | {"name": name}, module)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = _function(model.factory, base)(**model.arguments)
    except PlanError:
        raise
    except Exception as error:
        raise PlanError(f"models.{name}: {model.factory or model.card or model.zoo}: {type(error).__name__}: {error}") from error
    module = made.source.model if isinstance(made, (Family, Concept)) else made
    if model.weights is not None:
        _read_weights(name, module, base / model.weights)
    if isinstance(module, nn.Module):
        module.eval().requires_grad_(False)
    return made if isinstance(made, (Family, Expression)) else _wrapped(name, model, made)


def _wrapped(name: str, model: Model, made):
    if not callable(made):
        raise PlanError(f"models.{name}: {model.factory} must return a module, a function, a Family or a Concept, got {made!r}")
    about = {"data_range": model.data_range, "sigma": model.sigma, "negation_alpha": model.negation_alpha}
    if model.labels or model.condition_dim or model.unconditional:
        return Family(made, name, model.labels, unconditional=model.unconditional, condition_dim=model.condition_dim, **about)
    return Concept(made, name=name, **about)


def classifier(model):
    """What a filter calls: the module itself, also where it was wrapped as a concept."""
    return model.source.model if isinstance(model, (Family, Concept)) else model


def _read_weights(name: str, module, path: Path) -> None:
    from safetensors.torch import load_file

    if not isinstance(module, nn.Module):
        raise PlanError(f"models.{name}: weights need a module, and the factory returns a {type(module).__name__}")
    try:
        module.load_state_dict(load_file(path))
    except Exception as error:
        raise PlanError(f"models.{name}: {path} does not fit {type(module).__name__}: {error}") from None


@functools.cache
def _function(reference: str, base: Path):
    """`module:name`, imported; modules beside the plan are found too."""
    module, _, name = reference.partition(":")
    if str(base) not in sys.path:
        sys.path.insert(0, str(base))
    found = importlib.import_module(module)
    if not hasattr(found, name):
        raise AttributeError(f"module {module} has no {name}")
    return getattr(found, name)
