import json
import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from recipe_parts import load_recipe
from unit_run import unit_config

from dpsims_reference import Objective, TrainingStep, build_discriminator, build_generator
from dpsims_reference.batches import train_batches
from dpsims_reference.datasets import build_dataset

TERMS = {"d_real", "d_fake", "g_pixel", "g_contrastive", "g_diversity"}

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:accelerate.*")


@pytest.fixture(scope="module")
def example():
    return load_recipe("accelerate_loop")


def plain_losses(config, steps):
    """The reference step without accelerate."""
    torch.manual_seed(config.seed)
    generator, discriminator = build_generator(config), build_discriminator(config)
    objective = Objective(config, discriminator)
    step = TrainingStep(generator, discriminator, objective, config)
    batches = train_batches(build_dataset(config.data), config)
    found = [step(next(batches), number) for number in range(steps)]
    return [{name: float(value) for name, value in terms.items()} for terms in found]


def test_the_loop_is_the_reference_step(example):
    config = unit_config(reuse_fake=False, accumulate=2, batch_size=8)
    config = replace(config, objective=replace(config.objective, diversity_threshold=0.1))
    parallel = example.AccelerateParallel(Accelerator(cpu=True))
    _, losses = example.train(config, 2, build_dataset(config.data), parallel)
    assert losses == plain_losses(config, 2)
    assert set(losses[0]) == TERMS
    assert losses[0] != losses[1]


def test_the_run_leaves_a_picture_and_figures(example, tmp_path, monkeypatch):
    config = unit_config()
    monkeypatch.setattr(example, "preset", lambda name: config)
    example.main(["--out", str(tmp_path), "--steps", "2"])
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures) == TERMS
    assert all(math.isfinite(value) for row in figures.values() for value in row)
    with Image.open(tmp_path / "samples.png") as picture:
        # four crops of 32 pixels at twice the size, four rows
        assert picture.height > 4 * 64
        assert len(picture.getcolors(10**6)) > 100
