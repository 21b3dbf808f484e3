"""The CUDA chain engine: its kernels' text and all around it on the host, and the launches where there is a GPU.

On the host `DeviceChain` works on CPU tensors: the same memory image, packing, choice of launch and kernel text, with
loops for threads and the documented fragment layouts for tensor cores. What that cannot show (the launches, barriers,
instructions) waits for the tests at the end, which need a GPU.
"""

import copy
import json

import pytest
import test_chain as on_cpu
import torch
from conftest import require_backend, same_bits
from test_chain import SAMPLERS, STEP, UNITS, agree, concept, perceptron, seeded, tree
from torch import nn

import ebmfast as ef
from bench import cuda_registers
from ebmfast import backends, cuda_chain
from ebmfast import energies as E
from ebmfast._native import core
from ebmfast.plan import Plan

# Multiprocessors, shared memory of a block, threads in reverse order. Together: every size of a block, weights staged in
# shared memory or not, units together or one by one, scratch in shared or global memory; and threads that rely on
# the turn of another within a phase would show.
HOSTS = {"h100": (132, 227 << 10, False), "small": (2, 24 << 10, True), "none": (1, 0, False)}


@pytest.fixture
def host(monkeypatch):
    """Chains of backend "cpu" run in `DeviceChain`."""
    monkeypatch.setitem(cuda_chain.CHAINS, "cpu", cuda_chain.DeviceChain)


@pytest.fixture(params=HOSTS)
def each_host(request, host, monkeypatch):
    monkeypatch.setattr(cuda_chain, "HOST", HOSTS[request.param])


@pytest.fixture
def tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("name", UNITS)
def test_every_native_energy(name, each_host):
    make, shape = UNITS[name]
    agree(concept(make), shape=shape)


@pytest.mark.parametrize("name", on_cpu.ACTIVATIONS)
def test_every_activation(name, host):
    on_cpu.test_every_activation(name)


def wells():
    """Sums over coordinates alone, under an OR: chains in registers."""
    a, b = concept(lambda: E.DoubleWell(0.5), name="a"), concept(lambda: E.Rosenbrock(0.5, 0.5), name="b")
    g, s = concept(lambda: E.Gaussian([0.3] * 9, 0.7), name="g"), concept(E.StyblinskiTang, name="s")
    return (a & b) | ef.any_of([g, s], [0.0, 1.0])


def block():
    return concept(lambda: perceptron(9, 16, 1)) & concept(E.Harmonic)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("make", [block, wells])
def test_every_option_of_langevin(name, make, each_host):
    agree(make(), shape=(9,), sampler=SAMPLERS[name])


# Elements and threads of a chain: one thread, a warp of one to four quads each, neither a multiple of the other.
@pytest.mark.parametrize("size", [1, 2, 5, 17, 64, 128, 131, 257, 509, 512, 513])
@pytest.mark.parametrize("with_or", [False, True])
def test_every_length_of_chain(size, with_or, host):
    a = concept(lambda: E.Gaussian(torch.randn(size), 0.5 + torch.rand(size)), name="a")
    b = concept(lambda: E.DoubleWell(0.1), name="b")
    if size > 1:
        b = b & concept(lambda: E.Rosenbrock(0.5, 0.5), name="c")
    sampler = ef.Langevin(drift=0.01, noise=0.1, grad_clip_norm=3.0)
    agree(a | b if with_or else a & 0.5 * b, shape=(size,), n=7, steps=3, sampler=sampler)


@pytest.mark.parametrize("conditioning", ["concat", "add", "film"])
@pytest.mark.parametrize("kind", ["fixed", "slot", "none"])
def test_conditions(conditioning, kind, each_host):
    on_cpu.test_conditions(conditioning, kind)


@pytest.mark.parametrize("mask", ["shared", "per_chain"])
@pytest.mark.parametrize("sampler", ["plain", "both_clips", "noise_first"])
@pytest.mark.parametrize("make", [tree, lambda: concept(E.DoubleWell) | concept(E.Harmonic)], ids=["block", "registers"])
def test_frozen_elements_never_move(mask, sampler, make, host, monkeypatch):
    monkeypatch.setattr(on_cpu, "tree", make)
    on_cpu.test_frozen_elements_never_move(mask, SAMPLERS[sampler])


def test_the_rest_of_the_contract(each_host, capsys):
    on_cpu.test_the_noise_is_that_of_the_contract()
    on_cpu.test_annealed_with_weights_that_depend_on_the_level()
    on_cpu.test_numbers_and_buffers_follow_the_module()
    on_cpu.test_a_film_mlp_is_read_anew()
    on_cpu.test_traces_callbacks_and_progress(capsys)
    on_cpu.test_nothing_to_do()


def test_resume_and_pacing(host, monkeypatch):
    monkeypatch.setattr(cuda_chain, "STEPS_PER_SECOND", 60.0)  # three steps at a time
    on_cpu.test_two_halves_equal_the_whole_and_pacing_changes_nothing(monkeypatch)


def test_faults(each_host):
    on_cpu.test_nonfinite_raises_with_chain_step_and_leaf()
    on_cpu.test_nonfinite_policies("freeze")
    on_cpu.test_nonfinite_policies("restart")
    on_cpu.test_a_gradient_that_is_nan_in_an_or_is_blamed_on_its_leaf()


@pytest.mark.parametrize("mutate", [on_cpu.mutate_in_place, on_cpu.mutate_data, on_cpu.mutate_storage, on_cpu.mutate_structure])
def test_packed_weights_follow_the_module(mutate, host):
    on_cpu.test_packed_weights_follow_the_module(mutate, torch.zeros(12, 2))


@pytest.mark.parametrize("make", [tree, wells], ids=["block", "registers"])
def test_bits_depend_on_neither_batch_nor_gpu(make, monkeypatch, host):
    expr, shape = make(), (9,) if make is wells else (3,)
    options = dict(shape=shape, sampler=SAMPLERS["both_clips"], steps=6, seed=2, engine="chain")
    whole = ef.sample(expr, n=70, **options)
    for first, n in ((0, 1), (31, 3), (60, 10)):
        assert same_bits(ef.sample(expr, n=n, first_chain=first, **options).x, whole.x[first:first + n])
    for name in ("small", "none") if make is tree else ("small",):  # without shared memory `wells` leave registers
        monkeypatch.setattr(cuda_chain, "HOST", HOSTS[name])
        other = ef.sample(expr, n=70, **options)
        assert same_bits(other.x, whole.x) and same_bits(other.energy, whole.energy)


@pytest.mark.parametrize("seed", range(40))
def test_fuzz(seed, each_host):
    on_cpu.test_fuzz(seed)


# Relative to the distance that chains move: bfloat16 rounds each factor by up to 2^-9, TF32 by 2^-12.
@pytest.mark.parametrize(("dtype", "least", "most"), [(torch.bfloat16, 1e-4, 0.02), (None, 1e-6, 2e-3)], ids=["bf16", "tf32"])
@pytest.mark.parametrize("make", [
    lambda: perceptron(3, 64, 33, 17, 1), lambda: perceptron(19, 8, 24, 1), lambda: E.MLP(9, (64, 64), "tanh", 2, "film")])
def test_tensor_cores_stay_near_float32(make, dtype, least, most, each_host, request):
    net = seeded(make)
    e = ef.Concept(net, [0.5, -0.5] if isinstance(net, E.MLP) else None, name="e")
    size = net.dim if isinstance(net, E.MLP) else net[0].in_features
    options = dict(n=41, shape=(size,), sampler=ef.Langevin(drift=0.1, noise=0.0), steps=10, seed=0, engine="chain")
    start, exact = ef.sample(e, **options | {"steps": 0}), ef.sample(e, **options)
    if dtype is None:
        request.getfixturevalue("tf32")
    rounded = ef.sample(e, compute_dtype=dtype, **options)
    moved = (exact.x - start.x).square().mean().sqrt().item()
    error = (rounded.x - exact.x).square().mean().sqrt().item() / moved
    assert least < error < most, error
    assert least / 10 < (rounded.leaf_energies - exact.leaf_energies).abs().max() < most
    again = ef.sample(e, x=start.x[3:5], compute_dtype=dtype, **options | {"n": 2, "shape": None, "first_chain": 3})
    assert same_bits(again.x, rounded.x[3:5])


def test_a_prepared_run_follows_torch_s_precision(host, request):
    run = ef.prepare(concept(lambda: perceptron(3, 16, 16, 1)), STEP, shape=(3,), steps=5)
    exact = run(9, 0)
    request.getfixturevalue("tf32")
    rounded = run(9, 0)
    torch.set_float32_matmul_precision("highest")
    assert not same_bits(rounded.x, exact.x) and same_bits(run(9, 0).x, exact.x)


def plan_of(size, widths, leaves=4, sms=132, shared=227 << 10, bf16=False):
    plan = core.DevicePlan(size, [*[(0, k) for k in range(leaves)], (1, leaves)], False, True, sms, shared)
    for k in range(leaves):
        if widths is None:
            plan.add_quartic(k)
        else:
            sizes = list(zip((size, *widths), widths))
            plan.add_mlp(k, [(core.PackedMatrix(o, i, bf16), 0) for i, o in sizes])
    return plan


@pytest.mark.parametrize(("size", "widths", "chains", "bf16", "expected"), [
    (8, (64, 64), 64, False, dict(chains=8, together=4, staged=True, shared=True, blocks=8)),
    (8, (64, 64), 100_000, False, dict(chains=32, shared=True)),
    (32, (128, 128), 256, True, dict(chains=8, together=4, shared=True, blocks=32)),
    (128, (256, 256), 1024, True, dict(shared=True, staged=False)),
    (128, (1024, 1024), 64, False, dict(chains=8, together=1, shared=True)),
    (128, (8192, 8192), 4096, False, dict(shared=False, staged=False, shared_bytes=0)),
    (32, None, 4096, False, dict(registers=True, quads=1, shift=3, chains=16, blocks=256)),
    (3, None, 10, False, dict(registers=True, quads=1, shift=0, chains=128, blocks=1)),
    (512, None, 10, False, dict(registers=True, quads=4, shift=5, chains=4, blocks=3)),
    (513, None, 10, False, dict(registers=False)),
])
def test_the_choice_of_a_launch(size, widths, chains, bf16, expected):
    found = plan_of(size, widths, bf16=bf16).choose(chains)
    assert {k: found[k] for k in expected} == expected, found
    assert found["shared_bytes"] <= 227 << 10 and found["blocks"] * found["chains"] >= min(chains, 1)
    assert (found["memory_bytes"] > 0) == (not found["shared"])


@pytest.mark.parametrize("shared", [0, 20_000, 163 << 10, 227 << 10])
@pytest.mark.parametrize("chains", [1, 64, 1024, 1_000_000])
def test_a_launch_never_asks_for_more_than_there_is(shared, chains):
    for size, widths in ((8, (64, 64)), (128, (256, 256)), (32, None), (700, (32,))):
        found = plan_of(size, widths, sms=108, shared=shared).choose(chains)
        assert 0 <= found["shared_bytes"] <= shared and 0 < found["blocks"] <= 1 << 30, found


def test_what_the_engine_cannot_take_is_named(host, monkeypatch):
    family = ef.Family(seeded(lambda: E.MLP(2, (4,), condition_dim=1)), "f")
    options = dict(n=2, sampler=STEP, steps=1, engine="chain")
    many = ef.all_of([family[ef.Slot(f"c{k}")] for k in range(17)])
    with pytest.raises(ValueError, match="17 slots, the CUDA chain engine takes 16"):
        ef.sample(many, shape=(2,), conditions={f"c{k}": torch.zeros(2, 1) for k in range(17)}, **options)
    monkeypatch.setattr(cuda_chain, "MOST_MEMORY", 1 << 20)
    with pytest.raises(ValueError, match=r"would need \d+ MiB of scratch memory"):
        ef.sample(concept(lambda: perceptron(2, 60000, 1)), shape=(2,), **options)
    with pytest.raises(ValueError, match="its weight is float32 on meta"):
        ef.sample(ef.Concept(perceptron(2, 4, 1).to("meta"), name="m"), shape=(2,), device="cpu", **options)
    assert cuda_chain.CHAINS["cuda"] is cuda_chain.DeviceChain


def test_samplers_that_accept_or_reject_go_to_the_step_engine(host):
    run = ef.prepare(concept(E.DoubleWell), ef.MALA(0.1), shape=(2,), steps=2)
    assert run(3, 0).report.engine == "step"
    assert "engine       step, the CUDA chain engine takes the steps of Langevin dynamics only" in run.explain()
    with pytest.raises(ValueError, match="the CUDA chain engine takes the steps of Langevin dynamics only"):
        ef.sample(concept(E.DoubleWell), n=3, shape=(2,), sampler=ef.MALA(0.1), steps=2, engine="chain")


@pytest.mark.skipif(core.build_info()["cuda"], reason="this build has CUDA kernels")
def test_a_build_without_cuda_says_so():
    plan = plan_of(3, None)
    with pytest.raises(RuntimeError, match="this build has no CUDA kernels"):
        plan.prepare(0, 0)
    with pytest.raises(RuntimeError, match="this build has no CUDA kernels"):
        core.cuda_limits(0)


def test_explain_speaks_of_the_device(monkeypatch):
    """Of an engine that this machine has not: what it would say."""
    gpu, e, asked = torch.device("cuda", 1), concept(E.DoubleWell), []

    class Elsewhere(cuda_chain.DeviceChain):
        def __init__(self, expression, shape, compute_dtype=None, *, device, **options):
            asked.append((device, tuple(shape), compute_dtype))
            if shape[0] > 9:
                raise cuda_chain.NotNative("chains of more than 9 numbers")

    monkeypatch.setitem(cuda_chain.CHAINS, "cuda", Elsewhere)
    monkeypatch.setitem(backends._REASONS, "cuda", lambda: None)
    plan = Plan(e, torch.bfloat16)
    assert 'chain engine yes, on cuda:1 with backend="cuda": every leaf' in plan.explain((3,), gpu)
    assert "chain engine no: chains of more than 9 numbers" in plan.explain((12,), gpu)
    assert asked == [(gpu, (3,), torch.bfloat16), (gpu, (12,), torch.bfloat16)]
    monkeypatch.setitem(backends._REASONS, "cuda", lambda: "no GPU here")
    assert "chain engine no: no GPU here" in plan.explain((3,), gpu)
    assert "chain engine yes, on the CPU" in Plan(e).explain((3,))
    net = ef.Concept(perceptron(2, 4, 1).to("meta"), name="m")
    assert "chain engine no: it runs on CPUs and NVIDIA GPUs, this is meta" in net.explain()


def test_the_report_names_the_gpu_and_what_is_rounded_to_tf32(monkeypatch, tf32):
    report = ef.sample(concept(E.Harmonic), n=2, shape=(2,), sampler=STEP, steps=1, seed=0).report
    assert report.gpu is None and report.tf32 == () and "TF32" not in str(report)
    gpu, capability = torch.device("cuda", 0), [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X")
    assert cuda_chain.tf32_products(gpu) == ("matmul", "conv") and cuda_chain.tf32_products(gpu, "chain") == ("matmul",)
    run = ef.prepare(concept(E.Harmonic), STEP, shape=(2,), steps=1)
    facts = dict(backend="cuda", info={}, engine="chain", dtype=torch.float32, seed=0, first_chain=0, chains=2, steps=1, batch=2,
                 seconds=1.0, coefficients=STEP.coefficients(run.plan.expression, 1), faults=())
    assert "cuda (chain engine, cuda:0, NVIDIA X, TF32 in matmul)" in str(run.describe(device=gpu, **facts))
    torch.set_float32_matmul_precision("highest")
    assert cuda_chain.tf32_products(gpu) == ("conv",) and cuda_chain.tf32_products(gpu, "chain") == ()
    capability[0] = (7, 5)
    assert cuda_chain.tf32_products(gpu) == ()


def test_registers_are_on_record():
    """`python -m bench.cuda_registers` wrote them: every kernel of csrc/cuda for both architectures, without a spill;
    but for one register, stored once and loaded three times, of one whose scratch is in global memory anyway."""
    rows = json.loads(cuda_registers.RESULTS.read_text())["kernels"]
    names = {name for source in cuda_registers.SOURCES for name in cuda_registers.kernels(source)}
    for architecture in cuda_registers.ARCHITECTURES:
        found = [row for row in rows if row["architecture"] == architecture]
        assert {row["kernel"].split("<")[0] for row in found} == names
        assert all(row["spills"] <= 16 * (row["kernel"] == "chain_blocks<8, 0>") and row["registers"] <= 255 for row in found)


# From here on a GPU is needed: EBMFAST_REQUIRE=cuda turns a skip into a failure.


def on_gpu(expr_of, tolerance=on_cpu.TOLERANCE, conditions=None, **options):
    """The chain engine on a GPU against the reference on the CPU, from the same start."""
    backend = require_backend("cuda")
    options = dict(sampler=STEP, steps=4, seed=5) | options
    theirs = ef.sample(expr_of("cpu"), backend="reference", conditions=conditions, **options)
    there = {k: v.to(backend.home) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    moved = conditions and {k: v.to(backend.home) for k, v in conditions.items()}
    ours = ef.sample(expr_of(backend.home), backend="cuda", engine="chain", device=backend.home, conditions=moved, **there)
    assert ours.report.engine == "chain" and ours.x.device.type == "cuda"
    torch.testing.assert_close(ours.x.cpu(), theirs.x, **tolerance)
    scale = 1 + theirs.leaf_energies.abs().max().item()
    torch.testing.assert_close(ours.leaf_energies.cpu() / scale, theirs.leaf_energies / scale, **tolerance)
    return ours


def moved_to(device, expr):
    for leaf in expr.leaves:
        if isinstance(leaf.source.model, nn.Module):
            leaf.source.model.to(device)
    return expr


@pytest.mark.parametrize("name", UNITS)
def test_every_native_energy_on_a_gpu(name):
    make, shape = UNITS[name]
    on_gpu(lambda device: moved_to(device, concept(make)), n=210, shape=shape, init="normal")


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(("make", "shape"), [(tree, (3,)), (wells, (9,))], ids=["block", "registers"])
def test_every_option_on_a_gpu(name, make, shape):
    on_gpu(lambda device: moved_to(device, make()), n=210, shape=shape, sampler=SAMPLERS[name], init="normal")


@pytest.mark.parametrize("n", [1, 64, 5000])
def test_wide_layers_on_a_gpu(n):
    """Weights in shared memory and not, and blocks of every size."""
    for widths in ((64, 64), (256, 256), (700,)):

        def pair(device, widths=widths):
            a, b = (concept(lambda: perceptron(32, *widths, 1), k, name=str(k)) for k in range(2))
            return moved_to(device, a & b)

        on_gpu(pair, n=n, shape=(32,), init="normal")


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_tensor_cores_on_a_gpu(precision, host, request):
    """Against the same rounding on the host: sums are float32 in both, in another order within a fragment."""
    backend = require_backend("cuda")
    if precision == "tf32":
        request.getfixturevalue("tf32")
    options = dict(n=300, shape=(19,), sampler=STEP, steps=5, seed=0, engine="chain", init="normal")
    options["compute_dtype"] = torch.bfloat16 if precision == "bf16" else None
    e = concept(lambda: perceptron(19, 72, 130, 1))
    theirs = ef.sample(e, **options)
    ours = ef.sample(moved_to(backend.home, e), backend="cuda", device=backend.home, **options)
    torch.testing.assert_close(ours.x.cpu(), theirs.x, rtol=1e-4, atol=1e-4)


def test_conditions_masks_and_faults_on_a_gpu():
    rows = torch.randn(210, 3, generator=torch.Generator().manual_seed(1))
    frozen = torch.rand(210, 2, generator=torch.Generator().manual_seed(2)) < 0.3

    def conditioned(device):
        nets = [seeded(lambda c=c: E.MLP(2, (16, 11), "silu", 3, c)) for c in ("concat", "add", "film")]
        families = [ef.Family(net, f"f{k}") for k, net in enumerate(nets)]
        return moved_to(device, families[0][ef.Slot("c")] & (families[1][ef.Slot("c")] | families[2](0.1, 0.2, 0.3)))

    on_gpu(conditioned, n=210, shape=(2,), conditions={"c": rows}, frozen_mask=frozen, init="normal")
    found = []
    for device, options in (("cpu", {}), ("cuda", {"backend": "cuda"})):
        with pytest.raises(ef.NonFiniteError) as error:
            ef.sample(moved_to(device, on_cpu.steep()), x=on_cpu.outliers().to(device), sampler=on_cpu.RARE, steps=60, seed=0,
                      engine="chain", **options)
        found.append([(f.chain, f.step, f.leaf) for f in error.value.faults])
    assert found[0] == found[1]


def test_bits_on_a_gpu_depend_on_neither_batch_nor_stream():
    backend = require_backend("cuda")
    expr = moved_to(backend.home, tree())
    run = ef.prepare(expr, STEP, shape=(3,), steps=50, backend="cuda", engine="chain", device=backend.home)
    whole = run(3000, 2).x
    assert same_bits(run(3000, 2).x, whole) and same_bits(run(70, 2, first_chain=1001).x, whole[1001:1071])
    with torch.cuda.stream(torch.cuda.Stream()):
        other = run(3000, 2).x
    torch.cuda.synchronize()
    assert same_bits(other, whole)


def test_errors_on_a_gpu_name_the_kernel_and_leave_the_process_usable(monkeypatch):
    backend = require_backend("cuda")
    options = dict(n=9, shape=(3,), sampler=STEP, steps=2, seed=0, device=backend.home, backend="cuda", engine="chain")
    net = seeded(lambda: perceptron(3, 400, 1)).to(backend.home)
    expr, limits = ef.all_of([ef.Concept(copy.deepcopy(net), name=str(k)) for k in range(40)]), core.cuda_limits
    expected = ef.sample(expr, **options).x
    monkeypatch.setattr(core, "cuda_limits", lambda device: (limits(device)[0], 1 << 20))
    with pytest.raises(RuntimeError, match=r"chain kernel chain_blocks<\d+>: invalid argument"):
        ef.sample(expr, **options)
    monkeypatch.undo()
    assert same_bits(ef.sample(expr, **options).x, expected)


def test_noise_on_a_gpu_is_that_of_the_contract():
    x = torch.zeros(300, 7, device=require_backend("cuda").home)
    noise = ef.Langevin(drift=0.0, noise=1.0)
    ours = ef.sample(concept(E.Harmonic), x=x, sampler=noise, steps=2, seed=9, backend="cuda", engine="chain").x
    assert same_bits(ours.cpu(), sum(ef.rng.normal((7,), 300, seed=9, step=t) for t in (0, 1)))
