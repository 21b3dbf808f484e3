"""`ebmfast infer`: which concepts explain a picture, by comparing energies under every label or point of a grid."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from . import images
from .composition import Family, Slot
from .inference import Inference, grid, infer

EXAMPLES = """\
examples:
  ebmfast infer picture.png                        # every concept that `ebmfast models` lists
  ebmfast infer a.png b.png --one-scene --concepts position --grid 40 --map energy.png
  ebmfast infer picture.png --concepts color shape --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ebmfast infer`."""
    parser.add_argument("pictures", type=Path, nargs="+", help="pictures of the size that the models were trained on")
    parser.add_argument("--concepts", nargs="+", metavar="NAME", help="what to ask for (default: every concept)")
    parser.add_argument("--one-scene", action="store_true", help="all pictures show the same scene: their energies add up")
    parser.add_argument("--sigma", type=float, default=0.2,
                        help="noise level at which energies are compared (default: %(default)s)")
    parser.add_argument("--draws", type=int, default=4, help="noised copies that energies are averaged over (default: %(default)s)")
    parser.add_argument("--grid", type=int, default=20, help="points per number of a continuous condition (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the noise (default: %(default)s)")
    parser.add_argument("--models", type=Path, action="append", default=[], metavar="DIR", help="as in `ebmfast sample`")
    parser.add_argument("--map", type=Path, metavar="PNG", help="draw log p(condition | picture) of conditions of two numbers")
    parser.add_argument("--json", action="store_true", help="print JSON")


def ask(x: torch.Tensor, family: Family, card: dict, args: argparse.Namespace) -> Inference:
    """The posterior of one concept, over its labels or over a grid of its ranges."""
    options = dict(sigma=args.sigma if family.source.takes_sigma else None, draws=args.draws, seed=args.seed,
                   scene="one" if args.one_scene else None)
    if family.labels:
        return infer(x, {family.name: [family(label) for label in family.labels]}, **options)
    return infer(x, family[Slot(family.name)], {family.name: grid(card["ranges"], args.grid)}, **options)


def describe(found: Inference, family: Family, scene: int) -> dict:
    """One scene's answer: the best candidate and its probability; for numbers also mean and standard deviation."""
    marginal = found.marginal(family.name)[scene]
    best = int(marginal.argmax())
    answer = {"concept": family.name, "probability": round(float(marginal[best]), 4)}
    if family.labels:
        names = list(family.labels)
        return answer | {"best": names[best], "posterior": {n: round(float(p), 4) for n, p in zip(names, marginal)}}
    rows = found.candidates[family.name].double()
    mean = marginal @ rows
    deviation = (marginal @ (rows - mean).square()).sqrt()
    return answer | {name: [round(v, 4) for v in values.tolist()]
                     for name, values in (("best", rows[best]), ("mean", mean), ("deviation", deviation))}


def _line(answer: dict) -> str:
    if isinstance(answer["best"], str):
        others = sorted(answer["posterior"].items(), key=lambda p: -p[1])[1:3]
        rest = ", ".join(f"{n} {p:.3f}" for n, p in others)
        return f"  {answer['concept']:10} {answer['best']}  p = {answer['probability']:.3f}  ({rest})"
    numbers = {k: ", ".join(f"{v:.3f}" for v in answer[k]) for k in ("best", "mean", "deviation")}
    return f"  {answer['concept']:10} ({numbers['best']})  mean ({numbers['mean']}) ± ({numbers['deviation']})"


def run(args: argparse.Namespace) -> int:
    """Print, for every scene and concept, what explains it best."""
    from .cli import models_of

    families, cards = models_of(args.models)
    names = args.concepts or list(families)
    for name in names:
        if name not in families:
            raise ValueError(f"`--concepts` must be among {', '.join(families)}, got {name!r}")
    shapes = {(tuple(cards[n]["shape"]), tuple(cards[n]["data_range"])) for n in names}
    if len(shapes) > 1:
        raise ValueError("these concepts are of pictures of different sizes or ranges: name some with --concepts")
    (shape, data_range), = shapes
    x = torch.stack([images.read(p, (shape[2], shape[1]), data_range) for p in args.pictures])
    found = {name: ask(x, families[name], cards[name], args) for name in names}
    scenes = [args.pictures] if args.one_scene else [[p] for p in args.pictures]
    answers = [{"pictures": [str(p) for p in shown], "answers": [describe(found[n], families[n], s) for n in names]}
               for s, shown in enumerate(scenes)]
    if args.json:
        print(json.dumps(answers, indent=2))
    else:
        for answer in answers:
            print(", ".join(answer["pictures"]))
            print("\n".join(_line(a) for a in answer["answers"]))
    if args.map:
        _draw(args, x, data_range, {n: f for n, f in found.items() if len(f.shapes.get(n, ())) == 2}, len(scenes))
    return 0


def _draw(args, x, data_range, found: dict, scenes: int) -> None:
    """A row for each scene: its first picture, then a map for each concept of two numbers."""
    if not found:
        raise ValueError("`--map` draws conditions of two numbers, such as position; none was asked for")
    low, high = data_range
    rows = []
    for s in range(scenes):
        shown = (x[s] - low) / (high - low)
        maps = [images.heat_map(f.map(n, s) - f.map(n, s).max(), low=-30.0, high=0.0) for n, f in found.items()]
        size = shown.shape[1:]
        scaled = [torch.nn.functional.interpolate(m[None], size=size, mode="nearest")[0] for m in maps]
        rows.append(torch.stack([shown, *scaled]))
    titles = [f"scene {s + 1}; log p of {', '.join(found)}, dark 30 or more below the best" for s in range(scenes)]
    metadata = {"pictures": "\n".join(map(str, args.pictures)), "sigma": str(args.sigma)}
    images.save(images.grid(rows, titles, scale=6), args.map, metadata)
    print(f"wrote {args.map}")
