import math
import random

import pytest
import torch
from models import ConditionalQuadratic, Net, Quadratic, gaussian

import ebmfast as ef
from ebmfast.composition import LogSumExp, Sum, WithPrior

A, B, C = (gaussian(m, p, n) for m, p, n in ((0.0, 1.0, "a"), (2.0, 3.0, "b"), (-1.0, 2.0, "c")))


def random_tree(rng, leaves, depth):
    """A random composition of every node kind."""
    if depth == 0 or rng.random() < 0.15:
        return rng.choice(leaves)
    kids = [random_tree(rng, leaves, depth - 1) for _ in range(rng.randint(2, 3))]
    match rng.randrange(6):
        case 0:
            return ef.all_of(kids, [rng.uniform(0.2, 2) for _ in kids])
        case 1:
            return ef.any_of(kids, [rng.uniform(-1, 1) for _ in kids], rng.uniform(0.5, 3))
        case 2:
            return kids[0] & ef.negate(kids[1], rng.uniform(0, 0.5))
        case 3:
            return ef.with_prior(kids[0] & kids[1], leaves[0], rng.uniform(0.5, 1))
        case 4:
            return rng.uniform(0.5, 2) * kids[0] | kids[1]
    return kids[0] & ~kids[1]


def written_out(e, x):
    """The energy straight from the definitions, never simplified, every leaf called by itself."""
    match e:
        case ef.Concept():
            rows = torch.tensor(e.condition, dtype=x.dtype).expand(len(x), -1)
            return e.source.model(x, rows)[:, 0]
        case Sum(terms=terms):
            return sum(w * written_out(child, x) for w, child in terms)
        case LogSumExp(children=children, log_weights=logs, sharpness=s):
            return -torch.stack([-s * written_out(c, x) + v for c, v in zip(children, logs)]).logsumexp(0) / s
        case WithPrior(expression=inner, prior=prior, weight=weight):
            return written_out(inner, x) - weight * excess(inner) * written_out(prior, x)


def excess(e):
    """W - 1 of a conjunction of leaves and negations, flattened by hand."""
    return total(e) - 1


def total(e):
    return sum(w * (total(c) if isinstance(c, Sum) else 1) for w, c in e.terms) if isinstance(e, Sum) else 1


@pytest.mark.parametrize("seed", range(30))
def test_random_trees_agree_with_the_written_out_formula(seed):
    rng = random.Random(seed)
    nets = [ef.Family(Net(seed=k), f"net{k}") for k in range(2)]
    leaves = [rng.choice(nets)([rng.uniform(-1, 1) for _ in range(3)]) for _ in range(5)]
    e = random_tree(rng, leaves, 4)
    while any(isinstance(n, WithPrior) and not plain(n.expression) for n in nodes(e)):
        e = random_tree(rng, leaves, 4)
    x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    expected = written_out(e, x)
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(e.energy(x), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(e.gradient(x), gradient, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(e.simplify().energy(x), expected, rtol=1e-10, atol=1e-10)


def nodes(e):
    yield e
    for child in getattr(e, "children", ()) or [c for _, c in getattr(e, "terms", ())]:
        yield from nodes(child)
    if isinstance(e, WithPrior):
        yield from nodes(e.expression)


def plain(e):
    """Whether `excess` may count the prior by hand: sums of leaves only."""
    return isinstance(e, ef.Concept) or isinstance(e, Sum) and all(plain(c) for _, c in e.terms)


def test_disjunction_and_negation_have_the_signs_of_the_densities():
    """The paper's printed updates for OR and NOT climb the energy; whoever 'fixes' the sign back fails here."""
    x = torch.tensor([[1.9], [-0.9]], dtype=torch.float64)
    either = B | C
    density = (-B.energy(x)).exp() + (-C.energy(x)).exp()
    torch.testing.assert_close((-either.energy(x)).exp(), density)
    assert either.energy(x)[0] < min(either.energy(torch.tensor([[5.0], [9.0]], dtype=torch.float64)))
    g = either.gradient(torch.tensor([[2.5]], dtype=torch.float64))
    assert g > 0, "descending E from the right of the mode at 2 must move left"
    away = A & ef.negate(B, 0.1)
    assert away.gradient(torch.tensor([[0.0]], dtype=torch.float64)) > 0, "NOT b (mode 2) must push to the left"
    torch.testing.assert_close((-away.energy(x)).exp(), (-A.energy(x)).exp() / (-B.energy(x)).exp() ** 0.1)


def test_operators_build_the_documented_energies():
    x = torch.randn(3, 2, dtype=torch.float64)
    ea, eb = A.energy(x), B.energy(x)
    torch.testing.assert_close((A & B).energy(x), ea + eb)
    torch.testing.assert_close((2.0 * A).energy(x), 2 * ea)
    torch.testing.assert_close((A & ~B).energy(x), ea - 0.01 * eb)
    torch.testing.assert_close(ef.any_of([A, B], [0.3, 0], 2.0).energy(x),
                               -0.5 * torch.logaddexp(-2 * ea + 0.3, -2 * eb))
    torch.testing.assert_close((A & B).leaf_energies(x), torch.stack([ea, eb], 1))


def test_with_prior_counts_the_prior_once_in_every_conjunction():
    x = torch.randn(3, 2, dtype=torch.float64)
    ea, eb, ec = A.energy(x), B.energy(x), C.energy(x)
    torch.testing.assert_close(ef.with_prior(A & B, C).energy(x), ea + eb - ec)
    torch.testing.assert_close(ef.with_prior(A, C).energy(x), ea)
    torch.testing.assert_close(ef.with_prior(A & ef.negate(B, 0.3), C).energy(x), ea - 0.3 * eb + 0.3 * ec)
    torch.testing.assert_close(ef.with_prior((A & B) | A, C).energy(x), -torch.logaddexp(-(ea + eb - ec), -ea))
    torch.testing.assert_close(ef.with_prior((A | B) & A, C).energy(x), -torch.logaddexp(-ea, -eb) + ea - ec)
    nested = ef.with_prior(A & ef.negate(A & B, 0.2), C)
    torch.testing.assert_close(nested.energy(x), ea - 0.2 * (ea + eb) + 0.4 * ec)


def test_or_inside_not_inside_and():
    x = torch.randn(3, 2, dtype=torch.float64)
    e = A & ef.negate(B | C, 0.25)
    torch.testing.assert_close(e.energy(x), A.energy(x) + 0.25 * torch.logaddexp(-B.energy(x), -C.energy(x)))


def test_simplify_flattens_and_merges():
    assert (A & B & A).simplify() == ef.all_of([A, B], [2.0, 1.0]).simplify()
    assert isinstance((A | B | C).simplify(), LogSumExp) and len((A | B | C).simplify().children) == 3
    assert (A | A).simplify().log_weights == (math.log(2),)
    assert ef.all_of([A, B], [1.0, 0.0]).simplify() == A, "dead leaves are dropped"
    assert ef.any_of([A | B, C], sharpness=2.0).simplify().children[0] == A | B, "another sharpness stays nested"
    assert (1.0 * A).simplify() == A
    assert (A & B & A).leaves == (A, B)


def test_equal_conditions_are_one_leaf():
    net = ConditionalQuadratic()
    f = ef.Family(net, "f", {"one": [1.0, 0.0]})
    assert f("one") == f([1, 0]) == f(1, 0) and hash(f("one")) == hash(f(1.0, 0.0))
    assert f("one") != f(0, 1) and f("one") != ef.Family(ConditionalQuadratic(), "f")([1, 0])
    assert (f("one") & f(1, 0)).leaves == (f("one"),)
    assert len({f("one") & A, f(1, 0) & A}) == 1


def test_one_call_per_model_and_shared_leaves_once():
    net = ConditionalQuadratic()
    f = ef.Family(net, "f", unconditional=True)
    e = ef.with_prior((f(1, 0) & f(0, 1)) | (f(1, 0) & f(2, 2)), f.unconditional)
    x = torch.randn(6, 2)
    e.gradient(x)
    assert net.calls == 1 and len(e.leaves) == 4


@pytest.mark.parametrize(("e", "tail"), [
    (A, 1), (A & B, 2), (A & ~B, 0.99), (A | B, 1), (ef.with_prior(A & B, C), 1), (A & ef.negate(B | C, 0.5), 0.5),
    ((A & B) | (A & ef.negate(B, 0.5)), 0.5), (2.0 * A & ef.negate(B, 1.5), 0.5)])
def test_grounded(e, tail):
    assert e.tail_weight == pytest.approx(tail)
    e.check_grounded()


@pytest.mark.parametrize("e", [~A, ~A & ~B, ~A | B, A & ef.negate(B, 1.5), A & ef.negate(A, 1.0)])
def test_ungrounded_raises_in_sample_and_nowhere_else(e):
    x = torch.randn(2, 1)
    e.energy(x), e.gradient(x)
    options = dict(n=2, shape=(1,), sampler=ef.Langevin(step_size=0.1), steps=1, seed=0)
    with pytest.raises(ef.UngroundedNegationError, match="negate"):
        ef.sample(e, **options)
    assert ef.sample(e, allow_improper=True, **options).x.shape == (2, 1)
    bounded = options | {"sampler": ef.Langevin(step_size=0.1, clamp=(-1, 1))}
    assert ef.sample(e, **bounded).x.abs().max() <= 1


def test_step_scale():
    assert (A & B).step_scale == 2 and (A & ~B).step_scale == 1 and (A | (A & B)).step_scale == 2
    prior = ef.with_prior(A & B, C)
    assert prior.step_scale == 1 and prior.simplify().step_scale == 1 and (prior & A).step_scale == 2
    partly = ef.with_prior(A & B, C, ef.AboveSigma(0.5))
    assert partly.step_scale == ef.PiecewiseSigma([0.5], [2, 1])


def test_weights_over_noise_levels():
    w = ef.PiecewiseSigma([0.1, 1.0], [0.0, 0.5, 2.0])
    assert [w.at(s) for s in (0.05, 0.1, 0.2, 1.0, 3.0)] == [0.0, 0.0, 0.5, 0.5, 2.0]
    e = A & w * B
    x = torch.randn(2, 1, dtype=torch.float64)
    torch.testing.assert_close(e.energy(x, sigma=0.5), A.energy(x) + 0.5 * B.energy(x))
    with pytest.raises(ValueError, match="depends on the noise level"):
        e.energy(x)
    assert hash(e) == hash(A & ef.PiecewiseSigma((0.1, 1.0), (0, 0.5, 2)) * B)
    merged = (ef.AboveSigma(0.5) * A & ef.AboveSigma(1.0) * A).simplify()
    assert merged.terms[0][0] == ef.PiecewiseSigma([0.5, 1.0], [0, 1, 2])
    with pytest.raises(ef.UngroundedNegationError):
        (A & ef.negate(B, ef.AboveSigma(0.5, 2.0))).check_grounded()
    (A & ef.negate(B, ef.AboveSigma(0.5, 2.0))).check_grounded([0.1, 0.4])


@pytest.mark.parametrize("bad", [lambda: ef.PiecewiseSigma([1.0], [1.0]), lambda: ef.PiecewiseSigma([2, 1], [1, 2, 3]),
                                 lambda: ef.PiecewiseSigma([1.0], [1.0, math.inf]), lambda: math.nan * A])
def test_bad_weights(bad):
    with pytest.raises(ValueError):
        bad()


def test_programs_evaluate_like_trees_and_pack_into_arrays():
    e = ef.any_of([A & ~B, 2.0 * C], [0.1, -0.2], 1.5)
    codes, values = e.program.arrays()
    assert codes.tolist() == [[0, 0], [0, 1], [1, 2], [0, 2], [1, 1], [2, 2]]
    assert values.tolist() == pytest.approx([1.0, -0.01, 2.0, 1.5, 0.1, -0.2])
    energies = [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    total = e.program.evaluate(energies)
    for ours, autograd in zip(e.program.weights(energies), torch.autograd.grad(total.sum(), energies)):
        torch.testing.assert_close(ours, autograd)


def test_alpha_of_negation():
    f = ef.Family(ConditionalQuadratic(), "f", negation_alpha=0.3)
    g = ef.Family(ConditionalQuadratic(), "g", negation_alpha=0.1)
    assert (~A).terms[0][0] == -0.01 and (~f(1, 1)).terms[0][0] == -0.3 and (~(f(1, 1) | g(1, 1))).terms[0][0] == -0.1


def test_json_round_trip():
    f = ef.Family(ConditionalQuadratic(), "f", {"one": [1.0, 0.0]}, unconditional=True)
    e = ef.with_prior(
        ef.any_of([f("one") & ef.AboveSigma(0.5) * f(0.25, 2), ~f[ef.Slot("c")] & A], [0.1, 0], 2.0), f.unconditional)
    again = ef.from_json(e.to_json(), [f, A])
    assert again == e and repr(again) == repr(e) and hash(again) == hash(e)
    simple = ef.from_json(e.simplify().to_json(), {"f": f, "a": A})
    assert simple == e.simplify() and simple.step_scale == e.simplify().step_scale
    with pytest.raises(ValueError, match="needs a model named 'a'"):
        ef.from_json(e.to_json(), [f])
    for text in ("{", '{"sum": 3}', "[]"):
        with pytest.raises(ValueError, match="not a composition in JSON"):
            ef.from_json(text, [f])


def test_expressions_print_what_was_written():
    f = ef.Family(ConditionalQuadratic(), "f", {"one": [1.0, 0.0]}, unconditional=True)
    for text in ("f('one') & ~f(0.5, 0.5)", "(f('one') & f(1, 2)) | f(0.25, 2)", "~(f('one') | f(1, 2)) & f(2, 2)",
                 "negate(f('one'), alpha=0.2) & f(1, 2)", "2*(f('one') | f(1, 2))", "f('one') & (f(1, 2) | f(3, 4))",
                 "any_of([f('one'), f(1, 2)], log_weights=[0.5, 0.0], sharpness=2)",
                 "with_prior(f('one') & f(1, 2), f.unconditional, weight=AboveSigma(0.5))"):
        assert repr(ef.parse(text, [f])) == text
        assert ef.parse(repr(ef.parse(text, [f])), [f]) == ef.parse(text, [f])


def test_truth_values_raise():
    for use in (lambda: bool(A), lambda: A and B, lambda: not A, lambda: A or B):
        with pytest.raises(TypeError, match="no truth value"):
            use()


@pytest.mark.parametrize(("use", "message"), [
    (lambda: A & 3, "unsupported operand"), (lambda: A * B, "cannot be multiplied"), (lambda: "x" * A, "number"),
    (lambda: True * A, "number"), (lambda: ef.all_of([A, "b"]), "got 'b'"), (lambda: ef.Concept(3), "`model`"),
    (lambda: ef.any_of([A], sharpness=ef.AboveSigma(1)), "must be a number")])
def test_wrong_types(use, message):
    with pytest.raises(TypeError, match=message):
        use()


F = ef.Family(ConditionalQuadratic(), "color", {"red": [1.0, 0.0], "blue": [0.0, 1.0]})


@pytest.mark.parametrize(("use", "message"), [
    (lambda: ef.all_of([]), "at least one"), (lambda: ef.all_of([A], [1, 2]), "1 entries, got 2"),
    (lambda: ef.any_of([A], sharpness=0), "positive"), (lambda: ef.negate(A, -1), "not be negative"),
    (lambda: F("rde"), "did you mean 'red'"), (lambda: F(1, 2, 3), "must have 2 numbers, got 3"),
    (lambda: F(), "label or a condition"), (lambda: F.unconditional, "unconditional=True"),
    (lambda: F(1, math.nan), "finite"), (lambda: ef.Concept(Quadratic(0.0), reduce="mean"), "reduce"),
    (lambda: ef.Concept(Quadratic(0.0), condition="red"), "vector of numbers"),
    (lambda: ef.Family(Quadratic(0.0), "f", {"a": [1], "b": [1, 2]}), "one width"),
    (lambda: ef.Slot(""), "non-empty")])
def test_wrong_values(use, message):
    with pytest.raises(ValueError, match=message):
        use()


def test_expressions_are_immutable():
    with pytest.raises(AttributeError):
        A.name = "other"
    with pytest.raises(AttributeError):
        (A & B).terms = ()


def test_bounded_negation_leaves_alone_what_is_not_like_the_concept():
    """p(x) ∝ p_a / (1 + odds·p_b/p) in one dimension, against the formula; far from b, the density of a."""
    a, b, prior = gaussian([1.0]), gaussian([-1.0], 25.0), gaussian([0.0], 0.25)
    e, x = ef.without(a, b, prior, 7.0), torch.linspace(-4, 4, 81, dtype=torch.float64)[:, None]
    ratio = torch.exp(prior.energy(x) - b.energy(x))
    torch.testing.assert_close(e.energy(x), a.energy(x) + torch.log1p(7 * ratio))
    assert float((e.gradient(x) - a.gradient(x))[x[:, 0] > 0.5].abs().max()) < 1e-6
    assert e.tail_weight == 1.0 and e.step_scale == a.step_scale
    plain = a & ef.negate(b, 0.3)
    assert float((plain.gradient(x) - a.gradient(x))[-1].abs()) > 30  # the quotient pushes on, the further away the more
    models = [a, b, prior]
    assert ef.from_json(e.to_json(), models) == e
    assert ef.parse(f"without({a.name}, {b.name}, {prior.name}, 7.0)".replace(a.name, "a").replace(b.name, "b").replace(
        prior.name, "p"), {"a": a, "b": b, "p": prior}) == e
    with pytest.raises(ValueError, match="`odds` must be positive"):
        ef.without(a, b, prior, 0.0)
