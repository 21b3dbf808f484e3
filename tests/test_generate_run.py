"""Runs: the same bytes whoever makes them, filters, quarantine, outputs, the card, progress, and the command line."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from dataset_plans import NORMAL, contents, pictures, points
from hypothesis import given, settings
from hypothesis import strategies as st

import ebmfast as ef
from ebmfast import cli
from ebmfast.generate import formats, generate, lock, resolve, status, verify
from ebmfast.generate import store as stores
from ebmfast.generate.lock import LockedError
from ebmfast.generate.maker import Dropped, Flag, Maker
from ebmfast.generate.manifest import Manifest


def made(plan, folder, **options) -> dict[str, str]:
    options.setdefault("workers", 0)
    assert generate(plan, folder, **options)
    return contents(Path(folder))


def table(folder):
    return pq.ParquetDataset(folder / "data").read()


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference") / "out"
    return made(points(), folder), folder


def test_workers_in_any_number_give_the_same_bytes(tmp_path, reference):
    for workers in (1, 3):
        assert made(points(), tmp_path / str(workers), workers=workers) == reference[0]


def test_pictures_of_networks_are_the_same_from_workers(tmp_path):
    plan = pictures(filters=[{"classifier": "zoo:judge", "output": "present", "min": -2.0}])
    assert made(plan, tmp_path / "one") == made(plan, tmp_path / "two", workers=2)


def test_processes_that_start_from_nothing(tmp_path, reference):
    assert made(points(), tmp_path / "out", workers=1, start_method="spawn") == reference[0]


def test_shards_in_any_order_and_from_any_maker(reference):
    maker = Maker(resolve(points()))
    for k in (7, 0, 3, 0):
        assert formats.encode(maker.sample(k), maker.plan) == (reference[1] / formats.name(maker.plan, k)).read_bytes()


@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(n=st.integers(1, 90), shard=st.integers(1, 40), batch=st.integers(1, 33), workers=st.integers(0, 2))
def test_size_of_shards_and_batches_and_workers_never_change_the_data(tmp_path_factory, n, shard, batch, workers):
    folder = tmp_path_factory.mktemp("property")
    made(points(n, shard, batch), folder, workers=workers)
    rows = table(folder).sort_by("id")
    whole = Maker(resolve(points(n, 1000, 64)))
    parts = [whole.sample(k) for k in range(whole.plan.shards)]
    assert rows["id"].to_pylist() == list(range(n))
    assert torch.equal(torch.tensor(rows["x"].to_pylist()), torch.cat([p.x for p in parts]))
    assert torch.equal(torch.tensor(rows["energy"].to_pylist()), torch.cat([p.energy for p in parts]))
    labels = [c for p in parts for c in p.labels.get("c", [None] * len(p.ids))]
    assert rows["labels"].combine_chunks().field("c").to_pylist() == labels


def test_rows_are_the_chains_of_sample(reference):
    rows, maker = table(reference[1]).sort_by("id"), Maker(resolve(points()))
    run = maker.composition(1).run
    conditions = torch.tensor([c["p"] for c in rows["conditions"].to_pylist()[100:]])
    r = ef.sample(run.plan.expression, 100, (2,), ef.Langevin(step_size=0.05), steps=5, seed=3, first_chain=100,
                  conditions={"p": conditions})
    assert torch.equal(torch.tensor(rows["x"].to_pylist()[100:]), r.x)
    assert torch.equal(torch.tensor(rows["energy"].to_pylist()[100:]), r.energy)
    leaves = rows["leaf_energies"].to_pylist()
    assert [leaves[150]["modes"], leaves[150]["net[p]"]] == r.leaf_energies[50].tolist() and leaves[150]["net[c]"] is None


def test_pictures_are_png_with_the_samples_pixels(tmp_path):
    made(pictures(), tmp_path)
    plan = resolve(pictures())
    rows, shard = table(tmp_path).sort_by("id"), Maker(plan).sample(0)
    assert rows.schema.metadata[b"huggingface"] and rows.num_rows == 24
    seen = np.stack([formats.pictures.unpng(v["bytes"]) for v in rows["image"].to_pylist()[:8]])
    wanted = ((shard.x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    assert (np.abs(seen.astype(int) - wanted.astype(int)) <= 1).all() and seen.std() > 5
    assert rows["labels"].to_pylist()[0] == {"c": "red", "p": None}
    card = (tmp_path / "README.md").read_text()
    assert "![samples" in card and "| cube | `shape('cube')` | 12 | 12 | 0 | 0 |" in card and ef.__version__ in card
    assert (tmp_path / "preview.png").stat().st_size > 1000


@pytest.mark.parametrize("form", ["parquet", "webdataset"])
@pytest.mark.parametrize("storage", ["png", "uint8", "float32", "float16"])
def test_every_way_to_store_samples_reads_back(tmp_path, form, storage):
    plan = {"n": 6, "shard_size": 4, "sampler": {"levels": 2, "steps_per_level": 1}, "run": {"batch_size": 3},
            "compositions": [{"expression": "shape('cube')"}], "output": {"x": storage, "format": form, "row_group_size": 3}}
    made(plan, tmp_path)
    data = ef.load_dataset(tmp_path)
    x = torch.cat([Maker(resolve(plan)).sample(k).x for k in range(2)])
    read = torch.stack([data[i]["x"] for i in range(6)])
    assert [data[i]["id"] for i in range(6)] == list(range(6))
    if storage in ("png", "uint8"):
        assert read.dtype == torch.uint8 and (read.float() / 127.5 - 1 - x.clamp(-1, 1)).abs().max() < 0.51 / 127.5 + 1e-6
    else:
        assert torch.equal(read, x.to(getattr(torch, storage)))


def test_columns_that_are_not_wanted_are_not_written(tmp_path):
    made(points(output={"energy": False, "leaf_energies": False, "conditions": False}), tmp_path)
    assert table(tmp_path).column_names == ["id", "composition", "x"]


def test_filters_by_energy_keep_what_is_within_and_list_the_rest(tmp_path, reference):
    every = table(reference[1]).sort_by("id")
    energy = np.array(every["energy"].to_pylist())
    bound = float(np.median(energy))
    rule = [{"energy": "total", "max": bound}, {"leaf": "modes", "min": 1.5, "compositions": ["grid"]}]
    made(points(filters=rule), tmp_path)
    kept = table(tmp_path)["id"].to_pylist()
    modes = np.array([row["modes"] for row in every["leaf_energies"].to_pylist()])
    wanted = (energy <= bound) & ((modes >= 1.5) | (np.arange(200) >= 100))
    assert kept == np.nonzero(wanted)[0].tolist() and 0 < len(kept) < 150
    lines = [json.loads(line) for p in (tmp_path / "rejected").iterdir() for line in p.read_text().splitlines()]
    assert sorted(i for line in lines for i in line["ids"]) == np.nonzero(~wanted)[0].tolist()
    assert {line["filter"] for line in lines} == {f"filters[0] energy max {bound}", "filters[1] energy of modes min 1.5"}
    assert status.describe(stores.at(tmp_path))["rejected"] == 200 - len(kept)


def test_filters_by_a_classifier_s_verdict(tmp_path):
    def seen(*rules):
        plan = pictures(16, filters=[{"classifier": "zoo:judge", "compositions": ["colours"], **rule} for rule in rules])
        plan["sampler"] = {"levels": 6, "steps_per_level": 1}
        parts = [Maker(resolve(plan)).sample(k) for k in range(1)]
        return {i for p in parts for i in p.ids.tolist()}

    judge = ef.zoo.load("judge")
    everything = Maker(resolve(pictures(16, sampler={"levels": 6, "steps_per_level": 1}))).sample(0)
    with torch.no_grad():
        verdict = judge(everything.x)
    ids = everything.ids
    right = verdict["color"].argmax(1) == everything.conditions["c"].argmax(1)
    near = ((verdict["position"] - everything.conditions["p"]).abs() <= 0.15).all(1)
    low = verdict["present"].median()
    assert seen({"output": "color", "equals": "c"}) == set(ids[right].tolist())
    assert seen({"output": "position", "near": "p", "within": 0.15}) == set(ids[near].tolist())
    assert seen({"output": "present", "min": float(low)}) == set(ids[verdict["present"] >= low].tolist())
    assert seen({"output": "color", "column": 0, "max": 0.0}) == set(ids[verdict["color"][:, 0] <= 0].tolist())
    with pytest.raises(ValueError, match="filters\\[0\\].output: must be one of present"):
        seen({"output": "colour", "equals": "c"})


FRAIL = '''
import torch

class Frail(torch.nn.Module):
    """E = x²/2, and NaN beyond 1.2 in any coordinate."""
    def forward(self, x):
        return 0.5 * x.square().sum(1) * torch.where((x > 1.2).any(1), torch.nan, 1.0)
'''


@pytest.mark.parametrize("energies", [True, False])
def test_samples_that_are_not_finite_are_quarantined_and_never_written(tmp_path, energies):
    (tmp_path / "frail_energy.py").write_text(FRAIL)
    plan = tmp_path / "plan.toml"
    plan.write_text('n = 300\nshard_size = 64\nshape = [2]\nmodels = { frail = "frail_energy:Frail" }\n'
                    'compositions = [ { expression = "frail" } ]\nrun = { batch_size = 32 }\n'
                    'sampler = { kind = "langevin", steps = 10, step_size = 0.2 }\n'
                    f'output = {{ energy = {str(energies).lower()}, leaf_energies = {str(energies).lower()} }}\n')
    made(plan, tmp_path / "out")
    kept = table(tmp_path / "out")
    lines = [json.loads(line) for p in sorted((tmp_path / "out/quarantine").iterdir()) for line in p.read_text().splitlines()]
    lost = [line["id"] for line in lines]
    assert 20 < len(lost) < 280 and sorted(lost + kept["id"].to_pylist()) == list(range(300))
    assert {line["reason"] for line in lines} == {"non-finite"} and any(line["leaf"] == "frail" for line in lines)
    x = np.array(kept["x"].to_pylist())
    assert np.isfinite(x).all() and (x <= 1.2).all(1).mean() > 0.9  # a last step may end where the energy is not defined
    assert not energies or np.isfinite(np.array(kept["energy"].to_pylist())).all()
    assert status.describe(stores.at(tmp_path / "out"))["quarantined"] == len(lost)


def test_every_micro_batch_has_the_plan_s_size(monkeypatch):
    maker, seen, real = Maker(resolve(points(41, 30, 16))), [], ef.Run.__call__

    def run(self, n, *args, conditions, **kwargs):
        seen.append((n, len(conditions["c"])))
        return real(self, n, *args, conditions=conditions, **kwargs)

    monkeypatch.setattr(ef.Run, "__call__", run)
    assert len(maker.sample(0).ids) == 21 and seen == [(16, 16)] * 2


def test_a_flag_drops_the_shard_in_the_middle(monkeypatch):
    maker, flag, seen = Maker(resolve(points(64, 64))), Flag(), []

    def stop(count):
        seen.append(count)
        flag.requested = True

    with pytest.raises(Dropped):
        maker.sample(0, flag, stop)
    assert seen == [16]


def test_memory_does_not_grow_with_n(monkeypatch, tmp_path):
    """Of a shard nothing is held once it is committed: alive are rows that are sampled, wait, or are written."""
    import gc

    from ebmfast.generate.maker import Rows
    alive = []
    gc.collect()
    before = sum(type(o) is Rows for o in gc.get_objects())
    monkeypatch.setattr("ebmfast.generate.shards.contents", counting(alive, Rows, gc))
    made(points(160, 10), tmp_path)
    assert len(alive) == 16 and max(alive) - before <= 3


def counting(alive, kind, gc):
    from ebmfast.generate import shards
    real = shards.contents

    def contents(rows, plan):
        alive.append(sum(type(o) is kind for o in gc.get_objects()))
        return real(rows, plan)

    return contents


def test_progress_is_read_while_a_run_goes_on(tmp_path):
    plan = resolve(points(6000, 60, sampler={"kind": "langevin", "steps": 2000, "step_size": 0.01}))
    thread = threading.Thread(target=lambda: generate(plan, tmp_path, workers=0))
    thread.start()
    store, seen = stores.at(tmp_path), []
    while thread.is_alive():
        if (tmp_path / "_ebmfast/plan.json").exists() and (tmp_path / "_ebmfast/origin.json").exists():
            seen.append(status.describe(store))
        time.sleep(0.05)
    thread.join()
    running = [s for s in seen if s["running"]]
    assert running and [s["shards_done"] for s in seen] == sorted(s["shards_done"] for s in seen)
    last = status.describe(store)
    assert last["complete"] and not last["running"] and last["runs"][0]["state"] == "complete" and last["rows"] == 6000
    assert last["runs"][0]["samples_per_second"] > 0
    assert "complete" in status.report(store)


def test_two_runs_on_one_folder(tmp_path):
    made(points(), tmp_path)
    store = stores.at(tmp_path)
    held = lock.acquire(store, "local")
    try:
        assert lock.held(store)
        with pytest.raises(LockedError, match=rf"is being written by process {os.getpid()} on \S+ \(local engine, since"):
            generate(points(), tmp_path, workers=0)
        with pytest.raises(LockedError):
            generate(points(), tmp_path, engine="torchrun", rank=0, world_size=2)
    finally:
        held.release()
    assert not lock.held(store)
    ranks = [lock.acquire(store, "torchrun", rank) for rank in (0, 1)]
    with pytest.raises(LockedError, match="rank 1"):
        lock.acquire(store, "torchrun", 1)
    with pytest.raises(LockedError):
        lock.acquire(store, "local")
    for held in ranks:
        held.release()
    made(points(), tmp_path)


def test_a_changed_plan_is_refused_with_the_difference(tmp_path):
    made(points(), tmp_path)
    before = contents(tmp_path)
    other = points(sampler={"kind": "langevin", "steps": 6, "step_size": 0.05})
    with pytest.raises(ValueError, match=r'(?s)another plan.*-\s+"steps": 5,.*\+\s+"steps": 6,'):
        generate(other, tmp_path, workers=0)
    assert contents(tmp_path) == before


def test_verify_makes_shards_again(tmp_path, reference):
    made(points(), tmp_path)
    found = verify.verify(stores.at(tmp_path))
    assert found.ok and found.hashed == found.remade == 8 and "nothing is wrong" in str(found)
    assert verify.verify(stores.at(tmp_path), remake=3).remade == 3
    # A shard that hashes to what the manifest says, and is not what the plan gives: made by something else.
    plan, rows = resolve(points()), Maker(resolve(points())).sample(2)
    rows.x += 1e-3
    data = formats.encode(rows, plan)
    stat = stores.at(tmp_path).put(formats.name(plan, 2), data)
    manifest = Manifest(stores.at(tmp_path), "main").read()
    from dataclasses import replace
    from hashlib import sha256
    entry = manifest.entries[2]
    forged = replace(entry.files[0], size=len(data), sha256=sha256(data).hexdigest(), stamp=stat.stamp)
    manifest.append([replace(entry, files=(forged,))])
    found = verify.verify(stores.at(tmp_path))
    assert list(found.wrong) == [2] and "other bytes" in found.wrong[2]
    assert made(points(), tmp_path) == reference[0]


def test_verify_on_another_kind_of_machine_compares_within_tolerances(tmp_path):
    from dataclasses import replace
    made(points(), tmp_path)
    plan, store = resolve(points()), stores.at(tmp_path)
    for change, ok in ((1e-6, True), (0.1, False)):
        rows = Maker(plan).sample(2)
        rows.x += change
        data = formats.encode(rows, plan)
        stat = store.put(formats.name(plan, 2), data)
        manifest = Manifest(store, "main").read()
        from hashlib import sha256
        entry = manifest.entries[2]
        file = replace(entry.files[0], size=len(data), sha256=sha256(data).hexdigest(), stamp=stat.stamp)
        manifest.append([replace(entry, files=(file,), environment="elsewhere")])
        found = verify.verify(store)
        assert found.ok is ok and (2 in found.near) is ok and "largest difference" in str(found)


def run(capsys, *args):
    code = cli.main(["generate", *map(str, args)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def plan_file(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(points()))
    return path


def test_the_command_makes_shows_and_verifies(capsys, tmp_path, plan_file, reference):
    out = tmp_path / "out"
    assert run(capsys, plan_file, "--out", out, "--workers", 0)[:2] == (0, f"{out} is complete\n")
    assert contents(out)["data/shard-00003.parquet"] == reference[0]["data/shard-00003.parquet"]
    assert "8 of 8 shards, 200 of 200 samples, 200 rows" in run(capsys, "--out", out, "--status")[1]
    assert json.loads(run(capsys, "--out", out, "--status", "--json")[1])["complete"]
    assert run(capsys, "--out", out, "--verify", 2)[:2] == (0, "8 shards hashed, 2 made again\nnothing is wrong\n")
    assert run(capsys, "--out", out, "--workers", 0)[0] == 0


def test_the_command_says_who_holds_the_lock(capsys, tmp_path, plan_file):
    held = lock.acquire(stores.at(tmp_path / "out"), "local")
    code, _, err = run(capsys, plan_file, "--out", tmp_path / "out")
    held.release()
    assert code == 1 and f"is being written by process {os.getpid()}" in err and "--status" in err


def test_trying_a_plan_writes_nothing_but_what_is_asked(capsys, tmp_path, plan_file):
    code, text, _ = run(capsys, plan_file, "--dry-run", "--workers", 2)
    assert code == 0 and "200 samples of [2] in 8 shards of up to 30" in text and "leaves: modes, net[c]" in text
    code, text, _ = run(capsys, plan_file, "--preview", tmp_path / "sheet.png")
    assert code == 0 and sorted(p.name for p in tmp_path.iterdir()) == ["plan.json", "sheet.png"]
    assert json.loads(run(capsys, "--schema")[1])["title"] == "ebmfast generate plan"
    (tmp_path / "example.toml").write_text(run(capsys, "--example")[1])
    assert resolve(tmp_path / "example.toml").n == 132


@pytest.mark.parametrize(("args", "message"), [
    ([], "needs a plan, or --out"), (["PLAN"], "--out is missing"), (["--out", "NONE"], "is not a data set"),
    (["--out", "NONE", "--status"], "is not a data set"), (["nowhere.toml", "--out", "x"], "nowhere.toml"),
    (["PLAN", "--out", "x", "--workers", "-1"], "`workers` must be 0 or more"),
    (["--out", "NONE", "--verify", "some"], "--verify takes"),
    (["PLAN", "--out", "x", "--engine", "torchrun"], "needs RANK and WORLD_SIZE"),
])
def test_wrong_commands_say_what_is_missing(capsys, tmp_path, plan_file, args, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = [{"PLAN": plan_file, "NONE": tmp_path / "none"}.get(a, a) for a in args]
    code, _, err = run(capsys, *args)
    assert code == 2 and message in err and "Traceback" not in err


@pytest.mark.parametrize("signal", ["SIGINT", "SIGTERM"])
def test_a_signal_stops_cleanly_and_the_same_command_goes_on(tmp_path, signal):
    import signal as signals
    number, workers = getattr(signals, signal), {"SIGINT": "2", "SIGTERM": "0"}[signal]
    plan = points(4000, 50, sampler={"kind": "langevin", "steps": 20000, "step_size": 0.001})
    path, out = tmp_path / "plan.json", tmp_path / "out"
    path.write_text(json.dumps(plan))
    process = subprocess.Popen([sys.executable, "-m", "ebmfast", "generate", path, "--out", out, "--workers", workers],
                               stderr=subprocess.PIPE, text=True, start_new_session=True)
    while process.poll() is None and not list(out.glob("data/*.parquet")):
        time.sleep(0.02)
    os.killpg(process.pid, number)  # as a terminal or a scheduler does: to everyone
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert "the same command goes on" in err and "Traceback" not in err
    assert not [p for p in out.rglob("*") if ".tmp-" in p.name]
    about = status.describe(stores.at(out))
    assert not about["running"] and 0 < about["shards_done"] < 80 and about["runs"][0]["state"] == "stopped"
    assert verify.verify(stores.at(out), remake=1).ok


def test_the_energy_of_the_plan_is_native():
    assert "chain engine yes" in Maker(resolve(points())).composition(0).run.explain()
    assert NORMAL["factory"].startswith("ebmfast.energies")
