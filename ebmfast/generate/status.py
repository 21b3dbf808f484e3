"""How far a data set is, read from another terminal or machine."""

from __future__ import annotations

import json
import time

from . import lock, session
from .manifest import HOME, Manifest
from .store import Store


def describe(store: Store) -> dict:
    """Shards, samples, rows, what was lost, and the progress of every process that writes or wrote."""
    plan, manifest = session.saved_plan(store), Manifest(store, "reader").read()
    entries = manifest.entries.values()
    runs = []
    for name in sorted(store.stats(HOME)):
        if name.startswith(f"{HOME}/progress-") and name.endswith(".json"):
            try:
                runs.append(json.loads(store.read(name)))
            except ValueError:
                continue
    running = lock.held(store)
    for run in runs:
        if run["state"] == "running" and not running:
            run["state"] = "killed"
    return {
        "running": running, "complete": len(entries) == plan.shards, "shards": plan.shards, "shards_done": len(entries),
        "samples": plan.n, "samples_done": sum(plan.shard(e.shard).count for e in entries), "rows": sum(e.rows for e in entries),
        "rejected": sum(e.rejected for e in entries), "quarantined": sum(e.quarantined for e in entries),
        "bytes": sum(f.size for e in entries for f in e.files), "runs": runs}


def report(store: Store) -> str:
    """The same for people."""
    about = describe(store)
    state = "complete" if about["complete"] else "running" if about["running"] else "not complete, and nobody is writing"
    lines = [f"{store}: {state}",
             f"  {about['shards_done']:,} of {about['shards']:,} shards, {about['samples_done']:,} of {about['samples']:,} samples,"
             f" {about['rows']:,} rows kept, {about['rejected']:,} rejected, {about['quarantined']:,} quarantined,"
             f" {about['bytes'] / 1e6:,.1f} MB"]
    for run in about["runs"]:
        eta = "" if run["eta_seconds"] is None or run["state"] != "running" else f", {_clock(run['eta_seconds'])} left"
        lines.append(f"  {run['engine']}, process {run['pid']} on {run['host']}: {run['state']},"
                     f" {run['samples_per_second']:,.1f} samples/s{eta}, {time.time() - run['updated']:.0f} s ago")
    return "\n".join(lines)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
