import json
import math
from dataclasses import replace

import pytest
import torch

from ebmfast.models import NoiseConditionalEnergy, network_class
from ebmfast.training import (
    DivergenceError,
    NoiseLevels,
    TrainConfig,
    Trainer,
    contrast,
    draw_candidates,
    score_error,
    validation_error,
)
from ebmfast.training.concepts import RECIPES, camera_homography

CONFIG = TrainConfig(
    iterations=40, batch=8, warmup=5, learning_rate=3e-3, ema=0.9, labels=True, contrast_start=0.2, contrast_rows=4,
    checkpoint_every=10, log_every=10)


def made_data(count=24):
    """Pictures whose left or right half is a little brighter, and one-hot conditions that say which.

    The halves differ by 0.2: under noise of 0.5 and more, the condition says what the picture hardly does.
    """
    side = torch.arange(count) % 2
    images = torch.full((count, 3, 16, 16), 115, dtype=torch.uint8)
    images[side == 0, :, :, :8] = 140
    images[side == 1, :, :, 8:] = 140
    return images, torch.nn.functional.one_hot(side, 2).float()


def made_trainer(folder, config=CONFIG):
    torch.manual_seed(config.seed)
    model = NoiseConditionalEnergy(2, widths=(8, 8, 8), depths=(1, 1, 1), embedding=8, heads=4, mean=0.0, std=0.1)
    return Trainer(model, *made_data(), config, folder)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_levels_follow_their_law():
    levels = NoiseLevels(low=0.1, high=10.0, focus_low=0.5, focus_high=1.0, focus=0.25)
    sigma = levels.draw(4000, torch.Generator().manual_seed(0))
    assert sigma.min() >= 0.1 and sigma.max() <= 10.0
    inside = ((sigma >= 0.5) & (sigma <= 1.0)).float().mean().item()
    expected = 0.25 + 0.75 * math.log(2) / math.log(100)
    assert abs(inside - expected) < 1e-3  # stratified: far below the binomial error
    plain = replace(levels, focus=0.0).draw(4000, torch.Generator().manual_seed(0))
    assert abs(plain.log().mean().item()) < 1e-3


def test_score_error_of_the_gaussian_part_is_one():
    """x0 ~ N(mean, s^2) with a zero network: the weighted error is 1 in expectation at every level."""
    model = NoiseConditionalEnergy(2, widths=(8, 8, 8), mean=0.2, std=0.3)
    for head in (*model.left, model.linear):
        for parameter in head.parameters():
            torch.nn.init.zeros_(parameter)
    g = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(16, 3, 32, 32, generator=g) for _ in range(2))
    for level in (0.05, 0.5, 4.0):
        sigma = torch.full((16,), level)
        noised = 0.2 + 0.3 * x0 + level * noise
        error = score_error(model, noised, noise, sigma, torch.zeros(16, 2), torch.ones(16), 0.3, False)
        count = 16 * 3 * 32 * 32
        assert abs(error.mean().item() - 1.0) < 5 * math.sqrt(2 / count)


def test_contrast_names_the_condition_of_lowest_energy():
    def energy(x, condition, sigma):
        return ((x.mean(dim=(1, 2, 3)) - condition[:, 0]) ** 2) / sigma

    x = torch.full((3, 3, 4, 4), 0.5)
    sigma = torch.full((3,), 0.1)
    candidates = torch.tensor([[0.5], [1.5]]).expand(3, 2, 1)
    expected = math.log(1 + math.exp(-1.0 / 0.1))
    assert contrast(energy, x, sigma, candidates).item() == pytest.approx(expected, rel=1e-3)
    assert contrast(energy, x, sigma, candidates.flip(1)).item() == pytest.approx(10 + expected, rel=1e-4)


def test_candidates_start_with_the_truth():
    g = torch.Generator().manual_seed(0)
    labels = draw_candidates(torch.eye(4)[[2, 0]], torch.eye(4), 3, True, g)
    assert labels.argmax(2).tolist() == [[2, 3, 0, 1], [0, 1, 2, 3]]
    truth, pool = torch.rand(5, 2, generator=g), torch.rand(30, 2, generator=g) + 2
    free = draw_candidates(truth, pool, 6, False, g)
    assert free.shape == (5, 6, 2) and torch.equal(free[:, 0], truth) and (free[:, 1:] >= 2).all()


def test_training_learns_the_data_and_its_condition(tmp_path):
    trainer = made_trainer(tmp_path, replace(CONFIG, iterations=400, learning_rate=1e-2))
    images, conditions = made_data()
    levels = NoiseLevels(low=0.5, focus=0.0)
    before = validation_error(trainer.model, images, conditions, levels)
    trainer.model.load_state_dict(trainer.run())
    after = validation_error(trainer.model, images, conditions, levels)
    swapped = validation_error(trainer.model, images, conditions.flip(1), levels)
    assert after < 0.7 * before
    assert swapped > 1.1 * after, "the same noise under the other condition: equal where the condition is ignored"
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(10, 401, 10))
    assert lines[-1]["contrast"] is not None and set(lines[0]["by_level"]) <= {"0-0.15", "0.15-0.4", "0.4-1", "1-inf"}


def test_a_resumed_run_gives_the_same_bits(tmp_path):
    whole, first = made_trainer(tmp_path / "a"), made_trainer(tmp_path / "b")
    whole.run()
    first.run(until=17)
    second = made_trainer(tmp_path / "b")
    assert second.resume() and second.iteration == 17
    second.run()
    for name in whole.average:
        assert torch.equal(whole.average[name], second.average[name]), name
    for (name, a), b in zip(whole.model.named_parameters(), second.model.parameters()):
        assert torch.equal(a, b), name


def test_resuming_under_other_settings_raises(tmp_path):
    made_trainer(tmp_path).run(until=2)
    with pytest.raises(ValueError, match="other settings of learning_rate"):
        made_trainer(tmp_path, replace(CONFIG, learning_rate=1e-4)).resume()
    assert not made_trainer(tmp_path / "empty").resume()


def test_divergence_is_diagnosed(tmp_path):
    trainer = made_trainer(tmp_path)
    trainer.run(until=2)
    with torch.no_grad():
        trainer.model.stem.weight.fill_(math.nan)
    weights = {k: v.clone() for k, v in trainer.average.items()}
    with pytest.raises(DivergenceError, match="diverged at iteration 2.*Halve the learning rate"):
        trainer.run()
    assert all(torch.equal(weights[k], v) for k, v in trainer.average.items())


def test_a_running_loss_that_climbs_is_caught(tmp_path):
    trainer = made_trainer(tmp_path)
    record = {"iteration": 0, "gradient_norm": 1.0, "errors": torch.ones(4), "sigma": torch.ones(4), "contrast": None}
    for _ in range(150):
        trainer._watch({**record, "loss": 0.2})
    with pytest.raises(DivergenceError, match="best running mean 0.2"):
        for _ in range(150):
            trainer._watch({**record, "loss": 5.0})


def test_the_position_recipe_projects_as_the_camera_does():
    h = torch.tensor(camera_homography()).view(3, 3)
    center, right, far = (h @ torch.tensor([x, y, 1.0]) for x, y in ((0, 0), (1, 0), (0, 1)))
    u, v = ([p[i].item() / p[2].item() for p in (center, right, far)] for i in (0, 1))
    assert u[0] == pytest.approx(0, abs=1e-5) and u[1] > 0.4 and u[2] == pytest.approx(0, abs=1e-5)
    assert v[2] < v[0]  # farther from the camera is higher in the picture


def test_recipes_build_their_networks():
    for name, recipe in RECIPES.items():
        model = network_class(recipe.network)(recipe.condition_dim, **recipe.network)
        assert model(torch.zeros(1, 3, 32, 32), torch.zeros(1, recipe.condition_dim)).shape == (1,)
        assert recipe.name == name and bool(recipe.labels) != bool(recipe.ranges)
        if recipe.labels:
            assert list(recipe.label_vectors().values()) == torch.eye(recipe.condition_dim).tolist()
