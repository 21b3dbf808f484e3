"""Constants of branches against closed forms, and what they mend."""

import json
import math

import pytest
import torch
from models import NoisedGaussian, gaussian

import ebmfast as ef
from ebmfast import calibration
from ebmfast.calibration import mbar

SIGMAS = (2.0, 1.0, 0.5)
SHIFTS = {2.0: 0.7, 1.0: -1.2, 0.5: 2.0}


class Shifted(torch.nn.Module):
    """N(c, s²) with noise of variance σ², and a constant of its own at every level: what score matching leaves free."""

    def __init__(self, std, shift):
        super().__init__()
        self.exact, self.shift = NoisedGaussian(std), shift

    def forward(self, x, condition, sigma):
        levels = torch.tensor(list(SHIFTS), dtype=x.dtype)
        constant = torch.tensor(list(SHIFTS.values()), dtype=x.dtype)[(sigma[:, None] - levels).abs().argmin(1)]
        return self.exact(x, condition, sigma) + self.shift * constant


def branches(dim=3):
    a = ef.Concept(Shifted(0.5, 0.0), [0.0] * dim, "a")
    b = ef.Concept(Shifted(0.8, 1.0), [0.6] + [0.0] * (dim - 1), "b")
    return a, b


def exact_difference(sigma, dim=3):
    """log Z_a - log Z_b of `branches`."""
    return 0.5 * dim * math.log((0.25 + sigma**2) / (0.64 + sigma**2)) + SHIFTS[sigma]


def data(n, seed, dim=3):
    g = torch.Generator().manual_seed(seed)
    return [0.5 * torch.randn(n, dim, generator=g),
            0.8 * torch.randn(n, dim, generator=g) + torch.tensor([0.6] + [0.0] * (dim - 1))]


@pytest.mark.parametrize("source", ["data", "sampler"])
def test_constants_of_noised_gaussians_at_every_level(source):
    sampler = ef.Annealed(SIGMAS, steps_per_level=40, inner=ef.MALA)
    given = {"data": data(2000, 1), "sigmas": SIGMAS} if source == "data" else {"sampler": sampler, "n": 1000, "shape": (3,)}
    found = ef.calibrate(branches(), seed=3, **given)
    assert found.sigmas == SIGMAS and found.log_z.shape == (3, 2) and torch.allclose(found.log_z.sum(1), torch.zeros(3).double())
    value, error = found.difference(0, 1)
    for sigma, v, e, node in zip(SIGMAS, value.tolist(), error.tolist(), range(3)):
        assert e < 0.08 and abs(v - exact_difference(sigma)) < 4 * e, (sigma, v, e)
        stored = [ef.weights.weight_at(b.log_z, sigma) for b in found]
        assert stored == pytest.approx(found.log_z[node].tolist())


def test_points_are_those_after_the_last_step_of_each_level():
    a, b = branches()
    sampler = ef.Annealed(SIGMAS, steps_per_level=3)
    levels, points = calibration._sampled([a, b], (3,), sampler, None, 5, 7, 2, {})
    assert levels == SIGMAS and [len(p) for p in points] == [2, 2, 2]
    for i in range(3):
        for k, branch in enumerate((a, b)):
            stopped = ef.Annealed(SIGMAS[:i + 1], steps_per_level=3, denoise=False)
            x = ef.sample(branch, 5, (3,), stopped, seed=7 + k, batch_size=2).x
            torch.testing.assert_close(points[i][k], x)


def test_constants_hold_around_their_level():
    found = calibration._schedule((4.0, 1.0, 0.25), torch.tensor([3.0, 2.0, 1.0]))
    assert [found.at(s) for s in (9.0, 4.0, 2.1, 1.9, 1.0, 0.6, 0.4, 0.25, 0.01)] == [3, 3, 3, 2, 2, 2, 1, 1, 1]


def test_a_mixture_whose_constant_is_known():
    """A normalised mixture, 1.3 added to its energy, against a Gaussian: log Z are -1.3 and log(2 pi) for D = 2."""
    modes = ef.energies.GaussianMixture([[-1.0, 0.0], [1.0, 0.0]], covs=0.5, weights=[0.3, 0.7])
    mixture, wide = ef.Concept(lambda x: modes(x) + 1.3, name="mixture"), gaussian([0.0, 0.0])
    g = torch.Generator().manual_seed(0)
    which = (torch.rand(4000, generator=g) < 0.7).float() * 2 - 1
    x = math.sqrt(0.5) * torch.randn(4000, 2, generator=g) + torch.stack([which, torch.zeros(4000)], 1)
    found = ef.calibrate([mixture, wide], data=[x, torch.randn(2000, 2, generator=g)])
    value, error = found.difference(0, 1)
    assert found.sigmas == (None,) and found.samples == (4000, 2000)
    assert float(error) < 0.05 and abs(float(value) + 1.3 + math.log(2 * math.pi)) < 4 * float(error)


def test_standard_errors_are_calibrated():
    """z-scores over many independent sets of points have mean 0 and variance 1, for two and for four states."""
    for scales in ((0.5, 0.8), (0.5, 0.8, 1.0, 1.5)):
        std = torch.tensor(scales, dtype=torch.float64)
        counts, z = torch.tensor([60.0, 120.0, 80.0, 100.0][:len(std)]).double(), []
        g = torch.Generator().manual_seed(5)
        for _ in range(300):
            x = torch.cat([s * torch.randn(int(n), 2, generator=g).double() for s, n in zip(std, counts)])
            energies = 0.5 * x.square().sum(1, keepdim=True) / std.square()
            log_z, covariance, _ = mbar(energies, counts)
            contrast = torch.tensor([1.0] + [0.0] * (len(std) - 2) + [-1.0]).double()
            truth = 2 * math.log(scales[0] / scales[-1])
            z.append(float((contrast @ log_z - truth) / (contrast @ covariance @ contrast).sqrt()))
        z = torch.tensor(z)
        assert abs(float(z.mean())) < 4 / math.sqrt(300)
        assert 0.85 < float(z.std()) < 1.15  # 4 standard errors of a standard deviation are 0.16


def test_an_unbalanced_or_is_mended():
    """Two equal Gaussians far apart, one with 2 more energy at all levels: chains from noise choose it in a tenth of cases."""
    model = NoisedGaussian(0.3)
    left = ef.Concept(model, [-1.5, 0.0], "left")
    right = ef.Concept(lambda x, condition, sigma: model(x, condition, sigma) + 2.0, [1.5, 0.0], "right")
    sampler = ef.Annealed.geometric(4.0, 0.1, 10, steps_per_level=20)
    options = dict(n=600, shape=(2,), sampler=sampler, seed=0)

    def share(expression, **more):
        x = ef.sample(expression, **options, **more).x
        assert ((x[:, 0].abs() - 1.5).abs() < 1.3).all()
        return float((x[:, 0] > 0).float().mean())

    assert share(left | right) < 0.2
    calibrated = ef.calibrate([left, right], (2,), sampler=sampler, n=500, seed=1, bridges=2)
    a, b = calibrated
    value, error = calibrated.difference(0, 1)
    assert ((value - 2.0).abs() < 4 * error + 1e-3).all() and error[0] < 0.2
    assert 0.42 < share(a | b) < 0.58
    assert 0.42 < share(a | b, branches="draw") < 0.58
    weighted = ef.any_of([a, b], log_weights=[math.log(3.0), 0.0])
    assert abs(share(weighted, branches="draw") - 0.25) < 0.08


def test_bridges_join_branches_that_do_not_overlap():
    far = [gaussian([0.0] * 4, 4.0), gaussian([4.0] * 4, 1.0)]
    options = dict(shape=(4,), sampler=ef.MALA(0.2), steps=150, n=150, seed=0)
    with pytest.warns(UserWarning, match="do not overlap: log Z is not determined"):
        apart = ef.calibrate(far, **options)
    assert torch.isinf(apart.error).all() and torch.isinf(apart.difference(0, 1)[1]).all()
    joined = ef.calibrate(far, bridges=8, **options)
    value, error = joined.difference(0, 1)
    assert float(error) < 0.5 and abs(float(value) - 0.5 * 4 * math.log(1 / 4)) < 4 * float(error)


def test_a_calibrated_branch_is_a_tree_like_others():
    a, b = ef.calibrate(branches(), data=data(200, 0), sigmas=SIGMAS)
    both = ef.any_of([a, b], log_weights=[0.5, ef.AboveSigma(1.0, 0.2)], sharpness=2.0)
    models = [a.expression, b.expression]
    for expression in (a, both, a & b, ef.negate(a, 0.5) & b):
        again = ef.from_json(expression.to_json(), models)
        assert again == expression and hash(again) == hash(expression)
        assert ef.parse(repr(expression), models) == expression
    x = torch.randn(5, 3)
    for sigma in SIGMAS:
        ea, eb = (e.expression.energy(x, sigma) + ef.weights.weight_at(e.log_z, sigma) for e in (a, b))
        logits = torch.stack([0.5 - 2 * ea, (0.2 if sigma > 1 else 0.0) - 2 * eb])
        torch.testing.assert_close(both.energy(x, sigma), -torch.logsumexp(logits, 0) / 2)
        torch.testing.assert_close((a & b).energy(x, sigma), ea + eb)
        torch.testing.assert_close(a.gradient(x, sigma), a.expression.gradient(x, sigma))
    assert not a.program.has_or and a.program.constant_weights(1.0) == [1.0]
    assert json.loads(a.to_json())["relative_to"] == a.relative_to != ""


@pytest.mark.parametrize("engine, backend", [("step", "cpu"), ("step", "reference"), ("chain", "cpu")])
def test_engines_agree_on_calibrated_branches(engine, backend):
    a = ef.Calibrated(ef.Concept(ef.energies.Gaussian([0.0, 0.0]), name="a"), math.log(2 * math.pi))
    b = ef.Calibrated(ef.Concept(ef.energies.Gaussian([1.0, 0.0], 0.2), name="b"), math.log(2 * math.pi * 0.2))
    for expression in (a | b, a & 0.5 * b, (a | b) & a):
        r = ef.sample(expression, 40, (2,), ef.Langevin(0.05), 30, 0, engine=engine, backend=backend, trace=10)
        x = r.x.double()
        ea = 0.5 * x.square().sum(1) + math.log(2 * math.pi)
        eb = 2.5 * (x - torch.tensor([1.0, 0.0])).square().sum(1) + math.log(0.4 * math.pi)
        either = -torch.logsumexp(-torch.stack([ea, eb]), 0)
        wanted = {a | b: either, a & 0.5 * b: ea + 0.5 * eb, (a | b) & a: either + ea}[expression]
        torch.testing.assert_close(r.energy.double(), wanted, rtol=1e-4, atol=1e-4)
        plain = ef.sample(expression, 40, (2,), ef.Langevin(0.05), 30, 0, engine="step", backend="reference")
        torch.testing.assert_close(r.x, plain.x, rtol=1e-3, atol=1e-4)


def test_proportions_of_absolute_constants_are_exact():
    """Gaussians of variance 1 and 0.04 count as equal, not by their volumes, once their constants are known."""
    a = ef.Calibrated(gaussian([0.0, 0.0]), math.log(2 * math.pi))
    b = ef.Calibrated(gaussian([9.0, 0.0], 25.0), math.log(2 * math.pi / 25))
    x = ef.sample(a | b, 2000, (2,), ef.MALA(0.05), 50, 0, branches="draw").x
    assert abs(float((x[:, 0] > 5).float().mean()) - 0.5) < 5 * math.sqrt(0.25 / 2000)


def test_what_cannot_be_calibrated_says_so():
    a, b = branches()
    slotted = ef.Family(Shifted(0.5, 0.0), "f", condition_dim=3)[ef.Slot("c")]
    points = data(20, 0)
    for wanted, arguments in [
        ("two branches or more", dict(expressions=[a], data=points[:1])),
        ("has the slot 'c'", dict(expressions=[a, slotted], data=points)),
        ("`sampler` or `data` must be given", dict(expressions=[a, b])),
        ("2 tensors", dict(expressions=[a, b], data=points[:1])),
        ("`bridges` are sampled", dict(expressions=[a, b], data=points, bridges=2)),
        ("`sigmas` go with `data`", dict(expressions=[a, b], sampler=ef.MALA(0.1), sigmas=[1.0])),
    ]:
        with pytest.raises(ValueError, match=wanted):
            ef.calibrate(**arguments)
    known, other = ef.calibrate([a, b], data=points, sigmas=SIGMAS)
    elsewhere = ef.calibrate([a, b], data=points, sigmas=SIGMAS, seed=1)[0]
    with pytest.raises(ValueError, match="calibrated apart"):
        known | elsewhere
    sampler = ef.Annealed(SIGMAS, 2)
    with pytest.raises(ValueError, match="1 of 2 are calibrated"):
        ef.prepare(known | b, sampler, branches="draw")
    with pytest.raises(ValueError, match="these are calibrated"):
        ef.prepare(known | other, sampler, branches=ef.DrawBranches([0.0, 0.0]))
    with pytest.raises(ValueError, match="calibrate with_prior"):
        ef.with_prior(known & other, a).energy(points[0], 1.0)
    with pytest.raises(ValueError, match="is calibrated already"):
        ef.Calibrated(known, 0.0)
