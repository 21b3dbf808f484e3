"""Ranks and Ray tasks make the same bytes as one process, also when they are killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from dataset_plans import contents, points

from ebmfast.generate import engines, generate, status
from ebmfast.generate import store as stores
from ebmfast.generate.engines import torchrun


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "out"
    generate(points(), folder, workers=0)
    return contents(folder)


def test_ranks_share_the_shards_and_the_last_one_writes_the_card(tmp_path, whole):
    for rank in (2, 0, 1):
        complete = generate(points(), tmp_path, engine="torchrun", rank=rank, world_size=3)
        assert complete is (rank == 1)
    states = [run["state"] for run in status.describe(stores.at(tmp_path))["runs"]]
    assert states == ["this rank is done", "complete", "this rank is done"]
    assert contents(tmp_path) == whole
    assert len(list((tmp_path / "_ebmfast").glob("manifest-rank*"))) == 3


def test_a_job_of_another_size_finishes_what_one_began(tmp_path, whole):
    assert not generate(points(), tmp_path, engine="torchrun", rank=1, world_size=4)
    assert status.describe(stores.at(tmp_path))["shards_done"] == 2
    assert not generate(points(), tmp_path, engine="torchrun", rank=0, world_size=2)
    assert generate(points(), tmp_path, workers=0)
    assert contents(tmp_path) == whole


def test_ranks_in_processes_at_the_same_time(tmp_path, whole):
    """The variables of torchrun for one, those of SLURM for the other."""
    (tmp_path / "plan.json").write_text(json.dumps(points()))
    command = [sys.executable, "-m", "ebmfast", "generate", tmp_path / "plan.json", "--out", tmp_path / "out"]
    ours = ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
            {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1"})
    ranks = [subprocess.Popen(command, env=os.environ | extra, stdout=subprocess.PIPE, text=True) for extra in ours]
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0] and any("is complete" in text for text in said)
    found = contents(tmp_path / "out")
    assert {k: v for k, v in found.items() if k != "README.md"} == {k: v for k, v in whole.items() if k != "README.md"}


def test_where_rank_and_world_come_from(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    assert engines.chosen("auto") == "local"
    with pytest.raises(ValueError, match="needs RANK and WORLD_SIZE"):
        torchrun.place()
    monkeypatch.setenv("SLURM_PROCID", "5")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert engines.chosen("auto") == "local"  # a single task is not a job of ranks
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    assert engines.chosen("auto") == "torchrun" and torchrun.place() == (5, 8, 1)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert torchrun.place() == (0, 2, 0) and torchrun.place(1, 3) == (1, 3, 0)
    with pytest.raises(ValueError, match="`rank` must be 0 to 2 for a world of 3, got 3"):
        torchrun.place(3, 3)
    with pytest.raises(ValueError, match="belong together"):
        torchrun.place(3)
    with pytest.raises(ValueError, match="`engine` must be auto, local, torchrun, ray, got 'mpi'"):
        engines.chosen("mpi")


RAY = '''
import json, os, signal, sys, threading, time
from pathlib import Path
import ebmfast.generate.engines.ray as engine
from ebmfast.generate import generate
from ebmfast.generate import store as stores

plan, out, kill = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2], int(sys.argv[3])
killed = []

def workers():
    """Ray's processes that run a task now: they call themselves after it."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and b"ray::make_shard" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found

def killer():
    while len(killed) < kill:
        for pid in workers():
            if pid not in killed and len(killed) < kill:
                time.sleep(0.05)
                try:
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
                except ProcessLookupError:
                    pass
        time.sleep(0.02)

threading.Thread(target=killer, daemon=True).start()
complete = generate(plan, out, engine="ray", workers=2)
print(json.dumps({"complete": complete, "killed": len(killed)}))
'''


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for Ray's workers in /proc")
def test_ray_tasks_whose_workers_are_killed(tmp_path):
    pytest.importorskip("ray")
    plan = points(600, 50, sampler={"kind": "langevin", "steps": 20000, "step_size": 0.001})
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    (tmp_path / "drive.py").write_text(RAY)
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_IMPORT_WARNING": "1"}
    done = subprocess.run([sys.executable, tmp_path / "drive.py", tmp_path / "plan.json", tmp_path / "ray", "2"], env=environment,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"complete": True, "killed": 2}
    generate(plan, tmp_path / "whole", workers=0)
    assert contents(tmp_path / "ray") == contents(tmp_path / "whole")


def test_without_ray_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r'pip install "ebmfast\[ray\]"'):
        generate(points(), tmp_path, engine="ray")
