"""class_balance_weights: relations, a loop as oracle, several processes, bad inputs, vectors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st
from support import (
    Golden,
    assert_close64,
    assert_equal,
    assert_golden64,
    assert_message,
    golden_cases,
)

from dpsims.errors import DTypeError, InputError
from dpsims.losses.class_weights import class_balance_weights


@st.composite
def label_maps(draw):
    """Labels with absent classes and some, no or only ignored pixels; their number of classes."""
    sizes = st.integers(1, 9)
    shape = draw(st.tuples(st.integers(1, 4), sizes, sizes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    used, classes = draw(st.integers(1, 9)), draw(st.integers(9, 12))
    labels = torch.randint(used, shape, generator=generator)
    share = draw(st.sampled_from([0.0, 0.5, 1.0]))
    labels[torch.rand(shape, generator=generator) < share] = 255
    return labels, classes


def weigh(labels, classes, **options):
    return class_balance_weights(labels, classes, dtype=torch.float64, **options)


class TestRelations:
    @given(label_maps())
    def test_weights_of_all_pixels_sum_to_the_number_of_pixels(self, case):
        labels, classes = case
        weights = weigh(labels, classes)
        valid = labels[labels != 255]
        if len(valid):
            # all pixels, unlabelled ones included, and an equal share for each class present
            assert_close64(weights[valid].sum(), torch.tensor(float(labels.numel())).double())
            shares = [weights[valid[valid == c]].sum() for c in valid.unique()]
            assert_close64(torch.stack(shares), shares[0].expand(len(shares)))

    @given(label_maps())
    def test_absent_classes_weigh_zero_and_all_are_finite(self, case):
        labels, classes = case
        weights = class_balance_weights(labels, classes)
        assert weights.dtype == torch.float32
        assert weights.shape == (classes,)
        assert bool(weights.isfinite().all())
        present = torch.isin(torch.arange(classes), labels)
        assert_equal(weights > 0, present)
        assert bool((weights[~present] == 0).all())

    @given(label_maps())
    def test_repeating_the_batch_changes_nothing(self, case):
        labels, classes = case
        assert_close64(weigh(torch.cat([labels] * 3), classes), weigh(labels, classes))

    @given(label_maps(), st.randoms(use_true_random=False))
    def test_renaming_classes_renames_weights(self, case, random):
        labels, classes = case
        order = list(range(classes))
        random.shuffle(order)
        rank = torch.tensor(order).argsort()
        renamed = torch.where(labels == 255, 255, rank[labels.clamp(max=classes - 1)])
        assert_equal(weigh(renamed, classes), weigh(labels, classes)[order])

    @given(label_maps())
    def test_pixels_may_lie_anywhere(self, case):
        labels, classes = case
        expected = weigh(labels, classes)
        for view in (labels.mT, labels.flip(0, 2), labels.view(1, 1, -1)):
            assert_equal(weigh(view, classes), expected)

    @given(label_maps(), st.integers(0, 8))
    def test_an_ignored_class_is_as_good_as_255(self, case, chosen):
        labels, classes = case
        labels = torch.where(labels == 255, chosen, labels)
        masked = torch.where(labels == chosen, 255, labels)
        weights = weigh(labels, classes, ignore_index=chosen)
        assert weights[chosen] == 0
        assert_equal(weights, weigh(masked, classes))

    @given(label_maps(), st.sampled_from([torch.uint8, torch.int16, torch.int32]))
    def test_label_dtypes_agree(self, case, dtype):
        labels, classes = case
        assert_equal(weigh(labels.to(dtype), classes), weigh(labels, classes))

    @given(label_maps())
    def test_sync_without_a_group_changes_nothing(self, case):
        labels, classes = case
        assert_equal(weigh(labels, classes, sync=True), weigh(labels, classes))

    @given(label_maps())
    def test_oracle(self, case):
        labels, classes = case
        ids = labels.flatten().tolist()
        present = [c for c in range(classes) if c in ids]
        expected = [
            len(ids) / (len(present) * ids.count(c)) if c in present else 0.0
            for c in range(classes)
        ]
        assert_close64(weigh(labels, classes), torch.tensor(expected, dtype=torch.float64))


class TestUse:
    def test_no_label_is_all_zero(self):
        for labels in (torch.full((2, 3, 3), 255), torch.zeros(0, 3, 3, dtype=torch.uint8)):
            assert_equal(class_balance_weights(labels, 4), torch.zeros(4))

    def test_bad_ids_turn_all_weights_nan_where_they_cannot_raise(self):
        # under vmap, as on a GPU, values are not looked at
        labels = torch.zeros(3, 1, 2, 2, dtype=torch.long)
        labels[1, 0, 0, 0] = 4
        labels[2, 0, 0, 0] = -1
        weights = torch.func.vmap(lambda labels: class_balance_weights(labels, 4))(labels)
        assert weights.isnan().all(1).tolist() == [False, True, True]

    def test_input_is_left_alone(self):
        labels = torch.randint(4, (2, 3, 3))
        before = labels.clone()
        class_balance_weights(labels, 4, ignore_index=1)
        assert labels._version == 0
        assert_equal(labels, before)

    def test_meta(self):
        labels = torch.empty(2, 2**16, 2**16, dtype=torch.uint8, device="meta")
        weights = class_balance_weights(labels, 151)
        assert weights.is_meta
        assert weights.shape == (151,)

    def test_two_processes_equal_one(self, tmp_path):
        worker = Path(__file__).parent / "balance_worker.py"
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        processes = [
            subprocess.Popen(
                [sys.executable, "-W", "error", str(worker), str(rank), str(tmp_path / "store")],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(2)
        ]
        outputs = [process.communicate(timeout=120)[0] for process in processes]
        for process, output in zip(processes, outputs, strict=True):
            assert process.returncode == 0, output
            assert output == "all equal\n"


LABELS = torch.zeros(2, 3, 3, dtype=torch.long)
BAD = {
    "labels-list": ({"labels": [[0]]}, DTypeError, ["labels", "torch.Tensor", "list"]),
    "labels-float": ({"labels": LABELS.float()}, DTypeError, ["labels", "integer", "float32"]),
    "labels-bool": ({"labels": LABELS.bool()}, DTypeError, ["labels", "integer", "bool"]),
    "labels-rank": ({"labels": LABELS[:, None]}, InputError, ["(B, H, W)", "(2, 1, 3, 3)"]),
    "labels-empty": ({"labels": LABELS[:, :0]}, InputError, ["labels", "empty", "(2, 0, 3)"]),
    "label-is-k": ({"labels": LABELS + 4}, InputError, ["labels", "[0, 4)", "4 at (0, 0, 0)"]),
    "label-negative": ({"labels": LABELS - 1}, InputError, ["[0, 4)", "255", "-1 at"]),
    "label-255-counts": (
        {"labels": LABELS + 255, "ignore_index": None},
        InputError,
        ["labels", "[0, 4)", "255 at"],
    ),
    "classes-zero": ({"num_classes": 0}, InputError, ["num_classes", "at least 1", "0"]),
    "classes-bool": ({"num_classes": True}, DTypeError, ["num_classes", "int", "True"]),
    "ignore-str": ({"ignore_index": "255"}, DTypeError, ["ignore_index", "int", "'255'"]),
    "sync-int": ({"sync": 1}, DTypeError, ["sync", "bool", "int"]),
    "dtype-half": ({"dtype": torch.float16}, InputError, ["dtype", "float64", "float16"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    options, error, parts = BAD[case]
    with pytest.raises(error) as caught:
        class_balance_weights(**({"labels": LABELS, "num_classes": 4} | options))
    assert_message(caught.value, "class_balance_weights: ", *parts)


@pytest.mark.parametrize("case", golden_cases("a_class_balancing"))
def test_golden(case):
    golden = Golden(case)
    labels = golden.tensor("label")
    counts = golden.tensor("class_count")
    ignore_index = 0 if golden.options["contain_dontcare_label"] else None
    weights = weigh(labels, len(counts), ignore_index=ignore_index)
    assert_golden64(weights[labels], golden, "weight_map")
    # the peer divides by zero for a class that is absent and never reads the result
    expected = torch.where(counts > 0, golden.f64("coefficients"), 0.0)
    assert_close64(weights, expected)
