from __future__ import annotations

import logging
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from support import Golden, assert_equal, assert_message, golden_cases

from dpsims import image_sampling_weights
from dpsims.errors import DTypeError, InputError


@st.composite
def tables(draw, *, full=True):
    images, classes = draw(st.integers(1, 30)), draw(st.integers(1, 8))
    seed = draw(st.integers(0, 2**31))
    rng = np.random.default_rng(seed)
    table = rng.random((images, classes)) < rng.random(classes) ** 2
    if full:
        table[np.arange(images), rng.integers(0, classes, images)] = True
    return torch.from_numpy(table)


def weights_by_loops(table):
    """The paper's sentence, image by image; NaN where there is no class."""
    table = table.numpy()
    frequency = [table[:, k].sum() / len(table) for k in range(table.shape[1])]
    weights = []
    for row in table:
        present = [frequency[k] for k in np.flatnonzero(row)]
        weights.append(min(present) ** -0.5 if present else np.nan)
    return torch.tensor(weights, dtype=torch.float64)


@given(tables())
def test_equals_the_definition(table):
    weights = image_sampling_weights(table)
    assert weights.dtype is torch.float64
    # one division and one power in float64
    torch.testing.assert_close(weights, weights_by_loops(table), rtol=1e-14, atol=0)


@given(tables(full=False))
def test_equals_the_definition_with_images_left_out(table):
    expected = weights_by_loops(table)
    if expected.isnan().all():
        with pytest.raises(InputError, match="at least one class in one image"):
            image_sampling_weights(table, empty="drop")
        return
    weights = image_sampling_weights(table, empty="drop")
    torch.testing.assert_close(weights, expected.nan_to_num(0.0), rtol=1e-14, atol=0)


@given(tables())
def test_order_of_images_and_classes_does_not_matter(table):
    weights = image_sampling_weights(table)
    images, classes = torch.randperm(len(table)), torch.randperm(table.shape[1])
    assert_equal(image_sampling_weights(table[images]), weights[images])
    assert_equal(image_sampling_weights(table[:, classes]), weights)


@given(tables(), st.integers(2, 4))
def test_repeating_the_data_set_changes_no_weight(table, times):
    weights = image_sampling_weights(table)
    again = image_sampling_weights(table.repeat(times, 1))
    # n/m and (kn)/(km) are the same number in float64
    assert_equal(again, weights.repeat(times))


@given(st.integers(1, 20), st.integers(1, 5))
def test_equal_frequencies_are_uniform(repeats, classes):
    table = torch.eye(classes, dtype=torch.bool).repeat(repeats, 1)
    weights = image_sampling_weights(table)
    assert_equal(weights, weights[:1].expand_as(weights))


@given(tables())
def test_weights_are_at_least_one_and_one_for_what_is_everywhere(table):
    everywhere = torch.cat([torch.ones(len(table), 1, dtype=torch.bool), table[:, :0]], dim=1)
    assert image_sampling_weights(table).min() >= 1
    assert_equal(image_sampling_weights(everywhere), torch.ones(len(table)).double())


@given(tables(), st.sampled_from([torch.uint8, torch.int64, torch.float32, torch.float64]))
def test_counts_above_zero_are_presence(table, dtype):
    pixels = (table * torch.randint(1, 200, table.shape)).to(dtype)
    before = pixels.clone()
    assert_equal(image_sampling_weights(pixels), image_sampling_weights(table))
    assert_equal(pixels, before)


def test_strided_tables_give_the_same():
    table = torch.rand(8, 12) < 0.5
    table[0] = True
    table[:, 0] = True
    assert_equal(image_sampling_weights(table.t()), image_sampling_weights(table.t().contiguous()))


EMPTY = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)


def test_image_without_class_gets_the_weight_of_the_most_frequent_and_one_warning():
    with pytest.warns(UserWarning, match="2 images have no class") as caught:
        weights = image_sampling_weights(EMPTY)
    assert len(caught) == 1
    # class 0 is in three of five images, class 1 in one
    expected = torch.tensor([5.0, 5 / 3, 5 / 3, 5 / 3, 5 / 3], dtype=torch.float64) ** 0.5
    torch.testing.assert_close(weights, expected, rtol=1e-14, atol=0)


def test_image_without_class_can_be_dropped_or_refused():
    assert image_sampling_weights(EMPTY, empty="drop")[[2, 4]].tolist() == [0, 0]
    with pytest.raises(InputError) as caught:
        image_sampling_weights(EMPTY, empty="error")
    assert_message(caught.value, "presence", "a class in every image", "[2, 4]")
    with pytest.raises(InputError) as caught:
        image_sampling_weights(torch.eye(1, 30).T > 0, empty="error")
    assert_message(caught.value, "[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, ...] (29 in all)")


def test_class_in_no_image_is_logged_once_and_changes_nothing(caplog):
    table = torch.tensor([[True, False, True], [True, False, False]])
    with caplog.at_level(logging.WARNING, logger="dpsims"):
        weights = image_sampling_weights(table)
    assert [record.getMessage() for record in caplog.records] == [
        "image_sampling_weights: 1 classes occur in no image: [1]"
    ]
    assert_equal(weights, image_sampling_weights(table[:, [0, 2]]))


@pytest.mark.parametrize(
    ("presence", "error", "parts"),
    [
        ([[True]], DTypeError, ["torch.Tensor", "list"]),
        (np.ones((2, 2), dtype=bool), DTypeError, ["torch.Tensor", "ndarray"]),
        (torch.ones(2, 2, dtype=torch.complex64), DTypeError, ["real counts", "complex64"]),
        (torch.ones(3, dtype=torch.bool), InputError, ["(I, K)", "got (3,)"]),
        (torch.ones(0, 3, dtype=torch.bool), InputError, ["(I, K)", "got (0, 3)"]),
        (torch.ones(3, 0, dtype=torch.bool), InputError, ["(I, K)", "got (3, 0)"]),
        (torch.tensor([[1.0], [float("nan")]]), InputError, ["at least 0", "nan at (1, 0)"]),
        (torch.tensor([[1, 0], [2, -3]]), InputError, ["at least 0", "-3 at (1, 1)"]),
        (torch.zeros(2, 2, dtype=torch.bool), InputError, ["at least one class", "got none"]),
    ],
    ids=[
        "list",
        "array",
        "complex",
        "rank-1",
        "no-images",
        "no-classes",
        "nan",
        "negative",
        "no-class-anywhere",
    ],
)
def test_refuses(presence, error, parts):
    with pytest.raises(error) as caught:
        image_sampling_weights(presence)
    assert_message(caught.value, "image_sampling_weights: presence must", *parts)


def test_refuses_an_unknown_policy():
    with pytest.raises(InputError, match="empty must be one of 'most_frequent', 'error', 'drop'"):
        image_sampling_weights(torch.ones(1, 1, dtype=torch.bool), empty="uniform")


@pytest.mark.parametrize("case", golden_cases("j_balanced_sampler"))
def test_golden_probabilities(case):
    golden = Golden(case)
    table = golden.tensor("presence") > 0
    ignored = int(golden.tensor("ignore"))
    used = table.clone()
    if ignored >= 0:
        used[:, ignored] = False

    dropped = image_sampling_weights(used, empty="drop")
    # the files' own tolerance for float64
    close = {"rtol": 1e-12, "atol": 0}
    torch.testing.assert_close(dropped, golden.tensor("weight"), **close)
    torch.testing.assert_close(dropped / dropped.sum(), golden.tensor("p_zero"), **close)
    rate = (dropped / dropped.sum()) @ table.double()
    torch.testing.assert_close(rate, golden.tensor("expected_class_rate"), **close)
    everything = image_sampling_weights(table, empty="drop")
    torch.testing.assert_close(
        everything / everything.sum(), golden.tensor("p_with_ignore"), **close
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        kept = image_sampling_weights(used)
    # "p_min" gives images without a class the smallest weight of the other images. Ours is the
    # weight of the most frequent class: the same here, where some image holds no rarer class
    torch.testing.assert_close(kept / kept.sum(), golden.tensor("p_min"), **close)
