"""`ebmfast evaluate`: the paper's experiments on our scenes. Each writes NAME.md, NAME.json and NAME.png.

Compositions of models are sampled and read by a judge that was trained on clean renders. Every table has more rows under the
same protocol: chance, real renders (needs a test set: `ebmfast scenes`), one model conditioned on everything, and models
trained by the paper's method; those that are missing say what would make them.
"""
from __future__ import annotations

import argparse
import json
import platform
from dataclasses import replace
from pathlib import Path

import torch

from .. import __version__, images, scenes, zoo
from . import position
from .observations import KEPT, observe
from .protocol import CHOSEN, TUNING_SEED, Models, Protocol, Scored, Settings, has_not
from .registry import EVERYWHERE, EXPERIMENTS, Experiment
from .report import Table
from .tree import Any, Count

KINDS = {"zoo": "the concepts of most tables", "objects": "a position model for several objects",
         "continual": "the stages of continual learning", "pairs": "shape and color, trained without some pairs",
         "paper": "concepts trained by contrastive divergence, as in the paper",
         "joint": "one model conditioned on everything (not bundled)",
         "twins": "the concepts again, trained without cross-entropy (not bundled)"}
INFERENCE = "inference"
NAMES = (*EXPERIMENTS, INFERENCE)
VARIATIONS = ("color", "light", "size", "type")
EXAMPLES = f"""\
names: {', '.join(NAMES)}
kinds of models, where nothing is said the bundled ones by default: {'; '.join(f'{k}, {v}' for k, v in KINDS.items())}
examples:
  ebmfast evaluate table1 or                                # with the bundled models
  ebmfast evaluate all -n 1000 --conditions 200 --out results
  ebmfast evaluate objects --models objects=runs/objects --counter runs/counter/counter.json
  ebmfast evaluate concepts --models zoo=scenes64           # the bundled position at 64x64
  ebmfast evaluate four -n 128 --conditions 64 --condition-seed 0   # while choosing settings"""


class LackingError(ValueError):
    """An experiment's models are not there."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ebmfast evaluate`."""
    parser.add_argument("names", nargs="+", metavar="NAME", help="experiments, or all of those whose models are there")
    parser.add_argument("-n", type=int, default=1000, help="samples of every composition (default: %(default)s)")
    parser.add_argument("--conditions", type=int, default=200, help="random conditions that they share (default: %(default)s)")
    parser.add_argument("--condition-seed", type=int, default=1,
                        help=f"draws the conditions (default: %(default)s; {TUNING_SEED} is for choosing settings)")
    parser.add_argument("--seed", type=int, default=0, help="of the chains (default: %(default)s)")
    parser.add_argument("--models", action="append", default=[], metavar="KIND=DIR",
                        help="a folder of models of one kind, or the name of a bundled group; see below")
    parser.add_argument("--judge", type=Path, metavar="JSON", help="the card of a judge (default: the bundled one)")
    parser.add_argument("--counter", type=Path, metavar="JSON", help="the card of a counter, for `objects`")
    parser.add_argument("--data", default="data", help="folder of rendered data sets (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the tables (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="chains per micro-batch (default: %(default)s)")
    parser.add_argument("--backend", default="auto", help="as in `ebmfast sample`")
    parser.add_argument("--bf16", action="store_true", help="evaluate the models in bfloat16; states and steps stay float32")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def run(args: argparse.Namespace) -> int:
    """Run experiments one after the other; each table is written as soon as it is done."""
    if args.threads:
        torch.set_num_threads(args.threads)
    images.check()  # before hours of sampling
    folders = _folders(args.models)
    everything = "all" in args.names
    names = NAMES if everything else args.names
    for name in names:
        if name not in NAMES:
            raise ValueError(f"no experiment {name!r}; there are {', '.join(NAMES)}, and all")
    for name in names:
        needed = "zoo" if name == INFERENCE else EXPERIMENTS[name].models
        if everything and _models(needed, folders) is None:
            print(f"{name}: left out, for there are no models: --models {needed}=DIR\n", flush=True)
            continue
        try:
            table = _inference(args, folders) if name == INFERENCE else _experiment(name, args, folders)
        except LackingError as lacking:
            if not everything:
                raise
            print(f"{name}: left out: {lacking}\n", flush=True)
            continue
        print(table.markdown())
        print("\n".join(f"wrote {p}" for p in table.write(args.out)), "\n", flush=True)
    return 0


def _folders(given: list[str]) -> dict[str, Path]:
    folders = {}
    for text in given:
        kind, sign, folder = text.partition("=")
        if not sign or kind not in KINDS:
            raise ValueError(f"`--models` must be KIND=DIR with KIND one of {', '.join(KINDS)}, got {text!r}")
        folders[kind] = zoo.located(folder)
    return folders


def _models(kind: str, folders: dict[str, Path]) -> Models | None:
    if kind in folders:
        return Models.load(folders[kind])
    bundled = Path(zoo.__file__).parent / kind
    if bundled.is_dir():
        return Models.load(bundled)
    models = Models.bundled()
    return models if kind == "zoo" or (kind == "pairs" and models.law.held_out) else None


def _reader(path: Path | None, kind: str, models: Models):
    """The network that reads samples, for pictures of the models' size."""
    bundled = [p for p in (zoo.folder(group) / f"{kind}.json" for group in (None, "scenes64")) if p.exists()]
    for found in [path] if path is not None else bundled:
        card = json.loads(found.read_text())
        if tuple(card["shape"]) == models.shape:
            return zoo.load(kind) if path is None and found.parent == zoo.folder() else zoo.load_from(found.parent, found.stem)
    if path is None:
        raise ValueError(
            f"no {kind} for pictures of {list(models.shape)} is bundled: pass --{kind} JSON; `ebmfast judge {kind}` trains one")
    raise ValueError(f"the {kind} reads pictures of {card['shape']}, the models make {list(models.shape)}: pass --{kind} JSON")


def _data(name: str, models: Models, root):
    """A set of clean renders at the models' size, or a sentence that says how to make it."""
    try:
        return scenes.load(scenes.named(name, models.shape[-1]), root)
    except (FileNotFoundError, ValueError) as missing:
        return str(missing)


def _protocol(args, models: Models, reader, real) -> Protocol:
    options = {"backend": args.backend} | ({"compute_dtype": torch.bfloat16} if args.bf16 else {})
    return Protocol(reader, models.law, args.n, args.conditions, args.condition_seed, args.seed,
                    None if isinstance(real, str) else real, args.batch_size, not args.quiet, options)


def _facts(args, models: Models) -> dict:
    size = f"{models.shape[-1]}x{models.shape[-2]} pixels, {models.law.colors} colours"
    facts = {"pictures": size, "samples": f"{args.n} of each composition under {args.conditions} random conditions",
             "condition seed": f"{args.condition_seed}{' (the one for tuning)' if args.condition_seed == TUNING_SEED else ''}",
             "seed": args.seed, "intervals": "95 %, bootstrap over conditions",
             "made with": f"ebmfast {__version__}, torch {torch.__version__}, {platform.machine()}"}
    if args.bf16:
        facts["precision"] = "models in bfloat16, states in float32"
    if models.hybrid:
        facts["models"] = "hybrid: trained with a cross-entropy term beside score matching"
    return facts


def _experiment(name: str, args, folders) -> Table:
    experiment = EXPERIMENTS[name]
    models = _models(experiment.models, folders)
    if models is None:
        raise ValueError(f"{name!r} needs models that are not bundled: --models {experiment.models}=DIR")
    lacking = {row.title: c for row in experiment.rows for c in row.tree.concepts if c not in models.families}
    rows = [row for row in experiment.rows if row.title not in lacking]
    if not rows:
        raise LackingError(f"{name!r} needs a model named {next(iter(lacking.values()))!r}; there are {', '.join(models.families)}")
    reader = _reader(args.counter if experiment.reader == "counter" else args.judge, experiment.reader, models)
    real = _data("objects-test" if experiment.reader == "counter" else "test", models, args.data)
    protocol = _protocol(args, models, reader, real)
    lines = [line for row in rows for line in _lines(row, experiment, models, folders, protocol, real)]
    lines += [Scored(title, models.method, {}, note=f"left out, there is no model named {c!r}") for title, c in lacking.items()]
    columns = dict.fromkeys(c for row in rows for c in row.columns)
    floors = [(row.title, column, *floor) for row in rows for column, floor in (row.floors | EVERYWHERE).items()]
    return Table(name, experiment.title, (*columns, "object present", "free attributes", "kernel distance"), lines,
                 _facts(args, models), floors, experiment.paper, experiment.note, ours=models.method)


def _lines(row, experiment: Experiment, models: Models, folders, protocol: Protocol, real) -> list[Scored]:
    """Our samples, those of twins of hybrid models trained without cross-entropy, and the four rows beside them."""
    lines = [protocol.sampled(row, models)]
    if has_not(row.tree) and not isinstance(row.tree, Any):
        settings = replace(CHOSEN.get(row.title, Settings()), odds=None)
        lines.append(protocol.sampled(row, models, settings, f"{models.method}, divided by p^alpha"))
    if models.hybrid and experiment.models == "zoo":
        twins = _models("twins", folders)
        if twins is not None and all(c in twins.families for c in row.tree.concepts):
            lines.append(protocol.sampled(row, twins))
        else:
            lines.append(Scored(row.title, "without cross-entropy", {}, note="not trained: --models twins=DIR"))
    lines.append(protocol.chance(row))
    counted = any(isinstance(node, Count) for node in row.columns.values())
    lines.append(Scored(row.title, "real renders", {}, note=real) if isinstance(real, str) else protocol.renders(row))
    joint = None if counted else _models("joint", folders)
    if joint is not None and "joint" in joint.families:
        lines.append(protocol.joint(row, joint))
        if joint.law.held_out and not models.law.held_out:
            lines[-1].note = "trained without some pairs of shape and color, which the labels here may ask for"
    else:
        why = "one model has no such condition" if counted else "not trained: --models joint=DIR"
        lines.append(Scored(row.title, "one joint model", {}, note=why))
    paper = _models("paper", folders)
    if paper is not None and all(c in paper.families for c in row.tree.concepts) and paper.shape == models.shape:
        lines.append(protocol.sampled(row, paper, Settings()))  # what was chosen was chosen for our models
    else:
        lines.append(Scored(row.title, "contrastive divergence", {}, note="not trained: --models paper=DIR"))
    return lines


def _inference(args, folders) -> Table:
    models = _models("zoo", folders)
    if "position" not in models.families:
        raise LackingError(f"{INFERENCE!r} needs a model named 'position'; there are {', '.join(models.families)}")
    reader = _reader(args.judge, "judge", models)
    found = {"test": _data("test", models, args.data)} | {v: _data(f"vary-{v}", models, args.data) for v in VARIATIONS}
    sets = {name: data for name, data in found.items() if not isinstance(data, str)}
    protocol = _protocol(args, models, reader, None)
    lines = position.by_kind(sets, models, protocol) if sets else []
    count, most = min(args.conditions, 100), max(position.OBSERVATIONS)
    try:
        for same in KEPT:
            pictures, truth = observe(count, most, same, models.shape[-1], args.data)
            lines += position.by_observations(pictures, truth, models, protocol, f"one {same}")
    except ImportError as missing:
        lines.append(Scored("several observations", models.method, {}, note=str(missing)))
    lines.append(Scored("one observation", "one joint model", {}, note="it has no energy of a position alone"))
    paper = _models("paper", folders)
    if paper is not None and sets and "position" in paper.families and paper.shape == models.shape:
        lines += [line for line in position.by_kind(sets, paper, protocol) if line.by.startswith(paper.method)]
    else:
        lines.append(Scored("one observation", "contrastive divergence", {}, note="not trained: --models paper=DIR"))
    twins = _models("twins", folders)
    if twins is not None and sets and "position" in twins.families:
        lines += [line for line in position.by_kind(sets, twins, protocol) if line.by.startswith(twins.method)]
    absent = [f"{name}: {text}" for name, text in found.items() if isinstance(text, str)]
    note = ("Observations of one object differ in their surroundings; those of one position also in what stands there."
            + "".join(f" Left out, {a}." for a in absent))
    best = next((line for line in lines if line.row == f"{most} observations of one object"), None)
    floors = [] if best is None else [(best.row, "test", "<=", 2.0)]
    facts = _facts(args, models) | {
        "samples": f"{min(args.n, position.MOST)} renders of each kind, {count} scenes of {most} observations"}
    return Table(INFERENCE, "Table 3: position by concept inference", ("test", *VARIATIONS, "avg"), lines, facts, floors,
                 position.PAPER, note, position.UNIT, f"{models.method}, {position.WAYS[-1]}")
