import signal
import threading

import pytest
import torch
from models import ConditionalQuadratic, Net, NoisedGaussian, Quadratic, gaussian
from torch import nn

import ebmfast as ef

LANGEVIN = ef.Langevin(step_size=0.1)
A, B = gaussian(0.0, 1.0, "a"), gaussian(2.0, 3.0, "b")


def draw(e=A, **options):
    defaults = dict(n=5, shape=(3,), sampler=LANGEVIN, steps=6, seed=0)
    if "x" in options or "resume" in options:
        defaults.pop("n"), defaults.pop("shape")
    if "resume" in options:
        defaults.pop("seed")
    return ef.sample(e, **defaults | options)


def equal(a, b):
    return torch.equal(a, b)


# one noise for a chain, whatever surrounds it


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("e", [A & B, A | B], ids=["and", "or"])
def test_chains_do_not_depend_on_batch_shard_or_slot(e, backend):
    whole = draw(e, n=11, backend=backend).x
    assert equal(draw(e, n=11, batch_size=3, backend=backend).x, whole)
    assert equal(draw(e, n=4, first_chain=5, backend=backend).x, whole[5:9])
    assert not equal(draw(e, n=11, seed=1, backend=backend).x, whole)


@pytest.mark.parametrize("sampler", [
    LANGEVIN, ef.Langevin(drift=0.1, noise=0.2, noise_first=True, clamp=(-1, 1)),
    ef.Langevin(step_size=0.1, grad_clip_value=0.5), ef.Langevin(step_size=0.1, grad_clip_norm=0.5),
    ef.Langevin(step_size=lambda t: 0.1 / (1 + t), temperature=0.5)], ids=repr)
def test_backends_agree(sampler):
    results = [draw((A & ~B) | B, n=9, shape=(7,), sampler=sampler, backend=b).x for b in ("reference", "cpu")]
    torch.testing.assert_close(*results, rtol=2e-6, atol=2e-6)


def test_seeds():
    torch.manual_seed(5)
    first = draw(seed=None)
    torch.manual_seed(5)
    assert draw(seed=None).report.seed == first.report.seed
    assert equal(draw(seed=first.report.seed).x, first.x)
    assert draw(seed=torch.Generator().manual_seed(3)).report.seed == draw(seed=torch.Generator().manual_seed(3)).report.seed
    for bad in (-1, 2**64):
        with pytest.raises(ValueError, match="seed"):
            draw(seed=bad)


# resume


@pytest.mark.parametrize("sampler", [LANGEVIN, ef.Langevin(step_size=lambda t: 0.1 / (1 + t)),
                                     ef.Langevin(drift=0.1, noise=0.1, noise_first=True)])
def test_two_halves_equal_the_whole(sampler, tmp_path):
    e = (A & B) | A
    whole = draw(e, n=7, steps=20, sampler=sampler, batch_size=3)
    half = draw(e, n=7, steps=8, sampler=sampler)
    half.state.save(tmp_path / "state.safetensors")
    again = ef.SampleState.load(tmp_path / "state.safetensors")
    rest = draw(e, steps=12, sampler=sampler, resume=again)
    assert equal(rest.x, whole.x) and rest.state.step.tolist() == [20] * 7 and rest.state.finished


def test_a_sequence_belongs_to_its_call():
    sizes = [0.1 / (1 + t) for t in range(10)]
    whole = draw(steps=10, sampler=ef.Langevin(step_size=sizes))
    half = draw(steps=4, sampler=ef.Langevin(step_size=sizes[:4]))
    assert equal(draw(steps=6, sampler=ef.Langevin(step_size=sizes[4:]), resume=half.state).x, whole.x)


def test_resume_keeps_conditions_and_checks_arguments():
    f = ef.Family(ConditionalQuadratic(), "f", condition_dim=3)
    rows = torch.randn(5, 3)
    first = draw(f[ef.Slot("c")], conditions={"c": rows})
    second = draw(f[ef.Slot("c")], resume=first.state)
    assert equal(second.x, draw(f[ef.Slot("c")], conditions={"c": rows}, steps=12).x)
    for options, message in (({"seed": 7}, "seed"), ({"n": 6}, "`n` is 6"), ({"first_chain": 1}, "first_chain"),
                             ({"shape": (4,)}, r"\[n, 4\]")):
        with pytest.raises(ValueError, match=message):
            ef.sample(f[ef.Slot("c")], sampler=LANGEVIN, steps=1, resume=first.state, **options)
    with pytest.raises(TypeError, match="resume"):
        draw(resume={"x": 3})


def test_saved_states_are_recognised(tmp_path):
    from safetensors.torch import save_file
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "text").write_text("nothing")
    for name in ("other.safetensors", "text"):
        with pytest.raises(ValueError, match="not a saved state"):
            ef.SampleState.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        ef.SampleState.load(tmp_path / "absent")


@pytest.mark.parametrize("sampler", [LANGEVIN, ef.Annealed([2.0, 1.0, 0.5], 4)], ids=["langevin", "annealed"])
def test_ctrl_c_leaves_a_state_that_resumes(sampler):
    f = ef.Family(NoisedGaussian(), "g")
    e = f(0.5) if isinstance(sampler, ef.Annealed) else A
    steps = None if isinstance(sampler, ef.Annealed) else 13
    options = dict(sampler=sampler, steps=steps, n=10, batch_size=4)
    whole = draw(e, **options)
    seen = []

    def interrupt(info):
        seen.append(info)
        if len(seen) == 18:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(ef.Interrupted, match="4 of 10 chains finished") as caught:
        draw(e, callback=interrupt, **options)
    assert len(seen) == 18 and not caught.value.state.finished
    rest = ef.sample(e, sampler=sampler, steps=steps, resume=caught.value.state, batch_size=3)
    assert equal(rest.x, whole.x)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_finished_schedule_does_not_resume():
    f = ef.Family(NoisedGaussian(), "g")
    done = draw(f(0.5), sampler=ef.Annealed([1.0], 2), steps=None)
    with pytest.raises(ValueError, match="finished, and Annealed takes its 3 steps from the start"):
        ef.sample(f(0.5), sampler=ef.Annealed([1.0], 2), resume=done.state)


def test_sampling_works_outside_the_main_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(draw().x))
    thread.start()
    thread.join()
    assert equal(results[0], draw().x)


# options


def test_energies_belong_to_the_returned_states():
    r = draw((A & B) | A)
    torch.testing.assert_close(r.energy, ((A & B) | A).energy(r.x).detach())
    torch.testing.assert_close(r.leaf_energies, torch.stack([A.energy(r.x), B.energy(r.x)], 1).detach())
    assert not r.energy.requires_grad and draw(energies=False).energy is None


def test_traces():
    r = draw(A & B, n=7, steps=9, batch_size=3, trace=ef.Trace(every=4, states=True))
    assert r.trace.steps.tolist() == [4, 8] and r.trace.energy.shape == (2, 7) and r.trace.x.shape == (2, 7, 3)
    assert equal(r.trace.x[1], draw(A & B, n=7, steps=8).x)
    torch.testing.assert_close(r.trace.energy, (A & B).energy(r.trace.x.reshape(14, 3)).reshape(2, 7).detach())
    assert draw(trace=3).trace.x is None and draw().trace is None
    assert draw(trace=100).trace.energy is None
    later = draw(A & B, resume=draw(A & B, n=7, steps=3).state, steps=6, trace=4)
    assert later.trace.steps.tolist() == [4, 8] and equal(later.trace.energy, r.trace.energy)


def test_callback_sees_every_step():
    seen = []
    r = draw(n=5, steps=3, batch_size=2, callback=lambda info: seen.append((info.step, info.first_chain, len(info.x))),
             first_chain=10)
    assert seen == [(s, f, n) for f, n in ((10, 2), (12, 2), (14, 1)) for s in (1, 2, 3)] and len(r.x) == 5


def test_progress_bar(capsys):
    draw(progress=True)
    assert "6/6" in capsys.readouterr().err


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("shape", [(3,), (5, 3)])
def test_frozen_elements_never_move(shape, backend):
    x = torch.randn(5, 3)
    mask = torch.rand(shape) < 0.5
    for sampler in (LANGEVIN, ef.Langevin(drift=0.1, noise=0.1, noise_first=True, clamp=(-0.1, 0.1))):
        r = draw(A & B, x=x, frozen_mask=mask, sampler=sampler, batch_size=2, backend=backend).x
        still = mask.expand(5, 3)
        assert equal(r[still], x[still]) and (r[~still] != x[~still]).all()


def test_clamp_and_clips():
    assert draw(sampler=ef.Langevin(step_size=1.0, clamp=(-0.5, 0.25))).x.abs().max() <= 0.5
    far = torch.full((4, 3), 100.0)
    moved = far - draw(x=far, sampler=ef.Langevin(drift=1.0, noise=0.0, grad_clip_value=0.5), steps=1).x
    torch.testing.assert_close(moved, torch.full((4, 3), 0.5))
    moved = far - draw(x=far, sampler=ef.Langevin(drift=1.0, noise=0.0, grad_clip_norm=0.5), steps=1).x
    torch.testing.assert_close(moved.norm(dim=1), torch.full((4,), 0.5), rtol=1e-4, atol=1e-4)


def test_initial_states():
    ranged = ef.Concept(Quadratic(0.0), name="r", data_range=(-1, 3))
    still = dict(steps=0, n=4000)
    x = draw(ranged, **still).x
    assert x.min() >= -1 and x.max() <= 3 and x.min() < -0.99 and x.max() > 2.99
    assert 0 <= draw(**still).x.min() < 0.01 < 0.99 < draw(**still).x.max() <= 1
    assert draw(sampler=ef.Langevin(step_size=1, clamp=(5, 6)), **still).x.mean() == pytest.approx(5.5, abs=0.02)
    assert draw(init="normal", **still).x.var() == pytest.approx(1, abs=0.05)
    made = draw(init=lambda ids, shape: ids[:, None].float().expand(-1, *shape), first_chain=3, steps=0).x
    assert made[:, 0].tolist() == [3, 4, 5, 6, 7]
    given = torch.randn(5, 3)
    kept = given.clone()
    draw(x=given)
    assert equal(given, kept), "the caller's x is not modified"
    with pytest.raises(ValueError, match="init"):
        draw(init="zeros")


def test_slots_are_filled_per_chain():
    f = ef.Family(ConditionalQuadratic(), "f", condition_dim=3)
    rows = torch.randn(7, 3)
    r = draw(f[ef.Slot("c")] & A, conditions={"c": rows}, n=None, batch_size=2)
    one = draw(f(rows[4].tolist()) & A, n=1, first_chain=4)
    assert equal(r.x[4:5], one.x)
    torch.testing.assert_close((f[ef.Slot("c")]).energy(r.x, conditions={"c": rows}), 0.5 * (r.x - rows).square().sum(1))


def test_a_shape_of_no_dimensions_and_of_many():
    scalar = ef.Concept(lambda x: 0.5 * x**2, name="scalar")
    assert draw(scalar, shape=()).x.shape == (5,)
    assert draw(shape=(2, 3, 1, 2)).x.shape == (5, 2, 3, 1, 2)


def test_nothing_to_do():
    assert draw(n=0).x.shape == (0, 3) and draw(n=0).energy.shape == (0,)
    x = torch.randn(5, 3)
    assert equal(draw(x=x, steps=0).x, x)


def test_float64_runs_on_the_reference():
    r = draw(x=torch.zeros(2, 3, dtype=torch.float64))
    assert r.x.dtype == torch.float64 and r.report.backend == "reference"
    with pytest.raises(ValueError, match="float32"):
        draw(x=torch.zeros(2, 3, dtype=torch.float64), backend="cpu")


def test_compute_dtype():
    net = ef.Family(Net(dim=3), "n")
    full, half = (draw(net(1, 0, 0), compute_dtype=d) for d in (None, torch.bfloat16))
    assert half.x.dtype == torch.float32 and half.report.compute_dtype == "bfloat16"
    assert 0 < (full.x - half.x).abs().max() < 0.05
    with pytest.raises(ValueError, match="compute_dtype"):
        draw(compute_dtype=torch.int8)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_sampling_inside_no_grad(context):
    with context():
        inside = draw(A | B)
    assert equal(inside.x, draw(A | B).x)


# models are never changed, and nothing goes stale


def test_models_are_left_alone_and_read_anew():
    net = Net(dim=3)
    f = ef.Family(net, "net")
    before = {k: (v.clone(), v.requires_grad, v._version) for k, v in net.named_parameters()}
    run = ef.prepare(f(1, 0, 0) & A, LANGEVIN, shape=(3,), steps=6)
    first = run(n=5, seed=0).x
    for k, v in net.named_parameters():
        assert equal(v, before[k][0]) and (v.requires_grad, v._version, v.grad) == (*before[k][1:], None)
    assert net.training
    with torch.no_grad():
        net.weights[0].mul_(3.0)
    changed = run(n=5, seed=0).x
    fresh = Net(dim=3)
    with torch.no_grad():
        fresh.weights[0].mul_(3.0)
    assert not equal(changed, first)
    assert equal(changed, draw(ef.Family(fresh, "net")(1, 0, 0) & A).x)


def test_prepared_runs_are_reusable():
    run = ef.prepare(A & B, LANGEVIN, shape=(3,), steps=6)
    assert equal(run(n=5, seed=0).x, run(n=5, seed=0).x) and equal(run(n=5, seed=0).x, draw(A & B).x)
    assert equal(run(n=5, seed=0, steps=2).x, draw(A & B, steps=2).x)
    assert "backend" in run.explain() and "weights      constant" in run.explain()


def test_report_says_what_ran():
    report = draw(A & B, batch_size=2).report
    assert (report.chains, report.steps, report.micro_batch, report.seed, report.backend) == (5, 6, 2, 0, "cpu")
    assert report.effective_temperature == pytest.approx((1.0, 1.0)) and report.steps_per_second > 0
    assert "5 chains x 6 steps on cpu" in str(report)
    cold = draw(sampler=ef.Langevin.reference_code()).report
    assert cold.effective_temperature == pytest.approx((5e-9, 5e-9))


# what is not finite


class Bomb(nn.Module):
    """Quadratic, but NaN where the first element exceeds a limit."""

    def __init__(self, limit):
        super().__init__()
        self.limit = limit

    def forward(self, x):
        return 0.5 * x.square().sum(1) * torch.where(x[:, 0] > self.limit, torch.nan, 1.0)


def walk(policy, **options):
    start = torch.zeros(6, 2)
    start[4, 0] = 0.9
    rise = ef.Concept(lambda x: -1.5 * x[:, 0], name="rise")
    e = rise & ef.Concept(Bomb(1.0), name="bomb")
    return ef.sample(e, x=start, sampler=ef.Langevin(drift=0.1, noise=0.0), steps=5, seed=0, on_nonfinite=policy,
                     energies=False, allow_improper=True, **options)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_nonfinite_raises_with_chain_step_and_leaf(backend):
    with pytest.raises(ef.NonFiniteError, match=r"1 chain\(s\) \[14\].*the concept bomb") as caught:
        walk("raise", backend=backend, first_chain=10)
    assert (caught.value.leaf, caught.value.step, caught.value.chains) == ("bomb", 2, [14])


class Late(nn.Module):
    """Gradient NaN for chains whose first element is above 0.5."""

    def forward(self, x):
        return (x * torch.where(x > 0.5, torch.nan, 1.0)).sum(1)


def test_nonfinite_freezes_and_reports():
    start = torch.tensor([[0.0, 0.0], [0.45, 0.2], [0.7, 0.1]])
    e = ef.Concept(lambda x: -2 * x.sum(1), name="up") & ef.Concept(Late(), name="late")
    r = ef.sample(e, x=start, sampler=ef.Langevin(drift=0.1, noise=0.0), steps=3, seed=0, on_nonfinite="freeze",
                  energies=False, allow_improper=True)
    assert torch.isfinite(r.x).all()
    assert r.report.faults == [ef.Fault(2, 0, "late"), ef.Fault(1, 1, "late")]
    torch.testing.assert_close(r.x[0], torch.tensor([0.3, 0.3]))
    torch.testing.assert_close(r.x[2, 0], torch.tensor(0.7))
    assert (r.state.faults != 0).tolist() == [False, True, True]


def test_nonfinite_restarts_from_the_chain_s_own_stream():
    e = ef.Concept(Late(), name="late", data_range=(0.0, 1.0)) & A
    run = dict(n=40, shape=(1,), sampler=ef.Langevin(step_size=1e-4), steps=12, seed=0, on_nonfinite="restart")
    r = ef.sample(e, **run)
    assert torch.isfinite(r.x).all() and len(r.report.faults) > 10
    assert equal(ef.sample(e, **run | {"batch_size": 7}).x, r.x)
    with pytest.raises(ValueError, match="restart"):
        ef.sample(e, x=torch.zeros(2, 1), init=lambda i, s: torch.zeros(len(i), *s), sampler=LANGEVIN, steps=1,
                  on_nonfinite="restart")


def test_nonfinite_energy_without_gradient():
    bad = ef.Concept(lambda x: torch.where(x[:, 0] < 9, torch.inf, 0.0) + 0 * x.sum(1), name="wall")
    with pytest.raises(ef.NonFiniteError, match="non-finite energy in .*the concept wall"):
        draw(bad)


# bad input: every message names the argument


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"n": -1}, ValueError, "`n` must be at least 0"), ({"n": 2.5}, TypeError, "`n` must be an integer"),
    ({"n": None}, ValueError, "`n`, the number of chains"), ({"shape": None}, ValueError, "`shape` of one chain"),
    ({"shape": (0,)}, ValueError, "`shape` must be at least 1"), ({"steps": -1}, ValueError, "`steps`"),
    ({"steps": None}, ValueError, "`steps`, the number"), ({"steps": True}, TypeError, "`steps`"),
    ({"batch_size": 0}, ValueError, "`batch_size`"), ({"backend": "gpu"}, ValueError, "backend"),
    ({"sampler": None}, TypeError, "`sampler`"), ({"sampler": ef.Langevin()}, ValueError, "step_size"),
    ({"sampler": ef.Langevin(step_size=[0.1] * 5)}, ValueError, "one value per step, got 5 for 6"),
    ({"sampler": ef.Langevin(step_size=-0.1)}, ValueError, "not negative"),
    ({"sampler": ef.Annealed([1.0])}, ValueError, "`steps` belongs to the sampler"),
    ({"on_nonfinite": "ignore"}, ValueError, "`on_nonfinite`"), ({"first_chain": -1}, ValueError, "`first_chain`"),
    ({"trace": 0}, ValueError, "`every`"), ({"device": "cuda"}, ValueError, "cuda"),
    ({"conditions": {"c": torch.zeros(5, 1)}}, ValueError, "names 'c'"),
    ({"frozen_mask": torch.zeros(4, dtype=torch.bool)}, ValueError, r"`frozen_mask` must be \[3\] or \[5, 3\]"),
    ({"frozen_mask": torch.zeros(3)}, TypeError, "bool"),
    ({"x": torch.zeros(5, 3), "n": 4}, ValueError, "`n` is 4"),
    ({"x": torch.zeros(5, 3, dtype=torch.int64)}, ValueError, "float32"),
    ({"x": torch.tensor([[0.0], [torch.nan]])}, ValueError, r"`x` must be finite.*\[1\]"),
    ({"x": torch.zeros(5, 3), "shape": (4,)}, ValueError, r"\[n, 4\]"), ({"x": [0.0]}, TypeError, "`x` must be a tensor"),
])  # fmt: skip
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        draw(**options)


F = ef.Family(ConditionalQuadratic(), "f", condition_dim=3)


@pytest.mark.parametrize(("e", "options", "error", "message"), [
    (3, {}, TypeError, "`expr` must be a Concept"),
    (ef.Concept(lambda x: x, name="wide"), {}, ValueError, r"energy of wide must be \[B\] or \[B, 1\], got \[5, 3\]"),
    (ef.Concept(lambda x: x.sum(), name="total"), {}, ValueError, r"energy of total must be \[B\]"),
    (ef.Concept(lambda x: 3.0, name="const"), {}, TypeError, "energy of const must be a tensor"),
    (ef.Concept(lambda x: torch.zeros(5), name="flat"), {}, ValueError, "energy of flat does not depend on `x`"),
    (ef.Concept(lambda x: torch.zeros(5, requires_grad=True) * 1, name="other"), {}, ValueError, "other does not depend"),
    (F[ef.Slot("c")], {}, ValueError, "fill the slot 'c'"),
    (F[ef.Slot("c")], {"conditions": {"c": torch.zeros(5, 2)}}, ValueError, "must have 3 columns for 'f', got 2"),
    (F[ef.Slot("c")], {"conditions": {"c": torch.zeros(4, 3)}}, ValueError, r"\[n, C\] with n = 5"),
    (F[ef.Slot("c")], {"conditions": {"c": torch.full((5, 3), torch.nan)}}, ValueError, "finite"),
    (ef.Family(NoisedGaussian(), "g")(1.0), {}, ValueError, "takes a noise level"),
    (ef.Concept(nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1)), name="bn"), {}, ValueError, "BatchNorm in train mode"),
    (ef.Concept(Quadratic(0.0), name="r", data_range=(0, 1)) & ef.Concept(Quadratic(1.0), name="s", data_range=(-1, 1)), {},
     ValueError, "data ranges differ: r has"),
])  # fmt: skip
def test_bad_energies_and_conditions(e, options, error, message):
    with pytest.raises(error, match=message):
        draw(e, **options)


def test_reduce_sum_adds_up_an_energy_map():
    e = ef.Concept(lambda x: 0.5 * x**2, name="map", reduce="sum")
    assert equal(draw(e).x, draw(gaussian(0.0)).x)


def test_a_condition_of_the_wrong_width_names_the_leaf():
    f = ef.Family(Net(dim=3), "net")
    with pytest.raises(RuntimeError) as caught:
        draw(f(1, 0))
    assert any("net(1, 0)" in note and "condition [5, 2]" in note for note in caught.value.__notes__)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: ef.Langevin(step_size=1, drift=1), "not both"), (lambda: ef.Langevin(drift=1), "together"),
    (lambda: ef.Langevin(drift=1, noise=1, temperature=2), "temperature"), (lambda: ef.Langevin(clamp=(1, 0)), "clamp"),
    (lambda: ef.Langevin(grad_clip_norm=0), "grad_clip_norm"), (lambda: ef.Annealed([]), "sigmas"),
    (lambda: ef.Annealed([1, -1]), "sigmas"), (lambda: ef.Annealed([1], 0), "steps_per_level"),
    (lambda: ef.Annealed([1], drift=0), "drift"), (lambda: ef.Annealed([1], inner=LANGEVIN), "inner"),
    (lambda: ef.Annealed.geometric(4, 1, 1), "levels")])
def test_bad_samplers(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_levels_that_a_model_does_not_know():
    f = ef.Family(NoisedGaussian(), "g", sigma=(0.1, 2.0))
    with pytest.raises(ValueError, match=r"`sigmas` must lie within 0.1 to 2.*got 4"):
        draw(f(0.0), sampler=ef.Annealed([4.0, 1.0]), steps=None)
    assert "sigma 0.1 to 2" in f(0.0).explain()


def test_annealed_levels_and_steps():
    sampler = ef.Annealed.geometric(4.0, 0.5, 4, steps_per_level=3, drift=0.2)
    assert sampler.sigmas == pytest.approx((4, 2, 1, 0.5)) and sampler.steps == 13
    f = ef.Family(NoisedGaussian(), "g")
    c = sampler.coefficients(f(0.0) & f(1.0), 13)
    assert c.drift[0] == pytest.approx(0.2 * 16 / 2) and c.noise[0] == pytest.approx((2 * 0.2 * 16 / 2) ** 0.5)
    assert c.noise[-1] == 0 and c.drift[-1] == pytest.approx(0.25 / 2) and c.sigma[-1] == pytest.approx(0.5)
    seen = []
    draw(f(0.0), sampler=sampler, steps=None, callback=lambda info: seen.append(info.sigma), n=1)
    assert seen == pytest.approx([s for s in (4, 2, 1, 0.5) for _ in range(3)] + [0.5])
