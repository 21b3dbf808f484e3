import subprocess
import sys
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch

from ebmfast import faces
from ebmfast.cli import main
from ebmfast.faces.celeba import read_attributes
from ebmfast.faces.draw import random_face, write_faces
from ebmfast.faces.figure import NESTED, compose, concepts_of, load
from ebmfast.training.concepts import FACES

Image = pytest.importorskip("PIL.Image")
PLAIN = faces.Face(smiling=False, male=False, young=True, wavy=False, glasses=False, beard=False, hair="Black_Hair",
                   attractive=False)


def write_celeba(folder, rows=((1, -1), (-1, -1), (1, 1)), names=("Smiling", "Young"), size=(12, 20)):
    """Files in CelebA's layout: pictures of one gray each, brighter from one to the next."""
    pictures = folder / "img_align_celeba"
    pictures.mkdir(parents=True)
    lines = [str(len(rows)), " ".join(names) + " "]
    for i, row in enumerate(rows):
        Image.new("RGB", size, (40 * i,) * 3).save(pictures / f"{i + 1:06d}.png")
        lines.append(f"{i + 1:06d}.png  " + " ".join(f"{v:2d}" for v in row))
    (folder / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n")
    return folder


def change(folder, line, text):
    path = folder / "list_attr_celeba.txt"
    lines = path.read_text().splitlines()
    lines[line - 1] = text
    path.write_text("\n".join(lines) + "\n")


def test_a_folder_and_a_zip_read_the_same(tmp_path):
    folder = write_celeba(tmp_path / "a")
    data = faces.CelebA(folder).load(4)
    assert data.images.shape == (3, 3, 4, 4) and data.images.dtype == torch.uint8
    assert data.images[:, 0, 0, 0].tolist() == [0, 40, 80]
    assert data.has("smiling").tolist() == [True, False, True]
    assert data.has("old").tolist() == [True, True, False], "old is the absence of Young"
    assert data.condition("smiling").tolist() == [[0, 1], [1, 0], [0, 1]]
    zipped = tmp_path / "b"
    zipped.mkdir()
    with zipfile.ZipFile(zipped / "img_align_celeba.zip", "w") as archive:
        for path in (folder / "img_align_celeba").iterdir():
            archive.write(path, f"img_align_celeba/{path.name}")
    (zipped / "list_attr_celeba.txt").write_text((folder / "list_attr_celeba.txt").read_text())
    assert torch.equal(faces.CelebA(zipped).load(4).images, data.images)
    assert len(faces.CelebA(folder).load(4, limit=2)) == 2


def test_pictures_are_cut_to_their_central_square(tmp_path):
    folder = write_celeba(tmp_path, rows=((1, 1),))
    picture = np.zeros((20, 12, 3), np.uint8)
    picture[4:16] = 200  # the central 12 x 12
    Image.fromarray(picture).save(folder / "img_align_celeba" / "000001.png")
    assert (faces.CelebA(folder).load(6).images == 200).all()


def test_decoded_pictures_are_kept_until_the_files_change(tmp_path, monkeypatch):
    folder = write_celeba(tmp_path)
    first = faces.CelebA(folder).load(4)
    monkeypatch.setattr(faces.celeba, "decode", lambda *_: pytest.fail("decoded again"))
    assert torch.equal(faces.CelebA(folder).load(4).images, first.images)
    monkeypatch.undo()
    change(folder, 3, "000002.png 1 1")
    change(folder, 4, "000001.png 1 1")
    assert faces.CelebA(folder).load(4).images[:, 0, 0, 0].tolist() == [40, 0, 80]


@pytest.mark.parametrize("line, text, message", [
    (1, "three", "line 1: expected the number of pictures, got 'three'"),
    (1, "4", "line 1 says 4 pictures, but 3 are listed"),
    (2, "Smiling Smiling", "line 2: expected the names of the attributes, each once"),
    (4, "000002.png 1", "line 4: expected a file and 2 values, got 1"),
    (4, "000002.png 1 1 1", "line 4: expected a file and 2 values, got 3"),
    (4, "000002.png 1 0", "line 4: values must be 1 or -1, got '0' for Young"),
    (4, "../000002.png 1 1", "line 4: expected the name of a file"),
    (5, "000001.png 1 1", "lists 000001.png more than once"),
])
def test_a_malformed_line_is_named(tmp_path, line, text, message):
    change(write_celeba(tmp_path), line, text)
    with pytest.raises(faces.CelebAError, match=message):
        faces.CelebA(tmp_path)


def test_missing_and_broken_pictures_are_named(tmp_path):
    write_celeba(tmp_path)
    broken = tmp_path / "img_align_celeba" / "000002.png"
    broken.write_bytes(b"not a picture")
    with pytest.raises(faces.CelebAError, match="000002.png cannot be decoded"):
        faces.CelebA(tmp_path).load(4)
    broken.unlink()
    with pytest.raises(faces.CelebAError, match=r"lacks 000002.png, which list_attr_celeba.txt lists \(line 4\)"):
        faces.CelebA(tmp_path).load(4)
    assert not list(tmp_path.glob("cache*")), "nothing half-decoded is left"


def test_missing_files_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="list_attr_celeba.txt is missing.*ebmfast faces"):
        faces.CelebA(tmp_path)
    write_celeba(tmp_path)
    (tmp_path / "img_align_celeba").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="neither img_align_celeba nor img_align_celeba.zip"):
        faces.CelebA(tmp_path)


def test_an_unknown_concept_raises(tmp_path):
    with pytest.raises(ValueError, match="`concept` must be one of smiling, .* got 'tall'"):
        faces.CelebA(write_celeba(tmp_path)).load(4).has("tall")


@pytest.mark.parametrize("change_of, region", [
    ({"smiling": True}, (36, 50, 20, 44)), ({"glasses": True}, (24, 38, 14, 50)), ({"young": False}, (18, 30, 20, 44)),
    ({"hair": "Blond_Hair"}, (8, 26, 14, 50)), ({"male": True, "beard": True}, (44, 56, 20, 44)),
])
def test_every_attribute_shows_where_it_belongs(change_of, region):
    top, bottom, left, right = region
    difference = np.abs(faces.draw_face(PLAIN).astype(int) - faces.draw_face(replace(PLAIN, **change_of)).astype(int)).sum(2)
    assert difference[top:bottom, left:right].max() > 60
    if set(change_of) == {"smiling"}:
        assert difference[:30].max() == 0


def test_schematic_faces_have_the_official_layout(tmp_path):
    faces.write_faces(tmp_path, count=6, size=64)
    files, attributes, names = read_attributes(tmp_path / "list_attr_celeba.txt")
    assert files[0] == "000001.jpg" and names == faces.ATTRIBUTES and len(names) == 40
    data = faces.CelebA(tmp_path).load(64)
    for i in range(6):
        face = random_face(np.random.default_rng([0, i]))
        assert data.has("smiling")[i] == face.smiling and data.has("beard")[i] == face.beard
        assert data.has("old")[i] == (not face.young) and data.has("black_hair")[i] == (face.hair == "Black_Hair")
        drawn = faces.draw_face(face).transpose(2, 0, 1).astype(int)
        assert np.abs(drawn - data.images[i].numpy()).mean() < 4, "a face and its attributes stand in one line"
    with pytest.raises(FileExistsError, match="choose another folder"):
        faces.write_faces(tmp_path)


def test_importing_the_faces_does_not_import_pillow():
    code = "import sys, ebmfast.faces, ebmfast.cli; sys.exit('PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def train(tmp_path, name, *more):
    out = tmp_path / name
    assert main(["train", name, "--celeba", str(tmp_path / "celeba"), "--quiet", "--pictures-every", "0", "--device", "cpu",
                 "--out", str(out), *more]) == 0
    return out


def test_faces_go_from_files_to_a_nested_figure(tmp_path, capsys):
    """Files, reader, contrastive divergence on ResNet128 (narrow), cards, composition, picture."""
    assert main(["faces", "draw", str(tmp_path / "celeba"), "--count", "12", "--size", "64"]) == 0
    assert main(["faces", "check", str(tmp_path / "celeba"), "--resolution", "64"]) == 0
    assert "12 of 12 pictures decoded at 64x64" in capsys.readouterr().out
    options = ("--resolution", "64", "--method", "contrastive", "--network", "resnet128", "--width", "4", "--steps", "2",
               "--iterations", "2", "--batch", "2")
    folders = [train(tmp_path, name, *options) for name in ("smiling", "male", "old")]
    picture = tmp_path / "nested.png"
    assert main(["faces", "figure", *map(str, folders), "--n", "2", "--steps", "2", "--out", str(picture)]) == 0
    with Image.open(picture) as image:
        rows = image.text["expressions"].splitlines()
        assert rows == [text for text in NESTED if concepts_of(text) <= {"smiling", "male", "old"}] and len(rows) == 6
    models = load(folders)
    card = models["smiling"][1]
    assert card["architecture"] == {"class": "ebmfast.models.ResNet128",
                                    "arguments": {"condition_dim": 2, "width": 4, "spectral": False}}
    assert card["command"].startswith("ebmfast train smiling") and "--network resnet128 --width 4" in card["command"]
    rows = compose(models, ["smiling('smiling') & male('male')"], n=2, steps=3)
    assert next(iter(rows.values())).shape == (2, 3, 64, 64)


def test_score_matched_faces_train_too(tmp_path):
    faces.write_faces(tmp_path / "celeba", count=12, size=64)
    out = train(tmp_path, "smiling", "--resolution", "64", "--iterations", "1", "--batch", "2")
    _, card = load([out])["smiling"]
    assert card["shape"] == [3, 64, 64] and list(card["labels"]) == ["not_smiling", "smiling"]


def test_every_default_row_is_over_known_concepts():
    for text in NESTED:
        assert concepts_of(text) <= set(FACES)
    assert {"smiling", "male", "old", "wavy_hair", "black_hair", "attractive"} <= set().union(*map(concepts_of, NESTED))


def test_nobody_s_pictures_are_drawn_over(tmp_path):
    folder = tmp_path / "img_align_celeba"
    folder.mkdir()
    (folder / "000001.jpg").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="choose another folder"):
        write_faces(tmp_path, count=1)
    assert (folder / "000001.jpg").read_bytes() == b"mine"
    with pytest.raises(ValueError, match="`count` must be 1 or more"):
        write_faces(tmp_path / "other", count=0)
