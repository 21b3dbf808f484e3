"""What only a GPU can show. `bench/gpu tests` runs these with EBMFAST_REQUIRE=cpu,triton,cuda."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from conftest import REQUIRED, require_backend, same_bits
from models import ConditionalQuadratic, Net, NoisedGaussian, gaussian
from torch import nn

import ebmfast as ef
from ebmfast import backends, capture, reference, rng

if backends.home("triton") == "cpu":
    pytest.skip("TRITON_INTERPRET=1 keeps off the GPU", allow_module_level=True)
if not torch.cuda.is_available() and not {"triton", "cuda"} & REQUIRED:
    pytest.skip("torch finds no CUDA device", allow_module_level=True)

GPU = torch.device("cuda:0")
LANGEVIN = ef.Langevin(step_size=0.05)
BACKENDS = ["triton", "cuda"]


@pytest.fixture(autouse=True)
def clean():
    """An error of an earlier kernel belongs to the test that made it."""
    yield
    torch.cuda.synchronize()


def nets(count=3, dim=3, width=16):
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(dim, width), nn.SiLU(), nn.Linear(width, 1)).to(GPU) for _ in range(count)]


def both(e, sampler=LANGEVIN, steps=37, call=None, shape=(3,), **options):
    """Captured and not captured, equal bit for bit: the same kernels in the same order."""
    steps = None if isinstance(sampler, ef.Annealed) else steps
    call = call or {"n": 33, "seed": 1}
    options = {"backend": "triton", "engine": "step", "device": GPU, "stack_models": False} | options
    got, expected = (ef.prepare(e, sampler, shape=shape, steps=steps, capture=c, **options)(**call) for c in (True, False))
    assert got.report.captured, got.report.uncaptured
    assert not expected.report.captured
    assert same_bits(got.x.cpu(), expected.x.cpu())
    return got


# kernels against the specification


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 1), (257, 1), (33, 12), (5, 1021), (3, 3, 64, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step(name, shape, dtype):
    backend, generator = require_backend(name), torch.Generator().manual_seed(0)
    x, gradients = torch.randn(shape, generator=generator), torch.randn(3, *shape, generator=generator).to(dtype)
    mask, faults = torch.rand(shape, generator=generator) < 0.2, torch.zeros(shape[0], dtype=torch.int64)
    gradients[1].view(-1)[-1] = torch.nan
    weights, y, seen = torch.randn(3, shape[0], generator=generator), x.clone().to(GPU), faults.clone().to(GPU)
    options = {"clamp": (-2.0, 2.0), "grad_clip_value": 1.5, "grad_clip_norm": 2.0, "seed": 2**64 - 1, "first_chain": 2**60 - 300}
    for step in (0, 2**32 - 1):
        reference.langevin_step(x, gradients, weights, 0.1, 0.3, step=step, frozen_mask=mask, faults=faults, **options)
        backend.step(y, gradients.to(GPU), weights.to(GPU), 0.1, 0.3, step=step, frozen_mask=mask.to(GPU), faults=seen, **options)
        assert same_bits(y.cpu(), x) and seen.tolist() == faults.tolist()


@pytest.mark.parametrize("name", BACKENDS)
def test_noise(name):
    backend = require_backend(name)
    call = {"seed": 2**63 + 5, "step": 9, "first_chain": 2**40}
    assert same_bits(backend.normal((3, 1021), 70, device=GPU, **call).cpu(), rng.normal((3, 1021), 70, **call))
    assert same_bits(backend.uniform((3, 1021), 70, device=GPU, **call).cpu(), rng.uniform((3, 1021), 70, **call))


def test_a_million_elements_and_offsets_beyond_32_bits():
    """x of more than 2^31 elements: the last chain is where it belongs."""
    backend = require_backend("triton")
    if torch.cuda.mem_get_info(GPU)[0] < 12 << 30:
        pytest.skip("needs 12 GiB of GPU memory")
    chains = (1 << 31) // 4096 + 3
    x = torch.zeros(chains, 4096, device=GPU)
    backend.step(x, [], None, 0.0, 1.0, seed=1, step=2)
    assert same_bits(x[-2:].cpu(), rng.normal((4096,), 2, seed=1, step=2, first_chain=chains - 2))


# captured steps


@pytest.mark.parametrize("sampler", [
    LANGEVIN, ef.Langevin(drift=0.05, noise=0.1, noise_first=True, clamp=(-1, 1)), ef.Langevin(step_size=0.05, grad_clip_norm=0.5),
    ef.Langevin(step_size=lambda t: 0.1 / (1 + t))], ids=repr)
def test_captured_equals_not_captured(sampler):
    a, b, c = (ef.Concept(m, name=f"n{i}", reduce="sum") for i, m in enumerate(nets()))
    quadratic = ef.Concept(lambda x: x.square().sum(1), name="q")
    both(a & b & c & quadratic, sampler)
    both((a & ~b & quadratic) | (c & quadratic), sampler)


@pytest.mark.parametrize("sampler", [
    ef.MALA(0.05, warmup=ef.DualAveraging(10)), ef.HMC(0.1, n_leapfrog_steps=3), ef.BAOAB(0.1),
    ef.Annealed([1.0, 0.5], 5, inner=ef.MALA)], ids=repr)
def test_gradients_of_other_samplers_are_replayed(sampler):
    a, b, c = (ef.Concept(m, name=f"n{i}", reduce="sum") for i, m in enumerate(nets()))
    quadratic = ef.Concept(lambda x: x.square().sum(1), name="q")
    got = both((a & b & quadratic) | (c & quadratic), sampler)
    assert got.acceptance is None or got.acceptance.mean() > 0


def test_seeds_shards_tails_and_conditions():
    f = ef.Family(Net().to(GPU), "f", condition_dim=3)
    e = f[ef.Slot("c")] & 0.5 * f([1.0, 0.0, 2.0])
    options = {"shape": (5,), "steps": 19, "backend": "triton", "device": GPU, "batch_size": 8}
    run, plain = (ef.prepare(e, LANGEVIN, capture=c, **options) for c in (True, False))
    seen = []
    for seed, first, n in ((1, 0, 21), (2, 0, 21), (1, 7, 21), (1, 0, 13), (1, 0, 21)):
        rows = torch.randn(n, 3, generator=torch.Generator().manual_seed(n + first))
        got, expected = (r(conditions={"c": rows}, seed=seed, first_chain=first) for r in (run, plain))
        assert got.report.captured and same_bits(got.x.cpu(), expected.x.cpu())
        seen.append(got.x)
    assert same_bits(seen[0], seen[-1]) and not torch.equal(seen[0], seen[1])
    half = run(conditions={"c": rows}, seed=1, steps=8)
    assert same_bits(run(resume=half.state, steps=11).x.cpu(), seen[-1].cpu())


def test_a_training_loop_sees_its_weights():
    net = nets(1)[0]
    e = ef.Concept(net) & ef.Concept(lambda x: x.square().sum(1), name="q")
    run = ef.prepare(e, LANGEVIN, shape=(3,), steps=20, backend="triton", device=GPU)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for step in range(3):
        got = run(n=64, seed=step)
        expected = ef.prepare(e, LANGEVIN, shape=(3,), steps=20, backend="triton", device=GPU, capture=False)(n=64, seed=step)
        assert got.report.captured and same_bits(got.x.cpu(), expected.x.cpu())
        optimizer.zero_grad()
        net(got.x).mean().backward()
        optimizer.step()
    assert run.captures.recorded == 1
    net[0].weight.data = net[0].weight.data.clone()
    run(n=64, seed=1)
    assert run.captures.recorded == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compute_dtype(dtype):
    a, b, _ = (ef.Concept(m, name=f"n{i}") for i, m in enumerate(nets()))
    got = both(a & b & ef.Concept(lambda x: x.square().sum(1), name="q"), compute_dtype=dtype)
    full = both(a & b & ef.Concept(lambda x: x.square().sum(1), name="q"))
    torch.testing.assert_close(got.x, full.x, rtol=0.1, atol=0.1)


def test_stacked_models():
    concepts = [ef.Concept(m, name=f"n{i}") for i, m in enumerate(nets())]
    both(ef.all_of([*concepts, ef.Concept(lambda x: x.square().sum(1), name="q")]), stack_models=True)


def test_noise_levels():
    g = ef.Family(NoisedGaussian(), "g")
    sampler = ef.Annealed.geometric(2.0, 0.1, 5, steps_per_level=3)
    for e in (g(0.5) | g(-0.5), ef.all_of([g(0.5), g(-0.5)], weights=[1.0, ef.AboveSigma(0.5)])):
        both(e, sampler, shape=(1,))


def test_the_zoo():
    shape, color, position = (  # copies: the models of the zoo are those of every test
        ef.zoo.family(ef.zoo.card(name), copy.deepcopy(ef.zoo.load(name)).to(GPU)) for name in ("shape", "color", "position"))
    e = shape("cube") & color("red") & ~position(0.5, 0.5)
    both(e, ef.Annealed.geometric(4.0, 0.06, 3, steps_per_level=3), call={"n": 4, "seed": 1}, shape=(3, 32, 32))


def test_masks_traces_and_callbacks():
    a = gaussian(0.0, 1.0, "a")
    a.source.model.to(GPU)
    x, mask = torch.randn(9, 3, device=GPU), torch.rand(9, 3, device=GPU) < 0.5
    got = both(a, call={"x": x, "frozen_mask": mask, "seed": 1, "trace": ef.Trace(5, states=True)})
    assert torch.equal(got.x[mask], x[mask]) and got.trace.x.shape[0] == 7
    seen = []
    both(a, steps=5, call={"n": 9, "seed": 1, "callback": lambda info: seen.append(info.x.clone())})
    assert all(same_bits(p.cpu(), q.cpu()) for p, q in zip(seen[:5], seen[5:], strict=True))


def test_tf32_follows_torch():
    net, before = nets(1, 64, 256)[0], torch.get_float32_matmul_precision()
    e = ef.Concept(net) & ef.Concept(lambda x: x.square().sum(1), name="q")
    run, found = ef.prepare(e, LANGEVIN, shape=(64,), steps=8, backend="triton", device=GPU), []
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            found.append(run(n=256, seed=1))
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(r.report.captured for r in found) and run.captures.recorded == 2
    if torch.cuda.get_device_capability(GPU) >= (8, 0):
        assert ["matmul" in r.report.tf32 for r in found] == [False, True] and "TF32 in matmul" in str(found[1].report)
    assert found[0].report.gpu == torch.cuda.get_device_name(GPU)


class Waits(nn.Module):
    """Asks the host."""

    def forward(self, x):
        return x.square().sum(1) * (1.0 if x.sum().item() > 1e9 else 2.0)


class Late(nn.Module):
    """Cannot be captured, which no operation shows beforehand."""

    def forward(self, x):
        torch.cuda.synchronize()
        return x.square().sum(1)


def test_what_cannot_be_captured_falls_back_and_leaves_the_process_usable():
    for model, reason in ((Waits(), "waits for a result on the host"), (Late(), "CUDA would not capture it")):
        run = ef.prepare(ef.Concept(model, name="m"), LANGEVIN, shape=(3,), steps=20, backend="triton", device=GPU)
        for seed in (1, 2):
            r = run(n=5, seed=seed)
            assert not r.report.captured and reason in r.report.uncaptured and reason in run.explain()
        torch.randn(10, device=GPU).sum().item()  # generators, allocator and streams work on
        gc.collect()
        torch.cuda.empty_cache()
        both(ef.Concept(lambda x: x.square().sum(1), name="q"))


def test_recordings_come_and_go():
    """More shapes than recordings are kept; memory does not grow with the calls."""
    run = ef.prepare(ef.Concept(nets(1)[0], name="n") & ef.Concept(lambda x: x.square().sum(1), name="q"), LANGEVIN, shape=(3,),
                     steps=9, backend="triton", device=GPU)
    reserved = []
    for _ in range(3):
        for n in range(1, 13):
            assert run(n=n, seed=1).report.captured
        gc.collect()
        reserved.append(torch.cuda.memory_reserved(GPU))
    assert reserved[2] <= 1.2 * reserved[1]


def test_graphs_that_go_take_nothing_from_the_others():
    """Of a recording that goes torch drops what cuBLAS had on its stream; the others must not have relied on it."""
    net = nets(1, 256, 512)[0]
    e = ef.Concept(net, name="n") & ef.Concept(lambda x: x.square().sum(1), name="q")
    runs = [ef.prepare(e, LANGEVIN, shape=(256,), steps=9, backend="triton", device=GPU, capture=c) for c in (True, False)]
    sizes = range(64, 64 + capture.KEPT + 2)
    for n in sizes:
        assert runs[0](n=n, seed=1).report.captured
    gc.collect()
    poison = [torch.full((1 << 20,), torch.nan, device=GPU) for _ in range(64)]  # where memory was let go of
    recorded = runs[0].captures.recorded
    for n in sizes[-3:]:
        got, expected = (run(n=n, seed=2) for run in runs)
        assert same_bits(got.x.cpu(), expected.x.cpu())
    assert runs[0].captures.recorded == recorded and all(bool(p.isnan().all()) for p in poison)


def test_no_step_waits_for_the_host():
    """Once recorded, steps are replayed without a synchronisation; each would raise."""
    from ebmfast.plan import Plan

    a, b, _ = (ef.Concept(m, name=f"n{i}") for i, m in enumerate(nets()))
    e, x = (a & b) | ef.Concept(lambda x: x.square().sum(1), name="q"), torch.randn(33, 3, device=GPU)
    run = ef.prepare(e, LANGEVIN, shape=(3,), steps=200, backend="triton", device=GPU)
    run(x=x, seed=1)
    backend, coefficients = backends.resolve("triton", GPU), LANGEVIN.coefficients(e, 200)
    plan = Plan(e)
    kernel = LANGEVIN.bind(plan.bind(x), backend, coefficients, 0, seed=1, first_chain=0, frozen_mask=None)
    kernel = run.captures.wrap(kernel, backend, GPU, watched=False, at_once=False)
    with torch.enable_grad():
        state = kernel.advance(kernel.init(x.clone()), 32)
        assert kernel.captured and not kernel.suspect(state)
        torch.cuda.set_sync_debug_mode("error")
        try:
            while state.step < 192:
                state = kernel.advance(state, state.step + kernel.stride)
                assert not kernel.suspect(state)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_faults():
    def cliff(x):
        return 0.5 * x.square().sum(1) / (x.abs() <= 1.5).all(1).float()

    e = ef.Concept(cliff, name="cliff")
    for policy in ("freeze", "restart"):
        r = both(e, ef.Langevin(step_size=0.2), steps=80, on_nonfinite=policy, energies=False)
        assert r.report.faults and {f.leaf for f in r.report.faults} == {"cliff"}
    with pytest.raises(ef.NonFiniteError, match="from the concept cliff"):
        ef.sample(e, n=33, shape=(3,), sampler=ef.Langevin(step_size=0.2), steps=200, seed=1, backend="triton", device=GPU)


# several devices, memory, errors


def test_two_devices():
    require_backend("triton")
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    f = ef.Family(Net().to(GPU), "f", condition_dim=3)
    options = {"sampler": LANGEVIN, "steps": 20, "seed": 1, "shape": (5,), "backend": "triton"}
    options["conditions"] = {"c": torch.randn(21, 3)}
    one = ef.sample(f[ef.Slot("c")], device=GPU, **options)
    two = ef.sample(f[ef.Slot("c")], device=["cuda:0", "cuda:1"], **options)
    torch.testing.assert_close(two.x, one.x, rtol=1e-5, atol=1e-5)  # batches of another size
    assert two.x.device == GPU and two.report.captured


def test_one_device_twice():
    require_backend("triton")
    e = ef.Concept(nets(1)[0], name="n") & ef.Concept(lambda x: x.square().sum(1), name="q")
    options = {"sampler": LANGEVIN, "steps": 20, "seed": 1, "n": 32, "shape": (3,), "backend": "triton", "batch_size": 8}
    one, two = (ef.sample(e, device=d, **options) for d in (GPU, [GPU, GPU]))
    assert same_bits(two.x.cpu(), one.x.cpu()) and two.report.captured


class Greedy(nn.Module):
    """Wants more memory than there is, above some batch size."""

    def forward(self, x):
        if len(x) > 8:
            torch.empty(1 << 60, dtype=torch.uint8, device=x.device)
        return x.square().sum(1)


def test_out_of_memory_halves_the_micro_batch():
    require_backend("triton")
    e = ef.Concept(Greedy(), name="greedy")
    options = {"n": 32, "shape": (3,), "steps": 20, "sampler": LANGEVIN, "seed": 1, "backend": "triton", "device": GPU}
    options["check"] = False
    with pytest.warns(UserWarning, match="out of memory"):
        got = ef.sample(e, batch_size=16, **options)
    assert got.report.micro_batch == 8 and same_bits(got.x.cpu(), ef.sample(e, batch_size=8, **options).x.cpu())
    assert got.report.captured, got.report.uncaptured


class GreedyLate(nn.Module):
    """Wants it when steps are captured."""

    def forward(self, x):
        energy = x.square().sum(1)  # torch warns of a graph in which nothing was launched
        if len(x) > 8 and torch.cuda.is_current_stream_capturing():
            torch.empty(1 << 60, dtype=torch.uint8, device=x.device)
        return energy


def test_out_of_memory_in_a_capture_lets_the_next_one_be():
    require_backend("triton")
    run = ef.prepare(ef.Concept(GreedyLate(), name="greedy"), LANGEVIN, shape=(3,), steps=20, backend="triton", device=GPU,
                     batch_size=16, check=False)
    first = run(n=8, seed=1)
    with pytest.warns(UserWarning, match="out of memory"):
        got = run(n=32, seed=1)
    assert first.report.captured and got.report.captured and got.report.micro_batch == 8, got.report.uncaptured
    assert same_bits(got.x[:8].cpu(), first.x.cpu())
    torch.randn(10, device=GPU).sum().item()


@pytest.mark.parametrize("name", BACKENDS)
def test_bad_input_gets_the_errors_of_the_cpu(name):
    backend = require_backend(name)
    x, gradients, weights = torch.zeros(2, 3, device=GPU), torch.zeros(1, 2, 3, device=GPU), torch.ones(1, device=GPU)
    for change, message in (({"x": x.cpu()}, "`x` must be a tensor that backend"), ({"x": x.double()}, "`x` must be float32"),
                            ({"gradients": gradients.cpu()}, "`gradients` must be float32 on cuda:0"),
                            ({"weights": torch.ones(2, device=GPU)}, r"`weights` must be of shape \[1\]")):
        call = {"x": x, "gradients": gradients, "weights": weights} | change
        with pytest.raises(ValueError, match=message):
            backend.step(**call, drift=0.1, noise=0.1, seed=0, step=0)


def test_errors_of_a_model_name_it():
    f = ef.Family(ConditionalQuadratic(), "f", condition_dim=3)
    with pytest.raises(RuntimeError) as caught:
        ef.sample(f([1.0, 2.0, 3.0]), n=4, shape=(5,), sampler=LANGEVIN, steps=9, seed=1, backend="triton", device=GPU)
    assert any("while evaluating f(1, 2, 3)" in note for note in caught.value.__notes__)


# the chain engine


def test_chain_engine_agrees_with_the_reference():
    """Everything that the CPU's chain engine runs; `backend="cuda"` has to."""
    require_backend("cuda")
    torch.manual_seed(0)
    mlps = [ef.energies.MLP(3, (16, 16)).to(GPU).requires_grad_(False) for _ in range(2)]
    e = (ef.Concept(mlps[0], name="a") & 0.5 * ef.Concept(mlps[1], name="b")) & ef.Concept(
        ef.energies.Gaussian(torch.zeros(3)).to(GPU), name="g")
    options = {"n": 300, "shape": (3,), "steps": 25, "sampler": LANGEVIN, "seed": 1, "device": GPU}
    expected = ef.sample(e, backend="reference", **options)
    try:
        got = ef.sample(e, backend="cuda", engine="chain", **options)
    except ValueError as error:
        if "chain" not in str(error):
            raise
        pytest.skip(f"the chain engine does not run on a GPU yet: {error}")
    assert got.report.engine == "chain" and 'chain engine yes, on cuda:0 with backend="cuda"' in e.explain()
    torch.testing.assert_close(got.x, expected.x, rtol=1e-4, atol=1e-4)
