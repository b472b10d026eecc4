"""pixel_focal_loss at its limits: extreme values, dtypes, layouts, transforms, bad inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from support import assert_close64, assert_equal, assert_message

from dpsims.errors import DTypeError, InputError
from dpsims.losses.focal import pixel_focal_loss

GAMMAS = st.sampled_from([0.0, 0.3, 1.0, 2.0, 5.0])
SMOOTHINGS = st.sampled_from([0.0, 0.1])
IMPLS = ("auto", "reference")


def value_and_grad(logits, labels, **options):
    logits = logits.detach().clone().requires_grad_()
    loss = pixel_focal_loss(logits, labels, **options)
    loss.sum().backward()
    return loss.detach(), logits.grad


class TestExtremeValues:
    @given(
        st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
        GAMMAS,
        SMOOTHINGS,
        st.integers(0, 999),
    )
    def test_finite_logits_of_any_size(self, dtype, gamma, smoothing, seed):
        generator = torch.Generator().manual_seed(seed)
        largest = torch.finfo(dtype).max
        sizes = [0.0, 1.0, 17.0, 60.0, 6e4, largest, -60.0, -largest]
        sizes = torch.tensor(sizes, dtype=torch.float64)
        picks = torch.randint(len(sizes), (2, 5, 3, 4), generator=generator)
        logits = sizes[picks].to(dtype)
        labels = torch.randint(5, (2, 3, 4), generator=generator)
        loss, grad = value_and_grad(
            logits, labels, gamma=gamma, label_smoothing=smoothing, reduction="none"
        )
        assert not bool(loss.isnan().any())
        assert bool(loss.isfinite().all()) or largest > 1e6
        # rounding of the gradient to the dtype of the logits
        bound = (1 + gamma / np.e) * (1 + 2 * torch.finfo(dtype).eps)
        assert bool((grad.abs() <= bound).all())

    def test_half_precision_at_its_limits(self):
        logits = torch.tensor([65504.0, -65504.0], dtype=torch.float16).view(1, 2, 1, 1)
        wrong = torch.ones(1, 1, 1, dtype=torch.long)
        loss, grad = value_and_grad(logits, wrong)
        assert_equal(loss, torch.tensor(131008.0))
        assert_equal(grad.flatten(), torch.tensor([1.0, -1.0], dtype=torch.float16))

    @pytest.mark.parametrize("impl", ["auto", "closed_form"])
    @pytest.mark.parametrize("gamma", [0.3, 0.5, 0.9])
    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
    def test_saturated_pixel_has_no_nan_gradient(self, gamma, smoothing, dtype, impl):
        logits = torch.tensor([60.0, -60.0, -60.0], dtype=dtype).view(1, 3, 1, 1)
        right = torch.zeros(1, 1, 1, dtype=torch.long)
        options = {"gamma": gamma, "label_smoothing": smoothing, "impl": impl}
        loss, grad = value_and_grad(logits, right, **options)
        # the composed form is NaN here; with smoothing the two others pull at 0.1 / 3 each
        pull = smoothing / 3
        expected = torch.tensor([2 * pull, -pull, -pull], dtype=dtype)
        torch.testing.assert_close(grad.flatten(), expected, rtol=2e-3, atol=1e-9)
        assert bool(loss.isfinite())
        logits = logits.requires_grad_()
        first = pixel_focal_loss(logits, right, **options)
        (first_grad,) = torch.autograd.grad(first, logits, create_graph=True)
        (second_grad,) = torch.autograd.grad(first_grad.square().sum(), logits)
        assert bool(second_grad.isfinite().all())

    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_infinite_logits(self, smoothing):
        inf = torch.inf
        columns = torch.tensor(
            [[0.0, 1.0, -inf], [-inf, 0.0, 1.0], [0.0, inf, 1.0], [0.0, 1.0, 2]]
        )
        logits = columns.T[None, :, None]  # one row of four pixels
        labels = torch.zeros(1, 1, 4, dtype=torch.long)
        loss, grad = value_and_grad(logits, labels, reduction="none", label_smoothing=smoothing)
        loss, grad = loss.flatten(), grad[0, :, 0]
        if smoothing == 0:
            assert_equal(loss[0], pixel_focal_loss(logits[:, :2, :, :1], labels[:, :, :1]))
            assert grad[2, 0] == 0
        assert bool(grad[:, 0].isfinite().all())
        assert loss[1] == inf
        assert bool(loss[2].isnan())
        assert bool(loss[3].isfinite())
        assert bool(grad[:, 3].isfinite().all())

    def test_nan_that_counts_is_not_hidden(self):
        logits = torch.randn(1, 3, 2, 2)
        logits[0, 1, 0, 0] = torch.nan
        labels = torch.zeros(1, 2, 2, dtype=torch.long)
        loss, grad = value_and_grad(logits, labels)
        assert bool(loss.isnan())
        assert bool(grad[0, :, 0, 0].isnan().all())
        assert bool(grad[0, :, 1].isfinite().all())

    @pytest.mark.parametrize("reduction", ["mean", "valid_mean", "sum"])
    @pytest.mark.parametrize("impl", IMPLS)
    def test_nothing_to_learn_is_zero(self, reduction, impl):
        options = {"reduction": reduction, "impl": impl}
        ignored = torch.full((2, 3, 3), 255)
        nothing = {
            "all-ignored": (torch.randn(2, 4, 3, 3), ignored, None),
            "all-ignored-junk": (torch.full((2, 4, 3, 3), torch.nan), ignored, None),
            "zero-weight": (torch.full((2, 4, 3, 3), -3e38), ignored * 0, torch.zeros(4)),
            "empty-batch": (torch.randn(0, 4, 3, 3), ignored[:0], None),
            "one-class": (torch.randn(2, 1, 3, 3), ignored * 0, None),
        }
        for name, (logits, labels, weights) in nothing.items():
            loss, grad = value_and_grad(logits, labels, class_weights=weights, **options)
            assert loss == 0, name
            assert_equal(grad, torch.zeros_like(logits))

    def test_an_ignored_image_leaves_the_others_alone(self):
        logits, labels = torch.randn(2, 4, 3, 3), torch.randint(4, (2, 3, 3))
        labels[1] = 255
        logits[1] = torch.inf
        alone = pixel_focal_loss(logits[:1], labels[:1], reduction="sum")
        assert_equal(pixel_focal_loss(logits, labels, reduction="sum"), alone)

    def test_many_channels_on_one_pixel(self):
        for channels in (2, 3, 151, 2048):
            logits = torch.zeros(1, channels, 1, 1, dtype=torch.float64)
            labels = torch.full((1, 1, 1), channels - 1)
            loss = pixel_focal_loss(logits, labels, ignore_index=None)
            expected = (1 - 1 / channels) ** 2 * np.log(channels)
            assert_close64(loss, torch.tensor(expected, dtype=torch.float64))


class TestUse:
    @pytest.mark.parametrize("impl", ["auto", "closed_form"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_low_precision_is_computed_in_float32(self, dtype, smoothing, impl):
        low = (torch.randn(2, 6, 4, 5) * 4).to(dtype)
        labels = torch.randint(6, (2, 4, 5))
        loss, grad = value_and_grad(low, labels, label_smoothing=smoothing, impl=impl)
        exact, exact_grad = value_and_grad(low.double(), labels, label_smoothing=smoothing)
        assert loss.dtype == torch.float32
        assert grad.dtype == dtype
        torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
        # one rounding to the dtype of the logits, or half a step of its subnormal numbers
        eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
        torch.testing.assert_close(grad.double(), exact_grad, rtol=eps, atol=eps * tiny + 1e-8)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = value_and_grad(low, labels, label_smoothing=smoothing, impl=impl)
            assert_equal(cast[0], loss)

    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_float32_is_close_to_float64(self, smoothing):
        logits = torch.randn(2, 20, 8, 8) * 6
        labels = torch.randint(20, (2, 8, 8))
        loss, grad = value_and_grad(logits, labels, label_smoothing=smoothing)
        exact, exact_grad = value_and_grad(logits.double(), labels, label_smoothing=smoothing)
        torch.testing.assert_close(loss.double(), exact, rtol=2e-6, atol=0)
        # float32 rounding of log p, at most 30 here, times the slope of at most 2
        bound = 30 * 2 * torch.finfo(torch.float32).eps / labels.numel()
        torch.testing.assert_close(grad.double(), exact_grad, rtol=0, atol=bound)

    @pytest.mark.parametrize("impl", ["auto", "closed_form"])
    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_large_maps_are_cut_into_rows(self, dtype, smoothing, impl):
        # twelve images are too many for one pass of the loop over rows, one is not
        logits = torch.randn(12, 40, 30, 32).to(dtype)
        labels = torch.randint(40, (12, 30, 32))
        labels[:, 3] = 255
        options = {"label_smoothing": smoothing, "reduction": "none", "impl": impl}
        whole = value_and_grad(logits, labels, **options)
        for image in (0, 11):
            part = slice(image, image + 1)
            alone = value_and_grad(logits[part], labels[part], **options)
            # vector and scalar code of exp differ in the last bit
            torch.testing.assert_close(whole[0][part], alone[0], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(whole[1][part], alone[1])

    @pytest.mark.parametrize("impl", ["auto", "closed_form"])
    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_memory_formats_agree(self, smoothing, impl):
        plain, labels = torch.randn(2, 5, 8, 6), torch.randint(5, (2, 8, 6))
        wide = torch.randn(2, 10, 8, 12)
        wide[:, ::2, :, ::2] = plain
        options = {"label_smoothing": smoothing, "reduction": "none", "impl": impl}
        loss, grad = value_and_grad(plain, labels, **options)
        views = {
            "channels_last": plain.to(memory_format=torch.channels_last),
            "sliced": wide[:, ::2, :, ::2],
            "transposed": plain.mT.contiguous().mT,
        }
        for view in views.values():
            leaf = view.detach().requires_grad_()
            assert leaf.stride() == view.stride()
            other = pixel_focal_loss(leaf, labels.mT.contiguous().mT, **options)
            other.sum().backward()
            torch.testing.assert_close(other.detach(), loss, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(leaf.grad, grad, rtol=1e-6, atol=1e-7)
        one = plain[:1, :, :1, :1].expand(2, 5, 8, 6)
        assert_equal(
            pixel_focal_loss(one, labels, **options),
            pixel_focal_loss(one.contiguous(), labels, **options),
        )

    def test_inputs_are_left_alone(self):
        logits, labels, weights = (
            torch.randn(2, 4, 3, 3),
            torch.randint(4, (2, 3, 3)),
            torch.ones(4),
        )
        before = [tensor.clone() for tensor in (logits, labels, weights)]
        loss = pixel_focal_loss(logits.requires_grad_(), labels, class_weights=weights)
        loss.backward()
        for tensor, copy in zip((logits.detach(), labels, weights), before, strict=True):
            assert tensor._version == 0
            assert_equal(tensor, copy)

    @pytest.mark.parametrize("dtype", [torch.int32, torch.float16, torch.float64])
    def test_weights_of_any_real_dtype(self, dtype):
        logits, labels = torch.randn(2, 4, 3, 3), torch.randint(4, (2, 3, 3))
        weights = torch.tensor([1, 2, 0, 4])
        loss = pixel_focal_loss(logits, labels, class_weights=weights.to(dtype))
        assert_equal(loss, pixel_focal_loss(logits, labels, class_weights=weights.float()))

    def test_without_gradient(self):
        logits, labels = torch.randn(2, 4, 3, 3), torch.randint(4, (2, 3, 3))
        loss = pixel_focal_loss(logits, labels)
        assert not loss.requires_grad
        with torch.inference_mode():
            assert_equal(pixel_focal_loss(logits.clone(), labels).clone(), loss)

    @pytest.mark.parametrize("impl", IMPLS)
    def test_meta_and_sizes_beyond_32_bits(self, impl):
        logits = torch.empty(2, 4, 2**15, 2**15, device="meta", requires_grad=True)
        labels = torch.empty(2, 2**15, 2**15, dtype=torch.uint8, device="meta")
        pixels = pixel_focal_loss(logits, labels, reduction="none", impl=impl)
        assert pixels.shape == labels.shape
        loss = pixel_focal_loss(logits, labels, label_smoothing=0.1, impl=impl)
        loss.backward()
        assert loss.shape == ()
        assert logits.grad.shape == logits.shape

    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_torch_func(self, smoothing):
        logits = torch.randn(3, 4, 2, 2, dtype=torch.float64)
        labels = torch.randint(4, (3, 2, 2))

        def loss(logits, labels, impl="auto"):
            return pixel_focal_loss(
                logits[None], labels[None], label_smoothing=smoothing, reduction="sum", impl=impl
            )

        _, whole = value_and_grad(logits, labels, label_smoothing=smoothing, reduction="sum")
        assert_close64(torch.func.vmap(torch.func.grad(loss))(logits, labels), whole)
        assert_close64(
            torch.func.vmap(loss)(logits, labels).sum(),
            pixel_focal_loss(logits, labels, label_smoothing=smoothing, reduction="sum"),
        )
        pixels = torch.func.jacrev(
            lambda x: pixel_focal_loss(x, labels, label_smoothing=smoothing, reduction="none")
        )(logits)
        assert_close64(pixels.sum((0, 1, 2)), whole)
        closed, plain = (
            torch.func.jacrev(torch.func.jacrev(loss))(logits[0], labels[0], impl)
            for impl in IMPLS
        )
        assert_close64(closed, plain, scale=100)

    def test_bad_label_under_vmap_is_nan(self):
        logits, labels = torch.randn(2, 1, 4, 2, 2), torch.zeros(2, 1, 2, 2, dtype=torch.long)
        labels[1, 0, 1, 1] = 77
        losses = torch.func.vmap(pixel_focal_loss)(logits, labels)
        assert losses.isnan().tolist() == [False, True]


LOGITS, LABELS = torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 5, dtype=torch.long)
BAD = {
    "logits-list": ({"logits": [1.0]}, DTypeError, ["logits", "torch.Tensor", "list"]),
    "logits-integer": ({"logits": LOGITS.long()}, DTypeError, ["logits", "floating", "int64"]),
    "logits-complex": ({"logits": LOGITS + 0j}, DTypeError, ["logits", "floating", "complex"]),
    "logits-rank": ({"logits": LOGITS[0]}, InputError, ["logits", "(B, C, H, W)", "(3, 4, 5)"]),
    "logits-empty": ({"logits": LOGITS[:, :0]}, InputError, ["logits", "empty", "(2, 0, 4, 5)"]),
    "logits-sparse": ({"logits": LOGITS.to_sparse()}, InputError, ["logits", "dense", "sparse"]),
    "labels-none": ({"labels": None}, DTypeError, ["labels", "torch.Tensor", "NoneType"]),
    "labels-float": ({"labels": LABELS.float()}, DTypeError, ["labels", "integer", "float32"]),
    "labels-float-one-hot": ({"labels": LOGITS}, InputError, ["labels", "(2, 3, 4, 5)"]),
    "labels-bool": ({"labels": LABELS.bool()}, DTypeError, ["labels", "integer", "bool"]),
    "labels-channel": ({"labels": LABELS[:, None]}, InputError, ["labels", "squeeze dim 1"]),
    "labels-one-hot": (
        {"labels": LOGITS.long()},
        InputError,
        ["labels", "argmax", "(2, 3, 4, 5)"],
    ),
    "labels-batch": ({"labels": LABELS[:1]}, InputError, ["labels", "B=2", "(1, 4, 5)"]),
    "labels-size": ({"labels": LABELS.mT}, InputError, ["labels", "H=4, W=5", "(2, 5, 4)"]),
    "labels-device": ({"labels": LABELS.to("meta")}, InputError, ["labels", "cpu", "meta"]),
    "label-254": ({"labels": LABELS + 254}, InputError, ["labels", "[0, 3)", "254 at (0, 0, 0)"]),
    "label-channels": ({"labels": LABELS + 3}, InputError, ["labels", "3", "K + 1 channels"]),
    "label-negative": ({"labels": LABELS - 1}, InputError, ["labels", "[0, 3)", "255", "-1 at"]),
    "label-255-counts": (
        {"labels": LABELS + 255, "ignore_index": None},
        InputError,
        ["labels", "[0, 3)", "255 at"],
    ),
    "gamma-negative": ({"gamma": -0.1}, InputError, ["gamma", ">= 0", "-0.1"]),
    "gamma-nan": ({"gamma": torch.nan}, InputError, ["gamma", "finite", "nan"]),
    "gamma-inf": ({"gamma": torch.inf}, InputError, ["gamma", "finite", "inf"]),
    "gamma-bool": ({"gamma": True}, DTypeError, ["gamma", "number", "bool"]),
    "gamma-tensor": ({"gamma": torch.tensor(2.0)}, DTypeError, ["gamma", "number", "Tensor"]),
    "gamma-str": ({"gamma": "2"}, DTypeError, ["gamma", "number", "str"]),
    "weights-length": (
        {"class_weights": torch.ones(2)},
        InputError,
        ["class_weights", "C=3", "2"],
    ),
    "weights-rank": ({"class_weights": torch.ones(1, 3)}, InputError, ["class_weights", "(1, 3)"]),
    "weights-list": ({"class_weights": [1.0] * 3}, DTypeError, ["class_weights", "list"]),
    "weights-bool": ({"class_weights": torch.ones(3) > 0}, DTypeError, ["class_weights", "bool"]),
    "weights-complex": ({"class_weights": torch.ones(3) + 0j}, DTypeError, ["complex64"]),
    "weights-negative": (
        {"class_weights": torch.tensor([1.0, -2.0, 1.0])},
        InputError,
        ["class_weights", ">= 0", "-2 at 1"],
    ),
    "weights-nan": ({"class_weights": torch.ones(3) * torch.nan}, InputError, ["finite", "nan"]),
    "weights-inf-of-absent-class": (
        {"class_weights": torch.tensor([1.0, 1.0, torch.inf])},
        InputError,
        ["class_weights", "finite", "inf at 2"],
    ),
    "weights-learned": (
        {"class_weights": torch.ones(3, requires_grad=True)},
        DTypeError,
        ["class_weights", "constants", "requires grad"],
    ),
    "weights-device": (
        {"class_weights": torch.ones(3, device="meta")},
        InputError,
        ["class_weights", "cpu", "meta"],
    ),
    "smoothing-one": ({"label_smoothing": 1.0}, InputError, ["label_smoothing", "< 1", "1.0"]),
    "smoothing-negative": ({"label_smoothing": -0.1}, InputError, ["label_smoothing", ">= 0"]),
    "smoothing-nan": ({"label_smoothing": torch.nan}, InputError, ["label_smoothing", "nan"]),
    "ignore-float": ({"ignore_index": 255.0}, DTypeError, ["ignore_index", "int", "float"]),
    "reduction": ({"reduction": "avg"}, InputError, ["reduction", "'valid_mean'", "'avg'"]),
    "impl": ({"impl": "fast"}, InputError, ["impl", "'auto', 'reference'", "'fast'"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    options, error, parts = BAD[case]
    arguments = {"logits": LOGITS, "labels": LABELS} | options
    with pytest.raises(error) as caught:
        pixel_focal_loss(**arguments)
    assert_message(caught.value, "pixel_focal_loss: ", *parts)
