"""File formats of shards: each turns rows into the bytes of one file, the same bytes for the same rows and versions."""

from __future__ import annotations

SUFFIX = {"parquet": ".parquet", "webdataset": ".tar"}


def encode(rows, plan) -> bytes:
    """The file that holds `rows`, in the plan's format."""
    if plan.spec.output.format == "parquet":
        from . import parquet
        return parquet.encode(rows, plan)
    from . import webdataset
    return webdataset.encode(rows, plan)


def name(plan, index: int) -> str:
    """Where shard `index` lies."""
    return f"data/shard-{index:05d}{SUFFIX[plan.spec.output.format]}"


def decode(data: bytes, plan) -> dict:
    """The rows in a file: ids `[m]` and stored samples `[m, ...]`, with energies where they were written."""
    if plan.spec.output.format == "parquet":
        from . import parquet
        return parquet.decode(data, plan)
    from . import webdataset
    return webdataset.decode(data, plan)


def compare(theirs: bytes, ours: bytes, plan, tolerance: float, pixels: int) -> tuple[bool, str]:
    """Whether two files of one shard differ by more than rounding, and in words by how much."""
    import numpy as np

    a, b = decode(theirs, plan), decode(ours, plan)
    if a["id"].tolist() != b["id"].tolist():
        return True, f"{len(set(a['id'].tolist()) ^ set(b['id'].tolist()))} samples are in one of the two only"
    x, y = a["x"].astype(np.float64), b["x"].astype(np.float64)
    if plan.storage in ("png", "uint8"):
        far, unit, limit = np.abs(x - y).max(initial=0.0), "of 255", float(pixels)
    else:
        far, unit, limit = np.abs(x - y).max(initial=0.0) / max(y.std() if y.size else 1.0, 1e-12), "standard deviations", tolerance
    share = float((np.abs(x - y) > 0).mean()) if x.size else 0.0
    return bool(far > limit), f"largest difference {far:.3g} {unit} (allowed {limit:g}), {share:.2%} of values differ"
