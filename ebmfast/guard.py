"""Chains that run away: where a composition cannot be normalised, energies fall without end and nothing stops a chain.

No finite piece of a chain tells for sure a pit without a bottom from a descent into a far mode, so the guard asks for what
an ordinary burn-in does not do. With r the distance from where a chain stood at the first look, a chain has run away if

- r doubled at least `DOUBLINGS` times, and with each doubling the energy fell at least `STEEPER` times as steeply per unit
  of distance. Going down a convex energy, from however far, the fall flattens; along a linear one it keeps its slope;
  that of a quadratic pit doubles each time; or
- an element exceeds 2^20 times the largest of where the chain began, the noise of a step and the data range: in float32
  what the noise adds there is lost to rounding;

and either way its energy has fallen by more than `FALL` max(T, 1) for each of its elements, which the climb down from
any barrier that a sampler could have crossed does not reach. A pit that falls linearly meets the second rule alone.
Looks are 16 steps apart, later a quarter of the steps taken; while no chain has fallen that far, each is a few operations on `[B]`.
"""

from __future__ import annotations

import math

import torch

DOUBLINGS, STEEPER, FALL, FARTHEST = 4, 1.5, 500.0, 2.0**20
FIRST, SPREAD = 16, 4
RAN_AWAY = 0xFFFF  # in the place of a leaf in a fault's code


class Guard:
    """Looks after the chains of one micro-batch; `due` is the step of the next look."""

    def __init__(self, coefficients, data_range: tuple[float, float] | None, x: torch.Tensor, start: int):
        self.begun, self.due = start, start + FIRST
        temperature = coefficients.temperature()[1]
        self.margin = FALL * x[0].numel() * (temperature if 1.0 < temperature < math.inf else 1.0)
        self.scale = max(map(abs, (*(data_range or ()), *coefficients.noise)), default=0.0)
        self.extent = x.reshape(len(x), -1).abs().amax(1).clamp_min(self.scale)
        self.origin: torch.Tensor | None = None  # where chains stood at the first look
        self.anew: list[int] = []  # chains drawn anew since the last look
        self.sigma: float | None = None

    def begin_anew(self, row: int) -> None:
        """Forget the chain `row`, which was drawn anew."""
        self.anew.append(row)

    @torch.no_grad()
    def look(self, state, energy: torch.Tensor, sigma: float | None) -> None:
        """Give a fault to every chain that has run away; `energy` `[B]` is that of the last step."""
        x, faults = state.x.reshape(len(state.x), -1), state.faults
        self.due = state.step + max(FIRST, (state.step - self.begun) // SPREAD)
        energy = energy.to(x.dtype, copy=True)
        if self.origin is None or sigma != self.sigma:
            self._first(x, energy, sigma)
        for row in self.anew:
            self._again(row, x, energy)
        self.anew = []
        self.pending.append((torch.linalg.vector_norm(x - self.origin, dim=1), energy))
        fallen = self.highest - energy > self.margin
        if x.device.type == "cpu" and not fallen.any():  # elsewhere it would wait for the device
            return
        self._digest()
        far = (x.abs().amax(1) > FARTHEST * self.extent) & (self.extent > 0)
        ran = fallen & (far | (self.streak >= DOUBLINGS)) & (faults == 0)
        faults.copy_(torch.where(ran, (state.step << 16) + RAN_AWAY, faults))

    def _first(self, x: torch.Tensor, energy: torch.Tensor, sigma: float | None) -> None:
        self.sigma, self.origin, self.highest = sigma, x.clone(), energy.clone()
        self.pending: list[tuple[torch.Tensor, torch.Tensor]] = []  # looks that were not evaluated yet
        self.radius, self.energy, self.slope = torch.zeros_like(energy), energy.clone(), torch.full_like(energy, torch.inf)
        self.streak = torch.zeros_like(energy)
        now = x.abs().amax(1)  # of chains that began at, or near, 0 without noise, what they began at tells nothing
        self.extent = torch.where(now > FARTHEST / 4 * self.extent, now, self.extent)

    def _again(self, row: int, x: torch.Tensor, energy: torch.Tensor) -> None:
        self._digest()
        self.origin[row], self.highest[row], self.energy[row] = x[row], energy[row], energy[row]
        self.radius[row], self.slope[row], self.streak[row] = 0.0, torch.inf, 0.0
        self.extent[row] = x[row].abs().amax().clamp_min(self.scale)

    def _digest(self) -> None:
        """Where r doubled since the last time it did: was the fall steeper?"""
        for radius, energy in self.pending:
            doubled = (radius >= 2 * self.radius) & (radius > 0)
            slope = (self.energy - energy) / (radius - self.radius)
            doublings = torch.where(self.radius > 0, (radius / self.radius).log2().floor(), 0.0)
            steeper = (slope > 0) & (slope >= self.slope * STEEPER**doublings)
            self.streak = torch.where(doubled, torch.where(steeper, self.streak + doublings, 0.0), self.streak)
            self.slope = torch.where(doubled, slope, self.slope)
            self.radius, self.energy = torch.where(doubled, radius, self.radius), torch.where(doubled, energy, self.energy)
        self.pending.clear()
