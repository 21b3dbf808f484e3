"""Filters: which samples are kept, by an energy or a classifier's verdict. What is rejected is listed by id."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .plan import leaf_names
from .spec import Filter, PlanError, Spec


class Filters:
    """The filters of one composition, in order; a sample is rejected by the first that it fails."""

    def __init__(self, spec: Spec, number: int, name: str, expression, classifier: Callable[[str], Callable], plan):
        self.rules: list[tuple[str, Filter, object]] = []
        leaves = leaf_names(expression)
        for i, rule in enumerate(spec.filters):
            if rule.compositions is not None and name not in rule.compositions:
                continue
            place = f"filters[{i}]"
            what: object = None
            if rule.leaf is not None:
                if rule.leaf not in leaves:
                    raise PlanError(f"{place}.leaf: must be a leaf of {name!r}, {', '.join(leaves)}, got {rule.leaf!r}")
                what = leaves.index(rule.leaf)
            elif rule.classifier is not None:
                for key, slot in (("equals", rule.equals), ("near", rule.near)):
                    if isinstance(slot, str) and slot not in expression.slots:
                        slots = ", ".join(expression.slots) or "which has none"
                        raise PlanError(f"{place}.{key}: must be a slot of {name!r}, {slots}, got {slot!r}")
                what = classifier(rule.classifier)
            self.rules.append((place, rule, what))

    @property
    def need_energies(self) -> bool:
        """Whether any of them reads an energy."""
        return any(rule.classifier is None for _, rule, _ in self.rules)

    def __call__(self, ids: Tensor, x: Tensor, energy: Tensor | None, leaf_energies: Tensor | None,
                 conditions: dict[str, Tensor], finite: Tensor) -> tuple[Tensor, list[dict]]:
        """Which samples of a micro-batch to keep, bool `[B]`, and the ids that each filter rejects."""
        keep, rejected, verdicts = finite.clone(), [], {}
        for place, rule, what in self.rules:
            if rule.classifier is None:
                ok = _within(energy if rule.leaf is None else leaf_energies[:, what], rule)
            else:
                if id(what) not in verdicts:
                    with torch.no_grad():
                        # What is not finite is set to zero: it is dropped already, and a classifier must not see it.
                        verdicts[id(what)] = what(torch.where(finite.to(x.device).view(-1, *[1] * (x.ndim - 1)), x, 0.0))
                ok = _passes(_column(verdicts[id(what)], rule, place).cpu(), rule, conditions)
            lost = keep & ~ok
            rejected.append({"filter": f"{place} {_text(rule)}", "ids": ids[lost].tolist()})
            keep &= ok
        return keep, rejected


def _column(verdict, rule: Filter, place: str) -> Tensor:
    """The part of a classifier's output that a filter reads: `[B]` or `[B, C]`."""
    if isinstance(verdict, dict):
        if rule.output not in verdict:
            raise PlanError(f"{place}.output: must be one of {', '.join(verdict)}, got {rule.output!r}")
        verdict = verdict[rule.output]
    elif rule.output is not None:
        raise PlanError(f"{place}.output: {rule.classifier} has one output without a name, got {rule.output!r}")
    if rule.column is not None:
        if verdict.ndim != 2 or rule.column >= verdict.shape[1]:
            raise PlanError(f"{place}.column: must be a column of the verdict, which is {list(verdict.shape)}, got {rule.column}")
        verdict = verdict[:, rule.column]
    return verdict


def _within(values: Tensor, rule: Filter) -> Tensor:
    values = values.reshape(len(values), -1)
    ok = torch.ones(len(values), dtype=torch.bool)
    if rule.min is not None:
        ok &= (values >= rule.min).all(1)
    if rule.max is not None:
        ok &= (values <= rule.max).all(1)
    return ok


def _passes(verdict: Tensor, rule: Filter, conditions: dict[str, Tensor]) -> Tensor:
    if rule.equals is not None:
        asked = conditions[rule.equals].argmax(1) if isinstance(rule.equals, str) else rule.equals
        return verdict.reshape(len(verdict), -1).argmax(1) == asked
    if rule.near is not None:
        target = conditions[rule.near]
        return ((verdict.reshape(target.shape) - target).abs() <= rule.within).all(1)
    return _within(verdict, rule)


def _text(rule: Filter) -> str:
    """A filter as one line of a log."""
    what = "energy" if rule.energy else f"energy of {rule.leaf}" if rule.leaf else rule.classifier
    what += f".{rule.output}" if rule.output else ""
    what += f"[{rule.column}]" if rule.column is not None else ""
    tests = [f"{name} {value}" for name in ("min", "max", "equals", "near", "within") if (value := getattr(rule, name)) is not None]
    return f"{what} {' '.join(tests)}"
