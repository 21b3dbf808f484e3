"""Who makes the shards: `local` (processes of this machine), `torchrun` (ranks that share nothing), `ray` (tasks)."""

from __future__ import annotations

import os

NAMES = ("local", "torchrun", "ray")


def chosen(name: str) -> str:
    """The engine by name; "auto" is torchrun under torchrun or srun with several tasks, else local."""
    if name == "auto":
        ranked = "RANK" in os.environ and "WORLD_SIZE" in os.environ
        tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))  # of srun; a batch script has SLURM_NTASKS and runs once
        return "torchrun" if ranked or (tasks > 1 and "SLURM_PROCID" in os.environ) else "local"
    if name not in NAMES:
        raise ValueError(f"`engine` must be auto, {', '.join(NAMES)}, got {name!r}")
    return name
