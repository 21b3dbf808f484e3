"""A user's code over the public surface: `make typecheck` holds it to mypy --strict. It is never run."""

from __future__ import annotations

from typing import assert_type

import torch
from torch import Tensor, nn

import ebmfast as ef
from ebmfast.compat.research import AnnealedULASampler, paper_loop
from ebmfast.compat.torchebm import HamiltonianMonteCarlo, LangevinDynamics


class Net(nn.Module):
    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        return x.square().sum(1)


def heavy(x: Tensor) -> Tensor:
    return x.pow(4).sum(1)


def compose() -> ef.Expression:
    color = ef.Family(Net(), name="color", labels={"red": [1, 0, 0]}, unconditional=True, data_range=(-1, 1), sigma=(0.06, 4.0),
                      negation_alpha=0.3)
    red = color("red")
    assert_type(red, ef.Concept)
    concepts = [red, color(0.2, 0.8, 0.0), color([0.2, 0.8, 0.0]), color[ef.Slot("c")], ef.Concept(heavy, [1.0], "heavy")]
    expr = ef.with_prior((concepts[0] & concepts[1] & ~concepts[2]) | 2.0 * concepts[3], color.unconditional, 0.5)
    assert_type(expr, ef.Expression)
    ef.any_of(concepts, log_weights=[0.0] * 5, sharpness=1.0)
    ef.all_of(concepts, weights=[1.0, ef.AboveSigma(0.5), 1.0, 1.0, 1.0])
    ef.negate(red, alpha=0.1)
    assert_type(expr.to_json(), str)
    return ef.parse("color('red')", {"color": color}) & ef.from_json(expr.to_json(), [color])


def draw(expr: ef.Expression, rows: Tensor) -> Tensor:
    x = torch.zeros(4, 2)
    assert_type(expr.energy(x), Tensor)
    assert_type(expr.gradient(x, sigma=0.1, conditions={"c": rows}), Tensor)
    assert_type(expr.explain(), str)
    r = ef.sample(expr, n=4, shape=(2,), sampler=ef.Langevin(step_size=0.1, clamp=(-1.0, 1.0)), steps=3, seed=0,
                  conditions={"c": rows}, trace=ef.Trace(every=1, states=True), device="cpu")
    assert_type(r.x, Tensor)
    assert_type(r.energy, Tensor | None)
    assert_type(r.report, ef.Report)
    assert_type(r.report.effective_temperature, tuple[float, float])
    assert_type(r.state, ef.SampleState)
    r.state.save("state.safetensors")
    state = ef.SampleState.load("state.safetensors")
    assert_type(state, ef.SampleState)
    run = ef.prepare(expr, ef.MALA(0.1, warmup=ef.DualAveraging(10)), shape=2, steps=5, memory_limit="1GB")
    assert_type(run(n=4, seed=torch.Generator()).x, Tensor)
    return ef.sample(expr, resume=state, sampler=ef.HMC(0.1, 5), steps=3).x


def schedules() -> list[ef.Langevin | ef.BAOAB | ef.Annealed]:
    return [ef.Langevin(drift=lambda t: 0.1 / (t + 1), noise=[0.1, 0.2]), ef.Langevin.paper(1.0),
            ef.BAOAB(0.1), ef.Annealed.geometric(4.0, 0.06, levels=16, steps_per_level=6)]


def others() -> None:
    modes = ef.energies.GaussianMixture([[-2.0, 0.0], [2.0, 0.0]], covs=0.3)
    ef.energies.Gaussian(torch.zeros(2), torch.eye(2))
    ef.energies.MLP(2, (64, 64), condition_dim=3, conditioning="film")
    log_z, error = ef.log_partition(ef.Concept(modes), (2,))
    ef.sample(ef.Concept(modes), 4, (2,), ef.MALA(0.1), 3, branches=ef.DrawBranches([log_z, error]))
    expr, sampler = ef.zoo.recommended(ef.zoo.concepts()["color"]("red"))
    assert_type(sampler, ef.Annealed | ef.Langevin)
    assert_type(LangevinDynamics(modes, step_size=0.1).explain((2,)), str)
    HamiltonianMonteCarlo(modes, 0.1, 10, 2.0).sample(dim=2, n_samples=3)
    sample = AnnealedULASampler(1, 1, [0.1], lambda x, ts: -x)
    assert_type(sample.sample_step(torch.zeros(1, 2), 0, None, {}), Tensor)
    assert_type(paper_loop(expr, torch.zeros(1, 2), 10), Tensor)
