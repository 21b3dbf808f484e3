"""Whether a model lets the chains of a batch see each other, which no sampler of independent chains can use."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

_passed: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # model -> which of its modules were in train mode
TOLERANCE = 1e-2  # relative: libraries may sum a batch of another size in another order


class CoupledError(ValueError):
    """The energy of a chain depends on the other chains of its batch."""


def check_rows(evaluator, x: Tensor, sigma: float | None) -> None:
    """Evaluate a row of every model in a batch, and alone.

    For rows that do not see each other ∂E(x_0)/∂x_1 is exactly 0, and E(x_0) is the same with and without x_1.

    Raises:
        CoupledError: they do; it names concept and remedy.
    """
    for rows, part in evaluator.parts:
        for p in part.passes:
            for member in getattr(p, "members", [p]):
                model = member.group.source.model
                key = id(model), _modes(model)
                if member.group.source.returns != "energy" or _known(model) or key in part.plan.checked:
                    continue
                _check(part, member, x[rows], sigma)
                part.plan.checked.add(key)
                try:
                    _passed[model] = _modes(model)
                except TypeError:
                    pass  # not to be referred to weakly


def _modes(model) -> tuple[bool, ...]:
    """Which of a model's modules are in train mode."""
    return tuple(m.training for m in model.modules()) if isinstance(model, nn.Module) else ()


def _known(model) -> bool:
    try:
        return model in _passed and _passed[model] == _modes(model)
    except TypeError:
        return False


def _check(evaluator, p, x: Tensor, sigma) -> None:
    rows = torch.cat([x[:1], 0.9 * x[-1:] + 0.05])
    try:
        with torch.inference_mode(False), torch.enable_grad():
            pair = rows.clone().requires_grad_()
            energy = evaluator.rows(p, pair, sigma)
            (grad,) = torch.autograd.grad(energy[0], pair, allow_unused=True)
        with torch.no_grad():
            again, alone = evaluator.rows(p, rows, sigma), evaluator.rows(p, rows[:1], sigma)
    except Exception:  # a model that does not work says so where it is run, with the shapes of the run
        return
    coupled = grad is not None and bool((grad[1] != 0).any())  # NaN counts: something is wrong, but not coupling
    coupled &= grad is None or bool(torch.isfinite(grad).all())
    random = not torch.equal(energy.detach(), again)
    apart = (energy[0].detach() - alone[0]).abs() > TOLERANCE * energy.detach().abs().max().clamp_min(1e-3)
    if not coupled and (random or not bool(apart)):
        return
    name, model = evaluator.plan.leaves[p.blocks[0][0]].name, p.group.source.model
    training = isinstance(model, nn.Module) and model.training
    raise CoupledError(
        f"the model of {name} couples the chains of a batch: the energy of a chain changes with the others, so samples would"
        f" depend on batch size and order. {'Call model.eval() first, or use' if training else 'Use'} layers that treat rows"
        " apart (GroupNorm and LayerNorm do); check=False skips this test")
