"""`python -m bench` names what is missing and goes on; peers of the benches are held to ours before they are timed."""

import ast
import importlib.util
import json
from pathlib import Path

import pytest
import torch

import bench.__main__ as everything
from bench import cubes, lines, metropolis, overhead, plots, quality, quality_methods, scaling, step, timing
from bench.timing import Variant, fastest, sound

ROOT = Path(__file__).parents[1]


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    return tmp_path


def test_parts_are_modules_and_take_their_arguments():
    """Also `make bench` as a whole is planned to stay within 15 minutes."""
    for part in everything.PARTS.values():
        source = (ROOT / f"{part.module.replace('.', '/')}.py").read_text()
        options = {n.value for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        assert {a for a in part.arguments if a.startswith("--")} <= options, part.module
    assert sum(part.minutes for part in everything.PARTS.values()) < 15


def test_a_part_that_fails_does_so_alone(tmp_path, monkeypatch, capsys):
    def part(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        return everything.Part(name, "nothing", 0.0)

    monkeypatch.setattr(everything, "PARTS", {"a": part("a_part", "raise SystemExit('no luck')"), "b": part("b_part", "print(1)")})
    monkeypatch.setattr(everything, "ROOT", tmp_path)
    monkeypatch.setattr(everything, "PEERS", ("no_such_peer",))
    assert everything.main(["--only", "a", "b"]) == 1
    text = capsys.readouterr().out
    assert "no luck" in text and "failed: a" in text and "[2/2] b" in text and "not measured: no_such_peer" in text
    assert (tmp_path / "build" / "bench" / "b.log").read_text() == "1\n"
    assert everything.main(["--only", "b"]) == 0 and everything.main(["--list"]) == 0


def test_a_peer_that_is_absent_or_wrong_is_named_and_ours_raises():
    def wrong():
        raise AssertionError("off by one\nmore")

    def absent():
        import no_such_library  # noqa: F401

    right = lambda: Variant("", lambda: None, lambda: None)  # noqa: E731
    bad = lambda: Variant("", lambda: None, wrong)  # noqa: E731
    found, trouble = sound({"ebmfast": right, "peer": bad, "other": absent})
    assert [v.name for v in found] == ["ebmfast"]
    assert trouble["peer"] == "AssertionError: off by one" and "no_such_library" in trouble["other"]
    with pytest.raises(AssertionError):
        sound({"ebmfast": bad})


def test_the_fastest_form_counts():
    times = {"a": {"median": 1.0}, "jax": {"median": 3.0}, "jax_stacked": {"median": 2.0}}
    assert fastest(times, "jax") == {"a": {"median": 1.0}, "jax": {"median": 2.0}}


@pytest.mark.parametrize("way, steps", [(metropolis.MALA, 60), (metropolis.HMC, 20)], ids=["MALA", "HMC"])
def test_eager_loops_and_torchebm_have_our_law(way, steps, monkeypatch):
    """And with another step size they do not: the gate sees it."""
    case = metropolis.Case(way, 32, steps, 8)
    peers = {"eager", "torchebm"} & set(case.makers())
    for name in peers:
        case.makers()[name]().check()
    other = metropolis.Way(way.name, 8 * way.step_size, way.leapfrogs)
    monkeypatch.setattr(case, "way", other)
    for name in peers:
        with pytest.raises(AssertionError, match="acceptances"):
            case.makers()[name]().check()


def test_the_step_of_a_peer_is_checked(monkeypatch):
    monkeypatch.setattr(step, "CHAINS", 64)
    monkeypatch.setattr(step, "SIZE", 256)
    for noise in (0.0, step.NOISE):
        case = step.Case(noise, torch.float32)
        case.ours().check()
        case.eager().check()
        move, scale = case.move, 1.1 if noise else 1.001
        monkeypatch.setattr(case, "move", lambda x, g, w, move=move, scale=scale: x + scale * (move(x, g, w) - x))
        with pytest.raises(AssertionError):
            case.eager().check()


def test_the_trivial_energy_is_checked():
    overhead.checked(overhead.eager, torch.randn(4, overhead.SIZE)).check()
    with pytest.raises(AssertionError, match="variance"):
        overhead.checked(lambda x: 1.1 * overhead.eager(x), torch.randn(4, overhead.SIZE)).check()


def test_quality_is_measured(results, monkeypatch):
    """Distances of right methods fall; a method with another energy gets no curve."""
    target = quality.targets()[1]
    every = quality_methods.makers

    def few(target, start):
        return {n: m for n, m in every(target, start).items() if n in ("ebmfast Langevin", "eager Langevin", "eager HMC")}

    monkeypatch.setattr(quality_methods, "makers", few)
    quality.measure(target, (1, 16), 2)
    (line,) = lines.load(results)["quality"]
    assert set(line["curves"]) == {"ebmfast Langevin", "eager Langevin", "eager HMC"} and not line["not_timed"]
    assert all(curve[1][2] < 0.6 * curve[0][2] for curve in line["curves"].values())
    target.energy = lambda x: x.square().sum(1)
    quality.measure(target, (1,), 2)
    line = lines.load(results)["quality"][-1]
    assert set(line["curves"]) == {"ebmfast Langevin"} and set(line["not_timed"]) == {"eager Langevin", "eager HMC"}


def test_scaling_measures_a_shared_point_once(results, monkeypatch):
    monkeypatch.setattr(scaling, "POINT", {"chains": 8, "leaves": 2, "steps": 2, "dim": 2})
    monkeypatch.setattr(scaling, "WIDTH", 8)
    scaling.sweep({"chains": (8, 16), "steps": (2,)}, ["eager"], 0.01)
    found = {(e["axis"], e["value"]): e for e in lines.load(results)["scaling"]}
    assert set(found) == {("chains", 8), ("chains", 16), ("steps", 2)}
    assert found["chains", 8]["seconds"] == found["steps", 2]["seconds"] != found["chains", 16]["seconds"]


def test_the_picture_is_of_one_machine():
    def entry(bench, case, device, time):
        seconds = {"ebmfast": {"median": 1.0}, "eager": {"median": 2.0}}
        return {"bench": bench, "case": case, "chains": 4, "device": device, "isa": "v3", "time": time, "seconds": seconds}

    results = {"chain": [entry("chain", "AND", "A", "1"), entry("chain", "AND", "B", "2")],
               "metropolis": [entry("metropolis", "MALA 32-64-64-1", "B", "3"), entry("metropolis", "MALA 32-8-8-1", "B", "4")]}
    assert [name for name, _, _ in plots.headline(results)] == ["AND, 4 chains", "MALA 32-64-64-1, 4 chains"]
    assert all(line["device"] == "B" for _, line, _ in plots.headline(results))


@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="needs jax, from the extra ebmfast[bench]")
def test_energies_in_jax_are_ours():
    for target in quality.targets():
        quality.same_energy(target, torch.randn(16, 2), "jax Langevin")


def test_results_are_json_with_their_machine(results, capsys):
    timing.record("x", {"case": "c"}, {"figure": 1})
    (entry,) = (json.loads(text) for text in (results / "x.jsonl").read_text().splitlines())
    assert entry["case"] == "c" and entry["device"] and entry["torch"]


@pytest.mark.skipif(importlib.util.find_spec("torchebm") is None, reason="needs torchebm, from the extra ebmfast[test]")
def test_torchebm_steps_pictures_as_we_do():
    models = cubes.cubes(2, 2)
    x, rows = torch.rand(2, 3, 16, 16), [torch.randn(2, 3) for _ in models]
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(sum(m(leaf, c) for m, c in zip(models, rows)).sum(), leaf)
    unit = float(1 / gradient.abs().max())
    cubes.peer_makers(models, rows, x, gradient, unit)["torchebm"]().check()
    with pytest.raises(AssertionError, match="moves differ"):
        cubes.peer_makers(models, rows, x, 1.01 * gradient, unit)["torchebm"]().check()
