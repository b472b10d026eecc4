"""The recipe at tiny size: it writes what it says, and balanced means balanced."""

import json

import pytest
import torch
from recipe_parts import load_recipe
from torch.utils.data import TensorDataset


@pytest.fixture
def recipe():
    script = load_recipe("balanced_segmentation")
    script.SIZE = (32, 64)
    return script


class Recorder(TensorDataset):
    """Remembers which items were asked for."""

    def __init__(self, *tensors):
        super().__init__(*tensors)
        self.drawn = []

    def __getitem__(self, index):
        self.drawn.append(index)
        return super().__getitem__(index)


@pytest.fixture
def data():
    """Nineteen maps of one class and one that also holds class 9."""
    images = torch.rand(20, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    labels = torch.zeros(20, 32, 32, dtype=torch.uint8)
    labels[3, :4, :4] = 9
    return Recorder(images, labels)


class OneLayer(torch.nn.Module):
    """Stands for the segmenter where it should be fast."""

    def __init__(self):
        super().__init__()
        self.decoder = torch.nn.Conv2d(3, 12, 1)
        # from where few steps lead to the answer, whatever the seed
        torch.nn.init.zeros_(self.decoder.weight)
        torch.nn.init.zeros_(self.decoder.bias)

    def forward(self, images):
        return 10 * self.decoder(images)


def test_it_writes_a_picture_and_figures(recipe, tmp_path):
    recipe.SegmentationNet = OneLayer
    recipe.main(["--out", str(tmp_path), "--steps", "2", "--scenes", "80"])
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads((tmp_path / "figures.json").read_text())
    for way in ("plain", "balanced"):
        assert set(figures[way]) == {"miou", "rare_miou", "pixel_accuracy"}
        assert all(0 <= value <= 1 for value in figures[way].values())
        assert len(figures["iou"][way]) == recipe.K
    # a third of the classes is marked
    assert sum(name.endswith("*") for name in figures["iou"]["plain"]) == recipe.K // 3


def test_the_encoder_is_left_alone(recipe, data):
    torch.manual_seed(0)
    before, net = recipe.SegmentationNet(), recipe.train(data, 2, 0, balanced=True)
    old, new = before.backbone._frozen_network, net.backbone._frozen_network
    for name, tensor in old.state_dict().items():
        assert torch.equal(tensor, new.state_dict()[name]), name
    # both started alike, and only the decoder has moved
    assert not torch.equal(before.decoder.head.weight, net.decoder.head.weight)


@pytest.mark.parametrize("balanced", [False, True])
def test_training_is_a_function_of_the_seed(recipe, data, balanced):
    recipe.SegmentationNet = OneLayer
    nets = [recipe.train(data, 3, seed, balanced=balanced) for seed in (0, 0, 1)]
    weights = [net.decoder.weight for net in nets]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_balanced_training_sees_the_rare_image_more_often(recipe, data):
    # what is learnt is not what this is about
    recipe.SegmentationNet = OneLayer
    shares = {}
    for balanced in (False, True):
        data.drawn.clear()
        recipe.train(data, 50, 0, balanced=balanced)
        drawn = data.drawn[-50 * recipe.BATCH :]
        shares[balanced] = drawn.count(3) / len(drawn)
    # 1 of 20 images has the class: weight sqrt(20) against 1, so 4.47 / (4.47 + 19) of the draws.
    # Four standard deviations of 400 draws are 0.044 and 0.08
    assert abs(shares[False] - 0.05) < 0.044
    assert abs(shares[True] - 0.19) < 0.08


@pytest.mark.parametrize("balanced", [False, True])
def test_images_and_maps_stay_together(recipe, balanced):
    """The class is the brightness. Where half of the maps are mirrored alone, nothing is sure."""
    recipe.SegmentationNet = OneLayer
    labels = torch.zeros(8, 8, 8, dtype=torch.uint8)
    labels[..., 4:] = 9
    images = torch.where(labels == 9, 1.0, -1.0)[:, None].repeat(1, 3, 1, 1)
    net = recipe.train(TensorDataset(images, labels), 300, 0, balanced=balanced)
    right = net(images).softmax(1).gather(1, labels[:, None].long())
    assert right.min() > 0.65
