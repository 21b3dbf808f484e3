"""Regressions of speed, by pytest-benchmark: `make bench-compare BASE=main` runs these against two commits in turns.

Only the public surface is used, so that the same file runs against an older commit.
"""

import pytest
import torch
from torch import nn

import ebmfast as ef

LANGEVIN = ef.Langevin(drift=1e-3, noise=0.02)


def networks(width, count=4, dim=2):
    torch.manual_seed(0)
    return ef.all_of([ef.Concept(ef.energies.MLP(dim, (width, width)), name=f"net{k}") for k in range(count)])


def pictures():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.SiLU(), nn.Flatten(), nn.Linear(16 * 64, 1)).requires_grad_(False)
    return ef.Concept(lambda x: layers(x)[:, 0], name="pictures")


CASES = {
    "double well 1024x32, 200 steps": (lambda: ef.Concept(ef.energies.DoubleWell()), LANGEVIN, 1024, (32,), 200),
    "AND of 4 2-128-128-1, 1024 chains, 20 steps": (lambda: networks(128), LANGEVIN, 1024, (2,), 20),
    "AND of 4 2-64-64-1, 64 chains, 1 step": (lambda: networks(64), LANGEVIN, 64, (2,), 1),
    "quadratic by autograd, 64x8, 100 steps": (
        lambda: ef.Concept(lambda x: 0.5 * x.square().sum(1), name="quadratic"), LANGEVIN, 64, (8,), 100),
    "convolution, 16 pictures, 10 steps": (pictures, LANGEVIN, 16, (3, 16, 16), 10),
    "MALA, AND of 4 2-64-64-1, 256 chains, 50 steps": (lambda: networks(64), ef.MALA(0.05), 256, (2,), 50),
    "HMC, AND of 4 2-64-64-1, 256 chains, 10 steps": (lambda: networks(64), ef.HMC(0.1, 5), 256, (2,), 10),
}


@pytest.mark.parametrize("name", CASES)
def test_a_prepared_run(benchmark, name):
    make, sampler, chains, shape, steps = CASES[name]
    torch.set_num_threads(1)
    x = torch.randn(chains, *shape, generator=torch.Generator().manual_seed(1))
    run = ef.prepare(make(), sampler, shape=shape, steps=steps, energies=False)
    assert run(x=x, seed=0).x.isfinite().all()
    benchmark(lambda: run(x=x, seed=0))


def test_planning(benchmark):
    expr = networks(64)
    benchmark(lambda: ef.prepare(expr, LANGEVIN, shape=(2,), steps=1))
