"""Leaf energies to the energy of a composition and the weight of each leaf; `ebmfast.program.Program` is the specification.

The tree is a constant of the compiled kernel, its weights are data: one compilation for each shape of a composition.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from ebmfast.kernels.launch import launch

from ebmfast.program import Program

__all__ = ["ProgramPlan"]

_CHAINS = 128
_LEAF = tl.constexpr(Program.LEAF)
_SUM = tl.constexpr(Program.SUM)
_LOGSUMEXP = tl.constexpr(Program.LOGSUMEXP)
_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _logit(energy, values, FIRST: tl.constexpr, rank: tl.constexpr):
    return energy * -tl.load(values + FIRST) + tl.load(values + (FIRST + 1 + rank))


@triton.jit(do_not_specialize=["batch"])
def _program(
    energies, values, total, weights, batch: tl.int64,
    FORWARD: tl.constexpr, CHILDREN: tl.constexpr, BACKWARD: tl.constexpr, NODES: tl.constexpr, LEAVES: tl.constexpr,
    CHAINS: tl.constexpr,
):  # fmt: skip
    """Flat, because Triton takes no nested tuples. FORWARD, four for each node: code, operand, where its children start in
    CHILDREN, its first value. BACKWARD, seven for each node, last to first: leaf or -1; the parent's code or -1, its place forward
    and backward, its first value; this node's place forward, and its rank among its siblings."""
    row = tl.cast(tl.program_id(0), tl.int64) * CHAINS + tl.arange(0, CHAINS)
    inside = row < batch
    nodes = ()
    greatest = ()  # of each LOGSUMEXP its greatest logit, and the sum of exp(logit - greatest)
    sums = ()
    for i in tl.static_range(NODES):
        high = tl.zeros([CHAINS], tl.float32)
        mass = tl.zeros([CHAINS], tl.float32)
        energy = tl.zeros([CHAINS], tl.float32)
        if FORWARD[4 * i] == _LEAF:
            energy = tl.load(energies + (FORWARD[4 * i + 1] * batch + row), mask=inside, other=0.0)
        elif FORWARD[4 * i] == _SUM:
            for j in tl.static_range(tl.constexpr(FORWARD[4 * i + 1])):
                term = tl.load(values + (FORWARD[4 * i + 3] + j)) * nodes[CHILDREN[FORWARD[4 * i + 2] + j]]
                if j == 0:
                    energy = term
                else:
                    energy = energy + term
        else:
            high = _logit(nodes[CHILDREN[FORWARD[4 * i + 2]]], values, FORWARD[4 * i + 3], 0)
            for j in tl.static_range(1, tl.constexpr(FORWARD[4 * i + 1])):
                logit = _logit(nodes[CHILDREN[FORWARD[4 * i + 2] + j]], values, FORWARD[4 * i + 3], j)
                high = tl.where(logit > high, logit, high)
            high = tl.where(tl.abs(high) == _INFINITY, 0.0, high)
            for j in tl.static_range(tl.constexpr(FORWARD[4 * i + 1])):
                mass += tl.exp(_logit(nodes[CHILDREN[FORWARD[4 * i + 2] + j]], values, FORWARD[4 * i + 3], j) - high)
            energy = (high + tl.log(mass)) / -tl.load(values + FORWARD[4 * i + 3])
        nodes = nodes + (energy,)
        greatest = greatest + (high,)
        sums = sums + (mass,)
    tl.store(total + row, nodes[NODES - 1], mask=inside)

    upstream = ()
    for j in tl.static_range(NODES):
        share = tl.full([CHAINS], 1.0, tl.float32)
        if BACKWARD[7 * j + 1] == _SUM:
            share = tl.load(values + (BACKWARD[7 * j + 4] + BACKWARD[7 * j + 6])) * upstream[BACKWARD[7 * j + 3]]
        elif BACKWARD[7 * j + 1] == _LOGSUMEXP:
            logit = _logit(nodes[BACKWARD[7 * j + 5]], values, BACKWARD[7 * j + 4], BACKWARD[7 * j + 6])
            share = tl.exp(logit - greatest[BACKWARD[7 * j + 2]]) / sums[BACKWARD[7 * j + 2]] * upstream[BACKWARD[7 * j + 3]]
        upstream = upstream + (share,)
    for k in tl.static_range(LEAVES):
        weight = tl.zeros([CHAINS], tl.float32)
        for j in tl.static_range(NODES):
            if BACKWARD[7 * j] == k:
                weight = weight + upstream[j]
        tl.store(weights + (k * batch + row), weight, mask=inside)


class ProgramPlan:
    """A program at one noise level, ready to be evaluated on ``device``."""

    def __init__(self, program: Program, device: torch.device, sigma: float | None = None) -> None:
        self._values = torch.from_numpy(program.arrays(sigma)[1]).to(device)
        forward, parent, used = [], {}, 0
        all_children: list[int] = []
        stack: list[int] = []
        for i, (code, operand) in enumerate(program.codes):
            children = () if code == program.LEAF or not operand else tuple(stack[-operand:])
            del stack[len(stack) - len(children) :]
            stack.append(i)
            forward.append((code, operand, len(all_children), used))
            all_children += children
            parent |= {c: (i, rank) for rank, c in enumerate(children)}
            used += {program.LEAF: 0, program.SUM: operand, program.LOGSUMEXP: operand + 1}[code]
        last = len(forward) - 1
        backward = []
        for i in range(last, -1, -1):
            above, rank = parent.get(i, (last, 0))
            code = forward[above][0] if i in parent else -1
            leaf = forward[i][1] if forward[i][0] == program.LEAF else -1
            backward.append((leaf, code, above, last - above, forward[above][3], i, rank))
        self._constants = {
            "FORWARD": tuple(itertools.chain(*forward)), "BACKWARD": tuple(itertools.chain(*backward)),
            "CHILDREN": (*all_children, -1), "NODES": last + 1, "LEAVES": program.n_leaves,
        }  # fmt: skip

    def __call__(self, energies: torch.Tensor, total: torch.Tensor, weights: torch.Tensor) -> None:
        """energies float32 ``[K, B]`` -> E into total ``[B]``, ∂E/∂E_k into weights ``[K, B]``; contiguous."""
        batch = total.shape[0]
        launch(
            _program, -(-batch // _CHAINS), total.device, energies=energies, values=self._values, total=total, weights=weights,
            batch=batch, CHAINS=_CHAINS, **self._constants,
        )  # fmt: skip
