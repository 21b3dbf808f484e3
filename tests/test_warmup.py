"""Dual averaging: acceptances reach their target, chains adapt alone, and what they learnt is state."""

import dataclasses
import math
import signal

import pytest
import torch
from conftest import same_bits
from models import ConditionalQuadratic, NoisedGaussian, gaussian

import ebmfast as ef

N = 1000


def draw(e, sampler, steps, n=N, shape=(4,), seed=0, **options):
    options = {"init": "normal", "energies": False} | options
    return ef.sample(e, n=n, shape=shape, sampler=sampler, steps=steps, seed=seed, **options)


SAMPLERS = {
    "mala": lambda size, *warmup: ef.MALA(size, warmup=ef.DualAveraging(*warmup)),
    "hmc": lambda size, *warmup: ef.HMC(size, 3, warmup=ef.DualAveraging(*warmup)),
}


@pytest.mark.parametrize(("name", "target"), [("mala", None), ("mala", 0.8), ("hmc", None), ("hmc", 0.65)])
@pytest.mark.parametrize("size", [1e-3, 30.0])
def test_acceptance_reaches_its_target_and_the_law_is_exact(name, target, size):
    """From step sizes far too small and far too large. The average of ln s lags, so that acceptances end a little high."""
    k = torch.tensor([1.0, 2.0, 3.0, 4.0])
    e = ef.Concept(lambda x: (k * x.square()).sum(1) / 2, name="ellipse")
    r = draw(e, SAMPLERS[name](size, 600, target), 900, n=N)
    target = target or {"mala": 0.574, "hmc": 0.8}[name]
    assert -0.02 < r.acceptance.mean().item() - target < 0.08, r.acceptance.mean()
    assert r.step_size.shape == (N,) and 0.05 < r.step_size.median() < 4
    assert torch.quantile(r.step_size, 0.9) / torch.quantile(r.step_size, 0.1) < 2
    variance = r.x.double().square().mean(0) * k
    assert ((variance - 1).abs() < 5 * math.sqrt(2 / N)).all(), variance


def test_the_recursion_is_that_of_the_paper():
    """Algorithm 5 of Hoffman and Gelman 2014 with μ = ln 10 relative to the first step size, written out."""
    warmup, ratios = ef.DualAveraging(4), [-0.3, 0.2, math.nan, -math.inf, -1.0]
    state, h, average = warmup.begin(1, "cpu"), 0.0, 0.0
    for m, ratio in enumerate(ratios[:4], 1):
        warmup.update(state, torch.tensor([ratio]), 0.6)
        alpha = min(1.0, math.exp(ratio)) if ratio == ratio else 0.0
        h = (1 - 1 / (m + 10)) * h + (0.6 - alpha) / (m + 10)
        log = math.log(10) - math.sqrt(m) / 0.05 * h
        average = m**-0.75 * log + (1 - m**-0.75) * average
        if m < 4:
            torch.testing.assert_close(warmup.scale(state).item(), math.exp(log), rtol=1e-4, atol=0)
    frozen = warmup.scale(state).clone()
    torch.testing.assert_close(frozen.item(), math.exp(average), rtol=1e-4, atol=0)
    warmup.update(state, torch.tensor([ratios[4]]), 0.6)
    assert torch.equal(warmup.scale(state), frozen) and warmup.left(state) == 0


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("cut", [4, 8, 12], ids=["while it adapts", "as it ends", "after it"])
def test_two_halves_equal_the_whole(tmp_path, name, cut):
    e, sampler = gaussian(0.0) | gaussian(2.0, 3.0), SAMPLERS[name](0.3, 8)
    whole, half = draw(e, sampler, 16, n=40), draw(e, sampler, cut, n=40)
    half.state.save(tmp_path / "state")
    for state in (half.state, ef.SampleState.load(tmp_path / "state")):
        rest = ef.sample(e, resume=state, sampler=sampler, steps=16 - cut)
        assert same_bits(rest.x, whole.x) and same_bits(rest.step_size, whole.step_size)
        if cut >= 8:
            assert same_bits(half.step_size, whole.step_size), "frozen after the warm-up"


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_chain_adapts_alone(name):
    family = ef.Family(ConditionalQuadratic(3.0), "f")
    rows = torch.randn(24, 2, generator=torch.Generator().manual_seed(0))
    options = dict(sampler=SAMPLERS[name](0.3, 8), steps=16, shape=(2,), n=None)
    whole = draw(family[ef.Slot("c")], conditions={"c": rows}, **options)
    assert len(whole.step_size.unique()) > 12
    part = draw(family[ef.Slot("c")], conditions={"c": rows[5:14]}, first_chain=5, **options)
    assert same_bits(part.x, whole.x[5:14]) and same_bits(part.step_size, whole.step_size[5:14])
    cut = draw(family[ef.Slot("c")], conditions={"c": rows}, batch_size=7, **options)
    assert same_bits(cut.x, whole.x) and torch.equal(cut.acceptance, whole.acceptance)


def test_a_warm_up_begins_where_the_sampler_does():
    """After a burn-in with another sampler, whatever the count of steps."""
    burnt = draw(gaussian(0.0), ef.Langevin(0.1), 50, n=100)
    warm = ef.sample(gaussian(0.0), resume=burnt.state, sampler=SAMPLERS["mala"](0.01, 30), steps=30)
    assert (warm.step_size > 0.1).float().mean() > 0.9


def test_a_chain_drawn_anew_warms_up_anew():
    def cliff(x):
        return 0.5 * x.square().sum(1) * torch.where(x[:, 0] > 6, torch.nan, 1.0)

    x = torch.zeros(20, 1)
    x[7] = 7.0
    options = dict(sampler=SAMPLERS["mala"](0.5, 10), steps=15, seed=0, on_nonfinite="restart")
    r = ef.sample(ef.Concept(cliff, name="cliff"), x=x, **options)
    x[7] = 0.0
    plain = ef.sample(ef.Concept(cliff, name="cliff"), x=x, **options)
    others = torch.arange(20) != 7
    assert same_bits(r.x[others], plain.x[others]) and same_bits(r.step_size[others], plain.step_size[others])
    assert r.state.extra["warmup"][:, 3].tolist() == [10.0] * 20


def test_without_a_warm_up_there_is_nothing_to_see():
    r = draw(gaussian(0.0), ef.MALA(0.3), 3, n=5)
    assert r.step_size is None and r.state.extra == {}


def annealed(name, sigmas, per_level, warmup, drift=0.3, **options):
    inner = dataclasses.replace(SAMPLERS[name](None, warmup), step_size=None)
    return ef.Annealed(sigmas, per_level, drift=drift, inner=inner, **options)


@pytest.mark.parametrize("drift", [1e-3, 30.0])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_level_adapts_and_the_last_one_s_law_is_exact(name, drift):
    """Two noised N(±1, s²) multiply to a Gaussian of variance (s² + σ²)/2, not in proportion to σ²: the step sizes found are those
    of the last level alone."""
    family, sigma = ef.Family(NoisedGaussian(std=0.5), "g"), 0.3
    e, v, n = family(-1.0) & family(1.0), (0.25 + sigma**2) / 2, 300
    r = draw(e, annealed(name, [2.0, sigma], 220, 150, drift, denoise=False), None, n=n)
    target = {"mala": 0.574, "hmc": 0.8}[name]
    assert -0.05 < r.acceptance.mean().item() - target < 0.16, r.acceptance.mean()
    assert ((r.x.double().square().mean(0) / v - 1).abs() < 5 * math.sqrt(2 / n)).all()
    assert (r.state.extra["warmup"][:, 3] == 150).all()
    alone = draw(e, annealed(name, [sigma], 220, 150, drift, denoise=False), None, n=n)
    torch.testing.assert_close(r.step_size.log().mean(), alone.step_size.log().mean(), rtol=0, atol=0.1)


@pytest.mark.parametrize("name", SAMPLERS)
def test_nothing_of_a_level_s_warm_up_reaches_the_next(name):
    """A chain that is put at the narrow level with nothing learnt goes on as one that came from the wide level."""
    family, options = ef.Family(NoisedGaussian(std=0.1), "g"), dict(per_level=6, warmup=4, denoise=False)
    whole = draw(family(0.5), annealed(name, [2.0, 0.5], **options), None, n=50)
    begun = draw(family(0.5), annealed(name, [2.0], **options), None, n=50)
    state = dataclasses.replace(begun.state, target=12, extra={"warmup": torch.zeros(50, 4)})
    rest = ef.sample(family(0.5), resume=state, energies=False, sampler=annealed(name, [0.5, 0.5], **options))
    assert same_bits(rest.x, whole.x) and same_bits(rest.step_size, whole.step_size) and begun.step_size.unique().numel() > 1


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("at", [3, 5, 6, 8, 13], ids=["adapts", "frozen", "between levels", "adapts again", "denoises next"])
def test_an_interrupted_walk_with_warm_ups_goes_on(name, at):
    e, sampler = ef.Family(NoisedGaussian(std=0.3), "g")(0.5), annealed(name, [2.0, 0.5], 6, 4)
    whole = draw(e, sampler, None, n=20, batch_size=7, trace=5)

    def interrupt(info):
        if info.step == min(at, 12) and info.first_chain == 7:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(ef.Interrupted) as stopped:
        draw(e, sampler, None, n=20, batch_size=7, callback=interrupt)
    rest = ef.sample(e, resume=stopped.value.state, sampler=sampler, batch_size=7, energies=False)
    assert same_bits(rest.x, whole.x) and same_bits(rest.step_size, whole.step_size)
    assert whole.trace.steps.tolist() == [5, 10] and whole.trace.energy.isfinite().all()
    before = draw(e, dataclasses.replace(sampler, denoise=False), None, n=20)
    assert same_bits(before.step_size, whole.step_size), "the last step has a drift that is not the sampler's"


@pytest.mark.parametrize(("make", "message"), [
    (lambda: ef.DualAveraging(0), "`steps` of a warm-up must be a positive integer, got 0"),
    (lambda: ef.DualAveraging(10, 1.0), "`target` must be an acceptance between 0 and 1, got 1.0"),
    (lambda: ef.DualAveraging(10, kappa=0.5), "0.5 < kappa"),
    (lambda: ef.Annealed([1.0], 9, inner=ef.MALA(warmup=ef.DualAveraging(9))), "must be shorter than a level of 9 steps, got 9"),
])
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
