"""From the leaves of a composition to the fewest batched forward-backward passes.

Leaves of one model are stacked along the batch; all models go through one `autograd.grad`, with the
program's weights ∂E/∂E_k as cotangents, so the gradients come back weighted. Parameters are read live at
every call: nothing here can go stale.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from .composition import Concept, Expression, Slot, Source


@dataclass(frozen=True)
class Group:
    """Leaves that one call of one model evaluates: `leaves` are their indices in the expression."""

    source: Source
    leaves: tuple[int, ...]
    conditioned: bool

    def __len__(self):
        return len(self.leaves)


class Plan:
    """How an expression is evaluated; independent of batch, device and conditions."""

    def __init__(self, expression: Expression, compute_dtype: torch.dtype | None = None):
        if not isinstance(expression, Expression):
            raise TypeError(f"`expr` must be a Concept or a composition of them, got {expression!r}")
        if compute_dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"`compute_dtype` must be float32, bfloat16 or float16, got {compute_dtype}")
        self.expression = expression
        self.compute_dtype = None if compute_dtype == torch.float32 else compute_dtype
        self.leaves = expression.leaves
        self.program = expression.program
        self.groups = _groups(self.leaves)
        for leaf in self.leaves:
            _check_uncoupled(leaf)
        self.data_range = _common_range(self.leaves)

    def check_sigmas(self, sigmas: Sequence[float] | None) -> None:
        """Raise where a leaf needs a noise level and none is given, or was not trained at one that is."""
        for leaf in self.leaves:
            source = leaf.source
            if not source.takes_sigma:
                continue
            if sigmas is None and _sigma_required(source.model):
                raise ValueError(
                    f"the model of {leaf.name} takes a noise level: sample with Annealed(sigmas=...),"
                    " or pass `sigma=` to energy and gradient")
            low, high = source.sigma or (0.0, math.inf)
            outside = [s for s in sigmas or () if not 0.99 * low <= s <= 1.01 * high]
            if outside:
                raise ValueError(
                    f"`sigmas` must lie within {low:g} to {high:g}, the noise levels that the model of {leaf.name}"
                    f" knows, got {outside[0]:g}")

    def bind(self, x: torch.Tensor, conditions: Mapping | None = None) -> Evaluator:
        """An evaluator for chains like `x` `[B, *S]` under `conditions` `{slot: [B, C]}`."""
        if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.ndim < 1:
            got = f"{x.dtype} of shape {list(x.shape)}" if isinstance(x, torch.Tensor) else repr(type(x).__name__)
            raise ValueError(f"`x` must be a floating tensor [B, *S], got {got}")
        rows = check_conditions(self.expression, conditions, x.shape[0])
        return Evaluator(self, x.shape[0], x.device, x.dtype, rows)

    def explain(self, shape: Sequence[int] | None = None) -> str:
        """The simplified tree, its leaves and how they are batched, in plain words.

        `shape` of one chain, where known, decides with the models whether the chain engine can run it."""
        from .chain import reason_against

        expression, reason = self.expression, reason_against(self.expression, shape, self.compute_dtype)
        lines = [f"composition  {expression!r}", f"simplified   {expression.simplified!r}",
                 f"tail weight  T = {_show(expression.tail_weight)} (must be positive)",
                 f"step scale   M = {_show(expression.step_scale)} (divides annealed steps)"]
        if expression.slots:
            lines.append(f"slots        {', '.join(expression.slots)}, filled per chain")
        lines.append(f"leaves       {len(self.leaves)}, in {len(self.groups)} model call(s) and one backward per step")
        for group in self.groups:
            names = ", ".join(self.leaves[k].name for k in group.leaves)
            extras = [w for w, on in (("sigma", group.source.takes_sigma), ("keep", group.source.takes_keep)) if on]
            how = f"{len(group)} x B rows stacked" if len(group) > 1 else "B rows"
            takes = f", takes {', '.join(extras)}" if extras else ""
            lines.append(f"  {type(group.source.model).__name__} ({how}{takes}): {names}{_known(group.source)}")
        if self.program.has_or:
            lines.append("weights      per chain, from the leaf energies (there is an OR)")
        else:
            lines.append("weights      constant (no OR): energies are not waited for")
        yes = "yes, on the CPU: every leaf is a native energy"
        lines.append(f"chain engine {yes if reason is None else f'no: {reason}'}")
        return "\n".join(lines)


def _known(source: Source) -> str:
    """What is declared of a model: its data range, noise levels and α."""
    facts = [f"{name} {low:g} to {high:g}" for name, pair in (("data", source.data_range), ("sigma", source.sigma))
             if pair is not None for low, high in [pair]]
    facts += [] if source.negation_alpha is None else [f"alpha {source.negation_alpha:g}"]
    return f"  [{', '.join(facts)}]" if facts else ""


def _show(weight) -> str:
    return f"{weight:g}" if isinstance(weight, float) else repr(weight)


def _groups(leaves: tuple[Concept, ...]) -> tuple[Group, ...]:
    found: dict[tuple, list[int]] = {}
    for k, leaf in enumerate(leaves):
        conditioned = leaf.condition is not None
        key = (leaf.source.key, leaf.source.takes_keep or conditioned)
        found.setdefault(key, []).append(k)
    groups = []
    for members in found.values():
        conditioned = any(leaves[k].condition is not None for k in members)
        groups.append(Group(leaves[members[0]].source, tuple(members), conditioned))
    return tuple(groups)


def _check_uncoupled(leaf: Concept) -> None:
    model = leaf.source.model
    if not isinstance(model, torch.nn.Module):
        return
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                f"the model of {leaf.name} couples the chains of a batch: {name or type(module).__name__} is a"
                " BatchNorm in train mode. Call model.eval() first, or use GroupNorm")


def _common_range(leaves: tuple[Concept, ...]) -> tuple[float, float] | None:
    ranges = {leaf.source.data_range: leaf for leaf in leaves if leaf.source.data_range is not None}
    if len(ranges) > 1:
        (a, x), (b, y), *_ = ranges.items()
        raise ValueError(f"data ranges differ: {x.name} has {a}, {y.name} has {b}; train or wrap them to one range")
    return next(iter(ranges), None)


def _sigma_required(model) -> bool:
    function = model.forward if isinstance(model, torch.nn.Module) else model
    try:
        parameter = inspect.signature(function).parameters.get("sigma")
    except (TypeError, ValueError):
        return True
    return parameter is None or parameter.default in (inspect.Parameter.empty, None)


def check_conditions(expression: Expression, conditions: Mapping | None, n: int) -> dict[str, torch.Tensor]:
    """`conditions` as float tensors `[n, C]`, one for every slot of the expression, or an error naming one."""
    conditions = dict(conditions or {})
    slots = expression.slots
    if missing := [s for s in slots if s not in conditions]:
        raise ValueError(f"`conditions` must fill the slot {missing[0]!r}, got {sorted(conditions) or 'none'}")
    if unknown := [c for c in conditions if c not in slots]:
        raise ValueError(f"`conditions` names {unknown[0]!r}; the expression's slots are {list(slots) or 'none'}")
    rows = {}
    for name, value in conditions.items():
        value = torch.as_tensor(value)
        # A copy: a state that resumes must not follow what becomes of the caller's buffer.
        value = value.to(torch.get_default_dtype()) if not value.is_floating_point() else value.detach().clone()
        if value.ndim != 2 or value.shape[0] != n:
            raise ValueError(f"`conditions[{name!r}]` must be [n, C] with n = {n}, got {list(value.shape)}")
        if not torch.isfinite(value).all():
            raise ValueError(f"`conditions[{name!r}]` must be finite")
        rows[name] = value
    for leaf in expression.leaves:
        if isinstance(leaf.condition, Slot) and leaf.family is not None and leaf.family.condition_dim:
            got, want = rows[leaf.condition.name].shape[1], leaf.family.condition_dim
            if got != want:
                raise ValueError(
                    f"`conditions[{leaf.condition.name!r}]` must have {want} columns for {leaf.family.name!r}, got {got}")
    return rows


class Evaluator:
    """A plan for a fixed number of chains on one device, its condition rows laid out once."""

    def __init__(self, plan: Plan, batch: int, device, dtype, rows: Mapping[str, torch.Tensor]):
        self.plan = plan
        self.batch = batch
        self._device, self._dtype = device, dtype
        self._inputs = [self._group_inputs(group, rows) for group in plan.groups]
        self._cotangents: dict = {}
        self._sigmas: dict = {}
        self._stacked = len(plan.groups) == 1 and len(plan.leaves) > 1

    def _group_inputs(self, group: Group, rows):
        leaves = [self.plan.leaves[k] for k in group.leaves]
        keep = None
        if group.source.takes_keep and group.conditioned:
            flags = torch.tensor([float(leaf.condition is not None) for leaf in leaves])
            keep = flags.repeat_interleave(self.batch).to(self._device, self._dtype)
        if not group.conditioned:
            return None, keep
        parts = [None if leaf.condition is None else
                 rows[leaf.condition.name] if isinstance(leaf.condition, Slot) else
                 torch.tensor(leaf.condition, dtype=self._dtype).expand(self.batch, -1) for leaf in leaves]
        widths = {p.shape[1]: leaf for p, leaf in zip(parts, leaves) if p is not None}
        if len(widths) > 1:
            (a, x), (b, y), *_ = widths.items()
            raise ValueError(f"conditions of one model differ in width: {x.name} has {a} numbers, {y.name} has {b}")
        width = next(iter(widths))
        parts = [torch.zeros(self.batch, width) if p is None else p for p in parts]
        return torch.cat([p.to(self._device, self._dtype) for p in parts]), keep

    def energies(self, x: torch.Tensor, sigma: float | None = None) -> list[torch.Tensor]:
        """E_k(x), K tensors `[B]` in leaf order; differentiable with respect to `x`."""
        return self._energies([self._repeat(x, len(group)) for group in self.plan.groups], sigma)

    def gradients(self, x: torch.Tensor, sigma: float | None = None):
        """`(w_k ∇E_k(x), E_k(x))`: the weighted gradients `[K, B, *S]`, or K tensors `[B, *S]` where several
        models are involved, and the K energies `[B]`, all detached and contiguous. Needs grad mode."""
        xs = [self._repeat(x.detach(), len(group)).requires_grad_() for group in self.plan.groups]
        energies = self._energies(xs, sigma)
        for leaf, energy in zip(self.plan.leaves, energies):
            if not energy.requires_grad:
                raise ValueError(f"the energy of {leaf.name} does not depend on `x` (it carries no gradient)")
        cotangents = self._weights(energies, sigma)
        grads = _backward(tuple(energies), tuple(xs), tuple(cotangents)) if xs else ()
        return self._by_leaf(grads, x), energies

    def gradient(self, x: torch.Tensor, sigma: float | None = None) -> torch.Tensor:
        """∇E(x) = Σ_k w_k(x) ∇E_k(x), `[B, *S]`."""
        with torch.inference_mode(False), torch.enable_grad():
            grads, _ = self.gradients(x.clone() if x.is_inference() else x, sigma)
        return sum(grads[1:], grads[0].clone()) if len(grads) else torch.zeros_like(x)

    @staticmethod
    def _repeat(x, times: int) -> torch.Tensor:
        return x if times == 1 else x.repeat(times, *[1] * (x.ndim - 1))

    def _weights(self, energies, sigma) -> list[torch.Tensor]:
        """The cotangents of the energies: the program's weights w_k = ∂E/∂E_k, `[B]` each."""
        program = self.plan.program
        if program.has_or:
            weights = program.weights([e.detach() for e in energies], sigma)
            weights = [w if isinstance(w, torch.Tensor) else e.new_full(e.shape, w) for w, e in zip(weights, energies)]
            return [w.to(e.dtype) for w, e in zip(weights, energies)]
        if sigma not in self._cotangents:
            constant = program.constant_weights(sigma)
            self._cotangents[sigma] = [e.new_full(e.shape, w) for w, e in zip(constant, energies)]
        return self._cotangents[sigma]

    def _energies(self, xs, sigma) -> list[torch.Tensor]:
        if self.plan.compute_dtype is None:
            return self._leaf_energies(xs, sigma)
        with torch.autocast(self._device.type, dtype=self.plan.compute_dtype):
            return self._leaf_energies(xs, sigma)

    def _leaf_energies(self, xs, sigma) -> list[torch.Tensor]:
        out: list = [None] * len(self.plan.leaves)
        for group, x, (condition, keep) in zip(self.plan.groups, xs, self._inputs):
            energy = self._call(group, x, condition, keep, sigma)
            parts = (energy,) if len(group.leaves) == 1 else energy.split(self.batch)
            for k, part in zip(group.leaves, parts):
                out[k] = part
        return out

    def _call(self, group: Group, x, condition, keep, sigma) -> torch.Tensor:
        source = group.source
        args = (x,) if condition is None else (x, condition)
        kwargs = {}
        if keep is not None:
            kwargs["keep"] = keep
        if source.takes_sigma and sigma is not None:
            kwargs["sigma"] = self._sigma(sigma, x.shape[0])
        try:
            energy = source.model(*args, **kwargs)
        except Exception as error:
            names = ", ".join(self.plan.leaves[k].name for k in group.leaves)
            width = "" if condition is None else f", condition {list(condition.shape)}"
            error.add_note(f"while evaluating {names} with x {list(x.shape)}{width}")
            raise
        return _as_rows(energy, x.shape[0], source.reduce, self.plan.leaves[group.leaves[0]].name)

    def _sigma(self, sigma: float, rows: int) -> torch.Tensor:
        key = (sigma, rows)
        if key not in self._sigmas:
            self._sigmas[key] = torch.full((rows,), sigma, device=self._device, dtype=self._dtype)
        return self._sigmas[key]

    def _by_leaf(self, grads, x):
        for group, grad in zip(self.plan.groups, grads):
            if grad is None:
                raise ValueError(f"the energy of {self.plan.leaves[group.leaves[0]].name} does not depend on `x`")
        grads = [g if g.is_contiguous() else g.contiguous() for g in grads]
        if self._stacked:
            return grads[0].view(len(self.plan.leaves), *x.shape)
        out: list = [None] * len(self.plan.leaves)
        for group, grad in zip(self.plan.groups, grads):
            parts = [grad] if len(group) == 1 else grad.split(self.batch)
            for k, part in zip(group.leaves, parts):
                out[k] = part
        return out


def _backward(outputs: tuple, inputs: tuple, cotangents: tuple) -> tuple:
    """`torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True)` without its Python wrapper, which
    takes 40 µs of the 70 that the gradient of a small energy takes (measured on one CPU, torch 2.13)."""
    engine = getattr(torch.autograd.Variable, "_execution_engine", None)
    if engine is None:
        return torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True)
    return engine.run_backward(outputs, cotangents, False, False, inputs, allow_unreachable=True, accumulate_grad=False)


def _as_rows(energy, rows: int, reduce: str | None, name: str) -> torch.Tensor:
    """The energy of a model as `[rows]`; raises on other shapes unless they are to be summed."""
    if isinstance(energy, torch.Tensor) and energy.shape == (rows,) and energy.dtype is torch.float32:
        return energy
    if not isinstance(energy, torch.Tensor):
        raise TypeError(f"the energy of {name} must be a tensor [B], got {type(energy).__name__}")
    shape = list(energy.shape)
    if energy.ndim < 1 or shape[0] != rows:
        raise ValueError(f"the energy of {name} must be [B] or [B, 1] with B = {rows}, got {shape}")
    if energy.ndim == 1:
        pass
    elif reduce == "sum":
        energy = energy.flatten(1).sum(1)
    elif shape == [rows, 1]:
        energy = energy[:, 0]
    else:
        raise ValueError(
            f"the energy of {name} must be [B] or [B, 1], got {shape}; reduce=\"sum\" adds up the rest per chain")
    return energy if energy.dtype in (torch.float32, torch.float64) else energy.float()
