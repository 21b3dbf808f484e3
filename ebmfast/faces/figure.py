"""The nested-faces figure: rows of samples from compositions of attribute models."""
from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from .. import zoo
from ..expressions import parse
from ..samplers import Langevin
from ..sampling import sample

NESTED = (
    "smiling('smiling')",
    "smiling('smiling') & male('not_male')",
    "old('not_old') & male('not_male') & smiling('smiling')",
    "male('not_male') & (smiling('smiling') | old('old'))",
    "(smiling('smiling') & male('male')) | (old('old') & male('not_male'))",
    "smiling('smiling') & ~male('male')",
    "wavy_hair('wavy_hair') & black_hair('black_hair')",
    "attractive('attractive') & male('not_male') & (wavy_hair('wavy_hair') | black_hair('black_hair'))",
)


def concepts_of(text: str) -> set[str]:
    """The names of models in an expression."""
    return {node.id for node in ast.walk(ast.parse(text, mode="eval")) if isinstance(node, ast.Name)}


def load(folders: Iterable[Path]) -> dict[str, tuple]:
    """`{name: (family, card)}` of every model in the folders. Raises ValueError where there is none."""
    models = {}
    for folder in folders:
        for name, about in zoo.cards_in(folder).items():
            models[about["name"]] = (zoo.family(about, zoo.load_from(folder, name)), about)
    return models


def compose(models: dict[str, tuple], expressions: Sequence[str], n: int = 8, steps: int = 100, seed: int = 0) -> dict[str, Tensor]:
    """Samples [n, 3, R, R] in [0, 1] of each expression.

    Models with noise levels are annealed as their cards say, each conjunct's prior counted once. Models without start from
    uniform noise and take `steps` steps of `Langevin.reference_code` as they were trained, the drift shared between conjuncts.
    Raises ValueError where the two kinds are mixed.
    """
    families = {name: family for name, (family, _) in models.items()}
    rows = {}
    for text in expressions:
        expression = parse(text, families)
        cards = [models[leaf.family.name][1] for leaf in expression.leaves]
        if len({card["sigma"] is None for card in cards}) > 1:
            raise ValueError(f"{text!r} mixes models with and without noise levels")
        shape = tuple(cards[0]["shape"])
        if cards[0]["sigma"] is None:
            settings, share = cards[0]["schedule"], max(1.0, float(expression.step_scale))
            if isinstance(settings["step"], list):  # with a last step of its own: the chain is as long as the card says
                length, drift = settings["steps"], [d / share for d in settings["step"]]
            else:
                length, drift = steps, settings["step"] / share
            sampler = Langevin.reference_code(drift, settings["noise"], grad_clip_value=settings["gradient_clip"])
            x = sample(expression, n, shape, sampler, length, seed, energies=False).x
        else:
            counted, sampler = zoo.recommended(expression, {name: about for name, (_, about) in models.items()})
            x = 0.5 * (sample(counted, n, shape, sampler, seed=seed, energies=False).x + 1.0)
        rows[text] = x.clamp(0.0, 1.0)
    return rows


def write(rows: dict[str, Tensor], path: str | Path, scale: int | None = None) -> None:
    """One row of pictures per expression, with its text, as a PNG; needs Pillow."""
    from .. import images

    size = next(iter(rows.values())).shape[-1]
    grid = images.grid(list(rows.values()), list(rows), data_range=(0, 1), scale=scale or max(1, 128 // size))
    images.save(grid, path, {"expressions": "\n".join(rows)})
