"""The trainer of one concept's energy by denoising score matching, alone or composed with models that stay as they are."""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..models import NoiseConditionalEnergy
from .loop import DivergenceError, Loop, generator_of
from .score_matching import NoiseLevels, contrast, draw_candidates, ratio_gradient, score_error

__all__ = ["DivergenceError", "Frozen", "TrainConfig", "Trainer", "validation_error"]
BANDS = (0.15, 0.4, 1.0)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the trained weights, besides the data."""

    iterations: int = 5000
    batch: int = 32
    learning_rate: float = 1.5e-3
    betas: tuple[float, float] = (0.9, 0.99)
    warmup: int = 100
    clip: float = 1.0
    ema: float = 0.998
    drop: float = 0.1
    seed: int = 0
    levels: NoiseLevels = field(default_factory=NoiseLevels)
    contrast_weight: float = 0.04
    contrast_every: int = 2
    contrast_rows: int = 8
    contrast_candidates: int = 6
    contrast_start: float = 0.4
    labels: bool = False
    frozen_drop: float = 0.1
    bf16: bool = False
    channels_last: bool = True
    checkpoint_every: int = 250
    log_every: int = 50

    def rate(self, iteration: int) -> float:
        """Learning rate at an iteration: linear warm-up, then cosine to 2 % of the peak."""
        if iteration < self.warmup:
            return self.learning_rate * (iteration + 1) / self.warmup
        t = (iteration - self.warmup) / max(1, self.iterations - self.warmup)
        return self.learning_rate * (0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * min(t, 1.0))))


@dataclass(frozen=True)
class Frozen:
    """An energy learnt before, and the conditions [N, C] under which it holds for the pictures that are trained on now."""

    name: str
    model: nn.Module
    conditions: Tensor


class Trainer(Loop):
    """Train a noise-conditional energy on images and conditions of one concept.

    images uint8 [N, 3, H, W]; conditions float32 [N, C], or [N, K, C] of which the first `counts` [N] of each picture hold and
    one is drawn at random each time. With `frozen` models the energy that is matched is
    ``E_new(x | c) + sum_k (E_k(x | c_k) - E_k(x))``, the frozen conditions dropped in a share `frozen_drop` of the rows.
    Other arguments, files and guarantees as in `Loop`.
    """

    def __init__(self, model: NoiseConditionalEnergy, images: Tensor, conditions: Tensor, config: TrainConfig,
                 folder: str | Path, counts: Tensor | None = None, frozen: Sequence[Frozen] = (), **options):
        model = model.to(memory_format=torch.channels_last) if config.channels_last else model
        super().__init__(model, config, folder, **options)
        self.images, self.conditions, self.counts, self.frozen = images, conditions, counts, frozen
        self._pool = conditions if counts is None else conditions[torch.arange(conditions.shape[1]) < counts[:, None]]

    def step(self) -> dict:
        """One optimizer step; returns its figures."""
        cfg, it = self.config, self.iteration
        generator = generator_of(cfg.seed, 1, it)
        index = self.epoch(len(self.images), cfg.batch, it)
        images, condition = self._batch(index)
        sigma = cfg.levels.draw(cfg.batch, generator)
        noise = torch.randn(images.shape, generator=generator)
        keep = (torch.rand(cfg.batch, generator=generator) >= cfg.drop).float()
        rows = slice(0, cfg.contrast_rows)
        candidates = None
        if cfg.contrast_weight and it >= cfg.contrast_start * cfg.iterations and it % cfg.contrast_every == 0:
            candidates = draw_candidates(condition[rows], self._pool, cfg.contrast_candidates, cfg.labels, generator)
        noised = self._format(images + sigma[:, None, None, None] * noise)
        noised, noise, sigma, condition, keep = (t.to(self.device) for t in (noised, noise, sigma, condition, keep))
        with self.autocast():
            given = self._frozen_gradient(noised, sigma, index, generator)
            errors = score_error(self.model, noised, noise, sigma, condition, keep, self.model.std, True, given)
            loss, cross = errors.mean(), None
            if candidates is not None:
                cross = contrast(self.model, noised[rows], sigma[rows], candidates.to(self.device))
                loss = loss + cfg.contrast_weight * cross
        norm = self.optimize(loss)
        return self.apply({
            "iteration": it, "loss": float(errors.detach().mean()), "gradient_norm": norm, "errors": errors.detach().cpu(),
            "sigma": sigma.cpu(), "contrast": None if cross is None else float(cross.detach())})

    def _frozen_gradient(self, noised: Tensor, sigma: Tensor, index: Tensor, generator: torch.Generator) -> Tensor | None:
        total = None
        for old in self.frozen:
            keep = (torch.rand(len(index), generator=generator) >= self.config.frozen_drop).float().to(self.device)
            part = ratio_gradient(old.model, noised, sigma, old.conditions[index].to(self.device), keep)
            total = part if total is None else total + part
        return total

    def _format(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last) if self.config.channels_last else x

    def _batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures in [-1, 1] and conditions."""
        condition = self.conditions[index]
        if self.counts is not None:
            u = torch.rand(len(index), generator=generator_of(self.config.seed, 4, self.iteration))
            condition = condition[torch.arange(len(index)), (u * self.counts[index]).long()]
        return self.images[index].float() / 127.5 - 1.0, condition

    def diagnosis(self, record: dict) -> str:
        """Where training stands when it diverges, and what to change."""
        bands = ", ".join(f"{name}: {value:.3g}" for name, value in _by_band([record]).items())
        return (
            f"training diverged at iteration {record['iteration']}: loss {record['loss']:.4g} (best running mean "
            f"{self._best:.4g}), gradient norm {record['gradient_norm']:.4g}, learning rate "
            f"{self.config.rate(record['iteration']):.2e}, error by noise level {{{bands}}}. Halve the learning rate "
            f"or lower `clip`; if only the lowest levels are large, raise the smallest sigma. "
            + self.last_good()
        )

    def figures(self, records: list[dict]) -> dict:
        """Mean cross-entropy, and errors by noise level."""
        crosses = [r["contrast"] for r in records if r["contrast"] is not None]
        return {"contrast": round(sum(crosses) / len(crosses), 4) if crosses else None,
                "by_level": {k: round(v, 4) for k, v in _by_band(records).items()}}


def _by_band(records: list[dict]) -> dict[str, float]:
    """Mean error in bands of the noise level."""
    errors, sigma = torch.cat([r["errors"] for r in records]), torch.cat([r["sigma"] for r in records])
    edges = (0.0, *BANDS, math.inf)
    result = {}
    for low, high in zip(edges, edges[1:]):
        inside = (sigma >= low) & (sigma < high)
        if inside.any():
            result[f"{low:g}-{high:g}"] = float(errors[inside].mean())
    return result


def validation_error(model: NoiseConditionalEnergy, images: Tensor, conditions: Tensor, levels: NoiseLevels,
                     seed: int = 0, batch: int = 100, frozen: Sequence[Frozen] = ()) -> float:
    """Mean score-matching error on held-out pictures, with noise and levels fixed by the seed; `frozen` as in `Trainer`."""
    total, generator = 0.0, generator_of(seed, 3)
    for i in range(0, len(images), batch):
        x, c = images[i:i + batch].float() / 127.5 - 1.0, conditions[i:i + batch]
        sigma = levels.draw(len(x), generator)
        noise = torch.randn(x.shape, generator=generator)
        noised = x + sigma[:, None, None, None] * noise
        keep = torch.ones(len(x))
        parts = [ratio_gradient(old.model, noised, sigma, old.conditions[i:i + batch], keep) for old in frozen]
        errors = score_error(model, noised, noise, sigma, c, keep, model.std, False, sum(parts[1:], parts[0]) if parts else None)
        total += float(errors.detach().sum())
    return total / len(images)
