"""The planner: what is evaluated, how often, and that no way of doing so changes the result."""

import copy
import math
import threading

import pytest
import torch
from conftest import same_bits
from models import ConditionalQuadratic, Net, NoisedGaussian, Quadratic, gaussian
from torch import nn

import ebmfast as ef
from ebmfast import batching, measured, memory, stacking
from ebmfast.plan import Plan

X = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
SAMPLER = ef.Langevin(step_size=0.05)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EBMFAST_CACHE", str(tmp_path))
    return tmp_path / "measured.json"


def nets(count=4, **options):
    return [Net(seed=s, **options) for s in range(count)]


def conditioned(models, negate_last=True):
    leaves = [ef.Concept(m, [0.1 * i, 0.2, -0.3], name=f"net{i}") for i, m in enumerate(models)]
    return ef.all_of(leaves[:-1]) & ef.negate(leaves[-1], 0.4) if negate_last else ef.any_of(leaves)


def gradient(e, x=X, rows=None, sigma=None, **options):
    return Plan(e, **options).bind(x, rows).gradient(x, sigma)


# stacks


@pytest.mark.parametrize("or_", [False, True], ids=["sum", "or"])
def test_a_stack_computes_what_branches_do(or_):
    e = conditioned(nets(), not or_)
    torch.testing.assert_close(gradient(e, stack=True), gradient(e), rtol=1e-5, atol=1e-6)
    plan = Plan(e, stack=True)
    evaluator = plan.bind(X)
    assert [len(p) for p in evaluator.passes] == [4]
    torch.testing.assert_close(torch.stack(evaluator.energies(X)), e.leaf_energies(X).T)
    assert "stacked, as asked" in plan.explain()


def test_stacks_of_several_conditions_and_other_leaves():
    a, b, other = *nets(2), Quadratic(torch.zeros(5))
    e = ef.any_of([ef.Concept(m, c) for c in ([1, 0, 0], [0, 1, 0]) for m in (a, b)]) & ef.Concept(other)
    torch.testing.assert_close(gradient(e, stack=True), gradient(e), rtol=1e-5, atol=1e-6)
    assert [len(p) for p in Plan(e, stack=True).bind(X).passes] == [4, 1]


def test_a_stack_falls_apart_where_a_leaf_is_dead():
    a, b = nets(2)
    e = ef.all_of([ef.Concept(a, [1, 0, 0]), ef.Concept(b, [1, 0, 0])], weights=[1.0, ef.AboveSigma(0.5)])
    for sigma in (0.1, 1.0):
        torch.testing.assert_close(gradient(e, sigma=sigma, stack=True), gradient(e, sigma=sigma), rtol=1e-5, atol=1e-6)


def test_stacks_follow_the_parameters():
    models = nets(3)
    run = ef.prepare(conditioned(models), SAMPLER, shape=(5,), steps=3, stack_models=True, engine="step")
    run(4, 0)
    with torch.no_grad():
        for p in models[1].parameters():
            p.data.mul_(1.5)  # bumps no version
    fresh = ef.sample(conditioned(models), 4, (5,), SAMPLER, 3, 0, stack_models=True)
    assert torch.equal(run(4, 0).x, fresh.x)


def test_a_callback_that_changes_parameters_is_seen_by_stacks():
    def run(stack):
        models = nets(3)

        def train(info):
            with torch.no_grad():
                models[0].weights[0].mul_(1.1)

        return ef.sample(conditioned(models), 4, (5,), SAMPLER, 5, 0, callback=train, stack_models=stack).x

    torch.testing.assert_close(run(True), run(False))


class Scaled(Net):
    """A network with a plain attribute that matters."""

    def __init__(self, scale, **options):
        super().__init__(**options)
        self.scale = scale

    def forward(self, x, condition):
        return self.scale * super().forward(x, condition)


class Branching(Net):
    """What vmap cannot map."""

    def forward(self, x, condition):
        return super().forward(x, condition) * (2.0 if x.sum().item() > 0 else 1.0)


def hooked():
    model = Net()
    model.register_forward_hook(lambda *_: None)
    return model


class Normed(Net):
    """Keeps a statistic in train mode."""

    def __init__(self, **options):
        super().__init__(**options)
        self.register_buffer("seen", torch.zeros(()))


@pytest.mark.parametrize("pair", [
    (Scaled(1.0), Scaled(2.0, seed=1)), (Net(), Net(width=8)), (Net(), hooked()), (Net(), Net().eval()),
    (Net(), copy.deepcopy(Net()).double()), (Net(), lambda x, c: x.sum(1)), (Normed(), Normed())])
def test_other_architectures_are_not_stacked(pair):
    plan = Plan(ef.Concept(pair[0], [1, 0, 0]) & ef.Concept(pair[1], [1, 0, 0]), stack=True)
    assert stacking.candidates(plan.bind(X).passes) == [] and plan.choices == {}


def test_what_cannot_be_mapped_runs_in_branches_or_raises():
    e = conditioned([Branching(seed=s) for s in range(2)])
    plan = Plan(e, stack="auto")
    torch.testing.assert_close(plan.bind(X).gradient(X), gradient(e))
    assert "branches, a stack fails" in plan.explain()
    with pytest.raises(ValueError, match="`stack_models` is True, but Branching cannot be stacked"):
        Plan(e, stack=True).bind(X)


def test_the_choice_is_measured_once_and_kept(cache, monkeypatch):
    e = conditioned(nets())
    calls = []
    monkeypatch.setattr(stacking, "_times", lambda *_: calls.append(1) or (2.0, 1.0))
    for _ in range(2):
        plan = Plan(e, stack="auto")
        assert len(plan.bind(X).passes) == 1 and "measured 1e+03 ms stacked, 2e+03 ms in branches" in plan.explain()
    assert len(calls) == 1 and cache.exists()
    measured.forget()  # another process
    Plan(e, stack="auto").bind(X)
    assert len(calls) == 1
    Plan(e, stack="auto").bind(X[:3])
    assert len(calls) == 2
    cache.write_text("{broken")
    measured.forget()
    Plan(e, stack="auto").bind(X)
    assert len(calls) == 3


def test_measuring_times_both():
    e = conditioned(nets())
    plan = Plan(e, stack="auto")
    plan.bind(X)
    assert "ms stacked" in next(iter(plan.choices.values()))


def test_measuring_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("EBMFAST_MEASURE", "0")
    plan = Plan(conditioned(nets()), stack="auto")
    assert len(plan.bind(X).passes) == 4 and "measuring is switched off" in plan.explain()


def test_a_folder_that_cannot_be_written_to(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EBMFAST_CACHE", str(tmp_path / "file" / "below"))
    Plan(conditioned(nets()), stack="auto").bind(X)


def test_two_threads_share_a_run():
    run = ef.prepare(conditioned(nets()), SAMPLER, shape=(5,), steps=5, stack_models=True)
    want, got = run(6, 0).x, {}
    threads = [threading.Thread(target=lambda i=i: got.update({i: run(6, 0).x})) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(got) == 4 and all(torch.equal(x, want) for x in got.values())


def test_user_modules_are_untouched():
    models = nets(2)
    before = [{k: (v.data_ptr(), v.requires_grad) for k, v in m.named_parameters()} for m in models]
    keys = [set(vars(m)) for m in models]
    ef.sample(conditioned(models), 4, (5,), SAMPLER, 2, 0, stack_models=True)
    assert before == [{k: (v.data_ptr(), v.requires_grad) for k, v in m.named_parameters()} for m in models]
    assert keys == [set(vars(m)) for m in models] and all(p.grad is None for m in models for p in m.parameters())


# fewest evaluations


class Counting(ConditionalQuadratic):
    """Counts rows."""

    rows = 0

    def forward(self, x, condition=None, keep=None):
        self.rows += x.shape[0]
        return super().forward(x, condition, keep)


def test_equal_conditions_share_their_rows():
    model = Counting()
    f = ef.Family(model, "f", condition_dim=2)
    e = f[ef.Slot("a")] & 2.0 * f[ef.Slot("b")] & f(0.5, 0.5) & f(1, 1)
    x, a = torch.randn(3, 2), torch.tensor([[0.1, 0.2]] * 3)
    rows = {"a": a, "b": a.clone()}
    apart = {"a": a, "b": a + 1e-3}
    model.rows = 0
    merged = gradient(e, x, rows)
    assert model.rows == 9
    model.rows = 0
    gradient(e, x, apart)
    assert model.rows == 12
    torch.testing.assert_close(merged, gradient(e, x, {"a": a, "b": a + 1e-7}))
    assert Plan(e).bind(x, {"a": a, "b": torch.full((3, 2), 0.5)}).passes[0].blocks == [[0], [1, 2], [3]]
    torch.testing.assert_close(e.leaf_energies(x, conditions=rows)[:, 0], e.leaf_energies(x, conditions=rows)[:, 1])


def test_merged_leaves_sample_like_others_and_faults_are_blamed():
    f = ef.Family(ConditionalQuadratic(), "f", condition_dim=2)
    e = f[ef.Slot("a")] | f[ef.Slot("b")]
    a = torch.zeros(4, 2)
    one = ef.sample(e, shape=(2,), sampler=SAMPLER, steps=5, seed=0, conditions={"a": a, "b": a})
    two = ef.sample(e, shape=(2,), sampler=SAMPLER, steps=5, seed=0, conditions={"a": a, "b": a + 1e-9})
    torch.testing.assert_close(one.x, two.x)
    bomb = ef.Concept(lambda x: (x.sum(1) * torch.nan), name="bomb")
    with pytest.raises(ef.NonFiniteError, match="from the concept bomb"):
        ef.sample(f[ef.Slot("a")] & f[ef.Slot("b")] & bomb, shape=(2,), sampler=SAMPLER, steps=5, seed=0,
                  conditions={"a": a, "b": a}, allow_improper=True)


def test_dead_leaves_are_not_evaluated():
    counted = [Counting(), Counting()]
    a, b = (ef.Concept(m, [0.0, 0.0]) for m in counted)
    e = ef.all_of([a, b], weights=[1.0, ef.AboveSigma(0.5)])
    x = torch.randn(3, 2)
    for sigma, rows in ((1.0, 3), (0.1, 0)):
        counted[1].rows = 0
        assert torch.allclose(gradient(e, x, sigma=sigma), (1 + (sigma > 0.5)) * x)
        assert counted[1].rows == rows
    nested = (a & ef.all_of([a, b], weights=[1.0, ef.AboveSigma(0.5)])) | a
    assert nested.program.live(0.1) == (True, False) and nested.program.live(1.0) == (True, True)
    counted[1].rows = 0
    torch.testing.assert_close(gradient(nested, x, sigma=0.1), gradient((2.0 * a) | a, x))
    assert counted[1].rows == 0
    energies = e.leaf_energies(x, 0.1)
    assert energies[:, 1].abs().min() > 0  # results have the energies of all leaves


def test_an_annealed_prior_that_ends():
    noised = ef.Family(NoisedGaussian(), "g")
    e = ef.with_prior(noised(0.3) & noised(0.5), noised(0.0), weight=ef.AboveSigma(0.5))
    r = ef.sample(e, 6, (2,), ef.Annealed.geometric(2.0, 0.1, 5), seed=0)
    assert torch.isfinite(r.x).all() and r.leaf_energies.shape == (6, 3)


# memory


def test_peak_sees_what_is_alive():
    def work():
        kept = torch.zeros(1000)
        for _ in range(10):
            kept = kept + 1
        return kept

    assert 8000 <= memory.peak(work, torch.device("cpu")) <= 12100


@pytest.mark.parametrize("given, want", [(1000, 1000), ("2GB", 2 * 10**9), ("1.5 MiB", 3 << 19), ("7", 7)])
def test_limits(given, want):
    assert memory.as_bytes(given) == want


@pytest.mark.parametrize("bad", [0, -1, "2 apples", "", 1.5, True, "1.2.3GB"])
def test_bad_limits(bad):
    with pytest.raises(ValueError, match="memory_limit"):
        ef.prepare(gaussian(0.0), SAMPLER, memory_limit=bad)


class Wide(nn.Module):
    """Holds a megabyte per chain for its backward pass."""

    most = 0

    def forward(self, x):
        self.most = max(self.most, len(x))
        return (x[:, :1] * torch.ones(1 << 18)).square().mean(1) + x.square().sum(1)


def test_memory_limit_sets_the_micro_batch():
    options = dict(n=64, shape=(4,), sampler=SAMPLER, steps=2, seed=0, check=False)
    models = [Wide() for _ in range(3)]
    small = ef.sample(ef.Concept(models[0]), memory_limit="30MB", **options)
    large = ef.sample(ef.Concept(models[1]), memory_limit="120MB", **options)
    assert 3 <= small.report.micro_batch <= 16 and 2 * small.report.micro_batch < large.report.micro_batch <= 64
    assert models[0].most == max(3, small.report.micro_batch)
    torch.testing.assert_close(small.x, ef.sample(ef.Concept(models[2]), **options).x)
    with pytest.raises(ValueError, match="one chain of this composition needs about"):
        ef.sample(ef.Concept(Wide()), memory_limit="1MB", **options)
    with pytest.raises(ValueError, match="exclude each other"):
        ef.sample(ef.Concept(Wide()), memory_limit="1MB", batch_size=3, **options)


def test_a_micro_batch_ends_before_the_next_starts():
    seen = []
    ef.sample(gaussian(0.0), 4, (2,), SAMPLER, 3, 0, batch_size=2, engine="step",
              callback=lambda info: seen.append((info.first_chain, info.step)))
    assert seen == [(0, 1), (0, 2), (0, 3), (2, 1), (2, 2), (2, 3)]


# ways to call models


class Conv(nn.Module):
    """Sees the memory format of what it gets."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.formats = set()

    def forward(self, x):
        self.formats.add(x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous())
        return torch.nn.functional.silu(self.conv(x)).square().mean((1, 2, 3)) + 0.5 * x.square().sum((1, 2, 3))


def test_channels_last():
    model = Conv()
    options = dict(n=3, shape=(3, 6, 6), sampler=SAMPLER, steps=3, seed=0)
    plain = ef.sample(ef.Concept(model), **options)
    assert model.formats == {False} and plain.report.models == ""
    model.formats.clear()
    last = ef.sample(ef.Concept(model), channels_last=True, check=False, **options)
    assert model.formats == {True} and last.report.models == "channels_last" and last.x.is_contiguous()
    torch.testing.assert_close(last.x, plain.x, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::DeprecationWarning:torch.jit")
def test_compile_computes_the_same_and_follows_the_parameters():
    model = Net()
    run = ef.prepare(ef.Concept(model, [1, 0, 0]), SAMPLER, shape=(5,), steps=3, compile=True)
    want = [ef.sample(ef.Concept(model, [1, 0, 0]), 4, (5,), SAMPLER, 3, 0).x]
    got = [run(4, 0)]
    with torch.no_grad():
        model.weights[0].data.mul_(1.5)
    want.append(ef.sample(ef.Concept(model, [1, 0, 0]), 4, (5,), SAMPLER, 3, 0).x)
    got.append(run(4, 0))
    model.weights[1] = nn.Parameter(2 * model.weights[1].detach())
    want.append(ef.sample(ef.Concept(model, [1, 0, 0]), 4, (5,), SAMPLER, 3, 0).x)
    got.append(run(4, 0))
    for a, b in zip(got, want):
        torch.testing.assert_close(a.x, b, rtol=1e-5, atol=1e-5)
    assert "torch.compile" in got[0].report.models and all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="exclude each other"):
        ef.prepare(conditioned(nets(2)), SAMPLER, compile=True, stack_models=True)


def test_shadows_share_memory_and_ties():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    twin = stacking.shadow(model)
    assert twin[0].weight is twin[1].weight and twin[0].weight.data_ptr() == model[0].weight.data_ptr()
    assert not twin[0].weight.requires_grad and model[0].weight.requires_grad and twin[0] is not model[0]


# rows that see each other


class Coupled(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x):
        energy = x.square().sum(1)
        with torch.no_grad() if self.how == "detached" else torch.enable_grad():
            return energy * (1 + x.std(0).mean()) if len(x) > 1 else energy


@pytest.mark.parametrize("model", [Coupled("mean"), Coupled("detached"), nn.Sequential(nn.Linear(4, 1), nn.Softmax(dim=0))],
                         ids=["mean", "detached", "softmax"])
def test_coupled_rows_are_refused(model):
    if isinstance(model, Coupled) and model.how == "detached":
        inner = model
        e = ef.Concept(lambda x: inner(x.detach()) + x.square().sum(1), name="odd")
    else:
        e = ef.Concept(model, name="odd")
    options = dict(n=3, shape=(4,), sampler=SAMPLER, steps=1, seed=0)
    with pytest.raises(ef.CoupledError, match="model of odd couples the chains"):
        ef.sample(e, **options)
    ef.sample(e, check=False, **options)


def test_the_check_is_made_once_per_model_and_mode():
    model = Counting()
    e, options = ef.Concept(model, [0.0, 0.0]), dict(n=1, shape=(2,), sampler=SAMPLER, steps=1, seed=0, energies=False)
    for want in (1 + 5, 1, 1):
        model.rows = 0
        ef.sample(e, **options)
        assert model.rows == want
    model.eval()
    model.rows = 0
    ef.sample(e, **options)
    assert model.rows == 1 + 5


def test_random_energies_pass_the_check():
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    ef.sample(ef.Concept(model), 3, (4,), SAMPLER, 1, 0)


# scores


def score(x, condition):
    return condition - x


@pytest.mark.parametrize("returns, model", [("score", score), ("gradient", lambda x, c: x - c)])
def test_scores_are_leaves_of_sums(returns, model):
    true = ef.Concept(ConditionalQuadratic(), [1.0, 2.0])
    given = ef.Concept(model, [1.0, 2.0], name="given", returns=returns)
    other = gaussian(0.5)
    for make in (lambda e: e & other, lambda e: other & ef.negate(e, 0.3), lambda e: e):
        r, want = (ef.sample(make(e), 5, (2,), SAMPLER, 6, 0) for e in (given, true))
        torch.testing.assert_close(r.x, want.x)
        assert r.energy is None and r.leaf_energies is None
    for bad, match in (
        (lambda: ef.prepare(given | other, SAMPLER), "an OR needs the energies"),
        (lambda: ef.prepare(given & other, ef.MALA(0.1)), "which MALA needs"),
        (lambda: ef.sample(given, 5, (2,), SAMPLER, 6, 0, trace=2), "which Trace.* needs"),
        (lambda: given.energy(torch.zeros(2, 2)), "given gives its"),
        (lambda: ef.Concept(model, returns="logits"), "`returns` must be one of"),
        (lambda: ef.sample(ef.Concept(lambda x: x.sum(1), name="flat", returns=returns), 5, (2,), SAMPLER, 6, 0), "shaped as x"),
    ):
        with pytest.raises(ValueError, match=match):
            bad()
    assert ef.sample((other | gaussian(1.0)) & given, 5, (2,), SAMPLER, 6, 0).energy is None


@pytest.mark.parametrize("make", [lambda a, b: a & b, lambda a, b: a | b, lambda a, b: b & ef.negate(a, 0.2)],
                         ids=["and", "or", "not"])
@pytest.mark.parametrize("sampler", [SAMPLER, ef.MALA(0.1)], ids=["langevin", "mala"])
def test_a_gradient_beside_the_energy(make, sampler):
    energy = ConditionalQuadratic()
    calls = []

    def grad(x, condition, keep=None):
        calls.append(len(x))
        return x - condition

    plain = ef.Concept(energy, [1.0, 2.0], name="plain")
    given = ef.Concept(energy, [1.0, 2.0], name="given", gradient=grad)
    r, want = (ef.sample(make(e, gaussian(0.5)), 5, (2,), sampler, 6, 0) for e in (given, plain))
    torch.testing.assert_close(r.x, want.x, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(r.energy, want.energy, rtol=1e-5, atol=1e-6)
    assert calls and r.report.engine == "step"


# branches


MODES = ef.Concept(Quadratic(-6.0), name="left") | ef.Concept(Quadratic(6.0, 4.0), name="right")
LOG_Z = (0.0, -math.log(4.0))  # Z ∝ precision^(-d/2), d = 2


def test_branches_are_drawn_with_their_probabilities():
    n = 4000
    r = ef.sample(MODES, n, (2,), ef.MALA(0.3), 60, 3, branches=ef.DrawBranches(log_z=LOG_Z), energies=False)
    share, want = float((r.x[:, 0] > 0).float().mean()), 0.2
    assert abs(share - want) < 5 * math.sqrt(want * (1 - want) / n)
    assert torch.equal(r.branch == 1, r.x[:, 0] > 0)
    right = r.x[r.branch == 1]
    assert abs(float(right.var()) - 0.25) < 5 * 0.25 * math.sqrt(1 / len(right))
    plain = ef.sample(MODES, n, (2,), ef.MALA(0.3), 60, 3, init="normal")
    assert abs(float((plain.x[:, 0] > 0).float().mean()) - want) > 0.1  # what drawing is for


def test_drawn_branches_run_alone_and_do_not_depend_on_the_batch():
    models = [Counting(), Counting(2.0)]
    e = ef.any_of([ef.Concept(m, [3.0 * i, 0.0]) for i, m in enumerate(models)], log_weights=[0.0, 1.0])
    options = dict(shape=(2,), sampler=SAMPLER, steps=4, seed=5, branches="draw", check=False, energies=False)
    whole = ef.sample(e, 20, **options)
    assert sum(m.rows for m in models) == 20 * 4
    part = ef.sample(e, 6, first_chain=7, batch_size=4, **options)
    torch.testing.assert_close(part.x, whole.x[7:13])
    assert torch.equal(part.branch, whole.branch[7:13])
    alone = [ef.sample(ef.Concept(m, [3.0 * i, 0.0]), 20, **options | {"branches": None}).x for i, m in enumerate(models)]
    want = torch.where(whole.branch[:, None] == 0, alone[0], alone[1])
    torch.testing.assert_close(whole.x, want)
    more = ef.sample(e, resume=whole.state, **{k: v for k, v in options.items() if k not in ("shape", "seed")})
    torch.testing.assert_close(more.x, ef.sample(e, 20, **options | {"steps": 8}).x)


def test_drawn_branches_with_slots_priors_and_levels():
    f = ef.Family(NoisedGaussian(), "g", condition_dim=2)
    e = ef.with_prior((f[ef.Slot("a")] & f(0.1, 0.1)) | f[ef.Slot("b")], f(0, 0))
    rows = {"a": torch.randn(6, 2), "b": torch.randn(6, 2)}
    r = ef.sample(e, shape=(2,), sampler=ef.Annealed.geometric(2.0, 0.1, 4), seed=0, conditions=rows, branches="draw")
    assert r.leaf_energies.shape == (6, len(e.leaves)) and torch.isfinite(r.x).all()
    run = ef.prepare(e, ef.Annealed.geometric(2.0, 0.1, 4), branches="draw")
    assert "drawn with probabilities 0.5, 0.5" in run.explain()


def test_faults_of_a_drawn_branch_name_it():
    bomb = ef.Concept(lambda x: x.sum(1) * torch.nan, name="bomb")
    with pytest.raises(ef.NonFiniteError, match="from the concept bomb"):
        ef.sample(gaussian(0.0) | bomb, 30, (2,), SAMPLER, 2, 0, branches="draw")


@pytest.mark.parametrize("options, match", [
    (dict(expr=gaussian(0.0) & gaussian(1.0)), "needs an OR at the root"),
    (dict(sampler=ef.Langevin(step_size=0.1, temperature=0.5)), "sharpness·temp"),
    (dict(branches=ef.DrawBranches(log_z=(0.0,))), "one number for each of 2"), (dict(branches="both"), '"draw", a DrawBranches'),
    (dict(engine="chain"), "step engine")])
def test_bad_draws(options, match):
    defaults = dict(expr=MODES, n=4, shape=(2,), sampler=SAMPLER, steps=2, seed=0, branches="draw")
    with pytest.raises(ValueError, match=match):
        ef.sample(**defaults | options)


def test_log_partition_of_gaussians():
    got, error = ef.log_partition(gaussian(1.5, 4.0), (3,), n=400, levels=150, step_size=0.2, std=1.5, seed=1)
    want = 1.5 * math.log(2 * math.pi / 4.0)
    assert error < 0.1 and abs(got - want) < 5 * error + 1e-3


class Slow(nn.Module):
    """E(x) = |x|²/2, and rows that it notes."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        rows.append(len(x))
        return 0.5 * self.scale * x.square().sum(1)


rows: list[int] = []


def test_micro_batches_by_halves():
    assert batching.candidates(1) == [1] and batching.candidates(9) == [9, 5, 3, 2, 1] and batching.candidates(1000)[-1] == 63
    assert batching.fastest([8.0, 3.0, 2.0], 8) == 4 and batching.fastest([8.0, 3.7, 2.0], 8) == 8, "a tenth at least"
    assert batching.fastest([1e-4], 8) == 8
    assert batching.describe([0.008, 0.003], 8) == (
        "4 of at most 8 chains; ms per chain and step were measured as 8: 1, 4: 0.75")


def test_measuring_micro_batches_stops_where_it_gets_worse(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(batching.time, "perf_counter", lambda: now[0])

    def step(n):
        def work():
            now[0] += {64: 0.64, 32: 0.16, 16: 0.16, 8: 0.16}[n]
        return work

    times = batching.measure(step, 64)
    assert times == pytest.approx([0.64, 0.16, 0.16, 0.16]) and batching.fastest(times, 64) == 32
    assert len(batching.measure(lambda n: lambda: None, 64)) == 1, "what takes no time is not worth it"


def test_the_micro_batch_is_measured_once_kept_shown_and_changes_no_noise(cache, monkeypatch):
    measure = []
    monkeypatch.setattr(batching, "measure", lambda step, most: measure.append(most) or step(3)() or [0.03, 0.003])
    e = ef.Concept(Slow(), name="slow")
    options = dict(n=30, shape=(1 << 17,), seed=0, init="normal")  # 16 chains by default
    whole = ef.sample(e, sampler=SAMPLER, steps=22, **options, batch_size=30)
    for _ in range(2):
        run = ef.prepare(e, SAMPLER, shape=options["shape"], steps=22)
        rows.clear()
        r = run(30, 0, init="normal")
        assert r.report.micro_batch == 8 and max(rows[3:]) <= 8 and same_bits(r.x, whole.x)
        assert "micro-batch  8 of at most 16 chains" in run.explain()
    assert measure == [16] and cache.exists()
    measured.forget()
    assert ef.sample(e, sampler=SAMPLER, steps=22, **options).report.micro_batch == 8 and len(measure) == 1
    short = ef.sample(e, sampler=SAMPLER, steps=2, **options)
    monkeypatch.setenv("EBMFAST_MEASURE", "0")
    fixed = ef.sample(e, sampler=SAMPLER, steps=22, **options)
    assert short.report.micro_batch == fixed.report.micro_batch == 16
