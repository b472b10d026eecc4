"""The implementations of the focal loss agree; what the fused one holds, hands out and refuses."""

from __future__ import annotations

import weakref

import pytest
import torch
from hypothesis import given, strategies as st
from support import assert_close64, assert_equal, assert_message
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpsims.errors import DTypeError, InputError
from dpsims.losses.focal import PixelFocalLoss, pixel_focal_loss
from dpsims.ops import _impl
from dpsims.ops.focal import _cpu, resolve_focal_impl
from dpsims.ops.focal._library import fused_focal
from dpsims.ops.focal._targets import FocalSpec

GAMMAS = st.sampled_from([0.0, 0.3, 1.0, 2.0, 3.5])
SMOOTHINGS = st.sampled_from([0.0, 0.1])
REDUCTIONS = ("mean", "valid_mean", "sum", "none")


def problem(sizes=(2, 5, 4, 3), seed=0, dtype=torch.float64):
    batch, channels, height, width = sizes
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(sizes, generator=generator, dtype=torch.float64)
    labels = torch.randint(channels, (batch, height, width), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = 255
    return logits.to(dtype), labels, torch.rand(channels, generator=generator) + 0.5


def value_and_grad(logits, labels, weights=None, *, factor=1.0, **options):
    leaf = logits.detach().clone().requires_grad_()
    loss = pixel_focal_loss(leaf * 1, labels, class_weights=weights, **options)
    (factor * loss).sum().backward()
    return loss.detach(), leaf.grad


class TestAgreement:
    @given(
        st.tuples(*(st.integers(1, n) for n in (3, 8, 5, 5))),
        st.integers(0, 99),
        GAMMAS,
        SMOOTHINGS,
        st.sampled_from(REDUCTIONS),
        st.sampled_from([1.0, -0.25]),
    )
    def test_fused_is_the_closed_form(self, sizes, seed, gamma, smoothing, reduction, factor):
        logits, labels, weights = problem(sizes, seed)
        options = {"gamma": gamma, "label_smoothing": smoothing, "reduction": reduction}
        fused, closed = (
            value_and_grad(logits, labels, weights, factor=factor, impl=impl, **options)
            for impl in ("fused", "closed_form")
        )
        assert_close64(fused[0], closed[0])
        assert_close64(fused[1], closed[1])

    @pytest.mark.parametrize("impl", ["fused", "closed_form"])
    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    @pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.0, 3.5])
    @pytest.mark.parametrize("reduction", ["mean", "valid_mean", "none"])
    def test_gradcheck(self, impl, smoothing, gamma, reduction):
        logits, labels, weights = problem((2, 3, 2, 2))

        def loss(logits):
            return pixel_focal_loss(
                logits,
                labels,
                gamma=gamma,
                class_weights=weights,
                label_smoothing=smoothing,
                reduction=reduction,
                impl=impl,
            )

        assert torch.autograd.gradcheck(loss, logits.requires_grad_(), fast_mode=False)
        assert torch.autograd.gradgradcheck(loss, logits, fast_mode=False)

    @pytest.mark.parametrize("impl", ["fused", "closed_form", "reference"])
    def test_of_the_gan_loss(self, impl):
        real, labels, _ = problem((2, 4, 3, 3))
        fake, _, _ = problem((2, 4, 3, 3), seed=1)
        labels = torch.where(labels == 3, 0, labels)
        loss, expected = PixelFocalLoss(3, impl=impl), PixelFocalLoss(3, impl="closed_form")
        for each in (loss, expected):
            assert f"impl={each.impl!r}" in repr(each)
        assert_close64(
            loss.discriminator(real, fake, labels), expected.discriminator(real, fake, labels)
        )
        assert_close64(loss.generator(fake, labels), expected.generator(fake, labels))

    def test_nearly_certain_pixels_keep_their_digits(self):
        # 1 - p is 4e-18 here, far below the rounding of 1
        logits = torch.tensor([40.0, 0.0], dtype=torch.float32).view(1, 2, 1, 1)
        labels = torch.zeros(1, 1, 1, dtype=torch.long)
        loss, grad = value_and_grad(logits, labels, gamma=0.3, impl="fused")
        rest = torch.exp(torch.tensor(-40.0, dtype=torch.float64))
        torch.testing.assert_close(loss.double(), rest**1.3, rtol=1e-5, atol=0)
        expected = -1.3 * rest**1.3 * torch.tensor([1.0, -1.0], dtype=torch.float64)
        torch.testing.assert_close(grad.flatten().double(), expected, rtol=1e-5, atol=0)


class TestGradientIsThereOnce:
    @pytest.mark.parametrize("factor", [1.0, 3.0])
    def test_two_backward_passes_give_the_same(self, factor):
        logits, labels, _ = problem()
        leaf = logits.requires_grad_()
        loss = factor * pixel_focal_loss(leaf, labels, impl="fused")
        (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        kept = first.clone()
        first.zero_()
        (second,) = torch.autograd.grad(loss, leaf)
        assert_close64(second, kept)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, leaf)

    def test_nobody_else_holds_the_gradient(self):
        logits, labels, _ = problem()
        leaf = logits.requires_grad_()
        pixel_focal_loss(leaf, labels, impl="fused").backward()
        once = leaf.grad.clone()
        pixel_focal_loss(leaf, labels, impl="fused").backward()
        assert_close64(leaf.grad, 2 * once)

    def test_logits_that_changed_are_refused(self):
        logits, labels, _ = problem()
        hidden = logits.requires_grad_() * 1
        loss = pixel_focal_loss(hidden, labels, impl="fused")
        hidden.detach().add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_gradient_penalty(self, smoothing):
        logits, labels, weights = problem()
        penalties = []
        for impl in ("fused", "reference"):
            leaf = logits.clone().requires_grad_()
            loss = pixel_focal_loss(
                leaf, labels, class_weights=weights, label_smoothing=smoothing, impl=impl
            )
            (grad,) = torch.autograd.grad(7 * loss, leaf, create_graph=True)
            penalties.append(torch.autograd.grad(grad.square().sum(), leaf)[0])
        torch.testing.assert_close(*penalties, rtol=1e-7, atol=1e-12)

    def test_a_loss_scaler_saves_float16_from_underflow(self):
        logits = torch.zeros(1, 1000, 100, 100, dtype=torch.float16)
        labels = torch.zeros(1, 100, 100, dtype=torch.long)
        # unscaled, p / (H * W) = 1e-7 would have one digit
        _, grad = value_and_grad(logits, labels, gamma=0.0, factor=2.0**16, impl="fused")
        expected = torch.full_like(grad[:, 1:], 2.0**16 / 1000 / 10000)
        torch.testing.assert_close(grad[:, 1:], expected, rtol=1e-3, atol=0)


class TestInplace:
    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("factor", [1.0, 2.0])
    def test_the_gradient_takes_the_place_of_the_logits(self, smoothing, dtype, factor):
        logits, labels, weights = problem(dtype=dtype)
        options = {"label_smoothing": smoothing, "factor": factor}
        expected = value_and_grad(logits, labels, weights, **options)
        leaf = logits.clone().requires_grad_()
        hidden = leaf * 1
        received = []
        hidden.register_hook(received.append)
        loss = pixel_focal_loss(
            hidden, labels, class_weights=weights, label_smoothing=smoothing, inplace=True
        )
        (factor * loss).backward()
        assert_equal(loss.detach(), expected[0])
        assert_equal(leaf.grad, expected[1])
        assert received[0].data_ptr() == hidden.data_ptr()

    def test_of_the_gan_loss(self):
        real, labels, _ = problem((2, 4, 3, 3))
        labels = torch.where(labels == 3, 0, labels)
        grads = []
        for inplace in (False, True):
            leaf = real.clone().requires_grad_()
            loss = PixelFocalLoss(3, inplace=inplace)
            loss.discriminator(leaf * 1, leaf * 2, labels).backward()
            grads.append(leaf.grad)
        assert_equal(*grads)

    def test_whoever_saved_the_logits_learns_of_it(self):
        logits, labels, _ = problem()
        hidden = logits.requires_grad_().tanh()
        loss = pixel_focal_loss(hidden, labels, inplace=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_without_a_gradient_nothing_is_written(self):
        logits, labels, _ = problem()
        before = logits.clone()
        loss = pixel_focal_loss(logits, labels, inplace=True)
        with torch.no_grad():
            assert_equal(pixel_focal_loss(logits.requires_grad_() * 1, labels, inplace=True), loss)
        assert_equal(logits.detach(), before)

    def test_one_backward_pass_of_first_order(self):
        logits, labels, _ = problem()
        leaf = logits.requires_grad_()
        loss = pixel_focal_loss(leaf * 1, labels, inplace=True)
        with pytest.raises(InputError) as caught:
            torch.autograd.grad(loss, leaf, create_graph=True)
        assert_message(caught.value, "pixel_focal_loss: inplace must be False", "second deriv")
        torch.autograd.grad(loss, leaf, retain_graph=True)
        with pytest.raises(InputError) as caught:
            torch.autograd.grad(loss, leaf)
        assert_message(caught.value, "pixel_focal_loss: inplace must be False", "second backward")

    @pytest.mark.parametrize(
        ("options", "part"),
        [
            pytest.param({"impl": "reference"}, "where impl is 'reference'", id="reference"),
            pytest.param({"impl": "closed_form"}, "'closed_form' (asked for)", id="closed-form"),
            pytest.param({"logits": "leaf"}, "for a leaf that requires grad", id="leaf"),
            pytest.param({"dtype": torch.float16}, "for float16", id="float16"),
            pytest.param({"reduction": "none"}, "with reduction='none'", id="none"),
            pytest.param({"logits": "expanded"}, "for expanded logits", id="expanded"),
        ],
    )
    def test_refused(self, options, part):
        logits, labels, _ = problem(dtype=options.pop("dtype", torch.float32))
        kind = options.pop("logits", "plain")
        logits = logits.requires_grad_() if kind == "leaf" else logits.requires_grad_() * 1
        logits = logits[:1].expand(2, -1, -1, -1) if kind == "expanded" else logits
        with pytest.raises(InputError) as caught:
            pixel_focal_loss(logits, labels, inplace=True, **options)
        assert_message(caught.value, "pixel_focal_loss: inplace must be False", part, "got True")


class TestResolve:
    def test_auto(self, monkeypatch):
        monkeypatch.setattr(_impl, "HAS_TRITON", True)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert resolve_focal_impl(device="cuda:1", dtype=dtype).impl == "fused"
        rows = {
            "torch.float64 on CUDA": {"device": "cuda", "dtype": torch.float64},
            "more than 2048 channels": {"device": "cuda", "num_channels": 2049},
            "on mps": {"device": "mps"},
            "inside torch.func": {"mode": "transform"},
        }
        for reason, options in rows.items():
            resolved = resolve_focal_impl(**options)
            assert resolved.impl == "closed_form"
            assert reason in resolved.reason
            with pytest.raises(InputError) as caught:
                resolve_focal_impl("fused", **options)
            assert_message(caught.value, "pixel_focal_loss: impl must be", reason, "got 'fused'")
            assert resolve_focal_impl("reference", **options) == ("reference", "asked for")
        assert resolve_focal_impl("fused", device="cuda", mode="compile").impl == "fused"
        monkeypatch.setattr(_impl, "HAS_TRITON", False)
        assert "without Triton" in resolve_focal_impl(device="cuda").reason
        assert resolve_focal_impl(device="cpu").impl == "fused"

    @pytest.mark.parametrize(
        ("options", "error", "part"),
        [
            ({"impl": "fast"}, InputError, "impl must be one of 'auto', 'reference'"),
            ({"mode": "jit"}, InputError, "mode must be one of 'eager'"),
            ({"num_channels": 0}, InputError, "num_channels must be at least 1"),
            ({"num_channels": 1.5}, DTypeError, "num_channels must be an int"),
        ],
    )
    def test_bad_options(self, options, error, part):
        with pytest.raises(error) as caught:
            resolve_focal_impl(**options)
        assert_message(caught.value, f"pixel_focal_loss: {part}")

    def test_torch_func_refuses_the_fused_form_by_name(self):
        logits, labels, _ = problem()
        with pytest.raises(InputError, match=r"inside torch\.func; got 'fused'"):
            torch.func.grad(lambda x: pixel_focal_loss(x, labels, impl="fused"))(logits)


SPECS = {
    "mean": FocalSpec(2.0, 0.0, 255, 5, None, "mean"),
    "smooth-pixels": FocalSpec(0.3, 0.1, None, 5, None, "none"),
    "valid-of-one-target": FocalSpec(1.0, 0.0, 255, 5, 4, "valid_mean"),
}


class TestOperator:
    # the check itself looks at .grad of what is no leaf
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
    @pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
    @pytest.mark.parametrize("weighted", [False, True])
    def test_opcheck(self, spec, weighted):
        logits, labels, weights = problem(dtype=torch.float32)
        labels = labels if spec.ignore_index is not None else labels % 5
        inputs = (labels, weights if weighted else None, *spec)
        leaf = logits.to(memory_format=torch.channels_last).requires_grad_()
        operators = torch.ops.dpsims
        torch.library.opcheck(operators.pixel_focal.default, (leaf, *inputs))
        upstream = torch.rand(labels.shape if spec.reduction == "none" else ())
        torch.library.opcheck(operators.pixel_focal_gradient.default, (upstream, logits, *inputs))

    @pytest.mark.compile
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_compile(self, reduction):
        logits, labels, weights = problem(dtype=torch.float32)

        def loss(logits, labels):
            return pixel_focal_loss(
                logits * 2,
                labels,
                class_weights=weights,
                impl="fused",
                reduction=reduction,
                inplace=reduction == "mean",
            ).sum()

        results = []
        for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
            leaf = logits.clone().requires_grad_()
            value = function(leaf, labels)
            results.append((value.detach(), *torch.autograd.grad(value, leaf)))
        torch.testing.assert_close(*results, rtol=1e-6, atol=1e-9)

    def test_fake_tensors(self):
        with FakeTensorMode() as mode:
            logits = mode.from_tensor(torch.randn(2, 5, 4, 3, dtype=torch.bfloat16))
            labels = mode.from_tensor(torch.zeros(2, 4, 3, dtype=torch.long))
            leaf = logits.requires_grad_()
            spec = FocalSpec(2.0, 0.0, 255, 5, None, "mean")
            loss = fused_focal(leaf, labels, None, spec)
            loss.backward()
            assert (loss.shape, loss.dtype) == ((), torch.float32)
            assert (leaf.grad.shape, leaf.grad.dtype) == (leaf.shape, torch.bfloat16)


class HeldBytes(TorchDispatchMode):
    """The most bytes that tensors made in its context held at a time."""

    def __init__(self):
        super().__init__()
        self.known = weakref.WeakKeyDictionary()
        self.now = self.most = 0

    def _release(self, size):
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs))
                 if isinstance(x, torch.Tensor)}  # fmt: skip
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage not in self.known and storage.data_ptr() not in given:
                    self.known[storage] = None
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._release, storage.nbytes())
        return result


class TestMemory:
    # an ADE-20K crop: the loss may hold the gradient and a tenth of the logits beside it
    @pytest.mark.parametrize(
        ("smoothing", "inplace", "most"),
        [(0.0, False, 1.1), (0.1, False, 1.1), (0.0, True, 0.1), (0.1, True, 0.1)],
    )
    def test_extra_memory(self, smoothing, inplace, most):
        logits = torch.randn(1, 152, 256, 256)
        labels = torch.randint(152, (1, 256, 256))
        spec = FocalSpec(2.0, smoothing, 255, 152, None, "mean")
        hidden = logits.requires_grad_().view_as(logits)
        with HeldBytes() as held:
            fused_focal(hidden, labels, None, spec, inplace=inplace).backward()
        assert held.most <= most * logits.nbytes
        if not inplace:
            assert held.most >= logits.nbytes

    def test_blocks_cover_every_pixel_once(self):
        for shape in ((3, 5, 7, 4), (2, 300, 40, 40), (1, 2, 1, 1), (0, 4, 2, 2)):
            seen = torch.zeros(shape)
            for images, rows in _cpu._blocks(seen, 2**14):
                seen[images, :, rows] += 1
            assert bool((seen == 1).all())
