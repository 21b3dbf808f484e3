"""The custom operators: schemas, fakes, compilation, messages."""

from __future__ import annotations

import pytest
import torch
from conftest import same_bits

from ebmfast import ops, reference, rng

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def arguments(k=2):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 5, generator=generator)
    gradients = [torch.randn(4, 3, 5, generator=generator) for _ in range(k)]
    return x, gradients, torch.ones(k)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clamp": [-1.0, 1.0], "grad_clip_value": 1.0, "grad_clip_norm": 1.0, "first_chain": 3, "stream": 2},
        {"frozen_mask": torch.zeros(3, 5, dtype=torch.bool), "faults": torch.zeros(4, dtype=torch.int64)},
    ],
)
def test_langevin_step_opcheck(options):
    x, gradients, weights = arguments()
    call = {"seed": -1, "step": 0} | options
    results = torch.library.opcheck(
        torch.ops.ebmfast.langevin_step.default, (x, gradients, weights, 0.1, 0.2), call, test_utils=CHECKS
    )
    assert set(results.values()) == {"SUCCESS"}


def test_normal_opcheck():
    results = torch.library.opcheck(
        torch.ops.ebmfast.normal.default, ([3, 5], 4), {"seed": -1, "step": 0}, test_utils=CHECKS
    )
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("seed", [0, 2**63 - 1, 2**63, 2**64 - 1])
def test_wrappers_equal_the_reference(seed):
    x, gradients, weights = arguments()
    expected = x.clone()
    reference.langevin_step(expected, gradients, weights, 0.1, 0.2, seed=seed, step=3, clamp=(-1, 1))
    ops.langevin_step(x, torch.stack(gradients), weights, 0.1, 0.2, seed=seed, step=3, clamp=(-1, 1))
    assert same_bits(x, expected)
    assert same_bits(ops.normal((3, 5), 4, seed=seed, step=1), rng.normal((3, 5), 4, seed=seed, step=1))


def test_inside_compile():
    """One graph, no break: the operator is an opaque node in user code."""

    def chain(x, gradients, weights):
        for step in range(2):
            ops.langevin_step(x, [g * 2 for g in gradients], weights, 0.1, 0.2, seed=7, step=step)
        return x + ops.normal((3, 5), 4, seed=7, step=9)

    x, gradients, weights = arguments()
    y = x.clone()
    compiled = torch.compile(chain, backend="aot_eager", fullgraph=True)
    assert same_bits(compiled(x, gradients, weights), chain(y, gradients, weights))
    assert same_bits(x, y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 3, 5, dtype=torch.float64)}, "`x` must be float32 on cpu, got float64 on cpu"),
        ({"weights": torch.ones(3)}, r"`weights` must be of shape \[2\], got \[3\]"),
        ({"seed": 2**64}, r"`seed` must be in \[0, 2\^64\), got 18446744073709551616"),
    ],
)
def test_errors(change, message):
    x, gradients, weights = arguments()
    call = {
        "x": x,
        "gradients": gradients,
        "weights": weights,
        "drift": 0.1,
        "noise": 0.1,
        "seed": 0,
        "step": 0,
    }
    with pytest.raises(ValueError, match=message):
        ops.langevin_step(**(call | change))
