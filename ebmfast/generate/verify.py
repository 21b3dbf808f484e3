"""Whether a data set is what its plan says: hashes of all files, and shards made again and compared."""

from __future__ import annotations

import errno
import random
from dataclasses import dataclass, field

from . import environment, formats, lock, session
from . import plan as plans
from .engines import devices
from .maker import Maker
from .manifest import Entry, Manifest
from .plan import DatasetPlan
from .shards import make
from .store import Store

TOLERANCE = 1e-3  # largest difference of floats on another kind of machine, relative to their spread
PIXEL_TOLERANCE = 8  # the same, of 255


@dataclass
class Findings:
    """What was looked at, and what is wrong: shards by number, each with why."""

    hashed: int = 0
    remade: int = 0
    wrong: dict[int, str] = field(default_factory=dict)
    near: dict[int, str] = field(default_factory=dict)  # not the same bytes, on another kind of machine, but within tolerances
    missing: list[int] = field(default_factory=list)
    revoked: bool = False

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.wrong

    def __str__(self):
        lines = [f"{self.hashed} shards hashed, {self.remade} made again"]
        lines += [f"shard {k}: WRONG: {why}" for k, why in sorted(self.wrong.items())]
        lines += [f"shard {k}: not the same bytes, on another kind of machine: {why}" for k, why in sorted(self.near.items())]
        if self.missing:
            lines.append(f"{len(self.missing)} shards are not there yet")
        if self.wrong:
            lines.append("the same `generate` command makes these again" if self.revoked else
                         "the folder cannot be written, so these are not marked; run with --full-check to make them again")
        else:
            lines.append("nothing is wrong")
        return "\n".join(lines)


def verify(store: Store, plan: DatasetPlan | None = None, remake: int | None = None, shards: list[int] | None = None) -> Findings:
    """Hash every committed file, then make `remake` shards again (None: all; chosen at random) and compare them.

    Wrong shards are revoked in the manifest, so that the next run makes them again. On another kind of machine than a shard's own,
    values are compared within tolerances.
    """
    saved, held = session.saved_plan(store), None
    if plan is None:  # hashes need no models
        plan = saved if remake == 0 else plans.again(saved)
    if plan.text() != saved.text():
        raise session.ChangedPlanError(f"{store} holds the data set of another plan, or a model or table has changed since:\n"
                                       f"{plan.difference(saved.text())}")
    try:
        held = lock.acquire(store, "verify")
    except OSError as error:  # what cannot be written can still be read
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
    try:
        manifest = Manifest(store, "main").read()
        return _verify(store, plan, manifest, remake, shards, held is not None)
    finally:
        if held is not None:
            held.release()


def _verify(store, plan, manifest: Manifest, remake, shards, writable: bool) -> Findings:
    found: dict = {}
    for folder in ("data", "rejected", "quarantine"):
        found |= store.stats(folder)
    chosen = {k: e for k, e in manifest.entries.items() if shards is None or k in shards}
    result = Findings(hashed=len(chosen), missing=[k for k in range(plan.shards) if k not in manifest.entries])
    for entry in session.checked(store, chosen, found, full=True):
        if entry.revoked is not None:
            result.wrong[entry.shard] = entry.revoked
    sound = [k for k in chosen if k not in result.wrong]
    if remake is not None:
        sound = sorted(random.Random(plan.spec.seed).sample(sound, min(remake, len(sound))))
    if sound:
        device = devices.of(plan, 0)
        maker, here = Maker(plan, device), environment.key(environment.describe(device))
    for k in sound:
        result.remade += 1
        _compare(store, plan, manifest.entries[k], make(maker, k), here, result)
    if result.wrong and writable:
        manifest.append(Entry(k, revoked=why) for k, why in result.wrong.items())
        result.revoked = True
    return result


def _compare(store: Store, plan: DatasetPlan, entry: Entry, files: dict[str, bytes], here: str, result: Findings) -> None:
    different = [name for name, data in files.items() if not store.exists(name) or store.read(name) != data]
    lost = {f.name for f in entry.files} - set(files)
    if not different and not lost:
        return
    if entry.environment == here:
        result.wrong[entry.shard] = f"{', '.join([*different, *sorted(lost)])}: other bytes than the plan gives on this machine"
        return
    name = formats.name(plan, entry.shard)
    problem, text = formats.compare(store.read(name), files[name], plan, TOLERANCE, PIXEL_TOLERANCE)
    (result.wrong if problem else result.near)[entry.shard] = text
