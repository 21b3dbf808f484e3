"""Expressions as text: Python syntax, read by a whitelist over `ast`. Nothing is evaluated.

    shape('cube') & color('red') & ~position(0.5, 0.5)
    any_of([color('red'), color('blue')]) & 2*shape('sphere')
    with_prior(shape('cube') & color('red'), color.unconditional, weight=AboveSigma(0.25))
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterable, Mapping

from .composition import Calibrated, Concept, Expression, Family, Slot, all_of, any_of, by_name, negate, with_prior, without
from .weights import AboveSigma, PiecewiseSigma

FUNCTIONS = {"all_of": all_of, "any_of": any_of, "negate": negate, "with_prior": with_prior, "without": without,
             "AboveSigma": AboveSigma, "PiecewiseSigma": PiecewiseSigma, "Slot": Slot, "Calibrated": Calibrated}
HINTS = {"and": "&", "or": "|", "not": "~"}


class ExpressionError(ValueError):
    """A text that is not an expression over the given names; the message points at the place."""


def parse(text: str, models: Mapping[str, Family | Concept] | Iterable[Family | Concept]) -> Expression:
    """The composition that `text` writes down, over the names in `models`.

    Allowed: the names, calls of families with numbers or labels, `.unconditional`, `family[Slot("c")]`, `&`,
    `|`, `~`, `number * expression`, and all_of, any_of, negate, with_prior, without, Calibrated, AboveSigma, PiecewiseSigma.

    Raises:
        ExpressionError: anything else; unknown names come with near matches.
    """
    models = by_name(models)
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError) as error:
        place = " " * max(0, (getattr(error, "offset", 1) or 1) - 1) + "^"
        raise ExpressionError(f"not an expression: {getattr(error, 'msg', error)}\n  {text.strip()}\n  {place}") from None
    except (RecursionError, MemoryError):
        raise ExpressionError("not an expression: nested too deeply") from None
    try:
        result = _Reader(text.strip(), models).read(tree.body)
    except RecursionError:
        raise ExpressionError("not an expression: nested too deeply") from None
    if isinstance(result, Family):
        example = next((repr(k) for k in result.labels), ", ".join(["0.5"] * (result.condition_dim or 1)))
        raise ExpressionError(f"{result.name} needs a condition: write {result.name}({example})")
    if not isinstance(result, Expression):
        raise ExpressionError(f"{text.strip()!r} is not a composition of concepts")
    return result


class _Reader:
    def __init__(self, text: str, models: Mapping):
        self.text, self.models = text, models

    def read(self, node):
        method = getattr(self, f"_{type(node).__name__}", None)
        if method is None:
            raise self._error(node, f"{type(node).__name__} is not part of the language of expressions")
        try:
            return method(node)
        except ExpressionError:
            raise
        except (TypeError, ValueError) as error:
            raise self._error(node, str(error)) from None

    def _error(self, node, message: str) -> ExpressionError:
        place = " " * getattr(node, "col_offset", 0) + "^"
        return ExpressionError(f"{message}\n  {self.text}\n  {place}")

    def _Name(self, node):
        if node.id in self.models:
            return self.models[node.id]
        if node.id in FUNCTIONS:
            return FUNCTIONS[node.id]
        known = [*self.models, *FUNCTIONS]
        near = difflib.get_close_matches(node.id, known, n=3)
        meant = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise self._error(node, f"unknown name {node.id!r}{meant}; known are {', '.join(known)}")

    def _Constant(self, node):
        if isinstance(node.value, (int, float, str)) and not isinstance(node.value, bool):
            return node.value
        raise self._error(node, f"{node.value!r} is not a number or a label")

    def _List(self, node):
        return [self.read(e) for e in node.elts]

    _Tuple = _List

    def _UnaryOp(self, node):
        value = self.read(node.operand)
        if isinstance(node.op, ast.Invert):
            return ~self._composable(node.operand, value)
        if isinstance(node.op, ast.USub) and isinstance(value, (int, float)):
            return -value
        raise self._error(node, "of the unary operators, `~` negates a concept and `-` a number")

    def _BoolOp(self, node):
        word = "and" if isinstance(node.op, ast.And) else "or"
        raise self._error(node, f"write `{HINTS[word]}` instead of `{word}`")

    def _BinOp(self, node):
        left, right = self.read(node.left), self.read(node.right)
        match node.op:
            case ast.BitAnd():
                return self._composable(node.left, left) & self._composable(node.right, right)
            case ast.BitOr():
                return self._composable(node.left, left) | self._composable(node.right, right)
            case ast.Mult() if isinstance(left, Expression) != isinstance(right, Expression):
                return left * right
        raise self._error(node, "of the operators, `&`, `|` and `number * concept` compose")

    def _composable(self, node, value) -> Expression:
        if isinstance(value, Expression):
            return value
        if isinstance(value, Family):
            raise self._error(node, f"{value.name} needs a condition, as in {value.name}(...)")
        raise self._error(node, f"{value!r} is not a concept")

    def _Call(self, node):
        function = self.read(node.func)
        args = [self.read(a) for a in node.args]
        kwargs = {k.arg: self.read(k.value) for k in node.keywords}
        if None in kwargs or not (isinstance(function, Family) or function in FUNCTIONS.values()):
            raise self._error(node, "only families and the functions of the language are called")
        return function(*args, **kwargs)

    def _Attribute(self, node):
        value = self.read(node.value)
        if node.attr == "unconditional" and isinstance(value, Family):
            return value.unconditional
        raise self._error(node, f"only `.unconditional` of a family is known, not .{node.attr}")

    def _Subscript(self, node):
        value, key = self.read(node.value), self.read(node.slice)
        if isinstance(value, Family):
            return value[key]
        raise self._error(node, "only a family is indexed, as in color[Slot('c')]")
