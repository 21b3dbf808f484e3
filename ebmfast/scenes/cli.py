"""`ebmfast scenes`: render the scene data set."""
from __future__ import annotations

import argparse

from .dataset import TRAIN, SceneConfig, generate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ebmfast scenes`."""
    parser.add_argument("--root", default="data", help="folder that holds the cached data sets (default: data)")
    parser.add_argument("--count", type=int, default=TRAIN.count, help="pictures (default: 20000)")
    parser.add_argument("--resolution", type=int, default=TRAIN.resolution, help="pixels per side (default: 32)")
    parser.add_argument("--samples", type=int, default=TRAIN.samples, help="light paths per pixel (default: 25)")
    parser.add_argument("--seed", type=int, default=TRAIN.seed, help="0 is the training set, 1 the test set")
    parser.add_argument("--workers", type=int, default=None, help="processes (default: all cores)")


def run(args: argparse.Namespace) -> int:
    """Render what is missing and print the folder."""
    config = SceneConfig(count=args.count, resolution=args.resolution, samples=args.samples, seed=args.seed)
    print(generate(config, args.root, args.workers, progress=True))
    return 0
