"""`ebmfast train`: train one concept of the scene data set, or go on with it."""
from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

from ..models import NoiseConditionalEnergy
from .trainer import TrainConfig, Trainer, validation_error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ebmfast train`."""
    parser.add_argument("concept", choices=("position", "color", "shape", "size"))
    parser.add_argument("--out", default=None, help="folder of checkpoint, log and card (default: runs/CONCEPT)")
    parser.add_argument("--data", default="data", help="folder of rendered data sets (default: data)")
    parser.add_argument("--iterations", type=int, default=None, help="default: the concept's recipe")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1; part of the bits)")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def command_of(args: argparse.Namespace, config: TrainConfig) -> str:
    """The command that retrains these weights, for the card."""
    command = f"ebmfast train {args.concept} --seed {config.seed} --iterations {config.iterations}"
    if config.batch != 32:
        command += f" --batch {config.batch}"
    if config.learning_rate != 1.5e-3:
        command += f" --learning-rate {config.learning_rate:g}"
    return command


def run(args: argparse.Namespace) -> int:
    """Train, report the error on the test set, and write weights and card to --out."""
    from .. import scenes
    from .card import write_card
    from .concepts import RECIPES

    torch.set_num_threads(args.threads)
    recipe, out = RECIPES[args.concept], Path(args.out or f"runs/{args.concept}")
    data = scenes.load(scenes.TRAIN, args.data).with_object()
    mean, std = (round(float(v), 3) for v in (data.pixels().mean(), data.pixels().std()))
    network = {"condition_dim": recipe.condition_dim, "mean": mean, "std": std, **recipe.network}
    config = TrainConfig(
        iterations=args.iterations or recipe.iterations, batch=args.batch, learning_rate=args.learning_rate,
        seed=args.seed, labels=bool(recipe.labels),
    )
    torch.manual_seed(args.seed)
    model = NoiseConditionalEnergy(**network)
    trainer = Trainer(model, data.images, data.condition(args.concept), config, out)
    if args.resume:
        print(f"resumed at iteration {trainer.iteration}" if trainer.resume() else "no checkpoint, starting afresh")
    elif trainer.checkpoint.exists():
        raise SystemExit(f"{trainer.checkpoint} exists; pass --resume to go on with it, or another --out")
    weights = trainer.run(progress=not args.quiet)
    model.load_state_dict(weights)
    test = scenes.load(scenes.TEST, args.data).with_object()
    plain = dataclasses.replace(config.levels, focus=0.0)
    error = validation_error(model, test.images, test.condition(args.concept), plain)
    path = write_card(out, recipe, network, config, weights, command_of(args, config), trainer.seconds / 60, error)
    print(f"{path}: test error {error:.4f} after {config.iterations} iterations, {trainer.seconds / 60:.1f} minutes")
    return 0
