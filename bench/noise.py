"""`python -m bench.noise`: nanoseconds per normal on one core, against torch's generator and JAX's.

CPU time of the process, not wall time: the question is what a value costs.
"""

from __future__ import annotations

import time

import torch

from bench.timing import Variant, compare, quantiles, record, sound
from ebmfast import backends, rng
from ebmfast._native import core

CHAINS, SIZE = 64, 12288


def jax_normal() -> Variant:
    """Threefry's normals, keyed as ours are; under jit."""
    import jax

    draw, key = jax.jit(lambda key: jax.random.normal(key, (CHAINS, SIZE))), jax.random.PRNGKey(0)

    def check() -> None:
        values = draw(key)
        assert abs(float(values.mean())) < 0.01 and abs(float(values.std()) - 1) < 0.01

    return Variant("jax.random.normal", lambda: draw(key).block_until_ready(), check)


def main() -> None:
    torch.set_num_threads(1)
    cpu = backends.resolve("cpu", "cpu")
    expected = rng.normal((SIZE,), CHAINS, seed=1, step=2)
    out = torch.empty(CHAINS, SIZE)

    def ours(kind: str, level: str) -> Variant:
        uniform = kind == "uniform"

        def run() -> None:
            core.set_isa(level)
            core.fill(
                *(out.data_ptr(), CHAINS, SIZE),
                **{"seed": 1, "step": 2, "stream": rng.NOISE, "first_chain": 0, "first_element": 0},
                **{"uniform": uniform, "threads": 1},
            )

        def check() -> None:
            run()
            want = cpu.uniform((SIZE,), CHAINS, seed=1, step=2) if uniform else expected
            assert torch.equal(out, want), f"{kind} at {level} differs from the specification"

        return Variant(f"{kind} {level}", run, check)

    def check_torch() -> None:
        out.normal_()
        assert abs(float(out.mean())) < 0.01 and abs(float(out.std()) - 1) < 0.01

    levels = [name for name, supported, _ in core.levels() if supported]
    variants = [ours(kind, level) for level in levels for kind in ("normal", "uniform")]
    variants.append(Variant("torch.normal_", lambda: out.normal_(), check_torch))
    variants.append(Variant("torch.randn", lambda: torch.randn(CHAINS, SIZE), lambda: None))
    more, trouble = sound({"jax.random.normal": jax_normal})
    seconds = compare([*variants, *more], rounds=41, clock=time.process_time)
    core.set_isa("")
    per_value = {
        name: {q: t / out.numel() * 1e9 for q, t in quantiles(times).items()}
        for name, times in seconds.items()
    }
    best = per_value[f"normal {core.isa()}"]["median"]
    record(
        "noise",
        {"shape": [CHAINS, SIZE], "unit": "ns per value, one thread"},
        {"ns": per_value, "ratio_to_randn": per_value["torch.randn"]["median"] / best, "not_timed": trouble},
    )


if __name__ == "__main__":
    main()
