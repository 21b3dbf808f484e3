"""What a shard's bits depend on beside the plan: versions, instruction set, device."""

from __future__ import annotations

import hashlib
import json
import platform
from importlib import metadata

import torch

from .._native import core

PACKAGES = ("ebmfast", "torch", "numpy", "pyarrow", "pillow")


def describe(device: str) -> dict:
    """Versions, processor, instruction set and device of this process."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found = {"versions": versions, "python": platform.python_version(), "machine": platform.machine(), "isa": core.isa(),
             "cpu": torch.backends.cpu.get_cpu_capability(), "device": torch.device(device).type}
    if found["device"] == "cuda":
        found["device"] = torch.cuda.get_device_name(torch.device(device))
        found["cuda"] = torch.version.cuda
    return found


def key(environment: dict) -> str:
    """A short name of an environment."""
    return hashlib.sha256(json.dumps(environment, sort_keys=True).encode()).hexdigest()[:12]
