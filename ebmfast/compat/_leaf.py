"""A model of torchebm's kind as a leaf of a composition: how it is called, and the native energy that it may be."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import energies
from ..chain import reason_against
from ..composition import Concept

TOLERANCE = 1e-2  # relative, of energies alone and in a batch: libraries sum batches of other sizes in other orders


class Called:
    """A model under the keyword arguments of the present call: E(x) `[B]`, and ∇E where the model has a function for it."""

    def __init__(self, model: Callable, gradient: Callable | None):
        self.model, self.own = model, gradient
        self.kwargs: dict = {}

    def __call__(self, x: Tensor) -> Tensor:
        """Energies `[B]` of x `[B, *S]`.

        Raises:
            ValueError: the model returns another shape.
            RuntimeError: the energy does not depend on x.
        """
        energy = self.model(x, **self.kwargs)
        if not hasattr(self.model, "gradient") and isinstance(energy, Tensor) and energy.shape == (len(x), 1):
            energy = energy[:, 0]  # torchebm's models return [B] alone
        if not isinstance(energy, Tensor) or energy.shape != x.shape[:1]:
            got = list(energy.shape) if isinstance(energy, Tensor) else type(energy).__name__
            raise ValueError(f"the energy of {type(self.model).__name__} must be [B], here [{len(x)}], got {got}")
        if torch.is_grad_enabled() and not energy.requires_grad:
            raise RuntimeError(f"the energy of {type(self.model).__name__} does not depend on `x` (it carries no gradient)")
        return energy

    @torch.no_grad()
    def gradient(self, x: Tensor) -> Tensor:
        """∇E(x) `[B, *S]`, from the model's own function."""
        return self.own(x, model_kwargs=self.kwargs) if self.kwargs else self.own(x)

    def concept(self) -> Concept:
        """The leaf."""
        gradient = None if self.own is None else self.gradient
        return Concept(self, name=type(self.model).__name__, takes_sigma=False, gradient=gradient)


class Twin:
    """The native energy that computes what one of torchebm's analytic models does, from the same memory."""

    def __init__(self, model: nn.Module, native: nn.Module, numbers: tuple[str, ...], tensors: dict[str, str]):
        self.model, self.native, self.numbers, self.tensors = model, native, numbers, tensors
        self._taken: dict[str, Tensor] = {}
        self._seen: tuple = ()

    def follow(self) -> bool:
        """Take over what has changed in the model; False where a native energy cannot."""
        model, own = self.model, vars(self.model)
        if "forward" in own or "gradient" in own or model.use_mixed_precision or model._forward_hooks or model._forward_pre_hooks:
            return False
        for name in self.numbers:
            value = own.get(name)
            if type(value) not in (int, float):
                return False
            if getattr(self.native, name) != value:
                setattr(self.native, name, float(value))
        for name, theirs in self.tensors.items():
            value = getattr(model, theirs)
            if value.dtype is not torch.float32:
                return False
            if self._taken.get(name) is not value:
                self._taken[name] = value
                # Matrices are symmetric, and torch.inverse leaves them column by column.
                setattr(self.native, name, value if value.is_contiguous() else value.T)
        return self._symmetric()

    def _symmetric(self) -> bool:
        """∇(dᵀPd)/2 = Pd needs a symmetric P."""
        if "precision" not in self.tensors:
            return True
        precision = self.native.precision
        seen = precision.data_ptr(), precision._version
        if seen != self._seen:
            if not torch.allclose(precision, precision.T, rtol=1e-4, atol=1e-6):
                return False
            self._seen = seen
        return True


def twin(model) -> Twin | None:
    """The native twin of one of torchebm's analytic models, or None."""
    from torchebm import core

    match type(model):
        case core.DoubleWellModel:
            return Twin(model, energies.DoubleWell(), ("barrier_height", "b"), {})
        case core.HarmonicModel:
            return Twin(model, energies.Harmonic(), ("k",), {})
        case core.RosenbrockModel:
            return Twin(model, energies.Rosenbrock(), ("a", "b"), {})
        case core.StyblinskiTangModel:
            return Twin(model, energies.StyblinskiTang(), (), {})
        case core.GaussianModel:
            size = len(model.mean)
            native = energies.Gaussian(torch.zeros(size), torch.eye(size))
            return Twin(model, native, (), {"mean": "mean", "precision": "cov_inv"})
    return None


def is_native(model, shape: tuple[int, ...]) -> bool:
    """Whether the chain engine runs the model as it is."""
    if not isinstance(model, nn.Module) or hasattr(model, "gradient"):
        return False
    return reason_against(Concept(model, name=type(model).__name__), shape) is None


def couples(called: Called, x: Tensor) -> bool:
    """Whether the energy of a chain changes with the other chains of its batch.

    For rows that do not see each other ∂E(x_0)/∂x_1 is exactly 0, and E(x_0) is the same alone. Where the model takes
    keyword arguments, whose rows nobody else can tell, or no batch of two, the whole batch is evaluated.
    """
    modules = called.model.modules() if isinstance(called.model, nn.Module) else ()
    if any(isinstance(m, _BatchNorm) and (m.training or m.running_mean is None) for m in modules):
        return True
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
        if called.kwargs:
            return _sees_others(called, x.detach().clone())
        try:
            pair = torch.cat([x[:1], 0.9 * x[-1:] + 0.05])
            return _sees_others(called, pair) or _alone_is_other(called, pair)
        except Exception:  # the model may insist on its batch; if it does not work at all, it says so below
            return _sees_others(called, x.detach().clone())


def _sees_others(called: Called, rows: Tensor) -> bool:
    leaf = rows.requires_grad_()
    (gradient,) = torch.autograd.grad(called(leaf)[0], leaf, allow_unused=True)
    return gradient is not None and bool(torch.isfinite(gradient).all()) and bool((gradient[1:] != 0).any())


@torch.no_grad()
def _alone_is_other(called: Called, pair: Tensor) -> bool:
    together, again, alone = called(pair), called(pair), called(pair[:1])
    apart = (together[0] - alone[0]).abs() > TOLERANCE * together.abs().max().clamp_min(1e-3)
    return torch.equal(together, again) and bool(apart)
