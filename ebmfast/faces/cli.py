"""`ebmfast faces`: check CelebA's files, draw schematic faces in their layout, and compose trained face models."""
from __future__ import annotations

import argparse
from pathlib import Path

from .figure import NESTED

EXAMPLES = """examples:
  ebmfast faces draw data/faces --count 2000 --size 64      schematic faces, where CelebA is not at hand
  ebmfast faces check data/celeba                           read the attribute file, decode the pictures
  ebmfast train smiling --celeba data/faces --resolution 64
  ebmfast faces figure runs/smiling runs/male runs/old --out faces.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ebmfast faces`."""
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, EXAMPLES
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    draw = actions.add_parser("draw", help="draw schematic faces: smile, hair, glasses, age lines, beard")
    draw.add_argument("folder", type=Path, help="folder that receives img_align_celeba and list_attr_celeba.txt")
    draw.add_argument("--count", type=int, default=2000, help="faces (default: 2000)")
    draw.add_argument("--size", type=int, default=64, help="pixels per side (default: 64)")
    draw.add_argument("--seed", type=int, default=0)
    check = actions.add_parser("check", help="read CelebA's files and say what is in them")
    check.add_argument("folder", type=Path, help="folder of img_align_celeba (or its zip) and list_attr_celeba.txt")
    check.add_argument("--resolution", type=int, default=128, help="pixels per side (default: 128)")
    check.add_argument("--limit", type=int, default=None, help="decode the first so many pictures only")
    figure = actions.add_parser("figure", help="compose trained face models, one row of samples per expression")
    figure.add_argument("models", nargs="+", type=Path, metavar="DIR", help="folders that `ebmfast train` wrote")
    figure.add_argument("--expression", action="append", default=None, metavar="TEXT",
                        help=f"a row; may be repeated (default: those of {list(NESTED)} whose models are there)")
    figure.add_argument("--n", type=int, default=8, help="samples per row (default: 8)")
    figure.add_argument("--steps", type=int, default=100, help="steps of models without noise levels (default: 100)")
    figure.add_argument("--seed", type=int, default=0)
    figure.add_argument("--out", type=Path, default=Path("faces.png"), help="the picture (default: faces.png)")


def run(args: argparse.Namespace) -> int:
    """Draw, check, or compose."""
    return {"draw": _draw, "check": _check, "figure": _figure}[args.action](args)


def _draw(args) -> int:
    from .draw import write_faces

    print(write_faces(args.folder, args.count, args.size, args.seed))
    return 0


def _check(args) -> int:
    from .celeba import CONCEPTS, CelebA

    celeba = CelebA(args.folder)
    data = celeba.load(args.resolution, args.limit, progress=True)
    print(f"{celeba.source}: {len(data)} of {len(celeba)} pictures decoded at {args.resolution}x{args.resolution}")
    for name, (attribute, _) in CONCEPTS.items():
        if attribute in data.names:
            print(f"  {name:12} {float(data.has(name).float().mean()):.3f}")
    return 0


def _figure(args) -> int:
    from .figure import compose, load, write

    models = load(args.models)
    rows = compose(models, args.expression or _possible(models), args.n, args.steps, args.seed)
    write(rows, args.out)
    print(f"wrote {args.out}: {len(rows)} rows of {args.n}")
    return 0


def _possible(models) -> list[str]:
    from .figure import concepts_of

    rows = [text for text in NESTED if concepts_of(text) <= set(models)]
    if not rows:
        raise ValueError(f"no default expression is over {', '.join(models)} alone; give --expression")
    return rows
