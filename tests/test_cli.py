import json
import os
import subprocess
import sys

import pytest
import scene_sheet
import torch
from safetensors import safe_open

from ebmfast import cli, images, zoo

FEW = ["--n", "2", "--levels", "4", "--steps-per-level", "1", "--quiet"]


def run(capsys, *args):
    status = cli.main([str(a) for a in args])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_sample_writes_a_picture_that_says_what_it_shows(capsys, tmp_path):
    image = pytest.importorskip("PIL.Image")
    out = tmp_path / "deep" / "grid.png"
    status, text, _ = run(capsys, "sample", "shape('cube') & ~position(0.5, 0.5)", *FEW, "--seed", 3, "--out", out)
    assert status == 0 and "2 chains x 5 steps on cpu" in text and f"wrote {out}" in text
    with image.open(out) as picture:
        assert picture.size == (2 * (96 + 2) + 2, 96 + 4)
        assert picture.text["expression"] == "shape('cube') & ~position(0.5, 0.5)"
        assert "AboveSigma(0.15, value=-0.3)*position(0.5, 0.5)" in picture.text["sampled"]
        assert picture.text["seed"] == "3" and len(json.loads(picture.text["sampler"])["sigmas"]) == 4
        pixels = torch.tensor(list(picture.convert("L").tobytes()), dtype=torch.float32)
    assert pixels.std() > 5


def test_sample_is_reproducible_and_shards(capsys, tmp_path):
    def tensors(name, *args):
        assert run(capsys, "sample", "shape('cube')", *FEW, "--out", tmp_path / name, *args)[0] == 0
        with safe_open(tmp_path / name, "pt") as file:
            assert file.metadata()["expression"] == "shape('cube')"
            return {k: file.get_tensor(k) for k in file.keys()}

    first = tensors("a.safetensors")
    assert first["x"].shape == (2, 3, 32, 32) and first["energy"].shape == (2,) and first["leaf_energies"].shape == (2, 1)
    assert torch.equal(tensors("b.safetensors")["x"], first["x"])
    shard = tensors("c.safetensors", "--n", "1", "--first-chain", "1")["x"]
    torch.testing.assert_close(shard, first["x"][1:], rtol=1e-3, atol=1e-3)
    assert not torch.equal(tensors("d.safetensors", "--seed", "1")["x"], first["x"])


def test_the_plan_is_printed(capsys, tmp_path):
    args = [a for a in FEW if a != "--quiet"]
    _, text, _ = run(capsys, "sample", "shape('cube') | shape('sphere')", *args, "--out", tmp_path / "g.png")
    for part in ("composition", "2 x B rows in one call", "Annealed([4", "backend      cpu", "there is an OR"):
        assert part in text


def test_the_prior_is_counted_once_unless_refused(capsys, tmp_path):
    args = ["sample", "shape('cube') & position(0, 0)", *[a for a in FEW if a != "--quiet"], "--out", tmp_path / "g.png"]
    assert "unconditional" in run(capsys, *args)[1]
    assert "unconditional" not in run(capsys, *args, "--no-prior")[1]


@pytest.mark.parametrize(("args", "message"), [
    (["shap('cube')"], "unknown name 'shap' (did you mean shape?)"), (["shape('cub')"], "did you mean 'cube'"),
    (["~shape('cube')", "--no-prior"], "not grounded"), (["shape('cube')", "--n", "-1"], "`n` must be at least 0"),
    (["shape('cube')", "--out", "x.jpg"], "must end in .png or .safetensors"), (["shape('cube')", "--n", "0"], "nothing to draw"),
    (["shape('cube')", "--backend", "gpu"], "`backend` must be one of"), (["shape('cube')", "--backend", "cuda"], "not available"),
    (["shape('cube')", "--models", "nowhere"], "nowhere has no models"), (["shape('cube')", "--seed", "-1"], "`seed`"),
])
def test_errors_are_one_message_and_status_2(capsys, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(capsys, "sample", *args)
    assert status == 2 and err.startswith("ebmfast sample: error: ") and message in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_demo_draws_a_row_for_each_way_to_compose(capsys, tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    monkeypatch.setattr(zoo, "recommended", quick(zoo.recommended))
    status, text, _ = run(capsys, "demo", "--n", 1, "--out", tmp_path / "demo.png")
    assert status == 0 and all(expression in text for _, expression in cli.DEMO)
    with image.open(tmp_path / "demo.png") as picture:
        assert picture.size[1] > len(cli.DEMO) * 96


def quick(recommended):
    """The same recommendation with two noise levels, one step each."""
    import dataclasses
    return lambda *a: (lambda e, s: (e, dataclasses.replace(s, sigmas=s.sigmas[::15], steps_per_level=1)))(*recommended(*a))


def test_models_lists_what_expressions_can_name(capsys):
    status, text, _ = run(capsys, "models")
    assert status == 0 and "shape('cube')" in text and "position: 2 number(s), -1 to 1" in text


def test_models_of_one_s_own(capsys, tmp_path):
    about = zoo.card("shape") | {"name": "form"}
    (tmp_path / "form.json").write_text(json.dumps(about))
    (tmp_path / "form.safetensors").write_bytes((zoo._FOLDER / "shape.safetensors").read_bytes())
    status, text, _ = run(capsys, "sample", "form('cube')", *FEW, "--models", tmp_path, "--out", tmp_path / "g.png")
    assert status == 0 and "wrote" in text
    assert "form('cube')" in run(capsys, "models", "--models", tmp_path)[1]


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for command in ("sample", "generate", "demo", "models", "train", "scenes", "evaluate", "doctor"):
        assert f"  {command} " in text
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
    assert run(capsys)[0] == 0


def test_python_m_ebmfast_is_the_doctor():
    done = subprocess.run([sys.executable, "-m", "ebmfast"], capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "philox" in done.stdout.lower() and "cpu" in done.stdout


def test_infer_names_what_a_picture_shows(capsys, tmp_path):
    image = pytest.importorskip("PIL.Image")
    data = scene_sheet.load()[slice(0, 2)]
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path, x in zip(paths, data.pixels()):
        images.save(images.grid([x[None]], data_range=(-1, 1), scale=1, gap=0), path, {})
    shapes = [list(zoo.card("shape")["labels"])[k] for k in data.shape.tolist()]
    status, text, _ = run(capsys, "infer", *paths, "--concepts", "shape", "--draws", 1)
    lines = text.splitlines()
    assert status == 0 and [line.split()[1] for line in lines[1::2]] == shapes and lines[0] == str(paths[0])
    picture = tmp_path / "map.png"
    args = ["--concepts", "position", "--grid", 6, "--draws", 1, "--one-scene"]
    status, text, _ = run(capsys, "infer", paths[0], paths[0], *args, "--json", "--map", picture)
    answer = json.loads(text[:text.rindex("wrote")])
    assert status == 0 and answer[0]["pictures"] == [str(paths[0])] * 2
    found = answer[0]["answers"][0]
    assert all(abs(a - b) < 0.25 for a, b in zip(found["mean"], data.position[0].tolist()))
    with image.open(picture) as drawn:
        assert drawn.text["sigma"] == "0.2" and drawn.size[0] == 2 * (32 * 6 + 2) + 2


@pytest.mark.parametrize(("args", "message"), [
    (["--concepts", "smile"], "`--concepts` must be among"), ([], "must be 32x32 pixels"), (["--draws", "-1"], "must be")])
def test_infer_says_what_is_wrong(capsys, tmp_path, args, message):
    images.save(images.grid([torch.zeros(1, 3, 8, 8)], scale=1, gap=0), tmp_path / "p.png", {})
    status, _, text = run(capsys, "infer", tmp_path / "p.png", *args)
    assert status == 2 and message in text and text.startswith("ebmfast infer: error: ")


def test_models_without_noise_levels_are_sampled_as_their_cards_say(capsys, tmp_path, monkeypatch):
    """Those of contrastive divergence: chains of a fixed length, from uniform noise."""
    steps = 5
    real = zoo.card_from

    def shorter(folder, name):
        about = real(folder, name)
        cut = {k: v[:steps] for k, v in about["schedule"].items() if k in ("step", "noise")}
        return about | {"schedule": about["schedule"] | cut | {"steps": steps}}

    monkeypatch.setattr(zoo, "card_from", shorter)
    out = ["--models", "paper", "--out", tmp_path / "a.png"]
    status, text, _ = run(capsys, "sample", "color('red') & position(0, 0)", "--n", 2, *out)
    assert status == 0 and "2 chains x 5 steps" in text
    status, _, err = run(capsys, "sample", "color('red')", "--levels", 3, *out)
    assert status == 2 and "are for models with noise levels" in err


def test_what_priors_ground_is_sampled(capsys, tmp_path):
    """The text alone would not be grounded; what is sampled, with its priors counted once, is."""
    args = ["sample", "shape('cube') & negate(color('red'), alpha=1.5)", "--n", "1", "--levels", "2", "--steps-per-level", "1"]
    assert run(capsys, *args, "--out", str(tmp_path / "a.png"))[0] == 0
    status, _, err = run(capsys, "sample", "~color('red')", "--out", str(tmp_path / "a.png"))
    assert status == 2 and "error: ~color('red') is not grounded" in err and "allow_improper" not in err


def test_expected_failures_are_one_line(capsys, monkeypatch):
    from ebmfast.training.loop import DivergenceError

    def fail(_):
        raise DivergenceError("training diverged at iteration 1")

    monkeypatch.setattr(cli, "_doctor", fail)
    assert cli.main(["doctor"]) == 2 and capsys.readouterr().err == "ebmfast doctor: error: training diverged at iteration 1\n"
