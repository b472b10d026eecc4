"""The lookup convolution equals a convolution of the one-hot map; label maps resize exactly."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, strategies as st
from support import assert_close64, assert_equal, assert_message
from torch import nn
from torch.nn import functional as F

from dpsims.errors import DTypeError, InputError
from dpsims.nn import labels as labels_module
from dpsims.nn.labels import LabelConv2d, resize_labels
from dpsims.nn.spectral import spectral_normalize_

DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)
CASES = {
    "batch": st.integers(0, 3),
    "height": st.integers(1, 9),
    "width": st.integers(1, 9),
    "num_classes": st.integers(1, 9),
    "kernel_size": st.integers(1, 5),
    "stride": st.integers(1, 3),
    "extra_channels": st.integers(0, 2),
    "bias": st.booleans(),
    "ignored": st.sampled_from([0.0, 0.3, 1.0]),
    "seed": st.integers(0, 99),
}


def draw_labels(batch, height, width, num_classes, *, ignored=0.0, seed=0, ignore_index=255):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, num_classes, (batch, height, width), generator=generator)
    drop = torch.rand(labels.shape, generator=generator) < ignored
    return labels.masked_fill(drop, ignore_index)


def draw_maps(batch, channels, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, height, width, generator=generator, dtype=torch.float64)


def one_hot(labels, num_classes):
    ids = torch.arange(num_classes).view(-1, 1, 1)
    return (labels.unsqueeze(1).long() == ids).double()


def make(num_classes=5, out_channels=4, kernel_size=3, **options):
    torch.manual_seed(0)
    return LabelConv2d(num_classes, out_channels, kernel_size, **options).double()


def assert_lookup_is_the_convolution(conv, labels, extra=None):
    """Value and gradients equal those of conv2d on the one-hot map."""
    maps = one_hot(labels, conv.num_classes)
    if extra is not None:
        maps = torch.cat([maps, extra], dim=1)
    expected = F.conv2d(maps, conv.weight, conv.bias, conv.stride, conv.kernel_size // 2)
    actual = conv(labels, extra)
    assert_close64(actual, expected)
    parameters = list(conv.parameters())
    upstream = draw_maps(*expected.shape, seed=1)
    grads = torch.autograd.grad(actual, parameters, upstream)
    for grad, want in zip(grads, torch.autograd.grad(expected, parameters, upstream), strict=True):
        # sums of up to 243 terms
        assert_close64(grad, want, scale=100)


@given(**CASES)
def test_index_map_equals_one_hot_map(batch, height, width, num_classes, ignored, seed, **options):
    conv = make(num_classes, 4, **options)
    labels = draw_labels(batch, height, width, num_classes, ignored=ignored, seed=seed)
    extra = None
    if options["extra_channels"]:
        extra = draw_maps(batch, options["extra_channels"], height, width, seed)
    assert_lookup_is_the_convolution(conv, labels, extra)
    soft = one_hot(labels, num_classes)
    assert_close64(conv(soft, extra), conv(labels, extra))


@pytest.mark.parametrize("threads", [1, 2])
def test_many_classes_and_pixels(threads):
    torch.set_num_threads(threads)
    try:
        labels = draw_labels(2, 40, 33, 151, ignored=0.1)
        assert_lookup_is_the_convolution(make(151, 16), labels)
    finally:
        torch.set_num_threads(1)


@given(seed=st.integers(0, 99))
def test_renaming_classes_and_columns_together_changes_nothing(seed):
    conv, labels = make(), draw_labels(2, 6, 7, 5, ignored=0.2, seed=seed)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    renamed = make()
    with torch.no_grad():
        renamed.weight[:, order] = conv.weight
    names = torch.cat([order, torch.full((251,), 255)])
    assert_close64(renamed(names[labels]), conv(labels))


@given(seed=st.integers(0, 99), dy=st.integers(0, 2), dx=st.integers(0, 2))
def test_moving_the_map_moves_the_output(seed, dy, dx):
    conv, labels = make(), draw_labels(1, 9, 9, 5, seed=seed)
    moved = labels.roll((dy, dx), (1, 2))
    inner = slice(3, -1)
    assert_close64(
        conv(moved)[:, :, inner, inner], conv(labels).roll((dy, dx), (2, 3))[:, :, inner, inner]
    )


@pytest.mark.parametrize("ignore_index", [255, -1, 3, None])
def test_ignored_pixels_contribute_nothing(ignore_index):
    conv = make(ignore_index=ignore_index)
    labels = draw_labels(2, 6, 7, 5, seed=3)
    if ignore_index is None:
        assert_lookup_is_the_convolution(conv, labels)
        return
    labels[:, 2:4, 1:5] = ignore_index
    maps = one_hot(labels, 5) * (labels != ignore_index).unsqueeze(1)
    assert_close64(conv(labels), F.conv2d(maps, conv.weight, conv.bias, 1, 1))
    nothing = conv(torch.full_like(labels, ignore_index))
    assert_equal(nothing, conv.bias.view(-1, 1, 1).expand_as(nothing))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_integer_dtype_gives_the_same_result(dtype):
    conv, labels = make(200), draw_labels(2, 6, 7, 200, ignored=0.2)
    if dtype == torch.int16:
        labels = labels.to(dtype)
    assert_equal(conv(labels.to(dtype)), conv(labels.long()))


def test_starts_with_the_numbers_of_conv2d():
    torch.manual_seed(3)
    ours = LabelConv2d(5, 4, 3, extra_channels=2)
    torch.manual_seed(3)
    theirs = nn.Conv2d(7, 4, 3)
    assert_equal(ours.weight, theirs.weight)
    assert_equal(ours.bias, theirs.bias)
    assert LabelConv2d(5, 4, bias=False).bias is None


def test_gradients_of_every_order():
    conv = make(3, 2, extra_channels=1)
    labels, extra = draw_labels(2, 3, 4, 3, ignored=0.2), draw_maps(2, 1, 3, 4).requires_grad_()

    def call(weight, bias, maps):
        state = {"weight": weight, "bias": bias}
        return torch.func.functional_call(conv, state, (labels, maps)).square()

    args = (conv.weight, conv.bias, extra)
    assert torch.autograd.gradcheck(call, args, fast_mode=False)
    assert torch.autograd.gradgradcheck(call, args)


def test_functional_gradient():
    conv, labels = make(), draw_labels(2, 4, 5, 5)

    def loss(weight, maps):
        state = {"weight": weight}
        return torch.func.functional_call(conv, state, (maps,)).square().sum()

    weight = conv.weight.detach()
    assert_close64(
        torch.func.grad(loss)(weight, labels), torch.func.grad(loss)(weight, one_hot(labels, 5))
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype):
    labels = draw_labels(2, 8, 9, 5)
    exact = make()(labels)
    half = make().to(dtype)(labels)
    with torch.autocast("cpu", dtype):
        mixed, soft = make().float()(labels), make().float()(one_hot(labels, 5).float())
        assert make()(labels).dtype == torch.float64
    for out in (half, mixed):
        assert out.dtype == soft.dtype == dtype
        # ten numbers below 0.2 are rounded once or twice each, and their sum once
        assert (out.double() - exact).abs().max() <= 2 * torch.finfo(dtype).eps
    many = torch.zeros(1, 200, 200, dtype=torch.uint8)
    conv = make().to(dtype)
    (grad,) = torch.autograd.grad(conv(many).sum(), conv.bias)
    # 40000 ones: a sum kept in this dtype would stall at 256 or 2048
    assert (grad.double() / 40000 - 1).abs().max() <= torch.finfo(dtype).eps


def test_strides_and_memory_formats():
    conv, labels = make(extra_channels=2), draw_labels(2, 6, 8, 5)
    extra = draw_maps(2, 2, 6, 8)
    expected = conv(labels, extra)
    assert expected.is_contiguous()
    for view in (labels.mT.contiguous().mT, torch.stack([labels, labels], 3)[..., 0]):
        assert not view.is_contiguous()
        assert_equal(conv(view, extra), expected)
    assert_close64(conv(labels, extra.to(memory_format=torch.channels_last)), expected)
    one = labels[:1].expand(2, -1, -1)
    assert_equal(conv(one, extra), conv(one.contiguous(), extra))
    last = conv.to(memory_format=torch.channels_last)(labels, extra)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert_close64(last, expected)
    assert labels._version == extra._version == 0
    # gradients that arrive in another memory format
    plain = make()
    upstream = draw_maps(2, 4, 6, 8)
    swapped = upstream.to(memory_format=torch.channels_last)
    assert_equal(
        *(torch.autograd.grad(plain(labels), plain.weight, g)[0] for g in (upstream, swapped))
    )


def test_state_dict_deepcopy_meta_and_repr():
    conv, labels = make(), draw_labels(2, 6, 8, 5)
    other = LabelConv2d(5, 4).double()
    other.load_state_dict(conv.state_dict())
    for same in (other, copy.deepcopy(conv).eval()):
        assert_equal(same(labels), conv(labels))
    meta = LabelConv2d(5, 4, stride=2).to("meta")(labels.to("meta"))
    assert meta.shape == (2, 4, 3, 4)
    assert "stride=1" in repr(conv)


def test_frozen_weight_and_no_grad():
    conv, labels = make(), draw_labels(2, 6, 8, 5)
    expected = conv(labels).detach()
    with torch.inference_mode():
        assert_equal(conv(labels), expected)
    assert not conv.requires_grad_(False)(labels).requires_grad


def test_deterministic_mode():
    conv, labels = make(), draw_labels(2, 6, 8, 5)
    torch.use_deterministic_algorithms(True)
    try:
        conv(labels).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert conv.weight.grad.isfinite().all()


def test_spectral_norm_by_parametrization():
    conv, labels = spectral_normalize_(make()).eval(), draw_labels(2, 6, 8, 5)
    assert_close64(conv(labels), F.conv2d(one_hot(labels, 5), conv.weight, conv.bias, 1, 1))
    conv(labels).sum().backward()
    assert conv.parametrizations.weight.original.grad.any()


@pytest.mark.parametrize("bad", [5, 254, -1, -256, 2**31, 2**32 + 1])
def test_bad_id_is_named_with_its_position(bad):
    labels = draw_labels(2, 6, 8, 5)
    labels[1, 3, 2] = bad
    with pytest.raises(InputError) as caught:
        make()(labels)
    assert_message(caught.value, "LabelConv2d: labels must be in [0, 5)", str(bad), "(1, 3, 2)")


@pytest.mark.parametrize("bad", [5, 254, -1, -256, 2**31, 2**32 + 1])
def test_bad_id_is_nan_where_values_cannot_be_read(bad, monkeypatch):
    # as on a GPU, where reading the values would wait for the device
    monkeypatch.setattr(labels_module, "check_label_values", lambda *_: None)
    conv, labels = make(), draw_labels(2, 6, 8, 5)
    expected = conv(labels)
    labels[1, 3, 2] = bad
    out = conv(labels)
    touched = torch.zeros(2, 6, 8, dtype=torch.bool)
    touched[1, 2:5, 1:4] = True
    assert torch.equal(out.isnan().all(1), touched)
    assert_equal(out.nan_to_num(0), expected.masked_fill(touched.unsqueeze(1), 0))


def test_ids_that_need_the_ignored_one():
    with pytest.raises(InputError) as caught:
        make(ignore_index=None)(torch.full((1, 2, 2), 255, dtype=torch.uint8))
    assert_message(caught.value, "labels must be in [0, 5); got 255 at (0, 0, 0)")


LABELS, EXTRA = draw_labels(2, 6, 8, 5), draw_maps(2, 1, 6, 8)


@pytest.mark.parametrize(
    ("extra_channels", "args", "error", "parts"),
    [
        pytest.param(0, (LABELS[0],), InputError, ["labels", "(B, H, W)"], id="rank"),
        pytest.param(0, (LABELS[:, None],), InputError, ["(2, 1, 6, 8)"], id="channel-axis"),
        pytest.param(0, (LABELS.float(),), DTypeError, ["float32"], id="float-index-map"),
        pytest.param(0, (LABELS.bool(),), DTypeError, ["bool"], id="bool"),
        pytest.param(0, (one_hot(LABELS, 5).long(),), InputError, ["labels"], id="int-one-hot"),
        pytest.param(0, (one_hot(LABELS, 4),), InputError, ["K=5"], id="one-hot-classes"),
        pytest.param(0, (LABELS[:, :0],), InputError, ["empty"], id="no-rows"),
        pytest.param(0, ([1],), DTypeError, ["list"], id="not-a-tensor"),
        pytest.param(0, (LABELS, EXTRA), InputError, ["extra must be None"], id="unexpected"),
        pytest.param(1, (LABELS,), InputError, ["extra", "1 channels"], id="missing"),
        pytest.param(1, (LABELS, EXTRA[:1]), InputError, ["extra", "B=2"], id="extra-batch"),
        pytest.param(2, (LABELS, EXTRA), InputError, ["extra", "E=2"], id="extra-channels"),
        pytest.param(1, (LABELS, EXTRA[..., 1:]), InputError, ["W=8"], id="extra-width"),
        pytest.param(1, (LABELS, EXTRA.long()), DTypeError, ["extra"], id="extra-integer"),
        pytest.param(1, (LABELS, EXTRA.to("meta")), InputError, ["meta"], id="extra-device"),
    ],
)
def test_bad_inputs(extra_channels, args, error, parts):
    with pytest.raises(error) as caught:
        make(extra_channels=extra_channels)(*args)
    assert_message(caught.value, "LabelConv2d: ", "must", *parts)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        pytest.param({"num_classes": 0}, InputError, id="no-class"),
        pytest.param({"num_classes": 2**15 - 1}, InputError, id="too-many-classes"),
        pytest.param({"num_classes": 3.0}, DTypeError, id="float-classes"),
        pytest.param({"out_channels": 0}, InputError, id="no-channel"),
        pytest.param({"kernel_size": 0}, InputError, id="kernel-0"),
        pytest.param({"stride": 0}, InputError, id="stride-0"),
        pytest.param({"extra_channels": -1}, InputError, id="extra-negative"),
        pytest.param({"ignore_index": 1.5}, DTypeError, id="ignore-float"),
    ],
)
def test_bad_settings(options, error):
    (name,) = options
    with pytest.raises(error) as caught:
        LabelConv2d(**({"num_classes": 3, "out_channels": 2} | options))
    assert_message(caught.value, f"LabelConv2d: {name} must")


def test_the_largest_number_of_classes():
    conv = LabelConv2d(2**15 - 2, 1, 1, bias=False)
    labels = torch.tensor([[[0, 2**15 - 3, 255]]])
    expected = conv.weight.flatten()[[0, 2**15 - 3, 255]].view(1, 1, 1, 3)
    expected[..., 2] = 0
    assert_equal(conv(labels), expected)


@given(
    sizes=st.tuples(*[st.integers(1, 40)] * 4),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_resize_takes_the_pixel_under_the_centre(sizes, dtype, seed):
    height, width, rows, columns = sizes
    labels = draw_labels(2, height, width, 200, ignored=0.2, seed=seed).to(dtype)
    out = resize_labels(labels, (rows, columns))
    assert out.dtype == dtype
    assert out.shape == (2, rows, columns)
    for i in (0, rows // 2, rows - 1):
        for j in (0, columns // 2, columns - 1):
            y, x = (2 * i + 1) * height // (2 * rows), (2 * j + 1) * width // (2 * columns)
            assert_equal(out[:, i, j], labels[:, y, x])


@pytest.mark.parametrize("size", [(8, 12), (4, 6), (16, 24), (1, 1), (32, 3)])
def test_resize_equals_nearest_exact(size):
    labels = draw_labels(2, 8, 12, 200)
    theirs = F.interpolate(labels.double().unsqueeze(1), size, mode="nearest-exact")
    assert_equal(resize_labels(labels, size), theirs.squeeze(1).long())


def test_resize_up_then_down_is_the_identity_and_copies():
    labels = draw_labels(2, 5, 7, 9)
    assert_equal(resize_labels(resize_labels(labels, (15, 14)), (5, 7)), labels)
    same = resize_labels(labels, (5, 7))
    assert same.data_ptr() != labels.data_ptr()
    assert resize_labels(labels.to("meta"), (3, 3)).shape == (2, 3, 3)


@pytest.mark.parametrize(
    ("labels", "size", "error", "part"),
    [
        pytest.param(LABELS.float(), (2, 2), DTypeError, "labels must", id="float"),
        pytest.param(LABELS[0], (2, 2), InputError, "labels must", id="rank"),
        pytest.param(LABELS, (0, 2), InputError, "size[0] must", id="size-0"),
        pytest.param(LABELS, (2,), InputError, "size must", id="one-size"),
        pytest.param(LABELS, 4, DTypeError, "size must", id="size-int"),
        pytest.param(LABELS, (2.0, math.inf), DTypeError, "size[0] must", id="size-float"),
    ],
)
def test_resize_refuses_bad_arguments(labels, size, error, part):
    with pytest.raises(error) as caught:
        resize_labels(labels, size)
    assert_message(caught.value, f"resize_labels: {part}")
