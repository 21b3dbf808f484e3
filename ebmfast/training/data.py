"""What `ebmfast train` trains on: rendered scenes or faces, with the conditions of one concept."""
from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .concepts import FACES, RECIPES, ConceptRecipe
from .trainer import Frozen


@dataclass(frozen=True)
class TrainingData:
    """images uint8 [N, 3, R, R]; conditions [N, C], or [N, K, C] with `counts` [N]; `test()` gives held-out images, their labels
    and conditions; `labels` is what the data set says of the pictures; mean and std are of pixels in [-1, 1]."""

    recipe: ConceptRecipe
    images: Tensor
    conditions: Tensor
    counts: Tensor | None
    labels: object
    test: Callable[[], tuple]
    about: str
    mean: float
    std: float
    held_out: tuple = ()

    @property
    def shown(self) -> Tensor:
        """Conditions [N, C] for grids of samples."""
        return self.conditions if self.counts is None else self.conditions[:, 0]


def read(args: argparse.Namespace) -> TrainingData:
    """The data that the command line names."""
    return faces(args) if args.concept in FACES else scenes(args)


def scenes(args: argparse.Namespace) -> TrainingData:
    """Rendered scenes."""
    from .. import scenes as sets

    source = sets.named(args.scenes or RECIPES[args.concept].data, args.resolution, args.count)
    recipe = RECIPES[args.concept].at(args.resolution, source.palette)
    data = sets.load(source, args.data).with_object()
    several = isinstance(data, sets.ObjectsData)
    concept = recipe.concept
    conditions, counts = (data.position, data.count) if several else (data.condition(concept), None)

    def test():
        held = sets.load(sets.named(recipe.test, args.resolution), args.data).with_object()
        held = held.pick() if several else held
        return held.images, held, held.condition(concept)

    mean, std = moments(data.images)
    about = f"{len(data)} pictures of {args.resolution}x{args.resolution}: {sets.command_of(source, 'data')}"
    return TrainingData(recipe, data.images, conditions, counts, data, test, about, mean, std, source.held_out)


def faces(args: argparse.Namespace) -> TrainingData:
    """Faces in CelebA's layout; the last tenth, at most 2000, is held out."""
    from ..faces import CelebA

    recipe = FACES[args.concept].at(args.resolution)
    data = CelebA(args.celeba).load(args.resolution)
    held = max(1, min(2000, len(data) // 10))
    condition = data.condition(recipe.name)
    mean, std = moments(data.images[:5000])

    def test():
        return data.images[-held:], data, condition[-held:]

    about = f"{len(data) - held} faces of {args.resolution}x{args.resolution} in CelebA's layout"
    return TrainingData(recipe, data.images[:-held], condition[:-held], None, data, test, about, mean, std)


def moments(images: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of pictures uint8 as pixels in [-1, 1]."""
    pixels = images.float() / 127.5 - 1.0
    return round(float(pixels.mean()), 3), round(float(pixels.std()), 3)


def frozen_models(recipe: ConceptRecipe, labels, folder: str | Path | None, device: torch.device | str) -> list[Frozen]:
    """The models a stage builds on, from `folder` or the bundled ones of its group, under the labels of the data."""
    from .. import zoo

    places = {name: earlier(recipe, name, folder) for name in recipe.frozen}
    return [Frozen(name, zoo.load_from(place, name).to(device), labels.condition(name)) for name, place in places.items()]


def earlier(recipe: ConceptRecipe, name: str, folder: str | Path | None) -> Path:
    """Where a model lies that this one builds on: `folder`, else runs/GROUP, else the bundled group.

    Raises FileNotFoundError where it is in none of them.
    """
    from .. import zoo

    place = Path(folder or f"runs/{recipe.group}")
    place = place if (place / f"{name}.json").exists() else zoo.folder(recipe.group)
    if not (place / f"{name}.json").exists():
        raise FileNotFoundError(f"{recipe.name} builds on {name}.json, trained earlier, which is not in {folder}: "
                                f"train that one first, or say where it is with --frozen")
    return place


def network_of(data: TrainingData) -> dict:
    """Arguments of the network that the recipe names, for these pictures."""
    return {"mean": data.mean, "std": data.std, "condition_dim": data.recipe.condition_dim, **data.recipe.network}


def network_over(recipe: ConceptRecipe, network: dict, folder: str | Path | None) -> tuple[dict, nn.Module | None]:
    """Arguments of the network with the prior that the recipe takes over, and that prior; None where it takes none."""
    from .. import zoo

    if not recipe.prior_of:
        return network, None
    place = earlier(recipe, recipe.prior_of, folder)
    source, theirs = zoo.load_from(place, recipe.prior_of), zoo.card_from(place, recipe.prior_of)["architecture"]["arguments"]
    if "view" not in theirs:
        raise ValueError(f"{recipe.name} goes over the prior of {recipe.prior_of}, and that of {place} has no view: train it with "
                         f"`ebmfast train {recipe.prior_of}`")
    return network | {name: theirs[name] for name in ("mean", "std", "prior", "sigma") if name in theirs}, source.prior


def started(folder: str, recipe: ConceptRecipe) -> tuple[nn.Module, dict]:
    """The score-matched model that training starts from, in `folder` or bundled (`zoo`), and its network's arguments."""
    from .. import zoo

    alone = recipe.name == recipe.concept
    place = Path(folder) if folder != "zoo" else zoo.folder() if alone else zoo.folder(recipe.group)
    return zoo.load_from(place, recipe.concept), zoo.card_from(place, recipe.concept)["architecture"]["arguments"]
