"""Energies with a closed form, and multilayer perceptrons: plain modules, which the chain engine also runs by itself.

Each maps x `[B, *S]` to energies `[B]` and works anywhere an `nn.Module` does. Parameters given as tensors become
buffers, so they follow `.to()`, are saved with the module, and may be changed in place between calls. Names and
arguments are those of torchebm's analytic models (`DoubleWellModel` is `DoubleWell`), whose users will find theirs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = [
    "ACTIVATIONS", "MLP", "Ackley", "DoubleWell", "Gaussian", "GaussianMixture", "Harmonic", "Himmelblau", "Rastrigin",
    "Rosenbrock", "StyblinskiTang",
]

Numbers = float | Sequence[float] | Sequence[Sequence[float]] | Sequence[Sequence[Sequence[float]]] | Tensor

ACTIVATIONS = {"silu": nn.SiLU, "relu": nn.ReLU, "tanh": nn.Tanh, "softplus": nn.Softplus, "gelu": nn.GELU}


def _rows(x: Tensor, width: int | None = None, name: str = "x") -> Tensor:
    """`x` `[B, *S]` as `[B, D]`, D = `width` where that is given."""
    if x.ndim < 2:
        raise ValueError(f"`{name}` must be [B, *S], got {list(x.shape)}")
    rows = x.flatten(1)
    if width is not None and rows.shape[1] != width:
        raise ValueError(f"`{name}` must have {width} numbers per chain, got {list(x.shape)}")
    return rows


def _vector(value, name: str) -> Tensor:
    value = torch.as_tensor(value, dtype=torch.get_default_dtype()).detach().clone()
    if value.ndim != 1 or not len(value):
        raise ValueError(f"`{name}` must be a vector, got shape {list(value.shape)}")
    return value


def _precision(cov, dim: int, name: str) -> tuple[Tensor, Tensor]:
    """`(precision, log determinant of the covariance)`: `[D]` for a scalar or diagonal covariance, else `[D, D]`."""
    cov = torch.as_tensor(cov, dtype=torch.get_default_dtype()).detach()
    if cov.ndim == 2:
        if cov.shape != (dim, dim):
            raise ValueError(f"`{name}` must be [{dim}, {dim}], got {list(cov.shape)}")
        if not torch.allclose(cov, cov.T, rtol=1e-4, atol=1e-6):
            raise ValueError(f"`{name}` must be symmetric")
        factor, failed = torch.linalg.cholesky_ex(cov.double())
        if failed:
            raise ValueError(f"`{name}` must be positive definite")
        inverse = torch.cholesky_inverse(factor)
        return ((inverse + inverse.T) / 2).to(cov.dtype), (2 * factor.diagonal().log().sum()).to(cov.dtype)
    if cov.ndim == 1 and len(cov) != dim:
        raise ValueError(f"`{name}` must have {dim} variances, got {len(cov)}")
    if cov.ndim > 2 or not (cov > 0).all():
        raise ValueError(f"`{name}` must be a positive variance, {dim} of them, or a matrix, got {cov.tolist()}")
    cov = cov.expand(dim)
    return 1 / cov, cov.log().sum()


def _quadratic(d: Tensor, precision: Tensor) -> Tensor:
    """½ dᵀ P d for rows d `[B, D]`."""
    product = d * precision if precision.ndim == 1 else d @ precision
    return 0.5 * (d * product).sum(1)


class Gaussian(nn.Module):
    r"""A Gaussian: :math:`E(x) = \frac12 (x - \mu)^\top \Sigma^{-1} (x - \mu)`.

    Args:
        mean: μ, `[D]`.
        cov: Σ: a variance, D variances, or `[D, D]`, symmetric and positive definite.

    Buffers: `mean` `[D]` and `precision` Σ⁻¹, `[D]` (scalar and diagonal) or `[D, D]`, which must stay symmetric.

    Raises:
        ValueError: shapes that do not match, or a covariance that is not one.
    """

    def __init__(self, mean: Numbers, cov: Numbers = 1.0) -> None:
        super().__init__()
        mean = _vector(mean, "mean")
        self.register_buffer("mean", mean)
        self.register_buffer("precision", _precision(cov, len(mean), "cov")[0].contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """E(x), `[B]`, of x `[B, *S]` with D numbers per chain."""
        return _quadratic(_rows(x, len(self.mean)) - self.mean, self.precision)


class GaussianMixture(nn.Module):
    r"""A mixture of Gaussians: :math:`E(x) = -\log \sum_k w_k\, N(x; \mu_k, \Sigma_k)`, normalised components.

    Args:
        means: `[K, D]`.
        covs: covariances of the components: a variance for all, K variances, `[K, D]`, or `[K, D, D]`.
        weights: `[K]`, positive; they are divided by their sum. None: equal.

    Buffers: `means` `[K, D]`, `precisions` `[K, D]` or `[K, D, D]`, `log_weights` `[K]`, log w_k with the logarithm
    of the normaliser of component k.

    Raises:
        ValueError: shapes that do not match, covariances or weights that are none.
    """

    def __init__(self, means: Numbers, covs: Numbers = 1.0, weights: Numbers | None = None) -> None:
        super().__init__()
        means = torch.as_tensor(means, dtype=torch.get_default_dtype()).detach().clone()
        if means.ndim != 2 or not means.numel():
            raise ValueError(f"`means` must be [K, D], got {list(means.shape)}")
        count, dim = means.shape
        covs = torch.as_tensor(covs, dtype=torch.get_default_dtype())
        if covs.ndim > 0 and len(covs) != count:
            raise ValueError(f"`covs` must be a variance or {count} covariances, got {list(covs.shape)}")
        parts = [_precision(c, dim, "covs") for c in (covs.expand(count) if covs.ndim == 0 else covs)]
        weights = torch.ones(count) if weights is None else _vector(weights, "weights")
        if len(weights) != count or not (weights > 0).all():
            raise ValueError(f"`weights` must be {count} positive numbers, got {weights.tolist()}")
        logs = (weights / weights.sum()).log() - 0.5 * (torch.stack([log for _, log in parts]) + dim * math.log(2 * math.pi))
        self.register_buffer("means", means)
        self.register_buffer("precisions", torch.stack([precision for precision, _ in parts]))
        self.register_buffer("log_weights", logs.to(means.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """E(x), `[B]`, of x `[B, *S]` with D numbers per chain."""
        x = _rows(x, self.means.shape[1])
        energies = torch.stack([_quadratic(x - mean, precision) for mean, precision in zip(self.means, self.precisions)])
        return -torch.logsumexp(self.log_weights[:, None] - energies, 0)


class Harmonic(nn.Module):
    r"""A harmonic oscillator: :math:`E(x) = \frac{k}{2} \sum_i x_i^2`, a Gaussian of variance 1/k."""

    def __init__(self, k: float = 1.0) -> None:
        super().__init__()
        self.k = float(k)

    def forward(self, x: Tensor) -> Tensor:
        """E(x), `[B]`, of x `[B, *S]`."""
        return 0.5 * self.k * _rows(x).square().sum(1)


class DoubleWell(nn.Module):
    r"""Two wells at ±b in every coordinate: :math:`E(x) = h \sum_i (x_i^2 - b^2)^2`, h the barrier's height at b = 1."""

    def __init__(self, barrier_height: float = 2.0, b: float = 1.0) -> None:
        super().__init__()
        self.barrier_height, self.b = float(barrier_height), float(b)

    def forward(self, x: Tensor) -> Tensor:
        """E(x), `[B]`, of x `[B, *S]`."""
        return self.barrier_height * (_rows(x).square() - self.b**2).square().sum(1)


class StyblinskiTang(nn.Module):
    r"""The Styblinski-Tang function: :math:`E(x) = \frac12 \sum_i (x_i^4 - 16 x_i^2 + 5 x_i)`."""

    def forward(self, x: Tensor) -> Tensor:
        """E(x), `[B]`, of x `[B, *S]`."""
        x = _rows(x)
        return 0.5 * (x**4 - 16 * x**2 + 5 * x).sum(1)


class Rosenbrock(nn.Module):
    r"""The Rosenbrock function: :math:`E(x) = \sum_{i<D} b (x_{i+1} - x_i^2)^2 + (a - x_i)^2`, D ≥ 2."""

    def __init__(self, a: float = 1.0, b: float = 100.0) -> None:
        super().__init__()
        self.a, self.b = float(a), float(b)

    def forward(self, x: Tensor) -> Tensor:
        """E(x), `[B]`, of x `[B, *S]` with at least two numbers per chain."""
        x = _rows(x)
        if x.shape[1] < 2:
            raise ValueError("`x` must have at least 2 numbers per chain, got 1")
        here, after = x[:, :-1], x[:, 1:]
        return (self.b * (after - here.square()).square() + (self.a - here).square()).sum(1)


class Himmelblau(nn.Module):
    r"""Himmelblau's function: :math:`E(x, y) = (x^2 + y - 11)^2 + (x + y^2 - 7)^2`."""

    def forward(self, x: Tensor) -> Tensor:
        """E(x), `[B]`, of x `[B, 2]`."""
        x, y = _rows(x, 2).unbind(1)
        return (x.square() + y - 11).square() + (x + y.square() - 7).square()


class Rastrigin(nn.Module):
    r"""The Rastrigin function: :math:`E(x) = a D + \sum_i x_i^2 - a \cos(2 \pi x_i)`."""

    def __init__(self, a: float = 10.0) -> None:
        super().__init__()
        self.a = float(a)

    def forward(self, x: Tensor) -> Tensor:
        """E(x), `[B]`, of x `[B, *S]`."""
        x = _rows(x)
        return self.a * x.shape[1] + (x.square() - self.a * torch.cos(2 * math.pi * x)).sum(1)


class Ackley(nn.Module):
    r"""The Ackley function: :math:`E(x) = a + e - a\,e^{-b \sqrt{\overline{x^2}}} - e^{\overline{\cos c x}}`.

    Bars are means over coordinates. It has no gradient at 0; torch gives NaN there.
    """

    def __init__(self, a: float = 20.0, b: float = 0.2, c: float = 2 * math.pi) -> None:
        super().__init__()
        self.a, self.b, self.c = float(a), float(b), float(c)

    def forward(self, x: Tensor) -> Tensor:
        """E(x), `[B]`, of x `[B, *S]`."""
        x = _rows(x)
        radius = x.square().mean(1).sqrt()
        return self.a + math.e - self.a * torch.exp(-self.b * radius) - torch.exp(torch.cos(self.c * x).mean(1))


class MLP(nn.Module):
    r"""A multilayer perceptron E(x) or E(x | c):

    .. math:: h_0 = x, \quad z_l = s_l \odot (W_l h_{l-1} + b_l) + t_l, \quad h_l = \phi(z_l), \quad E = v^\top h_L + v_0

    Without a condition s = 1 and t = 0. A condition c `[B, C]` enters as

    * `"concat"`: h_0 = (x, c);
    * `"add"`: t_l = A_l c in every hidden layer;
    * `"film"`: s_l = 1 + G_l c + g_l and t_l = T_l c + t_l⁰ in every hidden layer (Perez et al., AAAI 2018).

    Args:
        dim: numbers per chain, D.
        widths: widths of the hidden layers, one or more.
        activation: φ: "silu", "relu", "tanh", "softplus" or "gelu".
        condition_dim: C; 0 for an energy without condition.
        conditioning: "concat", "add" or "film".

    Raises:
        ValueError: an unknown activation or conditioning, or widths that are none.
    """

    def __init__(self, dim: int, widths: Sequence[int], activation: str = "silu", condition_dim: int = 0,
                 conditioning: str = "concat") -> None:
        super().__init__()
        widths = tuple(int(w) for w in widths)
        if dim < 1 or not widths or min(widths) < 1:
            raise ValueError(f"`dim` and `widths` must be positive, and at least one width, got {dim} and {widths}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"`activation` must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if conditioning not in ("concat", "add", "film"):
            raise ValueError(f'`conditioning` must be "concat", "add" or "film", got {conditioning!r}')
        if condition_dim < 0:
            raise ValueError(f"`condition_dim` must not be negative, got {condition_dim}")
        self.dim, self.condition_dim, self.conditioning = int(dim), int(condition_dim), conditioning
        first = dim + (condition_dim if conditioning == "concat" else 0)
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip((first, *widths), widths))
        self.activation = ACTIVATIONS[activation]()
        self.read_out = nn.Linear(widths[-1], 1)
        per_output = {"concat": 0, "add": 1, "film": 2}[conditioning] if condition_dim else 0
        self.modulations = nn.ModuleList(
            nn.Linear(condition_dim, per_output * w, bias=conditioning == "film") for w in widths if per_output)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """E(x | condition), `[B]`, of x `[B, *S]` and condition `[B, C]`; None is the condition 0."""
        h = _rows(x, self.dim)
        if condition is None:
            condition = h.new_zeros(len(h), self.condition_dim)
        elif condition.shape != (len(h), self.condition_dim):
            raise ValueError(f"`condition` must be [{len(h)}, {self.condition_dim}], got {list(condition.shape)}")
        if self.conditioning == "concat":
            h = torch.cat([h, condition.to(h.dtype)], 1) if self.condition_dim else h
        for i, layer in enumerate(self.layers):
            h = layer(h)
            if self.modulations:
                change = self.modulations[i](condition.to(h.dtype))
                if self.conditioning == "add":
                    h = h + change
                else:
                    scale, shift = change.chunk(2, 1)
                    h = (1 + scale) * h + shift
            h = self.activation(h)
        return self.read_out(h)[:, 0]
