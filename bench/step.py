"""`python -m bench.step`: the fused step, K = 4, 16 M elements, against copy bandwidth, eager torch, torch.compile and JAX.

torchebm has no step of its own to time apart from its sampler: `bench.overhead` and `bench.chain` have it.
"""

from __future__ import annotations

import os

import torch

from bench.timing import Variant, compare, copy_bandwidth, quantiles, record, sound
from ebmfast import backends, reference

K, CHAINS, SIZE = 4, 1024, 16384
DRIFT, NOISE, CLAMP = 0.1, 0.2, (-3.0, 3.0)


class Case:
    """Gradients, weights and a state; what a step makes of them by the specification."""

    def __init__(self, noise: float, dtype: torch.dtype):
        self.noise, self.dtype = noise, dtype
        self.gradients = torch.randn(K, CHAINS, SIZE).to(dtype)
        self.weights = torch.tensor([1.0, 0.5, -0.25, 2.0])
        self.x = torch.randn(CHAINS, SIZE)

    def ours(self) -> Variant:
        cpu = backends.resolve("cpu", "cpu")
        plan = cpu.prepare(self.x, n_gradients=K, gradient_dtype=self.dtype, seed=1, clamp=CLAMP)

        def check() -> None:
            part = self.x[:8].clone()
            expected, g = part.clone(), self.gradients[:, :8].contiguous()
            cpu.step(part, g, self.weights, DRIFT, self.noise, seed=1, step=3, clamp=CLAMP)
            reference.langevin_step(expected, g, self.weights, DRIFT, self.noise, seed=1, step=3, clamp=CLAMP)
            assert torch.equal(part, expected), "the step differs from the reference"

        return Variant("ebmfast", lambda: plan(self.gradients, self.weights, DRIFT, self.noise, 3), check)

    def right(self, moved: torch.Tensor) -> None:
        """Without noise a step lands where the reference does; with it, what was not clamped is off by N(0, noise²)."""
        expected = self.x[:64].clone()
        reference.langevin_step(expected, self.gradients[:, :64].contiguous(), self.weights, DRIFT, 0.0, seed=1, step=3)
        moved, inside = moved[:64], expected.abs() < CLAMP[1] - 6 * self.noise
        if self.noise == 0:
            torch.testing.assert_close(moved, expected.clamp(*CLAMP), rtol=1e-5, atol=1e-5)
            return
        off, error = (moved - expected)[inside], 5 / int(inside.sum()) ** 0.5
        ratio = float(off.std()) / self.noise
        if not (abs(float(off.mean())) < error * self.noise and abs(ratio - 1) < error and float(moved.abs().max()) <= CLAMP[1]):
            raise AssertionError(f"noise is off by {float(off.mean()):.3g}, its standard deviation is {ratio:.4f} of what it is")

    def move(self, x: torch.Tensor, gradients: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        total = weights[0] * gradients[0].float()
        for k in range(1, K):
            total = total + weights[k] * gradients[k].float()
        moved = x - DRIFT * total
        if self.noise != 0:
            moved = moved + self.noise * torch.randn_like(x)
        return moved.clamp(*CLAMP)

    def eager(self) -> Variant:
        given = self.x, self.gradients, self.weights
        return Variant("eager", lambda: self.x.copy_(self.move(*given)), lambda: self.right(self.move(*given)))

    def compiled(self) -> Variant:
        torch.compiler.reset()
        move, given = torch.compile(self.move, fullgraph=True), (self.x, self.gradients, self.weights)
        step = torch.compile(lambda x, g, w: x.copy_(self.move(x, g, w)), fullgraph=True)
        return Variant("torch.compile", lambda: step(*given), lambda: self.right(move(*given)))

    def jax(self) -> Variant:
        if len(os.sched_getaffinity(0)) != torch.get_num_threads():
            raise RuntimeError("JAX would take more cores than torch does")
        import jax
        import jax.numpy as jnp

        def move(x, gradients, weights, key):
            total = sum(weights[k] * gradients[k].astype(jnp.float32) for k in range(K))
            moved = x - DRIFT * total
            if self.noise != 0:
                moved = moved + self.noise * jax.random.normal(key, x.shape)
            return moved.clip(*CLAMP)

        step, key = jax.jit(move, donate_argnums=0), jax.random.PRNGKey(0)
        kind = jnp.bfloat16 if self.dtype == torch.bfloat16 else jnp.float32
        fixed = jnp.asarray(self.gradients.float().numpy()).astype(kind), jnp.asarray(self.weights.numpy())
        state = [jnp.array(self.x.numpy())]

        def run() -> None:
            state[0] = step(state[0], *fixed, key).block_until_ready()

        def check() -> None:
            self.right(torch.from_numpy(jax.device_get(step(jnp.array(self.x.numpy()), *fixed, key)).copy()))

        return Variant("jax", run, check)


def main() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for noise in (0.0, NOISE):
            case = Case(noise, dtype)
            found, trouble = sound({"eager": case.eager, "torch.compile": case.compiled, "jax": case.jax, "ebmfast": case.ours,
                                    "copy": lambda case=case: copy_bandwidth(case.x.numel() * 4)}, ("ebmfast", "copy"))
            times = {name: quantiles(values) for name, values in compare(found, rounds=7).items()}
            size = CHAINS * SIZE
            moved = size * (8 + K * (2 if dtype == torch.bfloat16 else 4))
            step, copy = moved / times["ebmfast"]["median"], 8 * size / times["copy"]["median"]
            record("step", {"K": K, "shape": [CHAINS, SIZE], "gradients": str(dtype), "noise": noise},
                   {"seconds": times, "step_GB_per_s": step / 1e9, "copy_GB_per_s": copy / 1e9, "share_of_copy": step / copy,
                    "not_timed": trouble})


if __name__ == "__main__":
    main()
