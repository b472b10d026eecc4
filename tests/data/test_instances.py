from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from support import Golden, assert_equal, assert_message, golden_cases

from dpsims import instance_offsets
from dpsims.errors import DTypeError, InputError

DTYPES = [torch.uint8, torch.int16, torch.int32, torch.int64]


@st.composite
def maps(draw, *, max_id=6):
    shape = tuple(draw(st.integers(1, high)) for high in (3, 6, 7))
    seed = draw(st.integers(0, 2**31))
    ids = torch.from_numpy(np.random.default_rng(seed).integers(0, max_id + 1, shape))
    return ids.to(draw(st.sampled_from(DTYPES)))


def offsets_by_loops(ids, background):
    """Pixels, in float64, one instance after the other."""
    ids = ids.numpy()
    offsets = np.zeros((len(ids), 2, *ids.shape[1:]))
    for image, plane in enumerate(ids):
        for number in np.unique(plane):
            if number == background:
                continue
            rows, columns = np.nonzero(plane == number)
            offsets[image, 0, rows, columns] = rows.mean() - rows
            offsets[image, 1, rows, columns] = columns.mean() - columns
    return torch.from_numpy(offsets)


@given(maps(), st.integers(0, 2))
def test_equals_the_definition(ids, background):
    actual = instance_offsets(ids, background=background, normalize=False)
    expected = offsets_by_loops(ids, background)
    assert actual.dtype is torch.float32
    # both are sums of small integers divided in float64: one rounding to float32 apart
    torch.testing.assert_close(actual, expected.float(), rtol=1e-7, atol=1e-15)


@given(maps())
def test_offsets_of_every_instance_sum_to_zero(ids):
    offsets = instance_offsets(ids, normalize=False).double()
    for image, plane in enumerate(ids):
        for number in plane.unique():
            total = offsets[image, :, plane == number].sum(dim=1)
            # at most 42 pixels, offsets below 7, each rounded to float32: 42 * 7 * 2^-24
            assert total.abs().max() < 2e-5


@given(maps())
def test_ids_are_names_only(ids):
    # spread far beyond the table: the sorted path must agree with the counted one
    renamed = torch.where(ids == 0, 0, ids.long() * 300_000_007 + 2**31)
    assert_equal(instance_offsets(renamed), instance_offsets(ids))
    assert_equal(instance_offsets(-renamed), instance_offsets(ids))


@given(maps())
def test_images_of_a_batch_are_independent(ids):
    together = instance_offsets(ids)
    apart = torch.cat([instance_offsets(one[None]) for one in ids])
    assert_equal(together, apart)


@given(maps())
def test_flip_moves_and_negates(ids):
    offsets = instance_offsets(ids, normalize=False)
    vertical = instance_offsets(ids.flip(1), normalize=False).flip(2)
    horizontal = instance_offsets(ids.flip(2), normalize=False).flip(3)
    # (n - 1) - mean is rounded otherwise than mean: one unit in the last place of float32
    close = {"rtol": 2e-7, "atol": 2e-6}
    torch.testing.assert_close(vertical[:, 0], -offsets[:, 0], **close)
    torch.testing.assert_close(vertical[:, 1], offsets[:, 1], **close)
    torch.testing.assert_close(horizontal[:, 0], offsets[:, 0], **close)
    torch.testing.assert_close(horizontal[:, 1], -offsets[:, 1], **close)


@given(maps())
def test_normalized_are_pixels_over_size_and_below_one(ids):
    pixels = instance_offsets(ids, normalize=False)
    size = torch.tensor([ids.shape[1], ids.shape[2]]).view(1, 2, 1, 1)
    fractions = instance_offsets(ids)
    torch.testing.assert_close(fractions, pixels / size, rtol=2e-7, atol=0)
    assert fractions.abs().max() < 1


def test_nothing_but_background_is_zero():
    assert_equal(instance_offsets(torch.full((2, 3, 4), 9), background=9), torch.zeros(2, 2, 3, 4))


def test_single_pixels_have_no_offset():
    ids = torch.arange(1, 13).view(1, 3, 4)
    assert_equal(instance_offsets(ids), torch.zeros(1, 2, 3, 4))


def test_large_map_keeps_exact_centers():
    # sums of column numbers pass 2^31; the mean of 0..8191 is exact in float32
    offsets = instance_offsets(torch.ones(1, 128, 8192, dtype=torch.uint8), normalize=False)
    assert_equal(offsets[0, 1, 0], 4095.5 - torch.arange(8192.0))


def test_empty_batch_gives_an_empty_batch():
    assert instance_offsets(torch.zeros(0, 3, 4, dtype=torch.int64)).shape == (0, 2, 3, 4)


def test_strides_do_not_matter_and_input_stays():
    ids = torch.arange(48).view(2, 4, 6) % 5
    before = ids.clone()
    transposed = ids.transpose(1, 2)
    assert_equal(instance_offsets(transposed), instance_offsets(transposed.contiguous()))
    expanded = ids[:1].expand(3, 4, 6)
    assert_equal(instance_offsets(expanded), instance_offsets(expanded.contiguous()))
    assert_equal(ids, before)


def test_runs_with_deterministic_algorithms():
    ids = torch.arange(48).view(2, 4, 6) % 5
    expected = instance_offsets(ids)
    torch.use_deterministic_algorithms(True)
    try:
        assert_equal(instance_offsets(ids), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("ids", "error", "parts"),
    [
        ([[1]], DTypeError, ["torch.Tensor", "list"]),
        (np.zeros((1, 2, 2), dtype=np.int64), DTypeError, ["torch.Tensor", "ndarray"]),
        (torch.zeros(2, 2, dtype=torch.int64), InputError, ["(B, H, W)", "got (2, 2)"]),
        (torch.zeros(1, 1, 2, 2, dtype=torch.int64), InputError, ["(B, H, W)"]),
        (torch.zeros(1, 0, 2, dtype=torch.int64), InputError, ["empty", "got (1, 0, 2)"]),
        (torch.zeros(1, 2, 2), DTypeError, ["integer ids", "torch.float32"]),
        (torch.zeros(1, 2, 2, dtype=torch.bool), DTypeError, ["integer ids", "torch.bool"]),
    ],
    ids=["list", "array", "rank-2", "rank-4", "no-pixels", "float", "bool"],
)
def test_refuses_what_is_no_map(ids, error, parts):
    with pytest.raises(error) as caught:
        instance_offsets(ids)
    assert_message(caught.value, "instance_offsets: instances must", *parts)


@pytest.mark.parametrize("background", [0.0, True, None])
def test_refuses_a_background_that_is_no_id(background):
    with pytest.raises(DTypeError, match="background must be an int"):
        instance_offsets(torch.zeros(1, 2, 2, dtype=torch.int64), background=background)


@pytest.mark.parametrize("case", golden_cases("i_center_offset"))
def test_golden_panoptic_deeplab(case):
    golden = Golden(case)
    instances = golden.tensor("instance")
    category = dict(
        zip(golden.tensor("seg_id").tolist(), golden.tensor("seg_category").tolist(), strict=True)
    )
    things = set(golden.tensor("thing_list").tolist())
    # the reference gives offsets to things only; stuff is background here
    stuff = [number for number, kind in category.items() if kind not in things]
    instances = torch.where(torch.isin(instances, torch.tensor(stuff).long()), 0, instances)
    offsets = instance_offsets(instances[None], normalize=False)[0]
    # the reference's own tolerance: it rounds to float32
    torch.testing.assert_close(offsets, golden.tensor("offset"), rtol=0, atol=1e-5)
    torch.testing.assert_close(-offsets, golden.tensor("offset_from_center"), rtol=0, atol=1e-5)
    assert_equal((instances != 0).long(), golden.tensor("foreground"))
