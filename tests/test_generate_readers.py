"""Data sets as others read them: Hugging Face `datasets`, `webdataset`, and `ef.load_dataset` with a DataLoader; all offline."""

import io
import os
import pickle
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from dataset_plans import pictures, points
from torch.utils.data import DataLoader

import ebmfast as ef
from ebmfast.generate import generate, resolve
from ebmfast.generate.maker import Maker


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parquet") / "set"
    generate(pictures(), folder, workers=0)
    return folder


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tars") / "set"
    generate(pictures(output={"format": "webdataset"}), folder, workers=0)
    return folder


def elsewhere(code: str, folder, tmp_path) -> str:
    """What `code` prints in a process of its own that may not use the network; others' warnings are not ours."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), folder], env=os.environ | offline,
                          capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_hugging_face_datasets_show_pictures(parquet, tmp_path):
    pytest.importorskip("datasets")
    said = elsewhere("""
        import sys, datasets, PIL.Image
        data = datasets.load_dataset(sys.argv[1], split="train")
        assert isinstance(data.features["image"], datasets.Image), data.features
        row = data.sort("id")[0]
        assert isinstance(row["image"], PIL.Image.Image) and row["image"].size == (32, 32) and row["image"].mode == "RGB"
        row["image"].save("first.png")
        print(len(data), row["id"], row["composition"], row["labels"]["c"], round(row["energy"], 3), len(row["conditions"]["p"]))
        print(sorted(set(data["composition"])), row["leaf_energies"]["shape('cube')"])
        """, parquet, tmp_path)
    rows = Maker(resolve(pictures())).sample(0)
    assert said.splitlines() == [f"24 0 colours red {round(float(rows.energy[0]), 3)} 2", "['colours', 'cube'] None"]
    from PIL import Image
    with Image.open(tmp_path / "first.png") as image:
        seen = np.array(image).astype(int)
    assert np.abs(seen - ((rows.x[0].clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).numpy()).max() <= 0.51


def test_hugging_face_datasets_read_points(tmp_path):
    pytest.importorskip("datasets")
    generate(points(50), tmp_path / "set", workers=0)
    said = elsewhere("""
        import sys, datasets
        data = datasets.load_dataset(sys.argv[1], split="train").with_format("torch").sort("id")
        print(data.column_names, data[:]["x"].shape, data[7]["x"].tolist())
        """, tmp_path / "set", tmp_path)
    x = Maker(resolve(points(50))).sample(0).x[7].tolist()
    columns = ["id", "composition", "x", "energy", "leaf_energies", "conditions", "labels"]
    assert said.strip() == f"{columns} torch.Size([50, 2]) {x}"


def test_webdataset_reads_the_tars(tars, tmp_path):
    pytest.importorskip("webdataset")
    said = elsewhere("""
        import sys, webdataset as wds
        data = wds.WebDataset(sys.argv[1] + "/data/shard-{00000..00003}.tar", shardshuffle=False).decode("pil")
        rows = list(data)
        print(len(rows), rows[0]["__key__"], rows[0]["png"].size, rows[1]["json"]["labels"], sorted(rows[0]["json"]))
        print([row["json"]["id"] for row in rows] == list(range(24)))
        rows[3]["png"].save("third.png")
        """, tars, tmp_path)
    assert said.splitlines() == ["24 000000000000 (32, 32) {'c': 'blue'} ['composition', 'conditions', 'energy', 'id', 'labels',"
                                 " 'leaf_energies']", "True"]
    from PIL import Image
    x = Maker(resolve(pictures())).sample(0).x[3]
    with Image.open(tmp_path / "third.png") as image:
        assert np.abs(np.array(image) - ((x.clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).numpy()).max() <= 0.51


def test_tars_depend_on_the_rows_alone(tars):
    import tarfile
    with tarfile.open(tars / "data/shard-00000.tar") as tar:
        members = tar.getmembers()
    assert [m.name for m in members[:2]] == ["000000000000.json", "000000000000.png"]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}


@pytest.mark.parametrize("which", ["parquet", "tars"])
def test_load_dataset_gives_rows_in_any_order(request, which):
    data = ef.load_dataset(request.getfixturevalue(which))
    maker = Maker(resolve(pictures()))
    parts = [maker.sample(k) for k in range(4)]
    x, energy = torch.cat([p.x for p in parts]), torch.cat([p.energy for p in parts])
    assert len(data) == 24
    for i in (0, 23, 8, 7, -1, 11, 12):
        row = data[i]
        assert row["id"] == i % 24 and row["composition"] == ("colours" if i % 24 < 12 else "cube")
        assert row["x"].shape == (3, 32, 32)
        assert (row["x"].float() / 127.5 - 1 - x[i].clamp(-1, 1)).abs().max() < 0.51 / 127.5 + 1e-6
        assert row["energy"] == pytest.approx(float(energy[i]), rel=1e-6)
    assert data[0]["labels"] == {"c": "red"} and torch.equal(data[0]["conditions"]["p"], parts[0].conditions["p"][0])
    assert set(data[0]["leaf_energies"]) == {"color[c]", "position[p]", "position.unconditional"}
    with pytest.raises(IndexError, match="row 24 of 24"):
        data[24]


def test_batches_workers_and_copies(parquet):
    data = ef.load_dataset(parquet, transform=lambda row: row["x"].float().mean(), columns=["id", "x"])
    rows = ef.load_dataset(parquet, columns=["id"])
    assert data[3].shape == () and rows[3] == {"id": 3}
    assert [r["id"] for r in rows.__getitems__([5, 20, 1, 5])] == [5, 20, 1, 5]
    assert pickle.loads(pickle.dumps(rows))[9] == {"id": 9}
    loader = DataLoader(rows, batch_size=5, num_workers=1, multiprocessing_context="spawn")
    assert torch.cat([batch["id"] for batch in loader]).tolist() == list(range(24))


def test_files_are_mapped_not_read(parquet, monkeypatch):
    """Opening one row touches one file, and no file is read whole into memory."""
    from ebmfast.generate import store as stores
    opened, real = [], stores.Folder.open
    monkeypatch.setattr(stores.Folder, "open", lambda self, name: opened.append(name) or real(self, name))
    monkeypatch.setattr(stores.Folder, "read", lambda self, name: pytest.fail(name) if name.startswith("data/") else (
        self.path / name).read_bytes())
    data = ef.load_dataset(parquet)
    assert opened == [] and data[9]["id"] == 9 and opened == ["data/shard-00001.parquet"]


def test_a_data_set_that_is_not_complete_has_the_rows_that_are_there(tmp_path):
    generate(points(), tmp_path, engine="torchrun", rank=1, world_size=2)
    data, shards = ef.load_dataset(tmp_path), [resolve(points()).shard(k) for k in (1, 3, 5, 7)]
    assert [row["id"] for row in data] == [i for s in shards for i in range(s.start, s.start + s.count)]


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a data set"):
        ef.load_dataset(tmp_path)


def test_npy_members_of_tensors(tmp_path):
    generate(points(20, output={"format": "webdataset"}), tmp_path, workers=0)
    import tarfile
    with tarfile.open(tmp_path / "data/shard-00000.tar") as tar:
        array = np.load(io.BytesIO(tar.extractfile("000000000002.npy").read()))
    assert torch.equal(torch.from_numpy(array), Maker(resolve(points(20))).sample(0).x[2])
