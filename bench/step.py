"""`python -m bench.step`: the fused step, K = 4, 16 M elements, against copy bandwidth and eager torch."""

from __future__ import annotations

import torch

from bench.timing import Variant, compare, copy_bandwidth, quantiles, record
from ebmfast import backends, reference

K, CHAINS, SIZE = 4, 1024, 16384
DRIFT, NOISE, CLAMP = 0.1, 0.2, (-3.0, 3.0)


def variants(noise: float, dtype: torch.dtype) -> list[Variant]:
    gradients = torch.randn(K, CHAINS, SIZE).to(dtype)
    weights = torch.tensor([1.0, 0.5, -0.25, 2.0])
    x = torch.randn(CHAINS, SIZE)
    cpu = backends.resolve("cpu", "cpu")
    plan = cpu.prepare(x, n_gradients=K, gradient_dtype=dtype, seed=1, clamp=CLAMP)

    def check() -> None:
        part = x[:8].clone()
        expected = part.clone()
        g = gradients[:, :8].contiguous()
        cpu.step(part, g, weights, DRIFT, noise, seed=1, step=3, clamp=CLAMP)
        reference.langevin_step(expected, g, weights, DRIFT, noise, seed=1, step=3, clamp=CLAMP)
        assert torch.equal(part, expected), "the step differs from the reference"

    def eager() -> None:
        total = weights[0] * gradients[0].float()
        for w, g in zip(weights[1:], gradients[1:], strict=True):
            total = total + w * g.float()
        moved = x - DRIFT * total
        if noise != 0:
            moved = moved + noise * torch.randn_like(x)
        x.copy_(moved.clamp(*CLAMP))

    def check_eager() -> None:
        if noise == 0:
            expected = x.clone()
            reference.langevin_step(expected, gradients, weights, DRIFT, 0.0, seed=1, step=3, clamp=CLAMP)
            eager()
            torch.testing.assert_close(x, expected)

    return [
        Variant("step", lambda: plan(gradients, weights, DRIFT, noise, 3), check),
        Variant("eager", eager, check_eager),
        copy_bandwidth(x.numel() * 4),
    ]


def main() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for noise in (0.0, NOISE):
            seconds = compare(variants(noise, dtype), rounds=9)
            times = {name: quantiles(values) for name, values in seconds.items()}
            size = CHAINS * SIZE
            moved = size * (8 + K * (2 if dtype == torch.bfloat16 else 4))
            step, copy = moved / times["step"]["median"], 8 * size / times["copy"]["median"]
            record(
                "step",
                {"K": K, "shape": [CHAINS, SIZE], "gradients": str(dtype), "noise": noise},
                {
                    "seconds": times,
                    "step_GB_per_s": step / 1e9,
                    "copy_GB_per_s": copy / 1e9,
                    "share_of_copy": step / copy,
                    "ratio_to_eager": times["eager"]["median"] / times["step"]["median"],
                },
            )


if __name__ == "__main__":
    main()
