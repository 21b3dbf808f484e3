import pytest
import torch

from ebmfast.models import VIEWS, CubesNet, NoiseConditionalEnergy, ResNet128, ViewedEnergy

HOMOGRAPHY = (0.7, 0.0, 0.0, 0.0, -0.5, 0.0, 0.0, 0.1, 1.0)


def small(condition_dim=2, **options):
    torch.manual_seed(0)
    model = NoiseConditionalEnergy(condition_dim, widths=(8, 12, 16), embedding=16, heads=4, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def inputs(batch=5, condition_dim=2):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, 32, 32, generator=g)
    return x, torch.rand(batch, condition_dim, generator=g), 0.1 + torch.rand(batch, generator=g)


def score(model, x, *rest):
    x = x.clone().requires_grad_(True)
    return torch.autograd.grad(model(x, *rest).sum(), x)[0]


@pytest.mark.parametrize("options", [{}, {"homography": HOMOGRAPHY}, {"harmonics": 2}])
def test_rows_do_not_see_each_other(options):
    model = small(**options)
    x, c, sigma = inputs()
    together, alone = model(x, c, sigma), [model(x[i:i + 1], c[i:i + 1], sigma[i:i + 1]) for i in range(5)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=2e-5, atol=1e-3)


def test_the_gradient_is_that_of_the_energy():
    model = small(homography=HOMOGRAPHY).double()
    x, c, sigma = (t.double() for t in inputs(2))
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    h = 1e-5
    slope = (model(x + h * direction, c, sigma) - model(x - h * direction, c, sigma)) / (2 * h)
    expected = (score(model, x, c, sigma) * direction).sum(dim=(1, 2, 3))
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-6)


def test_without_network_the_energy_is_gaussian():
    model = small(mean=0.3, std=0.2)
    for part in (*model.left, model.linear):
        torch.nn.init.zeros_(part.weight)
        if part.bias is not None:
            torch.nn.init.zeros_(part.bias)
    x, c, sigma = inputs()
    variance = (sigma**2 + 0.2**2)[:, None, None, None]
    torch.testing.assert_close(model(x, c, sigma), ((x - 0.3) ** 2 / (2 * variance)).sum(dim=(1, 2, 3)))


@pytest.mark.parametrize("options", [{}, {"homography": HOMOGRAPHY}])
def test_rows_that_are_not_kept_ignore_their_condition(options):
    model = small(**options)
    x, c, sigma = inputs()
    keep = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0])
    mixed, kept, free = model(x, c, sigma, keep), model(x, c, sigma), model(x, None, sigma)
    torch.testing.assert_close(mixed, torch.where(keep > 0, kept, free), rtol=2e-5, atol=1e-3)
    assert ((kept - free).abs() > 1e-3).all()


def test_bumps_follow_the_condition():
    model = small(homography=(1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))
    x, _, _ = inputs(1)
    for place in ([-0.5, 0.5], [0.5, -0.25]):
        maps = model._maps(x, torch.tensor([place]), torch.ones(1))
        narrow = maps[0, 2]
        row, column = divmod(int(narrow.argmax()), 16)
        assert abs((column + 0.5) / 8 - 1 - place[0]) <= 1 / 16 + 1e-6
        assert abs((row + 0.5) / 8 - 1 - place[1]) <= 1 / 16 + 1e-6


def test_score_can_be_trained_through():
    model = small()
    x, c, sigma = inputs()
    x.requires_grad_(True)
    (gradient,) = torch.autograd.grad(model(x, c, sigma).sum(), x, create_graph=True)
    gradient.square().mean().backward()
    for name, parameter in model.named_parameters():
        if name != "no_condition" and not name.endswith(("linear.bias",)) and parameter.grad is not None:
            assert torch.isfinite(parameter.grad).all(), name
    assert model.blocks[0][0].conv1.weight.grad.abs().sum() > 0


def test_memory_format_does_not_change_the_energy():
    model = small()
    x, c, sigma = inputs()
    plain = model(x, c, sigma)
    fast = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last), c, sigma)
    torch.testing.assert_close(plain, fast, rtol=2e-5, atol=1e-3)


def test_sigma_may_be_one_number_and_defaults_to_the_lowest():
    model = small()
    x, c, _ = inputs()
    torch.testing.assert_close(model(x, c, torch.tensor(0.06)), model(x, c))
    torch.testing.assert_close(model(x, c, torch.full((5,), 0.06)), model(x, c))


def test_a_condition_of_the_wrong_width_raises():
    x, c, sigma = inputs(condition_dim=3)
    with pytest.raises(ValueError, match=r"`condition` must be \[5, 2\], got \[5, 3\]"):
        small()(x, c, sigma)


def viewed(view="luminance", **options):
    torch.manual_seed(0)
    small = {"widths": (8, 12, 16), "embedding": 16, "heads": 4}
    model = ViewedEnergy(2, view, prior=small, mean=0.1, std=0.3, **small, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("view", VIEWS)
def test_views_keep_white_noise_white(view):
    basis = torch.eye(3 * 16 * 16, dtype=torch.float64).view(-1, 3, 16, 16)
    rows = VIEWS[view][1](basis).flatten(1).T
    torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows), dtype=torch.float64))


def test_a_condition_sees_the_picture_through_its_view_only():
    model = viewed()
    x, c, sigma = inputs()
    hue = torch.tensor([0.5, -0.2, -0.3])[:, None, None] * torch.rand(5, 1, 32, 32, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(model.ratio(x + hue, c, sigma), model.ratio(x, c, sigma), rtol=1e-4, atol=1e-4)
    assert (model(x + hue, c, sigma) - model(x, c, sigma)).abs().min() > 1e-2
    block, coarse = torch.zeros(1, 3, 32, 32), viewed("coarse")
    block[..., 8:10, 8:10] = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    torch.testing.assert_close(coarse.ratio(x + block, c, sigma), coarse.ratio(x, c, sigma), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"homography": HOMOGRAPHY}])
def test_a_viewed_energy_is_its_prior_and_a_ratio(options):
    model = viewed(**options)
    x, c, sigma = inputs()
    keep = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0])
    free, kept = model(x, None, sigma), model(x, c, sigma)
    torch.testing.assert_close(free, model.prior(x, None, sigma))
    torch.testing.assert_close(kept, free + model.ratio(x, c, sigma))
    torch.testing.assert_close(model(x, c, sigma, keep), torch.where(keep > 0, kept, free))
    assert ((kept - free).abs() > 1e-3).all()
    torch.testing.assert_close(model(x, c, torch.tensor(0.06)), model(x, c))
    with pytest.raises(ValueError, match=r"`condition` must be \[5, 2\], got \[5, 3\]"):
        model(x, torch.zeros(5, 3), sigma)
    with pytest.raises(ValueError, match="`view` must be one of luminance, coarse, got 'chroma'"):
        ViewedEnergy(2, "chroma")


def test_cubes_net_has_the_papers_size_and_conditions():
    model = CubesNet(20)
    assert sum(p.numel() for p in model.parameters()) == 2_179_201
    x, c = torch.rand(2, 3, 64, 64), torch.eye(20)[:2]
    same, other = model.eval()(x, c[:1].expand(2, -1)), model(x, c)
    assert same.shape == (2, 1)
    with torch.no_grad():
        model.blocks[1].shift1[1] += 1.0
        model.blocks[2].gain[1] *= 2.0
    assert not torch.allclose(model(x, c)[1], other[1]) and torch.equal(model(x, c)[0], other[0])


def test_resnet128_has_the_papers_size_and_shape():
    model = ResNet128()
    convolutions = sum(m.weight.numel() for m in model.modules() if hasattr(m, "effective_weight"))
    # 3x3 convolutions: stem, then two and a bypass where channels change, for 64, 128, 256, 512, 512, 512 channels
    wanted = 9 * (3 * 64 + 2 * 64**2 + (64 * 128 * 2 + 128**2) + (128 * 256 * 2 + 256**2) + (256 * 512 * 2 + 512**2) + 4 * 512**2)
    assert convolutions == wanted
    widths = (64, 64, 128, 256, 512, 512, 512)
    conditions = sum(2 * (c_in + 2 * c_out) + c_out for c_in, c_out in zip(widths, widths[1:]))
    assert sum(p.numel() for p in model.parameters()) == wanted + conditions + 512 + 1
    assert round(wanted / 1e6, 1) == 15.7
    assert model.blocks[0].leaky and not any(block.leaky for block in model.blocks[1:])
    narrow = ResNet128(2, width=2).eval()
    features = narrow.features(torch.rand(1, 3, 128, 128), torch.eye(2)[:1])
    assert features.shape == (1, 16, 4, 4), "five halvings of 128"
    energy = narrow(torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)), torch.eye(2)[:1])
    same = narrow.read_out(narrow.features(
        torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)), torch.eye(2)[:1]).sum(dim=(2, 3)))
    assert torch.equal(energy, same), "a sum over space, not a mean"


@pytest.mark.parametrize("cls, size", [(CubesNet, 16), (ResNet128, 32)])
def test_folded_networks_have_the_same_energies(cls, size):
    model = cls(3, width=8)
    for _ in range(20):
        model(torch.rand(2, 3, size, size), torch.eye(3)[:2])  # the power iteration settles
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x, c = torch.rand(4, 3, size, size), torch.rand(4, 3)
    folded = model.folded()
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    torch.testing.assert_close(folded(x, c), model.eval()(x, c))
    norms = {k: torch.linalg.matrix_norm(v.flatten(1), 2) for k, v in folded.state_dict().items() if v.ndim == 4}
    for name, norm in norms.items():
        assert norm < 1.05 and ("conv2" in name or norm > 0.95), (name, norm)
    with torch.no_grad():
        folded.stem.weight.zero_()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "the two share no weights"


def test_folding_in_place_follows_the_trained_network():
    model = CubesNet(2, width=4).eval()
    folded = model.folded()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    x, c = torch.rand(2, 3, 16, 16), torch.eye(2)
    assert not torch.allclose(folded(x, c), model(x, c))
    model.fold_into(folded)
    torch.testing.assert_close(folded(x, c), model(x, c))


def test_a_joint_condition_places_its_bumps_and_scales_its_floats():
    model = small(5, homography=(1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0), place=2, center=[0, 0, 0, 0, 0.5], scale=[1, 1, 1, 1, 0.1])
    plain = small(2, homography=(1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))
    x, _, sigma = inputs(1)
    joint, alone = torch.tensor([[1.0, 0.0, 0.4, -0.3, 0.6]]), torch.tensor([[0.4, -0.3]])
    assert torch.equal(model._maps(x, joint, torch.ones(1)), plain._maps(x, alone, torch.ones(1)))
    assert ((joint - model.center) / model.scale)[0].tolist() == pytest.approx([1, 0, 0.4, -0.3, 1.0])
    assert "center" not in model.state_dict() and model(x, joint, sigma).shape == (1,)
