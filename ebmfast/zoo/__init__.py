"""Trained energies that come with the package: weights in safetensors, and a card that says what they are.

`names()` lists the concepts, `card(name)` reads a card, `load(name)` gives the network in eval mode.
"""
from __future__ import annotations

import functools
import hashlib
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ..composition import Expression, Family
    from ..samplers import Annealed, Langevin

_FOLDER = Path(__file__).parent
READERS = ("judge", "counter")  # kinds of networks that read samples


def names(kind: str = "noise-conditional energy") -> list[str]:
    """Names of the bundled models of one kind ("noise-conditional energy", "judge" or "counter"), sorted."""
    return sorted(p.stem for p in _FOLDER.glob("*.json") if json.loads(p.read_text())["kind"] == kind)


def card(name: str) -> dict[str, Any]:
    """The card of one model: what its condition means, its ranges, sampler settings, recipe, scores and hash.

    Raises ValueError for an unknown name and lists the known ones.
    """
    path = _FOLDER / f"{name}.json"
    if not name.isidentifier() or not path.exists():
        known = sorted(p.stem for p in _FOLDER.glob("*.json"))
        raise ValueError(f"no model named {name!r} in the zoo; there are {', '.join(known)}")
    return json.loads(path.read_text())


def folder(group: str | None = None) -> Path:
    """Where the bundled models lie; `group` "objects", "continual", "pairs", "paper" or "scenes64": those of one experiment."""
    return _FOLDER / group if group else _FOLDER


def located(folder: str | Path) -> Path:
    """That folder, or, where there is none, the bundled group of that name."""
    folder = Path(folder)
    bundled = _FOLDER / folder
    return bundled if len(folder.parts) == 1 and not folder.exists() and bundled.is_dir() else folder


def cards_in(folder: str | Path) -> dict[str, dict]:
    """Cards of the models of a folder by the name of their files: NAME.json beside NAME.safetensors, readers of samples left out.

    Raises ValueError where there are none.
    """
    paths = [p for p in sorted(Path(folder).glob("*.json")) if p.with_suffix(".safetensors").exists()]
    cards = {p.stem: card_from(folder, p.stem) for p in paths}
    found = {name: about for name, about in cards.items() if "condition_dim" in about and about.get("kind") not in READERS}
    if not found:
        raise ValueError(f"{folder} has no models: NAME.json with NAME.safetensors, as `ebmfast train` writes them")
    return found


def card_from(folder: str | Path, name: str) -> dict:
    """The card of a model in any folder, as `ebmfast train` writes it."""
    return json.loads((Path(folder) / f"{name}.json").read_text())


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
    about = card_from(folder, name)
    data = (folder / f"{name}.safetensors").read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != about["sha256"]:
        raise ValueError(f"{folder / name}.safetensors hashes to {digest}, its card says {about['sha256']}")
    module, _, cls = about["architecture"]["class"].rpartition(".")
    if module.split(".")[0] != "ebmfast":
        raise ValueError(f"the card of {name!r} names the class {module}.{cls}, which is not part of ebmfast")
    model = getattr(importlib.import_module(module), cls)(**about["architecture"]["arguments"])
    model.load_state_dict(unpacked(read(data)))
    return model.to(memory_format=torch.channels_last).eval().requires_grad_(False)


PACKED = ".scale8"


def packed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights to be stored, kernels and matrices in 8 bits: q = round(127 w / max|w|) of each output channel, with max|w| / 127
    beside it as NAME.scale8; all else in float16. `unpacked` reads them."""
    result = {}
    for name, value in weights.items():
        if value.ndim < 2:
            result[name] = value.half().contiguous()
            continue
        scale = value.float().flatten(1).abs().amax(1).clamp_min(1e-12) / 127
        result[name] = (value.float() / scale.view(-1, *[1] * (value.ndim - 1))).round().to(torch.int8).contiguous()
        result[name + PACKED] = scale
    return result


def unpacked(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `packed` packed, in float32; other weights as they are."""
    result = {name: value for name, value in weights.items() if not name.endswith(PACKED)}
    for name, value in result.items():
        if name + PACKED in weights:
            result[name] = value.float() * weights[name + PACKED].view(-1, *[1] * (value.ndim - 1))
    return result


@functools.cache
def concepts() -> dict[str, Family]:
    """The bundled concept models as `{name: Family}`, with labels, ranges, α and prior from their cards."""
    return {name: family(card(name), load(name)) for name in names()}


def family(about: Mapping[str, Any], model: nn.Module) -> Family:
    """A trained model and its card as a `Family`."""
    from ..composition import Family

    return Family(model, about["name"], about["labels"] or None, unconditional=about["prior"],
                  condition_dim=about["condition_dim"], data_range=about["data_range"], sigma=about["sigma"],
                  negation_alpha=about["negation_alpha"], shape=about["shape"], ranges=about.get("ranges"))


def own_priors(expression: Expression, above: float = 0.0, weight: float = 1.0) -> Expression:
    """Every conjunction with each model's own prior taken out once: E_1 + sum_(i > 1) w_i (E_i - E_i,unconditional).

    The product of experts p(x | c_1) prod_i (p(x | c_i) / p(x))^w_i, as `with_prior` writes it, but each ratio comes
    from one network, so that what this network gets wrong about p(x) cancels. The first term of positive weight stays
    as it is (where its weight w is not 1, (w - 1) of its prior go). Priors are taken out, and negated terms count, at noise
    levels over `above` only: by then a picture has decided what it shows, and a negation would leave it noisy. Above,
    steps count as for one energy. `weight` takes out a part of each prior: of scenes that hold more objects than asked for,
    every further factor p(x | c) is less in favour than p(x | c) / p(x). Raises ValueError for a model without
    unconditional energy.
    """
    from ..weights import AboveSigma, multiply

    strength = AboveSigma(above) if above else 1.0
    return _own_priors(expression.simplified, strength, multiply(weight, strength))


def _own_priors(expression, strength, taken):
    from ..composition import LogSumExp, Sum
    from ..weights import combine, lowest, multiply

    if isinstance(expression, LogSumExp):
        branches = tuple(_own_priors(child, strength, taken) for child in expression.children)
        return LogSumExp(branches, expression.log_weights, expression.sharpness)
    if not isinstance(expression, Sum):
        return expression
    terms, base = [], next((i for i, (w, _) in enumerate(expression.terms) if lowest(w) > 0), None)
    for i, (weight, term) in enumerate(expression.terms):
        weight = multiply(weight, strength) if lowest(weight) < 0 else weight
        extra = combine(lambda w: w - 1.0, weight) if i == base else weight
        terms.append((weight, _own_priors(term, strength, taken)))
        if extra != 0.0:
            terms.append((multiply(-1.0, multiply(extra, taken)), _prior_of(term)))
    return Sum(tuple(terms), combine(lambda s, m: s + (1.0 - s) * m, taken, expression.step_scale))


def symmetric_prior(expression: Expression) -> Expression:
    """Every conjunction over one prior that is blind to cyclic shifts of the channels.

    E_sym(x) + sum_i w_i (E_i(x | c_i) - E_i(x)), with `models.Symmetrized` of the first term's own E(x) as E_sym. A prior that has
    never seen blue cubes has seen red and green ones, and the mixture over shifts of the channels has all three; it does not help
    with colours that no shift relates, and is wrong where shifts change more than a colour. Ratios keep what their models know of
    pairs: those of `ViewedEnergy` know nothing beyond their view. Steps count as for one energy. Raises ValueError for a model
    without unconditional energy, and for parts that are neither concepts nor ORs of conjunctions of them.
    """
    return _symmetric_prior(expression.simplified, {})


def _symmetric_prior(expression, made):
    from ..composition import Concept, LogSumExp, Sum
    from ..models import Ratio, Symmetrized

    if isinstance(expression, LogSumExp):
        branches = tuple(_symmetric_prior(child, made) for child in expression.children)
        return LogSumExp(branches, expression.log_weights, expression.sharpness)

    def module(kind, concept):
        model = concept.source.model
        return made.setdefault((kind, id(model)), kind(model))

    terms, prior = [], None
    for weight, term in expression.terms if isinstance(expression, Sum) else ((1.0, expression),):
        if not isinstance(term, Concept):
            raise ValueError(f"a symmetric prior goes under conjunctions of concepts, and ORs of them; {term!r} is neither")
        alone = _prior_of(term)
        if prior is None:
            prior = Concept(module(Symmetrized, alone), name=f"{alone.name}, symmetric", takes_sigma=alone.source.takes_sigma,
                            data_range=alone.source.data_range, sigma=alone.source.sigma, shape=alone.source.shape)
            terms.append((1.0, prior))
        source = term.source
        terms.append((weight, Concept(module(Ratio, term), term.condition, f"{term.name}, ratio", takes_sigma=source.takes_sigma,
                                      data_range=source.data_range, sigma=source.sigma, shape=source.shape)))
    return Sum(tuple(terms), 1.0)


def _prior_of(term):
    leaf = term.leaves[0]
    if leaf.family is None:
        raise ValueError(f"{leaf!r} belongs to no family, so nothing says what its unconditional energy is")
    return leaf.family.unconditional


def recommended(expression: Expression,
                about: Mapping[str, dict[str, Any]] | None = None) -> tuple[Expression, Annealed | Langevin]:
    """The expression with its priors counted once, and the sampler that the cards name.

    That is `Annealed`; for models without noise levels, as contrastive divergence trains them, `Langevin` as long as the chains
    of the card (`chain_length`), its drift shared between the conjuncts.

    The prior of each conjunct is its own model's (`own_priors`); a composition that has a prior of its own
    (`with_prior`, or a leaf `.unconditional`), or a model without one, is returned as it is. Cards of other models go
    in `about`.
    """
    from ..samplers import Annealed, Langevin
    from ..weights import lowest

    families, cards = _families(expression), _cards(expression, about)
    schedule = cards[0]["schedule"]
    has_one = any(leaf.condition is None for leaf in expression.leaves)
    if not has_one and len(families) == len(expression.leaves) == len(cards) and all(c["prior"] for c in cards):
        counted = own_priors(expression, schedule.get("prior_above", 0.0), schedule.get("prior_weight", 1.0))
        expression = expression if counted.simplified == expression.simplified else counted
    if "sigma_max" not in schedule:
        share = max(1.0, lowest(expression.step_scale))
        drift = schedule["step"]
        drift = [d / share for d in drift] if isinstance(drift, list) else drift / share
        return expression, Langevin.reference_code(drift, schedule["noise"], grad_clip_value=schedule.get("gradient_clip"))
    return expression, Annealed.geometric(
        schedule["sigma_max"], schedule["sigma_min"], schedule["levels"], denoise=schedule["denoise"],
        steps_per_level=schedule["steps_per_level"], drift=schedule["drift"])


def chain_length(expression: Expression, about: Mapping[str, dict[str, Any]] | None = None) -> int | None:
    """The steps of chains that the cards of models without noise levels name; None where there are levels."""
    schedule = _cards(expression, about)[0]["schedule"]
    return None if "sigma_max" in schedule else schedule["steps"]


def _families(expression: Expression) -> list[Family]:
    return [leaf.family for leaf in expression.leaves if leaf.family is not None]


def _cards(expression: Expression, about: Mapping[str, dict[str, Any]] | None) -> list[dict]:
    found = [c for f in _families(expression) if (c := (about or {}).get(f.name) or _card_or_none(f.name))]
    if not found:
        raise ValueError(f"no model of {expression!r} has a card that names a schedule; pass a sampler of your own")
    return found


def _card_or_none(name: str) -> dict | None:
    return card(name) if name in names() else None
