"""The command line: `ebmfast sample | generate | demo | infer | train | evaluate | ...`; `ebmfast --help` has them all."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
import warnings
from pathlib import Path

from . import __version__, images, sampling, zoo
from .backends import NAMES, BackendUnavailableError
from .composition import IF_MEANT, UngroundedNegationError
from .expressions import parse
from .samplers import Annealed, Langevin

DEMO = (
    ("one concept", "position(-0.5, 0.5)"),
    ("AND", "shape('cube') & color('red')"),
    ("AND of three", "shape('cylinder') & color('blue') & position(0.5, 0.4)"),
    ("OR", "position(-0.6, -0.4) | position(0.6, 0.4)"),
    ("NOT", "position(0, 0) & ~color('red')"),
    ("nested", "(shape('cube') & color('green')) | (shape('sphere') & color('yellow'))"),
)


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status (2 for wrong arguments, 1 for what failed)."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    from safetensors import SafetensorError

    from .generate.engines.local import WorkerDied
    from .generate.lock import LockedError
    from .training.loop import DivergenceError

    ours = (BackendUnavailableError, SafetensorError, LockedError, WorkerDied, DivergenceError)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            return args.run(args)
    except KeyboardInterrupt as stop:
        print(f"\nebmfast: {stop or 'interrupted'}", file=sys.stderr)
        return 130
    except (ValueError, TypeError, ImportError, OSError, ArithmeticError, *ours) as error:
        print(f"ebmfast {args.command}: error: {error}", file=sys.stderr)
        return 2


def _warn(message, *_) -> None:
    print(f"ebmfast: warning: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ebmfast", description="Sample compositions of energy-based models: AND, OR, NOT, nested at will.",
        epilog="ebmfast COMMAND --help has examples. `ebmfast doctor` checks the installation.")
    parser.add_argument("--version", action="version", version=f"ebmfast {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    _add_sample(commands)
    _add_lazy(commands, "generate", "large data sets of composed samples, resumable", "generate.cli")
    _add_demo(commands)
    _add_models(commands)
    _add_lazy(commands, "infer", "which concepts explain a picture", "inference_cli")
    _add_lazy(commands, "train", "train a model on rendered scenes or on faces", "training.cli")
    _add_lazy(commands, "scenes", "render data sets of scenes (needs Mitsuba 3)", "scenes.cli")
    _add_lazy(commands, "faces", "CelebA's files, schematic faces in their layout, composed faces", "faces.cli")
    _add_lazy(commands, "evaluate", "the paper's experiments: tables and pictures, by a judge", "experiments.cli")
    _add_lazy(commands, "judge", "train the network that reads samples in `evaluate`", "experiments.judge_cli")
    _add_lazy(commands, "bench", "this machine's own table against the libraries installed here", "benchmark.quick")
    doctor = commands.add_parser("doctor", help="versions, backends, and checks that run the kernels")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_lazy(commands, name: str, about: str, module: str) -> None:
    from importlib import import_module
    part = import_module(f"ebmfast.{module}")
    parser = commands.add_parser(name, help=about, description=part.__doc__, epilog=getattr(part, "EXAMPLES", None),
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    part.add_arguments(parser)
    parser.set_defaults(run=part.run)


def _add_sample(commands) -> None:
    parser = commands.add_parser(
        "sample", help="sample an expression and write a picture", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Sample a composition of trained concepts.", epilog="""\
the expression is Python syntax over the names that `ebmfast models` lists:
  a & b          conjunction          E_a + E_b
  a | b          disjunction          -logsumexp(-E_a, -E_b)
  ~b             negation             -alpha E_b (alpha from the model's card; negate(b, alpha=0.2) sets it)
  2.0 * a        weight
  any_of([a, b], log_weights=[0.5, 0]), all_of([a, b], weights=[1, 2]), with_prior(a & b, color.unconditional)
examples:
  ebmfast sample "shape('cube') & color('red') & ~position(0.5, 0.5)" --n 16 --seed 0 --out grid.png
  ebmfast sample "position(-0.6, 0) | position(0.6, 0)" --n 1000 --out samples.safetensors""")
    parser.add_argument("expression", help="for instance \"shape('cube') & color('red')\"")
    parser.add_argument("--n", type=int, default=16, help="samples (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the noise; same seed, same samples (default: %(default)s)")
    parser.add_argument("--first-chain", type=int, default=0, help="id of the first sample, for shards (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("grid.png"),
                        help=".png for a grid, .safetensors for x, energies and leaf energies (default: %(default)s)")
    parser.add_argument("--models", type=Path, action="append", default=[], metavar="DIR",
                        help="a folder with NAME.json and NAME.safetensors from `ebmfast train`, or a bundled group, as scenes64;"
                             " may be repeated")
    parser.add_argument("--backend", default="auto", help=f"{', '.join(NAMES)} or auto (default: %(default)s)")
    parser.add_argument("--steps-per-level", type=int, help="Langevin steps per noise level (default: the card's)")
    parser.add_argument("--levels", type=int, help="noise levels (default: the card's)")
    parser.add_argument("--drift", type=float, help="step size as a fraction of sigma^2 (default: the card's)")
    parser.add_argument("--no-prior", action="store_true", help="a plain sum: the prior is counted once per conjunct")
    parser.add_argument("--batch-size", type=int, help="samples per micro-batch (default: chosen)")
    parser.add_argument("--columns", type=int, default=8, help="pictures per row (default: %(default)s)")
    parser.add_argument("--scale", type=int, default=3, help="screen pixels per image pixel (default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no plan, no progress bar")
    parser.set_defaults(run=_sample)


def models_of(folders):
    """All families by name, and their cards: the zoo's, then those of `folders`."""
    families, cards = dict(zoo.concepts()), {name: zoo.card(name) for name in zoo.names()}
    for folder in folders:
        folder = zoo.located(folder)
        for name, about in zoo.cards_in(folder).items():
            families[about["name"]] = zoo.family(about, zoo.load_from(folder, name))
            cards[about["name"]] = about
    return families, cards


def _sampler(base, args):
    if isinstance(base, Langevin):
        if any(value is not None for value in (args.levels, args.steps_per_level, args.drift)):
            raise ValueError("`--levels`, `--steps-per-level` and `--drift` are for models with noise levels; these have none")
        return base

    def given(value, default):
        return default if value is None else value

    return Annealed.geometric(base.sigmas[0], base.sigmas[-1], given(args.levels, len(base.sigmas)), denoise=base.denoise,
                              steps_per_level=given(args.steps_per_level, base.steps_per_level),
                              drift=given(args.drift, base.drift))


def _sample(args) -> int:
    if args.out.suffix not in (".png", ".safetensors"):
        raise ValueError(f"`--out` must end in .png or .safetensors, got {args.out}")
    for name in ("columns", "scale"):
        if getattr(args, name) < 1:
            raise ValueError(f"`--{name}` must be 1 or more, got {getattr(args, name)}")
    if args.out.suffix == ".png":
        images.check()  # before an hour of sampling
    families, cards = models_of(args.models)
    written = parse(args.expression, families)
    expression, base = zoo.recommended(written, cards)
    expression = written if args.no_prior else expression
    try:
        expression.check_grounded(base.noise_levels())
    except UngroundedNegationError as error:
        raise ValueError(_in_the_words_of(written, error)) from None
    about = cards[next(leaf.family.name for leaf in expression.leaves if leaf.family is not None)]
    run = sampling.prepare(expression, _sampler(base, args), shape=tuple(about["shape"]), backend=args.backend,
                           steps=zoo.chain_length(expression, cards), batch_size=args.batch_size)
    if not args.quiet:
        print(run.explain())
    result = run(args.n, args.seed, first_chain=args.first_chain, progress=not args.quiet and sys.stderr.isatty())
    metadata = {"expression": repr(written), "sampled": repr(expression), "seed": str(args.seed),
                "first_chain": str(args.first_chain), "sampler": json.dumps(dataclasses.asdict(run.sampler)),
                "ebmfast": result.report.versions["ebmfast"]}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.out.suffix == ".png":
        rows = [result.x[i:i + args.columns] for i in range(0, len(result.x), args.columns)]
        if not rows:
            raise ValueError("`--n` is 0: there is nothing to draw; a .safetensors file may be empty")
        images.save(images.grid(rows, data_range=run.plan.data_range or (0, 1), scale=args.scale), args.out, metadata)
    else:
        from safetensors.torch import save_file
        save_file({"x": result.x, "energy": result.energy, "leaf_energies": result.leaf_energies}, args.out, metadata)
    print(result.report)
    print(f"wrote {args.out}")
    return 0


def _in_the_words_of(written, error: UngroundedNegationError) -> str:
    """What is wrong with an expression, said of it as it was written and without what only Python has."""
    try:
        written.check_grounded()
    except UngroundedNegationError as plainer:
        error = plainer
    return str(error).removesuffix(IF_MEANT)


def _add_demo(commands) -> None:
    parser = commands.add_parser(
        "demo", help="a grid of composed samples from the bundled models",
        description="One row of samples for each way to compose, drawn from the bundled models by the compiled kernels.")
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="the picture (default: %(default)s)")
    parser.add_argument("--n", type=int, default=8, help="samples per row (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="cpu", help="(default: %(default)s)")
    parser.set_defaults(run=_demo)


def _demo(args) -> int:
    images.check()
    families, rows, titles = zoo.concepts(), [], []
    started = time.perf_counter()
    for title, text in DEMO:
        expression, sampler = zoo.recommended(parse(text, families))
        result = sampling.sample(expression, args.n, (3, 32, 32), sampler, seed=args.seed, backend=args.backend)
        print(f"{title:14s}{text}\n{'':14s}{result.report}", flush=True)
        rows.append(result.x)
        titles.append(f"{title}:  {text}")
    metadata = {"expressions": "\n".join(text for _, text in DEMO), "seed": str(args.seed)}
    images.save(images.grid(rows, titles, data_range=(-1, 1)), args.out, metadata)
    print(f"wrote {args.out}: {len(DEMO)} rows of {args.n} in {time.perf_counter() - started:.0f} s")
    return 0


def _add_models(commands) -> None:
    parser = commands.add_parser("models", help="the concepts that expressions can name")
    parser.add_argument("--models", type=Path, action="append", default=[], metavar="DIR", help="as in `ebmfast sample`")
    parser.set_defaults(run=_list_models)


def _list_models(args) -> int:
    families, cards = models_of(args.models)
    for name, family in families.items():
        about = cards[name]
        labels = ", ".join(f"{name}({label!r})" for label in family.labels)
        ranges = ", ".join(f"{low:g} to {high:g}" for low, high in about.get("ranges", []))
        print(f"{name}: {labels or f'{family.condition_dim} number(s), {ranges}'}")
        print(f"  trained by `{about['command']}`; alpha of ~{name}(...) is {about['negation_alpha']}")
    return 0


def _doctor(args) -> int:
    from . import doctor
    return doctor.run(sys.stdout)


if __name__ == "__main__":
    sys.exit(main())
