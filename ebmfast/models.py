"""Networks for energies of images. One row in, one number out; rows of a batch never see each other."""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Block(nn.Module):
    """Residual block: SiLU, conv, scale and shift from the embedding, SiLU, conv; 1x1 bypass where channels change."""

    def __init__(self, c_in: int, c_out: int, embedding: int):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.film = nn.Linear(embedding, 2 * c_out)
        self.bypass = nn.Conv2d(c_in, c_out, 1, bias=False) if c_in != c_out else nn.Identity()
        with torch.no_grad():
            self.conv2.weight.mul_(0.3)
            self.film.weight.mul_(0.3)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.film(embedding)[:, :, None, None].chunk(2, dim=1)
        y = self.conv1(F.silu(x)) * (1.0 + scale) + shift
        return self.bypass(x) + self.conv2(F.silu(y))


@lru_cache(maxsize=64)
def _matrix(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Nine numbers as a matrix; made once, for a copy to a GPU waits for it and cannot be captured."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device).view(3, 3)


class NoiseConditionalEnergy(nn.Module):
    """Energy of a noised image under a condition, whose gradient is minus the score of the noised density.

    ``E(x, c, sigma) = |u|^2 / 2 + (s / sigma) h(u, c, sigma)``, ``u = (x - mean) / sqrt(sigma^2 + s^2)`` with ``s``
    the standard deviation of the data: the first term is exact for data without structure, so the network h learns
    the rest only. h reads a 2x2 pixel-unshuffled image and coordinates through residual blocks at three scales; its
    value is a linear read-out of the last map plus, at every scale, the inner product of two 1x1-conv heads, so that
    its gradient works like the decoder of a U-Net.

    Args:
        condition_dim: C, floats of a condition; 0 for a network without one.
        widths: channels at 1/2, 1/4 and 1/8 of the resolution.
        depths: residual blocks at these scales.
        embedding: width of the embedding of (condition, sigma).
        heads: channels of the bilinear read-outs.
        mean, std: of the data, in its range.
        sigma: (min, max) noise level the network is trained on.
        center, scale: the condition enters as (condition - center) / scale; numbers, or one for each float.
        harmonics: also feed sin and cos of (pi/2) k times the scaled condition, k = 1..harmonics.
        homography: 9 numbers, row-major; maps (x, y, 1) of a position condition to homogeneous image coordinates
            in [-1, 1]; the network then also gets Gaussian bumps of three widths centred there.
        place: where in the condition x and y are, for `homography`.
        channels: of the pictures, 3 if they are in colour.
    """

    BUMPS = (0.12, 0.3, 0.8)

    def __init__(
        self,
        condition_dim: int,
        widths: Sequence[int] = (32, 56, 80),
        depths: Sequence[int] = (1, 2, 2),
        embedding: int = 64,
        heads: int = 16,
        mean: float = 0.0,
        std: float = 0.25,
        sigma: Sequence[float] = (0.06, 4.0),
        center: float | Sequence[float] = 0.0,
        scale: float | Sequence[float] = 1.0,
        harmonics: int = 0,
        homography: Sequence[float] | None = None,
        place: int = 0,
        channels: int = 3,
    ):
        super().__init__()
        self.condition_dim, self.harmonics, self.place = condition_dim, harmonics, place
        self.mean, self.std = mean, std
        for name, value in (("center", center), ("scale", scale)):
            if isinstance(value, Sequence):
                self.register_buffer(name, torch.tensor(value, dtype=torch.float32), persistent=False)
            else:
                setattr(self, name, value)
        self.sigma_range = (float(sigma[0]), float(sigma[1]))
        self.homography = None if homography is None else tuple(float(v) for v in homography)
        features = condition_dim * (1 + 2 * harmonics)
        if condition_dim:
            self.embed_condition = nn.Sequential(nn.Linear(features, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.embed_sigma = nn.Linear(8, embedding)
        self.embed = nn.Linear(embedding, embedding)
        self.no_condition = nn.Parameter(torch.zeros(embedding))
        bumps = len(self.BUMPS) if homography is not None else 0
        self.stem = nn.Conv2d(4 * channels + 2 + bumps, widths[0], 3, padding=1)
        self.blocks, self.left, self.right = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        c = widths[0]
        for width, depth in zip(widths, depths):
            stage = nn.ModuleList()
            for _ in range(depth):
                stage.append(_Block(c, width, embedding))
                c = width
            self.blocks.append(stage)
            self.left.append(nn.Conv2d(width, heads, 1))
            self.right.append(nn.Conv2d(width, heads, 1))
        self.linear = nn.Conv2d(c, 1, 1, bias=False)

    def forward(self, x: Tensor, condition: Tensor | None = None, sigma: Tensor | None = None,
                keep: Tensor | None = None) -> Tensor:
        """Energies [B] of x [B, 3, H, W] under condition [B, C] at noise level sigma [B] (or a scalar tensor).

        keep [B] is 1 for conditioned rows and 0 for unconditional ones; condition None makes all rows unconditional;
        sigma None is the smallest level. Raises ValueError when the condition has another width than C.
        """
        batch = x.shape[0]
        if sigma is None:
            sigma = x.new_full((batch,), self.sigma_range[0])
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(batch)
        u = self.scaled(x, sigma)
        return 0.5 * u.square().sum(dim=(1, 2, 3)) + (self.std / sigma) * self.structure(u, condition, sigma, keep)

    def scaled(self, x: Tensor, sigma: Tensor) -> Tensor:
        """u of x [B, 3, H, W] at noise level sigma [B]."""
        level = sigma[:, None, None, None]
        return (x - self.mean) / torch.sqrt(level * level + self.std**2)

    def structure(self, u: Tensor, condition: Tensor | None, sigma: Tensor, keep: Tensor | None = None) -> Tensor:
        """h(u, c, sigma) [B] of u [B, 3, H, W]; others as in `forward`."""
        condition, keep = self._condition(u, condition, keep)
        return self._network(u, self._embedding(condition, keep, sigma), self._maps(u, condition, keep))

    def _condition(self, x: Tensor, condition: Tensor | None, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        batch = x.shape[0]
        if condition is None:
            return x.new_zeros(batch, self.condition_dim), x.new_zeros(batch)
        if condition.shape != (batch, self.condition_dim):
            raise ValueError(f"`condition` must be [{batch}, {self.condition_dim}], got {list(condition.shape)}")
        return condition, x.new_ones(batch) if keep is None else keep

    def _embedding(self, condition: Tensor, keep: Tensor, sigma: Tensor) -> Tensor:
        """Embedding [B, D] of everything that is constant while a level is sampled."""
        c = (condition - self.center) / self.scale
        waves = [f(0.5 * math.pi * k * c) for k in range(1, self.harmonics + 1) for f in (torch.sin, torch.cos)]
        lo, hi = (math.log(s) for s in self.sigma_range)
        t = (torch.log(sigma) - lo) / (hi - lo)
        k = torch.arange(8, dtype=sigma.dtype, device=sigma.device)
        keep = keep[:, None]
        e = (1.0 - keep) * self.no_condition
        if self.condition_dim:
            e = keep * self.embed_condition(torch.cat([c, *waves], dim=1)) + e
        e = e + self.embed_sigma(torch.cos(math.pi * k * t[:, None]))
        return F.silu(self.embed(F.silu(e)))

    def _maps(self, x: Tensor, condition: Tensor, keep: Tensor) -> Tensor:
        """Coordinate channels and, with a homography, bumps where the condition projects to: [B, 2 or 5, H/2, W/2]."""
        height, width = x.shape[2] // 2, x.shape[3] // 2
        rows = (torch.arange(height, dtype=x.dtype, device=x.device) + 0.5) * (2.0 / height) - 1.0
        columns = (torch.arange(width, dtype=x.dtype, device=x.device) + 0.5) * (2.0 / width) - 1.0
        v, u = rows[:, None].expand(height, width), columns[None, :].expand(height, width)
        coordinates = torch.stack([u, v]).expand(x.shape[0], 2, height, width)
        if self.homography is None:
            return coordinates
        matrix = _matrix(self.homography, x.dtype, x.device)
        point = F.pad(condition[:, self.place:self.place + 2], (0, 1), value=1.0) @ matrix.T
        cu, cv = (point[:, i] / point[:, 2] for i in (0, 1))
        distance = (u - cu[:, None, None]).square() + (v - cv[:, None, None]).square()
        bumps = [torch.exp(-0.5 * distance / w**2) * keep[:, None, None] for w in self.BUMPS]
        return torch.cat([coordinates, torch.stack(bumps, dim=1)], dim=1)

    def _network(self, u: Tensor, embedding: Tensor, maps: Tensor) -> Tensor:
        """h(u, c, sigma) [B]."""
        y = self.stem(torch.cat([F.pixel_unshuffle(u, 2), maps], dim=1))
        value = 0.0
        for scale, stage in enumerate(self.blocks):
            if scale:
                y = F.avg_pool2d(y, 2)
            for block in stage:
                y = block(y, embedding)
            a = F.silu(y)
            value = value + (self.left[scale](a) * self.right[scale](a)).sum(dim=(1, 2, 3))
        return value + self.linear(F.silu(y)).sum(dim=(1, 2, 3))


VIEWS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "luminance": (1, lambda u: u.sum(dim=1, keepdim=True) / math.sqrt(u.shape[1])),
    "coarse": (3, lambda u: F.avg_pool2d(u, u.shape[-1] // 8) * (u.shape[-1] // 8)),
}


class ViewedEnergy(nn.Module):
    """A noise-conditional energy whose condition looks at the picture through a view V only.

    ``E(x, c, sigma) = E_0(x, sigma) + (s / sigma) r(V u, c, sigma)``: E_0 is a `NoiseConditionalEnergy` without condition,
    r a network like its own. What is composed with other concepts, E(x | c) - E(x), is then a function of the view: a shape
    that looks at luminance says nothing about colours, also not about pairs of shape and colour that training never showed;
    p(x) prod_i p(V_i x | c_i) / p(V_i x) is exact where c_i depends on x through V_i x. Rows of V are orthonormal, so that
    white noise stays white.

    Args:
        condition_dim: C, floats of a condition.
        view: "luminance", the sum of the channels over the root of their number, or "coarse", means over 8x8 blocks times
            the width of a block.
        prior: options of E_0, beside mean, std and sigma.
        mean, std, sigma: as in `NoiseConditionalEnergy`.
        options: of r: widths, depths, center, scale, homography, ...
    """

    def __init__(self, condition_dim: int, view: str = "luminance", prior: Mapping[str, Any] | None = None, mean: float = 0.0,
                 std: float = 0.25, sigma: Sequence[float] = (0.06, 4.0), **options: Any):
        super().__init__()
        if view not in VIEWS:
            raise ValueError(f"`view` must be one of {', '.join(VIEWS)}, got {view!r}")
        channels, self._view = VIEWS[view]
        self.condition_dim, self.mean, self.std, self.sigma_range = condition_dim, mean, std, (float(sigma[0]), float(sigma[1]))
        self.prior = NoiseConditionalEnergy(0, mean=mean, std=std, sigma=sigma, **(prior or {}))
        self.seen = NoiseConditionalEnergy(condition_dim, mean=mean, std=std, sigma=sigma, channels=channels, **options)

    def forward(self, x: Tensor, condition: Tensor | None = None, sigma: Tensor | None = None,
                keep: Tensor | None = None) -> Tensor:
        """Energies [B], arguments and errors as in `NoiseConditionalEnergy`."""
        energy = self.prior(x, None, sigma)
        return energy if condition is None else energy + self.ratio(x, condition, sigma, keep)

    def ratio(self, x: Tensor, condition: Tensor, sigma: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """E(x | c) - E(x) [B], without the cost of E(x); 0 in rows that are not kept."""
        sigma = x.new_tensor(self.sigma_range[0]) if sigma is None else sigma
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
        value = (self.std / sigma) * self.seen.structure(self._view(self.prior.scaled(x, sigma)), condition, sigma)
        return value if keep is None else keep * value


class Ratio(nn.Module):
    """What a condition adds to an energy, E(x | c) - E(x) = -log p(x | c) / p(x) but for a constant, in one call.

    Args:
        model: an energy of (x, condition, sigma) with an unconditional E(x) under condition None; where it has a method `ratio`, as
            `ViewedEnergy` has, E(x) is not evaluated.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, condition: Tensor, sigma: Tensor | None = None) -> Tensor:
        """Energies [B] of x [B, C, H, W] under condition [B, D] at sigma [B]."""
        if hasattr(self.model, "ratio"):
            return self.model.ratio(x, condition, sigma)
        return self.model(x, condition, sigma) - self.model(x, None, sigma)


class Symmetrized(nn.Module):
    """An energy made blind to cyclic shifts P of its C channels: -log (1/C sum_k exp(-E(P^k x))), a mixture of shifted densities.

    Shifts of the channels turn red into green into blue and leave grey as it is. White noise does not change under them, so that
    the mixture of noised densities is the noised mixture, and its parts have one partition function. Where a prior p(x) has seen
    some colours on some shapes only, the mixture has seen what any of the shifts shows.

    Args:
        model: an energy of (x, condition, sigma); its condition is None.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, sigma: Tensor | None = None) -> Tensor:
        """Energies [B] of x [B, C, H, W] at sigma [B]."""
        shifts = x.shape[1]
        energies = [self.model(x.roll(k, 1) if k else x, None, sigma).view(-1) for k in range(shifts)]
        return math.log(shifts) - torch.stack(energies).neg().logsumexp(0)


def network_class(arguments: Mapping[str, Any]) -> type[NoiseConditionalEnergy | ViewedEnergy]:
    """The class of noise-conditional energies whose arguments these are."""
    return ViewedEnergy if "view" in arguments else NoiseConditionalEnergy


class AtNoiseLevel(nn.Module):
    """A noise-conditional energy at one level, for pictures in [0, 1]: what contrastive divergence can start from.

    ``E(x | c) = network(2 x - 1, c, sigma)``, the energy of pictures under noise of standard deviation sigma / 2.

    Args:
        sigma: the level, in the network's own range [-1, 1].
        condition_dim, options: of `NoiseConditionalEnergy`, or of `ViewedEnergy` where a view is among them.
    """

    def __init__(self, sigma: float, condition_dim: int, **options):
        super().__init__()
        self.sigma = sigma
        self.network = network_class(options)(condition_dim, **options)

    def forward(self, x: Tensor, condition: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """Energies [B] of x [B, 3, H, W] in [0, 1] under condition [B, C]; `keep` as in `NoiseConditionalEnergy`."""
        return self.network(2.0 * x - 1.0, condition, x.new_full((len(x),), self.sigma), keep)


class _Conv(nn.Module):
    """3x3 convolution without bias, its weight divided by its spectral norm, or by what of it exceeds 1.

    The norm is estimated by one power iteration per training call, and constant in eval mode. Source: Miyato et al., ICLR 2018.
    """

    def __init__(self, c_in: int, c_out: int, at_most: bool = False, spectral: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(c_out, c_in, 3, 3))
        nn.init.kaiming_normal_(self.weight, nonlinearity="linear")
        self.at_most, self.spectral = at_most, spectral
        if at_most:
            with torch.no_grad():
                self.weight.mul_(1e-3)
        if spectral:
            self.register_buffer("u", F.normalize(torch.randn(c_out), dim=0))

    def effective_weight(self) -> Tensor:
        """The weight that convolves."""
        if not self.spectral:
            return self.weight
        matrix, u = self.weight.flatten(1), self.u
        with torch.no_grad():
            v = F.normalize(matrix.T @ u, dim=0)
            u = F.normalize(matrix @ v, dim=0)
            if self.training:
                self.u.copy_(u)
        sigma = u @ matrix @ v
        return self.weight / (sigma.clamp_min(1.0) if self.at_most else sigma)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.effective_weight(), padding=1)


class _ConditionedBlock(nn.Module):
    """conv(x + G1 c), swish, conv(. + G2 c) * (G c + b), plus the bypass; pooled if asked; swish. `leaky`: leaky ReLU instead."""

    def __init__(self, c_in: int, c_out: int, condition_dim: int, pool: bool, spectral: bool, leaky: bool = False):
        super().__init__()
        self.conv1, self.conv2 = _Conv(c_in, c_out, spectral=spectral), _Conv(c_out, c_out, True, spectral)
        self.shift1 = nn.Parameter(torch.zeros(condition_dim, c_in))
        self.shift2 = nn.Parameter(torch.zeros(condition_dim, c_out))
        self.gain, self.bias = nn.Parameter(torch.ones(condition_dim, c_out)), nn.Parameter(torch.zeros(c_out))
        self.bypass = _Conv(c_in, c_out, spectral=spectral) if c_in != c_out else nn.Identity()
        self.pool, self.leaky = pool, leaky

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        y = self._activation(self.conv1(x + (c @ self.shift1)[:, :, None, None]))
        y = self.conv2(y + (c @ self.shift2)[:, :, None, None]) * (c @ self.gain + self.bias)[:, :, None, None]
        y = y + self.bypass(x)
        return self._activation(F.avg_pool2d(y, 2) if self.pool else y)

    def _activation(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, 0.2) if self.leaky else F.silu(x)


class _PaperNet(nn.Module):
    """What the paper's two networks share: convolutions with constant spectral norm, conditioned blocks, a linear read-out.

    Convolutions are conditioned by additive maps of their input and, the second of a block, a multiplicative one of its
    output, `y = conv(x + c G_b) (c G + b)`; no other bias, no normalisation layers.
    """

    def __init__(self, condition_dim: int, width: int, spectral: bool, stages: Sequence[tuple[int, int, bool]], first_leaky: bool):
        super().__init__()
        self.options = {"condition_dim": condition_dim, "width": width}
        self.stem = _Conv(3, width, spectral=spectral)
        self.blocks = nn.ModuleList(
            _ConditionedBlock(a * width, b * width, condition_dim, pool, spectral, first_leaky and i == 0)
            for i, (a, b, pool) in enumerate(stages))
        self.read_out = nn.Linear(stages[-1][1] * width, 1)

    def features(self, x: Tensor, condition: Tensor) -> Tensor:
        """The last map, activated: [B, channels, h, w]."""
        y = F.silu(self.stem(x))
        for block in self.blocks:
            y = block(y, condition)
        return F.silu(y)

    def folded(self) -> _PaperNet:
        """A network in eval mode with the same energies, its weights divided once; this one is not changed."""
        other = type(self)(**self.options, spectral=False).to(self.read_out.weight)
        self.fold_into(other)
        return other.eval()

    @torch.no_grad()
    def fold_into(self, other: _PaperNet) -> None:
        """Write the divided weights into a network without spectral norm, in place, as training draws negatives from it."""
        target = {k: v for k, v in other.named_parameters()}
        training = self.training
        self.eval()
        divided = {f"{n}.weight": m.effective_weight() for n, m in self.named_modules() if isinstance(m, _Conv)}
        self.train(training)
        for name, value in self.named_parameters():
            target[name].copy_(divided.get(name, value))


class CubesNet(_PaperNet):
    """The paper's energy of 64x64 scenes: 2.18 M parameters at C = 20, 0.78 G multiply-adds forward per image.

    3x3 convolutions with spectral norm and residual blocks down to 4x4; mean over space, linear read-out.
    Source: Du, Li and Mordatch, NeurIPS 2020, appendix and code.

    Args:
        condition_dim: C, floats of a condition.
        width: channels of the first stage.
        spectral: whether weights are divided by their spectral norms; `folded()` is the same network without.
    """

    STAGES = ((1, 1, True), (1, 2, True), (2, 2, True), (2, 2, False), (2, 4, True))

    def __init__(self, condition_dim: int, width: int = 64, spectral: bool = True):
        super().__init__(condition_dim, width, spectral, self.STAGES, first_leaky=False)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Energies [B, 1] of x [B, 3, H, W] under condition [B, C]."""
        return self.read_out(self.features(x, condition).mean(dim=(2, 3)))


class ResNet128(_PaperNet):
    """The paper's energy of 128x128 faces: 15.7 M parameters, 5.24 G multiply-adds forward per image.

    As `CubesNet`, with six blocks down to 4x4, leaky ReLU (0.2) in the first, and a sum over space before the read-out.
    Source: Du, Li and Mordatch, NeurIPS 2020, appendix and code.

    Args:
        condition_dim: C, floats of a condition; one attribute of CelebA is one-hot, C = 2.
        width: channels of the first stage.
        spectral: whether weights are divided by their spectral norms; `folded()` is the same network without.
    """

    STAGES = ((1, 1, True), (1, 2, True), (2, 4, True), (4, 8, True), (8, 8, True), (8, 8, False))

    def __init__(self, condition_dim: int = 2, width: int = 64, spectral: bool = True):
        super().__init__(condition_dim, width, spectral, self.STAGES, first_leaky=True)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Energies [B, 1] of x [B, 3, H, W] under condition [B, C]."""
        return self.read_out(self.features(x, condition).sum(dim=(2, 3)))
