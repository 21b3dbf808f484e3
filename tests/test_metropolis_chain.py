"""MALA and HMC in the chain engine: the decisions and states of the step engine from the same noise, and its laws.

Both engines compute in float32 and order their sums differently. A decision flips where log u and the log ratio agree to some 1e-6,
which the seeds below do not meet; but for that, states agree as those of Langevin dynamics do.
"""

import dataclasses
import math

import pytest
import torch
from conftest import same_bits
from test_chain import concept, perceptron, seeded
from torch import nn

import ebmfast as ef
from ebmfast import energies as E
from ebmfast._native import core

TOLERANCE = dict(rtol=5e-5, atol=5e-5)
WARM = ef.DualAveraging(12)
SAMPLERS = {
    "mala": ef.MALA(0.4),
    "mala_cold": ef.MALA(0.4, temperature=0.5),
    "mala_schedule": ef.MALA([0.1, 0.6, 0.3, 0.2, 0.5, 0.4]),
    "mala_bounds": ef.MALA(0.5, bounds=(-1.0, 1.2)),
    "mala_clip_value": ef.MALA(0.5, grad_clip_value=0.4),
    "mala_clip_norm": ef.MALA(0.5, grad_clip_norm=0.7),
    "hmc": ef.HMC(0.3, 3),
    "hmc_one": ef.HMC(0.6, 1, temperature=2.0),
    "hmc_mass": ef.HMC(0.4, 2, mass=torch.tensor([0.5, 2.0, 1.0])),
    "hmc_bounds": ef.HMC(0.4, 2, bounds=(-1.0, 1.2)),
}


def mixed(slot=False):
    """Every kind of node and unit: an OR of a sum with a network, and a mixture."""
    net = concept(lambda: E.MLP(3, (17, 9), condition_dim=2, conditioning="film"), 1, "net", ef.Slot("c") if slot else [0.3, -1.0])
    base = ef.Concept(E.Gaussian([0.5, -1.0, 2.0], [0.7, 2.0, 1.0]), name="base")
    modes = ef.Concept(E.GaussianMixture([[0.0, 1.0, 0.0], [1.0, -1.0, 1.0]], [0.5, 2.0], [1.0, 3.0]), name="modes")
    return (base & 0.5 * net) | (modes & ef.negate(ef.Concept(E.Harmonic(0.3), name="well"), 0.5))


def pair(expr, sampler, n=70, shape=(3,), steps=6, seed=5, **options):
    start = "normal" if sampler.bounds is None else "uniform"
    ours, theirs = (ef.sample(expr, n=n, shape=shape, sampler=sampler, steps=steps, seed=seed, init=start, **which, **options)
                    for which in ({"engine": "chain"}, {"backend": "reference"}))
    assert ours.report.engine == "chain" and theirs.report.engine == "step"
    return ours, theirs


def agree(*args, **options):
    ours, theirs = pair(*args, **options)
    torch.testing.assert_close(ours.x, theirs.x, **TOLERANCE)
    torch.testing.assert_close(ours.energy, theirs.energy, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours.acceptance, theirs.acceptance)
    assert 0.05 < ours.acceptance.mean() and len(ours.acceptance.unique()) > 1
    return ours


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_option(name):
    agree(mixed(), SAMPLERS[name])
    agree(ef.Concept(E.Rosenbrock(0.5, 3.0)), SAMPLERS[name], n=40)  # sums only


@pytest.mark.parametrize("isa", [name for name, supported, _ in core.levels() if supported], indirect=True)
@pytest.mark.parametrize("name", ["mala_clip_norm", "hmc_mass"])
def test_every_level(name, isa):
    agree(mixed(), SAMPLERS[name])


@pytest.mark.parametrize("make", [lambda s: ef.MALA(s * s), lambda s: ef.HMC(s, 2)], ids=["mala", "hmc"])
def test_shapes_and_sizes(make):
    for size in (1, 2, 5, 13):
        net = concept(lambda size=size: perceptron(size, 12, 1, activation=nn.Tanh), 3)
        agree(net & ef.Concept(E.Gaussian(torch.zeros(size), torch.eye(size) + 0.3)), make(1.2), shape=(size,), n=33, steps=9)
    agree(ef.Concept(E.DoubleWell()), make(0.4), shape=(2, 3), n=40)


MASKS = {"one": torch.tensor([True, False, False]), "own": torch.arange(210).reshape(70, 3) % 4 == 0}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("name", ["mala_clip_norm", "mala_bounds", "hmc_mass", "hmc_bounds"])
def test_frozen_elements(name, mask):
    sampler, x = SAMPLERS[name], torch.linspace(-0.9, 1.1, 210).reshape(70, 3)
    options = dict(x=x, sampler=sampler, steps=6, seed=2, frozen_mask=mask)
    ours, theirs = ef.sample(mixed(), **options, engine="chain"), ef.sample(mixed(), **options, backend="reference")
    torch.testing.assert_close(ours.x, theirs.x, **TOLERANCE)
    assert torch.equal(ours.x[mask.expand(70, 3)], x[mask.expand(70, 3)]) and torch.equal(ours.acceptance, theirs.acceptance)


@pytest.mark.parametrize("name", ["mala", "hmc_mass"])
def test_bits_do_not_depend_on_batch_threads_or_where_calls_are_cut(name, threads):
    expr, rows = mixed(slot=True), seeded(lambda: torch.randn(100, 2))
    options = dict(sampler=SAMPLERS[name], shape=(3,), seed=3)
    whole = ef.sample(expr, conditions={"c": rows}, steps=40, **options)
    assert whole.report.engine == "chain"
    for first, last in ((0, 1), (17, 80)):
        part = ef.sample(expr, conditions={"c": rows[first:last]}, first_chain=first, steps=40, **options)
        assert same_bits(part.x, whole.x[first:last]) and torch.equal(part.acceptance, whole.acceptance[first:last])
    torch.set_num_threads(2)
    cut = ef.sample(expr, conditions={"c": rows}, batch_size=33, trace=1, steps=40, **options)  # a call per step
    assert same_bits(cut.x, whole.x) and torch.equal(cut.acceptance, whole.acceptance)
    torch.testing.assert_close(cut.trace.energy[-1], whole.energy)
    half = ef.sample(expr, conditions={"c": rows}, steps=13, **options)
    rest = ef.sample(expr, resume=half.state, sampler=options["sampler"], steps=27)
    assert same_bits(rest.x, whole.x)
    torch.testing.assert_close((13 * half.acceptance + 27 * rest.acceptance) / 40, whole.acceptance)


@pytest.mark.parametrize("sampler", [ef.MALA(0.4), ef.HMC(0.3, 3)], ids=["mala", "hmc"])
def test_a_warm_up(sampler):
    """One adaptation is that of the step engine; rounding grows from there, as step sizes answer decisions. Then: the law."""
    warm = dataclasses.replace(sampler, warmup=ef.DualAveraging(1))
    ours, theirs = pair(mixed(), warm, steps=1)
    torch.testing.assert_close(ours.step_size, theirs.step_size, rtol=1e-4, atol=0)
    torch.testing.assert_close(ours.state.extra["warmup"], theirs.state.extra["warmup"], rtol=1e-4, atol=1e-5)
    two, other = pair(mixed(), dataclasses.replace(sampler, warmup=ef.DualAveraging(3)), steps=3)
    torch.testing.assert_close(two.step_size, other.step_size, rtol=1e-2, atol=0)

    warm = dataclasses.replace(sampler, warmup=ef.DualAveraging(120))
    e = ef.Concept(E.Gaussian([0.7], 1.0))
    r = ef.sample(e, n=4000, shape=(1,), init="normal", sampler=warm, steps=160, seed=0, engine="chain")
    same = ef.sample(e, n=4000, shape=(1,), init="normal", sampler=warm, steps=160, seed=0, engine="step", energies=False)
    assert abs(r.acceptance.mean() - same.acceptance.mean()) < 0.01 and r.step_size.std() > 0
    assert abs(r.step_size.log().mean() - same.step_size.log().mean()) < 0.02
    assert abs(r.x.mean() - 0.7) < 5 / math.sqrt(4000) and abs(r.x.var() - 1) < 5 * math.sqrt(2 / 4000)
    half = ef.sample(e, n=4000, shape=(1,), init="normal", sampler=warm, steps=50, seed=0, engine="chain")
    rest = ef.sample(e, resume=half.state, sampler=warm, steps=110)
    assert same_bits(rest.x, r.x) and same_bits(rest.step_size, r.step_size) and torch.equal(rest.acceptance, r.acceptance)


@pytest.mark.parametrize("sampler", [ef.MALA(1.2), ef.HMC(0.9, 3)], ids=["mala", "hmc"])
def test_the_law(sampler):
    """As in test_metropolis: at these steps any wrong term moves the variance by more than five standard errors."""
    x = ef.sample(ef.Concept(E.Gaussian([0.7], 1.0)), n=20_000, shape=(1,), init="normal", sampler=sampler, steps=60, seed=0).x
    assert abs(x.mean() - 0.7) < 5 / math.sqrt(20_000)
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / 20_000)


@pytest.mark.parametrize("sampler", [ef.MALA(0.3), ef.HMC(0.3, 2)], ids=["mala", "hmc"])
def test_faults(sampler):
    """A start whose target is not finite is a fault of its leaf; a proposal there is rejected."""
    cliff = ef.Concept(nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1)), name="cliff")
    with torch.no_grad():
        for p, value in zip(cliff.source.model.parameters(), (1e25, -2e25, 3e30, 0.0)):
            p.fill_(value)  # E is infinite beyond 2
    e, x = ef.Concept(E.Gaussian([0.0], 1.0), name="base") & cliff, torch.zeros(50, 1)
    r = ef.sample(e, x=x, sampler=sampler, steps=60, seed=0)
    assert r.report.engine == "chain" and r.report.faults == [] and (r.x < 2.01).all() and r.x.max() > 1.5
    x[7] = 7.0
    with pytest.raises(ef.NonFiniteError, match="first at step 0, from the concept cliff") as error:
        ef.sample(e, x=x, sampler=sampler, steps=40, seed=0)
    assert error.value.chains == [7]
    frozen = ef.sample(e, x=x, sampler=sampler, steps=40, seed=0, on_nonfinite="freeze", energies=False)
    assert frozen.x[7] == 7.0 and frozen.acceptance[7] == 0 and frozen.acceptance[8] > 0
    anew = ef.sample(e, x=x, sampler=sampler, steps=40, seed=0, on_nonfinite="restart")
    assert anew.x[7] < 2.01 and [f.chain for f in anew.report.faults] == [7] and same_bits(anew.x[8:], frozen.x[8:])


@pytest.mark.parametrize("sampler", [ef.MALA(0.05), ef.HMC(0.05, 5)], ids=["mala", "hmc"])
def test_chains_that_run_away_are_caught(sampler):
    e = ef.Concept(E.Harmonic(1.0), name="a") & ef.negate(ef.Concept(E.Harmonic(1.0), name="b"), 2.0)
    options = dict(n=64, shape=(2,), init="normal", sampler=sampler, steps=600, seed=0, allow_improper=True, engine="chain")
    with pytest.raises(ef.RunawayError):
        ef.sample(e, **options)
    r = ef.sample(e, **options, on_nonfinite="freeze", energies=False)
    assert len(r.report.faults) > 40 and r.x.abs().max() < 1e6


def test_explain_and_what_stays_in_the_step_engine():
    e = ef.Concept(E.DoubleWell(), name="well")
    for sampler in (ef.MALA(0.1), ef.HMC(0.1, 2)):
        run = ef.prepare(e, sampler, shape=(2,), steps=2)
        assert "chain engine yes" in run.explain() and run(3, 0).report.engine == "chain"
    heavy = ef.HMC(0.1, 2, mass=torch.ones(3))
    with pytest.raises(ValueError, match=r"`mass` must broadcast to \[2\], got \[3\]"):
        ef.sample(e, n=2, shape=(2,), sampler=heavy, steps=1)
    with pytest.raises(ValueError, match="BAOAB.* takes its steps in the step engine"):
        ef.sample(e, n=2, shape=(2,), sampler=ef.BAOAB(0.1), steps=1, engine="chain")
    annealed = ef.Annealed([1.0], inner=ef.MALA)
    assert ef.sample(e, n=2, shape=(2,), sampler=annealed, seed=0).report.engine == "step"


@pytest.mark.parametrize("name", ["mala", "mala_schedule", "mala_bounds", "hmc_mass"])
def test_quick_calls_equal_the_general_path(name):
    sampler, x, c = SAMPLERS[name], torch.rand(37, 3), {"c": torch.randn(37, 2)}
    run = ef.prepare(mixed(slot=True), sampler, shape=(3,), steps=6)
    general = run(x=x, seed=3, conditions=c, first_chain=2)
    quick = run._quick[6](None, 3, c, x, 2)
    for field in ("x", "energy", "leaf_energies", "acceptance"):
        assert same_bits(getattr(quick, field), getattr(general, field)), field
    assert len(quick.acceptance.unique()) > 1 and quick.step_size is None
    assert vars(quick.report) | {"seconds": 0} == vars(general.report) | {"seconds": 0}
    if "schedule" not in name:  # which has no more steps
        more, other = (ef.sample(mixed(slot=True), resume=r.state, sampler=sampler, steps=2) for r in (quick, general))
        assert same_bits(more.x, other.x)


def test_calls_that_are_watched_or_warm_up_are_not_quick():
    e = ef.Concept(E.DoubleWell(), name="well")
    for sampler, steps in ((ef.MALA(0.1), 17), (ef.HMC(0.1, 2, warmup=WARM), 5), (ef.MALA(0.1), 0), (ef.MALA(lambda t: 0.1), 2)):
        run = ef.prepare(e, sampler, shape=(2,), steps=steps)
        assert run(x=torch.zeros(3, 2), seed=0).x.shape == (3, 2) and not run._quick
    run = ef.prepare(e, ef.MALA(0.1), shape=(2,), steps=16)
    run(x=torch.zeros(3, 2), seed=0)
    with pytest.raises(ef.NonFiniteError, match="from the concept well"):
        run(x=torch.full((3, 2), 1e20), seed=0)
