"""`ebmfast judge`: train the network that reads samples, on clean renders only."""
from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from .. import evaluation, scenes

KINDS = ("judge", "counter")
SETS = {"judge": ("train", "test"), "counter": ("objects-judge", "objects-test")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ebmfast judge`."""
    parser.add_argument("kind", choices=KINDS, help="judge: what one object is and where; counter: how many there are")
    parser.add_argument("--data", default="data", help="folder of rendered data sets (default: %(default)s)")
    parser.add_argument("--resolution", type=int, default=32, help="pixels per side (default: %(default)s)")
    parser.add_argument("--count", type=int, help="clean renders to train on, as `ebmfast scenes --count` made them")
    parser.add_argument("--epochs", type=int, default=12, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder of card and weights (default: runs/KIND)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def counter_scores(counter, data) -> dict[str, float]:
    """Accuracy of a counter on clean renders, over all and by number of objects."""
    right, truth = counter.read(data.pixels())["count"] == data.count, data.count
    by_number = {f"count {k}": float(right[truth == k].float().mean()) for k in truth.unique().tolist()}
    return {"count": float(right.float().mean())} | by_number


def run(args: argparse.Namespace) -> int:
    """Train, score on the test set, and write KIND.json and KIND.safetensors."""
    torch.set_num_threads(args.threads)
    names, counts = SETS[args.kind], (args.count, None)
    sets = [scenes.named(name, args.resolution, count) for name, count in zip(names, counts)]
    train, test = (scenes.load(config, args.data) for config in sets)
    fit = evaluation.train_judge if args.kind == "judge" else evaluation.train_counter
    started = time.perf_counter()
    reader = fit(train, args.epochs, seed=args.seed, progress=not args.quiet)
    minutes = (time.perf_counter() - started) / 60
    scores = evaluation.judge_scores(reader, test) if args.kind == "judge" else counter_scores(reader, test)
    path = write_card(args, reader, scores, minutes, scenes.command_of(sets[0], "data"))
    print(f"{path}: " + ", ".join(f"{k} {v:.4f}" for k, v in scores.items()))
    return 0


def write_card(args, reader: evaluation.Reader, scores: dict, minutes: float, data: str) -> Path:
    """KIND.safetensors and KIND.json beside it; returns the card's path."""
    folder = args.out or Path("runs") / args.kind
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / f"{args.kind}.safetensors"
    save_file({k: v.contiguous() for k, v in reader.state_dict().items()}, str(weights))
    arguments = {"resolution": args.resolution}
    arguments |= {"colors": reader.colors} if args.kind == "judge" else {"most": reader.most}
    command = f"ebmfast judge {args.kind} --seed {args.seed} --epochs {args.epochs}"
    card = {
        "name": args.kind, "kind": args.kind,
        "architecture": {"class": f"ebmfast.evaluation.{type(reader).__name__}", "arguments": arguments},
        "data_range": [-1.0, 1.0], "shape": [3, args.resolution, args.resolution],
        "data": f"clean renders: {data}", "seed": args.seed, "epochs": args.epochs,
        "command": command + ("" if args.resolution == 32 else f" --resolution {args.resolution}")
        + (f" --count {args.count}" if args.count else ""),
        "minutes": round(minutes, 1), "scores": scores, "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }
    path = weights.with_suffix(".json")
    path.write_text(json.dumps(card, indent=2) + "\n")
    return path
