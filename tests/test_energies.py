"""The native energies as modules: values, shapes, errors. `test_chain.py` has their kernels."""

import math

import pytest
import torch
from torch import nn

from ebmfast import energies as E


def test_gaussian_values():
    mean, cov = torch.tensor([1.0, -2.0]), torch.tensor([[2.0, 0.6], [0.6, 1.0]])
    x = torch.randn(7, 2, generator=torch.Generator().manual_seed(0))
    normal = torch.distributions.MultivariateNormal(mean, cov)
    difference = E.Gaussian(mean, cov)(x) + normal.log_prob(x)
    torch.testing.assert_close(difference, difference[:1].expand(7), rtol=1e-5, atol=1e-5)  # the normaliser, a constant
    torch.testing.assert_close(E.Gaussian(mean, 4.0)(x), (x - mean).square().sum(1) / 8)
    torch.testing.assert_close(E.Gaussian(mean, [4.0, 1.0])(x), ((x - mean).square() / torch.tensor([8.0, 2.0])).sum(1))
    assert E.Gaussian(mean)(mean[None]).item() == 0


@pytest.mark.parametrize("covs", [0.5, [0.5, 2.0, 1.0], [[0.5, 1.0], [2.0, 2.0], [1.0, 3.0]], "full"])
def test_mixture_is_normalised(covs):
    means, weights = torch.tensor([[0.0, 1.0], [2.0, 2.0], [-1.0, 0.0]]), torch.tensor([1.0, 2.0, 5.0])
    x = torch.randn(9, 2, generator=torch.Generator().manual_seed(0))
    if covs == "full":
        covs = torch.tensor([[[1.0, 0.3], [0.3, 2.0]]] * 2 + [[[0.5, -0.2], [-0.2, 0.5]]])
    parts = torch.as_tensor(covs).expand(3) if torch.as_tensor(covs).ndim == 0 else torch.as_tensor(covs)
    matrices = torch.stack([c if c.ndim == 2 else torch.diag(c.expand(2)) for c in parts])
    expected = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(weights), torch.distributions.MultivariateNormal(means, matrices)).log_prob(x)
    torch.testing.assert_close(E.GaussianMixture(means, covs, weights)(x), -expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("energy", "x", "value"), [
    (E.Harmonic(3.0), [[1.0, 2.0]], 7.5),
    (E.DoubleWell(), [[1.0, -1.0, 0.0]], 2.0),
    (E.DoubleWell(barrier_height=3.0, b=2.0), [[1.0, 2.0]], 27.0),
    (E.Rosenbrock(a=1.0, b=100.0), [[1.0, 1.0, 1.0]], 0.0),
    (E.Rosenbrock(2.0, 10.0), [[0.0, 1.0, 2.0]], 10 + 4 + 10 + 1),
    (E.Himmelblau(), [[3.0, 2.0]], 0.0),
    (E.StyblinskiTang(), [[-2.903534, -2.903534]], -78.33233),
    (E.Rastrigin(), [[0.0, 1.0]], 1.0),
    (E.Ackley(), [[1e-9, 0.0]], 0.0),
    (E.Ackley(), [[1.0, 1.0]], 20 + math.e - 20 * math.exp(-0.2) - math.e),
])
def test_known_values(energy, x, value):
    got = energy(torch.tensor(x))
    assert got.shape == (1,)
    torch.testing.assert_close(got.item(), float(value), rtol=1e-5, atol=1e-5)


def test_chains_of_any_shape():
    for energy in (E.Harmonic(), E.DoubleWell(), E.Rosenbrock(), E.Gaussian(torch.zeros(6)), E.MLP(6, [4])):
        x = torch.randn(3, 2, 3, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(energy(x), energy(x.flatten(1)))


@pytest.mark.parametrize("conditioning", ["concat", "add", "film"])
def test_mlp_is_its_formula(conditioning):
    torch.manual_seed(0)
    net = E.MLP(3, [5, 4], "tanh", condition_dim=2, conditioning=conditioning)
    x, c = torch.randn(6, 3), torch.randn(6, 2)
    h = torch.cat([x, c], 1) if conditioning == "concat" else x
    for i, layer in enumerate(net.layers):
        h = h @ layer.weight.T + layer.bias
        if conditioning == "add":
            h = h + c @ net.modulations[i].weight.T
        if conditioning == "film":
            width = layer.out_features
            weight, bias = net.modulations[i].weight, net.modulations[i].bias
            h = (1 + c @ weight[:width].T + bias[:width]) * h + c @ weight[width:].T + bias[width:]
        h = h.tanh()
    torch.testing.assert_close(net(x, c), (h @ net.read_out.weight.T + net.read_out.bias)[:, 0])
    torch.testing.assert_close(net(x), net(x, torch.zeros(6, 2)))


def test_parameters_follow_the_module():
    net = E.GaussianMixture([[0.0, 1.0], [1.0, 1.0]])
    assert set(net.state_dict()) == {"means", "precisions", "log_weights"}
    assert net.double()(torch.zeros(2, 2, dtype=torch.float64)).dtype == torch.float64
    assert isinstance(E.Gaussian([0.0, 1.0]), nn.Module) and set(E.Gaussian([0.0]).state_dict()) == {"mean", "precision"}


@pytest.mark.parametrize(("make", "message"), [
    (lambda: E.Gaussian(torch.zeros(2, 2)), r"`mean` must be a vector, got shape \[2, 2\]"),
    (lambda: E.Gaussian([0.0, 0.0], torch.eye(3)), r"`cov` must be \[2, 2\], got \[3, 3\]"),
    (lambda: E.Gaussian([0.0, 0.0], [[1.0, 2.0], [2.0, 1.0]]), "`cov` must be positive definite"),
    (lambda: E.Gaussian([0.0, 0.0], [[1.0, 2.0], [0.0, 1.0]]), "`cov` must be symmetric"),
    (lambda: E.Gaussian([0.0], -1.0), "`cov` must be a positive variance"),
    (lambda: E.Gaussian([0.0, 1.0], [1.0, 1.0, 1.0]), "`cov` must have 2 variances, got 3"),
    (lambda: E.GaussianMixture([0.0, 1.0]), r"`means` must be \[K, D\], got \[2\]"),
    (lambda: E.GaussianMixture([[0.0], [1.0]], [1.0, 1.0, 1.0]), "`covs` must be a variance or 2 covariances"),
    (lambda: E.GaussianMixture([[0.0], [1.0]], 1.0, [1.0, -1.0]), "`weights` must be 2 positive numbers"),
    (lambda: E.MLP(2, []), "at least one width"),
    (lambda: E.MLP(2, [4], "swish"), "`activation` must be one of silu, relu, tanh, softplus, gelu, got 'swish'"),
    (lambda: E.MLP(2, [4], conditioning="cat"), '`conditioning` must be "concat", "add" or "film"'),
    (lambda: E.MLP(2, [4], condition_dim=-1), "`condition_dim` must not be negative"),
    (lambda: E.MLP(2, [4], condition_dim=3)(torch.zeros(5, 2), torch.zeros(5, 2)), r"`condition` must be \[5, 3\]"),
    (lambda: E.MLP(2, [4])(torch.zeros(5, 3)), r"`x` must have 2 numbers per chain, got \[5, 3\]"),
    (lambda: E.Rosenbrock()(torch.zeros(5, 1)), "at least 2 numbers per chain"),
    (lambda: E.Himmelblau()(torch.zeros(5, 3)), "`x` must have 2 numbers"),
    (lambda: E.Harmonic()(torch.zeros(5)), r"`x` must be \[B, \*S\], got \[5\]"),
])
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
