"""The chain engine against the step engine on the reference backend: same noise, same law, equal within rounding.

Tolerances: both compute in float32 and order their sums differently, so after a few steps of size about 1 they differ by
some units of 6e-8 times the magnitude of states and gradients; 2e-5 leaves room for steep energies, and is far below
what any wrong term, weight or noise would make.
"""

import copy
import math
import pickle
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import same_bits
from models import Quadratic
from torch import nn

import ebmfast as ef
from ebmfast import chain
from ebmfast import energies as E
from ebmfast._native import core

TOLERANCE = dict(rtol=2e-5, atol=2e-5)
STEP = ef.Langevin(drift=0.02, noise=0.15)
ACTIVATIONS = {"silu": nn.SiLU(), "relu": nn.ReLU(), "tanh": nn.Tanh(), "softplus": nn.Softplus(), "gelu": nn.GELU(),
               "gelu_tanh": nn.GELU(approximate="tanh")}


def seeded(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def concept(make, seed=0, name="e", condition=None):
    return ef.Concept(seeded(make, seed), condition, name=name)


def perceptron(*sizes, activation=nn.SiLU, bias=True):
    layers = [layer for i, o in zip(sizes, sizes[1:]) for layer in (nn.Linear(i, o, bias=bias), activation())]
    return nn.Sequential(*layers[:-1])


def both(expr, n=21, shape=(3,), sampler=STEP, steps=4, seed=5, **options):
    """The results of the chain engine and of the reference, after checking which engine ran."""
    ours = ef.sample(expr, n=n, shape=shape, sampler=sampler, steps=steps, seed=seed, engine="chain", **options)
    theirs = ef.sample(expr, n=n, shape=shape, sampler=sampler, steps=steps, seed=seed, backend="reference", **options)
    assert ours.report.engine == "chain" and theirs.report.engine == "step"
    return ours, theirs


def agree(expr, **options):
    ours, theirs = both(expr, **options)
    torch.testing.assert_close(ours.x, theirs.x, **TOLERANCE)
    scale = 1 + theirs.leaf_energies.abs().max().item()
    torch.testing.assert_close(ours.leaf_energies / scale, theirs.leaf_energies / scale, **TOLERANCE)
    torch.testing.assert_close(ours.energy / scale, theirs.energy / scale, **TOLERANCE)
    return ours


UNITS = {
    "gaussian_scalar": (lambda: E.Gaussian([0.5, -1.0, 2.0], 0.7), (3,)),
    "gaussian_diagonal": (lambda: E.Gaussian([0.5, -1.0, 2.0], [0.7, 2.0, 1.0]), (3,)),
    "gaussian_full": (lambda: E.Gaussian(torch.zeros(13), torch.eye(13) + 0.3), (13,)),
    "mixture_scalar": (lambda: E.GaussianMixture([[0.0, 1.0], [1.0, -1.0]], [0.5, 2.0], [1.0, 3.0]), (2,)),
    "mixture_diagonal": (lambda: E.GaussianMixture([[0.0, 1.0], [1.0, -1.0]], [[0.5, 1.0], [2.0, 2.0]]), (2,)),
    "mixture_full": (lambda: E.GaussianMixture(torch.randn(3, 5), torch.eye(5).expand(3, 5, 5) + 0.2), (5,)),
    "harmonic": (lambda: E.Harmonic(3.0), (2, 3)),
    "double_well": (lambda: E.DoubleWell(1.5, 0.8), (5,)),
    "styblinski_tang": (lambda: E.StyblinskiTang(), (4,)),
    "rosenbrock_2": (lambda: E.Rosenbrock(1.0, 2.0), (2,)),
    "rosenbrock_9": (lambda: E.Rosenbrock(0.5, 3.0), (9,)),
    "linear": (lambda: nn.Sequential(nn.Linear(4, 1)), (4,)),
    "one_layer": (lambda: perceptron(1, 5, 1), (1,)),
    "odd_widths": (lambda: perceptron(3, 37, 21, 1), (3,)),  # panels of every remainder
    "no_bias": (lambda: perceptron(7, 12, 1, bias=False), (7,)),
    "deep": (lambda: perceptron(2, 8, 16, 31, 9, 1), (2,)),
    "mlp": (lambda: E.MLP(6, (24, 13), "gelu"), (2, 3)),
}


@pytest.mark.parametrize("name", UNITS)
def test_every_native_energy(name, isa):
    make, shape = UNITS[name]
    agree(concept(make), shape=shape)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation(name):
    torch.manual_seed(1)
    first, second = copy.deepcopy(ACTIVATIONS[name]), copy.deepcopy(ACTIVATIONS[name])
    net = nn.Sequential(nn.Linear(3, 16), first, nn.Linear(16, 8), second, nn.Linear(8, 1))
    agree(ef.Concept(net))


@pytest.mark.parametrize("which", range(len(ACTIVATIONS)))
def test_activations_and_slopes_are_accurate(which, isa):
    """Against float64: a few units of 6e-8, relative to 1 or to the value, over the whole range; NaN stays."""
    edges = torch.tensor([-300.0, -90, 90, 300, 0, -0.0, 20, -20] * 2)
    z = torch.cat([torch.linspace(-12, 12, 4000), torch.linspace(-1e-3, 1e-3, 80), edges])
    value, slope = torch.empty_like(z), torch.empty_like(z)
    core.activate(which, z.data_ptr(), value.data_ptr(), slope.data_ptr(), len(z))
    exact = z.double().requires_grad_()
    expected = list(ACTIVATIONS.values())[which](exact)
    (gradient,) = torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(value.double(), expected.detach(), rtol=4e-7, atol=3e-7)
    torch.testing.assert_close(slope.double(), gradient, rtol=4e-7, atol=4e-7)
    z = torch.full((16,), math.nan)
    core.activate(which, z.data_ptr(), value.data_ptr(), slope.data_ptr(), 16)
    assert value[:16].isnan().all()


SAMPLERS = {
    "plain": STEP,
    "noise_first": ef.Langevin(drift=0.02, noise=0.15, noise_first=True),
    "clamp": ef.Langevin(drift=0.02, noise=0.3, clamp=(0.2, 0.6)),
    "noise_first_clamp": ef.Langevin.reference_code(0.05, 0.1, clamp=(0.2, 0.6)),
    "clip_value": ef.Langevin(drift=0.02, noise=0.15, grad_clip_value=0.05),
    "clip_norm": ef.Langevin(drift=0.02, noise=0.15, grad_clip_norm=0.05),
    "both_clips": ef.Langevin(drift=0.02, noise=0.15, grad_clip_norm=0.07, grad_clip_value=0.05),
    "schedules": ef.Langevin(step_size=lambda t: 0.05 / (1 + t), temperature=[1.0, 0.5, 0.0, 2.0]),
    "no_noise": ef.Langevin(drift=0.1, noise=0.0),
    "no_drift": ef.Langevin(drift=0.0, noise=0.1),
}


def tree():
    """OR inside NOT inside AND, a shared leaf, weights: everything a program has."""
    a, b = concept(lambda: perceptron(3, 16, 16, 1), 1, "a"), concept(lambda: E.MLP(3, (8,), "tanh"), 2, "b")
    g, h = concept(lambda: E.Gaussian([0.3, 0.0, -0.2]), name="g"), concept(lambda: E.DoubleWell(0.5), name="h")
    m = concept(lambda: E.GaussianMixture([[0.0] * 3, [1.0] * 3]), name="m")
    return (2.0 * g & ef.negate(a | b, 0.4)) | ef.any_of([h & a, m & 0.3 * b], log_weights=[0.5, -1.0], sharpness=2.0)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("make", [lambda: concept(lambda: perceptron(3, 16, 1)) & concept(E.Harmonic), tree], ids=["and", "tree"])
def test_every_option_of_langevin(name, make):
    agree(make(), sampler=SAMPLERS[name])


def test_annealed_with_weights_that_depend_on_the_level():
    a, b = concept(lambda: perceptron(3, 8, 1), name="a"), concept(E.Harmonic, name="b")
    expr = ef.all_of([b, a], weights=[1.0, ef.AboveSigma(0.3, 0.7)])
    sampler = ef.Annealed([1.0, 0.5, 0.2], steps_per_level=3, drift=0.1)
    agree(expr, sampler=sampler, steps=None)


@pytest.mark.parametrize("mask", ["shared", "per_chain"])
@pytest.mark.parametrize("sampler", [STEP, SAMPLERS["both_clips"], SAMPLERS["noise_first"]])
def test_frozen_elements_never_move(mask, sampler):
    torch.manual_seed(0)
    x = torch.randn(19, 3)
    frozen = torch.rand(3) < 0.5 if mask == "shared" else torch.rand(19, 3) < 0.5
    result = agree(tree(), n=None, shape=None, x=x, frozen_mask=frozen, sampler=sampler)
    assert torch.equal(result.x[frozen.expand(19, 3)], x[frozen.expand(19, 3)])
    assert not torch.equal(result.x[~frozen.expand(19, 3)], x[~frozen.expand(19, 3)])


@pytest.mark.parametrize("conditioning", ["concat", "add", "film"])
@pytest.mark.parametrize("kind", ["fixed", "slot", "none"])
def test_conditions(conditioning, kind):
    net = seeded(lambda: E.MLP(2, (16, 11), "silu", condition_dim=3, conditioning=conditioning))
    family, other = ef.Family(net, "f", unconditional=True), concept(E.Harmonic, name="h")
    rows = torch.randn(21, 3, generator=torch.Generator().manual_seed(1))
    e = {"fixed": family(0.5, -1.0, 2.0), "slot": family[ef.Slot("c")], "none": family.unconditional}[kind]
    options = {"conditions": {"c": rows}} if kind == "slot" else {}
    agree((e & other) | family(1.0, 1.0, 1.0), shape=(2,), **options)
    if kind == "slot":
        one = ef.sample(e, n=1, shape=(2,), sampler=STEP, steps=4, seed=5, first_chain=3, conditions={"c": rows[3:4]})
        assert same_bits(one.x, ef.sample(e, n=21, shape=(2,), sampler=STEP, steps=4, seed=5, **options).x[3:4])


def test_one_module_under_several_conditions_is_packed_once():
    net = seeded(lambda: E.MLP(2, (16, 16), condition_dim=2))
    family = ef.Family(net, "f")
    made = []
    pack = core.PackedMatrix
    try:
        core.PackedMatrix = lambda *a: made.append(a) or pack(*a)
        agree(family(0.0, 1.0) & family(1.0, 0.0), shape=(2,))
    finally:
        core.PackedMatrix = pack
    assert len(made) == 2


@pytest.mark.parametrize("n", [1, 15, 16, 17, 33, 70])
def test_bits_do_not_depend_on_batch_tile_or_threads(n, threads, isa):
    expr = tree()
    whole = ef.sample(expr, n=70, shape=(3,), sampler=STEP, steps=6, seed=2, first_chain=5, engine="chain").x
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for first in (0, 70 - n):
            part = ef.sample(expr, n=n, shape=(3,), sampler=STEP, steps=6, seed=2, first_chain=5 + first, engine="chain").x
            assert same_bits(part, whole[first:first + n])


def test_threads_share_large_runs_and_never_change_bits(threads):
    expr = concept(lambda: perceptron(3, 64, 64, 1))
    torch.set_num_threads(1)
    alone = ef.sample(expr, n=501, shape=(3,), sampler=STEP, steps=20, seed=0).x
    torch.set_num_threads(4)
    assert same_bits(ef.sample(expr, n=501, shape=(3,), sampler=STEP, steps=20, seed=0).x, alone)


@pytest.mark.parametrize(("chains", "threads", "lanes", "vectors"), [
    (1, 1, 16, 1), (16, 1, 16, 1), (17, 1, 16, 2), (64, 1, 16, 2), (64, 2, 16, 2), (32, 2, 16, 1), (64, 4, 16, 1),
    (8192, 64, 8, 2)])
def test_how_chains_are_cut(chains, threads, lanes, vectors):
    assert core.chain_vectors(chains, threads, lanes) == vectors


def test_the_noise_is_that_of_the_contract():
    """Without drift a step adds the noise of (seed, chain, step, element), also where chain ids pass 2^32."""
    first = (1 << 32) - 7
    expr, x = concept(E.Harmonic), torch.zeros(20, 7)
    for sampler in (ef.Langevin(drift=0.0, noise=1.0), ef.Langevin(drift=0.0, noise=1.0, noise_first=True)):
        ours = ef.sample(expr, x=x, sampler=sampler, steps=2, seed=9, first_chain=first, engine="chain").x
        assert same_bits(ours, ef.sample(expr, x=x, sampler=sampler, steps=2, seed=9, first_chain=first, engine="step").x)
        assert same_bits(ours, sum(ef.rng.normal((7,), 20, seed=9, step=t, first_chain=first) for t in (0, 1)))


def test_two_halves_equal_the_whole_and_pacing_changes_nothing(monkeypatch):
    expr, sampler = tree(), ef.Langevin(step_size=lambda t: 0.05 / (1 + t))
    whole = ef.sample(expr, n=33, shape=(3,), sampler=sampler, steps=20, seed=1)
    half = ef.sample(expr, n=33, shape=(3,), sampler=sampler, steps=7, seed=1)
    assert same_bits(ef.sample(expr, resume=half.state, sampler=sampler, steps=13).x, whole.x)
    monkeypatch.setattr(chain, "MULTIPLICATIONS_PER_SECOND", 1.0)  # one step at a time, to begin with
    assert same_bits(ef.sample(expr, n=33, shape=(3,), sampler=sampler, steps=20, seed=1).x, whole.x)


def test_traces_callbacks_and_progress(capsys):
    expr, seen = tree(), []
    plain = ef.sample(expr, n=9, shape=(3,), sampler=STEP, steps=10, seed=1)
    watched = dict(trace=ef.Trace(every=3, states=True), callback=lambda i: seen.append(i.step), progress=True)
    traced, reference = both(expr, n=9, steps=10, seed=1, **watched)
    assert traced.trace.steps.tolist() == [3, 6, 9] and seen == [*range(1, 11)] * 2
    torch.testing.assert_close(traced.trace.energy, reference.trace.energy, **TOLERANCE)
    torch.testing.assert_close(traced.trace.x, reference.trace.x, **TOLERANCE)
    assert same_bits(traced.x, plain.x) and "10/10" in capsys.readouterr().err


def steep():
    """Chains that start far out run away under Rosenbrock's x^4."""
    return concept(E.Harmonic, name="calm") & concept(lambda: E.Rosenbrock(1.0, 50.0), name="steep")


RARE = ef.Langevin(drift=1e-3, noise=0.05)


def outliers():
    x = torch.zeros(40, 2)
    x[7], x[33] = 60.0, -45.0
    return x


def test_nonfinite_raises_with_chain_step_and_leaf():
    found = []
    for engine in ("chain", "step"):
        with pytest.raises(ef.NonFiniteError, match="from the concept steep") as error:
            ef.sample(steep(), x=outliers(), sampler=RARE, steps=60, seed=0, engine=engine, first_chain=100)
        found.append([(f.chain, f.step, f.leaf) for f in error.value.faults])
    assert found[0] == found[1] and {c for c, _, _ in found[0]} == {107, 133}


@pytest.mark.parametrize("policy", ["freeze", "restart"])
def test_nonfinite_policies(policy):
    options = dict(x=outliers(), sampler=RARE, steps=60, seed=0, on_nonfinite=policy, init="normal")
    ours, theirs = (ef.sample(steep(), engine=engine, energies=False, **options) for engine in ("chain", "step"))
    torch.testing.assert_close(ours.x, theirs.x, **TOLERANCE)
    assert ours.report.faults == theirs.report.faults and len(ours.report.faults) == 2
    assert same_bits(ours.state.faults, theirs.state.faults)
    assert (ours.state.faults != 0).sum() == (2 if policy == "freeze" else 0)


def test_a_gradient_that_is_nan_in_an_or_is_blamed_on_its_leaf():
    bad = seeded(lambda: perceptron(2, 4, 1))
    with torch.no_grad():
        bad[0].weight[0, 0] = math.nan
    expr = concept(E.Harmonic, name="fine") | ef.Concept(bad, name="broken")
    with pytest.raises(ef.NonFiniteError, match="first at step 0, from the concept broken"):
        ef.sample(expr, n=3, shape=(2,), sampler=STEP, steps=5, seed=0, engine="chain")


def mutate_in_place(net):
    with torch.no_grad():
        net[0].weight.mul_(1.5)
        net[2].bias.add_(0.3)


def mutate_data(net):
    net[2].weight.data[1, 2] += 2.0  # no version counter sees this
    net[0].bias.data.neg_()


def mutate_storage(net):
    net[0].weight.data = net[0].weight.data * 2
    net[4].weight = nn.Parameter(net[4].weight.detach() * 3)


def mutate_structure(net):
    net[1] = nn.Tanh()
    net[2] = seeded(lambda: nn.Linear(8, 9), 3)


def mutate_optimizer(net):
    optimizer = torch.optim.Adam(net.parameters(), 0.1)
    net(torch.ones(4, 2)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("mutate", [mutate_in_place, mutate_data, mutate_storage, mutate_structure, mutate_optimizer])
@pytest.mark.parametrize("start", [None, torch.zeros(12, 2)], ids=["drawn", "given"])
def test_packed_weights_follow_the_module(mutate, start):
    """Sample, change the module, sample again: equals a fresh run on a copy of it. Gradients of users survive."""
    net = seeded(lambda: perceptron(2, 8, 9, 1))
    run = ef.prepare(ef.Concept(net) & concept(E.Harmonic), STEP, shape=(2,), steps=5)
    before = run(12, 0, x=start)
    run(12, 0, x=start)
    mutate(net)
    after = run(12, 0, x=start)
    expr = ef.Concept(copy.deepcopy(net)) & concept(E.Harmonic)
    fresh = ef.sample(expr, n=12, shape=(2,), sampler=STEP, steps=5, seed=0, x=start)
    assert after.report.engine == "chain" and same_bits(after.x, fresh.x) and same_bits(after.energy, fresh.energy)
    assert not torch.equal(after.x, before.x)


def test_numbers_and_buffers_follow_the_module():
    well, mixture = E.DoubleWell(), E.GaussianMixture([[0.0, 0.0], [2.0, 2.0]])
    gaussian = E.Gaussian([0.0, 0.0], torch.tensor([[2.0, 0.5], [0.5, 1.0]]))
    expr = ef.all_of([ef.Concept(m, name=str(i)) for i, m in enumerate((well, mixture, gaussian))])
    run = ef.prepare(expr, STEP, shape=(2,), steps=3)
    first = run(5, 0).x
    well.b = 1.7
    mixture.log_weights[0] += 2.0
    gaussian.precision.mul_(2.0)
    changed = run(5, 0)
    assert not torch.equal(changed.x, first)
    expected = ef.sample(expr, n=5, shape=(2,), sampler=STEP, steps=3, seed=0, engine="step")
    torch.testing.assert_close(changed.x, expected.x, **TOLERANCE)


def test_what_stops_being_native_goes_to_the_step_engine():
    net = seeded(lambda: perceptron(2, 8, 1))
    run = ef.prepare(ef.Concept(net), STEP, shape=(2,), steps=3)
    x = torch.zeros(4, 2)
    assert run(x=x, seed=0).report.engine == "chain"
    handle = net[0].register_forward_hook(lambda module, args, out: 2 * out)
    hooked = run(x=x, seed=0)
    assert hooked.report.engine == "step"
    handle.remove()
    again = run(x=x, seed=0)
    assert again.report.engine == "chain" and not torch.equal(again.x, hooked.x)
    net.append(nn.Tanh())
    assert run(x=x, seed=0).report.engine == "step"


def test_a_film_mlp_is_read_anew():
    net = seeded(lambda: E.MLP(2, (8, 5), "tanh", 2, "film"))
    expr = ef.Family(net, "f")(0.5, 1.0)
    run = ef.prepare(expr, STEP, shape=(2,), steps=5)
    x = torch.ones(6, 2)
    run(x=x, seed=0)
    changes = [lambda: net.layers[1].weight.data.mul_(2.0), lambda: setattr(net, "activation", nn.SiLU()),
               lambda: net.modulations[0].weight.data.add_(0.3), lambda: net.modulations[1].bias.data.neg_(),
               lambda: setattr(net.read_out, "weight", nn.Parameter(2 * net.read_out.weight.detach()))]
    for change in changes:
        before = run(x=x, seed=0).x
        change()
        after = run(x=x, seed=0)
        expected = ef.sample(expr, x=x, sampler=STEP, steps=5, seed=0, backend="reference")
        assert after.report.engine == "chain" and not torch.equal(after.x, before)
        torch.testing.assert_close(after.x, expected.x, **TOLERANCE)


def hook_on_an_activation(net):
    net.activation.register_forward_hook(lambda module, args, out: 3 * out)


def forward_of_its_own(net):
    net.forward = lambda x, condition=None: x.square().sum(1)


def transpose_in_place(net):
    net.layers[1].weight.data = net.layers[1].weight.data.t()


def global_hook(net):
    return torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, out: 2 * out if isinstance(module, nn.Linear) else None)


@pytest.mark.parametrize("change", [hook_on_an_activation, forward_of_its_own, transpose_in_place, global_hook])
def test_changes_that_no_parameter_shows_are_seen(change):
    net = seeded(lambda: E.MLP(2, (8, 8)))
    run = ef.prepare(ef.Concept(net), STEP, shape=(2,), steps=5)
    x = torch.ones(6, 2)
    run(x=x, seed=0)
    before = run(x=x, seed=0).x
    handle = change(net)
    try:
        after = run(x=x, seed=0)
        expected = ef.sample(ef.Concept(net), x=x, sampler=STEP, steps=5, seed=0, backend="reference")
        torch.testing.assert_close(after.x, expected.x, **TOLERANCE)
        assert not torch.equal(after.x, before)
    finally:
        if handle is not None:
            handle.remove()


def test_a_failed_reading_leaves_nothing_half_read():
    a, b = seeded(lambda: perceptron(2, 6, 1)), seeded(lambda: perceptron(2, 6, 1), 1)
    run = ef.prepare(ef.Concept(a, name="a") & ef.Concept(b, name="b"), STEP, shape=(2,), steps=5)
    x = torch.ones(6, 2)
    run(x=x, seed=0)
    expected, old = run(x=x, seed=0).x, a[0].weight
    a[0].weight = nn.Parameter(torch.full_like(old, 50.0))
    b.double()
    with pytest.raises(RuntimeError):
        run(x=x, seed=0)
    a[0].weight = old
    b.float()
    assert same_bits(run(x=x, seed=0).x, expected)


def test_torch_s_defaults_do_not_matter():
    expr = concept(lambda: E.Harmonic(3.0)) & concept(lambda: perceptron(2, 4, 1))
    run, x = ef.prepare(expr, STEP, shape=(2,), steps=5), torch.ones(4, 2)
    expected = [run(x=x, seed=0).x, run(x=x, seed=0).x]
    dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert same_bits(ef.sample(expr, x=x, sampler=STEP, steps=5, seed=0, engine="chain").x, expected[0])
        torch.set_default_device("meta")
        assert same_bits(run(x=x, seed=0).x, expected[1])
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(dtype)


def test_one_run_in_several_threads():
    """Mixtures set program values at every call, Annealed at every level: threads must not see each other's."""
    mixture = concept(lambda: E.GaussianMixture([[0.0, 1.0], [1.0, -1.0], [2.0, 2.0]]))
    annealed = ef.Annealed([2.0, 1.0, 0.5, 0.2], 2, drift=0.2)
    levels = ef.all_of([mixture, concept(E.Harmonic)], weights=[1.0, ef.AboveSigma(0.7)])
    for run in (ef.prepare(mixture, STEP, shape=(2,), steps=20), ef.prepare(levels, annealed, shape=(2,))):
        x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
        expected = run(x=x, seed=0).x
        with ThreadPoolExecutor(3) as pool:
            assert all(same_bits(r.x, expected) for r in pool.map(lambda _: run(x=x, seed=0), range(120)))  # noqa: B023


def test_long_chains_go_to_the_step_engine():
    expr = concept(E.DoubleWell)
    run = ef.prepare(expr, STEP, shape=(2_000_000,), steps=1)
    assert "MiB of scratch memory per thread" in run.explain()


def test_modules_that_only_torch_can_read_go_to_the_step_engine():
    harmonic = E.Harmonic()
    harmonic.k = torch.tensor(2.0)
    result = ef.sample(ef.Concept(harmonic, name="h"), n=3, shape=(2,), sampler=STEP, steps=2, seed=0)
    assert result.report.engine == "step" and "h: its k is Tensor, not a number" in ef.Concept(harmonic, name="h").explain()
    del harmonic.k
    harmonic.k = nn.Parameter(torch.tensor(2.0))
    assert ef.sample(ef.Concept(harmonic), n=3, shape=(2,), sampler=STEP, steps=2, seed=0).report.engine == "step"
    hooked = nn.Sequential(nn.Linear(2, 4), nn.Identity(), nn.SiLU(), nn.Linear(4, 1))
    hooked[1].register_forward_hook(lambda module, args, out: 5 * out)
    assert ef.sample(ef.Concept(hooked), n=3, shape=(2,), sampler=STEP, steps=2, seed=0).report.engine == "step"


def test_a_restart_keeps_conditions_masks_and_frozen_elements():
    net = seeded(lambda: E.MLP(2, (6,), condition_dim=1))
    expr = ef.Family(net, "f")[ef.Slot("c")] & steep()
    x, frozen = outliers(), torch.rand(40, 2, generator=torch.Generator().manual_seed(3)) < 0.3
    frozen[7], frozen[33] = torch.tensor([False, True]), torch.tensor([False, False])
    options = dict(x=x, sampler=RARE, steps=60, seed=0, on_nonfinite="restart", init="normal", frozen_mask=frozen,
                   conditions={"c": torch.randn(40, 1, generator=torch.Generator().manual_seed(2))}, energies=False)
    ours, theirs = (ef.sample(expr, engine=engine, **options) for engine in ("chain", "step"))
    torch.testing.assert_close(ours.x, theirs.x, **TOLERANCE)
    assert torch.equal(ours.x[frozen], x[frozen]) and ours.report.faults == theirs.report.faults != []


def test_ctrl_c_is_served_on_the_way_and_resumes():
    """A run of minutes stops soon after the signal; what it leaves goes on as if nothing had happened."""
    expr, sampler = concept(lambda: perceptron(3, 64, 64, 1)), STEP
    def interrupt():
        while signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # until the run listens
            time.sleep(0.01)
        time.sleep(0.1)
        signal.raise_signal(signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(ef.Interrupted) as stopped:
        ef.sample(expr, n=256, shape=(3,), sampler=sampler, steps=200_000, seed=0)
    done = int(stopped.value.state.step[0])
    assert 0 < done < 200_000
    short = ef.sample(expr, n=256, shape=(3,), sampler=sampler, steps=done, seed=0)
    assert same_bits(short.x, stopped.value.state.x)


def test_a_callback_that_changes_the_model_is_followed():
    def drawn(engine):
        net, well = seeded(lambda: perceptron(2, 6, 1)), E.Harmonic()

        def change(info):
            net[0].weight.data.mul_(1.1)
            net[2].bias.data.add_(0.1)
            well.k += 0.5

        expr = ef.Concept(net) & ef.Concept(well)
        return ef.sample(expr, x=torch.ones(5, 2), sampler=STEP, steps=6, seed=0, callback=change, engine=engine).x

    torch.testing.assert_close(drawn("chain"), drawn("step"), **TOLERANCE)


def test_results_and_runs_pickle_and_states_own_their_conditions():
    family = ef.Family(seeded(lambda: E.MLP(2, (8,), condition_dim=1)), "f")
    run = ef.prepare(family[ef.Slot("c")], STEP, shape=(2,), steps=4)
    x, rows = torch.zeros(5, 2), torch.ones(5, 1)
    for _ in range(2):
        result = run(x=x, seed=0, conditions={"c": rows})
        whole = ef.sample(family[ef.Slot("c")], x=x, sampler=STEP, steps=8, seed=0, conditions={"c": rows})
        loaded = pickle.loads(pickle.dumps(result))
        assert same_bits(loaded.x, result.x) and loaded.report == result.report
        rows.zero_()
        assert same_bits(ef.sample(family[ef.Slot("c")], resume=result.state, sampler=STEP, steps=4).x, whole.x)
        rows.fill_(1.0)
    assert same_bits(copy.deepcopy(run)(x=x, seed=0, conditions={"c": rows}).x, result.x)


def test_chain_ids_end_at_2_to_the_60():
    with pytest.raises(ValueError, match="`first_chain` must be at most 2"):
        ef.sample(concept(E.Harmonic), x=torch.zeros(2, 2), sampler=STEP, steps=1, seed=0, first_chain=(1 << 60) - 1)


class Overridden(E.DoubleWell):
    def forward(self, x):
        return super().forward(x) + x.flatten(1).sum(1)


class Wrapped(nn.Sequential):
    def forward(self, x):
        return super().forward(x) * 2


class Renamed(E.DoubleWell):
    pass


def patched():
    net = perceptron(2, 4, 1)
    net.forward = lambda x: x.sum(1)
    return net


NOT_NATIVE = {
    "function": (lambda: lambda x: x.square().sum(1), "is not a native energy"),
    "module": (lambda: Quadratic(0.0), "Quadratic is not a native energy"),
    "override": (Overridden, "Overridden overrides the forward of DoubleWell"),
    "override_sequential": (lambda: Wrapped(nn.Linear(2, 1)), "Wrapped overrides the forward of Sequential"),
    "patched": (patched, "has hooks, or a forward of its own"),
    "layer": (lambda: nn.Sequential(nn.Linear(2, 4), nn.ELU(), nn.Linear(4, 1)), "ELU is not one of the engine's layers"),
    "layer_norm": (lambda: nn.Sequential(nn.Linear(2, 4), nn.SiLU(), nn.LayerNorm(4), nn.SiLU(), nn.Linear(4, 1)),
                   "LayerNorm is not a plain Linear"),
    "no_activation": (lambda: nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1)), "Linear is not one of the engine's layers"),
    "trailing": (lambda: nn.Sequential(nn.Linear(2, 1), nn.SiLU()), "one activation between"),
    "softplus": (lambda: nn.Sequential(nn.Linear(2, 4), nn.Softplus(beta=2), nn.Linear(4, 1)), "Softplus with beta 2"),
    "spectral_norm": (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 1))), "is not a plain Linear"),
    "lazy": (lambda: E.Himmelblau(), "Himmelblau is not a native energy"),
}


@pytest.mark.parametrize("name", NOT_NATIVE)
def test_what_is_not_native_is_named_and_still_sampled(name):
    make, reason = NOT_NATIVE[name]
    odd = ef.Concept(seeded(make), name="odd")
    expr = concept(E.Harmonic, name="calm") & odd
    for text in (expr.explain(), ef.prepare(expr, STEP, shape=(2,)).explain()):
        assert "chain engine no: odd: " in text and reason in text
    result = ef.sample(expr, n=4, shape=(2,), sampler=STEP, steps=2, seed=0)
    assert result.report.engine == "step" and torch.isfinite(result.x).all()
    with pytest.raises(ValueError, match=f'`engine` is "chain", which cannot run this composition: odd: .*{reason}'):
        ef.sample(expr, n=4, shape=(2,), sampler=STEP, steps=2, seed=0, engine="chain")


def test_what_is_native_says_so():
    expr = ef.Concept(Renamed()) & concept(lambda: nn.Sequential(nn.Linear(2, 4), nn.Identity(), nn.SiLU(), nn.Linear(4, 1)))
    assert "chain engine yes, on the CPU" in expr.explain()
    result = ef.sample(expr, n=4, shape=(2,), sampler=STEP, steps=2, seed=0)
    assert result.report.engine == "chain" and "chain engine" in str(result.report)


def test_other_dtypes_shapes_and_backends_go_to_the_step_engine():
    net = seeded(lambda: perceptron(2, 4, 1))
    assert ef.sample(ef.Concept(net), n=2, shape=(2,), sampler=STEP, steps=1, seed=0, backend="reference").report.engine == "step"
    assert ef.sample(ef.Concept(net), n=2, shape=(2,), sampler=STEP, steps=1, seed=0, engine="step").report.engine == "step"
    wide = ef.Concept(copy.deepcopy(net).double())
    x = torch.zeros(2, 2, dtype=torch.float64)
    assert ef.sample(wide, x=x, sampler=STEP, steps=1, seed=0).report.engine == "step"
    with pytest.raises(ValueError, match="it belongs to the backends cpu and cuda, this run is on 'reference'"):
        ef.sample(ef.Concept(net), n=2, shape=(2,), sampler=STEP, steps=1, backend="reference", engine="chain")
    with pytest.raises(ValueError, match="`engine` must be one of auto, step, chain, got 'fast'"):
        ef.sample(ef.Concept(net), n=2, shape=(2,), sampler=STEP, steps=1, engine="fast")
    with pytest.raises(ValueError, match="its weight is .4, 2., chains need .4, 3."):
        ef.sample(ef.Concept(net), n=2, shape=(3,), sampler=STEP, steps=1, engine="chain")


def test_conditions_that_do_not_fit_raise():
    family = ef.Family(seeded(lambda: E.MLP(2, (4,), condition_dim=3)), "f")
    options = dict(n=4, shape=(2,), sampler=STEP, steps=1)
    with pytest.raises(ValueError, match=r"`conditions\['c'\]` must have 3 columns, got 2"):
        ef.sample(family[ef.Slot("c")], conditions={"c": torch.zeros(4, 2)}, **options)
    with pytest.raises(ValueError, match="condition has 2 numbers, the model takes 3"):
        ef.sample(family(1.0, 2.0), engine="chain", **options)


def test_nothing_to_do():
    expr = tree()
    assert ef.sample(expr, n=0, shape=(3,), sampler=STEP, steps=5, seed=0, engine="chain").x.shape == (0, 3)
    x = torch.randn(4, 3)
    assert same_bits(ef.sample(expr, x=x, sampler=STEP, steps=0, seed=0, engine="chain").x, x)


def test_quick_calls_equal_the_general_path():
    family = ef.Family(seeded(lambda: E.MLP(2, (8,), condition_dim=1)), "f")
    expr, x, c = family[ef.Slot("c")] | concept(E.Harmonic), torch.randn(9, 2), {"c": torch.randn(9, 1)}
    run = ef.prepare(expr, STEP, shape=(2,), steps=5)
    general = run(x=x, seed=3, conditions=c, first_chain=2)
    quick = run(x=x, seed=3, conditions=c, first_chain=2)
    assert run._quick[5](None, 3, c, x, 2) is not None, "the second call is a quick one"
    for name in ("x", "energy", "leaf_energies"):
        assert same_bits(getattr(quick, name), getattr(general, name))
    a, b = vars(quick.report) | {"seconds": 0}, vars(general.report) | {"seconds": 0}
    assert a == b
    assert same_bits(quick.state.step, general.state.step) and quick.state.seed == 3 and quick.state.first_chain == 2
    more, other = (ef.sample(expr, resume=r.state, sampler=STEP, steps=2).x for r in (quick, general))
    assert same_bits(more, other) and x.grad_fn is None and quick.x.data_ptr() != x.data_ptr()
    torch.manual_seed(0)
    drawn = run(x=x, conditions=c)
    torch.manual_seed(0)
    assert same_bits(run(x=x, conditions=c, quick=False).x, drawn.x), "a seed is drawn once"


@pytest.mark.parametrize(("options", "message"), [
    (dict(x=torch.zeros(4, 3)), "`x` must be"), (dict(x=torch.full((4, 2), math.nan)), "`x` must be finite"),
    (dict(n=5), "`n` is 5, but `x` has 4 chains"), (dict(first_chain=-1), "`first_chain` must be at least 0"),
    (dict(conditions={"c": torch.zeros(4, 2)}), "`conditions` names 'c'"), (dict(seed=-1), "seed"),
])
def test_quick_calls_reject_what_the_general_path_rejects(options, message):
    run = ef.prepare(concept(E.Harmonic), STEP, shape=(2,), steps=1)
    run(x=torch.zeros(4, 2), seed=0)
    with pytest.raises(ValueError, match=message):
        run(**{"x": torch.zeros(4, 2), "seed": 0} | options)


def test_quick_calls_leave_faults_to_the_general_path():
    run = ef.prepare(steep(), RARE, shape=(2,), steps=60)
    assert run(x=torch.zeros(40, 2), seed=0).report.faults == []
    with pytest.raises(ef.NonFiniteError, match="from the concept steep"):
        run(x=outliers(), seed=0)


needs_bf16 = pytest.mark.skipif(not core.chain_bf16(), reason="this CPU has no AVX512-BF16")


@needs_bf16
@pytest.mark.parametrize("make", [lambda: perceptron(3, 64, 33, 17, 1), lambda: E.MLP(3, (64, 64), "tanh", 2, "film")])
def test_bfloat16_products_stay_near_float32(make):
    """bfloat16 keeps 8 bits, 2^-9 relative: products of hidden layers are off by about that, first layers by nothing."""
    e = concept(make, condition=[0.5, -0.5] if isinstance(seeded(make), E.MLP) else None)
    sampler = ef.Langevin(drift=0.05, noise=0.1)
    exact = ef.sample(e, n=200, shape=(3,), sampler=sampler, steps=20, seed=0)
    rounded = ef.sample(e, n=200, shape=(3,), sampler=sampler, steps=20, seed=0, compute_dtype=torch.bfloat16, engine="chain")
    start = ef.sample(e, n=200, shape=(3,), sampler=sampler, steps=0, seed=0).x
    noise = ef.sample(0.0 * e & concept(lambda: nn.Sequential(nn.Linear(3, 1))), x=start, seed=0, steps=20,
                      sampler=ef.Langevin(drift=0.0, noise=0.1)).x
    moved = (exact.x - noise).square().mean().sqrt().item()
    error = (rounded.x - exact.x).square().mean().sqrt().item()
    assert 0 < error < 0.02 * moved, (error, moved)
    assert rounded.report.compute_dtype == "bfloat16" and (rounded.energy - exact.energy).abs().max() < 0.02


def test_bfloat16_where_the_cpu_lacks_it_goes_to_the_step_engine(isa):
    e = concept(lambda: perceptron(3, 8, 8, 1))
    r = ef.sample(e, n=4, shape=(3,), sampler=STEP, steps=2, seed=0, compute_dtype=torch.bfloat16)
    assert r.report.engine == ("chain" if core.chain_bf16() else "step")
    if not core.chain_bf16():
        run = ef.prepare(e, STEP, shape=(3,), compute_dtype=torch.bfloat16)
        assert "bfloat16 needs AVX512-BF16; this level is" in run.explain()


def random_leaf(g, dim, k):
    def pick(*options):
        return options[int(torch.randint(len(options), (), generator=g))]

    seed = int(torch.randint(1 << 30, (), generator=g))
    widths = [pick(1, 4, 7, 16, 25) for _ in range(pick(1, 1, 2, 3))]
    activation = pick(*ACTIVATIONS.values())
    spread = torch.randn(dim, dim, generator=g)
    conditioning = pick("concat", "add", "film")
    name = pick("perceptron", "mlp", "slot", "gaussian", "full", "mixture", "harmonic", "well", "tang", "rosenbrock")
    match name:
        case "perceptron":
            sizes = list(zip([dim, *widths], widths))

            def build():
                hidden = [m for i, o in sizes for m in (nn.Linear(i, o), copy.deepcopy(activation))]
                return nn.Sequential(*hidden, nn.Linear(widths[-1], 1))

            return concept(build, seed, f"p{k}")
        case "mlp" | "slot":
            net = seeded(lambda: E.MLP(dim, widths, pick(*E.ACTIVATIONS), 2, conditioning), seed)
            family = ef.Family(net, f"m{k}")
            return family[ef.Slot("c")] if name == "slot" else family(*torch.randn(2, generator=g).tolist())
        case "gaussian":
            return concept(lambda: E.Gaussian(torch.randn(dim), 0.5 + torch.rand(dim)), seed, f"g{k}")
        case "full":
            return concept(lambda: E.Gaussian(torch.randn(dim), spread @ spread.T / dim + torch.eye(dim)), seed, f"G{k}")
        case "mixture":
            return concept(lambda: E.GaussianMixture(torch.randn(3, dim), [0.5, 1.0, 2.0]), seed, f"x{k}")
        case "well":
            return concept(lambda: E.DoubleWell(0.3, 1.2), name=f"w{k}")
        case "tang":
            return 0.1 * concept(E.StyblinskiTang, name=f"s{k}")
        case "rosenbrock" if dim > 1:
            return concept(lambda: E.Rosenbrock(0.5, 0.5), name=f"r{k}")
    return concept(lambda: E.Harmonic(0.8), name=f"h{k}")


def random_tree(g, leaves, depth):
    if depth == 0 or torch.rand((), generator=g) < 0.2:
        return leaves[int(torch.randint(len(leaves), (), generator=g))]
    children = [random_tree(g, leaves, depth - 1) for _ in range(int(torch.randint(1, 4, (), generator=g)))]
    if torch.rand((), generator=g) < 0.5:
        return ef.any_of(children, (torch.randn(len(children), generator=g)).tolist(), sharpness=[0.5, 1.0, 2.0][len(children) - 1])
    return ef.all_of(children, (torch.rand(len(children), generator=g) * 1.5 - 0.3).tolist())


@pytest.mark.parametrize("seed", range(60))
def test_fuzz(seed):
    """Random programs, shapes and options against the reference."""
    g = torch.Generator().manual_seed(seed)
    dim, n = int(torch.randint(1, 8, (), generator=g)), int(torch.randint(1, 50, (), generator=g))
    leaves = [random_leaf(g, dim, k) for k in range(int(torch.randint(1, 5, (), generator=g)))]
    expr = random_tree(g, leaves, 3)
    if not expr.leaves:  # weights that cancel
        expr = leaves[0]
    coin = (torch.rand(6, generator=g) < 0.4).tolist()
    sampler = ef.Langevin(
        drift=0.01, noise=0.1, noise_first=coin[0], clamp=(-1.5, 2.0) if coin[1] else None,
        grad_clip_value=0.7 if coin[2] else None, grad_clip_norm=1.1 if coin[3] else None)
    options = {"frozen_mask": torch.rand(dim, generator=g) < 0.3} if coin[4] else {}
    if "c" in expr.slots:
        options["conditions"] = {"c": torch.randn(n, 2, generator=g)}
    options |= {"first_chain": seed * 1000, "allow_improper": True, "init": "normal"}
    agree(expr, n=n, shape=(dim,), sampler=sampler, seed=seed, **options)
