import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from ebmfast import Concept, negate, zoo
from ebmfast.models import Symmetrized
from ebmfast.scenes import HELD_OUT
from ebmfast.weights import weight_at

FIELDS = {
    "name", "kind", "architecture", "condition_dim", "labels", "ranges", "data_range", "shape", "sigma", "prior",
    "negation_alpha", "schedule", "data", "recipe", "command", "seed", "iterations", "minutes", "scores", "sha256",
}
CONCEPTS = ["color", "position", "shape", "size"]
FOLDER = Path(zoo.__file__).parent


def condition(card, which=0):
    if card["labels"]:
        return torch.tensor([list(card["labels"].values())[which]])
    return torch.tensor([[low + (high - low) * (0.25 + 0.5 * which) for low, high in card["ranges"]]])


def picture(batch=1, side=32):
    g = torch.Generator().manual_seed(0)
    return (0.27 + 0.2 * torch.randn(batch, 3, side, side, generator=g)).clamp(-1, 1)


def test_the_zoo_holds_every_concept_and_stays_small():
    assert zoo.names() == CONCEPTS
    assert zoo.names("judge") == ["judge"]
    assert sum(p.stat().st_size for p in FOLDER.glob("*.safetensors")) < 12_000_000


@pytest.mark.parametrize("name", CONCEPTS)
def test_cards_are_complete(name):
    card = zoo.card(name)
    assert FIELDS <= set(card) and card["name"] == name
    assert bool(card["labels"]) != bool(card["ranges"])
    assert all(len(v) == card["condition_dim"] for v in card["labels"].values())
    assert not card["ranges"] or len(card["ranges"]) == card["condition_dim"]
    assert card["data_range"] == [-1, 1] and card["shape"] == [3, 32, 32]
    assert card["command"].startswith(f"ebmfast train {name} ")
    assert card["minutes"] > 0 and card["scores"]
    low, high = card["sigma"]
    assert low <= card["schedule"]["sigma_min"] < card["schedule"]["sigma_max"] <= high
    assert 0 < card["negation_alpha"] <= 1


@pytest.mark.parametrize("name", CONCEPTS)
@pytest.mark.parametrize("level", [0.06, 0.5, 4.0])
def test_energies_are_finite_and_depend_on_the_condition(name, level):
    model, card = zoo.load(name), zoo.card(name)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    x, sigma = picture().requires_grad_(True), torch.tensor([level])
    scores = []
    for c in (condition(card, 0), condition(card, 1), None):
        energy = model(x, c, sigma)
        assert energy.shape == (1,) and torch.isfinite(energy).all()
        scores.append(torch.autograd.grad(energy.sum(), x)[0])
    assert all(torch.isfinite(s).all() for s in scores)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (scores[a] - scores[b]).abs().max() > 1e-4 * scores[a].abs().max()


@pytest.mark.parametrize("name", CONCEPTS)
def test_a_denoised_picture_is_closer_to_the_clean_one(name):
    """Tweedie's formula with the trained score halves the error, at least, on something like an empty floor."""
    model, level = zoo.load(name), 0.5
    clean = torch.full((4, 3, 32, 32), 0.3)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    x = (clean + level * noise).requires_grad_(True)
    (gradient,) = torch.autograd.grad(model(x, None, torch.full((4,), level)).sum(), x)
    error = (x - level**2 * gradient - clean).square().mean().sqrt()
    assert error < 0.5 * level


def test_weights_are_loaded_once():
    assert zoo.load("color") is zoo.load("color")


def test_an_unknown_name_raises():
    for name in ("smile", "../zoo/color"):
        with pytest.raises(ValueError, match="no model named .* there are color, counter, judge, position, shape, size"):
            zoo.card(name)


def test_changed_weights_are_refused(tmp_path):
    for suffix in (".json", ".safetensors"):
        shutil.copy(FOLDER / f"color{suffix}", tmp_path)
    weights = tmp_path / "color.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match="hashes to .* its card says"):
        zoo.load_from(tmp_path, "color")


def test_a_card_cannot_name_a_class_from_elsewhere(tmp_path):
    shutil.copy(FOLDER / "color.safetensors", tmp_path)
    card = zoo.card("color")
    card["architecture"]["class"] = "subprocess.Popen"
    (tmp_path / "color.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match="not part of ebmfast"):
        zoo.load_from(tmp_path, "color")


def test_families_take_their_facts_from_the_cards():
    families = zoo.concepts()
    assert sorted(families) == CONCEPTS
    red = families["color"]("red")
    x = picture()
    expected = zoo.load("color")(x, torch.tensor([zoo.card("color")["labels"]["red"]]), torch.tensor([0.3]))
    torch.testing.assert_close(red.energy(x, sigma=0.3), expected, rtol=1e-4, atol=1e-2)
    expression, sampler = zoo.recommended(red & families["shape"]("cube"))
    schedule = zoo.card("color")["schedule"]
    assert len(sampler.sigmas) == schedule["levels"] and math.isclose(sampler.sigmas[-1], schedule["sigma_min"])
    assert [leaf.name for leaf in expression.leaves] == ["color('red')", "shape('cube')", "shape.unconditional"]


def test_own_priors_count_each_models_prior_once():
    """E = E_1 + sum_(i > 1) w_i (E_i - E_i,unconditional) above the noise level; below it the sum without what is negated."""
    families = zoo.concepts()
    red, cube, where = families["color"]("red"), families["shape"]("cube"), families["position"](0.5, 0.5)
    composed = red & 2.0 * cube & negate(where, 0.3)
    counted, x = zoo.own_priors(composed, above=0.2), picture(2)
    for sigma, on in ((0.5, 1.0), (0.1, 0.0)):
        e = {leaf.name: leaf.energy(x, sigma=sigma) for leaf in counted.leaves}
        expected = (e["color('red')"] + 2 * (e["shape('cube')"] - on * e["shape.unconditional"])
                    - 0.3 * on * (e["position(0.5, 0.5)"] - e["position.unconditional"]))
        torch.testing.assert_close(counted.energy(x, sigma=sigma), expected, rtol=1e-4, atol=1e-2)
    assert weight_at(counted.step_scale, 0.5) == 1.0 and weight_at(counted.step_scale, 0.1) == 3.0
    assert zoo.own_priors(red) == red
    weighted = zoo.own_priors(2.0 * red & cube)
    assert [leaf.name for leaf in weighted.leaves] == [
        "color('red')", "color.unconditional", "shape('cube')", "shape.unconditional"]
    either = zoo.own_priors((red & cube) | where)
    assert [leaf.name for leaf in either.leaves] == [
        "color('red')", "shape('cube')", "shape.unconditional", "position(0.5, 0.5)"]


def test_a_symmetric_prior_is_the_mixture_over_shifted_channels():
    about, model = zoo.card("shape"), zoo.load("shape")
    viewed = zoo.load_from(zoo.folder("pairs"), "shape")
    families = {"shape": zoo.family(zoo.card_from(zoo.folder("pairs"), "shape"), viewed), "plain": zoo.family(about, model)}
    x, sigma, cube, ball = picture(4), torch.full((4,), 0.5), torch.tensor([[1.0, 0, 0]] * 4), torch.tensor([[0, 1.0, 0]] * 4)

    def mixture(energy):
        return -torch.stack([-energy(x.roll(k, 1), None, sigma) for k in range(3)]).logsumexp(0) + math.log(3)

    one = zoo.symmetric_prior(2 * families["shape"]("cube") & 0.5 * families["plain"]("sphere"))
    ratios = 2 * (viewed(x, cube, sigma) - viewed(x, None, sigma)) + 0.5 * (model(x, ball, sigma) - model(x, None, sigma))
    torch.testing.assert_close(one.energy(x, 0.5), mixture(viewed) + ratios, rtol=1e-4, atol=2e-3)
    assert weight_at(one.step_scale, 0.5) == 1.0
    alone = zoo.symmetric_prior(families["plain"]("cube")).energy(x, 0.5)
    torch.testing.assert_close(alone, mixture(model) + model(x, cube, sigma) - model(x, None, sigma), rtol=1e-4, atol=2e-3)
    two = zoo.symmetric_prior(families["plain"]("cube") | families["plain"]("sphere"))
    expected = mixture(model) - model(x, None, sigma) - torch.stack([-model(x, cube, sigma), -model(x, ball, sigma)]).logsumexp(0)
    torch.testing.assert_close(two.energy(x, 0.5), expected, rtol=1e-4, atol=2e-3)
    assert len(two.leaves) == 3, "branches share their prior"
    blind = Symmetrized(model)
    torch.testing.assert_close(blind(x.roll(1, 1), sigma), blind(x, sigma), rtol=1e-5, atol=1e-3)
    with pytest.raises(ValueError, match="neither"):
        zoo.symmetric_prior(families["plain"]("cube") & (families["plain"]("sphere") | families["shape"]("cube")))


def test_a_part_of_each_prior_can_be_taken_out():
    families = zoo.concepts()
    red, cube = families["color"]("red"), families["shape"]("cube")
    counted, x = zoo.own_priors(red & cube, above=0.2, weight=0.75), picture(2)
    for sigma, on in ((0.5, 0.75), (0.1, 0.0)):
        e = {leaf.name: leaf.energy(x, sigma=sigma) for leaf in counted.leaves}
        expected = e["color('red')"] + e["shape('cube')"] - on * e["shape.unconditional"]
        torch.testing.assert_close(counted.energy(x, sigma=sigma), expected, rtol=1e-4, atol=1e-2)
        assert weight_at(counted.step_scale, sigma) == pytest.approx(2.0 - on)


@pytest.mark.parametrize("group, members", [
    ("objects", ["position"]), ("continual", ["color", "position", "shape"]), ("paper", ["color", "position"]),
    ("pairs", ["color", "shape"]), ("scenes64", ["position"])])
def test_models_of_one_experiment_lie_in_a_folder_of_their_own(group, members):
    folder = zoo.folder(group)
    assert sorted(zoo.cards_in(folder)) == members and not set(members) & {"judge", "counter"}
    assert zoo.located(group) == folder and zoo.located("elsewhere/" + group) != folder
    for name in members:
        about = zoo.card_from(folder, name)
        model = zoo.family(about, zoo.load_from(folder, name))  # raises where hash or architecture is not what the card says
        condition = torch.zeros(1, about["condition_dim"])
        energy = model(condition[0].tolist()).energy(picture(1, about["shape"][-1]), sigma=1.0 if about["takes_sigma"] else None)
        assert energy.isfinite().all() and about["command"].startswith("ebmfast train ") and about["minutes"] > 0
        hidden = [list(pair) for pair in HELD_OUT] if group in ("objects", "pairs") else about["held_out"]
        assert about["held_out"] == hidden


def test_the_bundled_weights_stay_small():
    sizes = [p.stat().st_size for p in zoo.folder().rglob("*.safetensors")]
    assert sum(sizes) <= 12e6 and max(sizes) <= 5e6


def test_weights_in_8_bits_come_back_within_half_a_step():
    g = torch.Generator().manual_seed(0)
    weights = {"conv.weight": torch.randn(4, 3, 3, 3, generator=g) * torch.tensor([0.0, 1e-3, 1.0, 50.0]).view(4, 1, 1, 1),
               "conv.bias": torch.randn(4, generator=g), "read.weight": torch.randn(2, 7, generator=g)}
    stored = zoo.packed(weights)
    assert stored["conv.weight"].dtype == torch.int8 and stored["conv.bias"].dtype == torch.float16
    found = zoo.unpacked(stored)
    assert found.keys() == weights.keys()
    for name in ("conv.weight", "read.weight"):
        step = weights[name].flatten(1).abs().amax(1) / 127
        assert ((found[name] - weights[name]).flatten(1).abs() <= 0.501 * step[:, None]).all(), name
    assert zoo.unpacked(weights).keys() == weights.keys() and zoo.load("judge").training is False


def test_own_priors_need_models_that_have_one():
    bare = Concept(lambda x: x.flatten(1).sum(1), name="bare")
    with pytest.raises(ValueError, match="bare belongs to no family"):
        zoo.own_priors(zoo.concepts()["color"]("red") & bare)


def test_the_judge_reads_an_empty_floor():
    floor = 0.25 + torch.linspace(0, 0.1, 32)[None, None, :, None].expand(2, 3, 32, 32)
    assert not zoo.load("judge").read(floor)["present"].any()
