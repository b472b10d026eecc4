"""The focal loss's kernel: in Triton's interpreter without a GPU, compiled with one."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from support import assert_equal

from dpsims.losses.focal import pixel_focal_loss
from dpsims.ops.focal import _cpu, _library
from dpsims.ops.focal._targets import FocalSpec

pytest.importorskip("triton", reason="Triton is not installed")
from dpsims.ops.focal import _triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter is for the CPU")


@pytest.fixture(autouse=True)
def _quiet():
    # the interpreter computes masked lanes too, in numpy
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN")
        yield


def problem(sizes, dtype=torch.float32, spread=5.0, seed=0):
    batch, channels, height, width = sizes
    generator = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(sizes, generator=generator)).to(dtype)
    labels = torch.randint(channels, (batch, height, width), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = 255
    weights = torch.rand(channels, generator=generator) + 0.5
    return logits.to(DEVICE), labels.to(DEVICE), weights.to(DEVICE)


def exact(logits, labels, weights, spec, upstream=None):
    """Loss and gradient in float64, by the implementation for CPU."""
    logits, labels = logits.detach().cpu().double(), labels.cpu()
    weights = None if weights is None else weights.cpu()
    grad = torch.empty_like(logits)
    loss = _cpu.forward(logits, labels, weights, spec, grad)
    if upstream is not None:
        _cpu.backward(upstream.cpu().double(), logits, labels, weights, spec, grad)
    return loss, grad


def assert_close(actual, expected, dtype, size):
    """Values up to ``size`` from float32 arithmetic, then rounded to ``dtype``.

    exp, log and the sums are good to about 1e-6 of the pixel's largest number each. The
    interpreter cuts to bfloat16 where a GPU rounds, hence a whole unit in the last place.
    """
    info = torch.finfo(dtype)
    rtol = 4e-6 + (0 if dtype is torch.float32 else info.eps)
    atol = 4e-6 * size + info.smallest_normal * info.eps
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=rtol, atol=atol)


def assert_right(logits, labels, weights, spec, upstream=None, grad=None):
    dtype = logits.dtype
    loss, expected = exact(logits, labels, weights, spec, upstream)
    grad = torch.full_like(logits, torch.nan) if grad is None else grad
    scale = 1.0 if spec.reduction in ("sum", "none") else 1.0 / labels.numel()
    if upstream is None:
        actual = _triton.forward(logits, labels, weights, spec, grad)
        # log p is at most 60 here, and every loss is the sum or mean of such
        assert_close(actual, loss, torch.float32, 60 * (1 if spec.reduction != "sum" else 20))
        assert actual.dtype == torch.float32
        alone = _triton.forward(logits, labels, weights, spec)
        assert_equal(alone, actual)
    else:
        _triton.backward(upstream, logits, labels, weights, spec, grad)
        scale *= float(upstream.abs().max())
    assert_close(grad, expected, dtype, 10 * scale)
    return grad


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TestEquation:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    @pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.0, 3.5])
    def test_values_and_gradients(self, gamma, smoothing, dtype):
        logits, labels, weights = problem((2, 7, 3, 5), dtype)
        spec = FocalSpec(gamma, smoothing, 255, 7, None, "mean")
        assert_right(logits, labels, weights, spec)
        assert_right(logits, labels, None, spec, torch.tensor(-3.0, device=DEVICE))

    # one tile, a tile and a tail, many programs; 2048 is the most
    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    @pytest.mark.parametrize(
        "sizes",
        [
            (1, 1, 2, 3),
            (3, 2, 1, 1),
            (1, 3, 33, 41),
            (2, 64, 5, 9),
            (2, 151, 7, 11),
            (1, 1025, 3, 4),
            (1, 2048, 2, 5),
        ],
    )
    def test_sizes(self, sizes, smoothing):
        logits, labels, weights = problem(sizes)
        labels = torch.where(labels == 255, 0, labels)
        spec = FocalSpec(2.0, smoothing, None, sizes[1], None, "sum")
        assert_right(logits, labels, weights, spec)

    @pytest.mark.parametrize("reduction", ["mean", "valid_mean", "sum", "none"])
    @pytest.mark.parametrize("target", [None, 4])
    @pytest.mark.parametrize("ignore_index", [255, -1, None, 2])
    def test_options(self, reduction, target, ignore_index):
        logits, labels, weights = problem((2, 5, 3, 4))
        labels = torch.where(labels == 255, -1 if ignore_index is None else ignore_index, labels)
        labels = labels.clamp(min=0) if ignore_index is None else labels
        spec = FocalSpec(2.0, 0.0, ignore_index, 5, target, reduction)
        assert_right(logits, labels, weights if target is None else None, spec)
        size = labels.shape if reduction == "none" else ()
        upstream = torch.rand(size, device=DEVICE) - 0.5
        assert_right(logits, labels, None, spec, upstream)
        if reduction == "none":
            assert_right(logits, labels, None, spec, upstream[:1, :1].expand(labels.shape))

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
    def test_label_and_weight_dtypes(self, dtype):
        logits, labels, weights = problem((1, 5, 4, 4))
        spec = FocalSpec(2.0, 0.0, 255, 5, None, "mean")
        assert_right(logits, labels.to(dtype), weights.double(), spec)
        assert_right(logits, labels.to(dtype), (weights * 4).int(), spec)
        assert_right(logits, labels.to(dtype), weights.repeat_interleave(2)[::2], spec)

    @interpreted
    def test_offsets_beyond_32_bits_take_the_wide_path(self, monkeypatch):
        logits, labels, weights = problem((2, 5, 4, 3))
        monkeypatch.setattr(_triton, "_INT32", 0)
        spec = FocalSpec(2.0, 0.1, 255, 5, None, "none")
        assert_right(logits, labels, weights, spec)


def layouts(plain):
    wide = torch.full((2, 10, 8, 12), torch.nan, dtype=plain.dtype, device=plain.device)
    wide[:, ::2, :, ::2] = plain
    return {
        "contiguous": plain,
        "channels-last": plain.to(memory_format=torch.channels_last),
        "sliced": wide[:, ::2, :, ::2],
        "transposed": plain.mT.contiguous().mT,
        "batch-last": plain.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        "expanded": plain[:1, :, :1].expand(2, 5, 8, 6),
    }


class TestLayouts:
    @pytest.mark.parametrize("layout", layouts(torch.zeros(2, 5, 8, 6)))
    def test_every_layout(self, layout):
        plain, labels, weights = problem((2, 5, 8, 6))
        logits = layouts(plain)[layout]
        spec = FocalSpec(2.0, 0.1, 255, 5, None, "mean")
        assert_right(logits, labels, weights, spec, grad=torch.empty_like(logits))
        turned = labels.mT.contiguous().mT
        assert_right(logits, turned, weights, spec, grad=torch.empty_like(plain))

    @pytest.mark.parametrize("layout", ["contiguous", "channels-last", "sliced", "transposed"])
    def test_in_place(self, layout):
        plain, labels, weights = problem((2, 5, 8, 6), torch.bfloat16)
        spec = FocalSpec(2.0, 0.0, 255, 5, None, "sum")
        expected = assert_right(plain, labels, weights, spec)
        logits = layouts(plain)[layout].detach()
        _triton.forward(logits, labels, weights, spec, logits)
        assert_equal(logits.contiguous(), expected)

    @pytest.mark.parametrize("layout", ["contiguous", "channels-last", "sliced"])
    @pytest.mark.parametrize("factor", [1.0, -0.5, torch.nan])
    def test_scale(self, layout, factor):
        values = layouts(problem((2, 5, 8, 6), torch.bfloat16)[0])[layout]
        expected = values * factor
        _triton.scale_(values, torch.tensor(factor, device=DEVICE))
        assert_equal(values, expected)

    def test_scale_of_more_than_one_block(self):
        values = torch.randn(9000, device=DEVICE)
        expected = values * 3
        _triton.scale_(values, torch.tensor(3.0, device=DEVICE))
        assert_equal(values, expected)
        _triton.scale_(values[:0], torch.tensor(3.0, device=DEVICE))


class TestExtremes:
    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    @pytest.mark.parametrize("gamma", [0.0, 0.3, 2.0])
    def test_finite_logits_of_any_size(self, gamma, smoothing):
        sizes = torch.tensor([0.0, 17.0, 60.0, 6e4, 3.4e38, -60.0, -3.4e38])
        picks = torch.randint(7, (2, 5, 4, 4), generator=torch.Generator().manual_seed(1))
        logits, labels = sizes[picks].to(DEVICE), (picks[:, 0] % 5).to(DEVICE)
        spec = FocalSpec(gamma, smoothing, None, 5, None, "none")
        grad = torch.full_like(logits, torch.nan)
        loss = _triton.forward(logits, labels, None, spec, grad)
        assert not bool(loss.isnan().any())
        assert bool((grad.abs() <= (1 + gamma / np.e) * (1 + 1e-5)).all())

    @pytest.mark.parametrize("gamma", [0.0, 0.3, 2.0])
    def test_nearly_certain_pixels_keep_their_digits(self, gamma):
        leads = torch.tensor([10.0, 20.0, 40.0, 60.0])
        logits = torch.stack([leads, torch.zeros(4)])[None, :, None].to(DEVICE)
        labels = torch.zeros(1, 1, 4, dtype=torch.long, device=DEVICE)
        spec = FocalSpec(gamma, 0.0, None, 2, None, "none")
        grad = torch.empty_like(logits)
        loss = _triton.forward(logits, labels, None, spec, grad)
        rest = 1 / (1 + torch.exp(leads.double()))
        log_p = torch.log1p(-rest)
        # exp(-60) is off by 60 roundings of its exponent; below 1e-37 float32 has no digits
        tolerance = {"rtol": 2e-5, "atol": 1e-37}
        torch.testing.assert_close(
            loss.flatten().cpu().double(), -(rest**gamma) * log_p, **tolerance
        )
        slope = rest**gamma * (gamma * (1 - rest) * log_p / rest - 1)
        for channel, sign in ((0, 1), (1, -1)):
            torch.testing.assert_close(
                grad[0, channel, 0].cpu().double(), sign * slope * rest, **tolerance
            )

    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_bad_labels_are_nan_and_ignored_pixels_zero(self, smoothing):
        logits, labels, weights = problem((1, 5, 2, 4))
        labels[:] = 1
        labels[0, 0] = torch.tensor([5, -1, 2**32 + 1, 254])
        labels[0, 1, 0] = 255
        logits[0, :, 1, 0] = torch.nan
        weights[3] = 0
        labels[0, 1, 1] = 3
        logits[0, 2, 1, 1] = torch.inf
        logits[0, 3, 1, 2] = torch.nan
        for class_weights in (weights, None):
            grad = torch.zeros_like(logits)
            spec = FocalSpec(2.0, smoothing, 255, 5, None, "none")
            loss = _triton.forward(logits, labels, class_weights, spec, grad)
            zero_weight_counts = class_weights is None
            bad = [[True] * 4, [False, zero_weight_counts, True, False]]
            assert loss.isnan().tolist() == [bad]
            assert grad.isnan().all(1).tolist() == [bad]
            assert grad.isnan().any(1).tolist() == [bad]
            assert loss[0, 1, 0] == 0
            assert bool((grad[0, :, 1, 0] == 0).all())

    def test_minus_infinity_is_a_class_that_cannot_be(self):
        logits, labels, _ = problem((1, 5, 2, 3))
        labels = torch.where(labels == 255, 0, labels) % 4
        logits[:, 4] = -torch.inf
        few = logits[:, :4].clone()
        grad, expected = torch.empty_like(logits), torch.empty_like(few)
        spec = FocalSpec(2.0, 0.0, None, 4, None, "none")
        loss = _triton.forward(logits, labels, None, spec, grad)
        assert_equal(loss, _triton.forward(few, labels, None, spec, expected))
        assert_equal(grad[:, :4], expected)
        assert bool((grad[:, 4] == 0).all())

    def test_nothing(self):
        spec = FocalSpec(2.0, 0.0, 255, 5, None, "mean")
        logits, labels, _ = problem((2, 5, 3, 3))
        none = torch.empty_like(logits[:0])
        assert _triton.forward(logits[:0], labels[:0], None, spec, none) == 0
        grad = torch.full_like(logits, torch.nan)
        junk, ignored = torch.full_like(logits, torch.nan), torch.full_like(labels, 255)
        for reduction in ("mean", "valid_mean"):
            spec = spec._replace(reduction=reduction)
            assert _triton.forward(junk, ignored, None, spec, grad) == 0
            assert_equal(grad, torch.zeros_like(grad))


class TestPasses:
    @pytest.fixture
    def traffic(self, monkeypatch):
        """Entries of a tensor that kernels read and wrote."""
        from triton.runtime.interpreter import InterpreterBuilder as Builder

        seen = {"read": [], "written": []}

        def counted(kind, original):
            def call(self, ptrs, *args):
                mask = args[0] if kind == "read" else args[1]
                keep = np.broadcast_to(mask.data, ptrs.data.shape)
                seen[kind].append(ptrs.data[keep].astype(np.int64))
                return original(self, ptrs, *args)

            return call

        for name, kind in (("create_masked_load", "read"), ("create_masked_store", "written")):
            monkeypatch.setattr(Builder, name, counted(kind, getattr(Builder, name)))

        def entries(kind, tensor):
            start = tensor.data_ptr()
            every = np.concatenate([x.ravel() for x in seen[kind]])
            inside = (every >= start) & (every < start + tensor.untyped_storage().nbytes())
            return np.sort(every[inside] - start) // tensor.element_size()

        entries.seen = seen
        return entries

    @interpreted
    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    @pytest.mark.parametrize("sizes", [(1, 3, 33, 41), (2, 151, 7, 11), (1, 1025, 3, 4)])
    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_one_read_and_one_write_of_every_logit(self, traffic, sizes, smoothing, memory_format):
        logits, labels, weights = problem(sizes, torch.bfloat16)
        logits = logits.to(memory_format=memory_format)
        grad = torch.empty_like(logits)
        spec = FocalSpec(2.0, smoothing, 255, sizes[1], None, "mean")
        _triton.forward(logits, labels, weights, spec, grad)
        every = np.arange(logits.numel())
        assert (traffic("read", logits) == every).all()
        assert (traffic("written", grad) == every).all()
        assert len(traffic("written", logits)) == len(traffic("read", grad)) == 0
        # beside the two passes: the label and weight of every pixel, and a number per program
        others = sum(x.size for x in traffic.seen["read"]) - logits.numel()
        assert others <= 2 * labels.numel()
        assert sum(x.size for x in traffic.seen["written"]) == grad.numel() + _triton._programs(
            logits
        )

    @interpreted
    def test_a_factor_of_one_touches_nothing(self, traffic):
        grad = torch.randn(3, 5, 7, 9)
        _triton.scale_(grad, torch.tensor(1.0))
        assert len(traffic("read", grad)) == 0
        assert traffic.seen["written"] == []

    @pytest.mark.parametrize("channels", [1, 2, 19, 35, 151, 152, 183, 256, 1025, 2048])
    def test_tiles_fit_and_waste_little(self, channels):
        head, tail, pixels = _triton.tile(channels)
        assert head <= channels <= head + tail
        # only the tail is padded, and to less than twice its size
        assert head + tail - channels < max(1, channels - head)
        assert (head + tail) * pixels <= _triton._TILE
        # whole sectors of 32 bytes of bfloat16 for every paper data set
        assert pixels >= 32 or channels > 256


def test_the_operator_finds_the_kernel():
    from dpsims.ops.focal._library import _contract

    assert _contract(torch.device("cuda")) is _triton
    assert _contract(torch.device("cpu")) is _cpu


class TestThroughAutograd:
    @pytest.fixture(autouse=True)
    def _kernel(self, monkeypatch):
        monkeypatch.setattr(_library, "_contract", lambda device: _triton)

    @pytest.mark.parametrize("reduction", ["mean", "valid_mean", "none"])
    @pytest.mark.parametrize("factor", [1.0, -3.0])
    def test_gradients(self, reduction, factor):
        logits, labels, weights = problem((2, 5, 4, 3))
        grads = []
        for impl in ("fused", "closed_form"):
            leaf = logits.clone().requires_grad_()
            options = {"class_weights": weights, "reduction": reduction, "impl": impl}
            loss = (factor * pixel_focal_loss(leaf * 1, labels, **options)).sum()
            grads.append(torch.autograd.grad(loss, leaf, retain_graph=True)[0])
            grads.append(torch.autograd.grad(loss, leaf)[0])
        for grad in grads[:3]:
            torch.testing.assert_close(grad, grads[3], rtol=1e-5, atol=1e-6)

    def test_in_place(self):
        logits, labels, _ = problem((2, 5, 4, 3), torch.bfloat16)
        grads = []
        for inplace in (False, True):
            leaf = logits.clone().requires_grad_()
            loss = pixel_focal_loss(leaf * 1, labels, inplace=inplace, impl="fused")
            grads.append(torch.autograd.grad(2 * loss, leaf)[0])
        assert_equal(*grads)

    def test_whoever_saved_the_logits_learns_of_it(self):
        logits, labels, _ = problem((2, 5, 4, 3))
        hidden = logits.requires_grad_().tanh()
        loss = pixel_focal_loss(hidden, labels, inplace=True, impl="fused")
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
