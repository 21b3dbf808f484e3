"""The part of `ebmfast train` that trains by contrastive divergence."""
from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .. import models
from .contrastive import ContrastiveConfig, ContrastiveTrainer
from .data import TrainingData, frozen_models, started

PLAIN = ContrastiveConfig()
PAPER_ITERATIONS = {"position": 10_000, "shape": 14_000, "color": 30_000}
NETWORKS = {"cubes": "CubesNet", "resnet128": "ResNet128"}


def add_contrastive_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of contrastive divergence; defaults are the paper's."""
    group = parser.add_argument_group("contrastive divergence (--method contrastive; defaults are the paper's)")
    group.add_argument("--network", choices=tuple(NETWORKS), default="cubes", help="default: cubes")
    group.add_argument("--width", type=int, default=64, help="channels of the network's first stage (default: 64)")
    group.add_argument("--level", type=float, default=0.2, help="noise level of the network of --start-from (default: 0.2)")
    group.add_argument("--steps", type=int, default=PLAIN.steps, help="steps of the chains that draw negatives (default: 40)")
    group.add_argument("--drift", type=float, default=PLAIN.drift, help="factor of their gradients (default: 100)")
    group.add_argument("--noise", type=float, default=PLAIN.noise, help="standard deviation of their noise (default: 0.001)")
    group.add_argument("--gradient-clip", type=float, default=None, help="elementwise bound on their gradients (default: none)")
    group.add_argument("--squares", type=float, default=PLAIN.squares, help="weight of the squared energies (default: 1)")
    group.add_argument("--smoothing", type=float, default=0.0, help="noise added to the pictures, range [0, 1] (default: 0)")
    group.add_argument("--max-gap", type=float, default=PLAIN.max_gap,
                       help="mean energy between pictures and negatives that counts as divergence (default: 20)")


def _model(args: argparse.Namespace, data: TrainingData) -> tuple[torch.nn.Module, dict]:
    """The network, and its description for the card."""
    if args.start_from is None:
        options = {"condition_dim": data.recipe.condition_dim, "width": args.width}
        name = NETWORKS[args.network]
        return getattr(models, name)(**options), {"class": f"ebmfast.models.{name}", "arguments": options}
    start, network = started(args.start_from, data.recipe)
    options = {"sigma": args.level, **network}
    model = models.AtNoiseLevel(**options)
    model.network.load_state_dict(start.state_dict())
    return model, {"class": "ebmfast.models.AtNoiseLevel", "arguments": options}


def train_contrastive(args: argparse.Namespace, data: TrainingData, device: torch.device, bf16: bool, out: Path) -> None:
    """Contrastive divergence with a replay buffer."""
    from .card import write_contrastive_card
    from .cli import DEFAULTS, command_of, go
    from .pictures import grid_writer

    if data.counts is not None:
        raise ValueError("contrastive divergence trains on pictures of one object; give --scenes")
    model, architecture = _model(args, data)
    config = ContrastiveConfig(
        iterations=args.iterations or PAPER_ITERATIONS.get(data.recipe.concept, PLAIN.iterations), batch=args.batch or PLAIN.batch,
        learning_rate=args.learning_rate or PLAIN.learning_rate, seed=args.seed, steps=args.steps, drift=args.drift,
        noise=args.noise, gradient_clip=args.gradient_clip, squares=args.squares, smoothing=args.smoothing, max_gap=args.max_gap,
        bf16=bf16)
    pictures = grid_writer(data.shown, args.resolution, noise_levels=False) if args.pictures_every else None
    trainer = ContrastiveTrainer(model.to(device), data.images, data.conditions, config,
                                 out / f"{data.recipe.name}.run",
                                 frozen_models(data.recipe, data.labels, args.frozen, device), pictures=pictures,
                                 pictures_every=args.pictures_every, tensorboard=args.tensorboard)
    go(trainer, args, data)
    averaged = trainer.averaged().cpu()
    options = {"method": "score", "network": "cubes", "width": 64, "level": 0.2, "steps": 40, "drift": 100.0,
               "noise": 0.001, "gradient_clip": None, "squares": 1.0, "smoothing": 0.0, "max_gap": 20.0}
    path = write_contrastive_card(out, data.recipe, architecture, config, averaged, command_of(args, config, DEFAULTS | options),
                                  trainer.seconds / 60, args.resolution, data.about, args.start_from, data.held_out)
    recent = trainer._recent[-config.log_every:]  # none where a run that was complete is resumed
    gap = f", energy gap {trainer.figures(recent)['gap']:.4g}" if recent else ""
    print(f"{path}: {config.iterations} iterations, {trainer.seconds / 60:.1f} minutes{gap}")
