"""`ebmfast train`: train one model on rendered scenes by denoising score matching, or go on with it.

Writes checkpoint, log, grids of samples, weights and card to --out. A run that was stopped goes on with --resume and ends in
the same bits.
"""
from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

from ..models import NoiseConditionalEnergy
from .concepts import RECIPES
from .trainer import Frozen, TrainConfig, Trainer, validation_error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ebmfast train`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "models:\n" + "\n".join(f"  {r.name:15} {r.about}" for r in RECIPES.values())
    parser.add_argument("concept", metavar="MODEL", choices=tuple(RECIPES), help="what to train; see below")
    parser.add_argument("--out", default=None, help="folder of checkpoint, log and card (default: runs/MODEL)")
    parser.add_argument("--data", default="data", help="folder of rendered data sets (default: data)")
    parser.add_argument("--scenes", default=None, metavar="NAME", help="another data set; `ebmfast scenes --help` lists them")
    parser.add_argument("--resolution", type=int, default=32, help="pixels per side (default: 32)")
    parser.add_argument("--frozen", default="runs", metavar="DIR",
                        help="where continual stages find the earlier ones: DIR/MODEL, or the zoo (default: runs)")
    parser.add_argument("--iterations", type=int, default=None, help="default: the model's recipe")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--contrast", type=float, default=0.04, metavar="W",
                        help="weight of the cross-entropy over conditions; 0 trains by score matching alone (default: 0.04)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: a GPU if there is one)")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=None,
                        help="train in bfloat16 autocast (default: on GPUs and on CPUs with AVX512-BF16)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1; part of the bits)")
    parser.add_argument("--pictures-every", type=int, default=1000, metavar="N",
                        help="write a grid of samples every N iterations; 0: never (default: 1000)")
    parser.add_argument("--tensorboard", action="store_true", help="also log for TensorBoard, into --out")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def command_of(args: argparse.Namespace, config: TrainConfig) -> str:
    """The command that retrains these weights, for the card."""
    command = f"ebmfast train {args.concept} --seed {config.seed} --iterations {config.iterations}"
    defaults = {"batch": 32, "learning_rate": 1.5e-3, "contrast": 0.04, "resolution": 32, "scenes": None}
    for name, default in defaults.items():
        if getattr(args, name) != default:
            command += f" --{name.replace('_', '-')} {getattr(args, name)}"
    return command + (" --bf16" if config.bf16 else " --no-bf16")


def device_of(name: str) -> torch.device:
    """The device that `--device` names."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def bf16_helps(device: torch.device) -> bool:
    """Whether products of bfloat16 are fast there."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


def frozen_models(recipe, data, folder: str | Path, device) -> list[Frozen]:
    """The models a stage builds on, from `folder`/NAME or the zoo, under the labels of `data`."""
    from .. import zoo

    found = []
    for name in recipe.frozen:
        place = Path(folder) / name
        model = zoo.load_from(place, name) if (place / f"{name}.json").exists() else zoo.load(name)
        found.append(Frozen(name, model.to(device), data.condition(RECIPES[name].concept)))
    return found


def _labels(data, concept: str):
    """Conditions, and how many of them hold in each picture where there are several."""
    from ..scenes import ObjectsData

    return (data.position, data.count) if isinstance(data, ObjectsData) else (data.condition(concept), None)


def run(args: argparse.Namespace) -> int:
    """Train, report the error on the test set, and write weights and card to --out."""
    from .. import scenes
    from .card import stored, write_card
    from .pictures import grid_writer

    torch.set_num_threads(args.threads)
    device, out = device_of(args.device), Path(args.out or f"runs/{args.concept}")
    source = scenes.named(args.scenes or RECIPES[args.concept].data, args.resolution)
    recipe = RECIPES[args.concept].at(args.resolution, source.palette)
    data = scenes.load(source, args.data).with_object()
    conditions, counts = _labels(data, recipe.concept or recipe.name)
    mean, std = (round(float(v), 3) for v in (data.pixels().mean(), data.pixels().std()))
    network = {"mean": mean, "std": std, "condition_dim": recipe.condition_dim, **recipe.network}
    config = TrainConfig(
        iterations=args.iterations or recipe.iterations, batch=args.batch, learning_rate=args.learning_rate,
        seed=args.seed, labels=bool(recipe.labels), contrast_weight=args.contrast,
        bf16=bf16_helps(device) if args.bf16 is None else args.bf16,
    )
    torch.manual_seed(args.seed)
    model = NoiseConditionalEnergy(**network).to(device)
    pictures = grid_writer(conditions if counts is None else conditions[:, 0], args.resolution) if args.pictures_every else None
    trainer = Trainer(model, data.images, conditions, config, out, counts, frozen_models(recipe, data, args.frozen, device),
                      pictures=pictures, pictures_every=args.pictures_every, tensorboard=args.tensorboard)
    if args.resume:
        print(f"resumed at iteration {trainer.iteration}" if trainer.resume() else "no checkpoint, starting afresh")
    elif trainer.checkpoint.exists():
        raise SystemExit(f"{trainer.checkpoint} exists; pass --resume to go on with it, or another --out")
    weights = trainer.run(progress=not args.quiet)
    model.load_state_dict(stored(weights), strict=False)
    test = scenes.load(scenes.named(recipe.test, args.resolution), args.data).with_object()
    test = test.pick() if counts is not None else test
    plain = dataclasses.replace(config.levels, focus=0.0)
    error = validation_error(model.cpu(), test.images, test.condition(recipe.concept or recipe.name), plain,
                             frozen=frozen_models(recipe, test, args.frozen, "cpu"))
    about = f"{len(data)} pictures of {args.resolution}x{args.resolution}: {scenes.command_of(source, 'data')}"
    path = write_card(out, recipe, network, config, weights, command_of(args, config), trainer.seconds / 60,
                      {"test_error": round(error, 4)}, args.resolution, about)
    print(f"{path}: test error {error:.4f} after {config.iterations} iterations, {trainer.seconds / 60:.1f} minutes")
    return 0
