"""Exact laws at fixed seeds: whole distributions by Kolmogorov and Smirnov, orders of invariance by quadrature.

A statistic √n D above 2.2 has a probability of 1.3e-4 where the law is right; step sizes are those at which a factor of
2 or √2 in a proposal, or in its density, moves D by several times that.
"""

import dataclasses
import math

import pytest
import torch
from models import NoisedGaussian, gaussian

import ebmfast as ef
from ebmfast import rng

N = 20_000
GRID = torch.linspace(-9, 9, 36_001, dtype=torch.float64)
# Three steps of HMC turn the Gaussian by less than half a circle, or more: half of one would only mirror it.
SAMPLERS = {"mala": ef.MALA(), "hmc": ef.HMC(n_leapfrog_steps=3), "hmc_mass": ef.HMC(n_leapfrog_steps=2, mass=2.5)}
# name: a composition, its standard deviations across, and the steps that forget the start
TARGETS = {
    "gaussian": (gaussian(0.7, 1.0), 1.0, 60),
    "mixture": (ef.any_of([gaussian(-0.9, 4.0), gaussian(0.9, 2.0)], log_weights=[math.log(3), 0.0]), 0.6, 250),
    "not": (gaussian(0.0, 1.0) & ef.negate(gaussian(1.0, 2.0) | gaussian(-2.5, 0.5), 0.45), 1.0, 120),
}


def draw(e, sampler, steps, n=N, seed=0, **options):
    options = {"init": "normal", "energies": False, "shape": (1,)} | options
    return ef.sample(e, n=n, sampler=sampler, steps=steps, seed=seed, **options)


def kolmogorov_smirnov(x: torch.Tensor, log_density) -> float:
    """√n sup |F_n - F|, F the distribution of exp(log_density), by quadrature on the grid."""
    weight = torch.softmax(log_density(GRID[:, None]), 0)
    middle = torch.cumsum(weight, 0) - weight / 2
    x = x.double().flatten().sort().values
    n, place = len(x), (x - GRID[0]) / (GRID[1] - GRID[0])
    low = place.floor().long().clamp(0, len(GRID) - 2)
    cdf = torch.lerp(middle[low], middle[low + 1], place - low)
    rank = torch.arange(n, dtype=torch.float64)
    return math.sqrt(n) * max((cdf - rank / n).max().item(), ((rank + 1) / n - cdf).max().item())


def check_law(x: torch.Tensor, log_density) -> None:
    """The whole distribution, and its first two moments within five standard errors."""
    assert kolmogorov_smirnov(x, log_density) < 2.2
    weight = torch.softmax(log_density(GRID[:, None]), 0)
    x = x.double().flatten()
    for f in (lambda v: v, torch.square):
        found, exact = f(x), (weight * f(GRID)).sum()
        assert abs(found.mean() - exact) < 5 * found.std() / math.sqrt(len(x)), (found.mean().item(), exact.item())


def test_the_statistic_sees_what_it_should():
    """It is small for normals; a variance wrong by a fifth is seen at once."""
    x = rng.normal((), N, seed=5, step=0)
    assert kolmogorov_smirnov(x, lambda v: -v[:, 0] ** 2 / 2) < 1.5
    assert kolmogorov_smirnov(x * 1.2**0.5, lambda v: -v[:, 0] ** 2 / 2) > 2.8


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_mala_and_hmc_leave_compositions_invariant(name, target, temperature):
    e, width, steps = TARGETS[target]
    size = {"mala": 1.4, "hmc": 1.3, "hmc_mass": 1.7}[name] * width**(2 if name == "mala" else 1)
    r = draw(e, dataclasses.replace(SAMPLERS[name], step_size=size, temperature=temperature), steps)
    assert 0.4 < r.acceptance.mean() < 0.97
    check_law(r.x, lambda v: -e.energy(v) / temperature)


def gauss_hermite(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Nodes and weights of N(0, 1)."""
    import numpy
    nodes, weights = numpy.polynomial.hermite_e.hermegauss(n)
    return torch.tensor(nodes), torch.tensor(weights) / math.sqrt(2 * math.pi)


@pytest.mark.parametrize(("make", "order"), [
    (lambda h: ef.Langevin(step_size=h), 1), (lambda h: ef.BAOAB(h, friction=1.3, mass=1.7), 2)], ids=["langevin", "baoab"])
def test_order_of_the_invariant_law(make, order, monkeypatch):
    """∫ (E[f(x₁) | x₀] - f(x₀)) dp(x₀) = O(h^(order + 1)), the bias of long runs times h, by quadrature over x₀, momentum and
    noise: no sampling error. Halving the step divides it by 2^(order + 1); a wrong factor in drift or noise leaves O(h)."""
    x = torch.linspace(-6, 6, 601, dtype=torch.float64)
    z, w = gauss_hermite(28)
    x0, p0, z0 = (v.flatten() for v in torch.meshgrid(x, z, z, indexing="ij"))
    e = ef.Concept(lambda x: (x**2 / 2 + torch.cos(2 * x) / 2).sum(1), name="wells")
    weight = torch.softmax(-e.energy(x[:, None]), 0)[:, None, None] * w[:, None] * w
    nodes = {rng.NOISE: z0, rng.MOMENTUM: p0}
    monkeypatch.setattr(rng, "normal", lambda shape, n, *, stream=rng.NOISE, **_: nodes[stream].float().reshape(n, *shape))
    errors = []
    for h in (0.2, 0.1) if order == 2 else (0.1, 0.05):
        r = ef.sample(e, x=x0[:, None], sampler=make(h), steps=1, seed=0, backend="reference", energies=False, batch_size=10**7)
        # Of symmetric splittings, functions that are odd in the momentum show the lowest order.
        change = r.x[:, 0].square() - x0.square()
        if order == 2:
            change = r.x[:, 0].sin() * r.state.extra["momentum"][:, 0] - x0.sin() * math.sqrt(1.7) * p0
        errors.append((weight.flatten() * change).sum().abs().item())
    assert errors[1] > 1e-5, "the float32 noise must not matter"
    assert 0.8 * 2 ** (order + 1) < errors[0] / errors[1] < 1.25 * 2 ** (order + 1), errors


MASS, HEAT = 1.7, 0.8


def refreshed(e, h, u, z, monkeypatch):
    """One BAOAB step in the limit of high friction, where every step forgets the momentum: with p = √(mT) z after it was drawn,
    u = x - (h/2m) √(mT) z is a Markov chain of its own, driven by z. u after the step, for pairs of u and z."""
    spread = math.sqrt(MASS * HEAT)
    x = u + h / (2 * MASS) * spread * z
    momentum = spread * z - h / 2 * e.gradient(x[:, None])[:, 0]  # where a step ends
    monkeypatch.setattr(rng, "normal", lambda shape, n, **_: torch.ones(n, *shape))
    options = dict(sampler=ef.BAOAB(h, friction=100 / h, mass=MASS, temperature=HEAT), backend="reference", energies=False)
    state = ef.sample(e, x=x[:, None], steps=0, seed=0, **options).state
    state = ef.sample(e, resume=dataclasses.replace(state, extra={"momentum": momentum[:, None]}), steps=1, **options).state
    after, p = state.x[:, 0], state.extra["momentum"][:, 0]
    torch.testing.assert_close(p, spread - h / 2 * e.gradient(state.x)[:, 0])
    return after - h / (2 * MASS) * spread


def test_baoab_is_of_fourth_order_at_high_friction(monkeypatch):
    """The stationary law of positions, by linear algebra: on a circle P e^{iku} is a Fourier series, whose coefficients make one
    row of the matrix that the law's own coefficients are a fixed point of. The bias falls as h⁴ (Leimkuhler and Matthews 2013),
    where it falls as h² at any friction that is held."""
    e = ef.Concept(lambda x: (torch.cos(x) + torch.sin(2 * x) / 2).sum(1), name="circle")
    n, (z, w) = 96, gauss_hermite(40)
    u = torch.arange(n, dtype=torch.float64) * (2 * math.pi / n)
    at_u, at_z = (v.flatten() for v in torch.meshgrid(u, z, indexing="ij"))
    exact = (torch.softmax(-e.energy(u[:, None]) / HEAT, 0) * u.cos()).sum()
    frequencies = torch.arange(-n // 4, n // 4 + 1)
    errors = []
    for h in (0.8, 0.4):
        after = refreshed(e, h, at_u, at_z, monkeypatch).reshape(n, -1)
        rows = torch.exp(1j * frequencies[:, None, None] * after) @ w.to(torch.complex128)
        matrix = torch.fft.fft(rows, dim=1)[:, frequencies] / n
        zero = len(frequencies) // 2
        others = [k for k in range(len(frequencies)) if k != zero]
        law = torch.linalg.solve(torch.eye(len(others)) - matrix[others][:, others], matrix[others, zero])  # the zeroth is 1
        spread = h / 2 * math.sqrt(HEAT / MASS)  # of x about u
        errors.append((law[others.index(zero + 1)].real * math.exp(-(spread**2) / 2) - exact).abs().item())
    assert errors[1] > 1e-6, "the float32 noise must not matter"
    assert 0.8 * 16 < errors[0] / errors[1] < 1.25 * 16, errors


def test_baoab_is_exact_for_a_harmonic_energy_at_high_friction(monkeypatch):
    """u after a step is a u + b z, so its variance is b²/(1 - a²); that of x must be T/k at any stable step."""
    k, one = 2.3, torch.tensor([1.0, 0.0], dtype=torch.float64)
    e = ef.Concept(lambda x: k * x.square().sum(1) / 2, name="harmonic")
    for h in (0.3, 1.0, 1.6):
        a, b = refreshed(e, h, one, one.flip(0), monkeypatch).tolist()
        variance = b * b / (1 - a * a) + h * h * HEAT / (4 * MASS)
        assert variance == pytest.approx(HEAT / k, rel=1e-6)


INNER = {"mala": ef.MALA, "hmc": ef.HMC(n_leapfrog_steps=2), "baoab": ef.BAOAB(friction=0.8)}


@pytest.mark.parametrize("name", INNER)
def test_annealing_ends_on_the_law_of_its_last_level(name):
    """Two noised N(±1, s²) multiply to a Gaussian of mean 0 and variance (s² + σ²)/2: MALA and HMC are exact, and so is BAOAB
    on a harmonic energy. Levels before the last must not matter."""
    family, sigma = ef.Family(NoisedGaussian(std=0.5), "g"), 0.3
    v = (0.25 + sigma**2) / 2
    sampler = ef.Annealed([3.0, 1.0, sigma], 80, drift=2.0, inner=INNER[name], denoise=False)
    r = draw(family(-1.0) & family(1.0), sampler, None)
    check_law(r.x, lambda x: -x[:, 0] ** 2 / (2 * v))
    assert (r.acceptance is None) if name == "baoab" else (0.4 < r.acceptance.mean() < 0.99)


@pytest.mark.parametrize("name", ["mala", "hmc"])
def test_annealing_a_mixture_with_temperature(name):
    family, sigma, temperature = ef.Family(NoisedGaussian(std=0.4), "g"), 0.3, 0.7
    e = ef.any_of([family(-0.6), family(0.6)], log_weights=[math.log(2), 0.0])
    inner = dataclasses.replace(INNER[name] if name == "hmc" else ef.MALA(), temperature=temperature)
    r = draw(e, ef.Annealed([2.0, 0.8, sigma], 200, drift=2.0, inner=inner, denoise=False), None, n=N // 2)
    check_law(r.x, lambda x: -e.energy(x, sigma=sigma) / temperature)


@pytest.mark.parametrize("name", INNER)
def test_a_level_s_energies_are_not_those_of_the_level_before(name):
    """One far step to a narrow level: with the wide level's energy or gradient still at hand, chains would end elsewhere."""
    family = ef.Family(NoisedGaussian(std=0.1), "g")
    both = ef.Annealed([2.0, 0.5], 1, drift=1.0, inner=INNER[name], denoise=False)
    first = ef.Annealed([2.0], 1, drift=1.0, inner=INNER[name], denoise=False)
    whole = draw(family(0.5), both, None, n=500)
    begun = draw(family(0.5), first, None, n=500)
    state = dataclasses.replace(begun.state, target=2)
    narrow = ef.Annealed([0.5, 0.5], 1, drift=1.0, inner=INNER[name], denoise=False)
    rest = ef.sample(family(0.5), resume=state, energies=False, sampler=narrow)
    assert torch.equal(rest.x, whole.x) and not torch.equal(whole.x, begun.x)


@pytest.mark.parametrize("name", INNER)
def test_the_denoising_step_is_tweedie_s_for_every_sampler(name):
    """From what the last level left: x - σ²∇E(x), never rejected, clamped to the bounds where there are any."""
    family, sigma = ef.Family(NoisedGaussian(std=0.5), "g"), 0.4
    options = dict(drift=0.3, inner=INNER[name])
    plain = draw(family(0.7), ef.Annealed([1.0, sigma], 5, denoise=False, **options), None, n=200)
    sharp = draw(family(0.7), ef.Annealed([1.0, sigma], 5, **options), None, n=200)
    torch.testing.assert_close(sharp.x, plain.x - sigma**2 * (plain.x - 0.7) / (0.25 + sigma**2))
    if name != "baoab":
        assert torch.equal(sharp.acceptance, plain.acceptance)
        bounded = ef.Annealed([1.0, sigma], 5, inner=type(ef.Annealed([1.0], inner=INNER[name]).inner)(bounds=(0.0, 0.65)))
        x = ef.sample(family(0.7), x=torch.full((50, 1), 0.3), sampler=bounded, seed=0).x
        assert (x >= 0).all() and (x <= 0.65).all()


@pytest.mark.parametrize(("make", "error", "message"), [
    (lambda: ef.Annealed([1.0], inner=ef.HMC(0.1)), ValueError, "`inner` must not have step sizes"),
    (lambda: ef.Annealed([1.0], inner=ef.MALA(temperature=0.0)), ValueError, "`temperature` must be positive with MALA"),
    (lambda: ef.Annealed([1.0], inner=ef.BAOAB(temperature=[1.0])), ValueError, "`temperature` inside Annealed must be a number"),
    (lambda: ef.Annealed([1.0], inner=int), TypeError, "`inner` must be Langevin, MALA, HMC, BAOAB or an instance"),
    (lambda: ef.Annealed([1.0], inner=ef.Annealed([1.0])), TypeError, "`inner` must be Langevin"),
])
def test_what_annealed_refuses(make, error, message):
    with pytest.raises(error, match=message):
        make()
