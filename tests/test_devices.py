"""Several devices: the same chains as on one. Two times the CPU is two devices."""

import signal
import threading

import pytest
import torch
from conftest import same_bits
from models import ConditionalQuadratic, Net, NoisedGaussian, gaussian
from torch import nn

import ebmfast as ef
from ebmfast import devices

TWO = ["cpu", "cpu"]
LANGEVIN = ef.Langevin(step_size=0.1)
A, B = gaussian(0.0, 1.0, "a"), gaussian(2.0, 3.0, "b")


def both(e, sampler=LANGEVIN, steps=7, where=TWO, prepared=None, **call):
    prepared = {"shape": (3,), "check": False} | (prepared or {})
    steps = None if isinstance(sampler, ef.Annealed) else steps
    one, two = (ef.prepare(e, sampler, steps=steps, device=d, **prepared)(seed=1, **call) for d in ("cpu", where))
    assert same_bits(two.x, one.x)
    assert torch.equal(two.state.step, one.state.step) and torch.equal(two.state.faults, one.state.faults)
    assert two.report.chains == len(one.x) and two.report.device == ", ".join(where)
    return one, two


@pytest.mark.parametrize("n", [0, 1, 2, 11])
@pytest.mark.parametrize("where", [["cpu"], TWO, ("cpu",) * 3], ids=len)
def test_equal_to_one_device(n, where):
    one, two = both((A & ~B) | A, where=where, n=n)
    assert same_bits(two.energy, one.energy) and same_bits(two.leaf_energies, one.leaf_energies)


@pytest.mark.parametrize("sampler", [
    ef.Langevin(drift=0.1, noise=0.1, noise_first=True, clamp=(-1, 1)), ef.MALA(0.1), ef.HMC(0.1, 2),
    ef.BAOAB(0.1)], ids=repr)
def test_samplers(sampler):
    one, two = both(A & B, sampler, n=9)
    assert (one.acceptance is None) == (two.acceptance is None)
    assert one.acceptance is None or torch.equal(one.acceptance, two.acceptance)


def test_blocks_are_whole_micro_batches():
    run = ef.prepare(A, LANGEVIN, shape=(3,), steps=2, device=("cpu",) * 3, batch_size=4)
    assert run._blocks(20) == [slice(0, 4), slice(4, 12), slice(12, 20)]
    assert run._blocks(9) == [slice(0, 4), slice(4, 8), slice(8, 9)]
    assert run._blocks(5) == [slice(0, 4), slice(4, 5), slice(5, 5)]
    assert run._blocks(0) == [slice(0, 0)] * 3
    both(A & B, n=19, prepared={"batch_size": 4})


def test_conditions_masks_starts_and_first_chains():
    f = ef.Family(Net(), "f", condition_dim=3)
    x, rows = torch.randn(9, 5), torch.randn(9, 3)
    for mask in (torch.rand(9, 5) < 0.5, torch.rand(5) < 0.5, None):
        both(f[ef.Slot("c")], x=x, conditions={"c": rows}, frozen_mask=mask, first_chain=2**40, prepared={"shape": (5,)})
    g = ef.Family(NoisedGaussian(), "g")
    both(g(0.5) | g(-0.5), ef.Annealed([1.0, 0.5], 2), n=7, prepared={"shape": (1,)})
    both(A | B, n=9, init=lambda ids, shape: ids[:, None] * torch.ones(shape))
    one, two = both(A | B, LANGEVIN, n=9, prepared={"branches": "draw"})
    assert torch.equal(one.branch, two.branch)


def test_traces_and_callbacks():
    one, two = both(A & B, n=9, trace=ef.Trace(3, states=True))
    assert torch.equal(one.trace.steps, two.trace.steps)
    assert same_bits(one.trace.x, two.trace.x) and same_bits(one.trace.energy, two.trace.energy)
    one, two = both(A & B, n=9, steps=20, trace=ef.Trace(2, diagnostics=True))
    assert str(one.trace.diagnostics) == str(two.trace.diagnostics) and one.trace.diagnostics.chains == 9
    inside, seen = threading.Lock(), []

    def callback(info):
        assert inside.acquire(blocking=False), "one thread at a time"
        seen.append((info.first_chain, info.step))
        inside.release()

    ef.sample(A, n=5, shape=(3,), sampler=LANGEVIN, steps=3, seed=1, device=TWO, callback=callback)
    assert sorted(seen) == [(first, step) for first in (0, 2) for step in (1, 2, 3)]


def test_models_are_copied_refreshed_and_left_alone():
    """Whatever changes between calls is seen; the copies never change the originals."""
    net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1)).eval()
    net.scale = torch.ones(())
    before = {k: v.clone() for k, v in net.state_dict().items()}
    e = ef.Concept(net, name="net") & 3.0 * A
    run = ef.prepare(e, LANGEVIN, shape=(3,), steps=5, device=TWO, engine="step", stack_models=False)
    twin = next(t for t in run.shares[1].twins.values() if t.model is net)
    seen = []

    def check(same_twin=True):
        got, expected = run(n=8, seed=1), ef.sample(e, n=8, shape=(3,), steps=5, sampler=LANGEVIN, seed=1, engine="step")
        assert same_bits(got.x, expected.x) and not any(torch.equal(got.x, x) for x in seen)
        assert any(t is twin for t in run.shares[1].twins.values()) == same_twin
        seen.append(got.x)

    check()
    with torch.no_grad():
        net[0].weight.mul_(1.5)
    check()
    net[2].weight.data = net[2].weight.data * 2
    check()
    net[0] = nn.Linear(3, 8)
    check(same_twin=False)
    assert twin.copy is not net and not run.shares[0].twins, "the first device has the models themselves"
    assert all(p.grad is None for p in net.parameters()) and set(before) == set(net.state_dict())
    net[2].weight = nn.Parameter(net[2].weight.detach() * 2)
    check(same_twin=False)


def test_shared_models_stay_shared():
    f = ef.Family(ConditionalQuadratic(), "f", condition_dim=3)
    e = ef.with_prior((f([0.0, 0.0, 1.0]) & f([1.0, 0.0, 0.0])) | (f([0.0, 1.0, 0.0]) & A), A)
    run = ef.prepare(e, LANGEVIN, shape=(3,), steps=3, device=TWO)
    assert len(run.shares[1].twins) == 2 and len(run.shares[1].run.plan.groups) == len(run.shares[0].run.plan.groups) == 2
    assert repr(run.shares[1].run.plan.expression) == repr(e)
    both(e, n=5)
    assert "devices      cpu, cpu: contiguous blocks" in run.explain()


class Fails(nn.Module):
    """Raises where a chain is far out."""

    def forward(self, x):
        if (x > 50).any():
            raise RuntimeError("out of order")
        return x.square().sum(1)


def test_the_first_error_stops_the_others():
    x, steps = torch.zeros(8, 3), []
    x[5] = 100.0
    with pytest.raises(RuntimeError, match="out of order"):
        ef.sample(ef.Concept(Fails(), name="m"), x=x, sampler=LANGEVIN, steps=100_000, seed=1, device=TWO, check=False,
                  callback=lambda info: steps.append(info.first_chain))
    assert len(steps) < 50_000 and threading.active_count() < 20
    with pytest.raises(ef.NonFiniteError) as caught:
        ef.sample(ef.Concept(lambda x: x.square().sum(1) / (x <= 50).all(1).float(), name="m"), x=x, sampler=LANGEVIN,
                  steps=20, seed=1, device=TWO, check=False, first_chain=7)
    assert caught.value.chains == [12]


def test_policies_for_faults():
    e = ef.Concept(lambda x: 0.5 * x.square().sum(1) / (x.abs() <= 1.5).all(1).float(), name="cliff")
    for policy in ("freeze", "restart"):
        one, two = both(e, steps=60, n=9, prepared={"on_nonfinite": policy, "energies": False})
        assert one.report.faults == two.report.faults and one.report.faults


@pytest.mark.parametrize("e", [A, A | B], ids=["chain engine or one model", "or"])
def test_ctrl_c_leaves_a_state_that_resumes(e):
    options = {"n": 10, "shape": (3,), "sampler": LANGEVIN, "steps": 40, "seed": 1, "batch_size": 2, "engine": "step"}
    whole, seen, main = ef.sample(e, **options), [], threading.main_thread()

    def callback(info):
        seen.append(info)
        if len(seen) == 60:
            signal.pthread_kill(main.ident, signal.SIGINT)

    with pytest.raises(ef.Interrupted) as caught:
        ef.sample(e, device=TWO, callback=callback, **options)
    state = caught.value.state
    assert state.x.shape == (10, 3) and 0 < int(state.step.min()) + int(state.step.max()) and not state.finished
    rest = {k: v for k, v in options.items() if k not in ("n", "shape", "seed")}
    for where in (TWO, "cpu", ["cpu"] * 3):
        assert same_bits(ef.sample(e, device=where, resume=state, **rest).x, whole.x)


def test_resume_across_numbers_of_devices():
    half, whole = (ef.sample(A | B, n=9, shape=(3,), sampler=LANGEVIN, steps=s, seed=1, device=TWO) for s in (5, 12))
    for where in ("cpu", TWO, ["cpu"] * 3):
        assert same_bits(ef.sample(A | B, resume=half.state, sampler=LANGEVIN, steps=7, device=where).x, whole.x)


def test_arguments():
    for where, message in (([], "one device or more"), (["cpu", "cuda:0"], "torch sees no such device")):
        if where and torch.cuda.is_available():
            continue
        with pytest.raises(ValueError, match=message):
            ef.prepare(A, LANGEVIN, shape=(3,), steps=1, device=where)
    with pytest.raises(ValueError, match="`n`, the number of chains"):
        ef.sample(A, shape=(3,), sampler=LANGEVIN, steps=1, device=TWO)
    with pytest.raises(ValueError, match="`frozen_mask` must be"):
        ef.sample(A, n=4, shape=(3,), sampler=LANGEVIN, steps=1, device=TWO, frozen_mask=torch.zeros(2, dtype=torch.bool))
    model = nn.Linear(3, 1)
    model.last = model(torch.ones(1, 3))
    with pytest.raises(ValueError, match="Linear cannot be copied to cpu, which several devices need"):
        ef.prepare(ef.Concept(model), LANGEVIN, shape=(3,), steps=1, device=TWO)


def test_the_callers_autocast_counts_in_every_thread():
    net = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 1))
    e = ef.Concept(net, name="net") & A
    with torch.autocast("cpu", dtype=torch.bfloat16):
        both(e, n=6, prepared={"engine": "step", "stack_models": False})


def test_rows_of_a_call_are_parts_of_it():
    run = ef.prepare(A, LANGEVIN, shape=(3,), steps=3)
    call = run._check(7, 1, None, None, None, 5, None)
    part = devices._part(call, slice(2, 6), torch.device("cpu"))
    assert part.n == 4 and part.first_chain == 7 and len(part.step) == len(part.faults) == 4


@pytest.mark.parametrize("sampler", [ef.BAOAB(0.3), ef.MALA(0.2, warmup=ef.DualAveraging(4))], ids=["baoab", "mala"])
def test_what_samplers_carry_is_dealt_out_and_gathered(sampler):
    options = dict(shape=(3,), sampler=sampler, seed=0, engine="step")
    one, two = (ef.sample(A, 7, steps=8, device=d, **options) for d in (None, TWO))
    assert torch.equal(one.x, two.x) and all(torch.equal(v, two.state.extra[k]) for k, v in one.state.extra.items())
    torch.testing.assert_close(one.step_size, two.step_size, rtol=0, atol=0)
    first = ef.sample(A, 7, steps=5, device=TWO, **options)
    rest = ef.sample(A, steps=3, device=TWO, resume=first.state, sampler=sampler, engine="step")
    assert torch.equal(rest.x, one.x)
    options |= {"trace": ef.Trace(diagnostics=True), "steps": 8}
    found = [ef.sample(A, 7, device=d, **options).trace.diagnostics for d in ("cpu", TWO)]
    assert str(found[0]) == str(found[1]) and torch.equal(found[0].ess, found[1].ess)
