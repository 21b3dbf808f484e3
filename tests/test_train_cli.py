"""`ebmfast train` on small data sets that the tests write: what it learns from, what it builds on, what it leaves behind."""
import sys
from dataclasses import replace

import pytest
import torch
from models import NoisedGaussian
from safetensors.torch import save_file

import ebmfast as ef
from ebmfast import scenes, zoo
from ebmfast.cli import main
from ebmfast.models import NoiseConditionalEnergy, ViewedEnergy
from ebmfast.scenes import dataset, sets
from ebmfast.training import ContrastiveConfig, TrainConfig, Trainer, ratio_gradient, score_error
from ebmfast.training.card import contrastive_schedule
from ebmfast.training.concepts import RECIPES

COUNT = 12


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """All sets, shrunk to a few pictures of noise with labels that each set allows; some at 64 pixels too."""
    g = torch.Generator().manual_seed(0)
    for name, known in sets.SETS.items():
        config = replace(known, count=COUNT)
        monkeypatch.setitem(sets.SETS, name, config)
        write_set(config, tmp_path, g)
        if name in ("pairs", "pairs-test"):
            write_set(sets.at_resolution(config, 64), tmp_path, g)
    return tmp_path


def write_set(config, root, g):
    several = (len(config.objects),) if config.objects else ()
    pairs = [(scenes.SHAPES.index(s), list(config.known_colors).index(c)) for s, c in config.pairs]
    chosen = torch.tensor(pairs)[torch.randint(len(pairs), (COUNT, *several), generator=g)]
    size = (config.resolution, config.resolution)
    tensors = {
        "images": torch.randint(0, 256, (COUNT, 3, *size), generator=g, dtype=torch.uint8),
        "position": torch.rand(COUNT, *several, 2, generator=g), "size": 0.4 + 0.3 * torch.rand(COUNT, *several, generator=g),
        "shape": chosen[..., 0].contiguous(), "color": chosen[..., 1].contiguous(),
    }
    if several:
        absent = torch.arange(len(config.objects)) > torch.randint(3, (COUNT, 1), generator=g)
        for label in ("shape", "color"):
            tensors[label][absent] = -1
    folder = scenes.folder_of(config, root)
    folder.mkdir(parents=True)
    save_file(tensors, str(dataset._part_path(folder, 0)))


def train(data, out, name, *options, iterations=2):
    assert main(["train", name, "--data", str(data), "--out", str(out), "--iterations", str(iterations), "--batch", "4", "--device",
                 "cpu", "--no-bf16", "--quiet", "--pictures-every", "0", *options]) == 0
    return zoo.card_from(out, RECIPES[name].concept)


@pytest.mark.parametrize("name", ["color", "objects", "joint"])
def test_a_trained_model_is_described_by_its_card(data, tmp_path, name):
    card = train(data, tmp_path / "out", name)
    concept = RECIPES[name].concept
    family = zoo.family(card, zoo.load_from(tmp_path / "out", concept))
    condition = torch.tensor([[(low + high) / 2 for low, high in card["ranges"]] or [0.0] * card["condition_dim"]])
    assert family(condition[0].tolist()).energy(torch.zeros(1, 3, 32, 32), sigma=1.0).isfinite().all()
    assert card["name"] == concept and card["shape"] == [3, 32, 32] and card["method"] == "score matching" and card["hybrid"]
    assert card["held_out"] == [list(pair) for pair in scenes.HELD_OUT]
    assert card["command"] == f"ebmfast train {name} --seed 0 --iterations 2 --batch 4 --no-bf16"
    assert f"ebmfast scenes {RECIPES[name].data} --root data" in card["data"]
    assert (tmp_path / "out" / f"{name}.run" / "checkpoint.safetensors").exists()


@pytest.mark.parametrize("name, dim", [("color", 20), ("joint", 26)])
def test_64_pixels_bring_20_colours_and_a_larger_network(data, tmp_path, name, dim):
    card = train(data, tmp_path / "out", name, "--resolution", "64", iterations=1)
    assert card["shape"] == [3, 64, 64] and card["condition_dim"] == dim and "--resolution 64" in card["command"]
    model = zoo.load_from(tmp_path / "out", name)
    assert 1.2e6 < sum(p.numel() for p in model.parameters()) < 1.6e6
    if name == "joint":
        assert model.place == 23 and model.center.tolist() == [0.0] * 25 + [pytest.approx(0.55)]


def test_without_cross_entropy_a_model_is_not_called_hybrid(data, tmp_path):
    assert not train(data, tmp_path / "out", "color", "--contrast", "0")["hybrid"]


def test_stages_build_on_each_other(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(zoo, "folder", lambda group=None: tmp_path / "nothing bundled")
    out = tmp_path / "continual"
    options = ("--frozen", str(out))
    assert main(["train", "stage_shape", "--data", str(data), "--out", str(out), "--quiet", *options]) == 2
    assert "stage_shape builds on position.json, trained earlier" in capsys.readouterr().err
    for name in ("stage_position", "stage_shape", "stage_color"):
        card = train(data, out, name, *options)
        assert card["frozen"] == list(RECIPES[name].frozen)
    assert sorted(p.stem for p in out.glob("*.json")) == ["color", "position", "shape"]
    before = (out / "position.safetensors").read_bytes()
    train(data, tmp_path / "again", "stage_color", *options)
    assert (out / "position.safetensors").read_bytes() == before, "frozen models are read, never written"


def test_a_ratio_is_trained_over_the_prior_of_another_model(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(zoo, "folder", lambda group=None: tmp_path / "nothing bundled")
    out = tmp_path / "pairs"
    options = ("--frozen", str(out))
    assert main(["train", "coarse_color", "--data", str(data), "--out", str(out), "--quiet", *options]) == 2
    assert "coarse_color builds on shape.json, trained earlier" in capsys.readouterr().err
    train(data, out, "shape")
    card = train(data, out, "coarse_color", *options, iterations=3)
    assert card["name"] == "color" and card["architecture"]["arguments"]["view"] == "coarse"
    shape, color = (zoo.load_from(out, name).state_dict() for name in ("shape", "color"))
    prior = {k: v for k, v in color.items() if k.startswith("prior.")}
    assert prior and all(torch.equal(v, shape[k]) for k, v in prior.items())
    train(data, tmp_path / "other", "coarse_color", *options, "--seed", "1", iterations=3)
    other = zoo.load_from(tmp_path / "other", "color").state_dict()
    assert any(not torch.equal(v, other[k]) for k, v in color.items() if k.startswith("seen.")), "the ratio is trained"
    (tmp_path / "plain").mkdir()
    train(data, tmp_path / "plain", "color")
    for suffix in ("json", "safetensors"):
        (tmp_path / "plain" / f"color.{suffix}").rename(tmp_path / "plain" / f"shape.{suffix}")
    arguments = ["train", "coarse_color", "--data", str(data), "--out", str(tmp_path / "third"), "--quiet", "--frozen"]
    assert main([*arguments, str(tmp_path / "plain")]) == 2
    assert "has no view" in capsys.readouterr().err


def test_a_run_goes_on_only_when_asked(data, tmp_path, capsys):
    arguments = ["train", "color", "--data", str(data), "--out", str(tmp_path / "o"), "--iterations", "2", "--batch", "4",
                 "--quiet"]
    assert main(arguments) == 0
    assert main(arguments) == 2
    assert "pass --resume" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0
    assert "resumed at iteration 2" in capsys.readouterr().out


def test_missing_data_names_the_command(tmp_path, capsys):
    assert main(["train", "objects", "--data", str(tmp_path), "--quiet"]) == 2
    assert "ebmfast scenes objects --root" in capsys.readouterr().err


def test_contrastive_divergence_starts_from_a_score_matched_model(data, tmp_path):
    train(data, tmp_path / "score", "color")
    options = {"method": "contrastive", "start-from": tmp_path / "score", "level": 0.4, "steps": 2, "drift": 0.01, "noise": 0.1,
               "squares": 0, "max-gap": 1e9, "learning-rate": 1e-9}
    card = train(data, tmp_path / "cd", "color", *(f"--{k}={v}" for k, v in options.items()))
    assert card["method"] == "contrastive divergence, started from a score-matched network"
    assert card["schedule"]["step"] == 0.01 and card["schedule"]["steps"] == 10
    assert card["data_range"] == [0, 1] and card["sigma"] is None
    start, end = zoo.load_from(tmp_path / "score", "color"), zoo.load_from(tmp_path / "cd", "color")
    x, c = torch.rand(2, 3, 32, 32), torch.eye(6)[:2]
    torch.testing.assert_close(end(x, c), start(2 * x - 1, c, torch.full((2,), 0.4)), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("name", ["color", "shape"])
def test_score_matching_starts_from_weights_where_asked(data, tmp_path, name):
    first = train(data, tmp_path / "first", name)
    card = train(data, tmp_path / "more", name, "--start-from", str(tmp_path / "first"), "--learning-rate", "1e-9")
    assert card["architecture"] == first["architecture"] and f"--start-from {tmp_path / 'first'}" in card["command"]
    one, two = (zoo.load_from(tmp_path / folder, name) for folder in ("first", "more"))
    x, c = torch.rand(2, 3, 32, 32), torch.eye(len(first["labels"]))[:2]
    torch.testing.assert_close(two(x, c), one(x, c), rtol=1e-4, atol=1e-2)


def test_contrastive_divergence_starts_from_a_viewed_model(data, tmp_path):
    train(data, tmp_path / "score", "shape")
    options = {"method": "contrastive", "start-from": tmp_path / "score", "steps": 2, "squares": 0, "max-gap": 1e9}
    card = train(data, tmp_path / "cd", "shape", *(f"--{k}={v}" for k, v in options.items()))
    assert card["architecture"]["arguments"]["view"] == "luminance"
    assert zoo.load_from(tmp_path / "cd", "shape").network.ratio(torch.rand(1, 3, 32, 32), torch.eye(3)[:1]).shape == (1,)


def test_a_frozen_ratio_is_the_difference_of_two_energies():
    torch.manual_seed(0)
    model = ViewedEnergy(2, prior={"widths": (8, 8, 8)}, widths=(8, 8, 8))
    x, c, sigma, keep = torch.rand(3, 3, 16, 16), torch.rand(3, 2), torch.tensor([0.1, 0.5, 2.0]), torch.tensor([1.0, 0.0, 1.0])
    found = ratio_gradient(model, x, sigma, c, keep)
    x.requires_grad_(True)
    (wanted,) = torch.autograd.grad((model(x, c, sigma, keep) - model(x, None, sigma)).sum(), x)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_a_smoothed_models_last_step_takes_the_noise_away():
    """N(c, s²) under noise: the last step is the posterior mean given a noised picture, whatever the chain before it did."""
    plain = contrastive_schedule(ContrastiveConfig(steps=8))
    assert plain["steps"] == 40 and plain["step"] == 100.0 and plain["noise"] == 0.001
    smooth, std = 0.3, 0.2
    schedule = contrastive_schedule(ContrastiveConfig(steps=8, drift=0.02, noise=0.1, smoothing=smooth))
    assert schedule["steps"] == len(schedule["step"]) == len(schedule["noise"]) == 41
    energy = ef.Concept(lambda x: 0.5 * (x - 0.5).square().sum(1) / (std**2 + smooth**2), name="smoothed")
    x = torch.rand(6, 4)
    last = ef.Langevin.reference_code(schedule["step"][-1:], schedule["noise"][-1:])
    mean = (x * std**2 + 0.5 * smooth**2) / (std**2 + smooth**2)
    torch.testing.assert_close(ef.sample(energy, x=x, sampler=last, steps=1, seed=0).x, mean)
    whole = ef.Langevin.reference_code(schedule["step"], schedule["noise"])
    assert ef.sample(energy, x=x, sampler=whole, steps=41, seed=0).x.std() < smooth


def test_grids_of_samples_are_written_while_it_trains(data, tmp_path):
    image = pytest.importorskip("PIL.Image")
    train(data, tmp_path / "o", "color", "--pictures-every", "2")
    with image.open(tmp_path / "o" / "color.run" / "samples-000002.png") as picture:
        assert picture.size == (8 * 32 * 3, 32 * 3), "twelve pictures: one full row of eight"


def test_logging_for_tensorboard_names_its_extra(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main(["train", "color", "--data", str(data), "--out", str(tmp_path / "o"), "--tensorboard", "--quiet"]) == 2
    assert "pip install 'ebmfast[tensorboard]'" in capsys.readouterr().err


class Kept(NoisedGaussian):
    """N(c, s²) under noise, or N(0, 4) under noise in rows that are not kept."""

    def forward(self, x, condition, sigma, keep):
        free = 0.5 * x.square().sum((1, 2, 3)) / (4.0 + sigma**2)
        bound = 0.5 * (x - condition[:, :, None, None]).square().sum((1, 2, 3)) / (self.variance + sigma**2)
        return keep * bound + (1 - keep) * free


def test_the_ratio_of_a_frozen_model_has_its_closed_form():
    g = torch.Generator().manual_seed(0)
    x, c, sigma = torch.randn(4, 3, 2, 2, generator=g), torch.randn(4, 3, generator=g), torch.rand(4, generator=g) + 0.1
    keep = torch.tensor([1.0, 0.0, 1.0, 1.0])
    level = sigma[:, None, None, None]
    wanted = (x - c[:, :, None, None]) / (0.25 + level**2) - x / (4 + level**2)
    torch.testing.assert_close(ratio_gradient(Kept(0.5), x, sigma, c, keep), wanted * keep[:, None, None, None])


def test_score_matching_with_frozen_models_matches_the_sum():
    """Where E_new plus the frozen ratio is the exact energy, the error is that of the exact energy; without the ratio it is not."""
    g = torch.Generator().manual_seed(1)
    x, c, n = torch.randn(200, 3, 2, 2, generator=g), torch.zeros(200, 3), torch.randn(200, 3, 2, 2, generator=g)
    sigma, keep = torch.full((200,), 0.7), torch.ones(200)
    level, data = 0.7, 0.5 * x  # N(0, 0.25)
    noised = data + level * n
    old = ratio_gradient(Kept(1.0), noised, sigma, c, keep)

    def new(x, condition, sigma, keep):  # exact N(0, 0.25) minus the ratio of the frozen model
        s = sigma**2
        return 0.5 * x.square().sum((1, 2, 3)) * (1 / (0.25 + s) - 1 / (1 + s) + 1 / (4 + s))

    exact = score_error(Kept(0.5), noised.clone(), n, sigma, c, keep, 0.5, False)
    with_old = score_error(new, noised.clone(), n, sigma, c, keep, 0.5, False, old)
    alone = score_error(new, noised.clone(), n, sigma, c, keep, 0.5, False)
    torch.testing.assert_close(with_old, exact, rtol=1e-4, atol=1e-5)
    assert (alone - exact).mean() > 0.05
    assert abs(exact.mean().item() - 1.0) < 5 * (2 / (200 * 12)) ** 0.5


def test_one_of_several_conditions_is_drawn_for_each_picture(tmp_path):
    images = torch.zeros(40, 3, 16, 16, dtype=torch.uint8)
    conditions = torch.arange(3.0)[None, :, None].expand(40, 3, 1) + 10 * torch.arange(40.0)[:, None, None]
    counts = torch.arange(40) % 3 + 1
    torch.manual_seed(0)
    model = NoiseConditionalEnergy(1, widths=(8, 8, 8), depths=(1, 1, 1), embedding=8, heads=4)
    trainer = Trainer(model, images, conditions, TrainConfig(iterations=9, batch=40, contrast_weight=0.0), tmp_path, counts)
    seen = []
    for _ in range(60):
        _, drawn = trainer._batch(torch.arange(40))
        trainer.iteration += 1
        seen.append(drawn[:, 0] - 10 * torch.arange(40.0))
    seen = torch.stack(seen)
    assert (seen < counts).all() and trainer._pool.shape == (int(counts.sum()), 1)
    for count in (2, 3):
        share = torch.stack([(seen[:, counts == count] == k).float().mean() for k in range(count)])
        assert (share - 1 / count).abs().max() < 0.08
