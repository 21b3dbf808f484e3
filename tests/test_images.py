import pytest
import torch

from ebmfast import evaluation, images

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


def test_a_heat_map_runs_from_dark_to_bright():
    picture = images.heat_map(torch.tensor([[0.0, 0.5], [1.0, float("-inf")]]))
    assert picture.shape == (3, 2, 2) and picture.min() >= 0 and picture.max() <= 1
    brightness = picture.sum(0)
    assert brightness[0, 0] < brightness[0, 1] < brightness[1, 0] and torch.equal(picture[:, 1, 1], picture[:, 0, 0])
    torch.testing.assert_close(picture[:, 1, 0], torch.tensor([253, 231, 37]) / 255)
    assert torch.equal(images.heat_map(torch.tensor([[2.0]]), low=0.0, high=1.0)[:, 0, 0], picture[:, 1, 0])


def test_pictures_are_read_back_at_the_size_that_is_wanted(tmp_path):
    x = torch.rand(1, 3, 4, 6) * 2 - 1
    images.save(images.grid([x], data_range=(-1, 1), scale=1, gap=0), tmp_path / "p.png", {})
    torch.testing.assert_close(images.read(tmp_path / "p.png", (6, 4), (-1, 1)), x[0], rtol=0, atol=1.01 / 255)
    with pytest.raises(ValueError, match="must be 4x4 pixels, as the models' data are, got 6x4"):
        images.read(tmp_path / "p.png", (4, 4), (-1, 1))


def test_samples_are_saved_in_whole_rows(tmp_path):
    evaluation.save_grid(torch.zeros(7, 3, 4, 4), tmp_path / "g.png", columns=3, scale=2)
    with Image.open(tmp_path / "g.png") as read:
        assert read.size == (3 * 8, 2 * 8)
    evaluation.save_grid(torch.zeros(2, 3, 4, 4), tmp_path / "few.png", columns=3, scale=1)
    with Image.open(tmp_path / "few.png") as read:
        assert read.size == (2 * 4, 4)
