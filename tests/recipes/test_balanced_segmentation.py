"""The recipe at tiny size: it writes what it says, and balanced means balanced."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

SCRIPT = Path(__file__).parents[2] / "examples" / "balanced_segmentation.py"


@pytest.fixture
def recipe():
    spec = importlib.util.spec_from_file_location("balanced_segmentation", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
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
    return images, labels


def test_it_writes_a_picture_and_figures(recipe, tmp_path):
    arguments = ["--out", str(tmp_path), "--steps", "2", "--scenes", "64"]
    recipe.main(arguments)
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "figures.json").read_text()
    figures = json.loads(text)
    assert set(figures["ways"]) == {"plain", "balanced"}
    for values in figures["ways"].values():
        assert all(math.isfinite(values[name]) for name in ("miou", "rare_miou", "pixel_accuracy"))
    recipe.main(arguments)
    assert (tmp_path / "figures.json").read_text() == text


def test_the_frozen_encoder_is_not_touched(recipe, data):
    torch.manual_seed(0)
    before = recipe.Segmenter()
    net = recipe.train(TensorDataset(*data), 3, 0, balanced=True)
    assert not any(name.startswith("backbone") for name, _ in net.named_parameters())
    old, new = before.backbone._frozen_network, net.backbone._frozen_network
    for name, tensor in old.state_dict().items():
        assert torch.equal(tensor, new.state_dict()[name]), name
    # both started alike, and the decoder has moved
    assert not torch.equal(before.decoder.head.weight, net.decoder.head.weight)


def test_balanced_training_sees_the_rare_image_more_often(recipe, data):
    shares = {}
    for balanced in (False, True):
        recorder = Recorder(*data)
        # the loss is not what this is about
        recipe.Segmenter = lambda: torch.nn.Sequential(torch.nn.Conv2d(3, recipe.K, 1))
        recipe.train(recorder, 50, 0, balanced=balanced)
        drawn = recorder.drawn[-50 * recipe.BATCH :]
        shares[balanced] = drawn.count(3) / len(drawn)
    # 1 of 20 images: weight sqrt(20) against 1, so 4.47 / (4.47 + 19) of the draws; four standard
    # deviations of 400 draws are below 0.08
    assert abs(shares[False] - 0.05) < 0.045
    assert abs(shares[True] - 0.19) < 0.08


def test_the_rare_pixels_count_as_much_as_the_others(recipe, data):
    """The gradient of the balanced loss is not ruled by the class that fills the map."""


def test_the_recipe_is_short():
    assert len(SCRIPT.read_text().splitlines()) <= 120
