"""The runaway guard: improper compositions are caught with finite states, hard but ordinary burn-ins never are."""

import pytest
import torch
from conftest import same_bits
from models import gaussian

import ebmfast as ef

IMPROPER = gaussian(0.0) & ef.negate(gaussian(0.0), 2.0)  # -x²/2
SAMPLERS = {
    "langevin": ef.Langevin(step_size=0.05),
    "mala": ef.MALA(0.05),
    "hmc": ef.HMC(0.05, 5),
    "baoab": ef.BAOAB(0.15),
}


def draw(e, sampler, steps, n=64, shape=(1,), seed=0, **options):
    options = {"init": "normal", "energies": False, "allow_improper": True} | options
    return ef.sample(e, n=n, shape=shape, sampler=sampler, steps=steps, seed=seed, **options)


@pytest.mark.parametrize("size", [1, 8])
@pytest.mark.parametrize("name", SAMPLERS)
def test_an_improper_negation_is_caught(name, size):
    with pytest.raises(ef.RunawayError, match=r"ran away.*Ground the negation.*bounds=\(low, high\)") as error:
        draw(IMPROPER, SAMPLERS[name], 600, shape=(size,))
    assert isinstance(error.value, ef.NonFiniteError) and error.value.faults[0].reason == "ran away"
    assert len(error.value.chains) >= 1 and 48 <= error.value.step < 600


def test_the_policies_and_the_report():
    r = draw(IMPROPER, SAMPLERS["mala"], 600, on_nonfinite="freeze")
    assert {f.reason for f in r.report.faults} == {"ran away"} and f"{len(r.report.faults)} ran away" in str(r.report)
    assert len(r.report.faults) > 40 and r.x.isfinite().all() and r.x.abs().max() < 1e6
    anew = draw(IMPROPER, SAMPLERS["mala"], 200, on_nonfinite="restart")
    assert anew.x.abs().max() < 1e3
    part = draw(IMPROPER, SAMPLERS["mala"], 200, n=9, first_chain=20, on_nonfinite="restart")
    assert same_bits(part.x, anew.x[20:29]), "a verdict on one chain does not depend on others"
    bounded = draw(IMPROPER, ef.MALA(0.05, bounds=(-3.0, 3.0)), 600, init="uniform")
    assert bounded.report.faults == [] and bounded.x.abs().max() <= 3


def test_a_linear_pit_is_caught_where_float32_ends():
    slope = ef.Concept(lambda x: -1e4 * x.sum(1), name="slope")
    with pytest.raises(ef.RunawayError):
        draw(slope, ef.Langevin(step_size=1.0), 400)


def rosenbrock(x):
    return 5 * (x[:, 1] - x[:, 0] ** 2).square() + (1 - x[:, 0]).square() / 2


BURN_INS = {
    "a start 1000 standard deviations away": (gaussian(0.0), torch.full((50, 3), 1000.0), 0.05, 800),
    "a mode 1000 standard deviations away": (gaussian(1000.0), torch.zeros(50, 3), 0.05, 800),
    "and slowly": (gaussian(1000.0), torch.zeros(50, 3), 0.001, 3000),
    "flat tails": (ef.Concept(lambda x: (1 + x.square().sum(1)).sqrt(), name="laplace"), torch.full((50, 3), 1e3), 2.0, 1500),
    "the top of a barrier": (ef.Concept(lambda x: 100 * (x.square() - 1).square().sum(1)), torch.zeros(50, 3), 1e-4, 1500),
    "steep walls": (ef.Concept(lambda x: x.pow(4).sum(1), name="quartic"), torch.full((50, 3), 10.0), 1e-3, 800),
    "a curved valley": (ef.Concept(rosenbrock, name="banana"), torch.full((50, 2), 8.0), 1e-4, 3000),
    "a negation that is grounded": (gaussian(0.0, 1.0) & ef.negate(gaussian(50.0, 0.9), 0.9), torch.zeros(50, 2), 0.1, 800),
}


@pytest.mark.parametrize("burn_in", BURN_INS)
@pytest.mark.parametrize("make", [lambda s: ef.Langevin(step_size=s), lambda s: ef.MALA(s), lambda s: ef.BAOAB(s**0.5 / 2)],
                         ids=["langevin", "mala", "baoab"])
def test_ordinary_burn_ins_are_not(burn_in, make):
    e, x, size, steps = BURN_INS[burn_in]
    r = ef.sample(e, x=x, sampler=make(size), steps=steps, seed=0, energies=False)
    assert r.report.faults == [] and r.x.isfinite().all()


def test_nor_chains_at_rest():
    e = (gaussian(0.0) | gaussian(3.0)) & ef.negate(gaussian(1.0, 0.5), 0.5)
    for sampler in (ef.Langevin(step_size=0.5), ef.MALA(0.5), ef.HMC(0.5, 3)):
        assert draw(e, sampler, 600, n=2000, shape=(5,)).report.faults == []
