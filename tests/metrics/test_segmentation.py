from __future__ import annotations

import copy
import math
import multiprocessing
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from support import assert_equal, assert_message
from torchmetrics.classification import MulticlassJaccardIndex

from dpsims.errors import DTypeError, InputError
from dpsims.metrics import SegmentationConsistency


@st.composite
def pairs(draw):
    """Number of classes, predictions, labels with ignored pixels; some classes absent."""
    num_classes = draw(st.integers(2, 7))
    shape = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    known = rng.choice(num_classes, draw(st.integers(1, num_classes)), replace=False)
    predicted, labels = rng.choice(known, shape), rng.choice(known, shape)
    labels[rng.random(shape) < 0.2] = 255
    labels[0, 0, 0] = known[0]
    return num_classes, torch.from_numpy(predicted), torch.from_numpy(labels)


def scored(num_classes, predicted, labels, **arguments):
    metric = SegmentationConsistency(num_classes, **arguments)
    metric.update(predicted, labels)
    return metric.compute()


def iou_by_sets(num_classes, predicted, labels):
    """One class after the other, as sets of pixels."""
    predicted = torch.where(labels == 255, -1, predicted)
    values = []
    for k in range(num_classes):
        union = int(((predicted == k) | (labels == k)).sum())
        both = int(((predicted == k) & (labels == k)).sum())
        values.append(both / union if union else math.nan)
    return torch.tensor(values, dtype=torch.float64)


@given(pairs())
def test_equals_the_definition(pair):
    predicted, labels = pair[1:]
    scores = scored(*pair)
    expected = iou_by_sets(*pair)
    assert_equal(scores.per_class_iou, expected)
    assert scores.classes_present == int((~expected.isnan()).sum())
    assert scores.miou == pytest.approx(expected.nanmean().item(), rel=1e-14)
    valid = labels != 255
    assert scores.pixel_accuracy == ((predicted == labels) & valid).sum() / valid.sum()


@given(pairs())
def test_equals_torchmetrics(pair):
    num_classes, predicted, labels = pair
    reference = MulticlassJaccardIndex(num_classes, average="macro", ignore_index=255)
    # torchmetrics divides in float32
    assert scored(*pair).miou == pytest.approx(float(reference(predicted, labels)), rel=1e-6)


@given(pairs())
def test_perfect_prediction_scores_one(pair):
    num_classes, predicted, labels = pair
    scores = scored(num_classes, torch.where(labels == 255, predicted, labels), labels)
    assert (scores.miou, scores.pixel_accuracy) == (1.0, 1.0)


@given(pairs())
def test_class_permutation_moves_classes_only(pair):
    num_classes, predicted, labels = pair
    order = torch.randperm(num_classes)
    renamed = torch.where(labels == 255, 255, order[labels.clamp(max=num_classes - 1)])
    first, second = scored(*pair), scored(num_classes, order[predicted], renamed)
    assert_equal(second.per_class_iou[order], first.per_class_iou)
    assert second.miou == pytest.approx(first.miou, rel=1e-14)


@given(pairs())
def test_ignored_pixels_do_not_count(pair):
    num_classes, predicted, labels = pair
    other = torch.where(labels == 255, (predicted + 1) % num_classes, predicted)
    assert_equal(scored(*pair).per_class_iou, scored(num_classes, other, labels).per_class_iou)


@given(pairs())
def test_batches_and_their_order_do_not_matter(pair):
    num_classes, predicted, labels = pair
    metric = SegmentationConsistency(num_classes)
    for image in reversed(range(len(labels))):
        metric.update(predicted[[image]], labels[[image]])
    metric.update(predicted[:0], labels[:0])
    assert_equal(metric.compute().per_class_iou, scored(*pair).per_class_iou)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_dtypes_and_strides_do_not_matter(dtype):
    predicted = torch.arange(24).reshape(2, 3, 4) % 3
    labels = torch.arange(24).reshape(2, 3, 4) % 5 % 3
    expected = scored(3, predicted, labels, ignore_index=100)
    turned = scored(3, predicted.to(dtype).mT, labels.to(dtype).mT, ignore_index=100)
    assert_equal(turned.per_class_iou, expected.per_class_iou)


def test_ignored_class_never_counts():
    predicted = torch.tensor([[[0, 1, 2, 2]]])
    labels = torch.tensor([[[0, 1, 2, 1]]])
    scores = scored(3, predicted, labels, ignore_index=0)
    assert_equal(scores.per_class_iou, torch.tensor([math.nan, 0.5, 0.5]).double())
    assert scores.classes_present == 2
    assert scores.pixel_accuracy == pytest.approx(2 / 3)


def test_counts_beyond_float32_stay_exact():
    metric = SegmentationConsistency(2)
    # one wrong pixel of 2^25: float32 counts would lose it
    metric.confusion.confmat = torch.tensor([[2**25, 1], [0, 2**40]])
    scores = metric.compute()
    assert scores.per_class_iou[0] == 2**25 / (2**25 + 1)
    assert scores.per_class_iou[1] == 2**40 / (2**40 + 1)


def test_reset_copy_and_pickle():
    predicted, labels = torch.tensor([[[0, 1]]]), torch.tensor([[[1, 1]]])
    metric = SegmentationConsistency(2)
    metric.update(predicted, labels)
    expected = metric.compute().miou
    assert copy.deepcopy(metric).compute().miou == expected
    assert pickle.loads(pickle.dumps(metric)).compute().miou == expected
    metric.reset()
    metric.update(labels, labels)
    assert metric.compute().miou == 1.0


def test_global_random_state_and_input_stay():
    predicted, labels = torch.tensor([[[0, 1]]]), torch.tensor([[[1, 255]]])
    state = torch.get_rng_state()
    scored(2, predicted, labels)
    assert_equal(torch.get_rng_state(), state)
    assert_equal(labels, torch.tensor([[[1, 255]]]))


MAP = torch.zeros(1, 2, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("predicted", "labels", "error", "parts"),
    [
        (MAP, None, DTypeError, ["labels", "NoneType"]),
        ([0], MAP, DTypeError, ["predicted", "list"]),
        (MAP.float(), MAP, DTypeError, ["predicted", "integer ids", "float32"]),
        (MAP, MAP[0], InputError, ["labels", "(B, H, W)", "got (2, 2)"]),
        (MAP, MAP.repeat(2, 1, 1), InputError, ["predicted", "(1, 2, 2) and (2, 2, 2)"]),
        (MAP, MAP + 7, InputError, ["labels", "[0, 3)", "255", "got 7 at (0, 0, 0)"]),
        (MAP - 1, MAP, InputError, ["predicted", "[0, 3)", "got -1"]),
        (MAP + 255, MAP, InputError, ["predicted", "[0, 3)", "got 255"]),
        (MAP, MAP.to("meta"), InputError, ["labels", "device cpu", "meta"]),
    ],
    ids=[
        "none",
        "list",
        "float",
        "rank-2",
        "other-shape",
        "label-out-of-range",
        "negative-prediction",
        "ignored-id-predicted",
        "other-device",
    ],
)
def test_update_refuses_and_collects_nothing(predicted, labels, error, parts):
    metric = SegmentationConsistency(3)
    with pytest.raises(error) as caught:
        metric.update(predicted, labels)
    assert_message(caught.value, "SegmentationConsistency.update: ", *parts)
    assert metric.confusion.confmat.sum() == 0


@pytest.mark.parametrize("updates", [0, 1], ids=["nothing-collected", "all-ignored"])
def test_compute_without_labelled_pixels_is_refused(updates):
    metric = SegmentationConsistency(3)
    for _ in range(updates):
        metric.update(MAP, MAP + 255)
    with pytest.raises(InputError, match="labels must have labelled pixels; got none"):
        metric.compute()


@pytest.mark.parametrize(
    ("arguments", "error", "part"),
    [
        ({"num_classes": 1}, InputError, "num_classes must be at least 2"),
        ({"num_classes": 3.0}, DTypeError, "num_classes must be an int"),
        ({"num_classes": 3, "ignore_index": None}, DTypeError, "ignore_index must be an int"),
    ],
    ids=["one-class", "float", "no-ignored-id"],
)
def test_construction_refuses(arguments, error, part):
    with pytest.raises(error, match=part):
        SegmentationConsistency(**arguments)


def _rank(rank, store, results):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    metric = SegmentationConsistency(3)
    if rank == 0:
        metric.update(torch.tensor([[[0, 1, 1, 2]]]), torch.tensor([[[0, 1, 2, 255]]]))
    results.put(metric.compute().per_class_iou.tolist())
    torch.distributed.destroy_process_group()


def test_two_processes_of_which_one_is_empty_equal_one(tmp_path):
    # forked: a new Python would import torch again
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [
        context.Process(target=_rank, args=(rank, tmp_path / "store", results))
        for rank in range(2)
    ]
    with warnings.catch_warnings():
        # Python 3.12 warns about forking a process with threads; these do not use them
        warnings.simplefilter("ignore", DeprecationWarning)
        for process in processes:
            process.start()
    try:
        values = [results.get(timeout=60) for _ in processes]
    finally:
        for process in processes:
            process.join(timeout=60)
            process.kill()
    assert values == [[1.0, 0.5, 0.0]] * 2
