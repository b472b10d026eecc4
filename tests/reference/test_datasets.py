from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from support import assert_message
from unit_run import unit_config

from dpsims.errors import DataError, InputError
from dpsims_reference.datasets import build_dataset, build_splits


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
