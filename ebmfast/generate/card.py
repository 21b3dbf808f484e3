"""The README.md beside the shards: what the data set is, how to open it, pictures, the plan, versions."""

from __future__ import annotations

import io
import json

import torch

from . import formats
from .manifest import HOME, Entry
from .plan import DatasetPlan
from .preview import MOST_ROWS, sheet
from .store import Store

COLUMNS, POINTS = 8, 4096  # of a composition in the picture
PICTURE = "preview.png"


def write(plan: DatasetPlan, store: Store, entries: dict[int, Entry], owner: str) -> None:
    """Write preview.png, where samples can be drawn, and README.md; the same for the same shards and plan."""
    picture = _picture(plan, store, entries)
    if picture is not None:
        store.put(PICTURE, picture, owner)
    store.put("README.md", text(plan, store, entries, picture is not None).encode(), owner)


def text(plan: DatasetPlan, store: Store, entries: dict[int, Entry], picture: bool) -> str:
    """The card as Markdown; its header tells Hugging Face `datasets` where the shards are."""
    suffix = formats.SUFFIX[plan.spec.output.format]
    rows = sum(e.rows for e in entries.values())
    header = (f"---\nconfigs:\n- config_name: default\n  data_files: data/*{suffix}\n"
              "tags:\n- synthetic\n- energy-based-models\n---\n")
    lines = [
        header, "# Composed samples", "",
        f"{rows:,} samples of {list(plan.shape)} from compositions of energy-based models, drawn by `ebmfast generate`:"
        f" {plan.n:,} chains in {plan.shards:,} shards, seed {plan.spec.seed}.", ""]
    if picture:
        lines += [f"![samples of every composition]({PICTURE})", ""]
    lines += ["| composition | expression | samples | kept | rejected | quarantined |", "| --- | --- | --- | --- | --- | --- |"]
    for j, composition in enumerate(plan.spec.compositions):
        own = [e for k, e in entries.items() if plan.shard(k).composition == j]
        name, expression = (t.replace("|", "\\|") for t in (plan.names[j], composition.expression))
        counts = plan.counts[j], *(sum(getattr(e, k) for e in own) for k in ("rows", "rejected", "quarantined"))
        lines.append(f"| {name} | `{expression}` | {' | '.join(f'{c:,}' for c in counts)} |")
    lines += ["", "## Reading", "", "```python", *_reading(plan), "```", "", *_columns(plan), "", "## Plan", ""]
    source = plan.source or json.dumps(plan.identity()["plan"], indent=2)
    lines += ["```toml" if not source.lstrip().startswith("{") else "```json", source.rstrip(), "```", "",
              f"sha256 of the resolved plan (`{HOME}/plan.json`): `{plan.digest}`", "", "## Made with", ""]
    for name in sorted({e.environment for e in entries.values()}):
        about = json.loads(store.read(f"{HOME}/environment-{name}.json"))
        versions = ", ".join(f"{k} {v}" for k, v in sorted(about["versions"].items()))
        lines.append(f"- {versions}; Python {about['python']} on {about['machine']} ({about['isa']}), {about['device']}")
    lines += ["", "Check it with `ebmfast generate --verify --out DIR`: files are hashed, shards made again and compared.", ""]
    return "\n".join(lines)


def _reading(plan: DatasetPlan) -> list[str]:
    if plan.spec.output.format == "parquet":
        other = ["from datasets import load_dataset", 'data = load_dataset("DIR", split="train")']
    else:
        other = ["import webdataset as wds",
                 f'data = wds.WebDataset("DIR/data/shard-{{00000..{plan.shards - 1:05d}}}.tar", shardshuffle=False).decode("pil")']
    return [*other, "", "import ebmfast as ef", 'data = ef.load_dataset("DIR")  # a memory-mapped torch Dataset']


def _columns(plan: DatasetPlan) -> list[str]:
    output = plan.spec.output
    what = {"png": "`image`: PNG", "uint8": f"`x`: uint8, {[*plan.shape[1:], plan.shape[0]]} flattened"}
    lines = ["- `id`: the chain's id, which with the seed fixes its noise and its random conditions",
             "- `composition`: which of the above",
             f"- {what.get(plan.storage, f'`x`: {plan.storage}, {list(plan.shape)} flattened')}"]
    if output.energy:
        lines.append("- `energy`: of the composition, at the last noise level where there are some")
    if output.leaf_energies:
        leaves = ", ".join(f"`{leaf}`" for leaf in plan.leaves)
        lines.append(f"- `leaf_energies`: {leaves}; null where a composition has no such leaf")
    if output.conditions and plan.slots:
        lines.append(f"- `conditions`, `labels`: of the slots {', '.join(plan.slots)}, as vectors and, where given so, as labels")
    return lines


def _picture(plan: DatasetPlan, store: Store, entries: dict[int, Entry]) -> bytes | None:
    """A contact sheet of the first rows of each composition's first shard; None where samples are no pictures."""
    if not plan.image and plan.shape != (2,):
        return None
    rows, titles = [], []
    for j, name in enumerate(plan.names[:MOST_ROWS]):
        index = next((k for k in sorted(entries) if plan.shard(k).composition == j and entries[k].rows), None)
        if index is None:
            continue
        x = torch.tensor(formats.decode(store.read(formats.name(plan, index)), plan)["x"])
        x = x[:COLUMNS if plan.image else POINTS]
        rows.append(x.permute(0, 3, 1, 2).float() / 255 if plan.storage in ("png", "uint8") else x.float())
        titles.append(name)
    if not rows:
        return None
    extent = float(min(r.min() for r in rows)), float(max(r.max() for r in rows))
    data_range = (0.0, 1.0) if plan.storage in ("png", "uint8") else plan.spec.output.data_range or extent
    file = io.BytesIO()
    try:
        sheet(plan, rows, titles, data_range).save(file, "PNG")
    except ImportError:  # tensors need no Pillow
        return None
    return file.getvalue()
