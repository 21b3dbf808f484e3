"""Denoising score matching for noise-conditional energies, with a cross-entropy term that ties conditions together."""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class NoiseLevels:
    """Law of the noise level: log-uniform on [low, high], a share of it on [focus_low, focus_high] only."""

    low: float = 0.06
    high: float = 4.0
    focus_low: float = 0.12
    focus_high: float = 1.2
    focus: float = 0.3

    def draw(self, batch: int, generator: torch.Generator) -> Tensor:
        """Stratified levels [batch]: one in each of `batch` equal slices of the law, in random order."""
        u = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
        u = u[torch.randperm(batch, generator=generator)]
        focused = u < self.focus
        v = torch.where(focused, u / max(self.focus, 1e-12), (u - self.focus) / (1.0 - self.focus))
        low = torch.where(focused, self.focus_low, self.low)
        high = torch.where(focused, self.focus_high, self.high)
        return low * (high / low) ** v


def score_error(model: nn.Module, noised: Tensor, noise: Tensor, sigma: Tensor, condition: Tensor, keep: Tensor,
                std: float, create_graph: bool, frozen: Tensor | None = None) -> Tensor:
    """Weighted denoising score-matching error of each row [B].

    ``mean_pixels |sigma grad E(x + sigma n) - n|^2 (sigma^2 + s^2) / s^2``: the weight makes the target of the
    network unit variance at every level (Karras et al. 2022, section 5). `noised` [B, 3, H, W]; others [B]. `frozen`
    [B, 3, H, W] is the gradient of energies that are composed with this one, and adds to its own.
    """
    x = noised.requires_grad_(True)
    energy = model(x, condition, sigma, keep).sum()
    (gradient,) = torch.autograd.grad(energy, x, create_graph=create_graph)
    if frozen is not None:
        gradient = gradient + frozen
    error = (sigma[:, None, None, None] * gradient - noise).square().mean(dim=(1, 2, 3))
    return error * (sigma * sigma + std * std) / (std * std)


def ratio_gradient(model: nn.Module, noised: Tensor, sigma: Tensor, condition: Tensor, keep: Tensor) -> Tensor:
    """Gradient of `E(x | c, sigma) - E(x, sigma)` of a frozen model, [B, 3, H, W]; zero in rows that are not kept.

    What a concept learnt earlier adds to a composition whose prior is the new model's: `p(x | c) / p(x)`.
    """
    if hasattr(model, "ratio"):
        x = noised.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(model.ratio(x, condition, sigma, keep).sum(), x)
        return gradient
    rows = noised.detach().repeat(2, 1, 1, 1).requires_grad_(True)
    flags = torch.cat([keep, torch.zeros_like(keep)])
    energy = model(rows, condition.repeat(2, 1), sigma.repeat(2), flags)
    (gradient,) = torch.autograd.grad(energy, rows, torch.cat([keep, -keep]))
    conditioned, free = gradient.detach().chunk(2)
    return conditioned + free


def contrast(model: nn.Module, noised: Tensor, sigma: Tensor, candidates: Tensor) -> Tensor:
    """Cross-entropy of naming the true condition among candidates by energy: softmax(-E(x_sigma | c')), true one first.

    Score matching leaves a constant per condition free; this fixes it, so that OR weighs its branches equally and
    energies can be compared across conditions. noised [R, 3, H, W], sigma [R], candidates [R, K, C] drawn from the
    prior of conditions but for the first.
    """
    rows, count, width = candidates.shape
    x = noised.detach().repeat_interleave(count, dim=0)
    energy = getattr(model, "ratio", model)  # what does not depend on the condition cancels
    energy = energy(x, candidates.reshape(rows * count, width), sigma.repeat_interleave(count)).view(rows, count)
    return F.cross_entropy(-energy, torch.zeros(rows, dtype=torch.long, device=x.device))


def draw_candidates(truth: Tensor, pool: Tensor, count: int, labels: bool, generator: torch.Generator) -> Tensor:
    """Candidate conditions [R, K, C] for `contrast`, the truth first.

    With `labels` (one-hot conditions) every other label once; else `count - 1` conditions drawn from `pool` [N, C].
    """
    rows, width = truth.shape
    if labels:
        order = (truth.argmax(dim=1)[:, None] + torch.arange(width)) % width
        return F.one_hot(order, width).to(truth)
    others = pool[torch.randint(len(pool), (rows, count - 1), generator=generator)]
    return torch.cat([truth[:, None], others], dim=1)
