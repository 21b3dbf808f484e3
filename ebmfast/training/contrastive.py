"""Contrastive divergence with a replay buffer: the paper's training, its negatives drawn by this package's own samplers."""
from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..composition import Family, Slot, all_of
from ..samplers import Langevin
from ..sampling import prepare
from ..state import NonFiniteError
from .loop import DivergenceError, Loop, generator_of
from .trainer import Frozen


@dataclass(frozen=True)
class ContrastiveConfig:
    """Everything that decides the trained weights, besides the data and the starting weights; defaults are the paper's.

    Args:
        steps, drift, noise: of the chains that draw negatives: noise first, clamped to [0, 1] (`Langevin.reference_code`).
        gradient_clip: elementwise bound on the chains' gradients; None is none.
        buffer, reuse: size of the replay buffer, and the share of chains that start from it.
        squares: weight of `mean E+^2 + mean E-^2`.
        smoothing: standard deviation of noise added to the pictures, in their range [0, 1].
        max_gap: mean E+ minus mean E- (running, absolute) above which training has diverged.
    """

    iterations: int = 10_000
    batch: int = 16
    learning_rate: float = 3e-4
    betas: tuple[float, float] = (0.0, 0.99)
    warmup: int = 0
    clip: float = math.inf
    ema: float = 0.999
    seed: int = 0
    steps: int = 40
    drift: float = 100.0
    noise: float = 0.001
    gradient_clip: float | None = None
    buffer: int = 10_000
    reuse: float = 0.95
    squares: float = 1.0
    smoothing: float = 0.0
    max_gap: float = 20.0
    bf16: bool = False
    channels_last: bool = True
    checkpoint_every: int = 50
    log_every: int = 10

    def rate(self, iteration: int) -> float:
        """Learning rate at an iteration: constant after a linear warm-up."""
        return self.learning_rate * min(1.0, (iteration + 1) / max(1, self.warmup))


class ReplayBuffer:
    """Ends of earlier chains: pictures uint8 [size, 3, H, W], and the row of the data whose conditions each chain has [size]."""

    def __init__(self, size: int, shape: Sequence[int]):
        self.images = torch.zeros(size, *shape, dtype=torch.uint8)
        self.rows = torch.zeros(size, dtype=torch.int64)
        self.filled = torch.zeros((), dtype=torch.int64)  # how many have ever been written

    def __len__(self) -> int:
        return min(int(self.filled), len(self.images))

    def start(self, rows: Tensor, reuse: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Starting points of chains: x in [0, 1] [B, ...], rows [B], and places in the buffer [B], -1 for new chains.

        A share `reuse` goes on with chains of the buffer under their own conditions; the others start from uniform noise
        under those of `rows`.
        """
        batch = len(rows)
        x = torch.rand(batch, *self.images.shape[1:], generator=generator)
        place = torch.full((batch,), -1)
        if len(self):
            old = torch.rand(batch, generator=generator) < reuse
            # no place twice in one batch: the second end would overwrite the first
            drawn = torch.randperm(len(self), generator=generator)[:batch]
            drawn = torch.cat([drawn, torch.full((batch - len(drawn),), -1)])
            place = torch.where(old, drawn, place)
            kept = place >= 0
            x[kept] = self.images[place[kept]].float() / 255.0
            rows = torch.where(kept, self.rows[place.clamp_min(0)], rows)
        return x, rows, place

    def store(self, x: Tensor, rows: Tensor, place: Tensor) -> None:
        """Keep the ends of chains [B, ...] in [0, 1]: where they came from, new ones in place of the oldest."""
        new = place < 0
        at = place.clone()
        at[new] = (self.filled + torch.arange(int(new.sum()))) % len(self.images)
        self.filled += int(new.sum())
        self.images[at] = (x.clamp(0.0, 1.0) * 255.0).round().byte()
        self.rows[at] = rows


class ContrastiveTrainer(Loop):
    """Train an energy by `mean E(x+) - mean E(x-) + w (mean E(x+)^2 + mean E(x-)^2)`, x- the ends of short Langevin chains.

    images uint8 [N, 3, H, W], seen by the model in [0, 1]; conditions float32 [N, C]. Chains run on a copy of the network whose
    weights are brought up to date at every iteration, with spectral norms divided out once where the network has `fold_into`.
    With `frozen` models the chains descend the sum of all energies, each under its own conditions, and only the new one is
    trained: the paper's continual learning. Files, resume and other arguments as in `Loop`.
    Source: Du and Mordatch, NeurIPS 2019; Du, Li and Mordatch, NeurIPS 2020.
    """

    def __init__(self, model: nn.Module, images: Tensor, conditions: Tensor, config: ContrastiveConfig, folder: str | Path,
                 frozen: Sequence[Frozen] = (), **options):
        model = model.to(memory_format=torch.channels_last) if config.channels_last else model
        super().__init__(model, config, folder, **options)
        self.images, self.conditions, self.frozen = images, conditions, frozen
        self.buffer = ReplayBuffer(config.buffer, images.shape[1:])
        self.sampled = self._sampled()
        self.chains = self._chains()

    def _sampled(self) -> nn.Module:
        """The network that chains run on."""
        other = self.model.folded() if hasattr(self.model, "folded") else copy.deepcopy(self.model)
        return other.requires_grad_(False).eval()

    @torch.no_grad()
    def _refresh(self) -> None:
        if hasattr(self.model, "fold_into"):
            self.model.fold_into(self.sampled)
            return
        for mine, theirs in zip(self.sampled.parameters(), self.model.parameters()):
            mine.copy_(theirs)

    def _chains(self):
        cfg = self.config
        terms = [Family(self.sampled, "new", condition_dim=self.conditions.shape[1])[Slot("new")]]
        terms += [Family(old.model, old.name, condition_dim=old.conditions.shape[1])[Slot(old.name)] for old in self.frozen]
        sampler = Langevin.reference_code(cfg.drift, cfg.noise, grad_clip_value=cfg.gradient_clip)
        return prepare(all_of(terms) if len(terms) > 1 else terms[0], sampler, shape=tuple(self.images.shape[1:]), steps=cfg.steps,
                       device=self.device, energies=False, channels_last=cfg.channels_last,
                       compute_dtype=torch.bfloat16 if cfg.bf16 else None, batch_size=cfg.batch, check=False)

    def negatives(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Ends of chains [B, 3, H, W] and the rows of the data whose conditions they have; the buffer keeps them."""
        x, rows, place = self.buffer.start(rows, self.config.reuse, generator)
        self._refresh()
        conditions = {"new": self.conditions[rows]} | {old.name: old.conditions[rows] for old in self.frozen}
        seed = int(torch.randint(2**62, (), generator=generator))
        ends = self.chains(x=x.to(self.device), conditions={k: v.to(self.device) for k, v in conditions.items()}, seed=seed).x
        self.buffer.store(ends.cpu(), rows, place)
        return ends.detach(), rows

    def step(self) -> dict:
        """One optimizer step; returns its figures."""
        cfg, it = self.config, self.iteration
        generator = generator_of(cfg.seed, 1, it)
        index = self.epoch(len(self.images), cfg.batch, it)
        positive = self.images[index].float() / 255.0
        if cfg.smoothing:
            positive = (positive + cfg.smoothing * torch.randn(positive.shape, generator=generator)).clamp(0.0, 1.0)
        try:
            negative, rows = self.negatives(index[torch.randperm(len(index), generator=generator)], generator)
        except NonFiniteError as error:
            raise DivergenceError(self._message(it, f"a chain that draws negatives failed: {error}")) from error
        x = torch.cat([positive.to(self.device), negative])
        condition = self.conditions[torch.cat([index, rows])].to(self.device)
        if cfg.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with self.autocast():
            energy = self.model(x, condition).float().view(-1)
        high, low = energy.split(len(index))
        gap = high.mean() - low.mean()
        loss = gap + cfg.squares * (high.square().mean() + low.square().mean())
        norm = self.optimize(loss)
        return self.apply({"iteration": it, "loss": float(loss.detach()), "gradient_norm": norm, "gap": float(gap.detach()),
                           "positive": float(high.detach().mean()), "negative": float(low.detach().mean())})

    def _watch(self, record: dict) -> None:
        """Raise when positives and negatives have come far apart: chains no longer follow the energy, or found its pits."""
        self._recent = [*self._recent[-399:], record]
        window = self._recent[-20:]
        gap = sum(r["gap"] for r in window) / len(window)
        if len(window) == 20 and abs(gap) > self.config.max_gap:
            raise DivergenceError(self.diagnosis(record))

    def diagnosis(self, record: dict) -> str:
        """Where training stands when it diverges, and what to change."""
        return self._message(record["iteration"], (
            f"mean energy {record['positive']:.4g} of pictures, {record['negative']:.4g} of negatives (gap {record['gap']:.4g}, "
            f"bound {self.config.max_gap:g}), gradient norm {record['gradient_norm']:.4g}. " + (
                "Negatives lie far lower: the chains found pits that training did not close; take more steps, a smaller drift "
                "or gradient_clip, or raise `squares`." if record["gap"] > 0 else
                "Negatives lie far higher: the chains do not reach low energies; take more steps or a larger drift.")))

    def _message(self, iteration: int, what: str) -> str:
        rate = self.config.rate(iteration)
        return (f"training diverged at iteration {iteration} (learning rate {rate:.2e}): {what} "
                + self.last_good())

    def figures(self, records: list[dict]) -> dict:
        """Mean energies of pictures and negatives, and how full the buffer is."""
        means = {k: round(sum(r[k] for r in records) / len(records), 5) for k in ("gap", "positive", "negative")}
        return means | {"buffer": len(self.buffer)}

    def extra(self) -> dict[str, Tensor]:
        """The replay buffer."""
        return {"images": self.buffer.images, "rows": self.buffer.rows, "filled": self.buffer.filled}

    def restore_extra(self, file) -> None:
        """Read the replay buffer back."""
        for name, tensor in self.extra().items():
            tensor.copy_(file.get_tensor(f"extra.{name}"))
