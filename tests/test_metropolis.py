"""MALA and HMC: exact laws at step sizes where unadjusted chains are far off, one decision per chain, and bad input.

Bounds of the laws are five standard errors; every wrong term of an acceptance ratio moves a variance by more.
"""

import dataclasses
import math

import pytest
import torch
from conftest import same_bits
from models import ConditionalQuadratic, gaussian

import ebmfast as ef
from ebmfast import rng

N = 20_000
SAMPLERS = {
    "mala": ef.MALA(1.2),
    "hmc": ef.HMC(0.9, n_leapfrog_steps=3),
    "hmc_mass": ef.HMC(1.5, n_leapfrog_steps=2, mass=torch.tensor([3.0])),
}


def draw(e, sampler, steps=60, n=N, shape=(1,), seed=0, **options):
    options = {"init": "normal", "energies": False} | options
    return ef.sample(e, n=n, shape=shape, sampler=sampler, steps=steps, seed=seed, **options)


def check_moments(x, mean, variance):
    """Both moments within five standard errors, from the fourth moment of the sample."""
    x = x.double().flatten()
    assert abs(x.mean().item() - mean) < 5 * math.sqrt(variance / len(x)), (x.mean().item(), mean)
    spread = (x - mean).square()
    assert abs(spread.mean().item() - variance) < 5 * spread.std().item() / math.sqrt(len(x)), (spread.mean().item(), variance)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_law_is_exact_at_any_step_size(name, temperature):
    """Unadjusted Langevin at this step has a variance 1.4 times too large."""
    sampler = dataclasses.replace(SAMPLERS[name], temperature=temperature)
    result = draw(gaussian(0.7), sampler)
    check_moments(result.x, 0.7, temperature)
    assert 0.5 < result.acceptance.mean() < 0.995 and result.acceptance.shape == (N,)
    assert result.report.effective_temperature == pytest.approx((temperature, temperature))


@pytest.mark.parametrize("sampler", [ef.MALA(0.3), ef.HMC(0.25, 3)], ids=["mala", "hmc"])
def test_compositions(sampler):
    a, b = gaussian(-1.0, 1.0), gaussian(2.0, 3.0)
    check_moments(draw(a & b, sampler, steps=80).x, 5 / 4, 1 / 4)
    quotient = gaussian(0.0, 3.0) & ef.negate(gaussian(1.0, 1.0), 0.5)
    check_moments(draw(quotient, sampler, steps=80).x, -0.2, 1 / 2.5)
    mixture = ef.any_of([gaussian(-0.75, 4.0), gaussian(0.75, 4.0)], log_weights=[math.log(3), 0.0])
    x = draw(mixture, sampler, steps=300, n=N // 2).x
    check_moments(x, -0.375, 0.25 + 0.75**2 - 0.375**2)


@pytest.mark.parametrize("name", ["mala", "hmc"])
def test_bounds_give_the_truncated_law(name):
    """A half-normal has mean √(2/π) and variance 1 - 2/π. Proposals outside are rejected, so no chain leaves."""
    sampler = ef.MALA(0.8, bounds=(0.0, 50.0)) if name == "mala" else ef.HMC(0.6, 2, bounds=(0.0, 50.0))
    start = torch.rand(N, 1, generator=torch.Generator().manual_seed(0))
    x = ef.sample(gaussian(0.0), x=start, sampler=sampler, steps=150, seed=0, energies=False).x
    assert (x >= 0).all()
    check_moments(x, math.sqrt(2 / math.pi), 1 - 2 / math.pi)


@pytest.mark.parametrize("clip", [{"grad_clip_value": 0.4}, {"grad_clip_norm": 0.4}])
def test_a_clipped_drift_enters_the_proposal_s_density(clip):
    check_moments(draw(gaussian(0.0), ef.MALA(0.8, **clip), steps=100).x, 0.0, 1.0)


@pytest.mark.parametrize("name", ["mala", "hmc"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_every_chain_decides_for_itself(name, backend):
    """The same decisions in any batch; some chains accept a proposal that others reject."""
    e = ConditionalQuadratic(3.0)
    family = ef.Family(e, "f")
    rows = torch.randn(24, 2, generator=torch.Generator().manual_seed(0))
    options = dict(sampler=SAMPLERS[name], steps=3, shape=(2,), backend=backend, n=None)
    whole = draw(family[ef.Slot("c")], conditions={"c": rows}, **options)
    assert len(whole.acceptance.unique()) > 1 and set((3 * whole.acceptance).round().tolist()) <= {0, 1, 2, 3}
    for first, last in ((0, 1), (5, 14)):
        part = draw(family[ef.Slot("c")], conditions={"c": rows[first:last]}, first_chain=first, **options)
        assert same_bits(part.x, whole.x[first:last]) and torch.equal(part.acceptance, whole.acceptance[first:last])
    cut = draw(family[ef.Slot("c")], conditions={"c": rows}, batch_size=7, **options)
    assert same_bits(cut.x, whole.x) and torch.equal(cut.acceptance, whole.acceptance)


@pytest.mark.parametrize("name", SAMPLERS)
def test_two_halves_equal_the_whole(name):
    e = gaussian(0.0) | gaussian(2.0, 3.0)
    whole = draw(e, SAMPLERS[name], n=40, steps=10)
    half = draw(e, SAMPLERS[name], n=40, steps=4)
    rest = ef.sample(e, resume=half.state, sampler=SAMPLERS[name], steps=6)
    assert same_bits(rest.x, whole.x)
    torch.testing.assert_close((4 * half.acceptance + 6 * rest.acceptance) / 10, whole.acceptance)


def test_noise_comes_from_the_streams_of_the_contract():
    """With a flat energy every proposal is accepted, so a chain adds exactly its noise, or its momentum."""
    flat, x = ef.Concept(lambda x: 0.0 * x.sum(1), name="flat"), torch.zeros(5, 6)
    moved = ef.sample(flat, x=x, sampler=ef.MALA(4.0), steps=1, seed=3, first_chain=9)
    torch.testing.assert_close(moved.x, 2 * rng.normal((6,), 5, seed=3, step=0, first_chain=9))
    moved = ef.sample(flat, x=x, sampler=ef.HMC(0.5, 4, mass=4.0), steps=1, seed=3, first_chain=9)
    momentum = 2 * rng.normal((6,), 5, seed=3, step=0, stream=rng.MOMENTUM, first_chain=9)
    torch.testing.assert_close(moved.x, 4 * 0.5 * momentum / 4.0)
    assert moved.acceptance.tolist() == [1.0] * 5


def test_leapfrog_is_of_second_order():
    """|ΔH| of trajectories of one length falls with ε²: halving the step divides it by 4."""
    e = ef.Concept(lambda x: (x**4 / 4 + x**2 / 2).sum(1), name="quartic")
    run = ef.prepare(e, ef.HMC(0.1, 1), shape=(1,), steps=1)
    x = torch.linspace(0.2, 1.5, 200, dtype=torch.float64)[:, None]
    errors = []
    for size, count in ((0.2, 4), (0.1, 8)):
        sampler = ef.HMC(size, count)
        backend, options = ef.backends.resolve("reference", "cpu"), {"seed": 1, "first_chain": 0}
        kernel = sampler.bind(run.plan.bind(x), backend, sampler.coefficients(e, 1), 0, **options)
        kernel.init(x)
        _, _, log_ratio = kernel.propose(x, kernel.target(x), 0, size**2 / 2, size, 1.0)
        errors.append(log_ratio.abs().mean().item())
    assert 3.3 < errors[0] / errors[1] < 4.7, errors


@pytest.mark.parametrize("name", ["mala", "hmc"])
def test_frozen_elements_never_move(name):
    x, frozen = torch.randn(200, 3), torch.tensor([True, False, False])
    moved = ef.sample(gaussian(0.0), x=x, sampler=SAMPLERS[name], steps=30, seed=0, frozen_mask=frozen)
    assert torch.equal(moved.x[:, 0], x[:, 0]) and (moved.x[:, 1:] != x[:, 1:]).float().mean() > 0.9
    assert moved.acceptance.mean() > 0.4


def cliff(x):
    """Infinite beyond 3, NaN beyond 6."""
    e = 0.5 * x.square().sum(1)
    e = torch.where(x[:, 0] > 3, torch.full_like(e, torch.inf), e)
    return torch.where(x[:, 0] > 6, torch.full_like(e, torch.nan), e)


@pytest.mark.parametrize("name", ["mala", "hmc"])
def test_proposals_that_are_not_finite_are_rejected_and_starts_are_faults(name):
    e = gaussian(0.0, 0.01) & ef.Concept(cliff, name="cliff")
    x = torch.zeros(50, 1)
    result = ef.sample(e, x=x, sampler=SAMPLERS[name], steps=40, seed=0)
    assert (result.x <= 3).all() and result.report.faults == []
    x[7] = 7.0
    with pytest.raises(ef.NonFiniteError, match="first at step 0, from the concept cliff") as error:
        ef.sample(e, x=x, sampler=SAMPLERS[name], steps=40, seed=0)
    assert error.value.chains == [7]
    frozen = ef.sample(e, x=x, sampler=SAMPLERS[name], steps=40, seed=0, on_nonfinite="freeze", energies=False)
    assert frozen.x[7] == 7.0 and frozen.acceptance[7] == 0 and frozen.acceptance[8] > 0
    anew = ef.sample(e, x=x, sampler=SAMPLERS[name], steps=40, seed=0, on_nonfinite="restart")
    assert anew.x[7] <= 3 and [f.chain for f in anew.report.faults] == [7]


@pytest.mark.parametrize(("make", "message"), [
    (lambda: ef.MALA(1.0, bounds=(1.0, 0.0)), "`bounds` must be .low, high. with low < high"),
    (lambda: ef.MALA(1.0, grad_clip_norm=0.0), "`grad_clip_norm` must be positive"),
    (lambda: ef.HMC(1.0, 0), "`n_leapfrog_steps` must be a positive integer, got 0"),
    (lambda: ef.HMC(1.0, mass=-1.0), "`mass` must be positive"),
    (lambda: draw(gaussian(0.0), ef.MALA(0.0), n=2), "`step_size` must be positive at every step"),
    (lambda: draw(gaussian(0.0), ef.HMC(0.1, temperature=0.0), n=2), "`temperature` must be positive at every step"),
    (lambda: draw(gaussian(0.0), ef.HMC(0.1, mass=torch.ones(3)), n=2), r"`mass` must broadcast to \[1\], got \[3\]"),
])
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_clamp_and_noise_first_are_not_theirs():
    for sampler in (ef.MALA, ef.HMC):
        for option in ({"clamp": (0, 1)}, {"noise_first": True}):
            with pytest.raises(TypeError, match="unexpected keyword argument"):
                sampler(0.1, **option)
