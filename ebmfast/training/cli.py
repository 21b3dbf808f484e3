"""`ebmfast train`: train one model on rendered scenes or on faces, or go on with it.

Score matching (the default) gives a noise-conditional energy for annealed sampling; `--method contrastive` is the paper's
contrastive divergence with a replay buffer. Weights and card go to --out; checkpoint, log and grids of samples to a folder in
it. A run that was stopped goes on with --resume and ends in the same bits.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import re
from pathlib import Path

import torch

from ..models import network_class
from .concepts import FACES, RECIPES
from .contrastive_cli import add_contrastive_arguments, train_contrastive
from .data import TrainingData, frozen_models, network_of, network_over, read, started
from .trainer import TrainConfig, Trainer, validation_error

EXAMPLES = """examples:
  ebmfast train color
  ebmfast train objects --resolution 64 --batch 128
  ebmfast train stage_shape                        after stage_position
  ebmfast train color --method contrastive --network cubes
  ebmfast train smiling --celeba CELEBA --resolution 128 --method contrastive --network resnet128
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ebmfast train`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    known = [*RECIPES.values(), *FACES.values()]
    lines = "\n".join(f"  {r.name:15} {r.group:10} {r.about}" for r in known)
    parser.epilog = f"models:\n  {'MODEL':15} {'GROUP':10}\n{lines}\n\n{EXAMPLES}"
    parser.add_argument("concept", metavar="MODEL", choices=(*RECIPES, *FACES), help="what to train; see below")
    parser.add_argument("--method", choices=("score", "contrastive"), default="score", help="default: score")
    parser.add_argument("--out", default=None, help="folder of card and weights, all else in OUT/MODEL.run (default: runs/GROUP)")
    parser.add_argument("--data", default="data", help="folder of rendered data sets (default: data)")
    parser.add_argument("--scenes", default=None, metavar="NAME", help="another data set; `ebmfast scenes --help` lists them")
    parser.add_argument("--count", type=int, default=None, help="pictures of that set, as `ebmfast scenes --count` rendered it")
    parser.add_argument("--celeba", default="data/celeba", metavar="DIR",
                        help="folder of img_align_celeba (or its zip) and list_attr_celeba.txt (default: data/celeba)")
    parser.add_argument("--resolution", type=int, default=32, help="pixels per side (default: 32)")
    parser.add_argument("--frozen", default=None, metavar="DIR",
                        help="where stages find earlier ones, and coarse_color finds shape (default: runs/GROUP, else "
                             "the bundled ones)")
    parser.add_argument("--iterations", type=int, default=None, help="default: the model's recipe, or the paper's")
    parser.add_argument("--batch", type=int, default=None, help="default: 32, for contrastive divergence 16")
    parser.add_argument("--learning-rate", type=float, default=None, help="default: 0.0015, for contrastive divergence 0.0003")
    parser.add_argument("--contrast", type=float, default=0.04, metavar="W",
                        help="weight of the cross-entropy over conditions; 0 trains by score matching alone (default: 0.04)")
    parser.add_argument("--start-from", default=None, metavar="DIR",
                        help="start from the weights, and with the network, of the score-matched MODEL in DIR (or `zoo`)")
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
    add_contrastive_arguments(parser)


DEFAULTS = {"batch": None, "learning_rate": None, "contrast": 0.04, "resolution": 32, "scenes": None, "count": None,
            "celeba": "data/celeba", "start_from": None}


def command_of(args: argparse.Namespace, config, defaults: dict = DEFAULTS) -> str:
    """The command that retrains these weights, for the card."""
    command = f"ebmfast train {args.concept} --seed {config.seed} --iterations {config.iterations}"
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


def run(args: argparse.Namespace) -> int:
    """Train, report what the test set says, and write weights and card to --out."""
    for name in ("iterations", "batch", "learning_rate", "count"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"`--{name.replace('_', '-')}` must be positive, got {value}")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    device, data = device_of(args.device), read(args)
    bf16 = bf16_helps(device) if args.bf16 is None else args.bf16
    out = Path(args.out or f"runs/{data.recipe.group}" + ("" if args.method == "score" else "-contrastive"))
    there = out / f"{data.recipe.concept}.json"
    if there.exists() and (about := json.loads(there.read_text()).get("about")) != data.recipe.about:
        raise ValueError(f"{there} is another model ({about}), which would be written over: take another --out")
    (train_contrastive if args.method == "contrastive" else train_score)(args, data, device, bf16, out)
    return 0


def train_score(args: argparse.Namespace, data: TrainingData, device: torch.device, bf16: bool, out: Path) -> None:
    """Denoising score matching."""
    from .card import stored, write_card
    from .pictures import grid_writer

    recipe = data.recipe
    start, network = started(args.start_from, recipe) if args.start_from else (None, network_of(data))
    config = TrainConfig(
        iterations=args.iterations or recipe.iterations, batch=args.batch or 32, learning_rate=args.learning_rate or 1.5e-3,
        seed=args.seed, labels=bool(recipe.labels), contrast_weight=args.contrast, bf16=bf16, **recipe.options)
    network, prior = network_over(recipe, network, args.frozen)
    model = network_class(network)(**network).to(device)
    if start is not None:
        model.load_state_dict(start.state_dict())
    if prior is not None:
        model.prior.load_state_dict(prior.state_dict())
        model.prior.requires_grad_(False)
    pictures = grid_writer(data.shown, args.resolution, noise_levels=True) if args.pictures_every else None
    frozen = frozen_models(recipe, data.labels, args.frozen, device)
    trainer = Trainer(model, data.images, data.conditions, config, out / f"{recipe.name}.run", data.counts, frozen,
                      pictures=pictures, pictures_every=args.pictures_every, tensorboard=args.tensorboard)
    weights = go(trainer, args, data)
    model.load_state_dict(stored(weights), strict=False)
    test, labels, condition = data.test()
    plain = dataclasses.replace(config.levels, focus=0.0)
    frozen = frozen_models(recipe, labels, args.frozen, "cpu")
    error = validation_error(model.cpu(), test, condition, plain, frozen=frozen)
    path = write_card(out, recipe, network, config, weights, command_of(args, config), trainer.seconds / 60,
                      {"test_error": round(error, 4)}, args.resolution, data.about, data.held_out)
    print(f"{path}: test error {error:.4f} after {config.iterations} iterations, {trainer.seconds / 60:.1f} minutes")


def go(trainer, args: argparse.Namespace, data: TrainingData) -> dict:
    """Run a trainer from the start, or from its checkpoint with --resume."""
    trainer.source = {"data": re.sub(r" --root \S+", "", data.about), "start_from": args.start_from,
                      "parameters": sum(p.numel() for p in trainer.model.parameters())}
    if args.resume:
        print(f"resumed at iteration {trainer.iteration}" if trainer.resume() else "no checkpoint, starting afresh")
    elif trainer.checkpoint.exists():
        raise ValueError(f"{trainer.checkpoint} exists; pass --resume to go on with it, or another --out")
    return trainer.run(progress=not args.quiet)
