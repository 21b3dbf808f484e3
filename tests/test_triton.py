"""The Triton kernels, twice: in the interpreter (``TRITON_INTERPRET=1``, or on a GPU) for their bits, and compiled ahead of time
for what only compiled code shows. `make test` runs both; test_step, test_rng and test_accept hold more of their parity."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import REQUIRED, require_backend, same_bits

from ebmfast import backends, doctor, reference, rng
from ebmfast.program import Program
from ebmfast.weights import AboveSigma

MISSING = importlib.util.find_spec("triton") is None
INTERPRETED = not MISSING and backends.home("triton") == "cpu"
if MISSING and "triton" not in REQUIRED:
    pytest.skip("triton is not installed", allow_module_level=True)

runs = pytest.mark.skipif(
    backends.available()["triton"] is not None and "triton" not in REQUIRED, reason="needs TRITON_INTERPRET=1 or a GPU"
)
compiles = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 compiles nothing")
HOME = backends.home("triton")

# (E_0 OR (E_1 + 0.5 E_2)) + 2 E_3, and other shapes of a tree.
PROGRAMS = {
    "leaf": Program(((0, 0),), (), 1),
    "sum": Program(((0, 0), (0, 1), (0, 2), (1, 3)), (1.0, -0.3, 2.5), 3),
    "or": Program(((0, 0), (0, 1), (2, 2)), (1.0, 0.0, 0.0), 2),
    "sharp or with weights": Program(((0, 2), (0, 0), (0, 1), (2, 3)), (3.0, -0.1, 0.7, -2.0), 3),
    "or of one": Program(((0, 0), (2, 1)), (2.0, 0.5), 1),
    "nested": Program(((0, 0), (0, 1), (0, 2), (1, 2), (2, 2), (0, 3), (1, 2)), (1.0, 0.5, 1.0, 0.0, -0.5, 1.0, 2.0), 4),
    "or in or, a leaf twice": Program(
        ((0, 0), (0, 1), (2, 2), (0, 0), (0, 2), (1, 2), (2, 2)), (1.0, 0.1, -0.2, 0.5, -0.25, 0.8, 0.0, 0.0), 3
    ),
    "empty sum": Program(((0, 0), (1, 0), (1, 2)), (2.0, 1.0), 1),
    "schedule": Program(((0, 0), (0, 1), (1, 2)), (1.0, AboveSigma(0.5)), 2),
}


@runs
@pytest.mark.parametrize("batch", [1, 127, 300])
@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS.keys())
def test_program(program, batch):
    """Sums alone: the same bits. With an OR: exp and log differ by some ulp, and weights are at most of order 1."""
    from ebmfast.kernels.program import ProgramPlan

    for sigma in (0.2, 1.0):
        for scale in (3.0, 1e4):  # 1e4: exp(-E) alone is 0
            energies = torch.randn(program.n_leaves, batch, generator=torch.Generator().manual_seed(0)) * scale
            total, weights = torch.empty(batch, device=HOME), torch.empty(program.n_leaves, batch, device=HOME)
            ProgramPlan(program, HOME, sigma)(energies.to(HOME), total, weights)
            expected = program.evaluate(energies, sigma)
            slopes = torch.stack([torch.as_tensor(w).expand(batch) for w in program.weights(energies, sigma)]).float()
            if program.has_or:
                torch.testing.assert_close(total.cpu(), expected, rtol=2e-6, atol=2e-6)
                torch.testing.assert_close(weights.cpu(), slopes, rtol=1e-5 * scale, atol=1e-6)
            else:
                assert same_bits(total.cpu() + 0.0, expected + 0.0) and same_bits(weights.cpu() + 0.0, slopes + 0.0)


@runs
def test_program_weights_are_the_gradient():
    """Independent of Program.weights: autograd through Program.evaluate."""
    from ebmfast.kernels.program import ProgramPlan

    for program in PROGRAMS.values():
        energies = torch.randn(program.n_leaves, 50, dtype=torch.float64, requires_grad=True)
        (expected,) = torch.autograd.grad(program.evaluate(energies, 1.0).sum(), energies)
        total, weights = torch.empty(50, device=HOME), torch.empty(program.n_leaves, 50, device=HOME)
        ProgramPlan(program, HOME, 1.0)(energies.detach().float().to(HOME), total, weights)
        torch.testing.assert_close(weights.cpu().double(), expected, rtol=2e-6, atol=2e-6)


@runs
def test_an_impossible_branch_has_no_weight():
    from ebmfast.kernels.program import ProgramPlan

    energies = torch.tensor([[1.0, torch.inf, torch.inf], [torch.inf, 2.0, torch.inf]])
    total, weights = torch.empty(3, device=HOME), torch.empty(2, 3, device=HOME)
    ProgramPlan(PROGRAMS["or"], HOME)(energies.to(HOME), total, weights)
    assert total.tolist() == PROGRAMS["or"].evaluate(energies).tolist() == [1.0, 2.0, torch.inf]
    assert weights[:, :2].tolist() == [[1.0, 0.0], [0.0, 1.0]]


SHAPES = [(1, 1), (2, 3), (257, 1), (300, 2), (33, 12), (5, 19), (3, 1021), (2, 1028), (2, 4099)]


def test_tiles_cover_every_element_once():
    from ebmfast.kernels import blocks

    for batch, size in [*SHAPES, (1, 12288), (64, 12288), (4096, 8)]:
        rows, columns, programs = blocks.tile(batch, size)
        assert rows * columns == blocks.BLOCKS and rows & (rows - 1) == 0
        tiles = -(-size // (4 * columns))
        seen = torch.zeros(batch + rows, size + 4 * columns, dtype=torch.int32)
        for p in range(programs):
            row, element = p // tiles * rows, p % tiles * 4 * columns
            assert row < batch and element < size, "a program with nothing to do"
            seen[row : row + rows, element : element + 4 * columns] += 1
        assert (seen[:batch, :size] == 1).all()
    assert blocks.tile(0, 4).programs == blocks.tile(4, 0).programs == 0
    assert blocks.tile(64, 12288) == (1, 256, 768), "long chains: whole tiles along the chain"
    assert blocks.tile(4096, 8) == (128, 2, 32), "short chains share a tile"


@runs
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_write_every_element_once_and_nothing_else(shape):
    from ebmfast.kernels.accept import accept
    from ebmfast.kernels.fill import fill

    backend, n, pad = require_backend("triton"), shape[0] * shape[1], 4096

    def guarded():
        whole = torch.full((n + 2 * pad,), 7.0, device=HOME)
        return whole, whole[pad : pad + n].view(shape)

    def untouched(whole):
        return (whole[:pad] == 7).all() and (whole[pad + n :] == 7).all()

    whole, x = guarded()
    backend.step(x, -torch.ones((1, *shape), device=HOME), torch.ones(1, device=HOME), 1.0, 0.0, seed=0, step=0)
    assert (x == 8).all() and untouched(whole)
    accept(x, torch.ones_like(x), torch.zeros(shape[0], device=HOME), torch.zeros(shape[0], dtype=torch.bool, device=HOME),
           seed=0, step=0, first_chain=0)  # fmt: skip
    assert (x == 1).all() and untouched(whole)
    fill(x, uniform=True, seed=0, step=0, stream=0, first_chain=0, first_element=0)
    assert ((x > 0) & (x < 1)).all() and untouched(whole)


@runs
@pytest.mark.parametrize("size", [1, 1023, 1024, 1025, 2**31 - 1025, 2**31 - 1024, 2**31 - 1, 2**31, 2**34])
def test_pieces_of_sizes_around_what_32_bits_hold(size):
    from ebmfast.kernels.launch import launch
    from triton_words import pieces_of

    out = torch.zeros(1, dtype=torch.int64, device=HOME)
    launch(pieces_of, 1, out.device, out=out, size=size, WIDTH=1024)
    assert out.item() == -(-size // 1024)


@runs
@pytest.mark.parametrize("k", [0, 1, 2, 17])
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_number_of_gradients(k, noise):
    """-0 keeps its sign without noise: the specification adds no 0 z."""
    backend = require_backend("triton")
    generator = torch.Generator().manual_seed(0)
    x, gradients = torch.randn(5, 3, generator=generator), torch.randn(k, 5, 3, generator=generator)
    x[0] = -0.0
    weights = torch.randn(k, 5, generator=generator) if k else None
    expected, stacked, listed = x.clone(), x.clone().to(HOME), x.clone().to(HOME)
    call = {"seed": 2**64 - 1, "step": 2**32 - 1, "first_chain": 2**60 - 5, "stream": 15}
    reference.langevin_step(expected, gradients, weights, 0.0 if k else 0.1, noise, **call)
    on_device = None if weights is None else weights.to(HOME)
    backend.step(stacked, gradients.to(HOME), on_device, 0.0 if k else 0.1, noise, **call)
    backend.step(listed, [g.clone().to(HOME) for g in gradients], on_device, 0.0 if k else 0.1, noise, **call)
    assert same_bits(stacked.cpu(), expected) and same_bits(listed.cpu(), expected)


@runs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_gradients(dtype):
    """Subnormal, greatest and non-finite values too."""
    backend = require_backend("triton")
    info = torch.finfo(dtype)
    values = [info.max, info.min, info.tiny, info.tiny / 4, info.smallest_normal, 0.0, -0.0, 1.5, torch.inf, torch.nan]
    gradients = torch.tensor([values, values[::-1]]).to(dtype)[None].contiguous()
    x, weights = torch.ones(2, len(values)), torch.tensor([0.5])
    y, faults, expected = x.clone().to(HOME), torch.zeros(2, dtype=torch.int64, device=HOME), torch.zeros(2, dtype=torch.int64)
    reference.langevin_step(x, gradients, weights, 0.5, 0.25, seed=1, step=6, faults=expected)
    backend.step(y, gradients.to(HOME), weights.to(HOME), 0.5, 0.25, seed=1, step=6, faults=faults)
    assert same_bits(y.cpu(), x) and faults.tolist() == expected.tolist() == [7 << 16 | 1] * 2


@runs
def test_blame_looks_at_every_tile_and_only_at_moving_elements():
    backend = require_backend("triton")
    x, gradients, weights = torch.zeros(6, 4099), torch.zeros(3, 6, 4099), torch.ones(3)
    mask = torch.zeros(6, 4099, dtype=torch.bool)
    gradients[2, 0, 4098] = torch.nan  # the last tile
    gradients[1, 1, 4000] = gradients[2, 1, 0] = torch.inf  # the first gradient, not the first element
    gradients[0, 2, 5] = gradients[2, 2, 6] = torch.nan
    mask[2, 5] = True  # frozen: gradient 0 is not to blame
    gradients[0, 3, 7] = torch.nan
    mask[3, 7] = True
    x[4, 9] = torch.inf  # no gradient to blame
    faults = torch.zeros(6, dtype=torch.int64)
    expected_x, expected = x.clone(), faults.clone()
    reference.langevin_step(expected_x, gradients, weights, 0.1, 0.3, seed=1, step=2, frozen_mask=mask, faults=expected)
    x, faults = x.to(HOME), faults.to(HOME)
    plan = backend.prepare(x, n_gradients=3, seed=1, frozen_mask=mask.to(HOME), faults=faults)
    plan(gradients.to(HOME), weights.to(HOME), 0.1, 0.3, 2)
    assert faults.tolist() == expected.tolist() == [3 << 16 | 3, 3 << 16 | 2, 3 << 16 | 3, 0, 3 << 16, 0]
    assert same_bits(x.cpu(), expected_x)
    faults.zero_()
    plan(torch.zeros(3, 6, 4099, device=HOME), weights.to(HOME), 0.1, 0.3, 3)
    assert faults.tolist() == [0, 0, 0, 0, 4 << 16, 0], "marks of the step before are gone"


@runs
def test_a_captured_step_reads_everything_from_device_memory():
    """What a captured graph replays: the same launches read a clock that moves, and that names seed and first chain. Schedules
    start at the clock's `start`; after its end a schedule holds its last entry."""
    from ebmfast.kernels.step import clock

    backend = require_backend("triton")
    generator = torch.Generator().manual_seed(0)
    x, gradients, weights = torch.randn(4, 9, generator=generator), torch.randn(2, 4, 9, generator=generator), torch.ones(2)
    gradients[1, 3, 3] = torch.nan
    y, faults, expected = x.clone().to(HOME), torch.zeros(4, dtype=torch.int64, device=HOME), torch.zeros(4, dtype=torch.int64)
    drift, noise = torch.tensor([0.1, 0.2, 0.05]), torch.tensor([0.3, 0.0, 0.1])
    plan = backend.prepare(y, n_gradients=2, seed=7, first_chain=1, faults=faults, grad_clip_norm=1.0)
    start, now = 2**32 - 6, torch.zeros(4, dtype=torch.int64, device=HOME)
    for seed, first in ((3, 0), (2**64 - 2, 2**60 - 4)):
        now.copy_(clock(start, start, seed, first))
        for i in range(5):
            last = min(i, 2)
            reference.langevin_step(
                x, gradients, weights, float(drift[last]), float(noise[last]), seed=seed, first_chain=first, step=start + i,
                faults=expected, grad_clip_norm=1.0,
            )  # fmt: skip
            plan(gradients.to(HOME), weights.to(HOME), drift.to(HOME), noise.to(HOME), now)
            now[:1] += 1
            assert same_bits(y.cpu(), x) and faults.tolist() == expected.tolist()
    for bad, message in (
        ((drift, noise, now.int()), "`step` must be int64"),
        ((drift, noise, now[:1]), r"`step` must be of shape \[4\]"),
        ((drift.double(), noise, now), "`drift` must be float32"),
        ((drift, noise[:1], now), r"`noise` must be of shape \[3\]"),
        ((drift[:0], noise[:0], now), "`drift` must be of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            plan(gradients.to(HOME), weights.to(HOME), *(t.to(HOME) for t in bad))


@runs
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gradients": torch.zeros(1, 2, 4)}, r"`gradients` must be of shape \[1, 2, 3\], got \[1, 2, 4\]"),
        ({"gradients": [torch.zeros(3, 2).T]}, r"`gradients\[0\]` must be contiguous"),
        ({"weights": torch.ones(2)}, r"`weights` must be of shape \[1\], got \[2\]"),
        ({"step": 2**32}, r"`step` must be in \[0, 2\^32\), got 4294967296"),
        ({"x": torch.zeros(2, 3).double()}, "`x` must be float32"),
    ],
)
def test_errors(change, message):
    call = {"x": torch.zeros(2, 3), "gradients": torch.zeros(1, 2, 3), "weights": torch.ones(1)} | change
    call = {k: [g.to(HOME) for g in v] if isinstance(v, list) else v.to(HOME) if torch.is_tensor(v) else v for k, v in call.items()}
    with pytest.raises(ValueError, match=message):
        require_backend("triton").step(**({"drift": 0.1, "noise": 0.1, "seed": 0, "step": 0} | call))


@runs
def test_info_says_how_it_runs():
    assert require_backend("triton").info() == {
        "backend": "triton", "triton": sys.modules["triton"].__version__, "interpreted": INTERPRETED
    }  # fmt: skip


@runs
def test_the_doctor_notices_a_wrong_kernel(monkeypatch):
    from ebmfast.kernels import step

    out = io.StringIO()
    doctor.run(out)
    assert "triton: known normals: ok" in out.getvalue() and "triton: one step equals the reference: ok" in out.getvalue()
    monkeypatch.setattr(step, "signed", lambda seed: 7)
    out = io.StringIO()
    assert doctor.run(out) == 1 and "triton: one step equals the reference: FAILED: AssertionError" in out.getvalue()


def test_auto_does_not_take_it():
    assert backends.resolve("auto", "cpu").name == "cpu" and backends.resolve("auto", "cuda").name == "reference"


def test_reasons(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(backends.BackendUnavailableError, match="'triton' is not available: torch finds no GPU; .*_INTERPRET=1"):
        backends.resolve("triton", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert backends.resolve("triton", "cuda").name == "triton" and backends.home("triton") == "cuda"
    with pytest.raises(backends.BackendUnavailableError, match="it cannot work on cpu .its kernels read GPU memory"):
        backends.resolve("triton", "cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(backends.BackendUnavailableError, match="it cannot work on cuda .TRITON_INTERPRET=1 keeps it on the CPU"):
        backends.resolve("triton", "cuda")
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(backends.BackendUnavailableError, match="triton is not installed; `pip install triton`"):
        backends.resolve("triton", "cpu")


def test_importing_ebmfast_does_not_import_triton():
    loaded = "[m for m in sys.modules if m == 'triton' or m.startswith('ebmfast.kernels.')]"
    code = f"import sys, ebmfast, ebmfast.kernels; print({loaded})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


TARGETS = ["sm_80", "sm_90", "gfx942"]
_FUSED = re.compile(r"\bv_(?:pk_)?(?:fma|mad|mac|fmac)\w*_f32\b.*")


@pytest.fixture(scope="module", params=TARGETS)
def compiled(request) -> tuple[str, list[dict]]:
    """Every kernel, compiled for a target by the launches that a GPU would see."""
    from bench import aot

    return request.param, aot.compile_all(request.param)


def fused(target: str, text: str) -> list[str]:
    """Fused multiply-adds in float32, but for those that AMD's exact square root (five) and integer division are made of."""
    if target.startswith("sm_"):
        return re.findall(r"\bfma\.\S*f32.*", text)
    found = [line for line in _FUSED.findall(text) if not re.search("0x[4c]f800000", line)]
    return found[5 * len(re.findall(r"\bv_rsq_f32", text)) :]


@compiles
def test_compiled_kernels_do_not_spill(compiled):
    assert len(compiled[1]) >= 15 and not [(r["case"], r["kernel"]) for r in compiled[1] if r["spills"]]


@compiles
def test_compiled_kernels_round_every_operation(compiled):
    """No fusion and no flush of subnormals where bits are promised: everywhere but in `_program`, which has exp and log."""
    target, rows = compiled
    for row in rows:
        name, text = (row["case"], row["kernel"]), row["text"]
        if row["kernel"] == "_program":
            continue
        assert not fused(target, text), name
        if target.startswith("sm_"):
            assert not re.search(r"\b(mul|add|sub|sqrt|div)\.(?!rn\.f)\S*f(32|64)", text), name  # all rounded to nearest, no .ftz
            assert ("sqrt.rn.f32" in text) == (row["kernel"] == "_step" or row["case"] == "normals"), name
        else:
            assert re.search(r"amdhsa_float_denorm_mode_32 3\b", text) and "v_sqrt_f32" not in text, name


@compiles
def test_long_chains_move_four_values_at_a_time(compiled):
    target, rows = compiled
    (text,) = (r["text"] for r in rows if (r["case"], r["kernel"]) == ("step", "_step"))
    load, store = ("ld.global.v4.b32", "st.global.v4.b32") if target.startswith("sm_") else ("load_dwordx4", "store_dwordx4")
    assert text.count(load) >= 4 and store in text  # x and three gradients


@compiles
@pytest.mark.parametrize("target", TARGETS)
def test_the_check_sees_fusion(monkeypatch, target):
    from ebmfast.kernels import launch

    from bench import aot

    monkeypatch.setitem(launch.OPTIONS, "enable_fp_fusion", True)
    (row,) = aot.compile_all(target, ["step, K = 0"])
    assert fused(target, row["text"])


def test_the_recorded_table_is_complete():
    from bench import aot

    rows = json.loads(aot.RESULTS.read_text())["kernels"]
    assert {(r["case"], r["target"]) for r in rows} == {(c, t) for c in aot.cases() for t in aot.TARGETS}


@runs
@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_noise_in_any_batch(kind):
    draw = getattr(require_backend("triton"), kind)
    whole = draw((3, 7), 50, seed=1, step=2, device=HOME)
    assert same_bits(whole.cpu(), getattr(rng, kind)((3, 7), 50, seed=1, step=2))
    assert same_bits(draw((3, 7), 10, seed=1, step=2, first_chain=23, device=HOME), whole[23:33])


@runs
def test_words_at_the_edges():
    """Every pair of edges: the least and greatest words, where a uniform would round to 1, and every change of a quadrant."""
    from ebmfast.kernels.launch import launch
    from triton_words import from_words

    edges = [0, 1, 2**31 - 1, 2**31, 2**32 - 129, 2**32 - 128, 2**32 - 1]
    edges += [q + d for q in (2**29, 2**30, 3 * 2**29, 5 * 2**29, 3 * 2**30, 7 * 2**29) for d in (-1, 0)]
    pairs = torch.cartesian_prod(torch.tensor(edges), torch.tensor(edges)).T
    others = torch.randint(0, 2**32, (2, 512 - pairs.shape[1]), generator=torch.Generator().manual_seed(0))
    pairs = torch.cat([pairs, others], dim=1).contiguous()
    out = torch.empty(3, 512, device=HOME)
    launch(from_words, 1, out.device, words=pairs.to(HOME), out=out, N=512)
    assert same_bits(out[0].cpu(), rng.uniform_from_words(pairs[0])) and float(out[0].max()) < 1
    n0, n1 = rng.box_muller(*pairs)
    assert same_bits(out[1].cpu(), n0) and same_bits(out[2].cpu(), n1)


@runs
@pytest.mark.parametrize("size", [5, 4096, 9001])
def test_squares_are_summed_in_the_order_of_the_specification(size):
    """In float64, where the order shows: after rounding to the float32 scale it hardly ever does."""
    x, gradients = torch.zeros(3, size), torch.randn(1, 3, size, generator=torch.Generator().manual_seed(0))
    plan = require_backend("triton").prepare(x.to(HOME), n_gradients=1, seed=0, grad_clip_norm=1.0)
    plan(gradients.to(HOME), torch.ones(1, device=HOME), 0.1, 0.0, 0)
    for row in range(3):
        for block, values in enumerate(gradients[0, row].double().split(4096)):
            lanes = [0.0] * 16
            for i, value in enumerate(values.tolist()):
                lanes[i % 16] += value * value
            for half in (8, 4, 2, 1):
                lanes = [lanes[j] + lanes[j + half] for j in range(half)]
            assert float(plan._run._squares[row, block]) == lanes[0]


@runs
@pytest.mark.skipif(not INTERPRETED, reason="models on a GPU round differently than on the CPU")
@pytest.mark.parametrize("either", [False, True])
def test_sampling_with_it_gives_the_same_chains(either):
    import ebmfast as ef

    a, b = (ef.Concept(lambda x, m=m: (x - m).square().sum(1), name=f"at {m}") for m in (0.0, 1.0))
    options = {"n": 9, "shape": (5,), "sampler": ef.Langevin(step_size=0.1, clamp=(-1, 1)), "steps": 4, "seed": 1}
    got, expected = (ef.sample(a | b if either else a & b, backend=name, **options) for name in ("triton", "cpu"))
    assert same_bits(got.x, expected.x) and "on triton" in str(got.report)
