"""`ebmfast generate`: large data sets of composed samples that survive interruption, crashes and full disks."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

EPILOG = """\
examples:
  ebmfast generate PLAN.toml --dry-run              what it will cost; nothing is written
  ebmfast generate PLAN.toml --preview sheet.png    a few samples of every composition
  ebmfast generate PLAN.toml --out DIR              make it; the same command resumes
  ebmfast generate --out DIR --status               from another terminal
  ebmfast generate --out DIR --verify               hash every file, make shards again and compare
  torchrun --nproc-per-node 4 -m ebmfast generate PLAN.toml --out DIR
  srun -n 64 ebmfast generate PLAN.toml --out /shared/DIR
  ebmfast generate PLAN.toml --out DIR --engine ray
PLAN.toml: `--example` prints one; `--schema` prints the JSON schema; docs/datasets.md explains every key."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ebmfast generate`."""
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, EPILOG
    parser.add_argument("plan", nargs="?", type=Path, help="a plan in TOML; for an existing data set it may be left out")
    parser.add_argument("--out", metavar="DIR", help="a folder, or an fsspec URL such as s3://bucket/name")
    parser.add_argument("--engine", default="auto", choices=("auto", "local", "torchrun", "ray"), help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, help="processes, or Ray tasks at once (default: one per GPU, or per core)")
    parser.add_argument("--rank", type=int, help="of the torchrun engine, where the environment does not say")
    parser.add_argument("--world-size", type=int)
    parser.add_argument("--retries", type=int, default=3, help="for shards of workers that die (default: %(default)s)")
    parser.add_argument("--full-check", action="store_true", help="on resume, hash every committed file, not only what changed")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="time, disk and machine that the plan needs, from measured steps")
    what.add_argument("--status", action="store_true", help="how far a data set is; with --json for programs")
    what.add_argument("--verify", nargs="?", const="all", metavar="K",
                      help="check a data set; make K shards again (default: all; 0: hashes only)")
    what.add_argument("--preview", type=Path, metavar="PNG", help="write a contact sheet")
    what.add_argument("--schema", action="store_true", help="print the JSON schema of plans")
    what.add_argument("--example", action="store_true", help="print the bundled example plan")
    parser.add_argument("--json", action="store_true", help="with --status: JSON")


def run(args: argparse.Namespace) -> int:
    """Do what the arguments say."""
    if args.example:
        print(example().read_text(), end="")
        return 0
    if args.schema:
        from .spec import schema
        print(json.dumps(schema(), indent=2))
        return 0
    if args.plan is None and args.out is None:
        raise ValueError("`ebmfast generate` needs a plan, or --out with an existing data set; --example prints a plan")
    if args.plan is not None and str(args.plan) == "example":
        args.plan = example()
    if args.status or args.verify is not None:
        return _look(args)
    if args.dry_run or args.preview is not None:
        return _try(args)
    if args.out is None:
        raise ValueError("--out is missing: a folder, or an fsspec URL")
    return _make(args)


def example() -> Path:
    """The bundled example plan; `ebmfast generate example --out DIR` runs it."""
    return Path(__file__).parent / "example.toml"


def _plan(args):
    from . import plan as plans
    from . import session
    from . import store as stores
    return plans.load(args.plan) if args.plan is not None else plans.again(session.saved_plan(stores.at(args.out)))


def _look(args) -> int:
    from . import status, verify
    from . import store as stores
    if args.out is None:
        raise ValueError("--out is missing: which data set?")
    store = stores.at(args.out)
    if args.status:
        print(json.dumps(status.describe(store)) if args.json else status.report(store))
        return 0
    if args.verify != "all" and not args.verify.isdigit():
        raise ValueError(f"--verify takes a number of shards, or nothing for all, got {args.verify!r}")
    found = verify.verify(store, None if args.plan is None else _plan(args), None if args.verify == "all" else int(args.verify))
    print(found)
    return 0 if found.ok else 1


def _try(args) -> int:
    plan = _plan(args)
    if args.dry_run:
        from . import estimate
        print(estimate.report(plan, args.workers))
        return 0
    from .. import images
    from . import preview
    images.save(preview.draw(plan), args.preview, {"plan": plan.source})
    print(f"wrote {args.preview}")
    return 0


def _make(args) -> int:
    from . import generate
    from .engines.local import WorkerDied
    from .lock import LockedError
    from .session import Stopped

    show = not args.quiet and sys.stderr.isatty()
    try:
        complete = generate(
            args.plan, args.out, engine=args.engine, workers=args.workers, rank=args.rank, world_size=args.world_size,
            retries=args.retries, full_check=args.full_check, progress=show)
    except (LockedError, WorkerDied) as error:
        print(f"ebmfast generate: error: {error}", file=sys.stderr)
        return 1
    except Stopped as stop:
        print(f"\nebmfast generate: {stop}", file=sys.stderr)
        return 128 + stop.signal
    print(f"{args.out} is complete" if complete else f"this rank's shards of {args.out} are done")
    return 0
