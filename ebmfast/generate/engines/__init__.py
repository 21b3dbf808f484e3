"""Who makes the shards: `local` (processes of this machine), `torchrun` (ranks that share nothing), `ray` (tasks)."""

from __future__ import annotations

import os

NAMES = ("local", "torchrun", "ray")


def chosen(name: str) -> str:
    """The engine by name; "auto" is torchrun under torchrun or srun with several tasks, else local."""
    if name == "auto":
        ranked = "RANK" in os.environ and "WORLD_SIZE" in os.environ
        return "torchrun" if ranked or int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ else "local"
    if name not in NAMES:
        raise ValueError(f"`engine` must be auto, {', '.join(NAMES)}, got {name!r}")
    return name
