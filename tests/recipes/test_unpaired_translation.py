import json
import math

import pytest
import torch
from recipe_parts import load_recipe

from dpsims.nn.pretrained import state_sha256


@pytest.fixture(scope="module")
def example():
    return load_recipe("unpaired_translation")


@pytest.fixture(scope="module")
def days(example):
    return example.stack_scenes(4, ["noon"])


def test_a_run_leaves_a_picture_and_figures(example, tmp_path, monkeypatch, quick_report):
    monkeypatch.setattr(example, "SCENES", 4)
    monkeypatch.setattr(example, "UNSEEN", 4)
    example.main(["--out", str(tmp_path), "--steps", "1"])
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
        example.train(generator, days.images, days.images.flip(3), 1, 1.0)
        states.append(generator.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    for backbone in made:
        assert state_sha256(backbone._frozen_network) == backbone.weights_sha256


def test_output_and_input_are_compared_at_the_same_place(example, days, monkeypatch):
    """A generator that changes nothing has the same features on both sides, row by row."""
    seen = []

    class Watched(example.PatchInfoNCE):
        def forward(self, queries, keys, **kwargs):
            seen.append((queries, keys))
            return super().forward(queries, keys, **kwargs)

    class Unchanging(example.Translator):
        def forward(self, images):
            return images + 0 * super().forward(images)

    monkeypatch.setattr(example, "PatchInfoNCE", Watched)
    example.train(Unchanging(), days.images, days.images.flip(3), 1, 1.0)
    ((outputs, inputs),) = seen
    for output, source in zip(outputs, inputs, strict=True):
        torch.testing.assert_close(output, source)
        # only the output's side learns
        assert output.requires_grad
        assert not source.requires_grad


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
