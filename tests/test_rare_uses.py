"""Uses that are legitimate and rare: other defaults of torch, states that callbacks change, starts outside of bounds, modes that
change after `prepare`, numbers of numpy."""

import functools
import math
import operator

import numpy as np
import pytest
import torch
from torch import nn

import ebmfast as ef
from ebmfast.compat import torchebm as compat
from ebmfast.composition import from_json
from ebmfast.energies import DoubleWell, Gaussian

WARM = ef.DualAveraging(4)
SAMPLERS = {
    "langevin": ef.Langevin(0.05), "mala": ef.MALA(0.05), "warm": ef.MALA(0.05, warmup=WARM), "hmc": ef.HMC(0.1),
    "baoab": ef.BAOAB(0.1), "noise first": ef.Langevin(0.05, noise_first=True)}


def quadratic(scale=0.5, center=0.0):
    return ef.Concept(lambda x: scale * (x - center).square().flatten(1).sum(1), name="quadratic")


@pytest.mark.parametrize("engine", ["step", "chain"])
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torch_s_default_dtype_does_not_matter(name, engine, dtype):
    if engine == "chain" and name == "baoab":
        pytest.skip("BAOAB has no chain engine")
    well, x = ef.Concept(DoubleWell()), torch.linspace(-1, 1, 10).view(5, 2)

    def draw():
        run = ef.prepare(well, SAMPLERS[name], shape=(2,), steps=12, engine=engine)
        return run(x=x, seed=0), run(x=x, seed=0)  # the second may be a quick call

    expected, before = draw(), torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        found = draw()
    finally:
        torch.set_default_dtype(before)
    for a, b in zip(expected, found):
        assert torch.equal(a.x, b.x) and torch.equal(a.energy, b.energy) and b.x.dtype is torch.float32
        assert a.acceptance is None or torch.equal(a.acceptance, b.acceptance)
        assert a.step_size is None or torch.equal(a.step_size, b.step_size)


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_callbacks_change_counts_in_both_engines(name):
    """A callback may move the chains and the models; the next step is taken from there."""
    if name in ("warm", "baoab"):
        pytest.skip("no chain engine, or step sizes that learn from rounding")

    def draw(engine):
        model = Gaussian([0.0, 0.0], torch.eye(2) * 0.1)

        def change(info):
            info.x[:, 0] = 3.0
            model.mean[1] = 0.1 * info.step

        return ef.sample(ef.Concept(model), 64, 2, SAMPLERS[name], 30, 0, engine=engine, callback=change, trace=ef.Trace(every=5))

    a, b = draw("step"), draw("chain")
    torch.testing.assert_close(a.x, b.x, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(a.trace.energy, b.trace.energy, rtol=1e-3, atol=1e-2)
    assert a.x[:, 1].mean() > 0.5  # the mean went away from 0, and chains after it


@pytest.mark.parametrize("inner", [ef.MALA, ef.HMC, ef.BAOAB])
def test_what_callbacks_change_counts_before_a_denoising_step_too(inner):
    seen = []

    def energy(x, sigma):
        seen.append(float(x.detach().min()))
        return (x.square() / (2 * (1 + sigma[:, None] ** 2))).sum(1)

    moved = []

    def change(info):
        info.x.add_(10.0)
        moved.append(float(info.x.min()))

    ef.sample(ef.Concept(energy), 4, 2, ef.Annealed([1.0], 5, inner=inner), None, 0, callback=change, check=False)
    assert all(place in seen for place in moved)


def test_callbacks_that_only_look_cost_nothing():
    """What is known of the target is forgotten only where something changed."""
    class Counted(nn.Module):
        calls = 0

        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.5))

        def forward(self, x):
            Counted.calls += 1
            return self.scale * x.square().sum(1)

    def calls(callback):
        Counted.calls = 0
        ef.sample(ef.Concept(model), 4, 2, ef.MALA(0.1), 20, 0, callback=callback, check=False, energies=False)
        return Counted.calls

    model = Counted()
    alone = calls(None)
    assert calls(lambda info: None) == alone
    assert calls(lambda info: model.scale.detach().mul_(1.0)) >= 2 * alone - 4
    assert calls(lambda info: info.x.add_(1.0)) >= 2 * alone - 4


def test_momenta_feel_what_callbacks_change():
    found = []

    def change(info):
        info.x.fill_(3.0)

    ef.sample(ef.Concept(lambda x: (found.append(float(x.detach().max())), x.square().sum(1))[1]), 4, 2, ef.BAOAB(0.01), 4, 0,
              callback=change, check=False)
    assert found.count(3.0) >= 3  # gradients are taken anew where the callback put the chains


def test_drawn_starts_lie_within_the_bounds():
    box = ef.Concept(lambda x: 4 * (x - 0.5).square().sum(1), data_range=(0, 1))
    annealed = ef.Annealed.geometric(1.0, 0.05, 6, steps_per_level=10, drift=0.2, inner=ef.MALA(bounds=(0, 1)), denoise=False)
    r = ef.sample(box, 200, 4, annealed, None, 0)
    assert ((r.x >= 0) & (r.x <= 1)).all() and (r.acceptance > 0).all()


@pytest.mark.parametrize("engine", ["step", "chain"])
def test_starts_outside_of_bounds_are_refused(engine):
    well, sampler, x = ef.Concept(DoubleWell()), ef.MALA(0.01, bounds=(0, 1)), torch.tensor([[0.5, 0.5], [0.5, 1.5]])
    run = ef.prepare(well, sampler, shape=2, steps=4, engine=engine)
    run(x=x.clamp(0, 1), seed=0)
    with pytest.raises(ValueError, match=r"`x` must lie within `bounds`, 0 to 1: rows \[1\] do not"):
        run(x=x, seed=0)
    with pytest.raises(ValueError, match="must lie within `bounds`"):
        run(2, seed=0, init=lambda ids, shape: x)
    held = torch.tensor([False, True])
    assert (run(x=x, seed=0, frozen_mask=held).x[1, 1] == 1.5).all()  # what never moves may be anywhere


@pytest.mark.parametrize("sampler, low, high", [
    (ef.Langevin(0.1, clamp=(0, math.inf)), 0, 1), (ef.MALA(0.1, bounds=(-math.inf, 2)), 1, 2),
    (ef.Langevin(0.1, clamp=(-math.inf, math.inf)), 0, 1)])
def test_half_open_domains_start_at_their_end(sampler, low, high):
    r = ef.sample(quadratic(), 50, 3, sampler, 0, 0)
    assert r.x.min() >= low and r.x.max() <= high and r.x.std() > 0.2


def test_a_mode_that_changes_after_prepare_is_seen():
    net = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.SiLU(), nn.Linear(8, 1)).eval()
    run = ef.prepare(ef.Concept(net), ef.Langevin(0.1), shape=2, steps=3)
    run(4, seed=0)
    net.train()
    with pytest.raises(ValueError, match="BatchNorm in train mode"):
        run(4, seed=0)
    assert int(net[1].num_batches_tracked) == 0


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_takes_float64(name):
    x = torch.zeros(4, 2, dtype=torch.float64)
    r = ef.sample(quadratic(), x=x, sampler=SAMPLERS[name], steps=8, seed=0, backend="reference")
    plain = ef.sample(quadratic(), x=x.float(), sampler=SAMPLERS[name], steps=8, seed=0, backend="reference")
    assert r.x.dtype is torch.float64
    torch.testing.assert_close(r.x.float(), plain.x, rtol=1e-4, atol=1e-5)


def test_the_guard_leaves_descents_from_0_alone():
    steep, sampler = quadratic(500.0, 10.0), ef.Langevin(1e-4, temperature=0.0)
    for start in (0.0, 1e-8, 1e-6):
        r = ef.sample(steep, x=torch.full((2, 4), start), sampler=sampler, steps=500)
        torch.testing.assert_close(r.x, torch.full((2, 4), 10.0))
    pit = ef.Concept(lambda x: -10 * x.square().sum(1))
    within = ef.sample(pit, x=torch.full((2, 4), 1e-3), sampler=ef.Langevin(0.1, temperature=0.0, clamp=(-1e8, 1e8)), steps=300)
    assert (within.x.abs() == 1e8).all()  # bounded: nothing to guard
    with pytest.raises(ef.RunawayError):
        ef.sample(pit, x=torch.zeros(2, 4), sampler=ef.Langevin(0.1), steps=300)


@pytest.mark.parametrize("first", [20, 100])
def test_restarts_of_a_state_that_resumes_are_those_of_both_engines(first):
    well = ef.Concept(DoubleWell(5.0))
    frozen = ef.sample(well, 64, 2, ef.Langevin(0.35), first, 0, on_nonfinite="freeze", energies=False, engine="chain")
    assert (frozen.state.faults > 0).any()
    a, b = (ef.sample(well, sampler=ef.Langevin(0.01), steps=30, resume=frozen.state, on_nonfinite="restart", engine=e)
            for e in ("step", "chain"))
    torch.testing.assert_close(a.x, b.x, rtol=1e-3, atol=1e-3)
    assert (b.state.faults == 0).all() and (b.state.step == first + 30).all()


def test_acceptance_of_torchebm_s_hmc_is_that_of_all_micro_batches():
    hmc = compat.HamiltonianMonteCarlo(lambda x: 0.5 * x.square().sum(-1), 0.1, 1)
    _, several = hmc.sample(dim=64, n_samples=40_000, n_steps=2, return_diagnostics=True)
    rate = several["acceptance_rate"]
    assert rate.shape == (2,) and (rate > 0.9).all() and (rate <= 1).all()


def test_conditions_of_one_model_may_lie_anywhere_beside_fixed_ones():
    family = ef.Family(lambda x, c: (x * c).sum(1) + x.square().sum(1), "f", condition_dim=2)
    both = family(1.0, 2.0) & family[ef.Slot("c")]
    rows = torch.tensor([[1.0, 2.0], [0.5, 0.0]], dtype=torch.float64)
    x = torch.ones(2, 2)
    assert both.energy(x, conditions={"c": rows}).tolist() == [10.0, 7.5]


def test_every_function_of_the_driver_ignores_the_default_device():
    from ebmfast import backends

    cpu, faults = backends.resolve("cpu", "cpu"), torch.zeros(3, dtype=torch.int64)
    old, new, ratio = torch.zeros(3, 2), torch.ones(3, 2), torch.zeros(3)
    run, x = ef.prepare(quadratic(), ef.MALA(0.1), shape=(2,), steps=4, check=False), torch.ones(4, 2)
    expected = run(x=x, seed=0).x
    with torch.device("meta"):
        accepted = cpu.accept([old], [new], ratio, faults, step=0, seed=0, first_chain=0)
        assert torch.equal(run(x=x, seed=0).x, expected)
    assert accepted.device.type == "cpu" and bool(accepted.all())


def test_log_partition_on_a_list_of_devices():
    g = ef.Concept(Gaussian([0.0, 0.0], torch.eye(2)))
    value, _ = ef.log_partition(g, 2, device=["cpu", "cpu"], n=64, levels=4)
    assert value == pytest.approx(math.log(2 * math.pi), abs=0.3)


def test_a_mass_of_torchebm_s_hmc_is_that_of_the_call():
    hmc = compat.HamiltonianMonteCarlo(lambda x: 0.5 * x.square().sum(-1), 0.1, 2)
    for k in range(12):
        hmc.mass = torch.full((3,), 1.0 + k)
        fresh = compat.HamiltonianMonteCarlo(lambda x: 0.5 * x.square().sum(-1), 0.1, 2, mass=torch.full((3,), 1.0 + k))
        a, b = (s.sample(torch.ones(4, 3), n_steps=3, generator=torch.Generator().manual_seed(0)) for s in (hmc, fresh))
        assert torch.equal(a, b)


def test_a_clamp_of_torchebm_s_langevin_may_be_a_list():
    sampler = compat.LangevinDynamics(lambda x: 0.5 * x.square().sum(-1), 0.1, clamp=[-0.1, 0.1])
    assert sampler.sample(dim=2, n_samples=8, n_steps=5).abs().max() <= 0.1
    sampler.clamp = [-0.05, 0.05]
    assert sampler.sample(dim=2, n_samples=8, n_steps=5).abs().max() <= 0.05


def test_measured_times_need_no_home(monkeypatch, tmp_path):
    from ebmfast import measured

    for name in ("EBMFAST_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    monkeypatch.setattr("pathlib.Path.expanduser", lambda self: (_ for _ in ()).throw(RuntimeError("no home")))
    measured.forget()
    assert measured.once("key", lambda: [1.0, 2.0]) == [1.0, 2.0]
    monkeypatch.undo()
    monkeypatch.setenv("EBMFAST_CACHE", str(tmp_path))
    (tmp_path / "measured.json").write_text('{"key": [], "other": "12", "third": [NaN], "fourth": [1, 2]}')
    measured.forget()
    assert measured._read() == {"fourth": [1.0, 2.0]}
    measured.forget()


def test_diagnostics_of_draws_that_are_not_finite_are_nan():
    draws = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    for bad in (math.nan, math.inf):
        some = draws.clone()
        some[1, 50:] = bad
        for rank in (False, True):
            assert ef.diagnostics.split_rhat(some, rank=rank).isnan() and ef.diagnostics.ess(some, rank=rank).isnan()
    assert ef.diagnostics.ess(torch.full((4, 101), 0.1, dtype=torch.float64)).isnan()


def test_modes_of_submodules_are_seen():
    class Centred(nn.Module):
        def forward(self, x):
            return x - x.mean(0) if self.training else x

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.sub = Centred()

        def forward(self, x):
            return self.sub(x).square().sum(1)

    net = Net().eval()
    run = ef.prepare(ef.Concept(net), ef.Langevin(0.1), shape=2, steps=3)
    run(4, seed=0)
    net.sub.train()
    with pytest.raises(ef.CoupledError):
        run(4, seed=0)


def test_labels_are_not_rounded_by_the_default_dtype():
    family = ef.Family(lambda x, c: (x * 0 + c).sum(1), "f", condition_dim=1)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        energy = family[ef.Slot("c")].energy(torch.zeros(1, 1, dtype=torch.float32), conditions={"c": torch.tensor([[257]])})
    finally:
        torch.set_default_dtype(before)
    assert energy.item() == 257


def test_buffers_say_where_a_model_lives():
    assert ef.plan.Plan(ef.Concept(Gaussian([0.0], torch.eye(1)).to("meta"))).home.type == "meta"


def test_models_of_one_name_are_not_merged():
    one, two = nn.Linear(2, 1), nn.Linear(2, 1)
    same = ef.Concept(lambda x, c: (x * c).sum(1), [1.0, 0.0], "f"), ef.Concept(lambda x, c: (x * c).sum(1), [0.0, 1.0], "f")
    slot = ef.Concept(same[0].source.model, ef.Slot("u"), "f")
    for expr, name in ((ef.Concept(one) & ef.Concept(two), "Linear"), (same[0] & same[1], "f"), (same[0] & slot, "f")):
        with pytest.raises(ValueError, match=f"two models or concepts are named '{name}'"):
            expr.to_json()
    named = ef.Concept(one, name="a") & ef.Concept(two, name="b")
    again = from_json(named.to_json(), [ef.Concept(one, name="a"), ef.Concept(two, name="b")])
    assert again == named
    for read in (lambda m: from_json(named.to_json(), m), lambda m: ef.parse("a & a", m)):
        with pytest.raises(ValueError, match="two of `models` are named 'a'"):
            read([ef.Concept(one, name="a"), ef.Concept(two, name="a")])


@pytest.mark.parametrize("engine", ["step", "chain"])
def test_a_mass_belongs_to_its_sampler(engine):
    mass = torch.ones(2)
    run = ef.prepare(ef.Concept(DoubleWell()), ef.HMC(0.1, mass=mass), shape=2, steps=5, engine=engine)
    before = run(4, 0).x
    mass.fill_(4.0)
    assert torch.equal(run(4, 0).x, before)


def test_an_interrupted_run_goes_on_with_as_many_steps_only():
    noised = ef.Concept(lambda x, sigma: (x.square().sum(1) / (2 * sigma**2)), takes_sigma=True)

    state = ef.sample(noised, 4, 2, ef.Annealed([1.0, 0.5], 6), None, 0).state
    unfinished = ef.SampleState(**{**vars(state), "step": torch.full((4,), 5), "x": state.x})
    assert not unfinished.finished
    with pytest.raises(ValueError, match="interrupted run of 13 steps"):
        ef.sample(noised, sampler=ef.Annealed([1.0, 0.7, 0.5], 6), resume=unfinished)
    assert ef.sample(noised, sampler=ef.Annealed([1.0, 0.5], 6), resume=unfinished).state.finished


@pytest.mark.parametrize("given", [np.linspace(0.1, 0.01, 10), torch.linspace(0.1, 0.01, 10), np.float64(0.1), torch.tensor(0.1)])
def test_schedules_are_numbers_of_any_library(given):
    plain = given.tolist()
    for kind in (ef.Langevin, ef.MALA, ef.HMC, ef.BAOAB):
        a, b = (ef.sample(quadratic(), 4, 2, kind(h), np.int64(10), 0) for h in (given, plain))
        assert torch.equal(a.x, b.x) and "array" not in repr(a.report.sampler) and "tensor" not in a.report.sampler


def test_integers_are_those_of_any_library():
    r = ef.sample(quadratic(), np.int64(4), np.int64(2), ef.Langevin(0.1), np.int32(6), 0, trace=np.int64(2),
                  batch_size=np.int64(3))
    assert r.x.shape == (4, 2) and len(r.trace.steps) == 3
    with pytest.raises(TypeError, match="`trace` must be a Trace"):
        ef.sample(quadratic(), 4, 2, ef.Langevin(0.1), 4, 0, trace="all")
    with pytest.raises(TypeError, match="`conditions` must be {slot: rows"):
        ef.sample(quadratic(), 4, 2, ef.Langevin(0.1), 4, 0, conditions=torch.zeros(4, 1))
    with pytest.raises(TypeError, match="`n` must be an integer"):
        ef.sample(quadratic(), 4.0, 2, ef.Langevin(0.1), 4, 0)


def test_samplers_keep_numbers_of_their_own(tmp_path):
    sizes = [0.1] * 5
    run = ef.prepare(ef.Concept(DoubleWell()), ef.Langevin(sizes), shape=2, steps=5)
    before = run(4, 0).x
    sizes[:] = [0.0] * 5
    assert torch.equal(run(4, 0).x, before) and torch.equal(run(x=run(4, 0).x, seed=0).x, run(x=before, seed=0).x)
    annealed = ef.Annealed([1.0, 0.5], np.int64(2), inner=ef.HMC(n_leapfrog_steps=np.int64(2)))
    r = ef.sample(ef.Concept(lambda x, sigma: x.square().sum(1) / sigma), 4, 2, annealed, None, 0, trace=ef.Trace(np.int64(2)))
    r.state.save(tmp_path / "state.safetensors")
    assert ef.DualAveraging(np.int64(3)).steps == 3
    with pytest.raises(ValueError, match="`steps_per_level` must be a positive integer, got 6.5"):
        ef.Annealed([1.0], 6.5)


def test_shapes_are_checked_in_every_engine():
    narrow = ef.Concept(DoubleWell(), shape=(3,))
    with pytest.raises(ValueError, match=r"takes x of shape \[3\], got \[2\]"):
        ef.sample(narrow, x=torch.zeros(4, 2), sampler=ef.Langevin(0.1), steps=2)
    with pytest.raises(ValueError, match="must not have chains without elements"):
        ef.sample(quadratic(), x=torch.zeros(4, 0), sampler=ef.Langevin(0.1), steps=2)


def test_gradients_and_inference_within_inference_mode():
    family = ef.Family(lambda x, c: (x * c).sum(1) + x.square().sum(1), "f", condition_dim=2)
    expr, x = family(1.0, 0.0) & family(0.0, 2.0), torch.ones(3, 2)
    expected = expr.gradient(x)
    with torch.inference_mode():
        assert torch.equal(expr.gradient(torch.ones(3, 2)), expected)
        found = ef.infer(torch.ones(2, 2), family[ef.Slot("c")], ranges={"c": [(0, 1), (0, 1)]}, steps=4, chains=2, seed=0)
    assert found.samples["c"].shape == (2, 2, 2)


def test_schedules_of_alpha_are_shown():
    own = ef.Concept(nn.Linear(2, 1), name="own", negation_alpha=ef.AboveSigma(0.5, 0.3))
    assert "alpha AboveSigma(0.5" in own.explain()
    assert "AboveSigma(0.5, value=-0.3)*(own & quadratic)" in repr(quadratic() & ~(own & quadratic()))


def test_text_of_deep_trees_is_made_once_per_node():
    class Counted(ef.Concept):
        count = 0

        def __repr__(self):
            Counted.count += 1
            return "b"

    b = Counted(lambda x: x.sum(1), name="b")
    deep = b
    for _ in range(14):
        deep = (deep | b) & b
    repr(deep)
    assert Counted.count < 200


def test_long_chains_of_operators_are_flat():
    parts = [ef.Concept(lambda x, k=k: k * x.square().sum(1), name=f"e{k}") for k in range(1500)]
    every, some = functools.reduce(operator.and_, parts), functools.reduce(operator.or_, parts)
    x = torch.full((1, 1), 0.1)
    assert every.energy(x).item() == pytest.approx(0.01 * sum(range(1500)), rel=1e-4)
    assert some.energy(x).item() == pytest.approx(-math.log(sum(math.exp(-0.01 * k) for k in range(1500))), rel=1e-4)
    a, b, c = parts[:3]
    assert (a & b) & c == a & (b & c) and repr((a | b) | c) == repr(a | (b | c)) == "e0 | e1 | e2"
    weighed = ef.any_of([a, b], log_weights=[0.5, 0.0]) | c
    torch.testing.assert_close(weighed.energy(x), ef.any_of([ef.any_of([a, b], log_weights=[0.5, 0.0]), c]).energy(x))
    twice = ef.any_of([a, b], sharpness=2.0) | c
    torch.testing.assert_close(twice.energy(x), ef.any_of([ef.any_of([a, b], sharpness=2.0), c]).energy(x))


def test_a_composition_of_nothing_is_sampled_and_traced():
    a = quadratic()
    for sampler in SAMPLERS.values():
        r = ef.sample(a & ef.negate(a, 1.0), 4, 2, sampler, 20, 0, trace=2, allow_improper=True)
        assert (r.trace.energy == 0).all() and (r.energy == 0).all()


def test_a_family_is_not_a_concept():
    color = ef.Family(lambda x, c: (x * c).sum(1), "color", {"red": [1.0], "blue": [0.0]})
    where = ef.Family(lambda x, c: (x * c).sum(1), "where", condition_dim=2)
    for wrong in (lambda: color & color("red"), lambda: color("red") & color, lambda: ~color, lambda: 2.0 * color,
                  lambda: list(color)):
        with pytest.raises(TypeError, match=r"color is a family of concepts and needs a condition, as in color\('red'\)"):
            wrong()
    with pytest.raises(TypeError, match=r"as in where\(0.5, 0.5\)"):
        where | color("red")


def test_shapes_and_ranges_that_a_model_knows():
    where = ef.Family(lambda x, c: (x * c).flatten(1).sum(1) + x.square().sum(1), "where", condition_dim=2, shape=(2,),
                      ranges=[(-1, 1), (0, 1)])
    with pytest.raises(ValueError, match=r"the model of where\(0, 0\) takes x of shape \[2\], got \[3\]"):
        ef.sample(where(0, 0), 4, 3, ef.Langevin(0.1), 4, 0)
    with pytest.raises(ValueError, match="takes x of shape"):
        where(0, 0).energy(torch.zeros(1, 5))
    with pytest.warns(UserWarning, match=r"where\(2, 0\) lies outside the conditions .*: -1 to 1, 0 to 1"):
        where(2, 0)
    with pytest.raises(ValueError, match="`ranges` of 'where' must be 2 pairs"):
        ef.Family(lambda x, c: x, "where", condition_dim=2, ranges=[(0, 1)])
    assert ef.zoo.concepts()["color"]("red").source.shape == (3, 32, 32)
    one = torch.tensor(0.5)
    assert ef.Concept(lambda x, c: x, one).condition == (0.5,)
