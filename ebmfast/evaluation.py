"""Networks that read pictures: a judge names what one object is, a counter says how many there are.

Both are trained on clean renders only; `ebmfast.experiments` scores samples with them.
"""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import images

POSITION_TOLERANCE = 0.4
SIZE_TOLERANCE = 0.06


FEATURES = 192


def _body(width: int, resolution: int) -> nn.Sequential:
    """Convolutions down to 4x4, with coordinates beside the colours, and one hidden layer: [B, 5, R, R] -> [B, 192]."""
    if resolution < 8 or resolution & (resolution - 1):
        raise ValueError(f"`resolution` must be a power of 2, at least 8, got {resolution}")
    w = width
    layers = [nn.Conv2d(5, w, 3, stride=2, padding=1), nn.SiLU(), nn.Conv2d(w, w, 3, padding=1), nn.SiLU(),
              nn.Conv2d(w, 2 * w, 3, stride=2, padding=1), nn.SiLU(), nn.Conv2d(2 * w, 2 * w, 3, padding=1), nn.SiLU(),
              nn.Conv2d(2 * w, 3 * w, 3, stride=2, padding=1), nn.SiLU()]
    side = resolution // 8
    while side > 4:
        layers += [nn.Conv2d(3 * w, 3 * w, 3, stride=2, padding=1), nn.SiLU()]
        side //= 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(3 * w * side * side, FEATURES), nn.SiLU())


def _with_coordinates(x: Tensor) -> Tensor:
    grid = (torch.arange(x.shape[-1], dtype=x.dtype, device=x.device) + 0.5) * (2.0 / x.shape[-1]) - 1.0
    v, u = torch.meshgrid(grid, grid, indexing="ij")
    return torch.cat([x, torch.stack([u, v]).expand(len(x), -1, -1, -1)], dim=1)


class Reader(nn.Module):
    """What the judge and the counter have in common: features of pictures, [B, 3, R, R] in [-1, 1] -> [B, 192]."""

    body: nn.Sequential

    @torch.no_grad()
    def features(self, x: Tensor, batch: int = 250) -> Tensor:
        """The last hidden layer, [N, 192], in which distances between sets of pictures are taken."""
        return torch.cat([self.body(_with_coordinates(part)) for part in x.split(batch)]) if len(x) else x.new_zeros(0, FEATURES)

    @torch.no_grad()
    def _outputs(self, x: Tensor, batch: int = 250) -> dict[str, Tensor]:
        outs = [self(part) for part in x.split(batch)]
        return {k: torch.cat([o[k] for o in outs]) for k in outs[0]}


class Judge(Reader):
    """Reads a picture [B, 3, R, R] in [-1, 1]: is there an object, where, how large, which shape and colour."""

    def __init__(self, width: int = 32, shapes: int = 3, colors: int = 6, resolution: int = 32):
        super().__init__()
        self.shapes, self.colors = shapes, colors
        self.body = _body(width, resolution)
        self.head = nn.Linear(FEATURES, 4 + shapes + colors)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Presence logit [B], position [B, 2], size [B], logits of shape [B, S] and colour [B, K]."""
        y = self.head(self.body(_with_coordinates(x)))
        return {
            "present": y[:, 0], "position": y[:, 1:3], "size": 0.55 + 0.15 * y[:, 3],
            "shape": y[:, 4:4 + self.shapes], "color": y[:, 4 + self.shapes:],
        }

    def read(self, x: Tensor, batch: int = 250) -> dict[str, Tensor]:
        """Decisions for [N, 3, R, R]: present bool, position, size, and the indices of shape and colour."""
        y = self._outputs(x, batch)
        return {"present": y["present"] > 0, "position": y["position"], "size": y["size"],
                "shape": y["shape"].argmax(1), "color": y["color"].argmax(1)}


class Counter(Reader):
    """Counts the objects in a picture [B, 3, R, R] in [-1, 1], from none to `most`."""

    def __init__(self, width: int = 32, most: int = 4, resolution: int = 32):
        super().__init__()
        self.most = most
        self.body = _body(width, resolution)
        self.head = nn.Linear(FEATURES, most + 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Logits of the number of objects, [B, most + 1]."""
        return {"count": self.head(self.body(_with_coordinates(x)))}

    def read(self, x: Tensor, batch: int = 250) -> dict[str, Tensor]:
        """The number of objects, [N], and whether there is one."""
        count = self._outputs(x, batch)["count"].argmax(1)
        return {"count": count, "present": count > 0}


def train_judge(data, epochs: int = 16, batch: int = 64, learning_rate: float = 2e-3, seed: int = 0,
                progress: bool = False) -> Judge:
    """Fit a judge to clean renders, empty floors among them: cross-entropies plus squared errors, Adam, cosine."""
    torch.manual_seed(seed)
    judge = Judge(colors=max(6, int(data.color.max()) + 1), resolution=data.images.shape[-1])
    return _fit(judge, data, _judge_loss, epochs, batch, learning_rate, seed, progress)


def train_counter(data, epochs: int = 16, batch: int = 64, learning_rate: float = 2e-3, seed: int = 0,
                  progress: bool = False) -> Counter:
    """Fit a counter to clean renders of none to several objects (`data.count` [N]): cross-entropy, Adam, cosine."""
    torch.manual_seed(seed)
    counter = Counter(most=int(data.count.max()), resolution=data.images.shape[-1])
    return _fit(counter, data, _counter_loss, epochs, batch, learning_rate, seed, progress)


def _fit(judge: Reader, data, loss_of: Callable, epochs: int, batch: int, learning_rate: float, seed: int, progress: bool):
    from tqdm import tqdm

    optimizer = torch.optim.Adam(judge.parameters(), lr=learning_rate)
    total = epochs * (len(data) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=total, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    bar = tqdm(total=total, disable=not progress, mininterval=2)
    for _ in range(epochs):
        order = torch.randperm(len(data), generator=generator)
        for index in order[: len(data) // batch * batch].split(batch):
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(judge, data[index])
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update(1)
    bar.close()
    return judge.eval()


def _counter_loss(counter: Counter, part) -> Tensor:
    return F.cross_entropy(counter(part.pixels())["count"], part.count)


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


def save_grid(x: Tensor, path: str | Path, columns: int = 16, scale: int = 3) -> None:
    """Write samples [N, 3, H, W] in [-1, 1] as one PNG of whole rows; needs Pillow."""
    whole = x[:max(len(x) // columns * columns, min(len(x), columns))]
    images.save(images.grid(list(whole.split(columns)), data_range=(-1, 1), scale=scale, gap=0), path, {})
