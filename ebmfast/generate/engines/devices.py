"""How many workers, and which device each has."""

from __future__ import annotations

import os

import torch

from ..plan import DatasetPlan


def count(plan: DatasetPlan, asked: int | None) -> int:
    """Workers: as asked, else one for each GPU, or as many as the cores serve with the plan's threads."""
    if asked is not None:
        if asked < 0:
            raise ValueError(f"`workers` must be 0 or more, got {asked}")
        return asked
    if plan.spec.run.device == "cuda":
        return max(1, torch.cuda.device_count())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // plan.spec.run.threads)


def of(plan: DatasetPlan, number: int) -> str:
    """The device of worker `number`."""
    if plan.spec.run.device != "cuda":
        return plan.spec.run.device
    if not torch.cuda.is_available():
        raise ValueError('run.device is "cuda", and torch sees no such device here')
    return f"cuda:{number % torch.cuda.device_count()}"
