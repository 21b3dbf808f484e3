"""Ranks that share nothing but the folder: rank r of W makes the shards k with k mod W = r. No collectives.

Rank and world size come from torchrun (RANK, WORLD_SIZE, LOCAL_RANK), srun (SLURM_PROCID, SLURM_STEP_NUM_TASKS,
SLURM_LOCALID), or the caller. A job of another size can finish what one began: a shard does not depend on who makes it.
"""

from __future__ import annotations

import os

from . import devices, local

VARIABLES = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))


def place(rank: int | None = None, world: int | None = None) -> tuple[int, int, int]:
    """Rank, world size, and the rank on this machine."""
    if (rank is None) != (world is None):
        raise ValueError(f"`rank` and `world_size` belong together, got {rank} and {world}")
    local_rank = 0
    if rank is None:
        names = next((n for n in VARIABLES if n[0] in os.environ and n[1] in os.environ), None)
        if names is None:
            raise ValueError("the torchrun engine needs RANK and WORLD_SIZE (torchrun) or SLURM_PROCID and"
                             " SLURM_STEP_NUM_TASKS (srun) in the environment, or --rank and --world-size")
        rank, world, local_rank = int(os.environ[names[0]]), int(os.environ[names[1]]), int(os.environ.get(names[2], 0))
    if not 0 <= rank < world:
        raise ValueError(f"`rank` must be 0 to {world - 1} for a world of {world}, got {rank}")
    return rank, world, local_rank


def run(session, local_rank: int = 0, *, show: bool = False) -> int | None:
    """Make this rank's shards in this process; returns the signal that stopped it, or None."""
    session.begin(1, show)
    return local.in_process(session, session.todo, devices.of(session.plan, local_rank))
