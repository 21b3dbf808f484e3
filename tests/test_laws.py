"""Chains against closed forms: products, mixtures and quotients of Gaussians, and the discretised law.

With energy p/2 |x - m|², step size λ and temperature T a chain is an autoregression whose stationary law is
exactly N(m, T/(p(1 - λp/4))): a wrong factor in drift or noise shows. Bounds are five standard errors.
"""

import math
import sys

import pytest
import torch
from models import NoisedGaussian, gaussian

import ebmfast as ef

N = 20_000
engine = None  # of the test that runs


@pytest.fixture(params=["step", "chain"], autouse=True)
def each_engine(request, monkeypatch):
    """Every law holds in both engines; energies that only the step engine knows are drawn there once."""
    monkeypatch.setattr(sys.modules[__name__], "engine", request.param)
    if request.param == "chain":
        if "annealing" in request.node.name or "denoising" in request.node.name:
            pytest.skip("an energy with a noise level")
        monkeypatch.setattr(sys.modules[__name__], "gaussian", native_gaussian)


def native_gaussian(mean, precision=1.0):
    return ef.Concept(ef.energies.Gaussian([mean], 1 / precision), name=f"N({mean})")


def draw(e, seed=0, steps=120, n=N, shape=(1,), **options):
    sampler = options.pop("sampler", None) or ef.Langevin(step_size=0.1)
    options |= {"init": "normal", "energies": False, "engine": engine}
    return ef.sample(e, n=n, shape=shape, sampler=sampler, steps=steps, seed=seed, **options).x


def check_gaussian(x, mean, variance):
    n = x.numel()
    assert abs(x.mean().item() - mean) < 5 * math.sqrt(variance / n), (x.mean().item(), mean)
    assert abs(x.var().item() - variance) < 5 * variance * math.sqrt(2 / n), (x.var().item(), variance)


def check_function(x, f, expected, deviation):
    """E f(x) within five standard errors and `deviation`, the bound on the discretisation's own error."""
    values = f(x.double())
    error = 5 * values.std().item() / math.sqrt(values.numel())
    assert abs(values.mean().item() - expected) < error + deviation, (values.mean().item(), expected, error)


def stationary(p, step, temperature=1.0):
    return temperature / (p * (1 - step * p / 4))


@pytest.mark.parametrize(("p", "step", "temperature"), [(1, 0.1, 1), (1, 1.0, 1), (4, 0.3, 1), (2, 0.4, 0.25), (1, 0.5, 3)])
def test_the_discretised_law_of_langevin(p, step, temperature):
    x = draw(gaussian(1.5, p), sampler=ef.Langevin(step_size=step, temperature=temperature), steps=int(30 / (p * step)) + 20)
    check_gaussian(x, 1.5, stationary(p, step, temperature))


def test_drift_and_noise_apart():
    eta = 0.3  # x - ηx + √(2η) z on N(0, 1): variance 1/(1 - η/2)
    x = draw(gaussian(0.0), sampler=ef.Langevin(drift=eta, noise=math.sqrt(2 * eta)))
    check_gaussian(x, 0.0, 1 / (1 - eta / 2))


def test_noise_first():
    eta, sigma, p = 0.3, 0.5, 2.0
    x = draw(gaussian(0.0, p), sampler=ef.Langevin(drift=eta, noise=sigma, noise_first=True))
    shrink = (1 - eta * p) ** 2
    check_gaussian(x, 0.0, shrink * sigma**2 / (1 - shrink))


def test_the_paper_preset_is_the_rule_as_printed():
    x = draw(gaussian(0.0), sampler=ef.Langevin.paper(step_size=0.5))
    check_gaussian(x, 0.0, stationary(1, 0.5))


def test_conjunction_is_the_product():
    a, b = gaussian(-1.0, 1.0), gaussian(2.0, 3.0)
    check_gaussian(draw(a & b), (-1 * 1 + 2 * 3) / 4, stationary(4, 0.1))


def test_weights_are_powers():
    check_gaussian(draw(ef.all_of([gaussian(1.0, 1.0), gaussian(0.0, 2.0)], weights=[3.0, 0.5])), 0.75, stationary(4, 0.1))


def test_negation_is_the_quotient():
    a, b = gaussian(0.0, 3.0), gaussian(1.0, 1.0)
    p = 3.0 - 0.5
    check_gaussian(draw(a & ef.negate(b, 0.5)), (0 * 3 - 0.5 * 1) / p, stationary(p, 0.1))


def test_with_prior_divides_the_prior_out():
    a, b, prior = gaussian(1.0, 2.0), gaussian(-1.0, 3.0), gaussian(0.5, 1.0)
    p = 2 + 3 - 1
    check_gaussian(draw(ef.with_prior(a & b, prior)), (2 * 1 - 3 * 1 - 0.5) / p, stationary(p, 0.1))


def test_disjunction_is_the_mixture():
    step, p = 0.05, 4.0
    mixture = ef.any_of([gaussian(-0.75, p), gaussian(0.75, p)], log_weights=[math.log(3), 0.0])
    x = draw(mixture, sampler=ef.Langevin(step_size=step), steps=600)
    check_function(x, lambda v: (v > 0).double(), 0.25 * 0.93319 + 0.75 * 0.06681, 0.01)
    check_function(x, lambda v: v, -0.375, 0.01)
    check_function(x, lambda v: v * v, 0.75**2 + 1 / p, 0.05 * stationary(p, step))


def density_moments(log_density, low=-6.0, high=6.0):
    grid = torch.linspace(low, high, 20001, dtype=torch.float64)
    weight = torch.softmax(log_density(grid[:, None]), 0)
    return (weight * grid).sum().item(), (weight * grid**2).sum().item()


def test_disjunction_inside_negation_inside_conjunction():
    a, b, c = gaussian(0.0, 2.0), gaussian(1.0, 1.0), gaussian(2.5, 0.5)
    e = a & ef.negate(b | c, 0.6)
    first, second = density_moments(lambda x: -e.energy(x))
    x = draw(e, sampler=ef.Langevin(step_size=0.05), steps=400)
    check_function(x, lambda v: v, first, 0.005)
    check_function(x, lambda v: v * v, second, 0.03 * second)
    assert abs(first) > 0.02, "the negated mixture must shift the mean, or this shows nothing"


def test_temperature_and_sharpness_of_a_mixture():
    e = ef.any_of([gaussian(-0.5, 4.0), gaussian(0.5, 4.0)], sharpness=2.0)
    _, second = density_moments(lambda x: -e.energy(x) / 0.5)
    x = draw(e, sampler=ef.Langevin(step_size=0.05, temperature=0.5), steps=500)
    check_function(x, lambda v: v * v, second, 0.04 * second)


@pytest.mark.parametrize("steps_per_level", [3, 40])
def test_annealing_a_product_of_noised_gaussians(steps_per_level):
    """At the last level two noised N(±1, s²) multiply to a Gaussian of mean 0 and variance (s² + σ²)/2; the
    discretised chain there has variance v/(1 - d/(2v)), d its drift, once it has forgotten earlier levels."""
    net, sigma = NoisedGaussian(std=0.5), 0.3
    f = ef.Family(net, "g")
    e = f(-1.0) & f(1.0)
    v = (0.25 + sigma**2) / 2
    drift = 0.3 * sigma**2 / 2
    levels = [3.0, 1.0, sigma] if steps_per_level == 40 else [3.0, 1.0] + [sigma] * 30
    x = draw(e, sampler=ef.Annealed(levels, steps_per_level, drift=0.3, denoise=False), steps=None)
    check_gaussian(x, 0.0, v / (1 - drift / (2 * v)))


def test_denoising_is_tweedie_for_one_density():
    """E[x0 | x] of N(c, s²) noised by σ is x - σ²∇E: variance s⁴/(s² + σ²) after exact noising."""
    net, sigma, s2 = NoisedGaussian(std=0.5), 0.4, 0.25
    e = ef.Family(net, "g")(0.7)
    start = 0.7 + math.sqrt(s2 + sigma**2) * torch.randn(N, 1, generator=torch.Generator().manual_seed(1))
    tiny = ef.Annealed([sigma], 1, drift=1e-9)
    x = ef.sample(e, sampler=tiny, x=start, seed=0, energies=False).x
    check_gaussian(x, 0.7, s2**2 / (s2 + sigma**2))


def test_weak_order_of_convergence():
    """The stationary variance converges to 1 at first order in the step: error λ/4 + O(λ²)."""
    errors = [draw(gaussian(0.0), n=100_000, sampler=ef.Langevin(step_size=s), steps=int(30 / s)).var().item() - 1
              for s in (1.2, 0.6)]
    assert 1.6 < errors[0] / errors[1] < 3.2, errors
