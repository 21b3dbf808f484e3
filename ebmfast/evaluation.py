"""Composition accuracy of scene samples: draw them, let a judge trained on clean renders name what is in them."""
from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POSITION_TOLERANCE = 0.4
SIZE_TOLERANCE = 0.06


class Judge(nn.Module):
    """Reads a picture [B, 3, 32, 32] in [-1, 1]: is there an object, where, how large, which shape and colour."""

    def __init__(self, width: int = 32, shapes: int = 3, colors: int = 6):
        super().__init__()
        w = width
        self.shapes, self.colors = shapes, colors
        self.body = nn.Sequential(
            nn.Conv2d(5, w, 3, stride=2, padding=1), nn.SiLU(), nn.Conv2d(w, w, 3, padding=1), nn.SiLU(),
            nn.Conv2d(w, 2 * w, 3, stride=2, padding=1), nn.SiLU(), nn.Conv2d(2 * w, 2 * w, 3, padding=1), nn.SiLU(),
            nn.Conv2d(2 * w, 3 * w, 3, stride=2, padding=1), nn.SiLU(), nn.Flatten(),
            nn.Linear(3 * w * 16, 192), nn.SiLU(),
        )
        self.head = nn.Linear(192, 4 + shapes + colors)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Presence logit [B], position [B, 2], size [B], logits of shape [B, S] and colour [B, K]."""
        grid = (torch.arange(x.shape[-1], dtype=x.dtype, device=x.device) + 0.5) * (2.0 / x.shape[-1]) - 1.0
        v, u = torch.meshgrid(grid, grid, indexing="ij")
        maps = torch.stack([u, v]).expand(len(x), -1, -1, -1)
        y = self.head(self.body(torch.cat([x, maps], dim=1)))
        return {
            "present": y[:, 0], "position": y[:, 1:3], "size": 0.55 + 0.15 * y[:, 3],
            "shape": y[:, 4:4 + self.shapes], "color": y[:, 4 + self.shapes:],
        }

    @torch.no_grad()
    def read(self, x: Tensor, batch: int = 250) -> dict[str, Tensor]:
        """Decisions for [N, 3, 32, 32]: present bool, position, size, and the indices of shape and colour."""
        outs = [self(part) for part in x.split(batch)]
        y = {k: torch.cat([o[k] for o in outs]) for k in outs[0]}
        return {"present": y["present"] > 0, "position": y["position"], "size": y["size"],
                "shape": y["shape"].argmax(1), "color": y["color"].argmax(1)}


def train_judge(data, epochs: int = 16, batch: int = 64, learning_rate: float = 2e-3, seed: int = 0,
                progress: bool = False) -> Judge:
    """Fit a judge to clean renders, empty floors among them: cross-entropies plus squared errors, Adam, cosine."""
    from tqdm import tqdm

    torch.manual_seed(seed)
    judge = Judge()
    optimizer = torch.optim.Adam(judge.parameters(), lr=learning_rate)
    total = epochs * (len(data) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=total, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    bar = tqdm(total=total, disable=not progress, mininterval=2)
    for _ in range(epochs):
        order = torch.randperm(len(data), generator=generator)
        for index in order[: len(data) // batch * batch].split(batch):
            optimizer.zero_grad(set_to_none=True)
            loss = _judge_loss(judge, data[index])
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update(1)
    bar.close()
    return judge.eval()


def _judge_loss(judge: Judge, part) -> Tensor:
    y = judge(part.pixels())
    here = part.shape >= 0
    loss = F.binary_cross_entropy_with_logits(y["present"], here.float())
    loss = loss + F.cross_entropy(y["shape"][here], part.shape[here])
    loss = loss + F.cross_entropy(y["color"][here], part.color[here])
    loss = loss + 4.0 * F.mse_loss(y["position"][here], part.position[here])
    return loss + 4.0 * F.mse_loss((y["size"][here] - 0.55) / 0.15, (part.size[here] - 0.55) / 0.15)


def judge_scores(judge: Judge, data) -> dict[str, float]:
    """Accuracy of the judge on clean renders: what every figure below is limited by."""
    seen = judge.read(data.pixels())
    here = data.shape >= 0
    rows = {k: v[here] for k, v in seen.items()}
    return {
        "present": float((seen["present"] == here).float().mean()),
        "position": float(near(rows["position"], data.position[here]).float().mean()),
        "position_error": float((rows["position"] - data.position[here]).abs().mean()),
        "size": float(((rows["size"] - data.size[here]).abs() <= SIZE_TOLERANCE).float().mean()),
        "size_error": float((rows["size"] - data.size[here]).abs().mean()),
        "shape": float((rows["shape"] == data.shape[here]).float().mean()),
        "color": float((rows["color"] == data.color[here]).float().mean()),
    }


def near(position: Tensor, wanted: Tensor, tolerance: float = POSITION_TOLERANCE) -> Tensor:
    """Whether both coordinates are within the tolerance: [N, 2], [N, 2] -> bool [N] (the paper's 0.4)."""
    return ((position - wanted).abs() <= tolerance).all(dim=1)


def draw_conditions(n: int, seed: int) -> dict[str, Tensor]:
    """Random conditions, one row per chain: positions "p" and "q" apart by more than 0.8 in some coordinate, colours
    "c", shapes "f" (one-hot), sizes "s" in natural units."""
    from .scenes.render import COLORS, SHAPES, SIZE_RANGE

    g = torch.Generator().manual_seed(seed)
    p = torch.rand(n, 2, generator=g) * 2 - 1
    q = torch.rand(n, 2, generator=g) * 2 - 1
    while (close := near(p, q, 2 * POSITION_TOLERANCE)).any():
        q[close] = torch.rand(int(close.sum()), 2, generator=g) * 2 - 1
    color = torch.randint(len(COLORS), (n,), generator=g)
    shape = torch.randint(len(SHAPES), (n,), generator=g)
    low, high = SIZE_RANGE
    size = low + (high - low) * torch.rand(n, 1, generator=g)
    return {"p": p, "q": q, "c": F.one_hot(color, len(COLORS)).float(), "f": F.one_hot(shape, len(SHAPES)).float(),
            "s": size}


def marks(seen: dict[str, Tensor], rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """What holds in each sample, bool [N]: every name is false where no object is seen."""
    here = seen["present"]
    return {
        "present": here,
        "position": here & near(seen["position"], rows["p"]),
        "position2": here & near(seen["position"], rows["q"]),
        "color": here & (seen["color"] == rows["c"].argmax(1)),
        "shape": here & (seen["shape"] == rows["f"].argmax(1)),
        "size": here & ((seen["size"] - rows["s"][:, 0]).abs() <= SIZE_TOLERANCE),
    }


@dataclass(frozen=True)
class Task:
    """One line of the table: which concepts, how they are composed, and which marks make a sample right.

    `terms` are (concept, slot, weight name): "keep" leaves take weight `Settings.weight`, "drop" leaves
    -`Settings.alpha`. `either` composes the terms by OR. `right` marks must all hold; the `report` marks are printed.
    """

    terms: tuple[tuple[str, str, str], ...]
    report: tuple[str, ...]
    either: bool = False


TASKS = {
    "present": Task((("position", "p", "keep"),), ("present", "position")),
    "position": Task((("position", "p", "keep"),), ("position",)),
    "color": Task((("color", "c", "keep"),), ("color",)),
    "shape": Task((("shape", "f", "keep"),), ("shape",)),
    "size": Task((("size", "s", "keep"),), ("size",)),
    "position AND color": Task((("position", "p", "keep"), ("color", "c", "keep")), ("position", "color")),
    "position1 OR position2": Task(
        (("position", "p", "keep"), ("position", "q", "keep")), ("position", "position2"), either=True),
    "position AND NOT color": Task((("position", "p", "keep"), ("color", "c", "drop")), ("position", "color")),
    "shape AND color AND position": Task(
        (("shape", "f", "keep"), ("color", "c", "keep"), ("position", "p", "keep")), ("shape", "color", "position")),
    "shape AND color AND position AND size": Task(
        (("shape", "f", "keep"), ("color", "c", "keep"), ("position", "p", "keep"), ("size", "s", "keep")),
        ("shape", "color", "position", "size")),
}


@dataclass(frozen=True)
class Settings:
    """What is chosen on other conditions than those reported: weights, priors, schedule.

    weights: weight of each concept's conditional energy against its prior (1 is Bayes' rule; above sharpens).
    alpha: weight of a negated concept, at noise levels above `alpha_above`.
    prior_above: each model's own prior is taken out at noise levels above this one only.
    """

    weights: tuple[tuple[str, float], ...] = ()
    alpha: float = 0.6
    alpha_above: float = 0.5
    prior_above: float = 0.15
    sigma_max: float = 4.0
    sigma_min: float = 0.06
    levels: int = 16
    steps_per_level: int = 6
    drift: float = 0.3

    def sampler(self):
        """The `Annealed` sampler of these settings."""
        from .samplers import Annealed

        return Annealed.geometric(self.sigma_max, self.sigma_min, self.levels, steps_per_level=self.steps_per_level,
                                  drift=self.drift)


def expression(task: Task, settings: Settings, families: dict):
    """The composition of a task through the public algebra, conditions left as slots."""
    from . import composition as algebra
    from .weights import AboveSigma
    from .zoo import own_priors

    leaves, weights = [], []
    for concept, slot, role in task.terms:
        leaves.append(families[concept][algebra.Slot(slot)])
        alpha = AboveSigma(settings.alpha_above, settings.alpha) if settings.alpha_above else settings.alpha
        weights.append(-1.0 * alpha if role == "drop" else dict(settings.weights).get(concept, 1.0))
    if task.either:
        return algebra.any_of(leaves)
    return own_priors(algebra.all_of(leaves, weights), settings.prior_above)


def evaluate(task: Task, settings: Settings, families: dict, judge: Judge, n: int, condition_seed: int, seed: int,
             batch_size: int = 64, progress: bool = False, **options) -> tuple[dict[str, float], Tensor]:
    """Draw `n` samples, one random condition each, and count what the judge sees; `options` are those of `sample`.

    Returns the fractions of `task.report`, "all" and "present", with "either" for an OR; and the samples.
    """
    from .sampling import sample

    rows = draw_conditions(n, condition_seed)
    expr = expression(task, settings, families)
    used = {slot: rows[slot] for slot in {slot for _, slot, _ in task.terms}}
    start = time.perf_counter()
    result = sample(expr, n=n, shape=(3, 32, 32), sampler=settings.sampler(), conditions=used, seed=seed,
                    batch_size=batch_size, energies=False, progress=progress, **options)
    seconds = time.perf_counter() - start
    return tally(task, judge.read(result.x), rows) | {"seconds": round(seconds, 1)}, result.x


def tally(task: Task, seen: dict[str, Tensor], rows: dict[str, Tensor]) -> dict[str, float]:
    """Fractions of the samples in which the task's marks hold."""
    held = marks(seen, rows)
    report = {name: float(held[name].float().mean()) for name in task.report}
    stack = torch.stack([held[name] for name in task.report])
    report["either" if task.either else "all"] = float((stack.any(0) if task.either else stack.all(0)).float().mean())
    report["present"] = float(held["present"].float().mean())
    return report


def save_grid(x: Tensor, path: str | Path, columns: int = 16, scale: int = 3) -> None:
    """Write samples [N, 3, H, W] in [-1, 1] as one PNG; needs Pillow."""
    from PIL import Image

    count = len(x) // columns * columns
    pixels = ((x[:count].clamp(-1, 1) + 1) * 127.5).round().byte()
    rows, (channels, height, width) = count // columns, x.shape[1:]
    tiles = pixels.view(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    image = Image.fromarray(tiles.reshape(rows * height, columns * width, channels).numpy())
    image.resize((columns * width * scale, rows * height * scale), 0).save(path)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ebmfast evaluate`."""
    parser.add_argument("tasks", nargs="*", help=f"default: all of {', '.join(map(repr, TASKS))}")
    parser.add_argument("-n", type=int, default=1000, help="samples per task, one random condition each")
    parser.add_argument("--condition-seed", type=int, default=1, help="draws the conditions (0 was used for tuning)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the chains")
    parser.add_argument("--out", default=None, help="append results to this JSONL file")
    parser.add_argument("--pictures", default=None, help="folder for PNG grids of samples")
    parser.add_argument("--threads", type=int, default=None, help="torch threads")


def run(args: argparse.Namespace) -> int:
    """Print composition accuracies of the zoo, judged by its judge."""
    from . import zoo

    if args.threads:
        torch.set_num_threads(args.threads)
    unknown = [t for t in args.tasks if t not in TASKS]
    if unknown:
        raise SystemExit(f"no task {unknown[0]!r}; there are {', '.join(map(repr, TASKS))}")
    families, judge = zoo.concepts(), zoo.load("judge")
    for name in args.tasks or TASKS:
        scores, x = evaluate(TASKS[name], CHOSEN.get(name, Settings()), families, judge, args.n,
                             args.condition_seed, args.seed)
        print(f"{name:40}", "  ".join(f"{k} {v:.3f}" for k, v in scores.items()), flush=True)
        if args.out:
            line = {"task": name, "n": args.n, "condition_seed": args.condition_seed, "seed": args.seed, **scores}
            with open(args.out, "a") as file:
                file.write(json.dumps(line) + "\n")
        if args.pictures:
            Path(args.pictures).mkdir(parents=True, exist_ok=True)
            save_grid(x[:128], Path(args.pictures) / f"{name.replace(' ', '_')}.png")
    return 0


CHOSEN: dict[str, Settings] = {}
