"""R-hat and effective sample size against their definitions and autoregressions of known size; streaming equals stored."""

import math

import numpy
import pytest
import torch
from conftest import same_bits
from models import gaussian

import ebmfast as ef
from ebmfast import diagnostics
from ebmfast.diagnostics import Stream, summarise


def autoregression(phi, chains, draws, seed=0):
    """x' = φ x + √(1 - φ²) z from equilibrium: of N(0, 1), and an effective share (1 - φ)/(1 + φ) of its draws."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(chains, draws, dtype=torch.float64, generator=generator)
    x = z.clone()
    for t in range(1, draws):
        x[:, t] = phi * x[:, t - 1] + math.sqrt(1 - phi**2) * z[:, t]
    return x


def streamed(draws):
    stream = Stream(draws.shape[0], math.prod(draws.shape[2:]), draws.shape[1])
    for t in range(draws.shape[1]):
        stream.add(draws[:, t].flatten(1))
    return summarise([stream], torch.ones(len(draws), dtype=torch.bool), (stream.mean.shape[-1] - 1,))


def test_split_rhat_is_its_definition():
    """Written out with numpy, for an odd number of draws too: the middle one counts for nothing."""
    draws = torch.randn(3, 21, 2, generator=torch.Generator().manual_seed(1)) + torch.tensor([0.0, 0.5, 1.0])[:, None, None]
    for q in range(2):
        halves = [h.double().numpy() for c in draws[:, :, q] for h in (c[:10], c[11:])]
        within = numpy.mean([numpy.var(h, ddof=1) for h in halves])
        between = 10 * numpy.var([h.mean() for h in halves], ddof=1)
        expected = math.sqrt((9 / 10 * within + between / 10) / within)
        assert diagnostics.split_rhat(draws)[q].item() == pytest.approx(expected, rel=1e-12)
    assert diagnostics.split_rhat(torch.ones(2, 8)).isnan()


def test_rhat_sees_chains_that_disagree_and_chains_that_drift():
    good = autoregression(0.3, 4, 1000)
    assert diagnostics.split_rhat(good) < 1.01 and diagnostics.split_rhat(good, rank=True) < 1.01
    apart = good + torch.tensor([0.0, 0.0, 0.0, 1.0])[:, None]
    drift = good + torch.linspace(0, 2, 1000)
    for bad in (apart, drift):
        assert diagnostics.split_rhat(bad) > 1.05 and diagnostics.split_rhat(bad, rank=True) > 1.05
    heavy = torch.distributions.Cauchy(0.0, 1.0).icdf(torch.rand(4, 1000, generator=torch.Generator().manual_seed(2)))
    assert diagnostics.split_rhat(heavy, rank=True) < 1.01, "ranks need no moments"


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9, -0.4])
def test_effective_sample_size_of_an_autoregression(phi):
    draws = torch.stack([autoregression(phi, 16, 4000, seed) for seed in range(8)], 2)
    expected = 16 * 4000 * (1 - phi) / (1 + phi)
    assert diagnostics.ess(draws).mean().item() == pytest.approx(expected, rel=0.08)
    assert diagnostics.ess(draws, rank=True).mean().item() == pytest.approx(expected, rel=0.08)
    assert streamed(draws).ess.mean().item() == pytest.approx(expected, rel=0.2)  # of 320 batches: a spread of 8 % each


def test_chains_that_disagree_are_worth_little():
    draws = autoregression(0.3, 4, 1000) + torch.tensor([-3.0, -1.0, 1.0, 3.0])[:, None]
    assert diagnostics.ess(draws) < 20 and streamed(draws[:, :, None].expand(-1, -1, 2)).energy_ess < 20


@pytest.mark.parametrize("draws", [4, 7, 100, 1001])
def test_streaming_gives_the_rhat_of_stored_draws(draws):
    values = 100 + torch.randn(5, draws, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).cumsum(1)
    result, stored = streamed(values), diagnostics.split_rhat(values)
    torch.testing.assert_close(torch.cat([torch.tensor([result.energy_rhat]), result.rhat]).double(), stored, rtol=1e-6, atol=0)


@pytest.mark.parametrize("sampler", [ef.MALA(0.6), ef.Langevin(step_size=0.3), ef.BAOAB(0.5)], ids=lambda s: type(s).__name__)
def test_a_run_is_diagnosed_as_its_trace_is(sampler):
    e = gaussian(0.5) & gaussian(-0.5)
    options = dict(n=12, shape=(2, 3), steps=207, sampler=sampler, seed=0, init="normal")
    stored = ef.sample(e, trace=ef.Trace(2, states=True), **options)
    r = ef.sample(e, trace=ef.Trace(2, energy=False, diagnostics=True), batch_size=5, **options)
    found = r.trace.diagnostics
    assert r.trace.energy is None and r.trace.x is None and (found.chains, found.draws) == (12, 103)
    torch.testing.assert_close(found.rhat, diagnostics.split_rhat(stored.trace.x.transpose(0, 1)), rtol=1e-5, atol=0)
    assert found.energy_rhat == pytest.approx(diagnostics.split_rhat(stored.trace.energy.T).item(), rel=1e-5)
    half = stored.trace.x[:51], stored.trace.x[52:]
    torch.testing.assert_close(found.mean, torch.cat(half).double().mean((0, 1)), rtol=1e-5, atol=1e-6)
    assert found.ess.shape == (2, 3) and (found.ess > 20).all() and "R-hat at most" in str(found)
    assert same_bits(r.x, stored.x), "watching changes nothing"


def test_a_summary_and_what_is_left_out():
    def summary(x):
        return torch.stack([x.mean(1), x.square().mean(1)], 1)

    options = dict(n=8, shape=(4,), sampler=ef.MALA(0.5), seed=0, init="normal")
    r = ef.sample(gaussian(0.0), steps=50, trace=ef.Trace(1, diagnostics=True, summary=summary), **options)
    assert r.trace.diagnostics.rhat.shape == (2,) and r.trace.energy.shape == (50, 8)
    assert r.trace.diagnostics.mean[1] == pytest.approx(1.0, abs=0.4)
    assert ef.sample(gaussian(0.0), steps=3, trace=ef.Trace(1, diagnostics=True), **options).trace.diagnostics is None
    assert r.trace.diagnostics.draws == 50

    def cliff(x):
        return 0.5 * x.square().sum(1) * torch.where(x[:, 0] > 6, torch.nan, 1.0)

    x = torch.zeros(8, 4)
    x[3] = 7.0
    r = ef.sample(ef.Concept(cliff), x=x, sampler=ef.MALA(0.5), steps=50, seed=0, on_nonfinite="freeze", energies=False,
                  trace=ef.Trace(1, diagnostics=True))
    assert r.trace.diagnostics.chains == 7 and r.trace.diagnostics.rhat.isfinite().all()


def test_what_arviz_takes():
    r = ef.sample(gaussian(0.0), n=3, shape=(2,), sampler=ef.MALA(0.5), steps=6, seed=0, trace=ef.Trace(2, states=True))
    groups = r.trace.arviz()
    assert groups["posterior"]["x"].shape == (3, 3, 2) and groups["posterior"]["energy"].shape == (3, 3)
    assert isinstance(groups["posterior"]["x"], numpy.ndarray)
    numpy.testing.assert_array_equal(groups["posterior"]["x"][1, 2], r.x[1].numpy())
    numpy.testing.assert_array_equal(groups["sample_stats"]["lp"], -groups["posterior"]["energy"])


def test_the_energies_of_a_trace_are_those_of_its_states():
    """MALA and HMC know them, also while a chain is frozen or drawn anew."""
    e = gaussian(0.0) | gaussian(2.0, 3.0)
    for sampler in (ef.MALA(0.5), ef.HMC(0.5, 2), ef.BAOAB(0.5), ef.Langevin(0.1)):
        r = ef.sample(e, n=9, shape=(2,), sampler=sampler, steps=6, seed=0, trace=ef.Trace(2, states=True))
        for energy, x in zip(r.trace.energy, r.trace.x):
            torch.testing.assert_close(energy, e.energy(x))


def test_the_progress_bar_shows_energy_and_acceptance(capsys):
    from ebmfast import driver
    patience, driver.Bar.PATIENCE = driver.Bar.PATIENCE, 0.0
    try:
        for sampler, engine in ((ef.MALA(0.5), "step"), (ef.Langevin(0.1), "step"), (ef.Langevin(0.1), "chain")):
            e = ef.Concept(ef.energies.Gaussian([0.0, 0.0], 1.0))
            ef.sample(e, n=4, shape=(2,), sampler=sampler, steps=40, seed=0, progress=True, engine=engine)
            shown = capsys.readouterr().err
            assert "energy=" in shown and ("acceptance=" in shown) == isinstance(sampler, ef.MALA)
    finally:
        driver.Bar.PATIENCE = patience


@pytest.mark.parametrize(("make", "message"), [
    (lambda: diagnostics.ess(torch.zeros(4)), r"`draws` must be \[chain, draw, ...\] with 4 draws or more, got \[4\]"),
    (lambda: diagnostics.split_rhat(torch.zeros(2, 3)), "4 draws or more"),
    (lambda: ef.Trace(summary=torch.mean), "`summary` belongs to diagnostics=True"),
    (lambda: ef.sample(gaussian(0.0), n=3, shape=(2,), sampler=ef.MALA(0.5), steps=6,
                       trace=ef.Trace(diagnostics=True, summary=lambda x: x[:1])), "`summary` must give one row per chain"),
])
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
