"""Plans: what is wrong is named, with its value and what is allowed; what is right decides ids, shards and conditions."""

import copy
import json
import shutil

import pytest
import torch
from dataset_plans import NET, NORMAL, points

from ebmfast import zoo
from ebmfast.expressions import parse
from ebmfast.generate import conditions as conditions_module
from ebmfast.generate import models as models_module
from ebmfast.generate import plan as plans
from ebmfast.generate import sampler, spec
from ebmfast.generate.cli import example
from ebmfast.generate.conditions import Conditions
from ebmfast.generate.maker import Maker
from ebmfast.generate.spec import PlanError
from ebmfast.samplers import HMC, Annealed, Langevin


def changed(path: str, value) -> dict:
    """The plan of points with one key, "a.0.b", set to another value; None takes it away."""
    plan = copy.deepcopy(points())
    *parents, last = [int(p) if p.isdigit() else p for p in path.split(".")]
    place = plan
    for part in parents:
        place = place[part] if isinstance(place, list) else place.setdefault(part, {})
    if value is None:
        del place[last]
    else:
        place[last] = value
    return plan


@pytest.mark.parametrize(("path", "value", "message"), [
    ("shard_size", 0, "shard_size: must be at least 1, got 0"),
    ("shard_size", None, "shard_size: is missing"),
    ("n", 3.5, "n: must be an integer, got 3.5"),
    ("n", None, "needs `n` at the top, or in every composition"),
    ("seed", -1, "seed: must be at least 0, got -1"),
    ("sed", 1, "sed: no such key (did you mean seed?); allowed are n, seed,"),
    ("run.device", "tpu", "run.device: must be one of 'cpu' or 'cuda', got 'tpu'"),
    ("run.batchsize", 3, "run.batchsize: no such key (did you mean batch_size?)"),
    ("sampler.kind", "langvin", "sampler.kind: must be one of 'recommended', 'langevin'"),
    ("sampler.step_size", -0.1, "sampler.step_size: must be greater than 0"),
    ("sampler.frictions", 1.0, "sampler.frictions: no such key; allowed are kind, steps, step_size"),
    ("sampler.step_size", [0.1, 0.2], "sampler: `step_size` must have one value per step, got 2 for 5 steps"),
    ("output.x", "jpg", "output.x: must be one of 'auto', 'png'"),
    ("output.x", "png", "output.x: png needs images"),
    ("models.net", "nocolon", 'must be of the form "zoo:name" or "module:function", got \'nocolon\''),
    ("models.net", {"zoo": "color", "factory": "a:b"}, "models.net: needs exactly one of zoo, card, factory"),
    ("models.net", {"zoo": "colour"}, "models.net: no model named 'colour' in the zoo"),
    ("models.modes.factory", "ebmfast.energies:Gausian", "models.modes: ebmfast.energies:Gausian: AttributeError"),
    ("models.modes.weights", "none.safetensors", "none.safetensors"),
    ("compositions.0.expression", "modes & nett", "unknown name 'nett' (did you mean net"),
    ("compositions.0.expression", "~net[Slot('c')]", "(grid): ~net[c] is not grounded"),
    ("compositions.0.name", "drawn", "names must differ, got 'drawn' twice"),
    ("compositions.0.conditions.d", {"value": 1.0}, "compositions[0]: 'd' is not a slot of the expression, which has c"),
    ("compositions.0.conditions", {}, "compositions[0].conditions.c: is missing"),
    ("compositions.0.conditions.c", {"grid": ["a", "z"]}, "conditions.c.grid: must be one of a, b, or numbers, got 'z'"),
    ("compositions.0.conditions.c", {"grid": [[1.0]]}, "conditions.c.grid: must have 2 number(s) for 'net', got 1"),
    ("compositions.0.conditions.c", {"grid": ["a"], "value": "a"}, "needs exactly one of grid, choice, uniform, normal, value"),
    ("compositions.0.conditions.c", {"choice": ["a"], "weights": [1.0, 2.0]}, "`weights` must have one entry for each"),
    ("compositions.1.conditions.p.uniform", {"low": [1.0, 1.0], "high": [0.0, 0.0]}, "low <= high"),
    ("compositions.1.conditions.p.uniform", {"low": [1.0], "high": [2.0]}, "must have 2 number(s) for 'net', got 1"),
    ("compositions.0.table", "rows.xls", "table: must end in .csv, .jsonl, .parquet"),
    ("filters", [{"energy": "total"}], "filters[0]: needs one test"),
    ("filters", [{"leaf": "net", "max": 1.0}], "filters[0].leaf: must be a leaf of 'grid', modes, net[c], got 'net'"),
    ("filters", [{"classifier": "judge", "min": 0.0}], "filters[0].classifier: must be one of"),
    ("filters", [{"energy": "total", "max": 1.0, "compositions": ["x"]}], "must be names of compositions, grid, drawn, got 'x'"),
    ("filters", [{"classifier": "modes", "equals": "q"}], "filters[0].equals: must be a slot of 'grid', c, got 'q'"),
    ("shape", None, "shape: is missing"),
])
def test_a_wrong_plan_is_refused_with_key_value_and_what_is_allowed(path, value, message):
    plan = changed(path, value)
    if path == "compositions.0.table":
        plan["compositions"][0]["conditions"] = {}
    with pytest.raises(PlanError) as error:
        Maker(plans.from_data(plan)).prepare_all()
    assert message in str(error.value)


def test_every_error_is_told_at_once():
    plan = changed("run.device", "tpu") | {"seed": "x", "sed": 2}
    with pytest.raises(PlanError) as error:
        spec.check(plan)
    assert len(str(error.value).splitlines()) == 4


def test_a_file_that_is_not_toml(tmp_path):
    (tmp_path / "p.toml").write_text("n = = 3")
    with pytest.raises(PlanError, match="p.toml: not a TOML file: .*line 1"):
        spec.read(tmp_path / "p.toml")


def test_the_schema_knows_every_key_and_the_example_is_a_plan():
    schema = spec.schema()
    assert set(schema["properties"]) == set(spec.Spec.model_fields)
    assert schema["additionalProperties"] is False
    assert "langevin" in json.dumps(schema)
    plan = plans.load(example())
    assert plan.shape == (3, 32, 32) and plan.storage == "png" and plan.n == 132
    assert plan.slots == ("f", "c", "p") and "color.unconditional" in plan.leaves


def test_shards_cover_every_id_once_and_hold_one_composition():
    plan = plans.from_data(points(203, 30))
    seen = [(s.start + i, s.composition) for k in range(plan.shards) for s in [plan.shard(k)] for i in range(s.count)]
    assert [i for i, _ in seen] == list(range(203))
    assert [j for _, j in seen] == [0] * 102 + [1] * 101 and plan.shards == 8
    assert max(plan.shard(k).count for k in range(8)) == 30
    with pytest.raises(ValueError, match="0 to 7"):
        plan.shard(8)


def test_fewer_samples_than_compositions():
    plan = plans.from_data(points(1))
    assert plan.shards == 1 and plan.shard(0).composition == 0


def test_identity_changes_with_what_decides_the_bytes_and_with_nothing_else(tmp_path):
    one = plans.from_data(points())
    assert plans.from_data(points(), tmp_path).digest == one.digest
    assert plans.from_identity(one.text(), tmp_path).digest == one.digest
    for path, value in (("seed", 4), ("shard_size", 31), ("run.batch_size", 32), ("sampler.steps", 6), ("output.energy", False)):
        other = plans.from_data(changed(path, value))
        assert other.digest != one.digest
        assert f'"{path.rpartition(".")[2]}"' in other.difference(one.text())


def test_a_plan_that_is_read_back_has_its_grids_in_the_same_order(tmp_path):
    plan = points()
    plan["compositions"][0] |= {"expression": "modes & net[Slot('z')] & net[Slot('a')]", "conditions": {
        "z": {"grid": ["a", "b"]}, "a": {"grid": [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]}}}
    written = plans.from_data(plan)
    back = plans.from_identity(written.text(), tmp_path)
    assert Maker(back).sample(0).labels["z"][:4] == ["a", "a", "a", "b"] and back.text() == written.text()
    assert torch.equal(Maker(back).sample(0).x, Maker(written).sample(0).x)
    plan["compositions"][0]["conditions"] = dict(reversed(plan["compositions"][0]["conditions"].items()))
    assert plans.from_data(plan).digest != written.digest


def test_weights_and_tables_are_part_of_the_identity(tmp_path):
    from safetensors.torch import save_file

    from ebmfast.energies import MLP
    torch.manual_seed(0)
    net = MLP(2, [8], condition_dim=2)
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    (tmp_path / "rows.csv").write_text("c\na\nb\n")
    plan = points(models={"modes": NORMAL, "net": NET | {"weights": "net.safetensors"}})
    plan["compositions"][0] |= {"conditions": {}, "table": "rows.csv"}
    first = plans.from_data(plan, tmp_path)
    assert set(first.hashes["models"]) == {"net"} and set(first.hashes["tables"]) == {"rows.csv"}
    (tmp_path / "rows.csv").write_text("c\nb\nb\n")
    assert plans.from_data(plan, tmp_path).digest != first.digest
    loaded = Maker(first).composition(0).run.plan.leaves[1].source.model
    assert torch.equal(loaded.read_out.weight, net.read_out.weight)


def drawn(conditions=None, n: int = 60, offset: int = 0, table=None, base="."):
    family = {"net": plans.models.load("net", spec.Model(**NET), base, 0)}
    draws = {slot: spec.Draw(**draw) for slot, draw in (conditions or {}).items()}
    composition = spec.Composition(expression="", conditions=draws, table=table)
    slots = list(draws) or ["c"]
    expression = parse(" & ".join(f"net[Slot('{slot}')]" for slot in slots), family)
    return Conditions(composition, 0, expression, offset, 7, base), torch.arange(offset, offset + n)


def test_grids_form_a_product_that_every_cell_of_shares_evenly():
    grid = {"c": {"grid": ["a", "b"]}, "d": {"grid": [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]}}
    conditions, ids = drawn(grid, offset=1000)
    vectors, labels = conditions.rows(ids)
    assert conditions.cells == 6
    cells = torch.cat([vectors["c"], vectors["d"]], 1).unique(dim=0, return_counts=True)[1]
    assert cells.tolist() == [10] * 6
    assert labels["c"][:6] == ["a", "a", "a", "b", "b", "b"] and "d" not in labels
    assert vectors["d"][:4, 0].tolist() == [0.0, 1.0, 2.0, 0.0]


def test_random_conditions_depend_on_seed_slot_and_id_alone():
    wanted = {"c": {"uniform": {"low": [-1.0, 0.0], "high": [1.0, 4.0]}}, "d": {"normal": {"mean": [1.0, -1.0], "std": 0.5}},
              "e": {"choice": ["a", "b"], "weights": [1.0, 3.0]}}
    conditions, ids = drawn(wanted, 4000)
    vectors, labels = conditions.rows(ids)
    parts = [conditions.rows(part)[0] for part in (ids[:7], ids[7:1000], ids[1000:])]
    for slot in vectors:
        assert torch.equal(torch.cat([p[slot] for p in parts]), vectors[slot])
    reordered = drawn(dict(reversed(wanted.items())))[0].rows(ids)[0]
    assert all(torch.equal(reordered[slot], vectors[slot]) for slot in vectors)
    # five standard errors: of a uniform 1/√12 of its range, of a normal its deviation, of a share √(p(1-p))
    error = 5 / 4000**0.5
    assert (vectors["c"].mean(0) - torch.tensor([0.0, 2.0])).abs().lt(error * torch.tensor([2.0, 4.0]) / 12**0.5).all()
    assert (vectors["d"].mean(0) - torch.tensor([1.0, -1.0])).abs().max() < error * 0.5
    assert abs(labels["e"].count("b") / 4000 - 0.75) < error * (0.75 * 0.25) ** 0.5
    twice = drawn({"c": wanted["c"], "d": wanted["c"]})[0].rows(ids)[0]
    assert torch.equal(twice["c"], vectors["c"]) and (twice["d"] != vectors["c"]).float().mean() > 0.99
    other = drawn(wanted)[0]
    other.seed = 8
    assert not torch.equal(other.rows(ids)[0]["c"], vectors["c"])


@pytest.mark.parametrize(("name", "text"), [
    ("rows.csv", "c,p.0,p.1\na,0.5,1\nb,2,3\n"),
    ("rows.jsonl", '{"c": "a", "p": [0.5, 1]}\n{"c": "b", "p": [2, 3]}\n'),
    ("rows.parquet", None), (None, None),
])
def test_tables_give_conditions_per_sample(tmp_path, name, text):
    rows = [{"c": "a", "p": [0.5, 1.0]}, {"c": "b", "p": [2.0, 3.0]}]
    if name == "rows.parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    elif name is not None:
        (tmp_path / name).write_text(text)
    family = {"net": plans.models.load("net", spec.Model(**NET), tmp_path, 0)}
    expression = parse("net[Slot('c')] & net[Slot('p')]", family)
    conditions = Conditions(spec.Composition(expression="", table=name or rows), 0, expression, 10, 0, tmp_path)
    vectors, labels = conditions.rows(torch.arange(10, 15))
    assert labels == {"c": ["a", "b", "a", "b", "a"]}
    assert vectors["p"].tolist() == [[0.5, 1.0], [2.0, 3.0]] * 2 + [[0.5, 1.0]]


@pytest.mark.parametrize("text, message", [
    ("c,p.0,p.1\na,1\n", "row 1 has fewer cells"), ("c\na\nb,3\n", "row 2 has more cells"), ("p.0,p.2\n1,2\n", "must be p.0, p.1"),
    ("p.0,p.1\n1,x\n", "row 1, p.1 must be a number, got 'x'"), ("p.0\nnan\n", "row 1, 'p' must be a label or finite")])
def test_malformed_rows_are_named(tmp_path, text, message):
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(PlanError, match=message):
        drawn(table="rows.csv", base=tmp_path)


def test_columns_of_a_vector_go_by_their_numbers(tmp_path):
    (tmp_path / "rows.csv").write_bytes("\ufeffp.1,p.0\n0.9,-0.9\n".encode())
    assert conditions_module._table("rows.csv", tmp_path, "here") == {"p": [[-0.9, 0.9]]}
    (tmp_path / "rows.jsonl").write_text('{"p": null}\n')
    with pytest.raises(PlanError, match="row 1, 'p' must be a label or finite numbers, got None"):
        conditions_module._table("rows.jsonl", tmp_path, "here")


def test_cards_are_part_of_the_identity(tmp_path):
    """What a card says of labels and schedules makes samples, so that an edited card is another plan."""
    folder = zoo.folder("paper")
    for suffix in (".json", ".safetensors"):
        shutil.copy(folder / f"color{suffix}", tmp_path)
    model = spec.Model(card="color.json")
    before = models_module.fingerprint("color", model, tmp_path)
    about = json.loads((tmp_path / "color.json").read_text())
    (tmp_path / "color.json").write_text(json.dumps(about | {"minutes": 3}))
    assert models_module.fingerprint("color", model, tmp_path) == before
    (tmp_path / "color.json").write_text(json.dumps(about | {"labels": about["labels"] | {"red": [0.0] * 6}}))
    assert models_module.fingerprint("color", model, tmp_path) != before


def test_ragged_and_unknown_tables_are_refused(tmp_path):
    for rows, message in (([{"c": "a"}, {"q": 1.0}], "row 1 has q"), ([{"c": "a", "q": 1.0}], "'q' is not a slot"),
                          ("none.csv", "No such file")):
        with pytest.raises(PlanError, match=message):
            drawn(table=rows, base=tmp_path)


def test_samplers_of_plans_are_those_of_python():
    def of(table):
        return sampler.prepare(spec.check(points(sampler=table)), 0, parse("modes", models), {})[1:]

    models = {"modes": plans.models.load("modes", spec.Model(**NORMAL), ".", 0)}
    ramp = {"start": 0.4, "stop": 0.1, "spacing": "geometric"}
    assert of({"kind": "langevin", "steps": 3, "step_size": ramp, "clamp": [0, 1]}) == (
        Langevin(step_size=pytest.approx([0.4, 0.2, 0.1]), clamp=(0.0, 1.0)), 3)
    assert of({"kind": "hmc", "steps": 2, "step_size": 0.1, "n_leapfrog_steps": 4}) == (HMC(step_size=0.1, n_leapfrog_steps=4), 2)
    annealed = {"kind": "annealed", "sigma_max": 4.0, "sigma_min": 1.0, "levels": 3, "inner": {"kind": "mala", "bounds": [-1, 1]}}
    found, steps = of(annealed)
    assert found.sigmas == (4.0, 2.0, 1.0) and found.inner.bounds == (-1, 1) and steps is None
    with pytest.raises(PlanError, match="sampler.inner.friction: mala takes no such key"):
        of(annealed | {"inner": {"kind": "mala", "friction": 1.0}})
    with pytest.raises(PlanError, match="sampler: is missing"):
        of({"kind": "recommended"})


def test_the_cards_sampler_and_priors_are_taken_unless_refused():
    plan = {"n": 2, "shard_size": 2, "compositions": [{"expression": "color('red') & shape('cube')"}]}
    prepared = Maker(plans.from_data(plan)).composition(0)
    levels = zoo.card("color")["schedule"]["levels"]
    assert isinstance(prepared.run.sampler, Annealed) and len(prepared.run.sampler.sigmas) == levels
    assert len(prepared.run.plan.leaves) == 3
    plan["compositions"][0]["prior"] = "none"
    assert len(Maker(plans.from_data(plan)).composition(0).run.plan.leaves) == 2


def test_leaves_of_one_name_get_columns_of_their_own():
    import ebmfast as ef
    same = [ef.Concept(lambda x, k=k: k * x.sum(1), name="f") for k in (1.0, 2.0)]
    assert plans.leaf_names(same[0] & same[1]) == ("f", "f #2")


def test_models_are_copied_to_another_device_and_stay_where_they_are():
    plan = plans.from_data({"n": 2, "shard_size": 2, "compositions": [{"expression": "color('red')"}]})
    here, there = Maker(plan), Maker(plan, "meta")
    model = zoo.load("color")
    assert here._here(model) is model and there._here(model) is there._here(model) is not model
    assert {p.device.type for p in there._here(model).parameters()} == {"meta"}
    assert {p.device.type for p in model.parameters()} == {"cpu"}
