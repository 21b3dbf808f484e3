"""Accept or reject per chain: the specification against its law, the Triton kernel against the specification."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import KERNELS, require_backend, same_bits

import ebmfast as ef
from ebmfast import backends, reference, rng

NAN, INF = math.nan, math.inf


def run(name: str, x, proposal, log_ratio, **noise_id) -> torch.Tensor:
    noise_id = {"seed": 1, "step": 0, "first_chain": 0} | noise_id
    if name == "reference":
        return reference.metropolis_accept(x, proposal, log_ratio, **noise_id)
    require_backend(name)
    from ebmfast.kernels.accept import accept

    moved, proposal, log_ratio = (t.to(backends.home(name)) for t in (x, proposal, log_ratio))
    accepted = torch.zeros(len(x), dtype=torch.bool, device=moved.device)
    noise_id = {k: v.to(moved.device) if torch.is_tensor(v) else v for k, v in noise_id.items()}
    accept(moved, proposal, log_ratio, accepted, **noise_id)
    x.copy_(moved)
    return accepted.cpu()


NAMES = ["reference", *(name for name in KERNELS if name == "triton")]


@pytest.mark.parametrize("log_ratio", [-3.0, -0.5, -0.01])
def test_the_rate_is_the_ratio(log_ratio):
    n, p = 200_000, math.exp(log_ratio)
    accepted = run("reference", torch.zeros(n, 1), torch.ones(n, 1), torch.full((n,), log_ratio))
    assert abs(float(accepted.double().mean()) - p) < 5 * math.sqrt(p * (1 - p) / n)


def test_it_is_the_uniform_of_its_stream():
    """Against ln u in float64, away from ties."""
    n = 50_000
    u = rng.uniform((), n, seed=9, step=4, stream=rng.ACCEPT, first_chain=7).double()
    log_ratio = torch.linspace(-5, 1, n)
    accepted = run("reference", torch.zeros(n, 1), torch.ones(n, 1), log_ratio, seed=9, step=4, first_chain=7)
    margin = u.log() - log_ratio.double()
    assert torch.equal(accepted[margin.abs() > 1e-6], margin[margin.abs() > 1e-6] < 0)


@pytest.mark.parametrize("name", NAMES)
def test_edges(name):
    """r >= 0 always accepts, NaN and -inf never do; a proposal that is not taken may be anything."""
    log_ratio = torch.tensor([0.0, -0.0, 1e-9, INF, NAN, -INF]).repeat_interleave(300)
    x, proposal = torch.zeros(1800, 2), torch.ones(1800, 2)
    proposal[1200:] = NAN
    accepted = run(name, x, proposal, log_ratio)
    assert accepted[:1200].all() and not accepted[1200:].any()
    assert (x[:1200] == 1).all() and (x[1200:] == 0).all()


@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (300, 2), (9, 3, 7), (3, 257), (2, 3, 37, 41)], ids=str)
@pytest.mark.parametrize("name", NAMES[1:])
def test_parity(name, shape):
    """Shapes as in test_step: tails of a Philox block, several chains in a tile, several tiles in a chain."""
    generator = torch.Generator().manual_seed(0)
    x, proposal = torch.randn((2, *shape), generator=generator)
    log_ratio = -torch.rand(shape[0], generator=generator)
    noise_id = {"seed": 2**63 + 5, "step": 2**32 - 1, "first_chain": 2**32 - 2}
    y = x.clone()
    expected = run("reference", y, proposal, log_ratio, **noise_id)
    assert torch.equal(run(name, x, proposal, log_ratio, **noise_id), expected) and same_bits(x, y)
    if shape[0] > 100:
        assert 0.2 < float(expected.double().mean()) < 0.8  # both branches were taken


@pytest.mark.parametrize("name", NAMES[1:])
def test_the_step_may_lie_on_the_device(name):
    x, proposal, log_ratio = torch.zeros(500, 1), torch.ones(500, 1), torch.full((500,), -0.7)
    expected = run(name, x.clone(), proposal, log_ratio, step=11)
    assert torch.equal(run(name, x, proposal, log_ratio, step=torch.tensor([11])), expected)
    assert not torch.equal(run(name, x, proposal, log_ratio, step=torch.tensor([12])), expected)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("shape", [(0, 4), (1,), (300, 2), (9, 3, 7)], ids=str)
def test_all_that_is_known_of_a_point_goes_along(name, shape):
    """The state and whatever comes with it, of any type; chains with a fault stay. As the reference does it."""
    backend = require_backend(name)
    device, generator = backends.home(name), torch.Generator().manual_seed(0)
    current = [torch.randn(shape, generator=generator), torch.randn(shape[0], generator=generator), torch.zeros(shape[0], 5).long()]
    proposed = [torch.randn_like(current[0]), torch.randn(shape[0]), torch.ones(shape[0], 5).long()]
    log_ratio = torch.randn(shape[0], generator=generator) - 0.5
    log_ratio[::7] = NAN
    faults = (torch.arange(shape[0]) % 5 == 4).long() * 77
    noise_id = {"seed": 2**63 + 5, "step": 2**32 - 1, "first_chain": 2**32 - 2}
    results = []
    for b, where in ((backend, device), (backends.resolve("reference", "cpu"), "cpu")):
        mine = [t.clone().to(where) for t in current]
        there = [t.to(where) for t in proposed]
        results.append([b.accept(mine, there, log_ratio.to(where), faults.to(where), **noise_id).cpu(), *(t.cpu() for t in mine)])
    (accepted, *mine), (expected, *theirs) = results
    assert torch.equal(accepted, expected) and not accepted[faults != 0].any()
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs))
    for old, new, now in zip(current, proposed, mine):
        assert torch.equal(now[accepted], new[accepted]) and torch.equal(now[~accepted], old[~accepted])


SAMPLERS = {
    "mala": ef.MALA(0.4, grad_clip_norm=2.0, bounds=(-3.0, 3.0)),
    "hmc": ef.HMC(0.4, 2, mass=2.0),
    "warm": ef.MALA(0.1, warmup=ef.DualAveraging(5)),
    "baoab": ef.BAOAB(0.4, mass=2.0),
    "annealed": ef.Annealed([1.0, 0.5], 3, inner=ef.MALA),
}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", KERNELS)
def test_every_sampler_on_every_backend(name, sampler):
    """The reference's chain, from the same noise and with the same decisions, a frozen element included."""
    require_backend(name)
    e = ef.Concept(lambda x: x.square().sum(1) / 2, name="a") | ef.Concept(lambda x: (x - 1).square().sum(1), name="b")
    options = dict(sampler=SAMPLERS[sampler], steps=None if sampler == "annealed" else 8, seed=4, first_chain=7)
    x = 0.5 * torch.randn(13, 5, generator=torch.Generator().manual_seed(0))
    frozen = torch.tensor([False, True, False, False, False])
    expected = ef.sample(e, x=x, backend="reference", frozen_mask=frozen, **options)
    home = backends.home(name)
    r = ef.sample(e, x=x.to(home), backend=name, frozen_mask=frozen.to(home), **options)
    torch.testing.assert_close(r.x.cpu(), expected.x, rtol=1e-4, atol=1e-5)
    for key, values in expected.state.extra.items():
        torch.testing.assert_close(r.state.extra[key].cpu(), values, rtol=1e-4, atol=1e-5)
    if expected.acceptance is not None:
        assert torch.equal(r.acceptance.cpu(), expected.acceptance) and 0 < expected.acceptance.mean()
