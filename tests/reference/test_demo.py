import json

import numpy as np
import pytest
import torch
from PIL import Image
from support import assert_equal
from unit_run import unit_config

from dpsims_reference.checkpoints import CheckpointStore
from dpsims_reference.data.photos import PhotoCrops
from dpsims_reference.datasets import build_dataset
from dpsims_reference.demo import clear, edited_maps, fitting_steps, run_demo
from dpsims_reference.evaluation import Evaluator, format_figures
from dpsims_reference.generator import build_generator
from dpsims_reference.presets import preset

NUM_IMAGES = 4


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The whole demo, two steps long, in a folder that held another one."""
    out = tmp_path_factory.mktemp("demo")
    (out / "checkpoints" / "step-00000001").mkdir(parents=True)
    (out / "checkpoints" / "step-00000001" / "state.json").write_text("{}")
    (out / "mine.txt").write_text("keep")
    run_demo(out, steps=2, num_images=NUM_IMAGES)
    return out


def test_everything_it_promises_is_there(demo):
    with Image.open(demo / "grid.png") as picture:
        grid = np.asarray(picture)
    # six rows of nine cells of 64 pixels, shown twice as large
    assert grid.shape[0] > 6 * 128
    assert grid.shape[1] > 9 * 128
    with Image.open(demo / "curves.png") as picture:
        assert picture.size[0] > 400
    assert CheckpointStore.read_latest(demo / "checkpoints").step == 2
    assert "| figure |" in (demo / "figures.md").read_text("utf-8")
    assert (demo / "mine.txt").read_text() == "keep"


def test_figures_stand_beside_floor_and_ceiling(demo):
    record = json.loads((demo / "figures.json").read_text())
    assert record["steps"] == 2
    for moment in ("start", "end"):
        for split in ("train", "heldout"):
            figures = record[moment][split]
            assert figures["frechet"] > figures["frechet_floor"] > 0
            assert 0 <= figures["miou"] <= 1
            # an untrained generator is far below what real crops reach
            assert figures["pixel_accuracy"] < figures["pixel_accuracy_ceiling"]
    # closed gates: at the start no noise reaches the image
    assert record["start"]["train"]["noise_difference"] == 0


def test_steps_are_chosen_to_fit_the_time():
    config = unit_config()
    dataset = build_dataset(config.data)
    few, many = (fitting_steps(config, dataset, seconds) for seconds in (0.0, 1e6))
    assert (few, many) == (1, 3000)
    assert 1 < fitting_steps(config, dataset, 5.0) < 3000


@pytest.fixture(scope="module")
def evaluator():
    config = preset("tiny")
    train = PhotoCrops(("china",))
    return Evaluator(
        config,
        num_images=NUM_IMAGES,
        datasets={"train": train, "heldout": train.part("heldout")},
    )


def test_real_images_score_the_ceiling(evaluator):
    batch = evaluator.references["train"].batch
    score = evaluator._consistency(batch.images, batch.labels)
    assert score == evaluator.references["train"].ceiling
    assert score["pixel_accuracy"] > 0.8


def test_measuring_twice_gives_the_same_and_leaves_the_generator_alone(evaluator):
    generator = build_generator(preset("tiny")).eval()
    before = {k: v.clone() for k, v in generator.state_dict().items()}
    first, second = evaluator.measure(generator), evaluator.measure(generator)
    assert first == second
    for key, value in generator.state_dict().items():
        assert_equal(value, before[key])
    table = format_figures(first, second, names=("start", "end"))
    assert "not FID" in table
    assert table.count("\n") >= 9


def test_edited_maps_are_new_and_hold_known_classes():
    first = torch.full((16, 16), 2, dtype=torch.uint8)
    second = torch.arange(16, dtype=torch.uint8).repeat(16, 1) // 4
    disc, mirrored = edited_maps([first, second])
    assert set(disc.unique().tolist()) <= {0, 1, 2, 3}
    assert (disc != second).any()
    assert_equal(mirrored, mirrored.flip(1))
    assert_equal(mirrored[:, :8], second[:, :8])


def test_clearing_removes_a_run_and_nothing_else(tmp_path):
    (tmp_path / "checkpoints" / "step-00000003").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000003" / "state.json").write_text("{}")
    (tmp_path / "log.jsonl").write_text("{}")
    (tmp_path / "notes.md").write_text("mine")
    clear(tmp_path)
    assert not (tmp_path / "checkpoints" / "step-00000003").exists()
    assert not (tmp_path / "log.jsonl").exists()
    assert (tmp_path / "notes.md").exists()
