"""Energies with closed forms, shared by the tests."""

import torch
from torch import nn

import ebmfast as ef


class Quadratic(nn.Module):
    """E(x) = p/2 |x - m|²: a Gaussian of mean m and precision p."""

    def __init__(self, mean, precision=1.0):
        super().__init__()
        self.mean = nn.Parameter(torch.as_tensor(mean, dtype=torch.float32))
        self.precision = precision

    def forward(self, x):
        return 0.5 * self.precision * (x - self.mean.to(x.dtype)).square().flatten(1).sum(1)


class ConditionalQuadratic(nn.Module):
    """E(x | c) = p/2 |x - c|², and p/2 |x|²/4 without a condition; counts its calls."""

    def __init__(self, precision=1.0):
        super().__init__()
        self.precision = precision
        self.calls = 0

    def forward(self, x, condition=None, keep=None):
        self.calls += 1
        free = 0.125 * self.precision * x.square().sum(1)
        if condition is None:
            return free
        bound = 0.5 * self.precision * (x - condition).square().sum(1)
        return bound if keep is None else keep * bound + (1 - keep) * free


class Net(nn.Module):
    """A small smooth network E(x | c)."""

    def __init__(self, dim=5, condition_dim=3, width=16, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        sizes = [(width, dim + condition_dim), (width, width), (1, width)]
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(s, generator=generator) / s[1] ** 0.5) for s in sizes)

    def forward(self, x, condition):
        h = torch.cat([x, condition], 1)
        for w in self.weights[:-1]:
            h = torch.nn.functional.silu(h @ w.to(x.dtype).T)
        return h @ self.weights[-1].to(x.dtype).T + 0.5 * x.square().sum(1, keepdim=True)


class NoisedGaussian(nn.Module):
    """E(x | c, σ) of N(c, s²) convolved with N(0, σ²): the exact energy at every noise level."""

    def __init__(self, std=0.5):
        super().__init__()
        self.variance = std**2

    def forward(self, x, condition, sigma):
        return 0.5 * (x - condition).square().sum(1) / (self.variance + sigma**2)


def gaussian(mean, precision=1.0, name=None):
    return ef.Concept(Quadratic(mean, precision), name=name or f"N({mean})")
