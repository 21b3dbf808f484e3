"""Captured steps, recorded by a tape in the place of CUDA graphs: equal, bit for bit, to steps that are not captured.

A tape replays operations over the memory in which they were recorded and runs no Python again, so whatever is not read
from device memory (seed, step, schedules, noise levels, conditions, masks) comes out stale, and differs."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from conftest import REQUIRED, same_bits
from models import ConditionalQuadratic, Net, NoisedGaussian, gaussian
from torch import nn

import ebmfast as ef
from ebmfast import backends, capture
from ebmfast.samplers import captured

if importlib.util.find_spec("triton") is None and "triton" not in REQUIRED:
    pytest.skip("triton is not installed", allow_module_level=True)
if backends.home("triton") != "cpu":
    pytest.skip("tapes stand in for CUDA graphs where TRITON_INTERPRET=1", allow_module_level=True)

from tape import tapes  # noqa: E402

A, B = gaussian(0.0, 1.0, "a"), gaussian(2.0, 3.0, "b")
LANGEVIN = ef.Langevin(step_size=0.1)
NOISED = ef.Family(NoisedGaussian(), "g")
LEVELS = ef.Annealed.geometric(2.0, 0.1, 3, steps_per_level=3)


@pytest.fixture
def graphs(monkeypatch):
    monkeypatch.setattr(captured, "UNROLLED", 4)
    monkeypatch.setattr(captured, "STRIDE", 8)
    with tapes() as made:
        yield made


def prepare(e, sampler=LANGEVIN, shape=(3,), steps=6, **options):
    steps = None if isinstance(sampler, ef.Annealed) else steps
    options = {"backend": "triton", "check": False} | options
    return ef.prepare(e, sampler, shape=shape, steps=steps, **options)


def both(e, sampler=LANGEVIN, calls=({"n": 5, "seed": 1},), expected=True, **options):
    """Results of the calls, captured, after they were seen to equal those that are not."""
    run, plain = prepare(e, sampler, **options), prepare(e, sampler, capture=False, **options)
    found = []
    for call in calls:
        got, want = run(**call), plain(**call)
        assert got.report.captured == expected and not want.report.captured, got.report.uncaptured
        assert same_bits(got.x, want.x) and torch.equal(got.state.step, want.state.step)
        assert torch.equal(got.state.faults, want.state.faults)
        found.append(got)
    return found, run


@pytest.mark.parametrize("sampler", [
    LANGEVIN, ef.Langevin(drift=0.1, noise=0.2, noise_first=True, clamp=(-1, 1)),
    ef.Langevin(step_size=0.1, grad_clip_value=0.5), ef.Langevin(step_size=0.1, grad_clip_norm=0.5),
    ef.Langevin(step_size=lambda t: 0.1 / (1 + t), temperature=0.5),
    ef.Langevin(drift=0.1, noise=[0.1 * (i % 3) for i in range(6)]),
], ids=repr)  # fmt: skip
def test_samplers(graphs, sampler):
    both(A & B, sampler)


@pytest.mark.parametrize("e", [
    A, A & ~B, A | B, (A & B) | A, ef.any_of([A, B], log_weights=[0.3, -1.0], sharpness=2.0), 0.5 * A & 2.0 * B], ids=repr)
def test_compositions(graphs, e):
    """A program with an OR has weights that depend on energies: they are recomputed in the graph."""
    (r,), run = both(e)
    assert len(graphs) == 1 and graphs[0].replays == 3, "4 steps and twice one"
    assert "captured     yes" in run.explain() and r.report.uncaptured is None
    assert (graphs[0].forks > 0) == (len(e.leaves) > 1), "different models run side by side"


MOMENTS = [ef.MALA(0.3), ef.MALA(0.2, bounds=(-1.0, 1.0), grad_clip_norm=1.0, warmup=ef.DualAveraging(4)),
           ef.HMC(0.3, n_leapfrog_steps=3), ef.BAOAB(0.3)]  # fmt: skip


@pytest.mark.parametrize("sampler", MOMENTS, ids=["mala", "mala, adapting", "hmc", "baoab"])
def test_gradients_of_other_samplers_are_replayed(graphs, sampler):
    """Models and composition, once for each gradient; 4 chains, and then 2."""
    calls = [{"n": 4, "seed": 1}, {"n": 6, "seed": 2}]
    (one, two), run = both(A | B, sampler, batch_size=4, steps=3, calls=calls)
    each = 1 + 3 * (sampler.n_leapfrog_steps if isinstance(sampler, ef.HMC) else 1)
    assert run.captures.recorded == 2 and graphs[0].replays == 3 * each and not torch.equal(one.x, two.x[:4])
    assert "captured     yes, models and composition as a CUDA graph" in run.explain()
    assert one.acceptance is None or 0 < one.acceptance.mean() <= 1


@pytest.mark.parametrize(("inner", "denoise"), [(ef.MALA, True), (ef.BAOAB, False)], ids=["mala", "baoab"])
def test_gradients_of_other_samplers_at_noise_levels(graphs, inner, denoise):
    e = ef.all_of([NOISED(0.5) | NOISED(-0.5), NOISED(0.1), A], weights=[1.0, ef.AboveSigma(0.5), 1.0])
    sampler = ef.Annealed([2.0, 1.0, 0.1], 2, inner=inner, denoise=denoise)
    _, run = both(e, sampler, shape=(1,))
    (recording,) = run.captures._kept.values()
    assert len(recording._replays) == 2 and run.captures.recorded == 2, "one of each set of weights, whatever the level"


def test_gradients_of_other_samplers_with_conditions_masks_and_traces(graphs):
    f, mask, x = ef.Family(Net(3), "f", condition_dim=3), torch.tensor([True, False, False]), torch.randn(3, 3)
    same = {"seed": 1, "x": x, "frozen_mask": mask, "trace": ef.Trace(2)}
    calls = [same | {"conditions": {"c": torch.randn(3, 3)}} for _ in range(2)]
    (one, two), run = both(f[ef.Slot("c")] & A, ef.BAOAB(0.3), calls=calls, steps=2)
    assert not torch.equal(one.x, two.x) and torch.equal(one.x[:, mask], x[:, mask]) and one.trace.energy.shape == (1, 3)
    assert run.captures.recorded == 1


def test_gradients_of_other_samplers_with_faults_and_weights_that_change(graphs):
    net = nn.Linear(3, 1)
    e, x = ef.Concept(Cliff(), name="cliff") & ef.Concept(net, reduce="sum"), torch.tensor([[0.1, 0.2, 0.3], [3.0, 0.0, 0.0]])
    runs, seen = [prepare(e, ef.MALA(0.1), steps=2, capture=c, on_nonfinite="freeze", energies=False) for c in (True, False)], []
    for _ in range(2):
        r, plain = (run(x=x, seed=1) for run in runs)
        assert r.report.captured and same_bits(r.x, plain.x) and r.report.faults == plain.report.faults
        assert [(f.chain, f.leaf) for f in r.report.faults] == [(1, "cliff")]
        seen.append(r.x)
        with torch.no_grad():
            net.weight.add_(3.0)
    assert not torch.equal(*seen) and runs[0].captures.recorded == 1


def test_gradients_that_cannot_be_captured_are_computed_as_they_are(graphs):
    for sampler in MOMENTS[::3]:
        (r,), run = both(ef.Concept(Waits(), name="m") & A, sampler, expected=False, steps=2)
        assert "waits for a result on the host" in r.report.uncaptured and "captured     no: a model waits" in run.explain()


def test_seeds_and_first_chains_are_read_from_device_memory(graphs):
    names = ({"seed": 1}, {"seed": 2**64 - 1}, {"seed": 1, "first_chain": 2**59}, {"seed": 1})
    (one, two, three, again), run = both(A | B, calls=[{"n": 5} | name for name in names])
    assert run.captures.recorded == 1, "one recording serves every seed"
    assert same_bits(again.x, one.x) and not torch.equal(one.x, two.x) and not torch.equal(one.x, three.x)


def test_batches_and_tails(graphs):
    """Micro-batches of 4, 4 and 3; then another call with another tail; a recording for every size."""
    (first, second, _), run = both(A & B, batch_size=4, calls=[{"n": 11, "seed": 1}, {"n": 6, "seed": 1}, {"n": 3, "seed": 1}])
    assert same_bits(second.x, first.x[:6]) and run.captures.recorded == 3  # 4, 3 and 2 rows


def test_any_number_of_steps(graphs):
    whole = prepare(A, steps=10)(5, seed=1)
    for steps in (0, 1, 5, 9):
        ((got,), _) = both(A, steps=steps, expected=steps > 0)
        if steps:
            rest = prepare(A, steps=10 - steps)(resume=got.state)
            assert rest.report.captured and same_bits(rest.x, whole.x)


@pytest.mark.parametrize("e", [
    NOISED(0.5), NOISED(0.5) & NOISED(-0.5), NOISED(0.5) | NOISED(-0.5), NOISED(0.5) & A,
    ef.all_of([NOISED(0.5), NOISED(-0.5), A], weights=[1.0, ef.AboveSigma(0.5), 1.0])], ids=repr)
@pytest.mark.parametrize("inner", [ef.Langevin, ef.Langevin(noise_first=True, temperature=0.5)], ids=["plain", "noise first"])
def test_noise_levels_are_read_from_device_memory(graphs, e, inner):
    sampler = ef.Annealed(LEVELS.sigmas, 3, inner=inner)
    _, run = both(e, sampler, calls=[{"n": 4, "seed": 1}, {"n": 4, "seed": 2}], shape=(1,))
    kinds = {(signature, count) for r in run.captures._kept.values() for signature, count in r._replays}
    assert len({signature for signature, _ in kinds}) == 1 + e.program.live(0.1).count(False), "weights that change are apart"
    assert len(run.captures._kept) == 1


def test_a_weight_that_changes_with_the_level_with_conditions(graphs):
    f = ef.Family(NoisedGaussian(), "f", condition_dim=3)
    e = ef.all_of([f[ef.Slot("a")], f[ef.Slot("b")]], weights=[1.0, ef.AboveSigma(0.5)])
    rows = [{"a": torch.randn(4, 3), "b": torch.randn(4, 3)} for _ in range(3)]
    (one, two, _), _ = both(e, LEVELS, calls=[{"conditions": c, "seed": 1} for c in rows])
    assert not torch.equal(one.x, two.x)


@pytest.mark.parametrize("model", [Net(3), ConditionalQuadratic], ids=["net", "counts its calls"])
def test_conditions(graphs, model):
    """New rows in every call and micro-batch; leaves whose rows are equal are one leaf then, and apart in the next call."""
    counting = isinstance(model, type)
    f = ef.Family(model() if counting else model, "f", condition_dim=3)
    e = f[ef.Slot("a")] & 0.5 * f[ef.Slot("b")] & f([1.0, 0.0, 2.0])
    same = torch.randn(5, 3)
    rows = [{"a": torch.randn(5, 3), "b": torch.randn(5, 3)} for _ in range(2)] + [{"a": same, "b": same.clone()}]
    calls = [{"conditions": c, "seed": 1} for c in (*rows, rows[0])]
    (one, two, *_), run = both(e, calls=calls, batch_size=2, expected=not counting)
    assert not torch.equal(one.x, two.x)
    if counting:
        assert "a model changes itself while it runs" in run.explain()
    else:
        assert run.captures.recorded == 4  # 2 rows and 1 row, conditions apart and equal


@pytest.mark.parametrize("shape", [(3,), (5, 3)])
def test_frozen_elements(graphs, shape):
    masks = [torch.rand(shape) < 0.5 for _ in range(2)]
    x = torch.randn(5, 3)
    found, run = both(A & B, calls=[{"x": x, "frozen_mask": m, "seed": 1} for m in masks], batch_size=2)
    for r, mask in zip(found, masks):
        assert torch.equal(r.x[mask.expand(5, 3)], x[mask.expand(5, 3)])
    assert run.captures.recorded == 2


def test_parameters_are_read_live(graphs):
    """Changed in place: the recording stays. Replaced, or a flag or a number changed: steps are recorded anew."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 1))
    e = ef.Concept(net) & A
    run, seen = prepare(e, stack_models=False), []

    def check(recorded):
        got, expected = run(5, seed=1), prepare(e, capture=False)(5, seed=1)
        assert got.report.captured and same_bits(got.x, expected.x) and run.captures.recorded == recorded
        assert not any(torch.equal(got.x, x) for x in seen)
        seen.append(got.x)

    check(1)
    with torch.no_grad():
        net[0].weight.mul_(1.5)
    check(1)
    net[2].weight.data = net[2].weight.data * 2
    check(2)
    net[0].bias = nn.Parameter(net[0].bias.detach() + 1)
    check(3)
    net[1] = nn.ReLU()
    check(4)
    net.append(nn.Softplus())
    check(5)


class Scaled(nn.Module):
    """A number that a recording would keep."""

    def __init__(self):
        super().__init__()
        self.scale, self.dropout = 1.0, nn.Dropout(0.5).eval()

    def forward(self, x):
        return self.scale * self.dropout(x).square().sum(1)


def test_numbers_and_closures_that_change_are_seen(graphs):
    model, facts = Scaled(), {"scale": 1.0}
    for e, change in ((ef.Concept(model), lambda: setattr(model, "scale", 3.0)),
                      (ef.Concept(lambda x: facts["scale"] * x.square().sum(1), name="f"), lambda: facts.update(scale=3.0))):
        run = prepare(e)
        before = run(5, seed=1)
        change()
        after = run(5, seed=1)
        assert before.report.captured and after.report.captured and not torch.equal(before.x, after.x)
        assert same_bits(after.x, prepare(e, capture=False)(5, seed=1).x)


def test_stacks_are_loaded_anew(graphs):
    nets = [nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 1)) for _ in range(2)]
    e = ef.all_of([*(ef.Concept(n, name=f"n{i}") for i, n in enumerate(nets)), A])
    run = prepare(e, stack_models=True)
    for _ in range(2):
        got = run(5, seed=1)
        assert got.report.captured and same_bits(got.x, prepare(e, stack_models=True, capture=False)(5, seed=1).x)
        with torch.no_grad():
            nets[1][0].weight.mul_(1.5)
    assert run.captures.recorded == 1


def test_the_oldest_recording_goes(graphs, monkeypatch):
    run, plain = prepare(A, steps=1), prepare(A, steps=1, capture=False)
    monkeypatch.setattr(capture, "KEPT", 3)
    for n in (1, 2, 3, 4, 2, 1):
        assert same_bits(run(n, seed=1).x, plain(n, seed=1).x)
    assert run.captures.recorded == 5, "4 sizes, and 1 again; 2 was kept"
    assert len(run.captures._kept) == capture.KEPT


def test_settings_of_torch_are_part_of_a_recording(graphs):
    run, before = prepare(A), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(before)
    run(5, seed=1)
    try:
        torch.set_float32_matmul_precision("medium")
        run(5, seed=1)
    finally:
        torch.set_float32_matmul_precision(before)
    run(5, seed=1)
    assert run.captures.recorded == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_compute_dtype(graphs, dtype):
    """Copies of parameters that autocast makes are made anew: a change in place is seen, also under the caller's autocast."""
    net = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 1))
    e = ef.Concept(net) & A
    run, plain = (prepare(e, compute_dtype=dtype, capture=c, stack_models=False) for c in (True, False))
    default, bare = (prepare(e, capture=c, stack_models=False) for c in (True, False))
    for _ in range(2):
        got = run(5, seed=1)
        assert got.report.captured and same_bits(got.x, plain(5, seed=1).x)
        with torch.autocast("cpu", dtype=dtype):
            got = default(5, seed=1)
            assert got.report.captured and same_bits(got.x, bare(5, seed=1).x)
        with torch.no_grad():
            net[0].weight.mul_(3.0)
    assert run.captures.recorded == 1


# what is looked at on the way


def test_traces_and_callbacks(graphs):
    (r,), _ = both(A & B, calls=[{"n": 5, "seed": 1, "trace": ef.Trace(2, states=True)}])
    expected = prepare(A & B, capture=False)(5, seed=1, trace=ef.Trace(2, states=True))
    assert torch.equal(r.trace.steps, expected.trace.steps) and same_bits(r.trace.x, expected.trace.x)
    assert same_bits(r.trace.energy, expected.trace.energy)
    seen = {}
    for name, on in (("captured", True), ("plain", False)):
        states = seen[name] = []
        prepare(A & B, capture=on, batch_size=2)(5, seed=1, callback=lambda i, s=states: s.append((i.step, i.x.clone())))
    assert all(a[0] == b[0] and same_bits(a[1], b[1]) for a, b in zip(seen["captured"], seen["plain"], strict=True))


def test_a_callback_may_change_states_and_models(graphs):
    found = []
    for on in (True, False):
        net = nn.Linear(3, 1)
        nn.init.constant_(net.weight, 0.5)

        def change(info, net=net):
            if info.step == 2:
                info.x.mul_(2.0)
            if info.step == 5:
                net.weight.data = net.weight.data * 3
            if info.step == 6:
                net.weight.data.mul_(3)

        r = prepare(ef.Concept(net, reduce="sum") & A, steps=7, capture=on)(5, seed=1, callback=change)
        assert r.report.captured == on
        found.append(r.x)
    assert same_bits(*found)


class Cliff(nn.Module):
    """Not finite beyond an edge."""

    def forward(self, x):
        return 0.5 * x.square().sum(1) / (x.abs() <= 1.5).all(1).to(x.dtype)


def test_faults(graphs):
    e, sampler = ef.Concept(Cliff(), name="cliff") & A, ef.Langevin(step_size=0.2)
    for policy in ("freeze", "restart"):
        options = {"on_nonfinite": policy, "steps": 40, "energies": False}
        r, expected = (prepare(e, sampler, capture=c, **options)(9, seed=1) for c in (True, False))
        assert r.report.captured and same_bits(r.x, expected.x) and torch.equal(r.state.faults, expected.state.faults)
        assert r.report.faults == expected.report.faults and 1 < len(r.report.faults)
        assert len({f.step for f in r.report.faults}) > 1
    with pytest.raises(ef.NonFiniteError, match="from the concept cliff") as caught:
        prepare(e, sampler, steps=40)(9, seed=1)
    with pytest.raises(ef.NonFiniteError) as plain:
        prepare(e, sampler, steps=40, capture=False)(9, seed=1)
    assert {f.chain: f for f in plain.value.faults}.items() <= {f.chain: f for f in caught.value.faults}.items()


def test_faults_are_looked_at_one_period_late(graphs):
    prepare(A, steps=48)(5, seed=1)
    assert graphs[0].looks == 3, "not one look at the states themselves"


# what is not captured


class Waits(nn.Module):
    """Asks the host."""

    def forward(self, x):
        return x.square().sum(1) * (1.0 if x.sum().item() > 1e9 else 2.0)


@pytest.mark.parametrize(("model", "reason"), [
    (Waits(), "waits for a result on the host (aten._local_scalar_dense"),
    (lambda x: x[x.new_ones(len(x), dtype=torch.bool)].square().sum(1), "selects by a mask"),
    (lambda x: x.square().sum(1) * (1 + 0 * torch.rand(1, generator=torch.Generator())), "a generator of its own"),
])  # fmt: skip
def test_what_cannot_be_captured_runs_as_it_is(graphs, model, reason):
    (r, _), run = both(ef.Concept(model, name="m") & A, expected=False, calls=[{"n": 5, "seed": 1}] * 2)
    assert reason in r.report.uncaptured and reason in run.explain() and run.captures.recorded == 0


def test_numbers_that_are_made_once_and_kept_are_made_before_steps_are_watched(graphs, monkeypatch):
    """On a GPU a program's constants are copied from the host at its first evaluation: no reason against later ones."""
    plain = capture._against

    def on_a_gpu(function, args, kwargs, out):
        return "copied from the host" if str(function).startswith("aten.lift_fresh") else plain(function, args, kwargs, out)

    monkeypatch.setattr(capture, "_against", on_a_gpu)
    both(ef.any_of([A, B], log_weights=[0.25, -1.25], sharpness=3.0))
    (r, _), _ = both(ef.Concept(lambda x: (x * x.new_tensor([1.0, 2.0, 3.0])).square().sum(1), name="anew"), expected=False,
                     calls=[{"n": 5, "seed": 1}] * 2)
    assert r.report.uncaptured == "copied from the host"


def test_a_capture_that_fails_is_not_tried_again(graphs, monkeypatch):
    run, tried = prepare(A), []
    run.captures._graphs[torch.device("cpu")] = tape = capture.GRAPHS["cpu"](torch.device("cpu"))

    def fail(*_):
        tried.append(1)
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nCompile with ...")
        except RuntimeError:
            raise RuntimeError("operation failed due to a previous error during capture") from None

    monkeypatch.setattr(tape, "record", fail)
    for seed in (1, 2):
        got = run(5, seed=seed)
        assert same_bits(got.x, prepare(A, capture=False)(5, seed=seed).x) and not got.report.captured
        assert got.report.uncaptured == "CUDA would not capture it: RuntimeError: operation not permitted when stream is capturing"
    assert tried == [1]
    monkeypatch.undo()
    assert run(4, seed=1).report.captured, "another size is"


def test_errors_of_a_model_are_its_own(graphs):
    with pytest.raises(ValueError, match=r"the energy of m must be \[B\] or \[B, 1\]"):
        prepare(ef.Concept(lambda x: x.square(), name="m"))(5, seed=1)


def test_reasons(graphs):
    f = NOISED(0.5) | NOISED(-0.5)
    for run, reason in (
        (prepare(A, capture=False), "capture=False"),
        (prepare(A, backend="reference"), "backend 'reference' takes step and schedules from the host"),
        (prepare(f, ef.Annealed([1.0, 0.5], 2, denoise=False), branches="draw"), "every chain runs a branch of its own"),
    ):  # fmt: skip
        r = run(5, seed=1)
        assert not r.report.captured and (reason in run.explain() or "draw" in run.explain()), run.explain()
        assert r.report.uncaptured is not None
    cpu = backends.resolve("cpu", "cpu")
    assert "there are CUDA graphs on CUDA devices only" in capture.Captures().against(cpu, torch.device("xpu"))


def test_copies_record_anew(graphs):
    run = prepare(A)
    expected = run(5, seed=1)
    other = copy.deepcopy(run)
    assert other.captures is not run.captures and other.captures.recorded == 0
    assert same_bits(other(5, seed=1).x, expected.x) and other.captures.recorded == 1


def test_out_of_memory_lets_go_of_recordings(graphs, monkeypatch):
    run = prepare(A)
    run(5, seed=1)
    tape = graphs[0]

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tape, "record", full)
    with pytest.raises(torch.OutOfMemoryError):
        run(1, seed=1)
    assert not run.captures._kept


def test_the_tape_notices_what_is_stale(graphs):
    """A recording that has the seed of its first call would be caught: without the clock's seed chains differ."""
    from unittest import mock

    from ebmfast.kernels import step
    run = prepare(A)
    with mock.patch.object(step, "clock", lambda at, start, seed, first, **where: torch.tensor([at, start, 1, 0], **where)):
        assert not torch.equal(run(5, seed=2).x, prepare(A, capture=False)(5, seed=2).x)


def test_energies_of_the_last_step_and_runaway_chains(graphs):
    """The guard against compositions without a bottom reads the energies that a replay leaves, and waits for nothing on a GPU."""
    from ebmfast.plan import Plan

    e, x = A & B, torch.randn(5, 3)
    backend, coefficients = backends.resolve("triton", "cpu"), LANGEVIN.coefficients(e, 6)
    infos = []
    for captures in (capture.Captures(), capture.Captures(enabled=False)):
        kernel = LANGEVIN.bind(Plan(e).bind(x), backend, coefficients, 0, seed=1, first_chain=0, frozen_mask=None)
        kernel = captures.wrap(kernel, backend, x.device, watched=False, at_once=False)
        with torch.enable_grad():
            kernel.advance(kernel.init(x.clone()), 6)
        infos.append(torch.stack([energy.detach() for energy in kernel.info.leaf_energies]))
    assert same_bits(*infos)
    pit = ef.Concept(lambda x: -50.0 * x.square().sum(1), name="pit")
    for on in (True, False):
        with pytest.raises(ef.RunawayError):
            prepare(pit, ef.Langevin(step_size=0.01), steps=80, capture=on, allow_improper=True)(5, seed=1)


def test_conditions_of_a_later_call_reach_layouts_that_an_interrupted_one_did_not_build(graphs):
    f, g = ef.Family(NoisedGaussian(), "f", condition_dim=2), ef.Family(NoisedGaussian(0.3), "g", condition_dim=2)
    e = ef.all_of([f[ef.Slot("a")], g[ef.Slot("b")], f(0.1, 0.1)], weights=[ef.PiecewiseSigma((0.5,), (1.0, 0.0)), 1.0, 1.0])
    sampler = ef.Annealed([1.0, 0.2], steps_per_level=20, denoise=False)
    rows = [{k: torch.randn(4, 2) for k in "ab"} for _ in range(2)]

    def stop(info):
        if info.step == 5:
            raise KeyError

    runs = [prepare(e, sampler, shape=(2,), capture=capture) for capture in (True, False)]
    for run in runs:
        with pytest.raises(KeyError):
            run(4, seed=0, conditions=rows[0], callback=stop)
    got, want = (run(4, seed=0, conditions=rows[1]) for run in runs)
    assert got.report.captured and same_bits(got.x, want.x)
