"""BAOAB: the discretised law of a harmonic oscillator, the momentum as state, noise, faults and bad input."""

import math

import pytest
import torch
from conftest import same_bits
from models import ConditionalQuadratic, gaussian

import ebmfast as ef
from ebmfast import rng

N = 20_000


def draw(e, sampler, steps=60, n=N, shape=(1,), seed=0, **options):
    options = {"init": "normal", "energies": False} | options
    return ef.sample(e, n=n, shape=shape, sampler=sampler, steps=steps, seed=seed, **options)


@pytest.mark.parametrize(("h", "k", "mass", "temperature", "friction"), [
    (0.5, 1.0, 1.0, 1.0, 1.0), (1.0, 1.0, 1.0, 1.0, 1.0), (1.8, 1.0, 1.0, 1.0, 1.0), (0.8, 3.0, 1.0, 0.5, 0.7),
    (1.0, 4.0, 9.0, 2.0, 1.5), (1.0, 1.0, 1.0, 1.0, 10.0)])
def test_the_discretised_law_of_a_harmonic_oscillator(h, k, mass, temperature, friction):
    """Positions have variance T/k at every stable step, momenta mT(1 - h²k/4m). ABOBA has the two exchanged, and an Euler
    scheme is off at first order, so neither passes (5 standard errors are 0.05 T/k)."""
    r = draw(gaussian(0.7, k), ef.BAOAB(h, friction, mass, temperature), steps=150)
    x, p = r.x.double(), r.state.extra["momentum"].double()
    for value, mean, variance in ((x, 0.7, temperature / k), (p, 0.0, mass * temperature * (1 - h * h * k / (4 * mass)))):
        assert abs(value.mean().item() - mean) < 5 * math.sqrt(variance / N), value.mean()
        assert abs(value.var().item() - variance) < 5 * variance * math.sqrt(2 / N), (value.var().item(), variance)
    assert abs((x * p).mean().item()) < 5 * math.sqrt(temperature / k * mass * temperature / N)
    assert r.report.effective_temperature == pytest.approx((temperature, temperature)) and r.acceptance is None


def test_compositions():
    """All of them harmonic, so exact."""
    a, b = gaussian(-1.0, 1.0), gaussian(2.0, 3.0)
    for e, mean, variance in ((a & b, 5 / 4, 1 / 4), (b & ef.negate(a, 0.5), 6.5 / 2.5, 1 / 2.5)):
        x = draw(e, ef.BAOAB(0.8), steps=80).x.double()
        assert abs(x.mean().item() - mean) < 5 * math.sqrt(variance / N)
        assert abs(x.var().item() - variance) < 5 * variance * math.sqrt(2 / N)


def test_noise_comes_from_the_streams_of_the_contract():
    """With a flat energy a chain moves by its momentum alone, before and after one refreshment of it."""
    flat, h, friction, mass, t = ef.Concept(lambda x: 0.0 * x.sum(1), name="flat"), 0.5, 2.0, 4.0, 3.0
    r = ef.sample(flat, x=torch.zeros(5, 6), sampler=ef.BAOAB(h, friction, mass, t), steps=1, seed=3, first_chain=9)
    before = math.sqrt(mass * t) * rng.normal((6,), 5, seed=3, step=0, stream=rng.MOMENTUM, first_chain=9)
    keep = math.exp(-friction * h)
    kick = math.sqrt((1 - keep**2) * mass * t) * rng.normal((6,), 5, seed=3, step=0, first_chain=9)
    after = keep * before + kick
    torch.testing.assert_close(r.state.extra["momentum"], after)
    torch.testing.assert_close(r.x, h / 2 * (before + after) / mass)


@pytest.mark.parametrize("sampler", [ef.BAOAB(0.3), ef.MALA(0.3), ef.HMC(0.3, 2, warmup=ef.DualAveraging(9))],
                         ids=lambda s: type(s).__name__)
def test_chains_of_numbers(sampler):
    """S may have no dimension."""
    r = ef.sample(ef.Concept(lambda x: x.square() / 2), n=5, shape=(), sampler=sampler, steps=40, seed=0)
    assert r.x.shape == (5,) and r.x.isfinite().all()


def test_one_gradient_per_step():
    model = ConditionalQuadratic()
    draw(ef.Concept(model), ef.BAOAB(0.3), n=3, steps=20, shape=(2,), check=False)
    assert model.calls == 21  # and the first


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_two_halves_equal_the_whole(tmp_path, backend):
    e, sampler = gaussian(0.0) | gaussian(2.0, 3.0), ef.BAOAB(0.4, mass=torch.tensor([1.0, 3.0]))
    whole = draw(e, sampler, n=40, steps=10, shape=(2,), backend=backend)
    half = draw(e, sampler, n=40, steps=4, shape=(2,), backend=backend)
    half.state.save(tmp_path / "state")
    for state in (half.state, ef.SampleState.load(tmp_path / "state")):
        kept = state.extra["momentum"].clone()
        rest = ef.sample(e, resume=state, sampler=sampler, steps=6, backend=backend)
        assert same_bits(rest.x, whole.x) and same_bits(rest.state.extra["momentum"], whole.state.extra["momentum"])
        assert same_bits(state.extra["momentum"], kept)
    other = ef.sample(e, resume=half.state, sampler=ef.Langevin(0.1), steps=1)
    assert other.state.extra == {}
    assert "momentum" in ef.sample(e, resume=other.state, sampler=sampler, steps=1).state.extra


def test_a_chain_is_the_same_in_any_batch_and_after_an_interrupt():
    family = ef.Family(ConditionalQuadratic(3.0), "f")
    rows = torch.randn(24, 2, generator=torch.Generator().manual_seed(0))
    e, options = family[ef.Slot("c")], dict(sampler=ef.BAOAB(0.3), shape=(2,), n=None)
    whole = draw(e, conditions={"c": rows}, steps=5, **options)
    for first, last in ((0, 1), (5, 14)):
        part = draw(e, conditions={"c": rows[first:last]}, first_chain=first, steps=5, **options)
        assert same_bits(part.x, whole.x[first:last])
    assert same_bits(draw(e, conditions={"c": rows}, batch_size=7, steps=5, **options).x, whole.x)

    def interrupt(info):
        if info.step == 3 and info.first_chain == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(e, conditions={"c": rows}, batch_size=7, steps=5, callback=interrupt, **options)


def test_frozen_elements_never_move():
    x, frozen = torch.randn(200, 3), torch.rand(200, 3) < 0.5
    r = ef.sample(gaussian(0.0), x=x, sampler=ef.BAOAB(0.5), steps=30, seed=0, frozen_mask=frozen)
    assert torch.equal(r.x[frozen], x[frozen]) and (r.x[~frozen] != x[~frozen]).all()
    assert (r.state.extra["momentum"][frozen] == 0).all()


def test_faults():
    def cliff(x):
        return 0.5 * x.square().sum(1) * torch.where(x[:, 0] > 6, torch.nan, 1.0)

    e = gaussian(0.0, 0.01) & ef.Concept(cliff, name="cliff")
    x = torch.zeros(50, 1)
    x[7] = 7.0
    options = dict(x=x, sampler=ef.BAOAB(0.3), steps=40, seed=0)
    with pytest.raises(ef.NonFiniteError, match="first at step 0, from the concept cliff") as error:
        ef.sample(e, **options)
    assert error.value.chains == [7]
    kept = ef.sample(e, on_nonfinite="freeze", energies=False, **options)
    assert kept.x[7] == 7.0 and [f.chain for f in kept.report.faults] == [7]
    anew = ef.sample(e, on_nonfinite="restart", **options)
    others = torch.arange(50) != 7
    assert anew.x[7].abs() < 6 and same_bits(anew.x[others], kept.x[others])
    with pytest.raises(ef.NonFiniteError):  # a step that is not stable ends there too
        ef.sample(gaussian(0.0), x=torch.ones(3, 1), sampler=ef.BAOAB(3.0, 0.1), steps=200, seed=0)


@pytest.mark.parametrize(("make", "error", "message"), [
    (lambda: ef.BAOAB(0.1, friction=0.0), ValueError, "`friction` must be positive, got 0"),
    (lambda: ef.BAOAB(0.1, mass=torch.tensor([1.0, -1.0])), ValueError, "`mass` must be positive"),
    (lambda: draw(gaussian(0.0), ef.BAOAB(0.0), n=2), ValueError, "`step_size` must be positive at every step"),
    (lambda: draw(gaussian(0.0), ef.BAOAB(), n=2), ValueError, "the sampler needs `step_size`"),
    (lambda: draw(gaussian(0.0), ef.BAOAB(0.1, temperature=0.0), n=2), ValueError, "`temperature` must be positive"),
    (lambda: draw(gaussian(0.0), ef.BAOAB(0.1, mass=torch.ones(3)), n=2), ValueError, r"`mass` must broadcast to \[1\]"),
    (lambda: ef.BAOAB(0.1, clamp=(0, 1)), TypeError, "unexpected keyword argument"),
])
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()
