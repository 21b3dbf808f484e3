"""Reports say what the lines say: the newest of each case and machine, ratios of medians, and nothing outside of the markers."""

import json
import sys

import pytest
import torch

import ebmfast as ef
from bench import compare, quality, report

ABOUT = {"device": "A", "isa": "v3", "threads": 1, "torch": "2.13", "commit": "c"}


def line(time, ebmfast, **peers):
    seconds = {k: {"median": v, "p20": v, "p80": v} for k, v in {"ebmfast": ebmfast, **peers}.items()}
    return {"bench": "chain", "case": "AND", "chains": 4, "dim": 2, "width": 8, "seconds": seconds, "gflops": 10.0, "time": time,
            "fma_peak_gflops": 40.0, "share_of_fma_peak": 0.25, **ABOUT}


def write(folder, *lines):
    folder.mkdir()
    (folder / "chain.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))


def test_the_page_shows_the_newest_ratios_of_each_machine(tmp_path):
    other = line("2026-01-03", 1.0, torchebm=9.0) | {"device": "B"}
    write(tmp_path / "results", line("2026-01-02", 1.0, torchebm=3.0, jax=5.0, jax_stacked=4.0),
          line("2026-01-01", 1.0, torchebm=7.0), other)
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "performance.md").write_text("# Performance\n\nBy hand.\n")
    arguments = ["--results", str(tmp_path / "results"), "--docs", str(docs)]
    report.main(arguments)
    text = (docs / "performance.md").read_text()
    assert "| AND 2-8-8-1, 4 chains | 3.00 | 4.00 |" in text and "| 9.00 |  |" in text and "7.00" not in text
    assert "10.0 of 40.0 GFLOP/s | 25 %" in text and text.startswith("# Performance\n\nBy hand.\n")
    report.main(arguments)
    assert (docs / "performance.md").read_text() == text
    (docs / "performance.md").write_text(text.replace("3.00", "99.00") + "After.\n")
    report.main(arguments)
    assert (docs / "performance.md").read_text() == text + "After.\n"


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    curve = [[1, 0.1, 0.5], [2, 0.2, 0.3]]
    scaled = {"bench": "scaling", "axis": "chains", "seconds": {"ebmfast": {"median": 0.1}}, "time": "2026", **ABOUT}
    curves = {"bench": "quality", "case": "c", "chains": 3, "curves": {"ebmfast MALA": curve}, "floor": 0.1, **ABOUT}
    results = {"quality": [curves],
               "scaling": [scaled | {"value": v} for v in (1, 2)]}
    assert "quality.png" in report.quality(results, tmp_path) and "scaling.png" in report.scaling(results, tmp_path)
    assert report.picture({"chain": [line("2026-01-01", 1.0, jax=2.0)]}, tmp_path / "p.png")
    assert {p.name for p in tmp_path.glob("*.png")} == {"quality.png", "scaling.png", "p.png"}


def test_slower_is_said():
    here, base = [{"a": 1.2, "b": 1.0, "new": 1.0}] * 3, [{"a": 1.0, "b": 1.0}] * 3
    text, slower = compare.compared(here, base, 0.1)
    assert slower == ["a"] and "1.20" in text and "new" in text
    assert compare.compared(here, [{"a": 1.15, "b": 1.0}] * 3, 0.1)[1] == []
    unsure, names = compare.compared(here, [{"a": 1.0}, {"a": 1.3}, {"a": 0.9}], 0.1)
    assert "0.92 to 1.33" in unsure and names == []


def test_the_distance_is_to_the_exact_law():
    """Exact draws are near the floor; the law of a narrower chain is far; what leaves the grid counts."""
    target = quality.Target("normal", ef.Concept(ef.energies.Gaussian([0.0, 0.0], 1.0)), 0.1)
    x = torch.randn(quality.CHAINS, 2, generator=torch.Generator().manual_seed(0))
    assert abs(target.distance(x) - target.floor()) < 0.02 and target.floor() < 0.15
    assert target.distance(0.6 * x) > 2 * target.floor()
    assert target.distance(x + 100) == pytest.approx(1.0)


def test_the_suite_runs(tmp_path):
    pytest.importorskip("pytest_benchmark")
    found = compare.run(sys.executable, tmp_path / "here.json", 0.01)
    assert len(found) == 8 and min(found.values()) > 0
