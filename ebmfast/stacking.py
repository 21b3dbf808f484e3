"""Several models of one architecture as one: their parameters stacked, their forward mapped over the stack.

Whether that is faster than a branch for each model depends on shape, dtype and machine, so it is measured, once, and
kept in the user's cache folder. Source of the technique: `torch.func.stack_module_state`, "model ensembling".
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from . import measured

MARGIN = 0.9  # a stack has to take less than this share of the branches' time
PATIENCE = 0.05  # seconds; what takes longer is timed once
_PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def architecture(model) -> tuple | None:
    """What two modules share if one can run with the other's parameters: classes, flags, plain attributes, shapes.

    None for what is not a plain module: functions, compiled or scripted modules, modules with hooks or in train mode
    with buffers (which they may update)."""
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule) or hasattr(model, "_orig_mod"):
        return None
    found: list = []
    for name, module in model.named_modules(remove_duplicate=False):
        if any(getattr(module, hooks, None) for hooks in _HOOKS) or (module.training and any(True for _ in module.buffers())):
            return None
        attributes = {k: _value(v) for k, v in vars(module).items() if k not in _MODULE}
        tensors = [(k, None if t is None else (tuple(t.shape), t.dtype, t.device)) for k, t in
                   (*module._parameters.items(), *module._buffers.items())]
        found.append((name, type(module), module.training, tuple(sorted(attributes.items())), tuple(tensors)))
    return tuple(found)


_MODULE = set(vars(nn.Module()))


def _value(value):
    """An attribute as something to compare: itself where it is plain data, else who it is."""
    if isinstance(value, (tuple, list)):
        return type(value).__name__, tuple(map(_value, value))
    if isinstance(value, _PLAIN):
        return type(value).__name__, repr(value)
    return "object", id(value)


def shadow(model: nn.Module) -> nn.Module:
    """A module that computes the same from the same memory, whose parameters ask for no gradient; `model` is not touched."""
    memo: dict[int, object] = {}

    def copy(module: nn.Module) -> nn.Module:
        if id(module) not in memo:
            new = module.__class__.__new__(module.__class__)
            memo[id(module)] = new
            vars(new).update(vars(module))
            vars(new)["_parameters"] = {k: parameter(p) for k, p in module._parameters.items()}
            vars(new)["_buffers"] = dict(module._buffers)
            vars(new)["_modules"] = {k: None if m is None else copy(m) for k, m in module._modules.items()}
        return memo[id(module)]

    def parameter(p):
        if p is not None and id(p) not in memo:
            memo[id(p)] = nn.Parameter(p.detach(), requires_grad=False)
        return None if p is None else memo[id(p)]

    return copy(model)


class Compiled:
    """A model under `torch.compile`, which is not touched. Its parameters are read where they are, and ask for no gradient."""

    def __init__(self, model):
        self._model, self._places = model, None
        self.refresh()

    def refresh(self) -> None:
        """The model may have changed: what is compiled is kept where its parameters are still in their places."""
        model, places = self._model, None
        if isinstance(model, nn.Module):
            tensors = (*model.named_parameters(), *model.named_buffers())
            places = architecture(model), [(k, t.data_ptr(), t.stride()) for k, t in tensors]
        if self._places is None or places != self._places:
            plain = isinstance(model, nn.Module) and not isinstance(model, torch.jit.ScriptModule)
            self.function = torch.compile(shadow(model) if plain else model)
            self._places = places


@dataclass
class Stacked:
    """Passes of models of one architecture, as one pass."""

    members: list
    blocks: list = field(init=False)
    condition: Tensor | None = field(init=False)
    keep: Tensor | None = field(init=False)

    def __post_init__(self):
        self.group = self.members[0].group
        self.blocks = [ks for p in self.members for ks in p.blocks]
        self.condition, self.keep = (
            None if getattr(self.members[0], name) is None else torch.cat([getattr(p, name) for p in self.members])
            for name in ("condition", "keep"))
        self._models = [p.group.source.model for p in self.members]
        self._base = shadow(self._models[0])
        self._tensors: dict[str, Tensor] = {}
        self.load()

    def __len__(self):
        return len(self.blocks)

    def load(self) -> None:
        """Read the parameters as they are now."""
        columns = zip(*({**dict(m.named_parameters()), **dict(m.named_buffers())}.items() for m in self._models))
        for column in columns:
            name, tensors = column[0][0], [t.detach() for _, t in column]
            if name in self._tensors and self._tensors[name].shape[1:] == tensors[0].shape:
                torch.stack(tensors, out=self._tensors[name])
            else:
                self._tensors[name] = torch.stack(tensors)

    def __call__(self, *args, **kwargs):
        groups, names = len(self.members), list(kwargs)
        rows = [t.reshape(groups, -1, *t.shape[1:]) for t in (*args, *kwargs.values())]

        def energy(tensors, *rows):
            positional, named = rows[:len(args)], dict(zip(names, rows[len(args):]))
            return functional_call(self._base, tensors, positional, named)

        out = vmap(energy)(self._tensors, *rows)
        return out.reshape(-1, *out.shape[2:])


def choose(evaluator, x: Tensor) -> None:
    """Replace passes of one architecture by a stack where that is asked for, or measured to be faster."""
    plan, passes = evaluator.plan, evaluator.passes
    settled = x.shape, x.dtype, x.device, torch.get_num_threads()
    if plan.stack is not True and settled in plan.in_branches:
        return
    for members in candidates(passes):
        name = type(members[0].group.source.model).__name__
        try:
            stack = Stacked(members)
            faster, why = (True, "as asked") if plan.stack is True else _measured(evaluator, members, stack, x)
            if faster and settled not in plan.in_stacks and not _agree(evaluator, members, stack, x):
                raise ValueError("it computes something else")
        except Exception as error:  # whatever vmap cannot map
            if plan.stack is True:
                raise ValueError(f"`stack_models` is True, but {name} cannot be stacked: {error}") from error
            faster, why = False, f"a stack fails: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        plan.choices[tuple(k for p in members for ks in p.blocks for k in ks)] = f"{'stacked' if faster else 'branches'}, {why}"
        if faster:
            passes[passes.index(members[0])] = stack
            for p in members[1:]:
                passes.remove(p)
    (plan.in_stacks if any(isinstance(p, Stacked) for p in passes) else plan.in_branches).add(settled)


def candidates(passes: list) -> list[list]:
    """Passes that could be one stack: several models, one architecture, inputs of the same shape."""
    found: dict = {}
    for p in passes:
        if not p.group.source.gives_gradient and (kind := architecture(p.group.source.model)) is not None:
            found.setdefault((kind, p.form), []).append(p)
    return [members for members in found.values() if len(members) > 1]


def _measured(evaluator, members: list, stack: Stacked, x: Tensor) -> tuple[bool, str]:
    if not measured.allowed():
        return False, "measuring is switched off (EBMFAST_MEASURE=0)"
    key = _key(evaluator, members, x)
    branches, stacked = measured.once(key, lambda: _times(evaluator, members, stack, x))
    return stacked < MARGIN * branches, f"measured {1e3 * stacked:.3g} ms stacked, {1e3 * branches:.3g} ms in branches"


def _agree(evaluator, members, stack, x) -> bool:
    found = []
    for passes in (members, [stack]):
        energies, grads = evaluator.trial(passes, x)
        found.append((torch.cat(energies).double(), torch.cat(grads).double()))
    loose = 0.05 if evaluator.plan.compute_dtype is not None else 1e-3
    return all(bool((a - b).abs().max() <= loose * b.abs().max() + 1e-6) for a, b in zip(*found))


def _times(evaluator, members, stack, x) -> tuple[float, float]:
    def once(passes) -> float:
        began = time.perf_counter()
        evaluator.trial(passes, x)
        if x.is_cuda:
            torch.cuda.current_stream(x.device).synchronize()
        return time.perf_counter() - began

    def best(passes) -> float:
        first = once(passes)
        return first if first > PATIENCE else min(once(passes) for _ in range(5))

    return best(members), best([stack])


def _key(evaluator, members, x: Tensor) -> str:
    """What a measurement depends on."""
    return measured.key("stacking", known(members[0].group.source.model), members[0].form, len(members), tuple(x.shape), x.dtype,
                        evaluator.plan.compute_dtype, evaluator.plan.channels_last, device=x.device)


def known(model) -> list | None:
    """The architecture of a model in words that another process understands; None where there are none."""
    kind = architecture(model)
    return None if kind is None else [(name, f"{cls.__module__}.{cls.__qualname__}", *rest) for name, cls, *rest in kind]
