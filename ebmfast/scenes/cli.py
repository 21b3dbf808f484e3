"""`ebmfast scenes`: render data sets of scenes; what exists is kept, what was interrupted goes on."""
from __future__ import annotations

import argparse
import json
from dataclasses import replace

from .dataset import SceneConfig, generate
from .sets import ABOUT, SETS, named


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ebmfast scenes`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "data sets:\n" + "\n".join(f"  {n:14} {SETS[n].count:6}  {about}" for n, about in ABOUT.items())
    parser.add_argument("names", nargs="*", metavar="NAME", help="data sets to render, or `all` (default: train)")
    parser.add_argument("--root", default="data", help="folder that holds the cached data sets (default: data)")
    parser.add_argument("--resolution", type=int, default=32,
                        help="pixels per side (default: 32); from 64 on with 20 colours, camera heights and tints")
    parser.add_argument("--count", type=int, default=None, help="pictures (default: the set's)")
    parser.add_argument("--samples", type=int, default=None, help="light paths per pixel (default: the set's, 25)")
    parser.add_argument("--seed", type=int, default=None, help="other pictures of the same kind (default: the set's)")
    parser.add_argument("--config", default=None, metavar="JSON", help="a set of your own: fields of ebmfast.scenes.SceneConfig")
    parser.add_argument("--workers", type=int, default=None, help="processes (default: all cores)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _configs(args: argparse.Namespace) -> list[SceneConfig]:
    if args.config is not None:
        if args.names:
            raise ValueError("give names or --config, not both")
        return [parse_config(args.config)]
    names = args.names or ["train"]
    return [named(name, args.resolution) for name in (list(SETS) if names == ["all"] else names)]


def parse_config(text: str) -> SceneConfig:
    """A configuration from JSON; ValueError names what is unknown."""
    given = json.loads(text)
    unknown = [k for k in given if k not in SceneConfig.__dataclass_fields__]
    if unknown:
        raise ValueError(f"--config has no field {unknown[0]!r}; there are {', '.join(SceneConfig.__dataclass_fields__)}")

    def frozen(value):  # JSON tells 1 from 1.0, digests should not
        return tuple(float(v) if type(v) is int else frozen(v) for v in value) if isinstance(value, list) else value

    return SceneConfig(**{k: frozen(v) for k, v in given.items()})


def run(args: argparse.Namespace) -> int:
    """Render what is missing and print the folders."""
    given = {f: getattr(args, f) for f in ("count", "samples", "seed") if getattr(args, f) is not None}
    if args.count is not None and args.count < 1:
        raise ValueError(f"`--count` must be 1 or more, got {args.count}")
    for config in _configs(args):
        print(generate(replace(config, **given), args.root, args.workers, progress=not args.quiet), flush=True)
    return 0
