"""What a sampler of torchebm's shape inherits where torchebm itself is not installed: devices, schedulers, conditions."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn


class ConstantScheduler:
    """A value that stays as it is. A scheduler has `get_value()`, `step()` and `reset()`."""

    def __init__(self, start_value: float):
        self.start_value = self.current_value = float(start_value)
        self.step_count = 0

    def get_value(self) -> float:
        """The value at the current step."""
        return self.current_value

    def step(self) -> float:
        """Advance by one step."""
        self.step_count += 1
        return self.current_value

    def reset(self) -> None:
        """Back to step 0."""
        self.step_count = 0


def is_scheduler(value: object) -> bool:
    """Whether `value` has what a scheduler has."""
    return all(callable(getattr(value, name, None)) for name in ("get_value", "step", "reset"))


class Schedulable:
    """A module with named schedulers; those of all modules below it step and reset with it."""

    schedulers: dict[str, Any]

    def register_scheduler(self, name: str, scheduler) -> None:
        """Let `scheduler` decide the value `name`."""
        self.schedulers[name] = scheduler

    def get_schedulers(self) -> dict[str, Any]:
        """Schedulers by name."""
        return self.schedulers

    def get_scheduled_value(self, name: str) -> float:
        """The value `name` at the current step."""
        if name not in self.schedulers:
            raise KeyError(f"no scheduler is registered for {name!r}; there are {sorted(self.schedulers)}")
        return self.schedulers[name].get_value()

    def step_schedulers(self) -> None:
        """Advance every scheduler of this module and of those below it."""
        self.apply(lambda m: [s.step() for s in m.schedulers.values()] if isinstance(m, Schedulable) else None)

    def reset_schedulers(self) -> None:
        """Take every scheduler of this module and of those below it back to step 0."""
        self.apply(lambda m: [s.reset() for s in m.schedulers.values()] if isinstance(m, Schedulable) else None)


class BaseSampler(Schedulable, nn.Module):
    """A sampler of `model`, whose device and dtype are those of the first parameter, else what was asked for."""

    def __init__(self, model, dtype: torch.dtype = torch.float32, device: str | torch.device | None = None):
        super().__init__()
        self.schedulers = {}
        self.register_buffer("_probe", torch.empty(0, dtype=dtype, device=device), persistent=False)
        self.use_mixed_precision = self.autocast_available = False
        self.model = model

    def _register_param(self, name: str, value, *, positive: bool = False) -> None:
        if is_scheduler(value):
            self.schedulers[name] = value
            return
        if positive and value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")
        self.schedulers[name] = ConstantScheduler(value)

    @property
    def device(self) -> torch.device:
        """Where chains run."""
        found = next(self.parameters(), self._probe).device
        return torch.device("cuda") if found.type == "cuda" and found.index == 0 else found

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of chains."""
        return next(self.parameters(), self._probe).dtype

    def autocast_context(self):
        """Full precision: mixed precision is a setting of torchebm's."""
        return nullcontext()

    @staticmethod
    def _merge_condition(model_kwargs: dict | None, y: Tensor | None) -> dict | None:
        if y is None:
            return model_kwargs
        if model_kwargs and "y" in model_kwargs:
            raise ValueError("`y` was given both as y= and in model_kwargs['y']: give it once")
        return {**(model_kwargs or {}), "y": y}

    def _prepare_model_kwargs(self, model_kwargs: dict | None) -> dict:
        if not model_kwargs:
            return {}
        if not isinstance(model_kwargs, dict):
            raise TypeError(f"`model_kwargs` must be a dict, got {type(model_kwargs).__name__}")
        device = self.device
        return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in model_kwargs.items()}

    def _init_state(self, x: Tensor | None, dim, n_samples: int, generator: torch.Generator | None = None) -> Tensor:
        if x is not None:
            return x.to(device=self.device, dtype=self.dtype)
        if dim is None:
            raise ValueError("dim must be provided when x is None")
        shape = (dim,) if isinstance(dim, int) else tuple(dim)
        return torch.randn(n_samples, *shape, dtype=self.dtype, device=self.device, generator=generator)

    def _model_gradient(self, x: Tensor, model_kwargs: dict) -> Tensor:
        return self.model.gradient(x, model_kwargs=model_kwargs) if model_kwargs else self.model.gradient(x)

    def _model_energy(self, x: Tensor, model_kwargs: dict) -> Tensor:
        return self.model(x, **model_kwargs)
