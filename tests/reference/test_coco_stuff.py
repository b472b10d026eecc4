"""COCO-Stuff's ids, and objects painted from outlines."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from official_folders import coco_annotations, write_coco_stuff, write_instances
from support import assert_equal, assert_message

from dpsims.errors import DataError, InputError
from dpsims_reference.batches import collate
from dpsims_reference.data.coco_objects import CocoObjects
from dpsims_reference.data.coco_stuff import COCOStuff, coco_stuff_spec


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_coco_stuff(tmp_path_factory.mktemp("coco"))


def dataset(root, **options):
    return COCOStuff(root, **{"instances": True, "partial": True, **options})


def test_classes_are_categories():
    spec = coco_stuff_spec()
    ids = torch.tensor([[0, 16, 90, 91, 181, 255]])
    assert_equal(spec.map_ids(ids), torch.tensor([[1, 17, 91, 92, 182, 0]], dtype=torch.uint8))
    # COCO's categories, and the first and the last of stuff
    known = {0: "unlabeled", 1: "person", 3: "car", 18: "dog", 90: "toothbrush", 92: "banner"}
    known |= {157: "sky-other", 169: "tree", 182: "wood"}
    assert {number: spec.names[number] for number in known} == known
    with pytest.raises(InputError, match="182"):
        spec.map_ids(np.array([[182]]))


def test_objects_are_painted_where_the_map_agrees(root):
    data = dataset(root, image_size=(96, 128))
    for index in range(3):
        sample = data.view(index)
        assert sample.instances.dtype == torch.int32
        left = torch.arange(128) < 64
        person, dog = sample.labels == 1, sample.labels == 18
        # the dog is the largest, so it is the first; then the persons, in their order
        wanted = torch.where(dog, 1, 0)
        wanted = torch.where(person, torch.where(left, 2, 3), wanted).int()
        assert_equal(sample.instances, wanted)


def test_offsets_come_from_the_cut_sample(root):
    data = dataset(root, image_size=(32, 48))
    sample = data.draw(0, torch.Generator().manual_seed(4))
    batch = collate([sample], instances=True)
    assert batch.labels.dtype == torch.uint8
    assert batch.extra.shape == (1, 2, 32, 48)
    assert (batch.extra[0][:, sample.instances == 0] == 0).all()
    for number in sample.instances.unique()[1:]:
        rows, cols = (sample.instances == number).nonzero().double().T
        found = batch.extra[0, :, sample.instances == number].double()
        wanted = torch.stack([(rows.mean() - rows) / 32, (cols.mean() - cols) / 48])
        # float32 against float64
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_instances_are_read_on_demand_only(root, tmp_path):
    copy = shutil.copytree(root, tmp_path / "coco")
    shutil.rmtree(copy / "annotations")
    assert dataset(copy, instances=False).view(0).instances is None
    with pytest.raises(DataError) as caught:
        dataset(copy)
    assert_message(caught.value, "instances_train2017.json", "no such file", "cocodataset.org")
    assert dataset(root).fingerprint() != dataset(root, instances=False).fingerprint()


def test_a_name_that_is_no_number_is_refused(tmp_path):
    root = write_coco_stuff(tmp_path, train=1)
    for path in (root / "train2017", root / "stuffthingmaps/train2017"):
        only = next(path.iterdir())
        only.rename(only.with_stem("picture"))
    with pytest.raises(DataError) as caught:
        dataset(root).view(0)
    assert_message(caught.value, "picture.jpg", "number")


# outlines


def objects(tmp_path, annotations):
    write_instances(tmp_path, "val2017", annotations)
    return CocoObjects(tmp_path / "annotations" / "instances_val2017.json")


def record(rings, *, category=1, number=7, iscrowd=0):
    return {
        "id": 1,
        "image_id": number,
        "category_id": category,
        "segmentation": rings,
        "iscrowd": iscrowd,
    }


def inside_by_loops(ring, height, width):
    """Even-odd rule for every pixel's centre, one edge after the other."""
    found = np.zeros((height, width), bool)
    points = np.float32(ring).reshape(-1, 2).astype(float).tolist()
    for row in range(height):
        for col in range(width):
            x, y = col + 0.5, row + 0.5
            for (x0, y0), (x1, y1) in zip(points, [*points[1:], points[0]], strict=True):
                if (y0 > y) != (y1 > y) and x >= x0 + (y - y0) * (x1 - x0) / (y1 - y0):
                    found[row, col] ^= True
    return found


coordinates = st.floats(-3, 15).map(lambda value: round(value, 2)) | st.integers(-3, 15)
rings = st.lists(coordinates, min_size=6, max_size=16).map(lambda ring: ring[: len(ring) // 2 * 2])


@given(st.lists(rings, min_size=1, max_size=3))
def test_pixels_are_those_whose_centre_is_inside(tmp_path_factory, outline):
    found = objects(tmp_path_factory.mktemp("rings"), [record(outline)])
    labels = np.ones((9, 12), np.uint8)
    wanted = np.any([inside_by_loops(ring, 9, 12) for ring in outline], axis=0)
    assert (found.paint(7, labels) == wanted).all()


def test_smaller_objects_lie_over_larger_ones(tmp_path):
    big, small = [0, 0, 10, 0, 10, 10, 0, 10], [2, 2, 4, 2, 4, 4, 2, 4]
    for order in ([big, small], [small, big]):
        found = objects(tmp_path, [record([ring]) for ring in order])
        ids = found.paint(7, np.ones((10, 10), np.uint8))
        assert (ids[2:4, 2:4] == 2).all()
        assert (ids == 1).sum() == 96


def test_other_images_crowds_and_lines_have_no_objects(tmp_path):
    line = [0, 0, 5, 5]
    crowd = {"counts": [0, 100], "size": [10, 10]}
    other = record([[0, 0, 9, 0, 9, 9]], number=8)
    found = objects(tmp_path, [record([line]), record(crowd, iscrowd=1), other])
    labels = np.ones((10, 10), np.uint8)
    assert found.paint(7, labels).max() == 0
    assert found.paint(9, labels).max() == 0
    assert found.paint(8, labels).max() == 1
    assert objects(tmp_path, []).paint(8, labels).max() == 0


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{",
        b"\xff\xfe",
        b'{"images": []}',
        b'{"annotations": 3}',
        b'{"annotations": [{"id": 3}]}',
        b"[" * 100_000,
        json.dumps({"annotations": [record([[0, 0, 9, 0, 9, 9]], number=2**70)]}).encode(),
        json.dumps({"annotations": [{"segmentation": [[1, 2, 3]], "iscrowd": 0}]}).encode(),
        json.dumps({"annotations": [record([[1, 2, 3, 4, 5]])]}).encode(),
        json.dumps({"annotations": [record([[1, 2, 3, 4, 5, "a"]])]}).encode(),
        json.dumps({"annotations": [record([[1, 2, 3, 4, 5, float("nan")]])]}).encode(),
        json.dumps({"annotations": [record({"counts": [1], "size": [1, 1]})]}).encode(),
        json.dumps({"annotations": [record(None)]}).encode(),
    ],
    ids=[
        "empty",
        "list",
        "torn",
        "no-text",
        "no-annotations",
        "number",
        "no-outline",
        "deep",
        "huge",
        "no-image",
        "odd",
        "letters",
        "nan",
        "mask",
        "null",
    ],
)
def test_damaged_files_are_named(tmp_path, content):
    path = tmp_path / "instances_train2017.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        CocoObjects(path)
    assert_message(caught.value, "instances_train2017.json", "not a readable file of COCO")


def test_annotations_of_the_small_copy_are_in_cocos_form():
    fields = {"id", "image_id", "category_id", "segmentation", "iscrowd", "area", "bbox"}
    for annotation in coco_annotations(9, np.zeros((4, 6), np.uint8)):
        assert set(annotation) == fields
