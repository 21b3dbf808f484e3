"""What the driver asks of every sampler, with the answers that most of them give."""

from __future__ import annotations

import torch

SCHEDULES = ("step_size", "temperature", "drift", "noise")


class Dynamics:
    """A sampler whose number of steps the call decides, at no noise level, in the step engine."""

    steps: int | None = None  # of a whole run, where the sampler fixes it
    clamp: tuple[float, float] | None = None  # the bounds of the domain, where there are any
    needs_energies: bool = False  # beside gradients
    carried: tuple[str, ...] = ()  # names of the tensors beside x that belong to a chain's state

    def settle(self) -> None:
        """Make plain, private values of schedules and of a mass that were given as arrays: a sampler never changes."""
        for name in SCHEDULES:
            value = getattr(self, name, None)
            value = value.tolist() if hasattr(value, "tolist") else value
            if value is not None:
                object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)
        if hasattr(getattr(self, "mass", None), "tolist"):
            object.__setattr__(self, "mass", torch.as_tensor(self.mass).detach().clone())

    def noise_levels(self) -> tuple[float, ...] | None:
        """Noise levels at which energies are taken: none."""
        return None

    def initial_scale(self) -> float:
        """Standard deviation of `init="normal"`."""
        return 1.0

    def native_options(self) -> dict | None:
        """What the chain engine has to know of a step beside its coefficients; None: it cannot take these steps."""
        return None

    @property
    def fixed_schedule(self) -> bool:
        """Whether the coefficients of a step are the same in every call: no schedule is a callable."""
        return not any(callable(getattr(self, name, None)) for name in SCHEDULES)

    def carry(self, x: torch.Tensor, backend, *, step: int, seed: int, first_chain: int,
              frozen_mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """The `carried` tensors, `[B, ...]` each, of chains `x` `[B, *S]` that begin before step `step`."""
        return {}

    def step_sizes(self, carried, coefficients) -> torch.Tensor | None:
        """Step sizes that chains adapted, `[n]`; None where they did not."""
        return None


def check_mass(mass) -> None:
    """Raise unless `mass` is a positive number or a tensor of them."""
    mass = torch.as_tensor(mass)
    if not (torch.isfinite(mass) & (mass > 0)).all():
        raise ValueError("`mass` must be positive and finite")


def mass_like(mass, x: torch.Tensor) -> torch.Tensor:
    """`mass` as a tensor that broadcasts against `x` `[B, *S]`, or an error."""
    mass = torch.as_tensor(mass, dtype=x.dtype, device=x.device)
    try:
        mass.expand(x.shape[1:])
    except RuntimeError:
        raise ValueError(f"`mass` must broadcast to {list(x.shape[1:])}, got {list(mass.shape)}") from None
    return mass
