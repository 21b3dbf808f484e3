import importlib.util
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ebmfast import scenes
from ebmfast.scenes import dataset
from ebmfast.scenes.render import load_mitsuba, to_srgb

HAS_MITSUBA = importlib.util.find_spec("mitsuba") is not None
needs_mitsuba = pytest.mark.skipif(not HAS_MITSUBA, reason="pip install 'ebmfast[scenes]'")
SMALL = scenes.SceneConfig(count=6, resolution=8, samples=4, seed=3, empty_fraction=0.3)


def write_part(folder, part, count, seed):
    g = torch.Generator().manual_seed(seed)
    tensors = {
        "images": torch.randint(0, 256, (count, 3, 8, 8), generator=g, dtype=torch.uint8),
        "position": torch.rand(count, 2, generator=g), "size": torch.rand(count, generator=g),
        "shape": torch.randint(-1, 3, (count,), generator=g), "color": torch.randint(0, 6, (count,), generator=g),
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(dataset._part_path(folder, part)))
    return tensors


def test_importing_the_scenes_does_not_import_the_renderer():
    code = "import sys, ebmfast.scenes; sys.exit('mitsuba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_missing_renderer_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "mitsuba", None)
    with pytest.raises(ImportError, match=r"pip install 'ebmfast\[scenes\]'"):
        load_mitsuba()


def test_scenes_are_a_function_of_config_and_index():
    a, b = dataset.draw_scene(SMALL, 4), dataset.draw_scene(SMALL, 4)
    assert a == b
    assert a != dataset.draw_scene(SMALL, 5)
    assert a != dataset.draw_scene(replace(SMALL, seed=4), 4)


def test_labels_cover_their_ranges():
    drawn = [dataset.draw_scene(scenes.TRAIN, i) for i in range(600)]
    labels = [label for _, label in drawn]
    assert {label["shape"] for label in labels} == {-1, 0, 1, 2}
    assert {label["color"] for label in labels} == {-1, *range(6)}
    sizes, places = np.array([d["size"] for d in labels]), np.array([d["position"] for d in labels])
    assert 0.4 <= sizes.min() < 0.41 and 0.69 < sizes.max() <= 0.7
    assert -1 <= places.min() < -0.98 and 0.98 < places.max() <= 1
    empty = sum(scene.shape is None for scene, _ in drawn) / 600
    assert abs(empty - 0.05) < 5 * (0.05 * 0.95 / 600) ** 0.5


@pytest.mark.parametrize("field", ["count", "resolution", "samples", "seed", "empty_fraction", "light_jitter"])
def test_every_field_enters_the_digest(field):
    changed = replace(SMALL, **{field: getattr(SMALL, field) * 2})
    assert changed.digest() != SMALL.digest()


def test_load_joins_the_parts_and_needs_all_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "PART", 4)
    folder = scenes.folder_of(SMALL, tmp_path)
    first = write_part(folder, 0, 4, seed=0)
    with pytest.raises(FileNotFoundError, match="lacks 1 parts.*--count 6 --resolution 8 --seed 3"):
        scenes.load(SMALL, tmp_path)
    second = write_part(folder, 1, 2, seed=1)
    data = scenes.load(SMALL, tmp_path)
    assert len(data) == 6
    assert torch.equal(data.images, torch.cat([first["images"], second["images"]]))
    assert torch.equal(data.pixels(), data.images.float() / 127.5 - 1)
    assert (data.with_object().shape >= 0).all()


def test_conditions_have_the_form_the_models_take():
    shape, color = torch.tensor([0, 2]), torch.tensor([5, 1])
    position, size = torch.tensor([[0.1, 0.2], [0.3, -0.4]]), torch.tensor([0.4, 0.6])
    data = scenes.SceneData(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), position, size, shape, color)
    assert data.condition("shape").tolist() == [[1, 0, 0], [0, 0, 1]]
    assert data.condition("color").argmax(1).tolist() == [5, 1]
    assert torch.equal(data.condition("position"), position)
    assert torch.equal(data.condition("size"), size[:, None])
    with pytest.raises(ValueError, match="position, size, shape or color, got 'age'"):
        data.condition("age")


def test_srgb_known_values():
    assert to_srgb(np.array([-1.0, 0.0, 0.0031308, 0.18, 1.0, 7.0])).tolist() == [0, 0, 10, 118, 255, 255]


@needs_mitsuba
def test_renders_repeat_and_show_the_object():
    scene = scenes.Scene("sphere", scenes.COLORS["red"], (0.0, 0.0), 0.7)
    a, b = scenes.render(scene, 16, 4, seed=1), scenes.render(scene, 16, 4, seed=1)
    assert a.dtype == np.uint8 and a.shape == (3, 16, 16)
    assert (a == b).all()
    middle = a[:, 7, 8].astype(int)
    assert middle[0] > middle[1] + 50 and middle[0] > middle[2] + 50
    floor = scenes.render(replace(scene, shape=None), 16, 4, seed=1).astype(int)
    assert np.ptp(floor, axis=0).max() <= 2


@needs_mitsuba
def test_an_unknown_shape_raises():
    with pytest.raises(ValueError, match="`shape` must be one of .* got 'cone'"):
        scenes.render(scenes.Scene("cone", (1, 0, 0), (0, 0), 0.5), 8, 4)


@needs_mitsuba
def test_generation_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "PART", 3)
    folder = scenes.folder_of(SMALL, tmp_path)
    folder.mkdir(parents=True)
    dataset._render_part(SMALL, folder, 0)
    whole = dataset._part_path(folder, 0)
    before = whole.stat().st_mtime_ns
    assert dataset._missing(SMALL, folder) == [1]
    dataset._render_part(SMALL, folder, 1)
    data = scenes.load(SMALL, tmp_path)
    assert whole.stat().st_mtime_ns == before and len(data) == 6
    scene, label = dataset.draw_scene(SMALL, 4)
    assert (data.images[4].numpy() == scenes.render(scene, 8, 4, seed=4)).all()
    assert int(data.shape[4]) == label["shape"]
    assert scenes.generate(SMALL, tmp_path) == folder
