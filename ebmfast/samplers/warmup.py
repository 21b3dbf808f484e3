"""Step sizes that adapt in a warm-up, to a target acceptance, and are then frozen.

    H ← (1 - 1/(m + t₀)) H + (δ - α_m)/(m + t₀),   ln s = μ - (√m/γ) H,   ln s̄ ← m^-κ ln s + (1 - m^-κ) ln s̄

in step m of the warm-up, α_m the probability with which its proposal is accepted, δ the target, s the factor on the
sampler's own step size. After the warm-up s is s̄.

Source: Hoffman and Gelman, Journal of Machine Learning Research 2014, section 3.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .._checks import positive_integer

LOG_SCALE, LOG_AVERAGE, ERROR, COUNT = range(4)  # columns of the state


@dataclass(frozen=True)
class DualAveraging:
    """A warm-up of a chain's first `steps` steps that brings its acceptance to `target`.

    Every chain has a step size of its own, which nothing but the chain itself decides: a chain is the same in any batch,
    shard or worker. While it adapts, a chain is not yet at equilibrium; from then on its law is exact, as at any step size.

    Args:
        steps: length of the warm-up, counted from where a chain begins; a run that resumes goes on with it.
        target: acceptance to reach, between 0 and 1. By default 0.574 for MALA, the best one in high dimensions (Roberts and
            Rosenthal 1998), and 0.8 for HMC: 0.651 is best there in that limit (Beskos et al. 2013), but the cost is nearly
            flat up to 0.9, and steps that are too large for some region of the target cost more than small ones do.
        gamma, t0, kappa: γ, t₀ and κ above.

    Raises:
        ValueError: a number outside its range.
    """

    steps: int
    target: float | None = None
    gamma: float = 0.05
    t0: float = 10.0
    kappa: float = 0.75

    def __post_init__(self):
        object.__setattr__(self, "steps", positive_integer(self.steps, "`steps` of a warm-up"))
        if self.target is not None and not 0 < self.target < 1:
            raise ValueError(f"`target` must be an acceptance between 0 and 1, got {self.target}")
        if not (self.gamma > 0 and self.t0 >= 0 and 0.5 < self.kappa <= 1):
            raise ValueError(f"a warm-up needs gamma > 0, t0 >= 0 and 0.5 < kappa <= 1, got {self}")

    @staticmethod
    def begin(chains: int, device) -> torch.Tensor:
        """The state of chains that have not begun, `[B, 4]`: ln s, ln s̄, H and m."""
        return torch.zeros(chains, 4, dtype=torch.float32, device=device)

    def scale(self, state: torch.Tensor) -> torch.Tensor:
        """The factor s on the step size of each chain, `[B]`."""
        warm = state[:, COUNT] < self.steps
        return torch.where(warm, state[:, LOG_SCALE], state[:, LOG_AVERAGE]).exp()

    def left(self, state: torch.Tensor) -> int:
        """Steps until the last chain is warm."""
        return self.steps - int(state[:, COUNT].min()) if len(state) else 0

    def update(self, state: torch.Tensor, log_ratio: torch.Tensor, target: float) -> None:
        """One step of every chain that is not warm yet, in place, after a proposal of log acceptance ratio `log_ratio`."""
        active = state[:, COUNT] < self.steps
        accepted = log_ratio.clamp_max(0.0).exp().nan_to_num(0.0)  # what is not finite is rejected
        m = state[:, COUNT] + 1
        error = state[:, ERROR] + (target - accepted - state[:, ERROR]) / (m + self.t0)
        log_scale = math.log(10) - m.sqrt() / self.gamma * error
        average = torch.lerp(state[:, LOG_AVERAGE], log_scale, m.pow(-self.kappa))
        state.copy_(torch.where(active[:, None], torch.stack([log_scale, average, error, m], 1), state))
