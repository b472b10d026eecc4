"""The argument checks themselves: every rule, its words, and that they trace."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dpsims._checks import (
    check_bool,
    check_choice,
    check_generator,
    check_int,
    check_ints,
    check_label_values,
    check_number,
    check_tensor,
    invalid_labels,
    values_are_readable,
)
from dpsims._levels import check_levels
from dpsims.errors import DTypeError, InputError

IMAGES = torch.zeros(2, 3, 4, 5)


def assert_refused(error, message, check, *args, **options):
    with pytest.raises(error) as caught:
        check("part", "thing", *args, **options)
    assert str(caught.value) == f"part: thing must {message}"


# --- tensors


@pytest.mark.parametrize(
    ("value", "layout", "options"),
    [
        (IMAGES, "B C H W", {}),
        (IMAGES, "B C H W", {"B": 2, "C": 3, "H": 4, "W": 5}),
        (IMAGES[:0], "B C H W", {"C": 3}),
        (IMAGES.double(), "B C H W", {"like": IMAGES}),
        (IMAGES.bfloat16(), "B C H W", {"kind": "floating"}),
        (torch.ones(2, dtype=torch.bool), "N", {"kind": "bool"}),
        (torch.ones(2, dtype=torch.complex64), "N", {"kind": "any"}),
        (torch.tensor(1.0), "", {}),
    ],
)
def test_fitting_tensors_pass(value, layout, options):
    assert check_tensor("part", "thing", value, layout, **options) is None


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_ids_come_in_four_dtypes(dtype):
    assert check_tensor("part", "thing", IMAGES.to(dtype), "B C H W", kind="integer") is None


@pytest.mark.parametrize(
    ("value", "error", "message", "options"),
    [
        ([1.0], DTypeError, "be a torch.Tensor; got list", {}),
        (None, DTypeError, "be a torch.Tensor; got NoneType", {}),
        (IMAGES[0], InputError, "have shape (B, C, H, W); got (3, 4, 5)", {}),
        (IMAGES, InputError, "have shape (B, C=2, H, W); got (2, 3, 4, 5)", {"C": 2}),
        # an empty batch is a batch, but not one of two
        (IMAGES[:0], InputError, "have shape (B=2, C, H, W); got (0, 3, 4, 5)", {"B": 2}),
        (
            IMAGES[:, :, :0],
            InputError,
            "have shape (B, C, H, W) (axes must not be empty); got (2, 3, 0, 5)",
            {},
        ),
        (IMAGES.int(), DTypeError, "have a floating-point dtype; got torch.int32", {}),
        (
            IMAGES.to(torch.complex64),
            DTypeError,
            "have a floating-point dtype; got torch.complex64",
            {},
        ),
        (
            IMAGES,
            DTypeError,
            "hold integer ids (uint8, int16, int32 or int64); got torch.float32",
            {"kind": "integer"},
        ),
        (
            IMAGES.to(torch.int8),
            DTypeError,
            "hold integer ids (uint8, int16, int32 or int64); got torch.int8",
            {"kind": "integer"},
        ),
        (IMAGES, DTypeError, "have dtype bool; got torch.float32", {"kind": "bool"}),
        (IMAGES.to_sparse(), InputError, "be a dense tensor; got layout torch.sparse_coo", {}),
        (IMAGES.to("meta"), InputError, "be on device cpu; got meta", {"like": IMAGES}),
    ],
)
def test_other_tensors_are_refused(value, error, message, options):
    assert_refused(error, message, check_tensor, value, "B C H W", **options)


def test_one_axis_is_written_as_a_tuple():
    assert_refused(InputError, "have shape (N,); got (1, 2)", check_tensor, torch.zeros(1, 2), "N")


@pytest.mark.parametrize("layout", ["N D", "I K", "S B C H W"])
def test_the_hint_about_empty_axes_includes_the_first_one(layout):
    shape = [0, *[2] * (len(layout.split()) - 1)]
    message = (
        f"have shape ({layout.replace(' ', ', ')}) (axes must not be empty); got {tuple(shape)}"
    )
    assert_refused(InputError, message, check_tensor, torch.zeros(shape), layout)


# --- numbers


@pytest.mark.parametrize(("value", "minimum"), [(1, 1), (0, 0), (-5, None), (2**70, 1)])
def test_ints_in_range_pass(value, minimum):
    assert check_int("part", "thing", value, minimum=minimum) is None


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (True, DTypeError, "be an int; got True (bool)"),
        (1.0, DTypeError, "be an int; got 1.0 (float)"),
        ("3", DTypeError, "be an int; got '3' (str)"),
        (None, DTypeError, "be an int; got None (NoneType)"),
        (0, InputError, "be at least 1; got 0"),
        (-7, InputError, "be at least 1; got -7"),
    ],
)
def test_other_ints_are_refused(value, error, message):
    assert_refused(error, message, check_int, value)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (3, DTypeError, "be a sequence of ints; got int"),
        ("12", DTypeError, "be a sequence of ints; got str"),
        ({1: 2}, DTypeError, "be a sequence of ints; got dict"),
        ([], InputError, "not be empty; got []"),
        ((), InputError, "not be empty; got ()"),
    ],
)
def test_what_is_no_sequence_of_ints_is_refused(value, error, message):
    assert_refused(error, message, check_ints, value)


def test_a_bad_entry_is_named_by_its_place():
    assert check_ints("part", "thing", (1, 2)) is None
    with pytest.raises(InputError, match=r"^part: thing\[1\] must be at least 1; got 0$"):
        check_ints("part", "thing", [1, 0])
    with pytest.raises(DTypeError, match=r"^part: thing\[0\] must be an int; got True \(bool\)$"):
        check_ints("part", "thing", [True])


@pytest.mark.parametrize(
    ("value", "bounds"),
    [
        (0, {"minimum": 0}),
        (1.0, {"maximum": 1}),
        (1e-300, {"above": 0}),
        (0.999, {"minimum": 0, "below": 1}),
        (-3, {}),
    ],
)
def test_numbers_in_range_pass(value, bounds):
    assert check_number("part", "thing", value, **bounds) is None


@pytest.mark.parametrize(
    ("value", "bounds", "error", "message"),
    [
        (True, {}, DTypeError, "be a number; got bool"),
        ("1", {}, DTypeError, "be a number; got str"),
        (1j, {}, DTypeError, "be a number; got complex"),
        (math.nan, {}, InputError, "be finite; got nan"),
        (math.inf, {"above": 0}, InputError, "be finite and > 0; got inf"),
        (-math.inf, {"maximum": 1}, InputError, "be finite and <= 1; got -inf"),
        (0, {"above": 0}, InputError, "be finite and > 0; got 0"),
        (-0.1, {"minimum": 0}, InputError, "be finite and >= 0; got -0.1"),
        (1, {"minimum": 0, "below": 1}, InputError, "be finite and >= 0 and < 1; got 1"),
        (1.5, {"minimum": 0, "maximum": 1}, InputError, "be finite and >= 0 and <= 1; got 1.5"),
        (math.nan, {"minimum": 0}, InputError, "be finite and >= 0; got nan"),
    ],
)
def test_other_numbers_are_refused(value, bounds, error, message):
    assert_refused(error, message, check_number, value, **bounds)


def test_an_int_that_no_float_can_hold_is_not_finite():
    with pytest.raises(InputError, match="must be finite; got 1000") as caught:
        check_number("part", "thing", 10**400)
    assert len(str(caught.value)) < 200


# --- the rest


@pytest.mark.parametrize("value", [1, 0, None, "yes", torch.tensor(True)], ids=str)
def test_only_bools_are_bools(value):
    assert check_bool("part", "thing", True) is None
    assert_refused(DTypeError, f"be a bool; got {type(value).__name__}", check_bool, value)


def test_a_generator_or_none():
    assert check_generator("part", "thing", None) is None
    assert check_generator("part", "thing", torch.Generator()) is None
    assert_refused(DTypeError, "be a torch.Generator; got int", check_generator, 3)


@pytest.mark.parametrize("value", ["mean ", "MEAN", None, 3, ["mean"]], ids=str)
def test_choices_are_listed(value):
    assert check_choice("part", "thing", "sum", ("mean", "sum")) is None
    assert_refused(
        InputError, f"be one of 'mean', 'sum'; got {value!r}", check_choice, value, ("mean", "sum")
    )


@pytest.mark.parametrize(
    "check", [check_int, check_number, check_bool, lambda *a: check_choice(*a, ("a",))]
)
@pytest.mark.parametrize("value", [torch.rand(30, 30), "x" * 5000, list(range(5000))], ids=type)
def test_messages_stay_short_whatever_was_passed(check, value):
    with pytest.raises((DTypeError, InputError)) as caught:
        check("part", "thing", value)
    assert len(str(caught.value)) < 200


# --- labels


def labels_of(*values, dtype=torch.int64):
    return torch.tensor([[values]], dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_labels_in_range_pass(dtype):
    labels = labels_of(0, 2, 255 if dtype is not torch.int16 else 1, dtype=dtype)
    assert check_label_values("part", "thing", labels, 3, 255) is None


@pytest.mark.parametrize(
    ("labels", "ignore_index", "message"),
    [
        (labels_of(0, 3), 255, "be in [0, 3) or the ignored id 255; got 3 at (0, 0, 1)"),
        (labels_of(0, -1), 255, "be in [0, 3) or the ignored id 255; got -1 at (0, 0, 1)"),
        (labels_of(255, 0), None, "be in [0, 3); got 255 at (0, 0, 0)"),
        # in uint8, 255 and -1 are one number
        (
            labels_of(255, dtype=torch.uint8),
            -1,
            "be in [0, 3) or the ignored id -1; got 255 at (0, 0, 0)",
        ),
    ],
)
def test_labels_out_of_range_are_named(labels, ignore_index, message):
    assert_refused(InputError, message, check_label_values, labels, 3, ignore_index)


def test_labels_that_cannot_be_read_are_left_to_the_caller():
    bad = labels_of(7)
    assert check_label_values("part", "thing", bad.to("meta"), 3, 255) is None
    assert check_label_values("part", "thing", bad[:0], 3, 255) is None
    seen = torch.func.vmap(lambda x: (check_label_values("part", "thing", x, 3, 255), x)[1])(bad)
    assert torch.equal(seen, bad)


def test_invalid_labels_are_marked():
    labels = labels_of(0, 2, 3, -1, 255, 254)
    assert invalid_labels(labels, 3, 255).flatten().tolist() == [0, 0, 1, 1, 0, 1]
    assert invalid_labels(labels, 3, None).flatten().tolist() == [0, 0, 1, 1, 1, 1]
    # the ignored id may be a class
    assert invalid_labels(labels, 3, 2).flatten().tolist() == [0, 0, 1, 1, 1, 1]


class Wrapped(Tensor):
    pass


def test_only_plain_cpu_tensors_in_eager_mode_are_read():
    x = torch.zeros(2)
    assert values_are_readable(x)
    assert values_are_readable(nn.Parameter(x))
    assert not values_are_readable(x.to("meta"))
    assert not values_are_readable(x.as_subclass(Wrapped))
    with FakeTensorMode() as mode:
        assert not values_are_readable(mode.from_tensor(x))
    readable = []
    torch.func.vmap(lambda row: (readable.append(values_are_readable(row)), row)[1])(x)
    torch.func.grad(lambda row: (readable.append(values_are_readable(row)), row.sum())[1])(x)
    assert readable == [False, False]


# --- levels


@pytest.mark.parametrize(
    ("maps", "error", "message"),
    [
        (IMAGES, DTypeError, "thing must be a list of feature maps; got Tensor"),
        ([IMAGES], InputError, "thing must hold 2 maps, one per level; got 1"),
        ([IMAGES, IMAGES], InputError, r"thing\[1\] must have shape \(B=2, C=4, H, W\); got .*"),
        ([IMAGES, None], DTypeError, r"thing\[1\] must be a torch.Tensor; got NoneType"),
        (
            [IMAGES[..., :2], torch.zeros(2, 4, 2, 3)],
            InputError,
            r"thing must run from fine to coarse; got sizes \[\(4, 2\), \(2, 3\)\]",
        ),
    ],
    ids=["tensor", "number", "width", "none", "order"],
)
def test_levels_are_named_by_their_place(maps, error, message):
    with pytest.raises(error, match=f"^part: {message}$"):
        check_levels("part", "thing", maps, [3, 4], ordered=True)


def test_levels_follow_the_device_and_batch_of_another_input():
    maps = (IMAGES, torch.zeros(2, 4, 2, 2))
    assert check_levels("part", "thing", maps, [3, 4], like=IMAGES, ordered=True) is None
    with pytest.raises(InputError, match=r"thing\[0\] must have shape \(B=1, C=3, H, W\)"):
        check_levels("part", "thing", maps, [3, 4], like=IMAGES[:1])
    with pytest.raises(InputError, match=r"thing\[0\] must be on device meta; got cpu"):
        check_levels("part", "thing", maps, [3, 4], like=IMAGES.to("meta"))


# --- torch.compile


@pytest.mark.compile
def test_all_checks_trace_into_one_graph():
    def checked(images: Tensor, labels: Tensor, scale: float) -> Tensor:
        check_tensor("part", "images", images, "B C H W", C=3)
        b, _, h, w = images.shape
        check_tensor("part", "labels", labels, "B H W", kind="integer", like=images, B=b, H=h, W=w)
        check_levels("part", "levels", [images, images], [3, 3], ordered=True)
        check_int("part", "count", 3)
        check_ints("part", "counts", [3, 4])
        check_number("part", "scale", scale, above=0, maximum=10)
        check_bool("part", "flag", True)
        check_generator("part", "generator", None)
        check_choice("part", "norm", "mean", ("mean", "sum"))
        check_label_values("part", "labels", labels, 3, 255)
        return images * scale * (~invalid_labels(labels, 3, 255)).unsqueeze(1)

    compiled = torch.compile(checked, fullgraph=True, backend="aot_eager")
    images, labels = torch.rand(2, 3, 4, 5), torch.full((2, 4, 5), 2)
    labels[0, 0, 0] = 255
    assert torch.equal(compiled(images, labels, 2.0), checked(images, labels, 2.0))
    # a compiled graph cannot name the place, but it must not compute on
    labels[1, 2, 3] = 3
    with pytest.raises(RuntimeError, match=r"part: labels must be in \[0, 3\)"):
        compiled(images, labels, 2.0)
    with pytest.raises(InputError, match=r"got 3 at \(1, 2, 3\)"):
        checked(images, labels, 2.0)
