"""From the leaves of a composition to the fewest batched forward-backward passes.

Leaves of one model are stacked along the batch; models of one architecture run stacked or in branches, whichever is
faster; all go through one `autograd.grad`, with the program's weights ∂E/∂E_k as cotangents, so the gradients come back
weighted.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from .composition import Concept, Expression, Slot, Source
from .evaluator import Evaluator
from .stacking import Compiled
from .weights import PiecewiseSigma


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

    def __init__(self, expression: Expression, compute_dtype: torch.dtype | None = None, *, channels_last: bool = False,
                 compile: bool = False, stack: bool | str = False):
        if not isinstance(expression, Expression):
            raise TypeError(f"`expr` must be a Concept or a composition of them, got {expression!r}")
        if compute_dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"`compute_dtype` must be float32, bfloat16 or float16, got {compute_dtype}")
        self.expression = expression
        if stack not in (True, False, "auto"):
            raise ValueError(f'`stack_models` must be "auto", True or False, got {stack!r}')
        self.compute_dtype = None if compute_dtype == torch.float32 else compute_dtype
        self.channels_last, self.compile, self.stack = bool(channels_last), bool(compile), stack
        self.leaves = expression.leaves
        self.program = expression.program
        self.groups = _groups(self.leaves)
        self.schedules = any(isinstance(v, PiecewiseSigma) for v in self.program.values)
        self.may_stack = stack is not False and len({id(g.source.model) for g in self.groups}) > 1
        self.choices: dict[tuple[int, ...], str] = {}  # how models of one architecture run, and why: by leaves
        self.in_branches: set = set()  # shapes for which nothing is stacked,
        self.in_stacks: set = set()  # and those for which something is, and was seen to agree
        self.checked: set[tuple[int, tuple[bool, ...]]] = set()  # models, and modes, in which rows were seen not to be coupled
        self._compiled: dict[int, Compiled] = {}
        if compile and stack is True:
            raise ValueError("`stack_models` and `compile` exclude each other: compiled models run in branches")
        self.check_uncoupled()
        self.data_range = _common_range(self.leaves)
        for leaf, decides in zip(self.leaves, self.program.decisive):
            if decides and leaf.source.returns != "energy":
                raise ValueError(
                    f"{leaf.name} gives its {leaf.source.returns} and no energy, and an OR needs the energies of its branches:"
                    " such models compose in sums (AND, NOT) only")

    @property
    def has_energies(self) -> bool:
        """Whether every leaf has an energy; a score has none."""
        return all(leaf.source.returns == "energy" for leaf in self.leaves)

    def check_energies(self, what: str = "this") -> None:
        """Raise where a leaf has no energy."""
        for leaf in self.leaves:
            if leaf.source.returns != "energy":
                raise ValueError(f"{leaf.name} gives its {leaf.source.returns} and no energy, which {what} needs")

    def ways(self) -> str:
        """How models are called, beside plainly."""
        ways = [w for w, on in (("channels_last", self.channels_last), ("torch.compile", self.compile)) if on]
        if self.compute_dtype is not None:
            ways.append(f"autocast to {str(self.compute_dtype).removeprefix('torch.')}")
        stacks = [f"{len(leaves)} leaves stacked" for leaves, choice in self.choices.items() if choice.startswith("stacked")]
        return ", ".join([*ways, *stacks])

    def function(self, source: Source) -> Callable:
        """What is called for a model: itself, or compiled."""
        if not self.compile:
            return source.model
        if id(source.model) not in self._compiled:
            self._compiled[id(source.model)] = Compiled(source.model)
        return self._compiled[id(source.model)].function

    def refresh(self) -> None:
        """Models may have changed since they were compiled."""
        for compiled in self._compiled.values():
            compiled.refresh()

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

    def check_uncoupled(self) -> None:
        """Raise where a model couples the chains of a batch, as far as its modules and their modes tell."""
        for leaf in self.leaves:
            _check_uncoupled(leaf)

    def check_shape(self, shape: Sequence[int]) -> None:
        """Raise where a leaf's model knows x of another shape only."""
        for leaf in self.leaves:
            if leaf.source.shape not in (None, tuple(shape)):
                raise ValueError(f"the model of {leaf.name} takes x of shape {list(leaf.source.shape)}, got {list(shape)}")

    def bind(self, x: torch.Tensor, conditions: Mapping | None = None) -> Evaluator:
        """An evaluator for chains like `x` `[B, *S]` under `conditions` `{slot: [B, C]}`."""
        if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.ndim < 1:
            got = f"{x.dtype} of shape {list(x.shape)}" if isinstance(x, torch.Tensor) else repr(type(x).__name__)
            raise ValueError(f"`x` must be a floating tensor [B, *S], got {got}")
        rows = check_conditions(self.expression, conditions, x.shape[0])
        self.check_shape(x.shape[1:])
        return Evaluator(self, x, rows)

    @property
    def home(self) -> torch.device:
        """Where the first model with parameters or buffers has them, else the CPU."""
        modules = [leaf.source.model for leaf in self.leaves if isinstance(leaf.source.model, torch.nn.Module)]
        return next((p.device for m in modules for p in chain(m.parameters(), m.buffers())), torch.device("cpu"))

    def explain(self, shape: Sequence[int] | None = None, device: torch.device | None = None) -> str:
        """The simplified tree, its leaves and how they are batched, in plain words.

        `shape` of one chain and the device it runs on, where known, decide with the models whether the chain engine can run it."""
        from .cuda_chain import chains_on

        expression = self.expression
        lines = [f"composition  {expression!r}", f"simplified   {expression.simplified!r}",
                 f"tail weight  T = {_show(expression.tail_weight)} (must be positive)",
                 f"step scale   M = {_show(expression.step_scale)} (divides annealed steps)"]
        if expression.slots:
            lines.append(f"slots        {', '.join(expression.slots)}, filled per chain")
        lines.append(f"leaves       {len(self.leaves)}, in {len(self.groups)} model call(s) and one backward per step")
        for group in self.groups:
            names = ", ".join(self.leaves[k].name for k in group.leaves)
            extras = [w for w, on in (("sigma", group.source.takes_sigma), ("keep", group.source.takes_keep)) if on]
            how = f"{len(group)} x B rows in one call" if len(group) > 1 else "B rows"
            takes = f", takes {', '.join(extras)}" if extras else ""
            lines.append(f"  {type(group.source.model).__name__} ({how}{takes}): {names}{_known(group.source)}")
        for leaves, choice in self.choices.items():
            lines.append(f"  models of {', '.join(self.leaves[k].name for k in leaves)}: {choice}")
        if ways := self.ways():
            lines.append(f"models run   {ways}")
        if self.program.has_or:
            lines.append("weights      per chain, from the leaf energies (there is an OR)")
        else:
            lines.append("weights      constant (no OR): energies are not waited for")
        lines.append(f"chain engine {chains_on(device or self.home, expression, shape, self.compute_dtype)}")
        return "\n".join(lines)


def _known(source: Source) -> str:
    """What is declared of a model: its data range, noise levels and α."""
    facts = [f"{name} {low:g} to {high:g}" for name, pair in (("data", source.data_range), ("sigma", source.sigma))
             if pair is not None for low, high in [pair]]
    facts += [] if source.negation_alpha is None else [f"alpha {_show(source.negation_alpha)}"]
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


def as_mapping(conditions: Mapping | None) -> Mapping:
    """`conditions`, where there are any."""
    if conditions is not None and not isinstance(conditions, Mapping):
        raise TypeError(f"`conditions` must be {{slot: rows [n, C]}}, got {type(conditions).__name__}")
    return conditions or {}


def check_conditions(expression: Expression, conditions: Mapping | None, n: int) -> dict[str, torch.Tensor]:
    """`conditions` as float tensors `[n, C]`, one for every slot of the expression, or an error naming one."""
    conditions = dict(as_mapping(conditions))
    slots = expression.slots
    if missing := [s for s in slots if s not in conditions]:
        raise ValueError(f"`conditions` must fill the slot {missing[0]!r}, got {sorted(conditions) or 'none'}")
    if unknown := [c for c in conditions if c not in slots]:
        raise ValueError(f"`conditions` names {unknown[0]!r}; the expression's slots are {list(slots) or 'none'}")
    rows = {}
    for name, value in conditions.items():
        value = torch.as_tensor(value)
        # A copy: a state that resumes must not follow what becomes of the caller's buffer.
        whole = torch.promote_types(torch.get_default_dtype(), torch.float32)  # bfloat16 would round labels
        value = value.to(whole) if not value.is_floating_point() else value.detach().clone()
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
