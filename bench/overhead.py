"""`python -m bench.overhead`: one Langevin step of a trivial energy, 64 chains of 8, against torchebm and an eager loop.

The driver's own time is what a step takes beyond the energy's forward and backward pass alone.
"""

from __future__ import annotations

import torch

import ebmfast as ef
from bench.timing import Variant, compare, quantiles, record

CHAINS, SIZE, STEPS, ETA = 64, 8, 500, 0.05


def energy(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x.square().sum(1)


def check_variance(draw) -> None:
    """The stationary variance 1/(1 - η/2) of the discretised chain, at five standard errors."""
    x = draw(torch.zeros(4000, SIZE))
    expected = 1 / (1 - ETA / 2)
    assert abs(x.var().item() - expected) < 5 * expected * (2 / x.numel()) ** 0.5, x.var().item()


def variants() -> list[Variant]:
    x = torch.randn(CHAINS, SIZE)
    sampler = ef.Langevin(drift=ETA, noise=(2 * ETA) ** 0.5)
    run = ef.prepare(ef.Concept(energy, name="quadratic"), sampler, shape=(SIZE,), steps=STEPS, energies=False)

    def eager(start: torch.Tensor) -> torch.Tensor:
        x = start
        for _ in range(STEPS):
            leaf = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(energy(leaf).sum(), leaf)
            x = x - ETA * gradient + (2 * ETA) ** 0.5 * torch.randn_like(x)
        return x

    ones = torch.ones(CHAINS)

    def model_alone() -> None:
        for _ in range(STEPS):
            leaf = x.detach().requires_grad_()
            torch.autograd.grad(energy(leaf), leaf, ones)

    found = [
        Variant("model alone", model_alone, lambda: None),
        Variant("ebmfast", lambda: run(x=x, seed=0), lambda: check_variance(lambda s: run(x=s, seed=0).x)),
        Variant("eager", lambda: eager(x), lambda: check_variance(eager)),
    ]
    try:
        from torchebm.core import BaseModel
        from torchebm.samplers import LangevinDynamics
    except ImportError as error:
        raise SystemExit(f"torchebm is the peer here: pip install --no-deps torchebm==0.8.9 ({error})") from None

    class Quadratic(BaseModel):
        def forward(self, x):
            return energy(x)

    peer = LangevinDynamics(Quadratic(), step_size=ETA)

    def sample(start):
        return peer.sample(x=start, n_steps=STEPS)

    return [*found, Variant("torchebm", lambda: sample(x), lambda: check_variance(sample))]


def main() -> None:
    torch.set_num_threads(1)
    times = {name: quantiles(s) for name, s in compare(variants(), rounds=15).items()}
    per_step = {name: {k: v / STEPS * 1e6 for k, v in t.items()} for name, t in times.items()}
    ratio = times["ebmfast"]["median"] / times["torchebm"]["median"]
    case = {"chains": CHAINS, "size": SIZE, "steps": STEPS, "unit": "microseconds per step, one thread"}
    driver = per_step["ebmfast"]["median"] - per_step["model alone"]["median"]
    record("overhead", case, {"us": per_step, "share_of_torchebm": ratio, "driver_us": driver})


if __name__ == "__main__":
    main()
