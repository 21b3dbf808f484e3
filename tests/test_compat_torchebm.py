"""The contract of torchebm 0.8, beside torchebm itself: same signatures, shapes, errors and schedules, equal laws."""

import copy
import inspect
import pickle
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from torch import nn

torchebm = pytest.importorskip("torchebm", reason="torchebm is the contract here: pip install 'ebmfast[test]'")
from torchebm import core, samplers  # noqa: E402
from torchebm.losses import ContrastiveDivergence  # noqa: E402

import ebmfast as ef  # noqa: E402
from ebmfast.compat import torchebm as ours  # noqa: E402

SILENT = 1e-30  # a noise scale that moves nothing
PAIRS = [(samplers.LangevinDynamics, ours.LangevinDynamics), (samplers.HamiltonianMonteCarlo, ours.HamiltonianMonteCarlo)]
PAIR = pytest.mark.parametrize("pair", PAIRS, ids=["langevin", "hmc"])


class Perceptron(core.BaseModel):
    """A network under a label."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.table = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 1)), nn.Embedding(4, 3)

    def forward(self, x, y=None, scale=1.0):
        h = x if y is None else x + self.table(y)
        return 0.5 * scale * x.square().sum(1) + self.net(h).squeeze(1)


class Own(Perceptron):
    """A gradient that is not that of the energy."""

    def gradient(self, x, model_kwargs=None):
        return 2.0 * x + (model_kwargs or {}).get("shift", 0.0)


class Picture(core.BaseModel):
    """An energy of pictures."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(2, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(x).square().mean((1, 2, 3)) + 0.5 * x.square().sum((1, 2, 3))


class Coupled(core.BaseModel):
    """Chains that repel each other."""

    def forward(self, x):
        return x.square().sum(1) - 0.1 * (x - x.mean(0)).square().sum(1)


class Annealed(core.Schedulable, core.BaseModel):
    """A temperature that a scheduler inside the model changes from step to step."""

    def __init__(self):
        super().__init__()
        self.register_scheduler("beta", core.LinearScheduler(0.1, 2.0, 10))

    def forward(self, x):
        return self.get_scheduled_value("beta") * x.square().sum(1)


class Learnt(core.BaseModel):
    """A Gaussian whose precision is learnt."""

    def __init__(self, precision: float):
        super().__init__()
        self.log_precision = nn.Parameter(torch.tensor(precision).log())

    def forward(self, x):
        return 0.5 * self.log_precision.exp() * x.square().sum(1)


def start(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gaussian(dim=2):
    return core.GaussianModel(torch.zeros(dim), torch.eye(dim))


def both(model, x, pair=PAIRS[0], sample=None, **options):
    """What both samplers return, noise being off where there is some to switch off."""
    if pair is PAIRS[0]:
        options = {"noise_scale": SILENT, "step_size": 0.05} | options
    found = []
    for kind in pair:
        sampler = kind(copy.deepcopy(model), **{k: copy.deepcopy(v) for k, v in options.items()})
        found.append((sampler, sampler.sample(x=x, **(sample or {"n_steps": 12}))))
    return found


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@PAIR
@pytest.mark.parametrize("method", ["__init__", "sample"])
def test_signatures_are_torchebms(pair, method):
    theirs, mine = (inspect.signature(getattr(kind, method)).parameters for kind in pair)
    assert [(p.name, p.kind, p.default) for p in theirs.values()] == [(p.name, p.kind, p.default) for p in mine.values()]
    assert issubclass(pair[1], core.BaseSampler)


@PAIR
@pytest.mark.parametrize("arguments, error", [
    ({"thin": 0, "dim": 2}, ValueError), ({"thin": -1, "dim": 2}, ValueError),
    ({"dim": 2, "y": torch.ones(1), "model_kwargs": {"y": torch.ones(1)}}, ValueError),
    ({"dim": 2, "model_kwargs": [1]}, TypeError), ({"dim": 2, "model_kwargs": {"unknown": 1}}, TypeError),
    ({"dim": 2, "surprise": 1}, TypeError), ({"dim": 2, "n_steps": 2.5}, TypeError),
])
def test_wrong_arguments_raise_what_torchebm_raises(pair, arguments, error):
    for kind in pair:
        with pytest.raises(error):
            kind(core.DoubleWellModel()).sample(**{"n_steps": 2, **arguments})


@PAIR
def test_where_a_chain_starts_has_to_be_known(pair):
    for kind in pair:
        with pytest.raises(ValueError, match="dim must be provided when x is None"):
            kind(core.DoubleWellModel()).sample(n_steps=2)
    assert all(k(gaussian(3)).sample(n_steps=2, n_samples=4).shape == (4, 3) for k in PAIRS[1])


@pytest.mark.parametrize("options, error", [
    ({"step_size": 0.0}, ValueError), ({"step_size": -1.0}, ValueError), ({"noise_scale": 0.0}, ValueError),
    ({"clamp": (1.0, 1.0)}, ValueError), ({"integrator": "none"}, ValueError), ({"integrator": "leapfrog"}, TypeError),
])
def test_wrong_langevin_options_raise_what_torchebm_raises(options, error):
    for kind in PAIRS[0]:
        with pytest.raises(error):
            kind(gaussian(), **options)


@pytest.mark.parametrize("options, error", [
    ({"step_size": 0.0}, ValueError), ({"n_leapfrog_steps": 0}, ValueError), ({"integrator": "heun"}, TypeError),
    ({"integrator": "generalised_leapfrog"}, TypeError),
])
def test_wrong_hmc_options_raise_what_torchebm_raises(options, error):
    for kind in PAIRS[1]:
        with pytest.raises(error):
            kind(gaussian(), **options)


def test_what_has_no_counterpart_raises():
    with pytest.raises(NotImplementedError, match="decay"):
        ours.LangevinDynamics(gaussian(), decay=0.1)
    with pytest.raises(TypeError, match="mass"):
        ours.HamiltonianMonteCarlo(gaussian(), mass=2)
    with pytest.raises(ValueError, match=r"\[n, dim\]"):
        ours.HamiltonianMonteCarlo(core.HarmonicModel()).sample(x=start(2, 3, 4))
    with pytest.raises(ImportError, match="torchebm.samplers"):
        from ebmfast.compat.torchebm import RiemannianManifoldHMC  # noqa: F401


@pytest.mark.parametrize("shape", [(3,), (2, 3)], ids=["vector", "matrix"])
def test_models_that_return_another_shape_raise(shape):
    class Wrong(core.BaseModel):
        def forward(self, x):
            return x.square()

    class Aloof(core.BaseModel):
        def forward(self, x):
            return torch.zeros(len(x))

    for kind in PAIRS[0]:
        with pytest.raises(ValueError, match="shape|must be"):
            kind(Wrong()).sample(x=start(4, *shape), n_steps=2)
        with pytest.raises(RuntimeError):
            kind(Aloof()).sample(x=start(4, *shape), n_steps=2)


@PAIR
@pytest.mark.parametrize("n, n_steps, thin", [(4, 7, 1), (4, 7, 3), (1, 6, 2), (3, 2, 5), (3, 0, 1)])
@pytest.mark.parametrize("trajectory", [False, True])
@pytest.mark.parametrize("diagnostics", [False, True])
def test_shapes_and_keys(pair, n, n_steps, thin, trajectory, diagnostics):
    found = []
    for kind in pair:
        x = kind(core.DoubleWellModel(), step_size=0.002).sample(
            dim=2, n_samples=n, n_steps=n_steps, thin=thin, return_trajectory=trajectory, return_diagnostics=diagnostics)
        x, kept = x if diagnostics else (x, {})
        found.append((x.shape, x.dtype, x.device, {name: (v.shape, v.dtype) for name, v in kept.items()}))
    assert found[0] == found[1]


def test_shapes_of_pictures():
    for kind in PAIRS[0]:
        x, kept = kind(Picture(), step_size=0.01).sample(
            dim=(2, 5, 4), n_samples=3, n_steps=6, thin=2, return_trajectory=True, return_diagnostics=True)
        assert x.shape == (3, 3, 2, 5, 4) and kept["var"].shape == (3, 2, 5, 4) and kept["energy"].shape == (3,)


MODELS = {
    "double well": (lambda: core.DoubleWellModel(1.5, 0.8), True), "harmonic": (lambda: core.HarmonicModel(2.0), True),
    "Gaussian": (lambda: core.GaussianModel(torch.tensor([1.0, -1.0, 0.5]), torch.tensor(
        [[1.0, 0.4, 0.0], [0.4, 2.0, 0.1], [0.0, 0.1, 0.5]])), True),
    "Rosenbrock": (lambda: core.RosenbrockModel(1.0, 2.0), True), "Styblinski-Tang": (core.StyblinskiTangModel, True),
    "Ackley": (core.AckleyModel, False), "Rastrigin": (core.RastriginModel, False), "network": (Perceptron, False),
    "own gradient": (Own, False),
}


@pytest.mark.parametrize("name", MODELS)
def test_trajectories_without_noise_are_torchebms(name):
    make, native = MODELS[name]
    sample = {"n_steps": 12, "thin": 2, "return_trajectory": True, "return_diagnostics": True}
    (_, theirs), (sampler, mine) = both(make(), 0.7 * start(5, 3), step_size=0.01, sample=sample)
    close(mine[0], theirs[0])
    for key in theirs[1]:
        close(mine[1][key], theirs[1][key], 2e-5)
    assert ("chain engine yes" in sampler.explain((3,))) == native
    assert not sampler._runs.said


def test_pictures_and_clamps():
    for clamp in (None, (-0.5, 0.4)):
        (_, theirs), (_, mine) = both(Picture(), 3.0 + start(3, 2, 5, 4), clamp=clamp)
        close(mine, theirs)
    assert mine.abs().max() < 0.5
    (_, theirs), (_, mine) = both(Picture(), start(3, 2, 5, 4), clamp=(-0.5, 0.4), sample={"n_steps": 1})
    close(mine, theirs)
    assert float(mine.max()) == pytest.approx(0.4) and float(mine.min()) == -0.5


@pytest.mark.parametrize("scheduler", [
    lambda: core.LinearScheduler(0.1, 0.0, 8), lambda: core.CosineScheduler(0.1, 0.01, 10),
    lambda: core.ExponentialDecayScheduler(0.1, 0.8), lambda: core.MultiStepScheduler(0.1, [3, 6], 0.5),
    lambda: core.WarmupScheduler(core.LinearScheduler(0.1, 0.01, 6), 3)])
@pytest.mark.parametrize("model", [core.DoubleWellModel, Perceptron], ids=["chain", "step"])
def test_schedulers_decide_each_step(scheduler, model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a step size of 0 runs in the plain loop
        (a, theirs), (b, mine) = both(model(), 0.5 * start(4, 3), step_size=scheduler())
        close(mine, theirs)
        for reset in (False, True):  # goes on where the last call ended, or starts anew
            x = 0.5 * start(4, 3, seed=2)
            close(b.sample(x=x, n_steps=3, reset_schedulers=reset), a.sample(x=x, n_steps=3, reset_schedulers=reset))
            mine, theirs = (vars(s.schedulers["step_size"]) for s in (b, a))
            assert {k: v for k, v in mine.items() if k != "main_scheduler"} == {
                k: v for k, v in theirs.items() if k != "main_scheduler"}


def test_a_scheduler_registered_twice_advances_twice():
    shared = core.LinearScheduler(0.1, 0.01, 20)
    (a, theirs), (b, mine) = both(core.DoubleWellModel(), 0.5 * start(4, 3), step_size=shared)
    for sampler in (a, b):
        sampler.register_scheduler("again", sampler.schedulers["step_size"])
        sampler.last = sampler.sample(x=0.5 * start(4, 3), n_steps=6)
    close(b.last, a.last)
    assert b.schedulers["step_size"].step_count == a.schedulers["step_size"].step_count == 12


def test_constant_schedulers_count_their_steps_too():
    for kind in PAIRS[0]:
        sampler = kind(core.DoubleWellModel())
        sampler.sample(dim=2, n_steps=9)
        assert [s.step_count for s in sampler.schedulers.values()] == [9, 9]


def test_schedulers_inside_the_model_change_it_from_step_to_step():
    class Hidden(core.BaseModel):
        """A scheduler that is no part of the tree, but shared with the sampler."""

        def __init__(self, scheduler):
            super().__init__()
            self.scheduler = scheduler

        def forward(self, x):
            return 10 * self.scheduler.get_value() * x.square().sum(1)

    x = start(5, 3)
    with pytest.warns(UserWarning, match="scheduler in the model"):
        (a, theirs), (b, mine) = both(Annealed(), x)
    close(mine, theirs)
    assert a.model.schedulers["beta"].step_count == b.model.schedulers["beta"].step_count == 12
    found = []
    for kind in PAIRS[0]:
        shared = core.LinearScheduler(0.1, 0.01, 12)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append(kind(Hidden(shared), step_size=shared, noise_scale=SILENT).sample(x=x, n_steps=6))
    close(found[1], found[0])


@pytest.mark.parametrize("arguments", [
    {"y": torch.tensor([0, 1, 2, 3, 0])}, {"model_kwargs": {"y": torch.tensor([3, 3, 1, 1, 0]), "scale": 2.0}},
    {"model_kwargs": {"scale": 0.5}}])
def test_conditions_reach_the_model_as_they_are(arguments):
    (_, theirs), (sampler, mine) = both(Perceptron(), start(5, 3), sample={"n_steps": 6} | arguments)
    close(mine, theirs)
    changed = sampler.sample(x=start(5, 3), n_steps=6, y=torch.tensor([1, 1, 1, 1, 1]))
    assert not torch.allclose(changed, mine)


def test_conditions_reach_a_gradient_of_the_models_own():
    (_, theirs), (_, mine) = both(Own(), start(5, 3), sample={"n_steps": 6, "model_kwargs": {"shift": 0.7}})
    close(mine, theirs)


def test_coupled_energies_run_in_a_plain_loop_and_say_so_once():
    x = start(6, 3)
    with pytest.warns(UserWarning, match="other chains of its batch") as caught:
        (_, theirs), (sampler, mine) = both(Coupled(), x)
    close(mine, theirs)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler.sample(x=x, n_steps=2)
    class Labelled(Coupled):
        def forward(self, x, y):
            return super().forward(x) + y

    with pytest.warns(UserWarning, match="other chains"):
        (_, theirs), (_, mine) = both(Labelled(), x, sample={"n_steps": 5, "y": torch.arange(6.0)})
    close(mine, theirs)


def test_batch_norm_in_train_mode_sees_what_torchebm_shows_it():
    class Normed(core.BaseModel):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.SiLU(), nn.Linear(8, 1))

        def forward(self, x):
            return self.net(x).squeeze(1) + x.square().sum(1)

    with pytest.warns(UserWarning, match="other chains"):
        (a, theirs), (b, mine) = both(Normed(), start(6, 3))
    close(mine, theirs)
    close(b.model.net[1].running_mean, a.model.net[1].running_mean)
    assert b.model.net[1].num_batches_tracked == a.model.net[1].num_batches_tracked == 12


def test_a_model_changed_between_calls_is_read_anew():
    model, x = core.DoubleWellModel(), start(4, 2)
    sampler = ours.LangevinDynamics(model, 0.05, SILENT)
    sampler.sample(x=x, n_steps=3)
    model.barrier_height = 0.3
    close(sampler.sample(x=x, n_steps=3), samplers.LangevinDynamics(model, 0.05, SILENT).sample(x=x, n_steps=3))
    model.forward = lambda x: 3.0 * x.square().sum(1)  # no longer what was recognised
    close(sampler.sample(x=x, n_steps=3), samplers.LangevinDynamics(model, 0.05, SILENT).sample(x=x, n_steps=3))
    normal = gaussian()
    sampler = ours.LangevinDynamics(normal, 0.05, SILENT)
    sampler.sample(x=x, n_steps=3)
    normal.mean += 2.0
    close(sampler.sample(x=x, n_steps=3), samplers.LangevinDynamics(normal, 0.05, SILENT).sample(x=x, n_steps=3))


def test_float64_runs_in_float64_and_lower_precisions_in_a_plain_loop():
    (_, theirs), (_, mine) = both(core.GaussianModel(torch.zeros(3), torch.eye(3), dtype=torch.float64), start(4, 3).double(),
                                  dtype=torch.float64)
    assert mine.dtype == torch.float64
    close(mine, theirs, 1e-7)  # a step size is a float32
    assert not torch.equal(mine, mine.float().double())
    with pytest.warns(UserWarning, match="chains are bfloat16"):
        (_, theirs), (_, mine) = both(core.DoubleWellModel(), 0.5 * start(4, 3), dtype=torch.bfloat16)
    assert mine.dtype == torch.bfloat16
    close(mine.float(), theirs.float(), 2e-2)


def test_chains_that_are_not_finite_go_on_as_in_torchebm():
    x = torch.tensor([[0.5, 0.5], [80.0, 1.0]])
    falling = core.LinearScheduler(0.05, 0.01, 20)
    for scheduler in (falling, core.WarmupScheduler(copy.deepcopy(falling), 3)):
        with pytest.warns(UserWarning, match="not finite|being finite"):
            (a, theirs), (b, mine) = both(core.DoubleWellModel(), x, step_size=scheduler)
        assert not theirs[1].isfinite().all() and torch.equal(mine.isfinite(), theirs.isfinite())
        close(mine[0], theirs[0])
        assert a.schedulers["step_size"].step_count == b.schedulers["step_size"].step_count
        assert a.schedulers["step_size"].get_value() == b.schedulers["step_size"].get_value()
    with pytest.warns(UserWarning, match="start where they are not finite"):
        (_, theirs), (_, mine) = both(core.DoubleWellModel(), torch.tensor([[torch.nan, 0.5]]))
    assert torch.equal(mine.isnan(), theirs.isnan())


def test_integrators_that_are_not_built_in_run_in_a_plain_loop():
    with pytest.warns(UserWarning, match="HeunIntegrator"):
        (_, theirs), (_, mine) = both(core.DoubleWellModel(), 0.5 * start(4, 3), integrator="heun")
    close(mine, theirs)


@PAIR
def test_generators_decide_about_everything_and_only_they(pair):
    sampler = pair[1](gaussian(), step_size=0.1)

    def draw(seed):
        return sampler.sample(dim=2, n_samples=5, n_steps=4, generator=torch.Generator().manual_seed(seed))

    torch.manual_seed(3)
    expected = torch.randn(3)
    torch.manual_seed(3)
    one, again, other = draw(1), draw(1), draw(2)
    assert torch.equal(torch.randn(3), expected) and torch.equal(one, again) and not torch.equal(one, other)
    torch.manual_seed(7)
    first = sampler.sample(dim=2, n_steps=4)
    torch.manual_seed(7)
    assert torch.equal(sampler.sample(dim=2, n_steps=4), first)


def test_a_chain_is_the_same_in_any_batch():
    sampler, x = ours.LangevinDynamics(gaussian(), step_size=0.1), start(64, 2)

    def draw(x):
        return sampler.sample(x=x, n_steps=50, generator=torch.Generator().manual_seed(1))

    assert torch.equal(draw(x)[:7], draw(x[:7]))


@pytest.mark.parametrize("kind", PAIRS[0], ids=["torchebm", "ebmfast"])
@pytest.mark.parametrize("model", [core.HarmonicModel, Perceptron], ids=["chain", "step"])
def test_the_law_is_that_of_the_discretised_chain(kind, model):
    """Variance σ²/(1 - η/2) of x <- x - ηx + σ√(2η) z, at five standard errors."""
    eta, sigma = 0.4, 1.3
    if model is Perceptron:
        model = type("Quadratic", (core.BaseModel,), {"forward": lambda self, x: 0.5 * x.square().sum(1)})
    x = kind(model(), eta, sigma).sample(x=torch.zeros(4000, 8), n_steps=60, generator=torch.Generator().manual_seed(5))
    expected = sigma**2 / (1 - eta / 2)
    assert abs(x.var().item() / expected - 1) < 5 * (2 / x.numel()) ** 0.5
    assert abs(x.mean().item()) < 5 * (expected / x.numel()) ** 0.5


def test_noise_follows_its_scheduler():
    """A last step of noise scale 2 leaves 4·2η beside what was there."""
    for kind in PAIRS[0]:
        sampler = kind(core.HarmonicModel(), 0.1, core.MultiStepScheduler(SILENT, [3], 2.0 / SILENT))
        x = sampler.sample(x=torch.zeros(20000, 2), n_steps=4, generator=torch.Generator().manual_seed(1))
        assert abs(x.var().item() / 0.8 - 1) < 5 * (2 / x.numel()) ** 0.5


@pytest.mark.parametrize("mass", [None, 2.0, torch.tensor([1.0, 3.0])], ids=["1", "number", "vector"])
def test_hmc_has_the_law_and_the_acceptance_of_torchebms(mass):
    cov = torch.tensor([[1.0, 0.6], [0.6, 2.0]])
    model, rates = core.GaussianModel(torch.tensor([1.0, -1.0]), cov), []
    for kind in PAIRS[1]:
        sampler = kind(model, step_size=0.9, n_leapfrog_steps=2, mass=mass)
        x, kept = sampler.sample(x=torch.zeros(4000, 2), n_steps=30, thin=3, return_diagnostics=True,
                                 generator=torch.Generator().manual_seed(2))
        close(x.T.cov(), cov, 0.25)
        close(x.mean(0), model.mean, 0.12)
        rates.append(kept["acceptance_rate"][3:].mean().item())
    assert 0.3 < rates[0] < 0.98 and abs(rates[0] - rates[1]) < 0.015
    assert abs(kept["energy"][-1].item() - 1.0) < 0.12  # D/2


def test_hmc_under_labels_and_a_gradient_of_its_own():
    """A gradient that is not the energy's changes what is proposed; what is accepted keeps the energy's law."""
    class Wrong(core.BaseModel):
        def forward(self, x, y):
            return 0.5 * (x - y[:, None]).square().sum(1)

        def gradient(self, x, model_kwargs=None):
            return 1.3 * (x - model_kwargs["y"][:, None])

    y = torch.cat([torch.full((2000,), 2.0), torch.full((2000,), -1.0)])
    x = ours.HamiltonianMonteCarlo(Wrong(), 0.5, 3).sample(dim=2, n_samples=4000, n_steps=40, y=y,
                                                           generator=torch.Generator().manual_seed(0))
    for part, mean in ((x[:2000], 2.0), (x[2000:], -1.0)):
        assert abs(part.mean().item() - mean) < 5 * 4000**-0.5 and abs(part.var().item() - 1) < 5 * (2 / 4000) ** 0.5


def test_runs_are_prepared_once():
    sampler, x = ours.LangevinDynamics(core.DoubleWellModel(), 0.01), start(16, 2)
    for _ in range(5):
        sampler.sample(x=x, n_steps=3)
    assert len(sampler._runs.prepared) == 1
    (run, _), = sampler._runs.prepared.values()
    assert 3 in run._quick  # the short way of a prepared run
    for k in range(40):
        sampler.schedulers["step_size"] = core.ConstantScheduler(0.001 * (k + 1))
        sampler.sample(x=x, n_steps=3)
    assert len(sampler._runs.prepared) <= ours.PREPARED


def test_long_trajectories_are_kept_block_by_block(monkeypatch):
    sample = {"n_steps": 23, "thin": 2, "return_trajectory": True, "return_diagnostics": True}
    x = start(4, 2)

    def draw(kind):
        return kind(gaussian(), step_size=0.1).sample(x=x, generator=torch.Generator().manual_seed(1), **sample)

    whole = [draw(kind) for kind in (ours.LangevinDynamics, ours.HamiltonianMonteCarlo)]
    monkeypatch.setattr(ours, "KEPT_BYTES", 3 * x.numel() * 4)
    for kind, (trajectory, kept) in zip((ours.LangevinDynamics, ours.HamiltonianMonteCarlo), whole):
        again, parts = draw(kind)
        assert torch.equal(again, trajectory)
        for key in kept:
            close(parts[key], kept[key], 1e-6)


@PAIR
def test_samplers_are_copied_and_pickled(pair):
    sampler = pair[1](gaussian(), step_size=0.1)
    sampler.sample(dim=2, n_steps=2)
    for other in (copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        assert torch.equal(*(s.sample(dim=2, n_steps=4, generator=torch.Generator().manual_seed(1)) for s in (sampler, other)))
    assert repr(sampler).startswith(f"{type(sampler).__name__}(model=GaussianModel, step_size=0.1")
    assert repr(sampler) == repr(pair[0](gaussian(), step_size=0.1))


def test_plain_modules_and_functions_are_models_too():
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    sampler = ours.LangevinDynamics(net, 0.01)
    assert "chain engine yes" in sampler.explain((2,)) and sampler.sample(dim=2, n_steps=3).shape == (1, 2)
    assert ours.LangevinDynamics(lambda x: x.square().sum(1), 0.01).sample(dim=3, n_steps=3).shape == (1, 3)


class Energies(core.BaseModel):
    """A native network that torchebm's losses take."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = ef.energies.MLP(2, (16,))

    def forward(self, x):
        return self.net(x) + 0.1 * x.square().sum(1)


def losses(kind, model, x, steps=3):
    sampler = kind(model, step_size=0.1, noise_scale=SILENT)
    loss = ContrastiveDivergence(model=model, sampler=sampler, k_steps=4)
    optimizer, found = torch.optim.SGD(model.parameters(), 0.1), []
    for _ in range(steps):
        value, negatives = loss(x, generator=torch.Generator().manual_seed(0))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        found.append((value.detach(), negatives))
    return found


def test_contrastive_divergence_trains_as_with_torchebms_own_sampler():
    """Without noise, losses, negatives and every step of the optimizer agree."""
    x, model = start(32, 2), Energies()
    theirs = losses(samplers.LangevinDynamics, copy.deepcopy(model), x)
    mine = losses(ours.LangevinDynamics, copy.deepcopy(model), x)
    for (a, b), (c, d) in zip(mine, theirs):
        close(a, c)
        close(b, d)


def test_negatives_of_a_native_energy_come_from_the_weights_as_they_are():
    torch.manual_seed(0)
    model, x = ef.energies.MLP(2, (16, 16)), start(32, 2)
    sampler = ours.LangevinDynamics(model, step_size=0.1)
    loss, optimizer = ContrastiveDivergence(model=model, sampler=sampler, k_steps=4), torch.optim.SGD(model.parameters(), 1.0)
    assert "chain engine yes" in sampler.explain((2,))
    found = []
    for _ in range(3):
        value, negatives = loss(x, generator=torch.Generator().manual_seed(0))
        anew = ours.LangevinDynamics(copy.deepcopy(model), step_size=0.1)
        assert torch.equal(negatives, anew.sample(x=x, n_steps=4, generator=torch.Generator().manual_seed(0)))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        found.append(negatives)
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])


def test_persistent_chains_go_on_from_the_buffer():
    model, x = Energies(), start(32, 2)
    loss = ContrastiveDivergence(model=model, sampler=ours.LangevinDynamics(model, 0.1, SILENT), k_steps=4, persistent=True,
                                 buffer_size=32, new_sample_ratio=0.0, init_steps=2)
    _, first = loss(x)
    assert all((loss.replay_buffer == row).all(1).any() for row in first)
    _, second = loss(x)
    again = samplers.LangevinDynamics(model, 0.1, SILENT).sample(x=first, n_steps=4)
    assert all((second - row).abs().amax(1).min() < 1e-5 for row in again)


def test_contrastive_divergence_learns_a_gaussian():
    """From data of variance 4, the precision falls from 1 to 1/4; long chains, so that CD is maximum likelihood."""
    model, x = Learnt(1.0), 2.0 * start(2000, 2)
    sampler = ours.LangevinDynamics(model, step_size=0.1)
    loss = ContrastiveDivergence(model=model, sampler=sampler, k_steps=60, energy_reg_weight=0.0)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    for step in range(60):
        optimizer.zero_grad()
        value, _ = loss(x, generator=torch.Generator().manual_seed(step))
        value.backward()
        optimizer.step()
    assert abs(model.log_precision.exp().item() - 0.25) < 0.03


def test_it_works_without_torchebm(tmp_path):
    code = textwrap.dedent("""
        import sys
        sys.modules["torchebm"] = None
        import torch
        from ebmfast.compat.torchebm import HamiltonianMonteCarlo, LangevinDynamics

        class Falling:
            def __init__(self): self.k = 0
            def get_value(self): return 0.1 * 0.9**self.k
            def step(self): self.k += 1
            def reset(self): self.k = 0

        class Model(torch.nn.Module):
            def forward(self, x, y=None): return 0.5 * (x - (0 if y is None else y[:, None])).square().sum(1)

        sampler = LangevinDynamics(Model(), Falling(), 1e-30)
        x = sampler.sample(x=torch.ones(3, 2), n_steps=4)
        expected = 1.0
        for k in range(4): expected *= 1 - 0.1 * 0.9**k
        torch.testing.assert_close(x, torch.full((3, 2), expected))
        assert sampler.schedulers["step_size"].k == 4 and sampler.schedulers["noise_scale"].step_count == 4
        for kind in (LangevinDynamics, HamiltonianMonteCarlo):
            x, kept = kind(Model(), 0.2).sample(dim=2, n_samples=2000, n_steps=40, y=torch.ones(2000), thin=4,
                                                return_diagnostics=True)
            assert abs(x.mean().item() - 1) < 0.1 and kept["mean"].shape == (10, 2)
        for wrong in ({"step_size": 0.0}, {"integrator": "heun"}):
            try: LangevinDynamics(Model(), **wrong)
            except (ValueError, NotImplementedError): continue
            raise SystemExit(f"{wrong} did not raise")
    """)
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
