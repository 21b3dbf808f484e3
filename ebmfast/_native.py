"""Imports the compiled kernels, or says how to repair the build. Nothing falls back to slow code."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["core"]


def _repair(package: Path) -> str:
    if (package.parent / "csrc").is_dir():
        return (
            f"the source folder {package} hides the installed package. Build it in place with "
            f"`pip install -e {package.parent}`, or run Python from another folder"
        )
    return "rebuild it with `pip install --force-reinstall --no-deps ebmfast` (it needs a C++17 compiler)"


try:
    from ebmfast import _core as core
except ImportError as error:
    raise ImportError(
        f"ebmfast's compiled part cannot be loaded ({error}): {_repair(Path(__file__).parent)}."
    ) from error

try:
    core.set_isa(os.environ.get("EBMFAST_ISA", ""))
except ValueError as error:
    raise ValueError(f"EBMFAST_ISA: {error}") from None
