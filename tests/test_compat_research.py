"""The loops of three papers: equal laws, and without noise equal steps, beside plain transcriptions of their formulas."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import ebmfast as ef
from ebmfast.compat.research import (
    AnnealedCHASampler,
    AnnealedMALASampler,
    AnnealedUHASampler,
    AnnealedULASampler,
    get_sample_q,
    paper_loop,
)

COV = torch.tensor([[1.0, 0.5], [0.5, 2.0]])
PRECISION = COV.inverse()
MEAN = torch.tensor([1.0, -1.0])


def score(x, ts, shift):
    return -(x - MEAN.to(x) - shift) @ PRECISION.to(x)


def both(x, ts, shift):
    d = x - MEAN.to(x) - shift
    return -0.5 * (d * (d @ PRECISION.to(x))).sum(1), score(x, ts, shift)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def has_law(x, mean, cov):
    """Mean and covariance at five standard errors."""
    n = len(x)
    assert ((x.mean(0) - mean).abs() < 5 * (cov.diagonal() / n).sqrt()).all()
    spread = (cov.diagonal()[:, None] * cov.diagonal() + cov.square()) / n
    assert ((x.T.cov() - cov).abs() < 5 * spread.sqrt()).all()


def ula_law(size):
    """Covariance of x <- x - ss P(x - m) + √(2 ss) z: P⁻¹ (1 - ss P/2)⁻¹."""
    return COV @ (torch.eye(2) - size * PRECISION / 2).inverse()


def leapfrog(x, v, size, mass, steps, slope):
    for _ in range(steps):
        v = v + 0.5 * size * slope(x)
        x = x + size * v / mass**2
        v = v + 0.5 * size * slope(x)
    return x, v


def test_ula_is_its_formula():
    sampler = AnnealedULASampler(3, 80, [1e-9, 0.3, 0.1], score, generator=generator())
    x = sampler.sample_step(torch.zeros(20000, 2), 1, torch.full((20000,), 1), {"shift": 0.5})
    has_law(x, MEAN + 0.5, ula_law(0.3))
    silent = AnnealedULASampler(1, 4, [0.2], lambda x, ts, **a: 1e9 * score(x, ts, **a))  # noise does not show beside it
    x, expected = torch.randn(5, 2, generator=generator()), None
    for _ in range(4):
        expected = x if expected is None else expected
        expected = expected + 0.2 * 1e9 * score(expected, None, 0.0)
    torch.testing.assert_close(silent.sample_step(x, 0, None, {"shift": 0.0}), expected, rtol=1e-4, atol=0.0)


def test_ula_follows_arguments_and_densities():
    seen = []

    def record(x, ts, **arguments):
        seen.append((ts, arguments))
        return -x

    sampler = AnnealedULASampler(2, 3, torch.tensor([0.1, 0.2]), record)
    x = torch.zeros(4, 1, 2)
    assert sampler.sample_step(x, 1, "now", {"a": 1}).shape == (4, 1, 2)
    assert sampler.sample_step(x.half(), 0, "then", {}).dtype == torch.float16
    assert seen == [("now", {"a": 1})] * 3 + [("then", {})] * 3 and torch.equal(x, torch.zeros(4, 1, 2))
    with pytest.raises(ValueError, match="one value per step"):
        AnnealedULASampler(3, 1, [0.1], record)


@pytest.mark.parametrize("kind", [AnnealedMALASampler, AnnealedCHASampler], ids=["MALA", "CHA"])
@pytest.mark.parametrize("damping", [0.0, 0.8])
def test_adjusted_samplers_have_the_exact_law(kind, damping):
    """At step sizes where the unadjusted chain is far off; a decision for the whole batch, or a wrong density, is seen."""
    if kind is AnnealedMALASampler:
        sampler = kind(2, 150, [1e-9, 0.7], both, generator=generator(1))
    else:
        sampler = kind(2, 100, [1e-9, 0.8], damping, [1.0, torch.tensor([1.0, 0.8])], 2, both, generator=generator(1))
    x = sampler.sample_step(torch.zeros(10000, 2), 1, None, {"shift": 0.0})
    has_law(x, MEAN, COV)


def test_mala_decides_per_chain_and_asks_once_per_proposal():
    calls = []

    def counted(x, ts):
        calls.append(x)
        return both(x, ts, 0.0)

    x = MEAN + torch.randn(500, 2, generator=generator()) @ torch.linalg.cholesky(COV).T
    moved = AnnealedMALASampler(1, 1, [1.5], counted, generator=generator()).sample_step(x, 0, None, {}) != x
    share = moved.any(1).float().mean().item()
    assert 0.1 < share < 0.95 and len(calls) == 2  # where chains are, and where they might go
    # Against the acceptance of the formula: q(y|x) = N(y; x + ss ∇, 2 ss).
    z = torch.randn(500, 2, generator=generator(9))
    y = x + 1.5 * score(x, None, 0.0) + math.sqrt(3.0) * z
    back = (x - y - 1.5 * score(y, None, 0.0)).square().sum(1) / (4 * 1.5)
    ratio = both(y, None, 0.0)[0] - both(x, None, 0.0)[0] - back + z.square().sum(1) / 2
    assert abs(ratio.exp().clamp(max=1).mean().item() - share) < 5 * (0.25 / 500) ** 0.5


@pytest.mark.parametrize("kind", [AnnealedMALASampler, AnnealedCHASampler], ids=["MALA", "CHA"])
def test_a_sum_over_the_batch_cannot_decide(kind):
    more = () if kind is AnnealedMALASampler else (0.5, [1.0], 1)
    sampler = kind(1, 1, [0.1], *more, lambda x, ts: (-x.square().sum(), -2 * x))
    with pytest.raises(ValueError, match="log p of every chain"):
        sampler.sample_step(torch.zeros(3, 2), 0, None, {})
    assert sampler.sample_step(torch.zeros(1, 2), 0, None, {}).shape == (1, 2)


def test_uha_is_its_formula():
    """Beside a transcription with other noise: equal means and covariances, and where noise does not show the same path."""
    size, kept, mass, steps = 0.7, 0.6, 1.3, 3
    sampler = AnnealedUHASampler(1, 60, [size], kept, [mass], steps, score, generator=generator())
    x = sampler.sample_step(torch.zeros(20000, 2), 0, None, {"shift": 0.0})
    y, v = torch.zeros(20000, 2), mass * torch.randn(20000, 2, generator=generator(5))
    for _ in range(60):
        v = kept * v + math.sqrt(1 - kept**2) * mass * torch.randn(20000, 2, generator=generator(len(v) + _))
        y, v = leapfrog(y, v, size, mass, steps, lambda x: score(x, None, 0.0))
    error = 5 * (2 / 20000) ** 0.5 * 2
    assert ((x.mean(0) - y.mean(0)).abs() < error).all() and ((x.T.cov() - y.T.cov()).abs() < 2 * error).all()
    start = torch.randn(4, 2, generator=generator(3))
    heavy = AnnealedUHASampler(1, 1, [size], 1.0, [1e6], 3, lambda x, ts: 1e12 * score(x, ts, 0.0))  # momenta do not show
    expected, _ = leapfrog(start, torch.zeros(4, 2), size, 1e6, 3, lambda x: 1e12 * score(x, None, 0.0))
    torch.testing.assert_close(heavy.sample_step(start, 0, None, {}), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="damping_coeff"):
        AnnealedUHASampler(1, 1, [size], 1.5, [1.0], 1, score)


def test_cha_does_not_change_what_it_is_given_and_conserves_energy():
    """Tiny steps are always accepted, since kinetic energies count: where they cancel, acceptance falls."""
    x = torch.randn(2000, 2, generator=generator())
    before, accepted = x.clone(), []
    for steps in (1, 40):
        sampler = AnnealedCHASampler(1, 1, [0.05], 0.0, [1.0], steps, both, generator=generator())
        accepted.append((sampler.sample_step(x, 0, None, {"shift": 0.0}) != x).any(1).float().mean().item())
    assert torch.equal(x, before) and min(accepted) > 0.99


class Classifier(nn.Module):
    """f(x, y) = -E: a Gaussian whose mean is the class."""

    def __init__(self):
        super().__init__()
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(2).eval()

    def forward(self, x, y=None):
        assert not self.drop.training
        mean = 0.0 if y is None else y[:, None, None, None].float()
        return -0.5 * (self.drop(x) - mean).square().sum((1, 2, 3))


def arguments(**more):
    return SimpleNamespace(batch_size=16, n_steps=30, sgld_lr=0.3, sgld_std=0.4, reinit_freq=0.05, n_classes=2, im_sz=2, n_ch=1,
                           **more)


def test_sample_q_is_jems():
    args = arguments()
    f, sample_q = Classifier(), get_sample_q(args, "cpu")
    modes = [m.training for m in f.modules()]
    torch.manual_seed(0)
    x = sample_q(f, [], y=torch.full((8000,), 1))
    assert x.shape == (8000, 1, 2, 2) and [m.training for m in f.modules()] == modes
    # x <- x + lr ∇f + std z on a Gaussian of precision 1: variance std² / (1 - (1 - lr)²)
    expected = args.sgld_std**2 / (1 - (1 - args.sgld_lr) ** 2)
    assert abs(x.mean().item() - 1) < 5 * (expected / x.numel()) ** 0.5
    assert abs(x.var().item() / expected - 1) < 5 * (2 / x.numel()) ** 0.5
    args.sgld_std, args.sgld_lr = 0.0, 0.3
    still = get_sample_q(args, "cpu")(f, torch.full((10, 1, 2, 2), 4.0), n_steps=3)
    ends = 4.0 * 0.7**3
    assert still.shape == (16, 1, 2, 2) and ((still - ends).abs() < 1e-5).flatten(1).all(1).float().mean() > 0.5


def test_sample_q_starts_from_its_class_and_writes_back():
    args = arguments()
    args.sgld_lr, args.sgld_std, args.reinit_freq = 1e-6, 0.0, 0.0
    buffer = torch.cat([torch.zeros(50, 1, 2, 2), torch.ones(50, 1, 2, 2)])
    x = get_sample_q(args, "cpu")(Classifier(), buffer, y=torch.tensor([0, 1, 1, 0, 1]), n_steps=1)
    assert torch.equal(x.mean((1, 2, 3)).round(), torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0]))
    args.sgld_lr = 0.5
    get_sample_q(args, "cpu")(Classifier(), buffer, n_steps=1)
    assert 0 < (buffer[50:] != 1.0).flatten(1).any(1).sum() <= 16 and (buffer[50:] - 0.5).abs().min() < 1e-6


def test_the_papers_loop_is_its_formula():
    """Noise first, the gradient there, then the clip; without noise step for step, with it by its variance."""
    nets = [lambda x: 0.5 * (x - 0.2).square().sum(1), ef.Concept(lambda x: x.pow(4).sum(1), name="heavy")]
    x = torch.rand(6, 3, generator=generator())
    expected = x
    for _ in range(5):
        gradient = (expected - 0.2) + 4 * expected**3
        expected = (expected - 0.1 * gradient.clamp(-0.5, 0.5)).clamp(0, 1)
    found = paper_loop(nets, x, 5, step_lr=0.1, noise=0.0, grad_clip=0.5)
    torch.testing.assert_close(found, expected)
    # x' = (1 - step)(x + σ z): variance ((1 - step) σ)² / (1 - (1 - step)²), smaller than with noise last
    x = paper_loop(lambda x: 0.5 * x.square().sum(1), torch.zeros(20000, 2), 40, 0.5, 0.3, None, generator=generator())
    expected = (0.5 * 0.3) ** 2 / (1 - 0.25)
    assert abs(x.var().item() / expected - 1) < 5 * (2 / x.numel()) ** 0.5


def test_a_momentum_kept_in_part_turns_round_where_a_proposal_is_rejected():
    """On a law that is not symmetric, log Gamma(1): mean -0.5772, variance π²/6. Without the turn both are off."""
    sampler = AnnealedCHASampler(1, 80, [1.1], 0.95, [1.0], 1, lambda x, ts: ((x - x.exp()).sum(1), 1 - x.exp()),
                                 generator=generator())
    x = sampler.sample_step(torch.zeros(20000, 1), 0, None, {})
    assert abs(x.mean().item() + 0.5772) < 5 * (math.pi**2 / 6 / 20000) ** 0.5
    assert abs(x.var().item() / (math.pi**2 / 6) - 1) < 5 * (4.4 / 20000) ** 0.5  # kurtosis 5.4


def test_leapfrog_steps_that_diverge_say_so():
    sampler = AnnealedUHASampler(1, 60, [10.0], 1.0, [1.0], 5, lambda x, ts: -1e6 * x)
    with pytest.raises(ef.NonFiniteError, match="non-finite state in 3 chain"):
        sampler.sample_step(torch.ones(3, 2), 0, None, {})
