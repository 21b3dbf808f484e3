"""WebDataset tar: per sample NNN.json with id, composition, energies, conditions and labels, and NNN.png or NNN.npy.

Members have mtime 0, no owner and one mode, so that the bytes depend on the rows alone.
"""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np

from . import pictures


def encode(rows, plan) -> bytes:
    """`rows` as a tar file."""
    output, sink = plan.spec.output, io.BytesIO()
    arrays = pictures.stored(rows.x, plan.storage, rows.data_range)
    energies = rows.energy.tolist() if output.energy else None
    leaves = rows.leaf_energies.tolist() if output.leaf_energies else None
    conditions = {slot: values.tolist() for slot, values in rows.conditions.items()} if output.conditions else {}
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for i, number in enumerate(rows.ids.tolist()):
            about: dict = {"id": number, "composition": rows.name}
            if energies is not None:
                about["energy"] = energies[i]
            if leaves is not None:
                about["leaf_energies"] = dict(zip(rows.leaves, leaves[i]))
            if conditions:
                about["conditions"] = {slot: values[i] for slot, values in conditions.items()}
                about["labels"] = {slot: labels[i] for slot, labels in rows.labels.items()}
            kind, data = ("png", pictures.png(arrays[i])) if plan.storage == "png" else ("npy", _npy(arrays[i]))
            _add(tar, f"{number:012d}.json", json.dumps(about).encode())
            _add(tar, f"{number:012d}.{kind}", data)
    return sink.getvalue()


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o644
    tar.addfile(member, io.BytesIO(data))


def decode(data: bytes, plan) -> dict[str, np.ndarray]:
    """The rows of a file: ids `[m]`, stored samples `[m, ...]`."""
    ids, arrays = [], []
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            content = tar.extractfile(member).read()
            if member.name.endswith(".json"):
                ids.append(json.loads(content)["id"])
            else:
                arrays.append(read_array(member.name, content))
    return {"id": np.array(ids, dtype=np.int64), "x": np.stack(arrays) if arrays else np.zeros((0, *plan.shape))}


def read_array(name: str, content: bytes) -> np.ndarray:
    """The sample in a member: uint8 `[H, W, C]`, or floats."""
    return pictures.unpng(content) if name.endswith(".png") else np.load(io.BytesIO(content), allow_pickle=False)
