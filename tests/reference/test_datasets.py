import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from official_folders import write_ade20k, write_cityscapes, write_coco_stuff
from PIL import Image
from support import assert_equal, assert_message
from unit_run import NUM_CLASSES, unit_config

from dpsims.data import LabelSpec
from dpsims.errors import DataError, InputError
from dpsims_reference.batches import train_batches
from dpsims_reference.config import OFFICIAL
from dpsims_reference.data.paired import PresenceScan
from dpsims_reference.datasets import build_dataset, build_splits
from dpsims_reference.discriminator import build_discriminator
from dpsims_reference.objective import Objective
from dpsims_reference.presets import preset

WRITERS = {
    "ade20k": write_ade20k,
    "coco_stuff": write_coco_stuff,
    "cityscapes": write_cityscapes,
}


def write_pairs(root, count=2):
    for kind in ("images", "labels"):
        (root / kind).mkdir(parents=True)
    for index in range(count):
        pixels = np.full((40, 40, 3), 60 * index, np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{index}.png")
        Image.fromarray(np.full((40, 40), index, np.uint8)).save(root / "labels" / f"{index}.png")


def folder_config(root, **changes):
    return replace(
        unit_config().data, name="folder", root=None if root is None else str(root), **changes
    )


def test_scenes_of_the_two_splits_differ():
    splits = build_splits(unit_config().data)
    assert splits["train"].fingerprint() != splits["heldout"].fingerprint()


def test_a_folder_without_heldout_has_one_split(tmp_path):
    write_pairs(tmp_path)
    assert set(build_splits(folder_config(tmp_path))) == {"train"}


def test_a_heldout_folder_is_the_second_split(tmp_path):
    write_pairs(tmp_path)
    write_pairs(tmp_path / "heldout", count=1)
    splits = build_splits(folder_config(tmp_path))
    assert {name: len(split) for name, split in splits.items()} == {"train": 2, "heldout": 1}


def test_a_folder_needs_a_root():
    with pytest.raises(InputError) as caught:
        build_dataset(folder_config(None))
    assert_message(caught.value, "data.root", "None")


def test_scenes_have_their_own_number_of_classes():
    with pytest.raises(InputError) as caught:
        build_dataset(replace(unit_config().data, num_classes=5))
    assert_message(caught.value, "data.num_classes", "12", "5")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError) as caught:
        build_dataset(folder_config(tmp_path / "nowhere"))
    assert_message(caught.value, "nowhere")


@pytest.mark.parametrize("name", OFFICIAL)
def test_presets_build_both_splits_of_the_official_data(tmp_path, name):
    root = WRITERS[name](tmp_path)
    config = replace(preset(name).data, root=str(root), partial=True)
    splits = build_splits(config)
    assert {split: len(part) for split, part in splits.items()} == {"train": 3, "heldout": 2}
    for part in splits.values():
        sample = part.view(0)
        assert sample.labels.shape == config.image_size
        assert (sample.instances is not None) == config.instances


@pytest.mark.parametrize("name", OFFICIAL)
def test_batches_are_uint8_and_do_not_depend_on_workers(tmp_path, name):
    root = WRITERS[name](tmp_path)
    config = preset(name)
    data = replace(config.data, root=str(root), partial=True, image_size=(32, 64))
    config = replace(config, data=data, optim=replace(config.optim, batch_size=3))
    dataset = build_dataset(config.data)
    batches = []
    for workers in (0, 2):
        part = replace(config, data=replace(config.data, workers=workers))
        batches.append(next(train_batches(dataset, part)))
    first, second = batches
    assert first.labels.dtype == torch.uint8
    assert first.labels.shape == (3, 32, 64)
    assert_equal(first.images, second.images)
    assert_equal(first.labels, second.labels)
    if config.data.instances:
        assert first.extra.shape == (3, 2, 32, 64)
        assert_equal(first.extra, second.extra)
    else:
        assert first.extra is None


def test_the_ignored_class_costs_nothing_where_it_is_real(tmp_path):
    config = preset("ade20k")
    tiny = unit_config()
    data = replace(
        config.data, root=str(write_ade20k(tmp_path)), partial=True, image_size=(32, 32)
    )
    config = replace(tiny, data=data)
    objective = Objective(config, build_discriminator(config))
    logits = torch.zeros(1, 152, 32, 32)
    unlabelled = torch.zeros(1, 32, 32, dtype=torch.uint8)
    fake_only = objective.pixel.discriminator_terms(logits, logits, unlabelled)
    assert float(fake_only.real) == 0
    assert float(fake_only.fake) > 0
    assert float(objective.pixel.generator(logits, unlabelled)) == 0


@pytest.mark.parametrize("name", OFFICIAL)
@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"root": None}, ["data.root", "the data set", "None"]),
        ({"num_classes": 19}, ["data.num_classes", "19"]),
        ({"ignore_index": 255}, ["data.ignore_index must be 0", "255"]),
    ],
    ids=["no-root", "classes", "ignored-id"],
)
def test_official_data_has_its_own_numbers(tmp_path, name, changes, parts):
    root = str(WRITERS[name](tmp_path))
    config = replace(preset(name).data, **{"root": root, "partial": True, **changes})
    with pytest.raises(InputError) as caught:
        build_dataset(config)
    assert_message(caught.value, *parts)


def test_ade20k_has_no_instances(tmp_path):
    data = replace(preset("ade20k").data, root=str(write_ade20k(tmp_path)), instances=True)
    with pytest.raises(InputError) as caught:
        build_dataset(data)
    assert_message(caught.value, "data.instances", "ADE20K has none")


def test_a_folder_keeps_its_scan_too(tmp_path):
    write_pairs(tmp_path / "data")
    scan = PresenceScan(tmp_path / "run" / "presence")
    build_dataset(folder_config(tmp_path / "data"), scan=scan).presence()
    assert (tmp_path / "run" / "presence").is_file()


def test_the_ignored_id_of_labels_json_must_be_the_configurations(tmp_path):
    write_pairs(tmp_path)
    spec = LabelSpec(NUM_CLASSES, ignore_index=0)
    (tmp_path / "labels.json").write_text(json.dumps(spec.to_dict()), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        build_dataset(folder_config(tmp_path))
    assert_message(caught.value, "data.ignore_index must be 0", "255")
    assert len(build_dataset(folder_config(tmp_path, ignore_index=0))) == 2
