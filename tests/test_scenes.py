import importlib.util
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ebmfast import scenes
from ebmfast.cli import main
from ebmfast.scenes import dataset
from ebmfast.scenes.cli import parse_config
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


@pytest.mark.parametrize("change", [
    {"count": 12}, {"resolution": 16}, {"samples": 9}, {"seed": 4}, {"empty_fraction": 0.6}, {"light_jitter": 0.1},
    {"color_jitter": 0.1}, {"held_out": (("cube", "red"),)}, {"shapes": ("cube",)}, {"colors": ("red",)}, {"palette": 20},
    {"size_range": (0.3, 0.4)}, {"objects": (0.5, 0.5)}, {"variation": "size"}, {"camera_jitter": 0.1}, {"tint_jitter": 0.1},
], ids=lambda change: next(iter(change)))
def test_every_field_enters_the_digest(change):
    assert {f for f in scenes.SceneConfig.__dataclass_fields__ if f in change}
    assert replace(SMALL, **change).digest() != SMALL.digest()


def test_data_sets_made_before_an_option_existed_keep_their_digest():
    assert scenes.TRAIN.digest() == "a4bfbd68fad2" and scenes.folder_of(scenes.TRAIN).name == "scenes-a4bfbd68fad2"


@pytest.mark.parametrize("field, value, message", [
    ("palette", 7, "`palette` must be 6 or 20 colours, got 7"), ("shapes", ("cone",), "`shapes` must be among .* got 'cone'"),
    ("colors", ("orange",), "`colors` must be among red, .* got 'orange'"),
    ("variation", "age", "`variation` must be one of color, light, size, type or None, got 'age'"),
    ("held_out", tuple((s, c) for s in scenes.SHAPES for c in scenes.COLORS), "`held_out` leaves no pair"),
])
def test_wrong_configurations_raise(field, value, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **{field: value})


def shown_pairs(config, count=400):
    labels = [dataset.draw_scene(config, i)[1] for i in range(count)]
    names = list(config.known_colors)
    pairs = zip(np.concatenate([np.atleast_1d(label["shape"]) for label in labels]),
                np.concatenate([np.atleast_1d(label["color"]) for label in labels]))
    return {(scenes.SHAPES[s], names[c]) for s, c in pairs if s >= 0}


def test_a_fifth_of_the_pairs_is_absent_from_every_training_set():
    every = {(s, c) for s in scenes.SHAPES for c in scenes.COLORS}
    held_out = set(scenes.HELD_OUT)
    assert 0.18 <= len(held_out) / len(every) <= 0.23
    for name in ("pairs", "objects", "colors"):
        assert shown_pairs(scenes.named(name)) == every - held_out, name
    for name in ("purple-cubes", "purple-shapes"):
        assert not shown_pairs(scenes.named(name)) & held_out, name
    for name in ("train", "test", "objects-judge"):  # a judge has to know all pairs
        assert shown_pairs(scenes.named(name)) == every, name


def test_continual_sets_add_one_concept_each():
    assert shown_pairs(scenes.named("purple-cubes"), 60) == {("cube", "purple")}
    assert shown_pairs(scenes.named("purple-shapes"), 60) == {(s, "purple") for s in scenes.SHAPES}


def test_objects_do_not_touch_and_come_in_their_shares():
    config = replace(scenes.OBJECTS, empty_fraction=0.1)
    counts = []
    for i in range(500):
        scene, labels = dataset.draw_scene(config, i)
        count = int((labels["shape"] >= 0).sum())
        assert len(scene.things) == count and (labels["shape"][count:] == -1).all()
        for thing, place, size in zip(scene.things, labels["position"], labels["size"]):
            assert thing.position == tuple(place) and thing.size == size and 0.3 <= size <= 0.42
        for a in range(count):
            for b in range(a):
                gap = 1.2 * np.linalg.norm(labels["position"][a] - labels["position"][b])
                assert gap > 1.2 * (labels["size"][a] + labels["size"][b])
        counts.append(count)
    shares = np.bincount(counts, minlength=4) / 500
    for share, wanted in zip(shares, (0.1, 0.45, 0.315, 0.135)):
        assert abs(share - wanted) < 5 * (wanted * (1 - wanted) / 500) ** 0.5


def test_one_object_is_picked_at_random():
    n = 3000
    shape = torch.tensor([[0, 1, 2], [0, 1, -1], [0, -1, -1], [-1, -1, -1]]).repeat(n // 4, 1)
    position = torch.arange(3.0)[None, :, None].expand(n, 3, 2)
    data = scenes.ObjectsData(torch.zeros(n, 3, 2, 2, dtype=torch.uint8), position, torch.rand(n, 3), shape, shape.clamp_min(0))
    assert data.count[:4].tolist() == [3, 2, 1, 0] and len(data.with_object()) == n * 3 // 4
    picked = data.pick(seed=1)
    assert torch.equal(picked.shape[2::4], torch.zeros(n // 4).long()) and (picked.shape[3::4] == -1).all()
    for row, count in ((0, 3), (1, 2)):
        share = torch.bincount(picked.shape[row::4], minlength=3)[:count] / (n // 4)
        assert (share - 1 / count).abs().max() < 5 * (0.25 / (n // 4)) ** 0.5
        assert torch.equal(picked.position[row::4, 0].long(), picked.shape[row::4])
    assert not torch.equal(picked.shape, data.pick(seed=2).shape) and torch.equal(picked.shape, data.pick(seed=1).shape)


@pytest.mark.parametrize("kind", dataset.VARIATIONS)
def test_a_variation_leaves_the_range_of_training_and_nothing_else(kind):
    base = replace(scenes.TRAIN, seed=30, empty_fraction=0.0)
    for i in range(20):
        plain, label = dataset.draw_scene(base, i)
        varied, same = dataset.draw_scene(replace(base, variation=kind), i)
        assert (same["position"] == label["position"]) and varied.position == plain.position
        changed = {f for f in ("shape", "color", "size", "light") if getattr(plain, f) != getattr(varied, f)}
        assert changed == {"type": {"shape"}}.get(kind, {kind})
        assert varied.shape not in scenes.SHAPES or kind != "type"
        assert not 0.4 <= varied.size <= 0.7 or kind != "size"
        assert varied.light[0] > 0 or kind != "light"


def test_larger_pictures_have_more_colours_and_moving_cameras():
    config = scenes.named("pairs", 64)
    assert config.resolution == 64 and len(config.known_colors) == 20 and config.held_out == scenes.HELD_OUT
    drawn = [dataset.draw_scene(config, i)[0] for i in range(40)]
    assert len({s.camera_height for s in drawn}) == 40 and len({s.tint for s in drawn}) == 40
    data = scenes.SceneData(*(torch.zeros(1, dtype=torch.long) for _ in range(4)), torch.tensor([19]), n_colors=20)
    assert data.condition("color").shape == (1, 20)
    assert scenes.named("pairs", 16) == replace(scenes.named("pairs"), resolution=16)


def test_unknown_sets_and_fields_raise():
    with pytest.raises(ValueError, match="no data set named 'moon'; there are train, test"):
        scenes.named("moon")
    with pytest.raises(ValueError, match="has no field 'moons'"):
        parse_config('{"moons": 2}')


def test_a_set_is_rendered_again_by_the_command_it_names():
    for name in ("pairs", "objects", "vary-size"):
        for resolution in (32, 64):
            assert scenes.command_of(scenes.named(name, resolution), "data") == (
                f"ebmfast scenes {name} --root data" + (" --resolution 64" if resolution == 64 else ""))
    assert scenes.command_of(replace(scenes.TRAIN, seed=9), "d") == "ebmfast scenes train --root d --seed 9"
    own = replace(SMALL, held_out=(("cube", "red"),))
    text = scenes.command_of(own, "d").split("--config ")[1].strip("'")
    assert parse_config(text) == own


def test_load_joins_the_parts_and_needs_all_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "PART", 4)
    folder = scenes.folder_of(SMALL, tmp_path)
    first = write_part(folder, 0, 4, seed=0)
    with pytest.raises(FileNotFoundError, match="lacks 1 parts.*ebmfast scenes --root .* --config '{.*\"count\": 6"):
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
    joint = data.condition("joint")
    assert joint.shape == (2, 12) and joint[0].tolist() == pytest.approx([1, 0, 0, 0, 0, 0, 0, 0, 1, 0.1, 0.2, 0.4])
    with pytest.raises(ValueError, match="position, size, shape, color or joint, got 'age'"):
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


@needs_mitsuba
def test_several_objects_are_rendered_and_read_back(tmp_path, monkeypatch, capsys):
    config = replace(SMALL, objects=(0.0, 0.0, 1.0), empty_fraction=0.0, size_range=(0.3, 0.4), count=2, resolution=16, samples=9)
    folder = scenes.folder_of(config, tmp_path)
    folder.mkdir(parents=True)
    dataset._render_part(config, folder, 0)
    data = scenes.load(config, tmp_path)
    assert isinstance(data, scenes.ObjectsData) and data.count.tolist() == [3, 3] and data.position.shape == (2, 3, 2)
    scene, _ = dataset.draw_scene(config, 0)
    fewer = scenes.render(replace(scene, others=scene.others[:2]), 16, 9, seed=0).astype(int)
    assert np.abs(fewer - data.images[0].numpy()).max() > 40
    assert main(["scenes", "--config", json.dumps({"count": 2, "resolution": 16, "samples": 9, "seed": 3, "empty_fraction": 0.0,
                                                   "objects": [0, 0, 1], "size_range": [0.3, 0.4]}),
                 "--root", str(tmp_path), "--quiet"]) == 0
    assert capsys.readouterr().out.strip() == str(folder), "the command finds what is there"


@needs_mitsuba
@pytest.mark.parametrize("change", [
    {"shape": "slab"}, {"shape": "capsule"}, {"shape": "snowman"}, {"tint": (0.5, 1.0, 1.0)}, {"floor_tint": (1.0, 1.0, 0.5)},
    {"camera_height": 4.9}, {"light": (3.0, -3.0, 6.7)},
], ids=lambda change: "-".join(map(str, change.values())))
def test_what_a_scene_says_is_seen(change):
    scene = scenes.Scene("cube", scenes.COLORS["blue"], (0.0, 0.0), 0.6)
    plain, changed = (scenes.render(s, 16, 4, seed=1).astype(int) for s in (scene, replace(scene, **change)))
    assert np.abs(plain - changed).max() > 20
