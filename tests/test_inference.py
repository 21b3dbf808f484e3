"""Posteriors over conditions against closed forms."""

import math

import pytest
import scene_sheet
import torch
from models import ConditionalQuadratic, NoisedGaussian, gaussian

import ebmfast as ef
from ebmfast.inference import grid


def observations(n, dim=2, seed=0):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def quadratic_posterior(x, rows, precision):
    """softmax over rows c of -Σ_n p/2 |x_n - c|², in double."""
    energy = 0.5 * precision * (x.double()[:, None] - rows.double()).square().sum(2).sum(0)
    return energy, torch.softmax(-energy, 0)


def test_a_grid_has_its_centres_in_reading_order():
    g = grid([(0.0, 1.0), (-1.0, 1.0)], [2, 4])
    assert g.shape == (4, 2) and g.rows.tolist()[:3] == [[0.25, -0.75], [0.75, -0.75], [0.25, -0.25]]
    with pytest.raises(ValueError, match="`points` must be positive"):
        grid([(0, 1)], [2, 3])


def test_energies_of_one_scene_add_up_over_its_observations():
    family = ef.Family(ConditionalQuadratic(3.0), "f", condition_dim=2)
    x, g = observations(5), grid([(-2, 2), (-2, 2)], 9)
    r = ef.infer(x, family[ef.Slot("c")], {"c": g}, scene=[1, 0, 1, 1, 0])
    assert r.energy.shape == (2, 81) and r.energy.dtype is torch.float64
    for scene, shown in ((0, [1, 4]), (1, [0, 2, 3])):
        energy, posterior = quadratic_posterior(x[shown], g.rows, 3.0)
        torch.testing.assert_close(r.energy[scene], energy, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(r.posterior[scene], posterior, rtol=1e-3, atol=1e-5)
        assert torch.equal(r.best["c"][scene], g.rows[energy.argmin()])
        torch.testing.assert_close(r.mean("c")[scene], (posterior @ g.rows.double()).float(), rtol=1e-3, atol=1e-4)
    together = ef.infer(x, family[ef.Slot("c")], {"c": g}, scene="one")
    torch.testing.assert_close(together.energy[0], r.energy.sum(0), rtol=1e-5, atol=1e-4)
    apart = ef.infer(x, family[ef.Slot("c")], {"c": g}, batch_size=7)
    torch.testing.assert_close(apart.energy.sum(0), r.energy.sum(0), rtol=1e-5, atol=1e-4)


def test_between_the_points_of_a_grid():
    """A quadratic energy has its minimum at the mean of the observations, wherever that lies between points."""
    mixed = torch.tensor([[2.0, 0.7], [0.7, 1.0]])
    energy = ef.Family(lambda x, condition: torch.einsum("bi,ij,bj->b", x - condition, mixed, x - condition), "f", condition_dim=2)
    x = torch.tensor([[0.31, -0.52], [0.03, 0.66], [5.0, 0.0]])
    r = ef.infer(x, energy[ef.Slot("c")], {"c": grid([(-1, 1), (-2, 2)], [10, 12])})
    torch.testing.assert_close(r.refined("c")[:2], x[:2], rtol=1e-3, atol=1e-3)
    assert torch.equal(r.refined("c")[2], r.best["c"][2])  # at the rim
    prior = 0.8 * r.candidates["c"][:, 0].double()
    tilt = ef.infer(x, energy[ef.Slot("c")], {"c": grid([(-1, 1), (-2, 2)], [10, 12])}, log_prior=prior)
    shift = torch.linalg.solve(2 * mixed, torch.tensor([0.8, 0.0]))  # of the minimum, by a prior that is exponential in c_1
    torch.testing.assert_close(tilt.refined("c")[:2], x[:2] + shift, rtol=1e-3, atol=1e-3)
    line = ef.Family(ConditionalQuadratic(), "g", condition_dim=1)
    r = ef.infer(torch.tensor([[0.43]]), line[ef.Slot("c")], {"c": grid([(0, 1)], 5)})
    torch.testing.assert_close(r.refined("c"), torch.tensor([[0.43]]), rtol=1e-3, atol=1e-3)


def test_several_slots_are_combined_and_each_leaf_is_evaluated_once_per_candidate():
    one, two = ConditionalQuadratic(2.0), ConditionalQuadratic(5.0)
    a = ef.Family(one, "a", condition_dim=2, unconditional=True)
    b = ef.Family(two, "b", condition_dim=2)
    x, p, q = observations(3), observations(7, seed=1), observations(4, seed=2)
    for expression in (a[ef.Slot("p")] & 0.5 * b[ef.Slot("q")], a[ef.Slot("p")] | (b[ef.Slot("q")] & a.unconditional)):
        one.calls = two.calls = 0
        r = ef.infer(x, expression, {"q": q, "p": p})
        assert r.names == expression.slots and r.energy.shape == (3, 7, 4) and two.calls == 1
        for i in range(7):
            for j in range(4):
                rows = {"p": p[i].expand(3, 2), "q": q[j].expand(3, 2)}
                wanted = expression.energy(x, conditions=rows).double()
                torch.testing.assert_close(r.energy[:, i, j], wanted, rtol=1e-4, atol=1e-4)
    joint = r.posterior
    torch.testing.assert_close(joint.sum((1, 2)), torch.ones(3).double())
    torch.testing.assert_close(r.marginal("q"), joint.sum(1))
    flat = joint.flatten(1).argmax(1)
    assert r.index.tolist() == [[int(k) // 4, int(k) % 4] for k in flat]


def test_hypotheses_are_compositions_and_questions_are_independent():
    left, right, wide = gaussian([-1.0, 0.0]), gaussian([1.0, 0.0]), gaussian([0.0, 0.0], 0.1)
    x = observations(4)
    r = ef.infer(x, {"side": [left, right], "kind": [wide, left & wide, left | right]})
    side = torch.stack([left.energy(x), right.energy(x)], 1).double()
    kind = torch.stack([e.energy(x) for e in (wide, left & wide, left | right)], 1).double()
    torch.testing.assert_close(r.energy, side[:, :, None] + kind[:, None], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(r.marginal("side"), torch.softmax(-side, 1), rtol=1e-4, atol=1e-6)
    assert r.best["side"] == [(left, right)[k] for k in side.argmin(1).tolist()]
    cancelling = ef.infer(x, [left & wide, ef.all_of([left, wide], weights=[1, -1])])  # leaves that would cancel in a sum
    wanted = torch.stack([left.energy(x) + wide.energy(x), left.energy(x) - wide.energy(x)], 1).double()
    torch.testing.assert_close(cancelling.energy, wanted, rtol=1e-5, atol=1e-5)


def test_constants_count_once_for_each_observation():
    """Variances 1 and 0.25: by energies alone the wide one wins on points at its centre, by densities the narrow one."""
    wide = ef.Calibrated(gaussian([0.0, 0.0]), math.log(2 * math.pi))
    narrow = ef.Calibrated(gaussian([0.6, 0.0], 4.0), math.log(2 * math.pi / 4))
    x = torch.tensor([[0.5, 0.1], [0.2, 0.0], [0.9, -0.2]])
    r = ef.infer(x, [wide, narrow], scene="one")
    normal = torch.distributions.Normal
    densities = [normal(0.0, 1.0).log_prob(x).sum(), normal(torch.tensor([0.6, 0.0]), 0.5).log_prob(x).sum()]
    torch.testing.assert_close(r.posterior[0], torch.softmax(torch.stack(densities).double(), 0), rtol=1e-4, atol=1e-5)
    raw = ef.infer(x, [wide.expression, narrow.expression], scene="one")
    gap = (raw.energy - r.energy)[0]
    torch.testing.assert_close(gap, -3 * torch.tensor([wide.log_z, narrow.log_z]).double(), rtol=1e-4, atol=1e-4)


def test_a_prior_over_candidates():
    a, b = gaussian([-1.0]), gaussian([1.0])
    prior = torch.tensor([0.9, 0.1]).log().double()
    r = ef.infer(torch.zeros(1, 1), [a, b], log_prior=prior)
    torch.testing.assert_close(r.posterior[0], torch.tensor([0.9, 0.1]).double())


def test_energies_at_a_noise_level_are_averaged_over_noised_copies():
    family = ef.Family(NoisedGaussian(0.5), "f", condition_dim=2, sigma=(0.1, 4.0))
    x, rows = observations(2), observations(5, seed=3)
    exact = ef.infer(x, family[ef.Slot("c")], {"c": rows}, sigma=0.8, draws=0).energy
    wanted = 0.5 * (x.double()[:, None] - rows.double()).square().sum(2) / (0.25 + 0.64)
    torch.testing.assert_close(exact, wanted, rtol=1e-5, atol=1e-5)
    noised = ef.infer(x, family[ef.Slot("c")], {"c": rows}, sigma=0.8, draws=1000, batch_size=10).energy
    spread = 0.8 * (wanted.sqrt() * math.sqrt(2 / 0.89) + 1) / math.sqrt(1000)
    assert ((noised - (wanted + 0.64 * 2 / 2 / 0.89)).abs() < 5 * spread).all()  # E|x + σn - c|² = |x - c|² + 2σ²
    assert torch.equal(ef.infer(x, family[ef.Slot("c")], {"c": rows}, sigma=0.8, seed=1).energy,
                       ef.infer(x, family[ef.Slot("c")], {"c": rows}, sigma=0.8, seed=1, batch_size=3).energy)
    with pytest.raises(ValueError, match="takes a noise level"):
        ef.infer(x, family[ef.Slot("c")], {"c": rows})
    with pytest.raises(ValueError, match="must lie within 0.1 to 4"):
        ef.infer(x, family[ef.Slot("c")], {"c": rows}, sigma=9.0)


def test_chains_over_conditions_have_the_posterior():
    """N(x | c, 1/p) under a flat prior: c ~ N(mean of x, 1/(N p)), for scenes with different numbers of observations."""
    family = ef.Family(ConditionalQuadratic(4.0), "f", condition_dim=2)
    x = 0.3 * observations(5)
    r = ef.infer(x, family[ef.Slot("c")], ranges={"c": [(-3.0, 3.0), (-3.0, 3.0)]}, scene=[0, 1, 1, 1, 1], chains=300,
                 steps=150, seed=2)
    assert r.samples["c"].shape == (2, 300, 2) and r.energy.shape == (2, 300) and 0.3 < float(r.acceptance.mean()) < 0.9
    for scene, shown in ((0, [0]), (1, [1, 2, 3, 4])):
        deviation = 1 / math.sqrt(4.0 * len(shown))
        rows = r.samples["c"][scene]
        assert ((r.mean("c")[scene] - x[shown].mean(0)).abs() < 5 * deviation / math.sqrt(300)).all()
        assert ((rows.std(0) / deviation - 1).abs() < 5 / math.sqrt(600)).all()
        energies = 2.0 * (x[shown][:, None] - rows).square().sum((0, 2))
        torch.testing.assert_close(r.energy[scene], energies, rtol=1e-4, atol=1e-4)
        assert torch.equal(r.best["c"][scene], rows[energies.argmin()])


def test_chains_over_two_slots_and_langevin():
    a = ef.Family(NoisedGaussian(0.5), "a", condition_dim=1, sigma=(0.1, 4.0))
    b = ef.Family(ConditionalQuadratic(), "b", condition_dim=1, unconditional=True)
    x = torch.full((1, 1), 0.4)
    expression = a[ef.Slot("p")] & 3.0 * b[ef.Slot("q")] & b.unconditional
    r = ef.infer(x, expression, ranges={"q": [(0.0, 1.0)], "p": [(-1.0, 1.0)]}, sigma=0.3, draws=0,
                 sampler=ef.Langevin(step_size=1e-3, temperature=1e-4, clamp=(0.0, 1.0)), steps=300)
    assert abs(float(r.best["p"]) - 0.4) < 0.05 and abs(float(r.best["q"]) - 0.4) < 0.05


def test_maps_lie_as_the_picture_does():
    family = ef.Family(ConditionalQuadratic(9.0), "f", condition_dim=2)
    r = ef.infer(torch.tensor([[0.75, -0.75]]), family[ef.Slot("c")], {"c": grid([(-1, 1), (-1, 1)], [8, 4])})
    found = r.map("c")
    assert found.shape == (4, 8) and int(found.argmax()) in (3 * 8 + 6, 3 * 8 + 7)  # right, and at the bottom
    torch.testing.assert_close(found.exp().sum(), torch.tensor(1.0).double())
    plain = ef.infer(torch.zeros(1, 2), family[ef.Slot("c")], {"c": torch.zeros(3, 2)})
    with pytest.raises(ValueError, match="not a grid over two numbers"):
        plain.map("c")


FAMILY = ef.Family(ConditionalQuadratic(), "f", condition_dim=2)
X = torch.zeros(2, 2)
C = {"c": torch.zeros(3, 2)}


@pytest.mark.parametrize(("arguments", "error", "message"), [
    (dict(x=X[0], hypotheses=[FAMILY(0, 0)]), ValueError, "`x` must be one or more observations"),
    (dict(x=X, hypotheses=FAMILY[ef.Slot("c")]), ValueError, "`conditions`, the candidates"),
    (dict(x=X, hypotheses=FAMILY[ef.Slot("c")], conditions={"d": X}), ValueError, r"must fill the slots \['c'\]"),
    (dict(x=X, hypotheses=FAMILY[ef.Slot("c")], conditions={"c": torch.zeros(3)}), ValueError, r"finite rows \[G, C\]"),
    (dict(x=X, hypotheses=FAMILY[ef.Slot("c")], conditions=C, scene=[0, 2]), ValueError, "without gaps"),
    (dict(x=X, hypotheses=FAMILY[ef.Slot("c")], conditions=C, scene="each"), ValueError, '`scene` must be "one"'),
    (dict(x=X, hypotheses=FAMILY[ef.Slot("c")], conditions=C, draws=-1), ValueError, "`draws` must be"),
    (dict(x=X, hypotheses=[FAMILY[ef.Slot("c")]]), ValueError, "has the slot 'c'"),
    (dict(x=X, hypotheses=[FAMILY(0, 0)], conditions=C), ValueError, "a list of hypotheses has none"),
    (dict(x=X, hypotheses=FAMILY(0, 0), conditions={}), ValueError, "or one with slots"),
    (dict(x=X, hypotheses=[ef.Calibrated(FAMILY(0, 0), 1.0), FAMILY(1, 0)]), ValueError, "do not compare"),
    (dict(x=X, hypotheses=["red"]), TypeError, "must be concepts"),
    (dict(x=X, hypotheses=FAMILY[ef.Slot("c")], ranges={"c": [(1.0, 0.0)] * 2}), ValueError, r"pairs \(low, high\)"),
    (dict(x=X, hypotheses=FAMILY[ef.Slot("c")], ranges={"p": [(0.0, 1.0)] * 2}), ValueError, "must name the slots"),
])
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        ef.infer(**arguments)


def test_rendered_scenes_are_explained_by_the_bundled_models():
    """Eight rendered test scenes: shape and colour by energy, position within 0.2 of its range of 2, size within 0.05 of 0.3."""
    data, zoo = scene_sheet.load()[slice(0, 8)], ef.zoo.concepts()
    x = data.pixels()
    for name, truth in (("color", data.color), ("shape", data.shape)):
        family = zoo[name]
        r = ef.infer(x, {name: [family(label) for label in family.labels]}, sigma=0.4)
        assert torch.equal(r.index[:, 0], truth)
    places = {"p": grid([(-1, 1), (-1, 1)], 8)}
    r = ef.infer(x, zoo["position"][ef.Slot("p")], places, sigma=0.4)
    assert ((r.mean("p") - data.position).abs() < 0.2).all()
    r = ef.infer(x, zoo["size"][ef.Slot("s")], {"s": grid([(0.4, 0.7)], 6)}, sigma=0.2)
    assert ((r.mean("s")[:, 0] - data.size).abs() < 0.06).all()


def test_chains_find_the_position_of_a_rendered_scene():
    data = scene_sheet.load()[slice(0, 2)]
    r = ef.infer(data.pixels(), ef.zoo.concepts()["position"][ef.Slot("p")], ranges={"p": [(-1, 1), (-1, 1)]}, sigma=0.4,
                 chains=2, steps=12)
    assert ((r.mean("p") - data.position).abs() < 0.25).all()
