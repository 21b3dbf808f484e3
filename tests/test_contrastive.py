import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from ebmfast.models import AtNoiseLevel, CubesNet, NoiseConditionalEnergy
from ebmfast.training import ContrastiveConfig, ContrastiveTrainer, DivergenceError, Frozen, ReplayBuffer

CONFIG = ContrastiveConfig(
    iterations=12, batch=6, steps=4, drift=20.0, noise=0.01, buffer=32, checkpoint_every=4, log_every=4, ema=0.9)


class Pull(nn.Module):
    """E(x | c) = k/2 |x - m(c)|^2, a mean for each of two labels to be learnt: contrastive divergence has a known answer."""

    def __init__(self, precision=40.0):
        super().__init__()
        self.mean = nn.Parameter(torch.full((2,), 0.5))
        self.precision = precision

    def forward(self, x, condition):
        m = (condition @ self.mean)[:, None, None, None]
        return 0.5 * self.precision * (x - m).square().sum(dim=(1, 2, 3))


def made_data(count=24, levels=(60, 190)):
    side = torch.arange(count) % 2
    images = torch.tensor(levels, dtype=torch.uint8)[side][:, None, None, None].expand(count, 3, 16, 16).contiguous()
    return images, torch.nn.functional.one_hot(side, 2).float()


def made_trainer(folder, config=CONFIG, model=None, **options):
    torch.manual_seed(0)
    return ContrastiveTrainer(model or CubesNet(2, width=4), *made_data(), config, folder, **options)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_contrastive_divergence_finds_the_means_of_its_conditions(tmp_path):
    """The chains mix within their steps (drift 0.01, noise sqrt(0.02), precision 40), so the means of the labels are learnt."""
    config = replace(CONFIG, iterations=150, steps=6, drift=0.01, noise=0.02**0.5, squares=0.0, learning_rate=0.02,
                     betas=(0.5, 0.9), max_gap=math.inf, ema=0.98)
    means = made_trainer(tmp_path, config, Pull()).run()["mean"]
    assert means.tolist() == pytest.approx([60 / 255, 190 / 255], abs=0.02)


def test_frozen_energies_take_part_in_the_negatives(tmp_path):
    """The new energy learns what the sum with a frozen one lacks."""
    config = replace(CONFIG, iterations=200, steps=10, drift=0.005, noise=0.1, squares=0.0, learning_rate=0.01,
                     betas=(0.5, 0.9), max_gap=math.inf, ema=0.98)
    images, conditions = made_data(levels=(60, 190))
    old = Pull(40.0).requires_grad_(False)
    old.mean.copy_(torch.tensor([0.5, 0.5]))
    trainer = ContrastiveTrainer(Pull(40.0), images, conditions, config, tmp_path, [Frozen("old", old, conditions)])
    means = trainer.run()["mean"]
    # the sum of two pulls of equal strength rests half-way between their means
    assert ((means + 0.5) / 2).tolist() == pytest.approx([60 / 255, 190 / 255], abs=0.05)


def test_a_resumed_run_gives_the_same_bits(tmp_path):
    whole, first = made_trainer(tmp_path / "a"), made_trainer(tmp_path / "b")
    whole.run()
    first.run(until=5)
    second = made_trainer(tmp_path / "b")
    assert second.resume() and second.iteration == 5
    second.run()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    for name, value in whole.average.items():
        assert torch.equal(value, second.average[name]), name
    assert torch.equal(whole.buffer.images, second.buffer.images) and torch.equal(whole.buffer.rows, second.buffer.rows)


def test_the_buffer_goes_on_with_chains_under_their_own_conditions():
    g = torch.Generator().manual_seed(0)
    buffer = ReplayBuffer(8, (3, 4, 4))
    x, rows, place = buffer.start(torch.arange(4), 1.0, g)
    assert (place == -1).all() and rows.tolist() == [0, 1, 2, 3] and 0 <= x.min() and x.max() <= 1
    ends = torch.arange(4).view(4, 1, 1, 1).expand(4, 3, 4, 4) / 10.0
    buffer.store(ends, rows, place)
    assert len(buffer) == 4
    x, rows, place = buffer.start(torch.full((4,), 9), 1.0, g)
    assert sorted(place.tolist()) == [0, 1, 2, 3] and torch.equal(rows, place)
    torch.testing.assert_close(x[:, 0, 0, 0], place / 10.0, atol=0.5 / 255, rtol=0)
    buffer.store(x, torch.full((4,), 5), place)
    assert len(buffer) == 4 and (buffer.rows[:4] == 5).all()
    for _ in range(3):
        buffer.store(ends, torch.zeros(4, dtype=torch.long), torch.full((4,), -1))
    assert len(buffer) == 8 and int(buffer.filled) == 16
    _, rows, place = buffer.start(torch.full((200,), 7), 0.5, g)
    assert (rows[place < 0] == 7).all() and 0 < (place >= 0).sum() <= 8


def test_chains_run_on_the_weights_of_this_iteration(tmp_path):
    trainer = made_trainer(tmp_path)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.run(until=1)
    x, c = torch.rand(3, 3, 16, 16), torch.eye(2)[[0, 1, 0]]
    trainer._refresh()
    torch.testing.assert_close(trainer.sampled(x, c), trainer.model.eval()(x, c))
    assert any(not torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())


def test_divergence_is_diagnosed(tmp_path):
    trainer = made_trainer(tmp_path, replace(CONFIG, max_gap=0.5))
    record = {"iteration": 7, "loss": 0.0, "gradient_norm": 1.0, "gap": 3.0, "positive": 2.0, "negative": -1.0}
    with pytest.raises(DivergenceError, match="at iteration 7.*gap 3.*found pits.*smaller drift"):
        for _ in range(20):
            trainer._watch(record)
    with torch.no_grad():
        trainer.model.stem.weight.fill_(math.nan)
    with pytest.raises(DivergenceError, match="a chain that draws negatives failed"):
        trainer.run()


def test_the_log_tells_both_energies(tmp_path):
    made_trainer(tmp_path).run()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [4, 8, 12]
    assert lines[-1]["gap"] == pytest.approx(lines[-1]["positive"] - lines[-1]["negative"], abs=2e-5)
    assert 6 < lines[-1]["buffer"] < 32


def test_a_score_matched_network_at_one_level_is_an_energy_of_pictures():
    torch.manual_seed(0)
    options = {"widths": (8, 8, 8), "depths": (1, 1, 1), "embedding": 8, "heads": 4}
    model = AtNoiseLevel(0.3, 2, **options)
    network = NoiseConditionalEnergy(2, **options)
    model.network.load_state_dict(network.state_dict())
    x, c = torch.rand(3, 3, 16, 16), torch.rand(3, 2)
    torch.testing.assert_close(model(x, c), network(2 * x - 1, c, torch.full((3,), 0.3)))
