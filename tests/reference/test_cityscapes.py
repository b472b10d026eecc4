"""Cityscapes' ids against the data set's own scripts."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
from official_folders import CITYSCAPES_IDS, blocks, cityscapes_instances, save, write_cityscapes
from support import assert_equal, assert_message

from dpsims.errors import DataError, InputError
from dpsims_reference.data.cityscapes import Cityscapes, cityscapes_spec


@pytest.fixture(scope="module")
def scripts():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from cityscapesscripts.helpers import annotation, labels
        from cityscapesscripts.preparation import json2instanceImg, json2labelImg
    return annotation, labels, json2labelImg, json2instanceImg


def test_classes_are_the_official_ids(scripts):
    spec, labels = cityscapes_spec(), scripts[1].labels
    assert len(labels) == spec.num_classes == 35
    for label in labels:
        number = 34 if label.id == -1 else label.id
        assert spec.names[number] == label.name
        assert spec.palette[number] == label.color
        assert spec.map_ids(np.array([[label.id]])).tolist() == [[number]]


def test_train_ids_are_refused():
    with pytest.raises(InputError, match="255"):
        cityscapes_spec().map_ids(np.array([[7, 255]]))


def _polygons(path):
    def box(label, x0, y0, x1, y1):
        return {"label": label, "polygon": [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]}

    content = {
        "imgHeight": 64,
        "imgWidth": 128,
        "objects": [
            box("road", 0, 32, 127, 63),
            box("sky", 0, 0, 127, 15),
            box("car", 10, 30, 50, 50),
            box("license plate", 20, 40, 26, 44),
            box("car", 60, 30, 80, 50),
            box("cargroup", 90, 30, 120, 50),
            box("person", 55, 20, 58, 60),
        ],
    }
    path.write_text(json.dumps(content), encoding="utf-8")


def test_maps_of_the_official_scripts_are_read(scripts, tmp_path):
    annotation, _, json2label, json2instance = scripts
    polygons, city = tmp_path / "a.json", "gtFine/train/ulm"
    _polygons(polygons)
    scene = annotation.Annotation()
    scene.fromJsonFile(str(polygons))
    stem = "ulm_000000_000019"
    ids = np.array(json2label.createLabelImage(scene, "ids"))
    objects = np.array(json2instance.createInstanceImage(scene, "ids"))
    save(tmp_path / f"{city}/{stem}_gtFine_labelIds.png", ids)
    save(tmp_path / f"{city}/{stem}_gtFine_instanceIds.png", objects.astype(np.uint16))
    save(
        tmp_path / f"leftImg8bit/train/ulm/{stem}_leftImg8bit.png",
        np.zeros((64, 128, 3), np.uint8),
    )
    data = Cityscapes(tmp_path, image_size=(64, 128), instances=True, partial=True)
    sample = data.view(0)
    assert data.name(0) == f"ulm/{stem}"
    assert_equal(sample.labels, torch.from_numpy(ids))
    # road, sky, car, person, unlabelled: the plate has the id of its car
    assert set(sample.labels.unique().tolist()) == {0, 7, 23, 26, 24}
    assert sample.labels[42, 23] == 26
    # two cars and a person; neither the group of cars nor anything else is an object
    assert sample.instances.unique().tolist() == [0, 24000, 26000, 26001]
    assert sample.instances[42, 23] == 26000
    assert sample.instances[40, 100] == 0
    assert sample.labels[40, 100] == 26


def test_instances_are_the_objects_and_travel_with_the_map(tmp_path):
    root = write_cityscapes(tmp_path)
    data = Cityscapes(root, image_size=(64, 128), instances=True, partial=True)
    for index in range(3):
        path = data.pair(index).labels
        seed = int(path.name.split("_")[1])
        ids = blocks(CITYSCAPES_IDS, height=64, width=128, seed=seed)
        objects = cityscapes_instances(ids).astype(np.int32)
        objects[objects < 1000] = 0
        wanted = torch.from_numpy(objects)
        assert_equal(data.view(index).instances, wanted)
        drawn = {
            turned
            for number in range(10)
            for turned in (False, True)
            if torch.equal(
                data.draw(index, torch.Generator().manual_seed(number)).instances,
                wanted.flip(-1) if turned else wanted,
            )
        }
        assert drawn == {False, True}


def test_instances_are_read_on_demand_only(tmp_path):
    root = write_cityscapes(tmp_path)
    gone = next(root.rglob("*_instanceIds.png"))
    gone.unlink()
    assert Cityscapes(root, partial=True).view(0).instances is None
    # the validation split has its own
    split = "train" if "train" in gone.parts else "heldout"
    with pytest.raises(DataError) as caught:
        Cityscapes(root, split=split, instances=True, partial=True)
    assert_message(caught.value, "1 files are missing", gone.name)


def test_instances_of_another_size_are_named(tmp_path):
    root = write_cityscapes(tmp_path, train=1)
    path = next((root / "gtFine/train").rglob("*_instanceIds.png"))
    save(path, np.zeros((8, 8), np.uint16))
    with pytest.raises(DataError) as caught:
        Cityscapes(root, instances=True, partial=True).view(0)
    assert_message(caught.value, path.name, "8 x 8", "64 x 128")


def test_a_city_without_maps_is_counted(tmp_path):
    import shutil

    root = write_cityscapes(tmp_path)
    shutil.rmtree(root / "gtFine/train/zurich")
    with pytest.raises(DataError) as caught:
        Cityscapes(root, partial=True)
    assert_message(caught.value, "1 files are missing", "zurich_000001_000019_gtFine_labelIds.png")
