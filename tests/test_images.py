import pytest
import torch

from ebmfast import images

Image = pytest.importorskip("PIL.Image")


def test_bytes_follow_the_data_range():
    x = torch.tensor([-1.0, 0.0, 1.0, 7.0]).reshape(1, 1, 1, 4)
    assert images.to_bytes(x, (-1, 1))[0, 0, :, 0].tolist() == [0, 128, 255, 255]
    with pytest.raises(ValueError, match=r"images \[n, 3, H, W\]"):
        images.to_bytes(torch.zeros(3, 2, 2), (0, 1))


def test_a_grid_shows_every_image_in_its_place(tmp_path):
    rows = [torch.rand(3, 3, 4, 4), torch.rand(2, 3, 4, 4)]
    picture = images.grid(rows, scale=2, gap=1)
    assert picture.size == (3 * 9 + 1, 2 * 9 + 1)
    expected = images.to_bytes(rows[1], (0, 1))[1, 2, 3].tolist()
    assert list(picture.getpixel((1 + 9 + 2 * 3, 1 + 9 + 2 * 2))) == expected
    images.save(picture, tmp_path / "new" / "g.png", {"expression": "a & ~b", "ünicode": "≤"})
    with Image.open(tmp_path / "new" / "g.png") as read:
        assert read.text["expression"] == "a & ~b" and read.text["ünicode"] == "≤"
    assert images.grid(rows, ["one", "two"]).size[1] > images.grid(rows).size[1]
