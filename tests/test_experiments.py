"""The experiments' machinery on worlds where the answers are known, and their commands on tiny models."""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import scene_sheet
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import ebmfast as ef
from ebmfast import cli, evaluation, experiments, models, scenes, zoo
from ebmfast.experiments import All, Any, Count, Is, Law, Not, Row, Settings, judge_cli, observations, position
from ebmfast.experiments import cli as experiments_cli
from ebmfast.experiments.measures import free_attributes, kernel_distance, mean, share
from ebmfast.experiments.protocol import Models, Protocol, density, expression
from ebmfast.experiments.report import Table
from ebmfast.experiments.tree import assign, compose

P, Q, C, D, S, Z = (Is("position", "p"), Is("position", "q"), Is("color", "c"), Is("color", "d"), Is("shape", "f"), Is("size", "s"))

# A world of pictures [3, 4, 4] whose pixels are the labels: position 0-1, size 2, shape 3-5, colour 6-11. Energies are Gaussian.
PLACES = {"position": slice(0, 2), "size": slice(2, 3), "shape": slice(3, 6), "color": slice(6, 12)}


class World(nn.Module):
    """E(x | c, σ): N(c, 0.02²) for a concept's pixels, N(0, 1) for all others, each with noise σ²."""

    def __init__(self, concept, offset=0.0):
        super().__init__()
        self.own, self.offset = PLACES[concept], offset

    def forward(self, x, condition=None, sigma=None):
        x = x.flatten(1)
        level = sigma[:, None].square()
        every = 0.5 * x.square() / (1 + level) + 0.5 * torch.log1p(level)
        if condition is None:
            return every.sum(1)
        narrow = 0.5 * (x[:, self.own] - condition).square() / (0.0004 + level) + 0.5 * torch.log(0.0004 + level)
        return every.sum(1) - every[:, self.own].sum(1) + narrow.sum(1) + self.offset * condition[:, 0]


class Reading:
    """Reads that world without error."""

    def read(self, x):
        x = x.flatten(1)
        return {"present": torch.ones(len(x), dtype=torch.bool), "position": x[:, 0:2], "size": x[:, 2],
                "shape": x[:, 3:6].argmax(1), "color": x[:, 6:12].argmax(1)}

    def features(self, x):
        return x.flatten(1)[:, :12]


class Renders:
    """Labels drawn from the law, and the pictures that they are."""

    def __init__(self, n, seed=0):
        labels = Law().labels(n, torch.Generator().manual_seed(seed))
        self.position, self.size, self.shape, self.color = (labels[k] for k in ("position", "size", "shape", "color"))
        self.odd = torch.arange(n) % 2

    def __len__(self):
        return len(self.size)

    def __getitem__(self, index):
        part = Renders.__new__(Renders)
        for name in ("position", "size", "shape", "color", "odd"):
            setattr(part, name, getattr(self, name)[index])
        return part

    def pixels(self):
        rest = F.pad(self.odd[:, None].float(), (35, 0))  # the last pixel: which half of the renders
        shape, color = F.one_hot(self.shape, 3).float(), F.one_hot(self.color, 6).float()
        return torch.cat([self.position, self.size[:, None], shape, color, rest], 1).view(-1, 3, 4, 4)


def card(name, dim, **more):
    schedule = {"sigma_max": 3.0, "sigma_min": 0.05, "levels": 8, "steps_per_level": 8, "drift": 0.3, "denoise": True}
    return {"name": name, "condition_dim": dim, "shape": [3, 4, 4], "schedule": schedule, "prior": True, "labels": {},
            "ranges": [[-1, 1]] * dim, "data_range": [-1, 1], "sigma": [0.05, 3.0], "negation_alpha": 0.3} | more


def world(**offsets):
    dims = {"position": 2, "size": 1, "shape": 3, "color": 6}
    families = {n: ef.Family(World(n, offsets.get(n, 0.0)), n, condition_dim=d, unconditional=True, negation_alpha=0.3)
                for n, d in dims.items()}
    return Models(families, {n: card(n, d) for n, d in dims.items()})


def protocol(**changes):
    return Protocol(Reading(), Law(), **({"n": 120, "conditions": 30, "real": Renders(1500), "batch_size": 120} | changes))


def test_trees_hold_where_their_boolean_formula_does():
    rows = {"p": torch.tensor([[0.0, 0.0]] * 4), "c": torch.eye(6)[[0, 0, 0, 0]]}
    seen = {"position": torch.tensor([[0.4, -0.4], [0.41, 0.0], [0.0, 0.0], [1.0, 1.0]]), "color": torch.tensor([0, 0, 1, 2]),
            "present": torch.tensor([True, True, True, True])}
    a, b = torch.tensor([True, False, True, False]), torch.tensor([True, True, False, False])
    for tree, wanted in ((P, a), (C, b), (All(P, C), a & b), (Any(P, C), a | b), (All(P, Not(C)), a & ~b),
                         (Not(Any(P, C)), ~(a | b)), (All(Any(P, C), Not(All(P, C))), a ^ b)):
        assert torch.equal(tree.holds(seen, rows), wanted), tree
    seen["present"][0] = False
    assert P.right(seen, rows).tolist() == [False, False, True, False]
    size = {"size": torch.tensor([0.5, 0.561]), "present": torch.tensor([True, True]), "count": torch.tensor([2, 3])}
    assert Z.holds(size, {"s": torch.full((2, 1), 0.5)}).tolist() == [True, False]
    assert Count(2).holds(size, {}).tolist() == [True, False]


def test_a_tree_composes_what_the_algebra_would():
    f = world().families
    p, q, c = (f[n][ef.Slot(s)] for n, s in (("position", "p"), ("position", "q"), ("color", "c")))
    tree = Any(All(P, C), All(Q, Not(C)))
    wanted = ef.any_of([ef.all_of([p, c], [1.0, 2.0]), ef.all_of([q, ef.negate(c, 0.2)])])
    assert compose(tree, f, lambda name: 2.0 if name == "color" else 1.0, 0.2).simplified == wanted.simplified
    assert compose(All(P, Not(C)), f).simplified == (p & ef.negate(c, 0.3)).simplified  # the model's own alpha
    assert tree.concepts == ("position", "color") and tree.slots == ("p", "c", "q")
    with pytest.raises(TypeError, match="has no energy"):
        compose(Count(2), f)


@pytest.mark.parametrize("tree", [
    P, All(P, C, S, Z), All(P, Not(C)), Any(P, Q), Any(All(P, C), All(Q, D)), All(C, Not(P))], ids=repr)
def test_labels_are_drawn_so_that_the_tree_holds(tree):
    rows = experiments.draw_conditions(400, 3)
    labels = assign(tree, rows, Law(), torch.Generator().manual_seed(0))
    assert tree.holds(labels, rows).all()
    if tree == Any(P, Q):
        first = P.holds(labels, rows).float().mean()
        assert abs(float(first) - 0.5) < 5 * 0.5 / 20
    if tree == All(P, Not(C)):  # free attributes keep their law, and colours all but one
        assert torch.equal(labels["position"], rows["p"]) and set(labels["color"].tolist()) == set(range(6))
        assert abs(float(labels["size"].mean()) - 0.55) < 0.03


def test_conditions_are_seeded_and_far_enough_apart():
    rows, again = experiments.draw_conditions(300, 1), experiments.draw_conditions(300, 1)
    assert all(torch.equal(rows[k], again[k]) for k in rows)
    assert not torch.equal(rows["p"], experiments.draw_conditions(300, 2)["p"]) and len(torch.unique(rows["p"], dim=0)) == 300
    assert not evaluation.near(rows["p"], rows["q"], 0.8).any()
    assert not (rows["c"].argmax(1) == rows["d"].argmax(1)).any() and not (rows["f"].argmax(1) == rows["g"].argmax(1)).any()
    for a, b in itertools.combinations(("p1", "p2", "p3"), 2):
        assert ((rows[a] - rows[b]).norm(dim=1) >= 0.9).all()
    law = Law(colors=4, held_out=((0, 1), (2, 3)))
    pairs = {w: experiments.draw_conditions(300, 1, law, w) for w in ("seen", "unseen")}
    found = {w: set(zip(r["f"].argmax(1).tolist(), r["c"].argmax(1).tolist())) for w, r in pairs.items()}
    assert found["unseen"] == {(0, 1), (2, 3)} and found["seen"].isdisjoint(found["unseen"]) and len(found["seen"]) == 10
    drawn = law.labels(500, torch.Generator().manual_seed(0))
    assert set(zip(drawn["shape"].tolist(), drawn["color"].tolist())) == found["seen"]
    for rows in pairs.values():  # the second pair is one that training showed, and shares nothing with the first
        second = list(zip(rows["g"].argmax(1).tolist(), rows["d"].argmax(1).tolist()))
        assert set(second).isdisjoint(found["unseen"]) and not (rows["f"].argmax(1) == rows["g"].argmax(1)).any()
    assert law.shown(torch.tensor([0, 0, 2]), torch.tensor([0, 1, 3])).tolist() == [True, False, False]
    with pytest.raises(ValueError, match="no unseen pairs"):
        experiments.draw_conditions(3, 1, Law(), "unseen")


def test_intervals_cover_the_truth_over_conditions():
    """Samples of one condition are alike: intervals over conditions cover 95 %, where those over samples would cover far less."""
    g = torch.Generator().manual_seed(0)
    group, covered, narrow = torch.arange(40).repeat_interleave(10), 0, 0
    for _ in range(200):
        chance = (torch.rand(40, generator=g) < 0.6).float() * 0.8 + 0.1  # of success, 0.58 on average
        held = torch.rand(400, generator=g) < chance[group]
        cell = share(held, group)
        assert cell.value == pytest.approx(float(held.float().mean()))
        covered += cell.low <= 0.58 <= cell.high
        narrow += abs(cell.value - 0.58) < 1.96 * math.sqrt(cell.value * (1 - cell.value) / 400)
    assert 0.88 <= covered / 200 <= 0.99 and narrow / 200 < 0.7
    cell = mean(torch.tensor([1.0, 3.0, 5.0]), torch.arange(3))
    assert cell.value == 3.0 and 1.0 <= cell.low < 3.0 < cell.high <= 5.0


def test_the_kernel_distance_is_zero_on_average_for_one_law():
    g = torch.Generator().manual_seed(0)
    same = [kernel_distance(torch.randn(100, 8, generator=g), torch.randn(100, 8, generator=g)) for _ in range(60)]
    values, errors = torch.tensor([c.value for c in same]), torch.tensor([c.error for c in same])
    assert abs(float(values.mean())) < 4 * float(values.std()) / 60**0.5
    assert 0.6 < float(values.std() / errors.mean()) < 1.6
    other = kernel_distance(torch.randn(200, 8, generator=g) + 0.5, torch.randn(200, 8, generator=g))
    assert other.value > 5 * other.error
    with pytest.raises(ValueError, match="at least 4 pictures"):
        kernel_distance(torch.zeros(3, 2), torch.zeros(9, 2))


def test_free_attributes_are_compared_with_their_law():
    law, g = Law(), torch.Generator().manual_seed(0)
    seen = law.labels(600, g) | {"present": torch.ones(600, dtype=torch.bool)}
    cells = free_attributes(seen, law, ("position", "size", "shape", "color"))
    assert all(c.value < 2.5 * c.error for c in cells.values()) and cells["color"].error == pytest.approx(0.036, abs=0.006)
    seen["color"] = torch.where(torch.arange(600) < 300, 0, seen["color"])
    assert free_attributes(seen, law, ("color",))["color"].value == pytest.approx(0.5 * 5 / 6, abs=0.04)
    seen["present"] = torch.arange(600) >= 300  # what is not there does not count
    assert free_attributes(seen, law, ("color",))["color"].value < 0.1
    seen["size"][:] = 0.69
    assert free_attributes(seen, law, ("size",))["size"].value == pytest.approx(2 / 3)


@pytest.mark.parametrize("row", [
    Row("and", All(P, C), {"position": P, "color": C, "all": All(P, C)}),
    Row("nested", Any(All(P, C), All(Q, D)), {"all": Any(All(P, C), All(Q, D))}),
    Row("four", All(S, C, P, Z), {"all": All(S, C, P, Z)})],
    ids=lambda r: r.title)
def test_a_world_with_known_energies_is_composed_right(row):
    """Every line of the protocol where all models are exact: samples and renders are right, chance is what it must be."""
    run, m = protocol(), world()
    ours = run.sampled(row, m, Settings(prior_above=0.0))
    assert ours.cells["all"].value > 0.97 and ours.cells["object present"].value == 1.0 and ours.temperature == pytest.approx(1.0)
    assert ours.pictures.shape == (64, 3, 4, 4)
    real = run.renders(row)
    assert real.cells["all"].value == 1.0 and real.by == "real renders"
    assert (real.pictures[:, 2, 3, 3] == 1).all()  # distances are to the other half
    if row.title == "and":
        rows, shown = run.rows(row)[0], real.pictures.flatten(1)[:, :2]
        assert float((shown - rows["p"][:64]).abs().max()) < 0.4 - 0.03  # well inside, not at the edge of what is right
    if row.title == "and":
        chance = run.chance(row)
        assert chance.cells["color"].value == pytest.approx(1 / 6, abs=0.13) and chance.cells["all"].value < 0.12
        assert abs(real.cells["kernel distance"].value) < 5 * real.cells["kernel distance"].error
        assert set(row.free) == {"size", "shape"} and ours.cells["free attributes"].about in row.free


def test_chains_that_diverge_show_nothing_and_are_counted():
    """Steps that are too long for one color's energy stop its chains, not the table."""
    row, m, run = Row("color", C, {"color": C}), world(), protocol()
    steep = torch.tensor([0.0] * 5 + [1e30])
    color = m.families["color"]

    class Steep(torch.nn.Module):
        def forward(self, x, condition, sigma=None):
            return color.source.model(x, condition, sigma) + (condition @ steep) * x.flatten(1).square().sum(1)

    families = {**m.families, "color": ef.Family(Steep(), "color", condition_dim=6)}
    line = run.sampled(row, dataclasses.replace(m, families=families), Settings(plain=True))
    asked = (run.rows(row)[0]["c"][:, 5] == 1).sum().item()
    assert 0 < asked < run.n
    assert line.note.startswith(f"{asked} of {run.n} chains left the region where steps are stable")
    assert line.cells["object present"].value == pytest.approx(1 - asked / run.n)
    assert run.sampled(row, m).note == ""


def test_a_prior_that_is_counted_twice_is_seen():
    """Without correction the size, that neither concept speaks of, has half the variance: the plain product says so."""
    row, m = Row("and", All(P, C), {"all": All(P, C)}), world()
    corrected, plain = (expression(row, m, Settings(prior_above=0.0, plain=plain)) for plain in (False, True))
    rows = {"p": torch.zeros(1, 2), "c": torch.eye(6)[:1]}
    one, two = (e.energy(torch.full((1, 3, 4, 4), 0.5), 0.05, rows) - e.energy(torch.zeros(1, 3, 4, 4), 0.05, rows)
                for e in (corrected, plain))
    # Twice counted: the prior of all 48 pixels at 0.5, half of x²/(1 + σ²).
    torch.testing.assert_close(two - one, torch.tensor([48 * 0.5 * 0.25 / 1.0025]), rtol=1e-3, atol=1e-2)
    assert density(row, m, Settings(plain=True)) == "plain product"
    assert density(row, m, Settings()) == "product, each prior counted once"  # the card names no level
    assert density(row, m, Settings(prior_above=0.2)) == "product, each prior counted once above sigma 0.2"
    negated = Row("not", All(P, Not(C)), {})
    words = density(negated, m, Settings(odds=None, alpha=0.4, alpha_above=1.0, weights=(("color", 2.0),)))
    assert words.endswith("alpha 0.4 above sigma 1; weights color 2")
    assert density(negated, m, Settings(odds=5.0)) == "bounded negation, odds 5"
    p, c = m.families["position"][ef.Slot("p")], m.families["color"]
    assert expression(negated, m, Settings(odds=5.0)) == ef.without(p, c[ef.Slot("c")], c.unconditional, 5.0)
    assert density(Row("or", Any(P, Q), {}), m, Settings()) == "sum of densities"


def test_energies_without_a_noise_level_are_sampled_as_the_paper_does():
    """Of range [0, 1]: read in [-1, 1]. Without priors a plain product and the models' own alpha."""

    class Bowl(nn.Module):
        def forward(self, x, condition):
            wanted = (condition + 1) / 2
            return 50 * (x.flatten(1)[:, :2] - wanted).square().sum(1)

    schedule = {"step": 0.005, "noise": 0.001, "steps": 60, "gradient_clip": None}
    about = card("position", 2, schedule=schedule, data_range=[0, 1], prior=False, sigma=None, method="contrastive divergence")
    m = Models({"position": ef.Family(Bowl(), "position", condition_dim=2, data_range=(0, 1))}, {"position": about},
               "contrastive divergence")
    found = protocol(real=None).sampled(Row("position", P, {"position": P}), m)
    assert found.cells["position"].value == 1.0 and found.temperature < 1e-3 and float(found.pictures.min()) >= -1
    adapted = m.adapted(Settings())
    assert adapted.plain and adapted.odds is None and adapted.alpha is None


def test_one_joint_model_is_asked_for_labels_that_are_right():
    row = Row("not", All(P, Not(C)), {"position": P, "color": C})

    class Joint(nn.Module):
        def forward(self, x, condition, sigma):
            wanted = torch.cat([condition[:, 9:11], condition[:, 11:12], condition[:, 0:3], condition[:, 3:9]], 1)
            x = x.flatten(1)
            level = sigma[:, None].square()
            return (0.5 * (x[:, :12] - wanted).square() / (0.0004 + level)).sum(1) + (0.5 * x[:, 12:].square() / (1 + level)).sum(1)

    m = Models({"joint": ef.Family(Joint(), "joint", condition_dim=12)}, {"joint": card("joint", 12)})
    found = protocol().joint(row, m)
    assert found.cells["position"].value > 0.97 and found.cells["color"].value == 0.0 and found.by == "one joint model"


def test_tables_are_written_for_people_and_for_programs(tmp_path):
    pytest.importorskip("PIL")
    row = Row("and", All(P, C), {"position": P, "all": All(P, C)})
    run = protocol(n=40, conditions=10)
    lines = [run.sampled(row, world()), run.chance(row), run.renders(row)]
    lines[1].density = "p(x | c)"
    floors = [("and", "position", ">=", 0.5), ("and", "all", "<=", 0.1)]
    paper = (("row", "x"), ("and", ".5"))
    table = Table("and", "A table", ("position", "all", "kernel distance"), lines, {"n": 40}, floors, paper, "So.")
    paths = table.write(tmp_path)
    text, data = paths[0].read_text(), json.loads(paths[1].read_text())
    assert [p.name for p in paths] == ["and.md", "and.json", "and.png"]
    assert "| and " in text and "real renders" in text and "reached" in text and "missed" in text and ".5" in text
    widths = {len(line) for line in text.split("\n\n")[2].splitlines()}
    assert len(widths) == 1  # columns are aligned
    assert r"p(x \| c)" in text  # a bare bar would begin another cell
    first = data["lines"][0]
    assert first["by"] == "score matching" and set(first["cells"]["position"]) == {"value", "low", "high"}
    assert [f["reached"] for f in data["floors"]] == [True, False]


def test_every_experiment_builds_grounded_compositions_of_its_models():
    families, bundled = zoo.concepts(), Models.bundled()
    assert bundled.law == Law() and bundled.hybrid and bundled.method == "score matching, hybrid"
    for name, experiment in experiments.EXPERIMENTS.items():
        for row in experiment.rows:
            settings = experiments.protocol.CHOSEN.get(row.title, Settings())
            composed = expression(row, bundled, settings)
            composed.check_grounded([4.0, 0.06])
            assert set(composed.slots) == set(row.tree.slots), name
            assert settings.symmetric or all(leaf.family is families[leaf.family.name] for leaf in composed.leaves)
            assert set(row.floors) <= set(row.columns)


def test_settings_were_not_chosen_on_the_conditions_that_are_reported():
    assert experiments.protocol.TUNING_SEED != Protocol(Reading(), Law()).condition_seed
    tuned, reported = (experiments.draw_conditions(200, s)["p"] for s in (0, 1))
    assert not (tuned[:, None] == reported).all(2).any()
    with pytest.raises(ValueError, match="`conditions` must be from 2 to n"):
        protocol(conditions=500)


@dataclasses.dataclass
class Counted:
    """Pictures and how many objects they show."""

    images: torch.Tensor
    count: torch.Tensor

    def __len__(self):
        return len(self.count)

    def __getitem__(self, index):
        return Counted(self.images[index], self.count[index])

    def pixels(self):
        return self.images.float() / 127.5 - 1


def test_readers_learn_and_their_features_have_one_width():
    g = torch.Generator().manual_seed(0)
    count = torch.randint(0, 3, (160,), generator=g)
    images = torch.full((160, 3, 16, 16), 100, dtype=torch.uint8)
    for i, k in enumerate(count.tolist()):
        for j in range(k):
            images[i, :, 5:10, 1 + 8 * j:6 + 8 * j] = 250

    data = Counted(images, count)
    counter = evaluation.train_counter(data, epochs=12, batch=32)
    seen = counter.read(data.pixels())
    assert torch.equal(seen["count"], count) and torch.equal(seen["present"], count > 0)
    assert counter.features(data.pixels()).shape == (160, evaluation.FEATURES)
    for resolution in (32, 64):
        judge = evaluation.Judge(width=4, colors=20, resolution=resolution)
        assert judge(torch.zeros(2, 3, resolution, resolution))["color"].shape == (2, 20)
    with pytest.raises(ValueError, match="power of 2"):
        evaluation.Judge(resolution=48)


# The commands, on tiny models of random weights.

SIZE = 16


def write_model(folder: Path, name: str, model: nn.Module, about: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, str(folder / f"{name}.safetensors"))
    digest = hashlib.sha256((folder / f"{name}.safetensors").read_bytes()).hexdigest()
    path = folder / f"{name}.json"
    path.write_text(json.dumps(about | {"name": name, "sha256": digest}))
    return path


def energy(folder, name, dim, **more):
    arguments = {"condition_dim": dim, "widths": [4, 4, 4], "embedding": 8, "heads": 2}
    schedule = {"sigma_max": 2.0, "sigma_min": 0.1, "levels": 2, "steps_per_level": 1, "drift": 0.1, "denoise": False}
    labels = {"shape": ("cube", "sphere", "cylinder"), "color": ("red", "green", "blue", "yellow", "cyan", "purple")}.get(name, ())
    about = card(name, dim, shape=[3, SIZE, SIZE], schedule=schedule, sigma=[0.06, 4.0], kind="noise-conditional energy",
                 labels={n: [float(i == j) for j in range(dim)] for i, n in enumerate(labels)},
                 architecture={"class": "ebmfast.models.NoiseConditionalEnergy", "arguments": arguments}) | more
    torch.manual_seed(0)
    write_model(folder, name, models.NoiseConditionalEnergy(**arguments), about)


def cubes(folder, name, dim):
    about = card(name, dim, shape=[3, SIZE, SIZE], kind="energy", method="contrastive divergence", prior=False, sigma=None,
                 schedule={"sampler": "Langevin.reference_code", "step": 1.0, "noise": 0.001, "steps": 2, "gradient_clip": None},
                 takes_sigma=False, data_range=[0, 1],
                 architecture={"class": "ebmfast.models.CubesNet", "arguments": {"condition_dim": dim, "width": 4}})
    torch.manual_seed(0)
    write_model(folder, name, models.CubesNet(dim, 4), about)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    dims = {"position": 2, "size": 1, "shape": 3, "color": 6}
    for name, dim in dims.items():
        energy(root / "zoo", name, dim)
        energy(root / "hybrid", name, dim, recipe={"contrast_weight": 0.04})
        cubes(root / "paper", name, dim)
    for name in ("position", "shape", "color"):
        energy(root / "continual", name, dims[name])
    for name in ("shape", "color"):
        energy(root / "pairs", name, dims[name], held_out=[["cube", "blue"], ["sphere", "green"]])
    energy(root / "objects", "position", 2)
    energy(root / "joint", "joint", 12)
    for name, reader in (("judge", evaluation.Judge(4, resolution=SIZE)), ("counter", evaluation.Counter(4, 3, SIZE))):
        arguments = {"width": 4, "resolution": SIZE} | ({"most": 3} if name == "counter" else {})
        about = {"kind": name, "shape": [3, SIZE, SIZE],
                 "architecture": {"class": f"ebmfast.evaluation.{type(reader).__name__}", "arguments": arguments}}
        write_model(root / "readers", name, reader, about)
    return root


def evaluate(capsys, root, out, *names, kinds=("zoo", "objects", "continual", "pairs", "joint", "paper")):
    args = [f"--models={k}={root / k}" for k in kinds]
    readers = ["--judge", root / "readers" / "judge.json", "--counter", root / "readers" / "counter.json"]
    rest = ["-n", 8, "--conditions", 4, "--quiet", "--out", out, "--data", root / "none", *readers]
    status = cli.main([str(a) for a in ("evaluate", *names, *args, *rest)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_all_experiments_run_from_card_files(capsys, folders, tmp_path):
    pytest.importorskip("PIL")
    names = [n for n in experiments.EXPERIMENTS if n not in ("table1", "or")]
    status, text, err = evaluate(capsys, folders, tmp_path, *names)
    assert status == 0, err
    for name in names:
        data = json.loads((tmp_path / f"{name}.json").read_text())
        made = {line["by"] for line in data["lines"] if line["cells"]}
        assert made >= {"score matching", "chance", "contrastive divergence"}, name
        assert ("one joint model" in made) == (name != "objects")
        sampled = [line for line in data["lines"] if line["seconds"] is not None]
        assert len(sampled) >= 2 and all(line["effective_temperature"] is not None and line["density"] for line in sampled)
        renders = next(line for line in data["lines"] if line["by"] == "real renders")
        assert renders["cells"] == {} and renders["note"]
        assert (tmp_path / f"{name}.png").exists() and f"wrote {tmp_path / name}.md" in text
    objects = json.loads((tmp_path / "objects.json").read_text())
    assert objects["lines"][0]["cells"].keys() >= {"counted right", "object present"}
    unseen = json.loads((tmp_path / "unseen.json").read_text())
    assert [line["row"] for line in unseen["lines"] if line["by"] == "score matching"] == ["seen pairs", "unseen pairs"]


def test_models_in_bfloat16_are_said_to_be(capsys, folders, tmp_path):
    found = {}
    for options in ((), ("--bf16",)):
        status, _, err = evaluate(capsys, folders, tmp_path, "unseen", *options)
        assert status == 0, err
        data = json.loads((tmp_path / "unseen.json").read_text())
        found[options] = data
        assert data["protocol"].get("precision") == ("models in bfloat16, states in float32" if options else None)
    ours = [data["lines"][0] for data in found.values()]
    assert "weights shape 1.5, color 2" in ours[0]["density"] and "24 levels" in ours[0]["density"]
    assert "weights" not in next(line for line in found[()]["lines"] if line["by"] == "contrastive divergence")["density"]


def test_hybrid_models_are_reported_with_and_without_their_cross_entropy(capsys, folders, tmp_path):
    args = ["-n", 8, "--conditions", 4, "--quiet", "--out", tmp_path, "--judge", folders / "readers" / "judge.json"]
    for twins in ([], [f"--models=twins={folders / 'zoo'}"]):
        assert cli.main([str(a) for a in ("evaluate", "concepts", f"--models=zoo={folders / 'hybrid'}", *twins, *args)]) == 0
        assert ("without cross-entropy: not trained: --models twins=DIR" in capsys.readouterr().out) == (not twins)
    made = [line["by"] for line in json.loads((tmp_path / "concepts.json").read_text())["lines"] if line["density"]]
    assert made == ["score matching, hybrid", "score matching"] * 4


def test_rows_without_a_model_are_left_out_and_said(capsys, folders, tmp_path):
    args = [f"--models=zoo={folders / 'objects'}", "-n", 8, "--conditions", 4, "--quiet", "--out", tmp_path,
            "--judge", folders / "readers" / "judge.json"]
    assert cli.main([str(a) for a in ("evaluate", "concepts", *args)]) == 0
    data = json.loads((tmp_path / "concepts.json").read_text())
    assert {line["row"] for line in data["lines"] if line["density"]} == {"position"}
    assert "score matching: left out, there is no model named 'shape' (shape)" in capsys.readouterr().out
    assert cli.main([str(a) for a in ("evaluate", "three", *args)]) == 2
    assert "'three' needs a model named 'color'; there are position" in capsys.readouterr().err


def test_bundled_groups_have_names_and_readers_of_their_size():
    for group, side, colors in (("scenes64", 64, 20), ("pairs", 32, 6)):
        found = Models.load(zoo.located(group))
        assert found.shape == (3, side, side) and found.law.colors == colors
        judge = experiments_cli._reader(None, "judge", found)
        assert judge(torch.zeros(1, 3, side, side))["color"].shape == (1, colors)
    with pytest.raises(ValueError, match="the judge reads pictures of"):
        experiments_cli._reader(zoo.folder("scenes64") / "judge.json", "judge", found)


def test_pictures_of_64_pixels_have_twenty_colours():
    cards = {"position": {"name": "position", "shape": [3, 64, 64]}}
    assert Models({}, cards).law.colors == 20 == scenes.named("train", 64).palette
    assert Models({}, cards | {"color": {"name": "color", "condition_dim": 8, "shape": [3, 64, 64]}}).law.colors == 8


def test_what_is_missing_is_said(capsys, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "__file__", str(tmp_path / "elsewhere" / "__init__.py"))
    status, text, _ = evaluate(capsys, folders, tmp_path, "concepts", kinds=("zoo",))
    assert status == 0 and "one joint model: not trained: --models joint=DIR" in text
    for names, kinds, message in ((["objects"], ("zoo",), "'objects' needs models that are not bundled: --models objects=DIR"),
                                  (["smile"], ("zoo",), "no experiment 'smile'; there are table1"),
                                  (["unseen"], ("zoo", "continual", "joint"), "--models pairs=DIR")):
        status, _, err = evaluate(capsys, folders, tmp_path, *names, kinds=kinds)
        assert status == 2 and message in err
    status = cli.main(["evaluate", "concepts", "--models", "faces=x"])
    assert status == 2 and "`--models` must be KIND=DIR" in capsys.readouterr().err
    status = cli.main(["evaluate", "concepts", "--models", f"zoo={folders / 'zoo'}"])
    assert status == 2 and "no judge for pictures of [3, 16, 16] is bundled" in capsys.readouterr().err
    with pytest.raises(ValueError, match="has no models"):
        Models.load(folders / "readers")


def test_unseen_pairs_need_models_that_have_some(capsys, folders, tmp_path):
    args = ["evaluate", "unseen", "-n", 8, "--conditions", 4, "--quiet", "--out", tmp_path]
    args += ["--models", f"pairs={folders / 'zoo'}", "--judge", folders / "readers" / "judge.json"]
    assert cli.main([str(a) for a in args]) == 2
    assert "no unseen pairs of shape and colour: these models were trained on all of them" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["judge", "counter"])
def test_readers_are_trained_and_written_with_their_scores(capsys, monkeypatch, tmp_path, kind):
    data = scene_sheet.load() if kind == "judge" else Counted(scene_sheet.load().images, (scene_sheet.load().shape >= 1).long())
    asked = []
    monkeypatch.setattr(judge_cli.scenes, "load", lambda config, root: asked.append(config) or data)
    monkeypatch.setattr(evaluation, "_fit", functools.partial(_briefly, evaluation._fit))
    status = cli.main(["judge", kind, "--epochs", "1", "--count", "64", "--quiet", "--out", str(tmp_path)])
    text = capsys.readouterr().out
    assert status == 0 and f"{tmp_path / kind}.json: " in text
    train, test = map(scenes.named, ("train", "test") if kind == "judge" else ("objects-judge", "objects-test"))
    assert asked == [dataclasses.replace(train, count=64), test]
    about, reader = json.loads((tmp_path / f"{kind}.json").read_text()), zoo.load_from(tmp_path, kind)
    assert about["command"].endswith("--count 64") and "--count 64" in about["data"]
    assert about["kind"] == kind and about["shape"] == [3, 32, 32] and not reader.training
    wanted = {"present", "position", "size", "shape", "color"} if kind == "judge" else {"count", "count 0", "count 1"}
    assert wanted <= about["scores"].keys()
    assert reader.read(data.pixels())["present"].shape == (32,)


def _briefly(fit, reader, data, loss_of, epochs, batch, *rest):
    return fit(reader, data, loss_of, epochs, 16, *rest)


def test_observations_of_one_scene_are_rendered_once(monkeypatch, tmp_path):
    """The object stays, or only its position does; what is rendered is kept."""
    shown = []

    def render(scene, resolution, samples, seed):
        shown.append(scene)
        return np.full((3, resolution, resolution), len(shown), np.uint8)

    monkeypatch.setattr(observations.scenes, "render", render)
    x, truth = observations.observe(2, 3, "object", 8, tmp_path)
    assert x.shape == (2, 3, 3, 8, 8) and len(shown) == 6
    for k in range(2):
        one = shown[3 * k:3 * k + 3]
        assert len({(s.shape, s.color, s.position, s.size) for s in one}) == 1 and len({s.light for s in one}) == 3
        assert torch.allclose(truth[k], torch.tensor(one[0].position))
    again, _ = observations.observe(2, 3, "object", 8, tmp_path)
    assert torch.equal(again, x) and len(shown) == 6
    observations.observe(2, 3, "position", 8, tmp_path)
    assert len({s.position for s in shown[6:9]}) == 1 and len({s.size for s in shown[6:9]}) == 3
    with pytest.raises(ValueError, match="`same` must be one of object, position"):
        observations.observe(2, 3, "scene", 8, tmp_path)


def test_errors_of_positions_are_in_per_cent_of_the_scene():
    found = position.errors(torch.tensor([[0.03, 0.04], [-1.0, -1.0]]), torch.tensor([[0.0, 0.0], [1.0, -1.0]]))
    torch.testing.assert_close(found, torch.tensor([2.5, 100.0]))


def test_table_3_adds_up_the_energies_of_observations(monkeypatch):
    """A world whose pictures are noisy readings of the position, with deviation 0.3: errors fall with the root of their number."""
    truth = Law().labels(150, torch.Generator().manual_seed(1))["position"] * 0.5
    g = torch.Generator().manual_seed(2)
    pictures = torch.zeros(150, 10, 48)
    pictures[:, :, :2] = truth[:, None] + 0.3 * torch.randn(150, 10, 2, generator=g)
    model = ef.Family(lambda x, condition: (x.flatten(1)[:, :2] - condition).square().sum(1) / 0.18, "position", condition_dim=2)
    m = Models({"position": model}, {"position": card("position", 2, takes_sigma=False)})
    lines = position.by_observations(pictures.view(150, 10, 3, 4, 4), truth, m, protocol(), "one object")
    fine = {line.row: line.cells["test"] for line in lines if line.by.endswith("between its points")}
    expected = 0.3 * math.sqrt(math.pi / 2) * 50  # of a Rayleigh distance, in per cent of a width of 2
    for count in (1, 2, 5, 10):
        cell = fine[f"{count} observation{'s' if count > 1 else ''} of one object"]
        assert cell.low * 0.93 < expected / math.sqrt(count) < cell.high * 1.07
    assert len(lines) == 2 * len(position.OBSERVATIONS)
