"""How well chains have mixed: split R̂ and effective sample size, of stored draws or while chains run.

Draws are `[chain, draw, ...]`, with as many quantities as there are further elements; a trace's energies are
`trace.energy.T`. Sources: Gelman et al., Bayesian Data Analysis, third edition, section 11.4 (split R̂); Vehtari et al.,
Bayesian Analysis 2021 (ranks, effective sample size); Geyer, Statistical Science 1992 (initial monotone sequence); Gupta
and Vats 2020, "Estimating Monte Carlo variance from multiple Markov chains" (replicated batch means).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

APART = 3.0  # where the means of chains vary by so much more than batches explain, they decide
BATCHES = 20  # of a chain, at least, for batch means: long ones have less bias, and chains are many


def split_rhat(draws: Tensor, rank: bool = False) -> Tensor:
    """Split R̂: each chain halved, R̂ = √(((N - 1)/N W + B/N) / W), N the length of a half.

    W is the mean of the variances within halves, B/N the variance of their means. With `rank`, draws are replaced by
    normal scores of their ranks first, which makes sense without moments too. NaN where nothing varies, or not all is finite.

    Args:
        draws: `[chain, draw, ...]`, 4 draws or more; of an odd number the middle one is left out.

    Returns:
        float64 `[...]`; below 1.01 is good.
    """
    draws = _checked(draws)
    halves = _halves(_normal_scores(draws) if rank else draws)
    return _where_varied(draws, _rhat(halves.mean(1), halves.var(1), halves.shape[1]))


def ess(draws: Tensor, rank: bool = False) -> Tensor:
    """Effective sample size of the mean of all draws, nN/τ, τ = -1 + 2 Σ_t (ρ_2t + ρ_2t+1).

    Autocorrelations are of all half chains together, so that chains that disagree count for little; the sum ends where
    Geyer's initial sequence does: at the first negative pair, each pair at most the one before.

    Args:
        draws: `[chain, draw, ...]`, 4 draws or more.
        rank: of the ranks' normal scores ("bulk").

    Returns:
        float64 `[...]`; NaN where nothing varies, or not all is finite.
    """
    draws = _checked(draws)
    halves = _halves(_normal_scores(draws) if rank else draws)
    m, n = halves.shape[:2]
    covariance = _autocovariance(halves).mean(0)
    within = covariance[0] * n / (n - 1)
    total = covariance[0] + halves.mean(1).var(0) if m > 1 else covariance[0]
    rho = 1 - (within - covariance) / total
    rho[0] = 1.0
    pairs = rho[:n // 2 * 2].unflatten(0, (-1, 2)).sum(1)
    positive = (pairs > 0).cumprod(0)
    pairs = pairs.clamp_min(0).cummin(0).values * positive
    tau = (2 * pairs.sum(0) - 1).clamp_min(1 / math.log10(m * n))
    return _where_varied(draws, torch.where(total > 0, m * n / tau, torch.nan))


def _where_varied(draws: Tensor, value: Tensor) -> Tensor:
    """`value` where draws are finite and not all the same, NaN elsewhere: rounding makes a little variance of nothing."""
    low, high = draws.amin((0, 1)), draws.amax((0, 1))
    return torch.where((high > low) & draws.isfinite().all(0).all(0), value, torch.nan)


@dataclass(frozen=True)
class Diagnostics:
    """What was seen of the energy and of Q quantities in `draws` draws of each of `chains` chains that ran through.

    `rhat` and `ess` are those of each quantity, shaped as one chain's `S` or as the summary's rows; `mean` and `std` too.
    """

    chains: int
    draws: int
    energy_rhat: float
    energy_ess: float
    rhat: Tensor
    ess: Tensor
    mean: Tensor
    std: Tensor

    def __str__(self):
        worst = f"R-hat at most {self.rhat.max():.3f}, effective draws at least {self.ess.min():,.0f}"
        energy = f"of the energy {self.energy_rhat:.3f} and {self.energy_ess:,.0f}"
        return f"{worst}, {energy}, {self.chains} chains x {self.draws} draws"


class Stream:
    """Moments of a number of draws that is known beforehand, as they come: nothing grows with it.

    Of each half of a chain mean and variance, so that R̂ is that of `split_rhat` to rounding; and the variance of means of
    batches of T/20 draws or √T, whichever is more, around the mean of all chains, from which the effective sample size is
    n T s²/(b var(batch means)). Batches that are not much longer than the autocorrelation overstate it; chains that
    disagree by more than three times what batches explain count as one draw each.
    """

    def __init__(self, chains: int, quantities: int, draws: int, device=None):
        self.draws, self.half, self.count = draws, draws // 2, 0
        self.length = max(1, math.isqrt(draws), draws // BATCHES)

        def zeros(*shape):
            return torch.zeros(*shape, chains, quantities, dtype=torch.float64, device=device)

        self.mean, self.squares = zeros(2), zeros(2)
        self.batch, self.batch_mean, self.batch_squares, self.batches = zeros(), zeros(), zeros(), 0

    def add(self, values: Tensor) -> None:
        """One draw `[B, Q]` of every chain."""
        values = values.double()
        seen, late = self.count, self.count - (self.draws - self.half)
        if seen < self.half:
            _welford(self.mean[0], self.squares[0], values, seen + 1)
        if late >= 0:
            _welford(self.mean[1], self.squares[1], values, late + 1)
        self.batch += values
        self.count += 1
        if self.count % self.length == 0:
            self.batches += 1
            _welford(self.batch_mean, self.batch_squares, self.batch / self.length, self.batches)
            self.batch.zero_()


def summarise(streams: list[Stream], keep: Tensor, shape: tuple[int, ...]) -> Diagnostics | None:
    """Streams of chains side by side, the energy their first quantity; `keep` `[n]`: chains that count."""
    if not streams or len({s.draws for s in streams}) > 1 or streams[0].half < 2:
        return None
    if any(s.count != s.draws for s in streams) or not keep.any():
        return None
    draws, half, length, batches = (getattr(streams[0], k) for k in ("draws", "half", "length", "batches"))

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(s, name) for s in streams], -2)[..., keep, :]

    mean, squares = joined("mean"), joined("squares")
    means, variances = mean.flatten(0, 1), squares.flatten(0, 1) / (half - 1)
    chains = mean.shape[1]
    variance = (half - 1) / half * variances.mean(0) + means.var(0)
    batch_mean, batch_squares = joined("batch_mean"), joined("batch_squares")
    spread = batch_squares.sum(0) + batches * (batch_mean - batch_mean.mean(0)).square().sum(0)
    long_run = length * spread / max(chains * batches - 1, 1)
    apart = draws * means.unflatten(0, (2, chains)).mean(0).var(0) if chains > 1 else long_run
    long_run = torch.where(apart > APART * long_run, apart, long_run)
    size = torch.where(long_run > 0, chains * draws * variance / long_run, torch.nan)
    size = size.clamp_max(chains * draws * math.log10(chains * draws))
    rhat = _rhat(means, variances, half)
    rest = {"rhat": rhat, "ess": size, "mean": means.mean(0), "std": variance.sqrt()}
    return Diagnostics(chains, draws, rhat[0].item(), size[0].item(), **{k: v[1:].reshape(shape) for k, v in rest.items()})


def _checked(draws) -> Tensor:
    draws = torch.as_tensor(draws).double()
    if draws.ndim < 2 or draws.shape[0] < 1 or draws.shape[1] < 4:
        raise ValueError(f"`draws` must be [chain, draw, ...] with 4 draws or more, got {list(draws.shape)}")
    return draws


def _halves(draws: Tensor) -> Tensor:
    half = draws.shape[1] // 2
    return torch.cat([draws[:, :half], draws[:, draws.shape[1] - half:]])


def _rhat(means: Tensor, variances: Tensor, n: int) -> Tensor:
    """From means and variances of m sequences of length n, `[m, ...]`."""
    within = variances.mean(0)
    return (((n - 1) / n * within + means.var(0)) / within).sqrt()


def _normal_scores(draws: Tensor) -> Tensor:
    """Φ⁻¹((r - 3/8)/(S + 1/4)), r the average rank among all S draws."""
    flat = draws.flatten(0, 1)
    rank = torch.empty_like(flat)
    for q in range(math.prod(flat.shape[1:])):
        column = flat.reshape(len(flat), -1)[:, q]
        _, inverse, counts = column.unique(return_inverse=True, return_counts=True)
        last = counts.cumsum(0).double()
        rank.view(len(flat), -1)[:, q] = (last - (counts - 1) / 2)[inverse]
    return torch.special.ndtri((rank - 0.375) / (len(flat) + 0.25)).reshape(draws.shape)


def _autocovariance(draws: Tensor) -> Tensor:
    """Σ_i (x_i - m)(x_i+t - m)/N for all lags t, along dimension 1."""
    n = draws.shape[1]
    centred = draws - draws.mean(1, keepdim=True)
    spectrum = torch.fft.rfft(centred, 2 * n, dim=1)
    return torch.fft.irfft(spectrum.abs().square(), 2 * n, dim=1)[:, :n] / n


def _welford(mean: Tensor, squares: Tensor, values: Tensor, count: int) -> None:
    delta = values - mean
    mean += delta / count
    squares += delta * (values - mean)
