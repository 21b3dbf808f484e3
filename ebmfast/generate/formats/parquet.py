"""Parquet through pyarrow; pictures carry the Hugging Face `Image` feature, so that `datasets` shows them.

The writer's settings are fixed, and nothing of the time or place of writing is in a file. The bytes depend on pyarrow's version.
"""

from __future__ import annotations

import json

import numpy as np

from . import pictures

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as error:
    raise ImportError(f'Parquet needs pyarrow: pip install "ebmfast[generate]" ({error})') from None


def schema(plan) -> pa.Schema:
    """The columns of every shard: id, composition, image or x, energies, conditions, labels, by the plan's leaves and slots."""
    output, columns = plan.spec.output, [("id", pa.int64()), ("composition", pa.string())]
    size = int(np.prod(plan.shape))
    about = {"format": "ebmfast-dataset-1", "shape": list(plan.shape), "storage": plan.storage}
    metadata = {b"ebmfast": json.dumps(about).encode()}
    if plan.storage == "png":
        columns.append(("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])))
        metadata[b"huggingface"] = json.dumps({"info": {"features": {"image": {"_type": "Image"}}}}).encode()
    else:
        kind = {"uint8": pa.uint8(), "float16": pa.float16(), "float32": pa.float32()}[plan.storage]
        columns.append(("x", pa.list_(kind, size)))
    if output.energy:
        columns.append(("energy", pa.float32()))
    if output.leaf_energies:
        columns.append(("leaf_energies", pa.struct([(leaf, pa.float32()) for leaf in plan.leaves])))
    if output.conditions and plan.slots:
        columns.append(("conditions", pa.struct([(slot, pa.list_(pa.float32())) for slot in plan.slots])))
        columns.append(("labels", pa.struct([(slot, pa.string()) for slot in plan.slots])))
    return pa.schema(columns, metadata)


def encode(rows, plan) -> bytes:
    """`rows` as a Parquet file."""
    target = schema(plan)
    table = pa.table({name: _column(rows, plan, name, target.field(name).type) for name in target.names}, schema=target)
    sink = pa.BufferOutputStream()
    pq.write_table(
        table, sink, row_group_size=plan.row_group_size, version="2.6", data_page_version="1.0", store_schema=True,
        write_statistics=True, compression="none" if plan.storage == "png" else "zstd",  # PNG files are compressed already
        use_dictionary=["composition", *(f"labels.{slot}" for slot in plan.slots)])
    return sink.getvalue().to_pybytes()


def _column(rows, plan, name: str, kind: pa.DataType) -> pa.Array:
    n = len(rows.ids)
    match name:
        case "id":
            return pa.array(rows.ids.numpy())
        case "composition":
            return pa.array(np.full(n, rows.name, dtype=object), pa.string())
        case "image":
            data = pa.array([pictures.png(image) for image in pictures.stored(rows.x, plan.storage, rows.data_range)], pa.binary())
            return pa.StructArray.from_arrays([data, pa.nulls(n, pa.string())], fields=list(kind))
        case "x":
            flat = pictures.stored(rows.x, plan.storage, rows.data_range).reshape(-1)
            return pa.FixedSizeListArray.from_arrays(pa.array(flat, kind.value_type), type=kind)
        case "energy":
            return pa.array(rows.energy.numpy())
        case "leaf_energies":
            columns = {leaf: rows.leaf_energies[:, k].contiguous().numpy() for k, leaf in enumerate(rows.leaves)}
            return _struct(kind, n, {leaf: pa.array(values) for leaf, values in columns.items()})
        case "conditions":
            return _struct(kind, n, {slot: _lists(values.numpy()) for slot, values in rows.conditions.items()})
        case "labels":
            return _struct(kind, n, {slot: pa.array(labels, pa.string()) for slot, labels in rows.labels.items()})
    raise AssertionError(name)


def _struct(kind: pa.StructType, n: int, known: dict[str, pa.Array]) -> pa.StructArray:
    """A struct of `n` rows; fields that this composition has not are null."""
    return pa.StructArray.from_arrays([known.get(f.name, pa.nulls(n, f.type)) for f in kind], fields=list(kind))


def _lists(values: np.ndarray) -> pa.ListArray:
    n, width = values.shape
    return pa.ListArray.from_arrays(np.arange(n + 1, dtype=np.int32) * width, pa.array(np.ascontiguousarray(values).reshape(-1)))


def decode(data: bytes, plan) -> dict[str, np.ndarray]:
    """The rows of a file: ids `[m]`, stored samples `[m, ...]`."""
    table = pq.read_table(pa.BufferReader(data))
    return {"id": table["id"].to_numpy(), "x": samples(table, plan.storage, plan.shape)}


def samples(table: pa.Table, storage: str, shape) -> np.ndarray:
    """The samples of some rows: uint8 `[m, H, W, C]`, or floats `[m, *S]`."""
    pixel_shape = (*shape[1:], shape[0])
    if storage == "png":
        found = [pictures.unpng(v) for v in table["image"].combine_chunks().field("bytes").to_pylist()]
        return np.stack(found) if found else np.zeros((0, *pixel_shape), np.uint8)
    column = table["x"].combine_chunks()
    flat = column.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(column), *(pixel_shape if storage == "uint8" else shape))
