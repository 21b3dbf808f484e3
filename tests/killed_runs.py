"""Runs that are killed at random moments: `python killed_runs.py PLAN.json OUT KILLS SEED`.

Imports once, then forks a run with two workers for every trial, kills it with SIGKILL, and begins it again: the whole group of
processes, the parent alone, or one worker (which the parent has to replace). Prints one JSON line: how many kills hit what.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch

import ebmfast.generate.formats.parquet  # noqa: F401  imported before forking
from ebmfast.generate import generate
from ebmfast.generate.engines import local  # noqa: F401


def children(pid: int) -> list[int]:
    """Processes whose parent is `pid`."""
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(c) for c in found.read_text().split()] if found.exists() else []


def start(plan: dict, out: str) -> int:
    """A run in a group of its own."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    try:
        sys.stderr = open(os.devnull, "w")
        generate(plan, out, workers=2, start_method="fork")
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stdout, flush=True)
        os._exit(1)


def gone(group: int) -> None:
    """Wait until no process of a group is left: orphans have to end by themselves."""
    for _ in range(2000):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.005)
    raise SystemExit(f"processes of group {group} outlive their parent")


def hit(pid: int, what: str) -> bool:
    """Kill; False if there was nothing left to kill."""
    try:
        if what == "group":
            os.killpg(pid, signal.SIGKILL)
        elif what == "parent":
            os.kill(pid, signal.SIGKILL)
        else:
            workers = children(pid)
            if not workers:
                return False
            os.kill(random.choice(workers), signal.SIGKILL)
        return True
    except ProcessLookupError:
        return False


def main(plan: str, out: str, kills: str, seed: str) -> None:
    torch.set_num_threads(1)
    plan, kills, hits, folders = json.loads(Path(plan).read_text()), int(kills), Counter(), 0
    random.seed(int(seed))
    while sum(hits.values()) < kills:
        pid, what = start(plan, out), random.choice(["group", "group", "parent", "worker"])
        time.sleep(random.uniform(0.0, 0.35))
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            if status:
                raise SystemExit(f"a run failed with status {status}")
            shutil.rmtree(out)  # complete before all kills were spent: begin anew
            folders += 1
            continue
        if what == "worker" and hit(pid, what):
            hits[what] += 1
            time.sleep(0.1)
        elif what != "worker":
            hits[what] += hit(pid, what)
        hit(pid, "parent")
        os.waitpid(pid, 0)
        gone(pid)
    pid = start(plan, out)
    if os.waitpid(pid, 0)[1]:
        raise SystemExit("the last run failed")
    print(json.dumps({"hits": hits, "completed between": folders}))


if __name__ == "__main__":
    main(*sys.argv[1:])
