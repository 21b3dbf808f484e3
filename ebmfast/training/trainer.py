"""The trainer of one concept's energy: seeded, resumable to the bit, guarded against divergence, logged as JSON lines."""
from __future__ import annotations

import json
import math
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..models import NoiseConditionalEnergy
from .score_matching import NoiseLevels, contrast, draw_candidates, score_error

BANDS = (0.15, 0.4, 1.0)


class DivergenceError(RuntimeError):
    """Training left the region where it can recover; the message says where, how far, and what to change."""


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
    channels_last: bool = True
    checkpoint_every: int = 250
    log_every: int = 50

    def rate(self, iteration: int) -> float:
        """Learning rate at an iteration: linear warm-up, then cosine to 2 % of the peak."""
        if iteration < self.warmup:
            return self.learning_rate * (iteration + 1) / self.warmup
        t = (iteration - self.warmup) / max(1, self.iterations - self.warmup)
        return self.learning_rate * (0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * min(t, 1.0))))


def _generator(*words: int) -> torch.Generator:
    seed = int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator().manual_seed(seed)


class Trainer:
    """Train a noise-conditional energy on images and conditions of one concept.

    images uint8 [N, 3, H, W]; conditions float32 [N, C]; `folder` receives `checkpoint.safetensors` (one atomic
    file: weights, average, optimizer moments, iteration) and `log.jsonl`. Every random number is a function of
    (seed, iteration), so a resumed run gives the same bits as an uninterrupted one.
    """

    def __init__(self, model: NoiseConditionalEnergy, images: Tensor, conditions: Tensor, config: TrainConfig,
                 folder: str | Path):
        self.config, self.folder = config, Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.images, self.conditions = images, conditions
        self.model = model.to(memory_format=torch.channels_last) if config.channels_last else model
        self.average = {k: v.detach().clone() for k, v in model.named_parameters()}
        self.optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, betas=config.betas, fused=True)
        self.iteration, self.seconds = 0, 0.0
        self._recent: list[dict] = []
        self._best = math.inf

    def run(self, progress: bool = False, until: int | None = None) -> dict[str, Tensor]:
        """Train up to `config.iterations` (or `until`) and return the averaged weights.

        Raises DivergenceError. On Ctrl-C the last checkpoint stays, and `resume` goes on from it.
        """
        from tqdm import tqdm

        last = min(self.config.iterations, until or self.config.iterations)
        bar = tqdm(total=self.config.iterations, initial=self.iteration, disable=not progress, unit="it", mininterval=2)
        while self.iteration < last:
            start = time.perf_counter()
            record = self.step()
            self.seconds += time.perf_counter() - start
            self._watch(record)
            if self.iteration % self.config.log_every == 0:
                bar.set_postfix(loss=f"{self._log():.4f}")
            if self.iteration % self.config.checkpoint_every == 0 or self.iteration == last:
                self.save()
            bar.update(1)
        bar.close()
        return self.average

    def step(self) -> dict:
        """One optimizer step; returns its figures."""
        cfg, it = self.config, self.iteration
        generator = _generator(cfg.seed, 1, it)
        images, condition = self._batch(it)
        sigma = cfg.levels.draw(cfg.batch, generator)
        noise = torch.randn(images.shape, generator=generator)
        keep = (torch.rand(cfg.batch, generator=generator) >= cfg.drop).float()
        noised = self._format(images + sigma[:, None, None, None] * noise)
        errors = score_error(self.model, noised, noise, sigma, condition, keep, self.model.std, create_graph=True)
        loss, cross = errors.mean(), None
        if cfg.contrast_weight and it >= cfg.contrast_start * cfg.iterations and it % cfg.contrast_every == 0:
            rows = slice(0, cfg.contrast_rows)
            candidates = draw_candidates(
                condition[rows], self.conditions, cfg.contrast_candidates, cfg.labels, generator)
            cross = contrast(self.model, noised[rows], sigma[rows], candidates)
            loss = loss + cfg.contrast_weight * cross
        for group in self.optimizer.param_groups:
            group["lr"] = cfg.rate(it)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), cfg.clip))
        record = {"iteration": it, "loss": float(errors.detach().mean()), "gradient_norm": norm,
                  "errors": errors.detach(), "sigma": sigma, "contrast": None if cross is None else float(cross.detach())}
        if not (math.isfinite(norm) and math.isfinite(record["loss"])):
            raise DivergenceError(self._diagnosis(record))
        self.optimizer.step()
        self._update_average()
        self.iteration += 1
        return record

    def _format(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last) if self.config.channels_last else x

    def _batch(self, iteration: int) -> tuple[Tensor, Tensor]:
        """Pictures in [-1, 1] and conditions of one iteration: a fresh permutation each epoch."""
        batch, count = self.config.batch, len(self.images)
        per_epoch = max(1, count // batch)
        epoch, place = divmod(iteration, per_epoch)
        order = torch.randperm(count, generator=_generator(self.config.seed, 2, epoch))
        index = order[place * batch:(place + 1) * batch]
        if len(index) < batch:
            index = index.repeat(-(-batch // len(index)))[:batch]
        return self.images[index].float() / 127.5 - 1.0, self.conditions[index]

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(self.config.ema, (1 + self.iteration) / (10 + self.iteration))
        for name, value in self.model.named_parameters():
            self.average[name].lerp_(value, 1.0 - decay)

    def _watch(self, record: dict) -> None:
        """Raise when the running loss has left the best one far behind."""
        self._recent.append(record)
        window = self._recent[-100:]
        self._recent = window if len(self._recent) > 400 else self._recent
        if len(window) < 100:
            return
        mean = sum(r["loss"] for r in window) / len(window)
        self._best = min(self._best, mean)
        if mean > 3.0 * self._best + 0.1:
            raise DivergenceError(self._diagnosis(record))

    def _diagnosis(self, record: dict) -> str:
        bands = ", ".join(f"{name}: {value:.3g}" for name, value in _by_band([record]).items())
        return (
            f"training diverged at iteration {record['iteration']}: loss {record['loss']:.4g} (best running mean "
            f"{self._best:.4g}), gradient norm {record['gradient_norm']:.4g}, learning rate "
            f"{self.config.rate(record['iteration']):.2e}, error by noise level {{{bands}}}. Halve the learning rate "
            f"or lower `clip`; if only the lowest levels are large, raise the smallest sigma. "
            f"The last good checkpoint is in {self.folder}."
        )

    def _log(self) -> float:
        records = self._recent[-self.config.log_every:]
        loss = sum(r["loss"] for r in records) / len(records)
        crosses = [r["contrast"] for r in records if r["contrast"] is not None]
        line = {
            "iteration": self.iteration, "loss": round(loss, 5),
            "contrast": round(sum(crosses) / len(crosses), 4) if crosses else None,
            "gradient_norm": round(sum(r["gradient_norm"] for r in records) / len(records), 4),
            "rate": self.config.rate(self.iteration), "seconds": round(self.seconds, 1),
            "by_level": {k: round(v, 4) for k, v in _by_band(records).items()},
        }
        with open(self.folder / "log.jsonl", "a") as log:
            log.write(json.dumps(line) + "\n")
        return loss

    @property
    def checkpoint(self) -> Path:
        """The file that `save` writes and `resume` reads."""
        return self.folder / "checkpoint.safetensors"

    def save(self) -> None:
        """Write the checkpoint: complete or not at all."""
        tensors = {f"average.{k}": v.contiguous() for k, v in self.average.items()}
        for name, parameter in self.model.named_parameters():
            tensors[f"model.{name}"] = parameter.detach().contiguous()
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"adam.{key}.{name}"] = value.contiguous()
        best = self._best if math.isfinite(self._best) else None
        note = {"iteration": self.iteration, "seconds": self.seconds, "best": best, "config": asdict(self.config)}
        temporary = self.checkpoint.with_suffix(".tmp")
        save_file(tensors, str(temporary), metadata={"note": json.dumps(note)})
        os.replace(temporary, self.checkpoint)

    def resume(self) -> bool:
        """Continue from the checkpoint if there is one; ValueError when it was made under another configuration."""
        if not self.checkpoint.exists():
            return False
        with safe_open(str(self.checkpoint), framework="pt") as file:
            note = json.loads(file.metadata()["note"])
            mine = json.loads(json.dumps(asdict(self.config)))
            changed = [k for k in mine if mine[k] != note["config"].get(k)]
            if changed:
                raise ValueError(f"{self.checkpoint} was made with other settings of {', '.join(changed)}")
            self._restore(file)
        self.iteration, self.seconds = note["iteration"], note["seconds"]
        self._best = math.inf if note["best"] is None else note["best"]
        return True

    @torch.no_grad()
    def _restore(self, file) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(file.get_tensor(f"model.{name}"))
            self.average[name].copy_(file.get_tensor(f"average.{name}"))
            state = self.optimizer.state[parameter]
            state["step"] = file.get_tensor(f"adam.step.{name}")
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.empty_like(parameter).copy_(file.get_tensor(f"adam.{key}.{name}"))


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
                     seed: int = 0, batch: int = 100) -> float:
    """Mean score-matching error on held-out pictures, with noise and levels fixed by the seed."""
    total, generator = 0.0, _generator(seed, 3)
    for i in range(0, len(images), batch):
        x, c = images[i:i + batch].float() / 127.5 - 1.0, conditions[i:i + batch]
        sigma = levels.draw(len(x), generator)
        noise = torch.randn(x.shape, generator=generator)
        noised = x + sigma[:, None, None, None] * noise
        keep = torch.ones(len(x))
        total += float(score_error(model, noised, noise, sigma, c, keep, model.std, False).detach().sum())
    return total / len(images)
