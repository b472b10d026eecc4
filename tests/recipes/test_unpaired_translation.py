import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

from dpsims.nn.pretrained import state_sha256

EXAMPLE = Path(__file__).parents[2] / "examples" / "unpaired_translation.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("unpaired_translation", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def days(example):
    return example.stack_scenes(8, ["noon"])


def test_a_run_leaves_a_picture_and_figures(example, tmp_path, monkeypatch):
    monkeypatch.setattr(example, "SCENES", 8)
    monkeypatch.setattr(example, "UNSEEN", 8)
    example.main(["--out", str(tmp_path), "--steps", "2"])
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert all(math.isfinite(value) for row in figures.values() for value in row.values())
    # the two trainings start and end in different places
    assert len({row["Frechet"] for row in figures.values()}) == len(figures)


def test_training_is_deterministic_and_leaves_the_backbone_alone(example, days, monkeypatch):
    made = []

    class Watched(example.ConditionedBackbone):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(example, "ConditionedBackbone", Watched)
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        generator = example.Translator()
        example.train(generator, days.images, days.images.flip(3), 2, 1.0)
        states.append(generator.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    for backbone in made:
        assert state_sha256(backbone._frozen_network) == backbone.weights_sha256


def test_the_loss_is_lower_where_patches_stand_at_their_place(example, days):
    """Of an untrained encoder already: an image matches itself better than its mirror image."""
    torch.manual_seed(0)
    generator = example.Translator()
    contrast = example.PatchInfoNCE(example.CHANNELS, num_conv_blocks=0)
    with torch.no_grad():
        features = generator.encode(days.images)
        mirrored = generator.encode(days.images.flip(3))
        same = contrast(features, features, generator=torch.Generator().manual_seed(0))
        other = contrast(mirrored, features, generator=torch.Generator().manual_seed(0))
    assert len(features) == len(example.CHANNELS)
    assert other - same > 0.1


def test_the_example_is_short():
    assert len(EXAMPLE.read_text().splitlines()) <= 120
