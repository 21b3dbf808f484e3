"""What every trainer does: steps, averaged weights, checkpoints, logs, pictures, and a guard against divergence."""
from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


class DivergenceError(RuntimeError):
    """Training left the region where it can recover; the message says where, how far, and what to change."""


def generator_of(*words: int) -> torch.Generator:
    """A CPU generator that is a function of `words` alone."""
    seed = int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator().manual_seed(seed)


class Loop:
    """Train a network, step by step, so that a run which is stopped and resumed gives the bits of one that was not.

    A subclass gives `step() -> record` (a dict with "iteration", "loss" and "gradient_norm"), `figures(records)` for the log,
    and `diagnosis(record)`; what else decides its bits goes into `extra()` and comes back through `restore_extra`. Every
    random number is a function of (seed, iteration). `folder` receives `checkpoint.safetensors` (one file, complete or not at
    all: weights, buffers, average, optimizer moments, iteration), `log.jsonl`, and what `pictures` writes.

    Args:
        model: the network to train.
        config: a frozen dataclass with iterations, learning_rate, betas, clip, ema, seed, checkpoint_every, log_every, rate().
        folder: where files go.
        pictures: called with the trainer every `pictures_every` iterations; changes nothing that decides the bits.
        tensorboard: also write scalars for TensorBoard into `folder` (needs the extra `tensorboard`).
    """

    def __init__(self, model: nn.Module, config, folder: str | Path, pictures: Callable[[Loop], None] | None = None,
                 pictures_every: int = 1000, tensorboard: bool = False):
        self.config, self.folder = config, Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model = model
        self.device = next(model.parameters()).device
        self.average = {k: v.detach().clone() for k, v in model.named_parameters()}
        self.optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, betas=config.betas, fused=True)
        self.iteration, self.seconds = 0, 0.0
        self.source: dict = {}  # what else a checkpoint has to agree in: data, network, start
        self.pictures, self.pictures_every = pictures, pictures_every
        self._recent: list[dict] = []
        self._best = math.inf
        self._board = _board(self.folder) if tensorboard else None

    def step(self) -> dict:
        """One optimizer step; returns its figures."""
        raise NotImplementedError

    def figures(self, records: list[dict]) -> dict:
        """What a line of the log says besides loss, gradient norm, rate and time."""
        return {}

    def last_good(self) -> str:
        """Where training can go on from."""
        return f"The last good checkpoint is in {self.folder}." if self.checkpoint.exists() else "No checkpoint was written yet."

    def diagnosis(self, record: dict) -> str:
        """Where training stands when it diverges, and what to change."""
        raise NotImplementedError

    def extra(self) -> dict[str, Tensor]:
        """Tensors of a checkpoint besides weights and moments."""
        return {}

    def restore_extra(self, file) -> None:
        """Read `extra` back from an open safetensors file."""

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
            if self.pictures and (self.iteration % self.pictures_every == 0 or self.iteration == self.config.iterations):
                self.pictures(self)
            bar.update(1)
        bar.close()
        return self.average

    def autocast(self):
        """bfloat16 autocast if the configuration asks for it."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.config.bf16 else nullcontext()

    def optimize(self, loss: Tensor) -> float:
        """Gradients of the loss, clipped, at this iteration's learning rate; returns their norm. `apply` takes the step."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate(self.iteration)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        return float(nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip))

    def apply(self, record: dict) -> dict:
        """Take the step unless the loss or its gradient is not finite: then raise DivergenceError, weights as they were."""
        if not (math.isfinite(record["gradient_norm"]) and math.isfinite(record["loss"])):
            raise DivergenceError(self.diagnosis(record))
        self.optimizer.step()
        self._update_average()
        self.iteration += 1
        return record

    def epoch(self, count: int, batch: int, iteration: int) -> Tensor:
        """Indices [batch] of one iteration: a fresh permutation of `count` each epoch."""
        per_epoch = max(1, count // batch)
        epoch, place = divmod(iteration, per_epoch)
        order = torch.randperm(count, generator=generator_of(self.config.seed, 2, epoch))
        index = order[place * batch:(place + 1) * batch]
        return index if len(index) == batch else index.repeat(-(-batch // len(index)))[:batch]

    def averaged(self) -> nn.Module:
        """A copy of the network with the averaged weights, in eval mode; the trained one is not changed."""
        import copy

        other = copy.deepcopy(self.model).requires_grad_(False).eval()
        other.load_state_dict(self.average, strict=False)
        return other

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
            raise DivergenceError(self.diagnosis(record))

    def _log(self) -> float:
        records = self._recent[-self.config.log_every:]
        loss, norm = (sum(r[k] for r in records) / len(records) for k in ("loss", "gradient_norm"))
        line = {"iteration": self.iteration, "loss": round(loss, 5), "gradient_norm": round(norm, 4),
                "rate": self.config.rate(self.iteration), "seconds": round(self.seconds, 1), **self.figures(records)}
        with open(self.folder / "log.jsonl", "a") as log:
            log.write(json.dumps(line) + "\n")
        if self._board is not None:
            for name, value in line.items():
                if isinstance(value, (int, float)) and name != "iteration":
                    self._board.add_scalar(name, value, self.iteration)
            self._board.flush()
        return loss

    @property
    def checkpoint(self) -> Path:
        """The file that `save` writes and `resume` reads."""
        return self.folder / "checkpoint.safetensors"

    def save(self) -> None:
        """Write the checkpoint: complete or not at all."""
        tensors = {f"average.{k}": v.contiguous() for k, v in self.average.items()}
        tensors |= {f"buffer.{k}": v.contiguous() for k, v in self._buffers().items()}
        tensors |= {f"extra.{k}": v.contiguous() for k, v in self.extra().items()}
        for name, parameter in self.model.named_parameters():
            tensors[f"model.{name}"] = parameter.detach().contiguous()
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"adam.{key}.{name}"] = value.contiguous()
        best = self._best if math.isfinite(self._best) else None
        note = {"iteration": self.iteration, "seconds": self.seconds, "best": best, "config": asdict(self.config),
                "source": self.source}
        temporary = self.checkpoint.with_suffix(".tmp")
        save_file(tensors, str(temporary), metadata={"note": json.dumps(note)})
        os.replace(temporary, self.checkpoint)

    def _buffers(self) -> dict[str, Tensor]:
        parameters = set(self.average)
        return {k: v for k, v in self.model.state_dict().items() if k not in parameters}

    def resume(self) -> bool:
        """Continue from the checkpoint if there is one; ValueError when it was made under another configuration."""
        if not self.checkpoint.exists():
            return False
        with safe_open(str(self.checkpoint), framework="pt") as file:
            note = json.loads(file.metadata()["note"])
            mine = json.loads(json.dumps(asdict(self.config)))
            changed = [k for k in mine if mine[k] != note["config"].get(k)]
            before = note.get("source") or {}
            changed += [k for k in self.source if k in before and before[k] != self.source[k]]
            if changed:
                raise ValueError(f"{self.checkpoint} was made with other settings of {', '.join(changed)}")
            self._restore(file)
            self.restore_extra(file)
        self.iteration, self.seconds = note["iteration"], note["seconds"]
        self._best = math.inf if note["best"] is None else note["best"]
        return True

    @torch.no_grad()
    def _restore(self, file) -> None:
        for name, buffer in self._buffers().items():
            buffer.copy_(file.get_tensor(f"buffer.{name}"))
        stepped = {k for k in file.keys() if k.startswith("adam.step.")}
        for name, parameter in self.model.named_parameters():
            parameter.copy_(file.get_tensor(f"model.{name}"))
            self.average[name].copy_(file.get_tensor(f"average.{name}"))
            if f"adam.step.{name}" not in stepped:
                continue  # a parameter that no gradient has reached
            state = self.optimizer.state[parameter]
            state["step"] = file.get_tensor(f"adam.step.{name}").to(parameter.device)
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.empty_like(parameter).copy_(file.get_tensor(f"adam.{key}.{name}"))


def _board(folder: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "logging for TensorBoard needs a package that is not installed: pip install 'ebmfast[tensorboard]'") from error
    return SummaryWriter(str(folder))
