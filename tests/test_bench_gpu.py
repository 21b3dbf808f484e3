"""`bench/gpu` without a GPU: its commands, and every case of its measurements at tiny sizes on the CPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TREE = Path(__file__).parent.parent


def test_commands():
    """Nothing is fetched, the tree is not built in, missing backends fail, every part is there."""
    command = [sys.executable, TREE / "bench" / "gpu", "all", "--dry", "--work", "/nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | {"OUT": "/elsewhere"})
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("+")]
    assert "--no-build-isolation --no-deps --no-index" in lines[0] and "EBMFAST_CUDA=ON" in lines[0]
    assert "build-dir=/nowhere/cmake" in lines[0] and "--target /nowhere/site" in lines[0]
    assert all("EBMFAST_REQUIRE=cpu,triton,cuda" in line for line in lines[1:3])
    assert "tests/test_gpu.py" in lines[1] and "tests/test_cuda_chain.py" in lines[1] and "tests/test_triton.py" in lines[2]
    assert "--tool memcheck" in lines[3] and "--tool racecheck" in lines[4]
    assert [line.split("bench.gpu_cases ")[1] for line in lines[5:]] == [
        f"{part} --out /elsewhere" for part in ("step", "captured", "chain", "cubes")]
    assert subprocess.run([*command[:2], "everything"], capture_output=True, timeout=120).returncode == 2


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_every_case_runs_and_is_checked_before_it_is_timed(tmp_path):
    command = [sys.executable, "-m", "bench.gpu_cases", "step", "captured", "chain", "cubes", "small", "--smoke", "--out", tmp_path]
    environment = os.environ | {"TRITON_INTERPRET": "1", "EBMFAST_MEASURE": "0", "EBMFAST_COMMIT": "abc"}
    done = subprocess.run(command, cwd=TREE, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert {line["bench"] for line in lines} == {"gpu step", "gpu captured", "gpu chain", "gpu cubes"} and len(lines) == 10
    for line in lines:
        assert line["commit"] == "abc" and line["seconds"], line
        bad = {k: v for k, v in line["not_timed"].items() if not v.startswith("absent")}
        assert not bad, (line["case"], bad)
    page = (tmp_path / "gpu.md").read_text()
    assert page.count("\n| ") == len(lines) + 2 and "times_best_peer" in page
    assert "agrees with the reference" in done.stdout


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_a_wrong_variant_gets_no_time(tmp_path):
    code = f"""
import pathlib, torch, ebmfast as ef
from bench import gpu_cases as g
from bench.timing import Variant
g.SMOKE, g.OUT = True, pathlib.Path({str(tmp_path)!r})
x, e = torch.randn(4, 3), ef.Concept(lambda y: y.square().sum(1), name="q")
wrong = g.Loops(lambda y: 1.01 * y.square().sum(1), e, x, 4)
right = g.Loops(lambda y: y.square().sum(1), e, x, 4)
def missing(): raise g.Absent("nowhere")
def broken(): raise RuntimeError("out of order")
makers = dict(right=right.eager, wrong=wrong.eager, compiled=wrong.under_compile, missing=missing, broken=broken)
g.Case("c", {{}}, makers, lambda t: {{"times": t["wrong"] / t["right"]}}, {{"times": 1.0}}).run("step")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=TREE, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = map(json.loads, (tmp_path / "gpu.jsonl").read_text().splitlines())
    assert list(line["seconds"]) == ["right"] and "times" not in line and line["met"] == {}
    assert line["not_timed"]["wrong"].startswith("wrong, so not timed: moves without noise differ by 0.0")
    assert line["not_timed"]["missing"] == "absent: nowhere"
    assert line["not_timed"]["broken"] == "failed: RuntimeError: out of order"
