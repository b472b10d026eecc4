import copy
import json
import math

import pytest
import torch
from recipe_parts import load_recipe


@pytest.fixture(scope="module")
def example():
    module = load_recipe("super_resolution")
    module.BATCH, module.SHOWN, module.PHOTOS = 1, [0], ("chelsea",)
    # reading and proving weights takes most of a short run
    built = module.make_discriminator()
    module.make_discriminator = lambda: copy.deepcopy(built)
    return module


def test_a_run_leaves_a_picture_and_figures(example, tmp_path):
    example.main(["--out", str(tmp_path), "--steps", "1"])
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures) == {"low", "bicubic", "L1", "L1 + D"}
    assert all(math.isfinite(value) for row in figures.values() for value in row.values())


def test_the_crops_that_are_measured_are_not_trained_on(example, monkeypatch, tmp_path):
    """The middle of the picture is white, the rest black: the two never meet in a crop."""

    def photo(name):
        image = torch.full((3, 200, 300), -1.0)
        image[:, :, 102:198] = 1
        return image

    trained, measured = [], []
    draw = example.draw_crop
    monkeypatch.setattr(example, "load_photo", photo)
    monkeypatch.setattr(
        example, "draw_crop", lambda photos: trained.append(draw(photos)) or trained[-1]
    )
    monkeypatch.setattr(
        example, "measure", lambda judge, images, real: measured.append(real) or {"PSNR": 0.0}
    )
    example.main(["--out", str(tmp_path), "--steps", "2"])
    # twice by L1 alone, the first time for four times as long, and once with D
    assert len(trained) == (4 + 1 + 1) * 2
    assert all(bool((crop == -1).all()) for crop in trained)
    assert all(bool((real == 1).all()) for real in measured)


def test_a_discriminator_changes_what_is_learnt_and_the_start_stays(example):
    photos, start, ends = [example.load_photo("chelsea")], example.make_network(8, 2), []
    before = [param.detach().clone() for param in start.parameters()]
    for weight in (0.0, 0.1, 0.1, 1.0):
        torch.manual_seed(0)
        network = example.train(start, photos, 2, weight)
        ends.append(network(torch.ones(1, 3, 8, 8)))
    assert all(torch.equal(*pair) for pair in zip(start.parameters(), before, strict=True))
    assert not torch.equal(ends[0], ends[1])
    assert torch.equal(ends[1], ends[2])
    # the adversarial term itself, not only the matched features
    assert not torch.equal(ends[2], ends[3])


def test_every_patch_is_judged_and_its_pixels_hear_it(example):
    discriminator = example.make_discriminator()
    network = discriminator.backbone._frozen_network
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    images = torch.randn(2, 3, 96, 96, requires_grad=True)
    logits = discriminator(images)
    assert [tuple(level.shape[1:]) for level in logits] == [(1, 48, 48), (1, 24, 24), (1, 12, 12)]
    example.AdversarialLoss("hinge").generator(logits).backward()
    assert (images.grad.abs().sum(1) > 0).float().mean() > 0.99
    assert all(torch.equal(before[name], now) for name, now in network.state_dict().items())


def test_the_figures_know_better_from_worse(example):
    real = example.load_photo("chelsea")[None, :, 100:196, 100:196]
    small = example.resize(real, scale_factor=1 / 4)
    judge = example.make_discriminator().backbone
    good, bad = (
        example.measure(judge, images, real)
        for images in (0.9 * real, example.resize(small, scale_factor=4).clamp(-1, 1))
    )
    assert good["PSNR"] > bad["PSNR"]
    assert good[example.JUDGE] < bad[example.JUDGE]
    assert bad["detail"] < good["detail"] < 1
