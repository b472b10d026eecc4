import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "super_resolution.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("super_resolution", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_run_leaves_a_picture_and_figures_that_its_seed_decides(example, tmp_path, monkeypatch):
    monkeypatch.setattr(example, "BATCH", 2)
    monkeypatch.setattr(example, "PHOTOS", ("chelsea",))
    monkeypatch.setattr(example, "SHOWN", [0, 2])
    found = []
    for name in ("one", "two"):
        example.main(["--out", str(tmp_path / name), "--steps", "2", "--seed", "3"])
        assert (tmp_path / name / "samples.png").read_bytes().startswith(b"\x89PNG")
        found.append(json.loads((tmp_path / name / "figures.json").read_text()))
    assert found[0] == found[1]
    assert set(found[0]) == {"low", "bicubic", "L1", "L1 + adv."}
    assert all(math.isfinite(value) for row in found[0].values() for value in row.values())
    assert found[0]["L1"] != found[0]["L1 + adv."]


def test_the_crops_that_are_measured_are_not_trained_on(example, monkeypatch, tmp_path):
    """Left of the held-out edge everything is black, and so is every crop that is trained on."""

    def photo(name):
        image = torch.full((3, 200, 300), -1.0)
        image[:, :, -example.SIZE :] = 1
        return image

    trained, measured = [], []
    draw = example.draw_crop
    monkeypatch.setattr(example, "load_photo", photo)
    monkeypatch.setattr(example, "SHOWN", [0])
    monkeypatch.setattr(
        example, "draw_crop", lambda photos: trained.append(draw(photos)) or trained[-1]
    )
    monkeypatch.setattr(
        example, "measure", lambda images, real: measured.append(real) or {"PSNR": 0.0}
    )
    example.main(["--out", str(tmp_path), "--steps", "1"])
    assert all(bool((crop == -1).all()) for crop in trained)
    assert all(bool((real == 1).all()) for real in measured)
    assert len(trained) == 3 * example.BATCH


def test_a_discriminator_changes_what_is_learnt_and_the_start_stays(example):
    photos = [example.load_photo("chelsea")]
    start = example.make_network()
    before = [param.detach().clone() for param in start.parameters()]
    results = {}
    for weight in (0.0, 0.1):
        torch.manual_seed(0)
        results[weight] = example.train(start, photos, 2, weight)
    assert all(torch.equal(*pair) for pair in zip(start.parameters(), before, strict=True))
    pairs = zip(results[0.0].parameters(), results[0.1].parameters(), strict=True)
    assert any(not torch.equal(*pair) for pair in pairs)


def test_every_patch_is_judged_and_its_pixels_hear_it(example):
    discriminator = example.make_discriminator()
    before = discriminator.backbone.weights_sha256
    images = torch.randn(2, 3, 96, 96, requires_grad=True)
    logits = discriminator(images)
    assert [tuple(level.shape[1:]) for level in logits] == [(1, 48, 48), (1, 24, 24), (1, 12, 12)]
    example.AdversarialLoss("hinge").generator(logits).backward()
    assert (images.grad.abs().sum(1) > 0).float().mean() > 0.99
    assert example.make_discriminator().backbone.weights_sha256 == before


def test_the_figures_know_better_from_worse(example):
    real = example.load_photo("chelsea")[None, :, 100:196, 100:196]
    small = example.resize(real, scale_factor=1 / 4)
    good, bad = (
        example.measure(images, real)
        for images in (0.9 * real, example.resize(small, scale_factor=4).clamp(-1, 1))
    )
    assert good["PSNR"] > bad["PSNR"]
    assert good[example.JUDGE] < bad[example.JUDGE]
    assert bad["detail"] < good["detail"] < 1


def test_the_example_is_short():
    assert len(EXAMPLE.read_text().splitlines()) <= 120
