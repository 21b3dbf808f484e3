"""`python -m ebmfast`: what is installed, what can run here, and whether it computes the right thing."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterator
from typing import TextIO

import torch

from ebmfast import backends, reference, rng
from ebmfast._native import core

__all__ = ["run"]

# Random123's known answers for philox4x32-10: counter, key, words.
KNOWN_ANSWERS = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)
# The normals of the first of them: `rng.normal((4,), 1, seed=0, step=0, stream=rng.INIT)`.
KNOWN_NORMALS = (
    "0x1.fb76660000000p-1",
    "-0x1.d96d600000000p-1",
    "-0x1.3c373e0000000p-1",
    "-0x1.eda3640000000p-2",
)


def run(stream: TextIO | None = None) -> int:
    """Prints versions, build and backends; runs the known answers, and each backend against the reference.

    Returns 0 if every check passed, else 1.
    """
    stream = stream or sys.stdout
    for name, value in _facts():
        print(f"{name:<12} {value}", file=stream)
    for name, reason in backends.available().items():
        print(
            f"{'backend':<12} {name}: {'available' if reason is None else 'not available: ' + reason}",
            file=stream,
        )
    failures = 0
    for name, check in _checks():
        problem = _problem_of(check)
        failures += problem is not None
        print(f"{'check':<12} {name}: {'ok' if problem is None else 'FAILED: ' + problem}", file=stream)
    print(f"{failures} checks failed" if failures else "all checks passed", file=stream)
    return int(failures > 0)


def _facts() -> Iterator[tuple[str, object]]:
    build = core.build_info()
    yield "ebmfast", f"{build['version']} (commit {build['commit']})"
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    yield "torch", f"{torch.__version__}, {torch.get_num_threads()} threads"
    yield "compiler", f"{build['compiler']}, {build['flags']}"
    yield "cuda", "kernels built" if build["cuda"] else "kernels not built"
    levels = (
        f"{name} ({lanes} lanes{'' if here else ', not on this CPU'})" for name, here, lanes in core.levels()
    )
    yield "isa", f"{core.isa()}; built: {', '.join(levels)}"


def _checks() -> Iterator[tuple[str, Callable[[], None]]]:
    yield "Philox known answers", _known_answers
    for name, reason in backends.available().items():
        if reason is None:
            yield f"{name}: known normals", lambda name=name: _known_normals(name)
        if reason is None and name != "reference":
            yield f"{name}: one step equals the reference", lambda name=name: _step_parity(name)
    yield "cpu: the chain engine agrees with the reference", _chain_parity


def _problem_of(check: Callable[[], None]) -> str | None:
    try:
        check()
    except Exception as error:  # a doctor reports whatever is wrong
        return f"{type(error).__name__}: {error}"
    return None


def _known_answers() -> None:
    for counter, key, expected in KNOWN_ANSWERS:
        got = rng.philox(counter, key)
        if got != expected:
            raise AssertionError(
                f"philox{counter, key} is {[f'{w:08x}' for w in got]}, not {[f'{w:08x}' for w in expected]}"
            )


def _known_normals(name: str) -> None:
    device = backends.home(name)
    got = (
        backends.resolve(name, device)
        .normal((4,), 1, seed=0, step=0, stream=rng.INIT, device=device)[0]
        .tolist()
    )
    if tuple(v.hex() for v in got) != KNOWN_NORMALS:
        raise AssertionError(f"got {[v.hex() for v in got]}, not {list(KNOWN_NORMALS)}")


def _step_parity(name: str) -> None:
    device = backends.home(name)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, 7, 11, generator=generator).to(device)
    gradients = torch.randn(2, 5, 3, 7, 11, generator=generator).to(device)
    weights = torch.tensor([1.0, -0.5], device=device)
    expected = x.clone()
    options = {
        "seed": 2**63 + 1,
        "step": 3,
        "first_chain": 2**32 - 2,
        "clamp": (-2.0, 2.0),
        "grad_clip_norm": 10.0,
    }
    backends.resolve(name, device).step(x, gradients, weights, 0.1, 0.3, **options)
    reference.langevin_step(expected, gradients, weights, 0.1, 0.3, **options)
    if not torch.equal(x, expected):
        wrong, worst = int((x != expected).sum()), float((x - expected).abs().max())
        raise AssertionError(f"{wrong} of {x.numel()} values differ, by {worst:.3g} at most")


def _chain_parity() -> None:
    from ebmfast import Concept, Langevin, energies, sample

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = energies.MLP(3, (20, 13))
    well, bell = Concept(energies.DoubleWell(), name="well"), Concept(energies.Gaussian([1.0, 0.0, -1.0]), name="bell")
    composition = (Concept(net, name="net") & well) | bell
    sampler = Langevin(drift=0.05, noise=0.2)
    runs = ({"engine": "chain"}, {"backend": "reference"})
    ours, expected = (sample(composition, n=40, shape=(3,), sampler=sampler, steps=3, seed=1, **run).x for run in runs)
    if not torch.allclose(ours, expected, rtol=1e-4, atol=1e-5):
        raise AssertionError(f"states differ by {float((ours - expected).abs().max()):.3g} at most")
