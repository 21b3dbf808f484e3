"""A composition as small arrays: what kernels, and the code here, evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from .weights import Weight, weight_at


@dataclass(frozen=True)
class Program:
    """A simplified tree in postfix order.

    Each instruction is a pair `(code, operand)`: `LEAF k` pushes E_k; `SUM n` pops n energies and pushes
    Σ wᵢ Eᵢ, reading n values (the weights); `LOGSUMEXP n` pops n and pushes -(1/s) logsumexp(-s Eᵢ + log wᵢ),
    reading 1 + n values (s, then the log wᵢ). Values are read in the order of the instructions. A LOGSUMEXP of one adds a
    constant, E - (1/s) log w.
    """

    LEAF = 0
    SUM = 1
    LOGSUMEXP = 2

    codes: tuple[tuple[int, int], ...]
    values: tuple[Weight, ...]
    n_leaves: int

    def arrays(self, sigma: float | None = None) -> tuple[np.ndarray, np.ndarray]:
        """`(codes [I, 2] int32, values [V] float32)` at noise level `sigma`."""
        values = [weight_at(v, sigma) for v in self.values]
        return np.array(self.codes, np.int32).reshape(-1, 2), np.array(values, np.float32)

    @cached_property
    def has_or(self) -> bool:
        """Whether leaf weights depend on the energies; without an OR they are constants."""
        return any(code == self.LOGSUMEXP and operand > 1 for code, operand in self.codes)

    def live(self, sigma: float | None = None) -> tuple[bool, ...]:
        """Which leaves count at noise level `sigma`: all but those that every path multiplies by 0."""
        nodes = list(self._nodes(sigma))
        reached, found = [False] * (len(nodes) - 1) + [True], [False] * self.n_leaves
        for i in range(len(nodes) - 1, -1, -1):
            code, operand, children, values = nodes[i]
            if code == self.LEAF:
                found[operand] |= reached[i]
            for j, c in enumerate(children):
                reached[c] = reached[i] and (code == self.LOGSUMEXP or values[j] != 0.0)
        return tuple(found)

    @cached_property
    def decisive(self) -> tuple[bool, ...]:
        """Which leaves' energies decide weights: those below an OR."""
        nodes = list(self._tree())
        below, found = [False] * len(nodes), [False] * self.n_leaves
        for i in range(len(nodes) - 1, -1, -1):
            code, operand, children, _ = nodes[i]
            if code == self.LEAF:
                found[operand] |= below[i]
            for c in children:
                below[c] = below[i] or (code == self.LOGSUMEXP and operand > 1)
        return tuple(found)

    def constant_weights(self, sigma: float | None = None) -> list[float]:
        """w_k = ∂E/∂E_k of a program without an OR, at noise level `sigma`."""
        if self.has_or:
            raise ValueError("the weights of a program with an OR depend on the energies")
        return [float(w) for w in self._reverse([None] * self.n_leaves, sigma)]

    def evaluate(self, leaf_energies: Sequence[torch.Tensor], sigma: float | None = None) -> torch.Tensor:
        """E from the energies of the leaves, K tensors of one shape; differentiable."""
        return self._forward(leaf_energies, sigma)[-1]

    def weights(self, leaf_energies: Sequence[torch.Tensor], sigma: float | None = None) -> list:
        """w_k = ∂E/∂E_k: K numbers, or tensors shaped as the energies where an OR decides."""
        return self._reverse(leaf_energies, sigma)

    def _nodes(self, sigma):
        """Per instruction: (code, operand, children as instruction indices, its values at a noise level)."""
        for code, operand, children, values in self._tree():
            yield code, operand, children, [weight_at(v, sigma) for v in values]

    def _tree(self):
        """Per instruction: (code, operand, children as instruction indices, its values)."""
        stack: list[int] = []
        used = 0
        for i, (code, operand) in enumerate(self.codes):
            children: list[int] = []
            count = {self.LEAF: 0, self.SUM: operand, self.LOGSUMEXP: operand + 1}[code]
            if code != self.LEAF and operand:
                children = stack[-operand:]
                del stack[-operand:]
            stack.append(i)
            yield code, operand, children, self.values[used:used + count]
            used += count

    def _forward(self, leaf_energies, sigma) -> list:
        out: list = []
        for code, operand, children, values in self._nodes(sigma):
            if code == self.LEAF:
                out.append(leaf_energies[operand])
            elif code == self.LOGSUMEXP:
                logits = self._logits([out[c] for c in children], values)
                out.append(torch.logsumexp(logits, 0) / -values[0])
            else:
                terms = [out[c] if w == 1.0 else w * out[c] for w, c in zip(values, children)]
                out.append(sum(terms[1:], terms[0]) if terms else torch.zeros_like(leaf_energies[0]))
        return out

    def _logits(self, energies, values) -> torch.Tensor:
        logs = self._on_device(tuple(values[1:]), energies[0]).reshape(-1, *[1] * energies[0].ndim)
        return torch.stack(list(energies)) * -values[0] + logs

    @cached_property
    def _constants(self) -> dict:
        return {}

    def _on_device(self, values: tuple[float, ...], like: torch.Tensor) -> torch.Tensor:
        """Numbers as a tensor; made once, since a copy to a GPU waits for it and cannot be captured."""
        key = values, like.dtype, like.device
        if key not in self._constants:
            self._constants[key] = like.new_tensor(values)
        return self._constants[key]

    def _reverse(self, leaf_energies, sigma) -> list:
        nodes = list(self._nodes(sigma))
        out = self._forward(leaf_energies, sigma) if self.has_or else []
        upstream: list = [0.0] * len(nodes)
        upstream[-1] = 1.0
        weights: list = [0.0] * self.n_leaves
        for i in range(len(nodes) - 1, -1, -1):
            code, operand, children, values = nodes[i]
            if code == self.LEAF:
                weights[operand] = weights[operand] + upstream[i]
            elif code == self.SUM:
                for w, c in zip(values, children):
                    upstream[c] = w * upstream[i]
            elif operand == 1:
                upstream[children[0]] = upstream[i]
            else:
                shares = torch.softmax(self._logits([out[c] for c in children], values), 0)
                for share, c in zip(shares, children):
                    upstream[c] = share * upstream[i]
        return weights
