from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from support import assert_equal, assert_message

from dpsims import LabelSpec
from dpsims.errors import DTypeError, InputError

IDS = st.integers(-(2**63), 2**63 - 1) | st.integers(0, 300)


@st.composite
def specs(draw, *, max_classes=12):
    num_classes = draw(st.integers(1, max_classes))
    ignore = draw(st.sampled_from([255, -1, 0, 1000]))
    classes = st.integers(0, num_classes - 1) | st.just(ignore)
    id_map = draw(st.none() | st.dictionaries(IDS, classes, min_size=1, max_size=20))
    text = st.text("aß €1", max_size=5)
    names = draw(st.none() | st.lists(text, min_size=num_classes, max_size=num_classes))
    byte = st.integers(0, 255)
    colors = st.lists(st.tuples(byte, byte, byte), min_size=num_classes, max_size=num_classes)
    palette = draw(st.none() | colors)
    return LabelSpec(num_classes, ignore_index=ignore, id_map=id_map, names=names, palette=palette)


@given(specs())
def test_dict_round_trip_through_json(spec):
    again = LabelSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert hash(again) == hash(spec)
    assert again.to_dict() == spec.to_dict()


@given(specs())
def test_pickle_deepcopy_and_replace_keep_the_spec(spec):
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert copy.deepcopy(spec) == spec
    assert dataclasses.replace(spec) == spec
    assert dataclasses.replace(spec, names=["x"] * spec.num_classes).names[0] == "x"


@given(specs(), st.data())
def test_map_ids_is_the_dictionary_pixel_by_pixel(spec, data):
    known = spec.id_map or {i: i for i in (*range(spec.num_classes), spec.ignore_index)}
    shape = data.draw(st.sampled_from([(), (5,), (2, 3), (2, 1, 4), (0, 3)]))
    count = int(np.prod(shape))
    ids = data.draw(st.lists(st.sampled_from(sorted(known)), min_size=count, max_size=count))
    expected = torch.tensor([known[i] for i in ids], dtype=torch.int64).reshape(shape)
    mapped = spec.map_ids(torch.tensor(ids, dtype=torch.int64).reshape(shape))
    assert mapped.dtype is (torch.uint8 if 0 <= spec.ignore_index <= 255 else torch.int64)
    assert_equal(mapped.long(), expected)
    assert_equal(spec.map_ids(np.array(ids, dtype=np.int64).reshape(shape)).long(), expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.uint32, np.int64])
def test_map_ids_takes_what_image_readers_give(dtype):
    ids = np.array([[7, 8], [0, 7]], dtype=dtype)
    ids.flags.writeable = False
    before = ids.copy()
    mapped = LabelSpec(2, id_map={7: 0, 8: 1, 0: 255}).map_ids(ids)
    assert mapped.tolist() == [[0, 1], [255, 0]]
    assert (ids == before).all()


def test_map_ids_reads_permuted_and_strided_maps():
    spec = LabelSpec(4, id_map={i: 3 - i for i in range(4)})
    ids = torch.arange(24).reshape(4, 6) % 4
    assert_equal(spec.map_ids(ids.t()), spec.map_ids(ids.t().contiguous()))
    assert_equal(spec.map_ids(ids[::2, 1::2]), spec.map_ids(ids[::2, 1::2].contiguous()))


def test_map_ids_far_apart_ids_do_not_need_a_table():
    spec = LabelSpec(3, id_map={-(2**63): 0, 5: 1, 2**63 - 1: 2})
    ids = torch.tensor([2**63 - 1, -(2**63), 5])
    assert spec.map_ids(ids).tolist() == [2, 0, 1]
    with pytest.raises(InputError, match=r"got \[0, 6\]"):
        spec.map_ids(torch.tensor([6, 0, 5]))


@pytest.mark.parametrize(
    ("spec", "ids", "parts"),
    [
        (LabelSpec(3), [[0, 7], [9, 7]], ["lie in [0, 3) or be 255", "id_map", "got [7, 9]"]),
        (LabelSpec(3), [-1, 3], ["got [-1, 3]"]),
        (LabelSpec(1, id_map={7: 0, 11: 255}), [9], ["keys of id_map", "255", "got [9]"]),
        (LabelSpec(2), list(range(2, 100)), ["(98 in all)"]),
    ],
    ids=["no-map", "just-outside", "hole-in-map", "many"],
)
def test_map_ids_lists_unknown_ids_and_the_cure(spec, ids, parts):
    with pytest.raises(InputError) as caught:
        spec.map_ids(torch.tensor(ids))
    assert_message(caught.value, "LabelSpec.map_ids: ids must", *parts)


@pytest.mark.parametrize(
    "ids",
    [torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.bool), np.zeros((2, 2)), [[0]], None],
    ids=["float", "bool", "float-array", "list", "none"],
)
def test_map_ids_refuses_what_is_no_map(ids):
    with pytest.raises(DTypeError, match=r"LabelSpec\.map_ids: ids must be .* integers; got"):
        LabelSpec(2).map_ids(ids)


@given(st.integers(1, 255))
def test_default_colors_depend_on_the_class_only(num_classes):
    assert LabelSpec(num_classes).palette == LabelSpec(255).palette[:num_classes]


def test_default_colors_are_well_separated():
    colors = torch.tensor([(0, 0, 0), *LabelSpec(255).palette], dtype=torch.float64)
    distance = torch.cdist(colors, colors) + 1e9 * torch.eye(256, dtype=torch.float64)
    # 256 random colours come within 5 of each other; an ideal packing of this cube is near 35
    assert distance.min() > 20
    # and the first twenty, the size of Cityscapes, far more
    assert distance[:21, :21].min() > 60


@given(specs(), st.data())
def test_colorize_is_the_palette_pixel_by_pixel(spec, data):
    ids = [*range(spec.num_classes), spec.ignore_index]
    flat = data.draw(st.lists(st.sampled_from(ids), min_size=12, max_size=12))
    labels = torch.tensor(flat).reshape(2, 2, 3)
    drawn = spec.colorize(labels)
    assert drawn.shape == (2, 3, 2, 3)
    assert drawn.dtype is torch.uint8
    assert drawn.is_contiguous()
    for position in np.ndindex(2, 2, 3):
        label = int(labels[position])
        expected = (0, 0, 0) if label == spec.ignore_index else spec.palette[label]
        image, row, column = position
        assert tuple(drawn[image, :, row, column].tolist()) == expected
    assert_equal(spec.colorize(labels[0]), drawn[0].permute(1, 2, 0))


def test_colorize_takes_what_map_ids_gives():
    spec = LabelSpec(2, palette=[(1, 2, 3), [4, 5, 6]])
    drawn = spec.colorize(spec.map_ids(np.array([[0, 1, 255]], dtype=np.uint8)))
    assert drawn.tolist() == [[[1, 2, 3], [4, 5, 6], [0, 0, 0]]]


@pytest.mark.parametrize(
    ("labels", "error", "parts"),
    [
        (torch.tensor([[0, 9]]), InputError, ["labels must be in [0, 2)", "got 9 at (0, 1)"]),
        (torch.zeros(2, dtype=torch.int64), InputError, ["(H, W) or (B, H, W)", "got (2,)"]),
        (torch.zeros(1, 1, 2, 2, dtype=torch.uint8), InputError, ["got (1, 1, 2, 2)"]),
        (torch.zeros(2, 2), DTypeError, ["integers", "torch.float32"]),
        (np.zeros((2, 2), dtype=np.uint8), DTypeError, ["torch.Tensor", "ndarray"]),
    ],
    ids=["out-of-range", "rank-1", "rank-4", "float", "array"],
)
def test_colorize_refuses(labels, error, parts):
    with pytest.raises(error) as caught:
        LabelSpec(2).colorize(labels)
    assert_message(caught.value, "LabelSpec.colorize: labels must", *parts)


@pytest.mark.parametrize(
    ("arguments", "error", "parts"),
    [
        ({"num_classes": 0}, InputError, ["num_classes", "at least 1", "got 0"]),
        ({"num_classes": True}, DTypeError, ["num_classes", "int", "bool"]),
        ({"num_classes": "3"}, DTypeError, ["num_classes", "int", "str"]),
        ({"num_classes": 10**12}, InputError, ["num_classes", "at most 65536"]),
        ({"num_classes": 256}, InputError, ["ignore_index", "class 255", "num_classes=256"]),
        ({"num_classes": 2, "ignore_index": 2**63}, InputError, ["ignore_index", "2**63"]),
        ({"num_classes": 2, "ignore_index": 0.0}, DTypeError, ["ignore_index", "int"]),
        ({"num_classes": 2, "id_map": [0, 1]}, DTypeError, ["id_map", "mapping", "list"]),
        ({"num_classes": 2, "id_map": {}}, InputError, ["id_map", "empty"]),
        ({"num_classes": 2, "id_map": {"a": 1}}, DTypeError, ["key of id_map", "'a'"]),
        ({"num_classes": 2, "id_map": {2**63: 1}}, InputError, ["id_map", "64-bit"]),
        ({"num_classes": 2, "id_map": {4: 2}}, InputError, ["id_map[4]", "[0, 2)", "got 2"]),
        ({"num_classes": 2, "id_map": {4: 1.0}}, DTypeError, ["id_map[4]", "1.0"]),
        ({"num_classes": 2, "names": "ab"}, DTypeError, ["names", "sequence", "str"]),
        ({"num_classes": 2, "names": ["a"]}, InputError, ["names", "num_classes=2", "got 1"]),
        ({"num_classes": 2, "names": ["a", 3]}, DTypeError, ["names[1]", "str", "int"]),
        ({"num_classes": 1, "palette": 3}, DTypeError, ["palette", "sequence"]),
        ({"num_classes": 1, "palette": []}, InputError, ["palette", "num_classes=1", "got 0"]),
        ({"num_classes": 1, "palette": [[0, 0]]}, InputError, ["palette[0]", "3 numbers"]),
        ({"num_classes": 1, "palette": [[0, 0, 256]]}, InputError, ["palette[0]", "255", "256"]),
        ({"num_classes": 1, "palette": [[0, 0, -1]]}, InputError, ["palette[0][2]", "got -1"]),
        ({"num_classes": 1, "palette": [[0, 0, 0.5]]}, DTypeError, ["palette[0][2]", "0.5"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_construction_refuses(arguments, error, parts):
    num_classes = arguments.pop("num_classes")
    with pytest.raises(error) as caught:
        LabelSpec(num_classes, **arguments)
    assert_message(caught.value, "LabelSpec: ", *parts)


def test_classes_beyond_255_work_with_another_ignored_id():
    spec = LabelSpec(300, ignore_index=-1)
    mapped = spec.map_ids(torch.tensor([[255, 299, -1]]))
    assert mapped.dtype is torch.int64
    assert mapped.tolist() == [[255, 299, -1]]


def test_spec_is_immutable_and_keeps_its_own_map():
    id_map = {3: 0}
    spec = LabelSpec(1, id_map=id_map)
    id_map[4] = 0
    assert spec.id_map == {3: 0}
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.num_classes = 2


@pytest.mark.parametrize(
    ("values", "error", "parts"),
    [
        ({"num_classes": 2, "colours": []}, InputError, ["no keys besides", "'colours'"]),
        ({"names": ["a"]}, InputError, ["num_classes", "got ['names']"]),
        ([2], DTypeError, ["values must be a mapping", "list"]),
        ({"num_classes": 2, "id_map": {"x": 0}}, InputError, ["id_map", "integers", "'x'"]),
    ],
    ids=["unknown-key", "missing-key", "no-mapping", "key-no-number"],
)
def test_from_dict_refuses(values, error, parts):
    with pytest.raises(error) as caught:
        LabelSpec.from_dict(values)
    assert_message(caught.value, "LabelSpec.from_dict: ", *parts)


TEXT = st.text("a1-", max_size=3)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-300, 300) | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from(["num_classes", "ignore_index", "id_map", "names", "palette", "x"]), JSON
    )
)
def test_from_dict_of_any_json_gives_a_spec_or_a_named_error(values):
    try:
        spec = LabelSpec.from_dict(values)
    except (InputError, DTypeError) as error:
        text = str(error)
    else:
        text = f"LabelSpec of {spec.num_classes}"
        assert spec.num_classes == values["num_classes"]
    assert text.startswith("LabelSpec")


def test_reading_and_drawing_leave_global_state_alone():
    state = torch.get_rng_state()
    spec = LabelSpec(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spec.colorize(spec.map_ids(torch.tensor([[0, 2, 255]])))
    assert_equal(torch.get_rng_state(), state)
