"""What can go wrong does: kills, full disks, flipped bytes, damaged manifests, failing buckets. The data set comes out the same."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dataset_plans import contents, points, slow

from ebmfast.generate import generate, resolve, status, verify
from ebmfast.generate import store as stores
from ebmfast.generate.engines import local
from ebmfast.generate.lock import LockedError, acquire
from ebmfast.generate.manifest import Manifest
from ebmfast.generate.session import Session

KILLS = int(os.environ.get("EBMFAST_KILLS", "6"))  # 25 are the proof


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "out"
    generate(points(), folder, workers=0)
    return folder


@pytest.fixture
def out(whole, tmp_path):
    """A complete data set to damage."""
    shutil.copytree(whole, tmp_path / "out", copy_function=shutil.copy2)
    return tmp_path / "out"


def redone(out: Path, plan=None, **options) -> list[int]:
    """Resume; the shards that were made."""
    made, real = [], local.worker.Pipeline.make

    def make(pipeline, shard):
        made.append(shard)
        real(pipeline, shard)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local.worker.Pipeline, "make", make)
        assert generate(points() if plan is None else plan, out, workers=0, **options)
    return made


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="forks, and looks for children in /proc")
def test_sigkill_at_random_moments_never_changes_the_data(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(slow()))
    generate(slow(), tmp_path / "undisturbed", workers=0)
    done = subprocess.run([sys.executable, Path(__file__).parent / "killed_runs.py", path, tmp_path / "killed", str(KILLS), "0"],
                          capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    hits = json.loads(done.stdout.splitlines()[-1])["hits"]
    assert sum(hits.values()) == KILLS
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")
    assert verify.verify(stores.at(tmp_path / "killed"), remake=1).ok
    assert not [p for p in (tmp_path / "killed").rglob("*") if ".tmp-" in p.name]


def test_a_worker_that_dies_is_replaced_and_its_shards_are_given_back(tmp_path):
    """In one run, without a resume."""
    plan, said, killed = resolve(slow(6, 3000)), [], []
    real = local.Pool._take

    def take(pool, member, kind, *what):
        real(pool, member, kind, *what)
        if kind == "batch" and not killed:
            killed.append((member.number, list(member.given)))
            os.kill(member.process.pid, signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local.Pool, "_take", take)
        assert generate(plan, tmp_path / "out", workers=2, say=said.append)
    generate(plan, tmp_path / "whole", workers=0)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert said == [f"worker {killed[0][0]} died (signal 9); shards {killed[0][1]} are given back"] and killed[0][1]


def test_workers_that_always_die_end_the_run(tmp_path):
    real = local.Pool._take

    def take(pool, member, kind, *what):
        real(pool, member, kind, *what)
        if kind == "ready":
            os.kill(member.process.pid, signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local.Pool, "_take", take)
        with pytest.raises(local.WorkerDied, match=r"worker 0 died \(signal 9\) while making shards \[0, 1\].*1 retries are spent"):
            generate(points(), tmp_path, workers=1, retries=1, say=lambda text: None)


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_in_workers_reach_the_caller_as_they_are(tmp_path, workers):
    (tmp_path / "plan.json").write_text(json.dumps(points()))
    (tmp_path / "out" / "data" / "shard-00002.parquet").mkdir(parents=True)
    with pytest.raises(IsADirectoryError, match="while writing .*shard-00002.parquet"):
        generate(tmp_path / "plan.json", tmp_path / "out", workers=workers)
    assert not status.describe(stores.at(tmp_path / "out"))["running"]


@pytest.mark.parametrize("name", ["README.md", "preview.png", "data/notes.txt"])
def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path, name):
    (tmp_path / "plan.json").write_text(json.dumps(points()))
    mine = tmp_path / "out" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(ValueError, match=f"has files of its own, {name}, and is no data set: take another --out"):
        generate(tmp_path / "plan.json", tmp_path / "out", workers=0)
    assert mine.read_text() == "mine"


def test_temporary_files_of_others_are_left_alone(tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps(points()))
    mine = tmp_path / "out" / "notes.tmp-old.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    assert generate(tmp_path / "plan.json", tmp_path / "out", workers=0)
    assert mine.read_text() == "mine"


def full_after(limit: int, what: str, monkeypatch):
    """From the time on that `limit` bytes are written to files of a kind, the disk is full; returns a switch that frees it."""
    state, real = {"written": 0, "free": False}, os.fsync

    def fsync(descriptor):
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if what in name:
            state["written"] += os.fstat(descriptor).st_size
            if state["written"] > limit and not state["free"]:
                raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return state


@pytest.mark.parametrize("what", ["/data/", "manifest"])
def test_a_full_disk_is_a_clear_error_and_resumes(tmp_path, whole, monkeypatch, what):
    switch = full_after(9000, what, monkeypatch)
    with pytest.raises(OSError, match=r"no space left for .*Every committed shard is whole") as error:
        generate(points(), tmp_path, workers=0)
    assert error.value.errno == errno.ENOSPC
    assert not [p for p in tmp_path.rglob("*") if ".tmp-" in p.name]
    done = status.describe(stores.at(tmp_path))
    assert 0 < done["shards_done"] < 8 and verify.verify(stores.at(tmp_path)).ok
    switch["free"] = True
    assert len(redone(tmp_path)) == 8 - done["shards_done"]
    assert contents(tmp_path) == contents(whole)


TMPFS = """
set -e
mount -t tmpfs -o size=220k none "$1"
cd "$2"
if "$3" -m ebmfast generate plan.json --out "$1/out" --workers 2; then exit 9; fi
"$3" -m ebmfast generate --out "$1/out" --verify 0
mount -o remount,size=20m "$1"
"$3" -m ebmfast generate plan.json --out "$1/out" --workers 0
cp -r "$1/out" "$2/copied"
"""


def test_a_disk_that_is_really_full(tmp_path):
    """A small tmpfs in a namespace of its own, where the system lets one be made."""
    able = shutil.which("unshare") and subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "none", tmp_path], capture_output=True).returncode == 0
    if not able:
        pytest.skip("no tmpfs can be mounted here")
    (tmp_path / "disk").mkdir()
    plan = points(8000, 500, 128)
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    done = subprocess.run(["unshare", "-rm", "sh", "-c", TMPFS, "sh", tmp_path / "disk", tmp_path, sys.executable],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no space left for" in done.stderr and "Traceback" not in done.stderr and "nothing is wrong" in done.stdout
    generate(tmp_path / "plan.json", tmp_path / "whole", workers=0)
    assert contents(tmp_path / "copied") == contents(tmp_path / "whole")


def flip(path: Path, place: int, keep_time: bool = False) -> None:
    times, data = path.stat(), bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)
    if keep_time:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_flipped_byte_is_found_by_resume_and_that_shard_alone_is_redone(out, whole):
    said = []
    flip(out / "data/shard-00003.parquet", 1000)
    assert redone(out, say=said.append) == [3]
    assert len(said) == 1 and "shard 3: data/shard-00003.parquet hashes to" in said[0]
    assert contents(out) == contents(whole)


def test_a_flipped_byte_is_found_by_verify_which_has_it_redone(out, whole):
    flip(out / "data/shard-00005.parquet", 400, keep_time=True)
    assert redone(out) == []  # size and time are what they were: only a full check sees this
    found = verify.verify(stores.at(out), remake=0)
    assert list(found.wrong) == [5] and not found.ok and "makes these again" in str(found)
    assert redone(out) == [5] and contents(out) == contents(whole)


def test_a_full_check_hashes_everything(out, whole):
    flip(out / "data/shard-00001.parquet", 400, keep_time=True)
    assert redone(out, full_check=True, say=lambda text: None) == [1] and contents(out) == contents(whole)


@pytest.mark.parametrize("damage", [lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:-1])])
def test_missing_and_shortened_files_are_redone(out, whole, damage):
    damage(out / "data/shard-00002.parquet")
    assert redone(out, say=lambda text: None) == [2] and contents(out) == contents(whole)


def test_files_that_were_copied_are_hashed_once(out, monkeypatch):
    for path in (out / "data").iterdir():
        os.utime(path)
    hashed, real = [], stores.Folder.read
    monkeypatch.setattr(stores.Folder, "read", lambda self, name: hashed.append(name) or real(self, name))

    def count() -> int:
        hashed.clear()
        with Session(resolve(points()), stores.at(out), "local"):
            return sum(name.startswith("data/") for name in hashed)

    assert count() == 8 and count() == 0


@pytest.mark.parametrize("keep", [0, 1, 40])
def test_a_truncated_manifest_line_is_done_again(out, whole, keep):
    path, said = out / "_ebmfast/manifest-main-00000.jsonl", []
    lines = path.read_bytes().splitlines(keepends=True)
    last = json.loads(lines[-1])["shard"]
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:keep])
    assert redone(out, say=said.append) == [last] and contents(out) == contents(whole)
    assert bool(said) is (keep > 0)
    assert len(Manifest(stores.at(out), "main").read().entries) == 8 and not Manifest(stores.at(out), "main").read().damaged


def test_a_damaged_line_in_the_middle_costs_its_own_shard_only(out, whole):
    path = out / "_ebmfast/manifest-main-00000.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], b'{"shard": 3, "ro\x00\n', *lines[4:]]))
    assert redone(out, say=lambda text: None) == [json.loads(lines[3])["shard"]] and contents(out) == contents(whole)


def test_a_lost_manifest_redoes_everything_to_the_same_bytes(out, whole):
    (out / "_ebmfast/manifest-main-00000.jsonl").unlink()
    assert len(redone(out)) == 8 and contents(out) == contents(whole)


def test_stale_temporary_files_are_removed(out, whole):
    for name in ("data/shard-00003.parquet.tmp-host-123", "_ebmfast/progress-main.json.tmp-host-9", "README.md.tmp-host-1"):
        (out / name).write_text("half")
    assert redone(out) == [] and not [p for p in out.rglob("*") if ".tmp-" in p.name]


def test_a_rank_leaves_the_temporary_files_of_others(out):
    for owner in ("rank0-77", "rank1-78"):
        (out / f"data/shard-00003.parquet.tmp-{owner}").write_text("half")
    generate(points(), out, engine="torchrun", rank=0, world_size=2)
    assert [p.name for p in (out / "data").glob("*.tmp-*")] == ["shard-00003.parquet.tmp-rank1-78"]


READ_ONLY = """
mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" || exit 9
"$2" -m ebmfast generate --out "$1" --workers 0
"$2" -m ebmfast generate --out "$1" --verify 0
"""


def test_a_folder_that_cannot_be_written(out):
    """Root writes everywhere, except on a file system that is mounted to be read."""
    (out / "data/shard-00000.parquet").unlink()
    if os.geteuid() != 0:
        for path in (out / "data", out / "_ebmfast", out):
            path.chmod(0o555)
        try:
            with pytest.raises(PermissionError):
                generate(points(), out, workers=0)
            assert verify.verify(stores.at(out), remake=0).wrong
        finally:
            for path in (out, out / "data", out / "_ebmfast"):
                path.chmod(0o755)
        return
    done = subprocess.run(["unshare", "-rm", "sh", "-c", READ_ONLY, "sh", out, sys.executable], capture_output=True, text=True)
    if done.returncode == 9:
        pytest.skip(f"no read-only mount can be made here: {done.stderr}")
    assert "Read-only file system" in done.stderr and "Traceback" not in done.stderr
    assert done.returncode == 1 and "shard 0: WRONG" in done.stdout and "cannot be written" in done.stdout


class Flaky:
    """A bucket whose every operation fails `times` times before it works."""

    def __init__(self, times: int, only: str = ""):
        self.times, self.only, self.failures = times, only, {}

    def wrap(self, fs, monkeypatch):
        for name in ("pipe_file", "cat_file", "info", "exists"):
            real = getattr(fs, name)

            def call(path, *args, _real=real, _name=name, **kwargs):
                key = _name, path
                if self.only in path and self.failures.get(key, 0) < self.times:
                    self.failures[key] = self.failures.get(key, 0) + 1
                    raise ConnectionError("503 slow down")
                self.failures.pop(key, None)
                return _real(path, *args, **kwargs)

            monkeypatch.setattr(fs, name, call)


@pytest.fixture
def bucket(monkeypatch):
    """An empty bucket in memory, and its file system."""
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    monkeypatch.setattr(stores, "PAUSE", 0.0)
    monkeypatch.setattr("ebmfast.generate.lock.SETTLE", 0.0)
    yield "memory://bucket/set", fs
    fs.store.clear()


def in_bucket(fs) -> dict[str, bytes]:
    return {path.removeprefix("/bucket/set/"): file.getvalue() for path, file in fs.store.items()}


def test_a_bucket_holds_the_same_bytes(bucket, whole):
    url, fs = bucket
    assert generate(points(), url, workers=0)
    found = in_bucket(fs)
    assert {n: d for n, d in found.items() if n.startswith("data/") or "." in n and "/" not in n} == {
        str(p.relative_to(whole)): p.read_bytes() for p in whole.rglob("*")
        if p.is_file() and "_ebmfast" not in str(p.relative_to(whole))}
    assert redone(url) == [] and "_ebmfast/lock" not in found
    fs.rm("/bucket/set/data/shard-00004.parquet")
    assert redone(url, say=lambda text: None) == [4]
    import ebmfast as ef
    assert len(ef.load_dataset(url)) == 200 and ef.load_dataset(url)[7]["id"] == 7


def test_a_bucket_that_fails_twice_then_works(bucket, whole, monkeypatch):
    url, fs = bucket
    flaky = Flaky(2)
    with monkeypatch.context() as patch:
        flaky.wrap(fs, patch)
        assert generate(points(), url, workers=0)
    assert in_bucket(fs)["data/shard-00006.parquet"] == (whole / "data/shard-00006.parquet").read_bytes()


def test_a_bucket_that_stays_away_is_an_error_that_resumes(bucket, whole, monkeypatch):
    url, fs = bucket
    with monkeypatch.context() as patch:
        Flaky(99, "shard-00004").wrap(fs, patch)
        with pytest.raises(OSError, match="after 4 tries: ConnectionError: 503 slow down"):
            generate(points(), url, workers=0)
    done = status.describe(stores.at(url))
    assert not done["running"] and 0 < done["shards_done"] < 8
    assert len(redone(url)) == 8 - done["shards_done"]
    assert in_bucket(fs)["data/shard-00004.parquet"] == (whole / "data/shard-00004.parquet").read_bytes()


def test_the_lock_of_a_bucket(bucket, monkeypatch):
    url, fs = bucket
    held = acquire(stores.at(url), "local")
    with pytest.raises(LockedError, match="is being written by process"):
        generate(points(), url, workers=0)
    held._over.set()  # the run is gone, and its lock is written no more
    monkeypatch.setattr("ebmfast.generate.lock.STALE", 0.0)
    time.sleep(0.01)
    assert generate(points(), url, workers=0)


def test_manifests_in_a_bucket_are_cut_into_objects(bucket, monkeypatch):
    url, fs = bucket
    monkeypatch.setattr("ebmfast.generate.manifest.SEGMENT", 3)
    assert generate(points(), url, workers=0)
    names = sorted(n for n in in_bucket(fs) if "manifest" in n)
    assert names == [f"_ebmfast/manifest-main-0000{i}.jsonl" for i in range(3)]
    assert redone(url) == [] and len(Manifest(stores.at(url), "main").read().entries) == 8


def test_file_systems_that_do_not_put_at_once_get_a_temporary_key_and_a_move(bucket, monkeypatch):
    url, fs = bucket
    monkeypatch.setattr(stores, "ATOMIC_PUT", set())
    moved, real = [], fs.mv
    monkeypatch.setattr(fs, "mv", lambda a, b, **k: moved.append((a, b)) or real(a, b, **k))
    assert generate(points(40), url, workers=0)
    assert any(".tmp-" in a and b.endswith("data/shard-00000.parquet") for a, b in moved)
    assert not [n for n in in_bucket(fs) if ".tmp-" in n]


def test_shards_of_another_machine_are_told(out, whole):
    path, said = out / "_ebmfast/manifest-main-00000.jsonl", []
    (here,) = (out / "_ebmfast").glob("environment-*.json")
    path.write_text(path.read_text().replace(here.stem.removeprefix("environment-"), "elsewhere"))
    here.rename(here.with_name("environment-elsewhere.json"))
    assert redone(out, say=said.append) == [] and not said
    (out / "data/shard-00000.parquet").unlink()
    assert redone(out, say=said.append) == [0] and "elsewhere" in said[1] and len(said) == 2


def test_a_data_set_is_read_and_checked_without_its_models(out):
    path = out / "_ebmfast/plan.json"
    path.write_text(path.read_text().replace("ebmfast.energies:MLP", "module_of_another_machine:Net"))
    import ebmfast as ef
    assert len(ef.load_dataset(out)) == 200 and status.describe(stores.at(out))["complete"]
    assert verify.verify(stores.at(out), remake=0).ok
    with pytest.raises(ValueError, match="module_of_another_machine"):
        verify.verify(stores.at(out))


def test_a_model_that_changed_is_refused(tmp_path):
    import torch
    from safetensors.torch import save_file

    from ebmfast.energies import MLP
    plan = points()
    plan["models"]["net"] = plan["models"]["net"] | {"weights": str(tmp_path / "net.safetensors")}
    torch.manual_seed(0)
    save_file(MLP(2, [8], condition_dim=2).state_dict(), tmp_path / "net.safetensors")
    generate(plan, tmp_path / "out", workers=0)
    save_file(MLP(2, [8], condition_dim=2).state_dict(), tmp_path / "net.safetensors")
    for given in (plan, None):
        with pytest.raises(ValueError, match="sha256"):
            generate(given, tmp_path / "out", workers=0)
    with pytest.raises(ValueError, match="a model or table has changed"):
        verify.verify(stores.at(tmp_path / "out"))
