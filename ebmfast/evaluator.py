"""Leaf energies and weighted gradients of a plan: the fewest model calls, and one backward pass.

Every call reads parameters as they are; only a stack of several models' parameters is a copy, made when chains are
bound and again after a callback.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .composition import Slot
from .stacking import Stacked, choose

if TYPE_CHECKING:
    from .plan import Group, Plan


@dataclass
class Pass:
    """One call of one model, over `len(blocks)` x B rows: the leaves of a block share its rows."""

    group: Group
    blocks: list[list[int]]
    condition: Tensor | None
    keep: Tensor | None

    def __len__(self):
        return len(self.blocks)

    @property
    def form(self) -> tuple:
        """What passes must have in common to run stacked."""
        condition, keep = (None if t is None else tuple(t.shape) for t in (self.condition, self.keep))
        return self.group.source.reduce, len(self.blocks), condition, keep


@dataclass
class Layout:
    """The passes that evaluate those leaves which count at a noise level."""

    passes: list[Pass | Stacked]  # with energies, whose gradients come from autograd
    given: list[Pass]  # whose gradients the model, or a function beside it, gives
    leaves: int
    cotangents: dict = field(default_factory=dict)  # of the passes, where weights are constant: by noise level

    def __post_init__(self):
        blocks = [[k] for k in range(self.leaves)]
        # One pass evaluates all leaves, one after the other.
        self.in_order = len(self.passes) == 1 and not self.given and self.passes[0].blocks == blocks


class Evaluator:
    """A plan for a fixed number of chains on one device, its condition rows laid out once.

    Args:
        x: chains `[B, *S]`, of which only shape, dtype and device count, and, where a choice is measured, the values.
        rows: `{slot: [B, C]}`.
    """

    def __init__(self, plan: Plan, x: Tensor, rows: Mapping[str, Tensor]):
        self.plan = plan
        self.batch = x.shape[0]
        self.device, self._dtype = x.device, x.dtype
        self.passes: list[Pass | Stacked] = [self._lay_out(group, rows) for group in plan.groups]
        self._sigmas: dict = {}
        self._layouts: dict = {}
        self._zeros: Tensor | None = None
        self._need_energies = False
        self._cache_casts = True
        self._levels: Tensor | None = None  # while steps are captured: the noise level of every row, in device memory,
        self._fork: Callable | None = None  # and what runs passes side by side
        self._all = (True,) * len(plan.leaves)
        plan.refresh()
        if plan.may_stack and self.batch:
            choose(self, x)

    def _lay_out(self, group: Group, rows) -> Pass:
        """The condition rows of a group; leaves whose conditions are equal share theirs."""
        source, batch = group.source, self.batch
        leaves = {k: self.plan.leaves[k] for k in group.leaves}
        if not group.conditioned:
            return Pass(group, [list(leaves)], None, None)
        found: list[tuple[Tensor | None, list[int]]] = []
        for k, leaf in leaves.items():
            c = leaf.condition
            part = rows[c.name] if isinstance(c, Slot) else None
            if part is None and c is not None:
                part = torch.tensor(c, dtype=self._dtype).expand(batch, -1)
            part = None if part is None else part.to(self.device, self._dtype)
            same = next((ks for other, ks in found if _equal(part, other)), None)
            if same is None:
                found.append((part, [k]))
            else:
                same.append(k)
        widths = {p.shape[1]: leaves[ks[0]] for p, ks in found if p is not None}
        if len(widths) > 1:
            (a, x), (b, y), *_ = widths.items()
            raise ValueError(f"conditions of one model differ in width: {x.name} has {a} numbers, {y.name} has {b}")
        width = next(iter(widths))
        none = torch.zeros(batch, width, dtype=self._dtype, device=self.device)
        condition = torch.cat([none if p is None else p for p, _ in found])
        keep = None
        if source.takes_keep:
            flags = torch.tensor([float(p is not None) for p, _ in found])
            keep = flags.repeat_interleave(batch).to(self.device, self._dtype)
        return Pass(group, [ks for _, ks in found], condition, keep)

    def _layout(self, live: tuple[bool, ...]) -> Layout:
        if live not in self._layouts:
            kept = [q for p in self.passes for q in self._live(p, live)]
            given = [p for p in kept if p.group.source.gives_gradient]
            self._layouts[live] = Layout([p for p in kept if not p.group.source.gives_gradient], given, len(live))
        return self._layouts[live]

    def _live(self, p: Pass | Stacked, live) -> list[Pass | Stacked]:
        """What is left of a pass; a stack that is not whole any more falls into its members."""
        if all(any(live[k] for k in ks) for ks in p.blocks):
            return [p]
        members = p.members if isinstance(p, Stacked) else [p]
        return [q for q in (self._restricted(m, live) for m in members) if q is not None]

    def _restricted(self, whole: Pass, live) -> Pass | None:
        """A pass without blocks whose leaves count for nothing."""
        kept = [i for i, ks in enumerate(whole.blocks) if any(live[k] for k in ks)]
        if len(kept) == len(whole.blocks):
            return whole
        if not kept:
            return None
        condition, keep = (None if t is None else torch.cat([t[i * self.batch:(i + 1) * self.batch] for i in kept])
                           for t in (whole.condition, whole.keep))
        return Pass(whole.group, [whole.blocks[i] for i in kept], condition, keep)

    @property
    def n_gradients(self) -> int:
        """How many gradients a step gets: one per leaf."""
        return len(self.plan.leaves)

    @property
    def parts(self) -> list:
        """`(rows, evaluator)`: all rows, this one."""
        return [(slice(None), self)]

    @property
    def needs_energies(self) -> bool:
        """Whether gradients come with the energies of all leaves."""
        return self._need_energies

    def need_energies(self) -> None:
        """Gradients come with the energies of all leaves from now on."""
        self.plan.check_energies()
        self._need_energies = True

    def refresh(self) -> None:
        """Models may have changed: stacks of parameters are made anew."""
        self.plan.refresh()
        for p in self.passes:
            if isinstance(p, Stacked):
                p.load()

    @contextmanager
    def captured(self, levels: Tensor | None, fork: Callable | None = None) -> Iterator[None]:
        """Inside, models read noise levels from `levels` `[rows]`, autocast keeps no copies of parameters, and `fork`, if there
        is one, runs the passes."""
        self._levels, self._fork, self._cache_casts = levels, fork, False
        try:
            yield
        finally:
            self._levels, self._fork, self._cache_casts = None, None, True

    @property
    def structure(self) -> tuple:
        """What evaluators have in common that can take each other's conditions."""
        return tuple((tuple(map(tuple, p.blocks)), p.form if isinstance(p, Pass) else tuple(m.form for m in p.members))
                     for p in self.passes)

    def assign(self, other: Evaluator) -> None:
        """Take the conditions of an evaluator of the same `structure`, in place: also those that layouts to come are cut from."""
        pairs = list(zip(self.passes, other.passes))
        for p, q in zip(self.passes, other.passes):
            pairs += zip(getattr(p, "members", ()), getattr(q, "members", ()))
        for live in self._layouts:
            mine, theirs = self._layout(live), other._layout(live)
            pairs += zip((*mine.passes, *mine.given), (*theirs.passes, *theirs.given))
        for p, q in pairs:
            for name in ("condition", "keep"):
                if getattr(p, name) is not None and getattr(p, name) is not getattr(q, name):
                    getattr(p, name).copy_(getattr(q, name))

    def energies(self, x: Tensor, sigma: float | None = None) -> list[Tensor]:
        """E_k(x), K tensors `[B]` in leaf order; differentiable with respect to `x`."""
        self.plan.check_energies()
        layout = self._layout(self._all)
        passes = [*layout.passes, *layout.given]
        return self._by_leaf(passes, self._outputs(passes, [self._repeat(x, len(p)) for p in passes], sigma))

    def total(self, energies: list[Tensor], sigma: float | None = None) -> Tensor:
        """E(x) `[B]` from the energies of the leaves."""
        return self.plan.program.evaluate(energies, sigma) if energies else self._constant(0.0)

    def gradients(self, x: Tensor, sigma: float | None = None):
        """`(w_k ∇E_k(x), E_k(x))`: the weighted gradients, `[K, B, *S]` or K tensors `[B, *S]`, and K energies `[B]`,
        all detached and contiguous. Needs grad mode.

        A leaf that counts for nothing at this noise level is not evaluated: gradient and energy are 0. Where leaves are
        evaluated together because their conditions are equal, the first has the gradient of all. The energy of a leaf
        that has none (a score) is NaN.
        """
        layout = self._layout(self.plan.program.live(sigma) if self.plan.schedules else self._all)
        xs = [self._repeat(x.detach(), len(p)).requires_grad_() for p in layout.passes]  # a tensor for each, and so a gradient
        outputs = self._outputs(layout.passes, xs, sigma)
        for p, energy in zip(layout.passes, outputs):
            if not energy.requires_grad:
                raise ValueError(f"the energy of {self._names(p)} does not depend on `x` (it carries no gradient)")
        energies = outputs if layout.in_order and layout.leaves == 1 else self._by_leaf(layout.passes, outputs)
        for p in layout.given:
            self._known_energies(p, x, sigma, energies)
        cotangents = self._cotangents(layout, energies, sigma)
        grads = _backward(tuple(outputs), tuple(xs), tuple(cotangents[:len(xs)])) if xs else ()
        for p, grad in zip(layout.passes, grads):
            if grad is None:
                raise ValueError(f"the energy of {self._names(p)} does not depend on `x`")
        if layout.in_order:
            grad = _contiguous(grads[0])
            return (grad,) if layout.leaves == 1 else grad.view(layout.leaves, *x.shape), energies
        out: list = [None] * len(self.plan.leaves)
        passes = [*layout.passes, *layout.given]
        grads = [*grads, *(self._given(p, x, w, sigma) for p, w in zip(layout.given, cotangents[len(xs):]))]
        for p, grad in zip(passes, grads):
            parts = (_contiguous(grad),) if len(p) == 1 else _contiguous(grad).split(self.batch)
            for (k, *_), part in zip(p.blocks, parts):
                out[k] = part
        if any(g is None for g in out):
            if self._zeros is None or self._zeros.shape != x.shape:
                self._zeros = torch.zeros_like(x, memory_format=torch.contiguous_format)
            out = [self._zeros if g is None else g for g in out]
        return out, energies

    def gradient(self, x: Tensor, sigma: float | None = None) -> Tensor:
        """∇E(x) = Σ_k w_k(x) ∇E_k(x), `[B, *S]`."""
        with torch.inference_mode(False), torch.enable_grad():
            grads, _ = self.gradients(x.clone() if x.is_inference() else x, sigma)
        return sum(grads[1:], grads[0].clone()) if len(grads) else torch.zeros_like(x)

    @staticmethod
    def _repeat(x, times: int) -> Tensor:
        return x if times == 1 else x.repeat(times, *[1] * (x.ndim - 1))

    def _by_leaf(self, passes: list[Pass], outputs: list[Tensor]) -> list[Tensor]:
        out: list = [None] * len(self.plan.leaves)
        for p, energy in zip(passes, outputs):
            for ks, part in zip(p.blocks, (energy,) if len(p) == 1 else energy.split(self.batch)):
                for k in ks:
                    out[k] = part
        return [self._constant(0.0) if e is None else e for e in out]

    def _constant(self, value: float) -> Tensor:
        return torch.full((self.batch,), value, dtype=self._dtype, device=self.device)

    def _cotangents(self, layout: Layout, energies, sigma) -> list[Tensor]:
        """Per pass the program's weights w_k = ∂E/∂E_k, `[len(pass) x B]`."""
        program, passes = self.plan.program, [*layout.passes, *layout.given]
        if not program.has_or:
            if sigma not in layout.cotangents:
                constant = program.constant_weights(sigma)
                weights = [[sum(constant[k] for k in ks) for ks in p.blocks] for p in passes]
                # Filled on the device: a recording must not copy from the host.
                layout.cotangents[sigma] = [torch.cat([self._constant(v) for v in w]) for w in weights]
            return layout.cotangents[sigma]
        weights = program.weights([e.detach() for e in energies], sigma)
        weights = [w.to(self._dtype) if isinstance(w, Tensor) else self._constant(w) for w in weights]
        per_block = [[sum((weights[k] for k in ks[1:]), weights[ks[0]]) for ks in p.blocks] for p in passes]
        return [w[0] if len(w) == 1 else torch.cat(w) for w in per_block]

    def _outputs(self, passes: list, xs, sigma) -> list[Tensor]:
        """Energies `[len(pass) x B]` of every pass."""
        if self.plan.compute_dtype is None and self._fork is None:
            return [self._call(p, x, sigma) for p, x in zip(passes, xs)]
        with self._precision():
            if self._fork is not None and len(passes) > 1:
                return self._fork([partial(self._call, p, x, sigma) for p, x in zip(passes, xs)])
            return [self._call(p, x, sigma) for p, x in zip(passes, xs)]

    def rows(self, p: Pass, x: Tensor, sigma: float | None) -> Tensor:
        """The energies of one model for a few rows `x`, under the condition of the first chain, in full precision."""
        source, first = p.group.source, slice(0, 1)
        condition, keep = (None if t is None else t[first].expand(len(x), *t.shape[1:]).contiguous() for t in (p.condition, p.keep))
        args, kwargs = self._arguments(Pass(p.group, p.blocks[:1], condition, keep), x, sigma)
        return as_rows(source.model(*args, **kwargs), len(x), source.reduce, self.plan.leaves[p.blocks[0][0]].name)

    def trial(self, passes: list, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Energies and gradients of some passes, at a noise level that their models know."""
        with torch.inference_mode(False), torch.enable_grad():
            xs = [self._repeat(x.detach().clone(), len(p)).requires_grad_() for p in passes]
            levels = {(p.group.source.sigma or (1.0, 1.0))[0] for p in passes if p.group.source.takes_sigma}
            energies = self._outputs(passes, xs, max(levels, default=None))
            grads = _backward(tuple(energies), tuple(xs), tuple(map(torch.ones_like, energies)))
            return [e.detach() for e in energies], list(grads)

    def _precision(self):
        dtype = self.plan.compute_dtype
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype, cache_enabled=self._cache_casts)

    def _arguments(self, p: Pass, x: Tensor, sigma) -> tuple[tuple, dict]:
        """What a model is called with."""
        if self.plan.channels_last and x.ndim == 4 and not isinstance(p, Stacked):
            x = x.contiguous(memory_format=torch.channels_last)
        args = (x,) if p.condition is None else (x, p.condition)
        kwargs = {} if p.keep is None else {"keep": p.keep}
        if p.group.source.takes_sigma and sigma is not None:
            kwargs["sigma"] = self._sigma(sigma, x.shape[0])
        return args, kwargs

    def _call(self, p: Pass | Stacked, x: Tensor, sigma) -> Tensor:
        source = p.group.source
        energy = self._evaluate(p, p if isinstance(p, Stacked) else self.plan.function(source), x, sigma)
        if type(energy) is Tensor and energy.dtype is torch.float32 and energy.shape == x.shape[:1]:
            return energy
        return as_rows(energy, x.shape[0], source.reduce, self.plan.leaves[p.blocks[0][0]].name)

    def _evaluate(self, p: Pass | Stacked, function, x: Tensor, sigma):
        try:
            args, kwargs = self._arguments(p, x, sigma)
            return function(*args, **kwargs)
        except Exception as error:
            width = "" if p.condition is None else f", condition {list(p.condition.shape)}"
            error.add_note(f"while evaluating {self._names(p)} with x {list(x.shape)}{width}")
            raise

    def _known_energies(self, p: Pass, x: Tensor, sigma, energies: list[Tensor]) -> None:
        """Energies of a pass whose gradients are given: where they decide weights; else none are known."""
        decisive = any(self.plan.program.decisive[k] for ks in p.blocks for k in ks)
        if decisive or self._need_energies:
            with torch.no_grad(), self._precision():
                energy = self._call(p, self._repeat(x, len(p)), sigma)
        else:
            energy = self._constant(float("nan")).repeat(len(p))
        for ks, part in zip(p.blocks, energy.split(self.batch)):
            for k in ks:
                energies[k] = part

    def _given(self, p: Pass, x: Tensor, weights: Tensor, sigma) -> Tensor:
        """Weighted gradients that a model gives itself: minus its score, or what `gradient` returns."""
        source = p.group.source
        with torch.no_grad() if source.returns != "energy" else nullcontext(), self._precision():
            rows = self._repeat(x, len(p))
            found = self._evaluate(p, source.gradient or self.plan.function(source), rows, sigma)
        name = self.plan.leaves[p.blocks[0][0]].name
        if not isinstance(found, Tensor) or found.shape != rows.shape:
            got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            what = "score" if source.returns == "score" else "gradient"
            raise ValueError(f"the {what} of {name} must be shaped as x, {list(rows.shape)}, got {got}")
        found = found.detach().to(self._dtype)
        sign = -1.0 if source.returns == "score" else 1.0
        return found * (sign * weights).reshape(-1, *[1] * (x.ndim - 1))

    def _names(self, p: Pass) -> str:
        return ", ".join(self.plan.leaves[k].name for ks in p.blocks for k in ks)

    def _sigma(self, sigma: float, rows: int) -> Tensor:
        if self._levels is not None:
            return self._levels[:rows]
        key = (sigma, rows)
        if key not in self._sigmas:
            self._sigmas[key] = torch.full((rows,), sigma, device=self.device, dtype=self._dtype)
        return self._sigmas[key]


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a is b or (a.shape == b.shape and torch.equal(a.to(b.dtype), b))


def _contiguous(grad: Tensor) -> Tensor:
    return grad if grad.is_contiguous() else grad.contiguous()


def _backward(outputs: tuple, inputs: tuple, cotangents: tuple) -> tuple:
    """`torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True)` without its Python wrapper, which
    takes 40 µs of the 70 that the gradient of a small energy takes (measured on one CPU, torch 2.13)."""
    engine = getattr(torch.autograd.Variable, "_execution_engine", None)
    if engine is None:
        return torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True)
    return engine.run_backward(outputs, cotangents, False, False, inputs, allow_unreachable=True, accumulate_grad=False)


def as_rows(energy, rows: int, reduce: str | None, name: str) -> Tensor:
    """The energy of a model as `[rows]`; raises on other shapes unless they are to be summed."""
    if isinstance(energy, Tensor) and energy.shape == (rows,) and energy.dtype is torch.float32:
        return energy
    if not isinstance(energy, Tensor):
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
