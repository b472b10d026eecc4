"""label_mix and label_mix_loss: relations, bad inputs, reference vectors."""

from __future__ import annotations

import itertools

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
from dpsims.losses.labelmix import label_mix, label_mix_loss

CLASSES = 5


@st.composite
def problems(draw):
    """Real and fake images, labels with some pixels ignored, a seed."""
    sizes = st.integers(1, 6)
    batch, channels, height, width = draw(st.tuples(st.integers(1, 3), sizes, sizes, sizes))
    seed = draw(st.integers(0, 2**32 - 1))
    generator = torch.Generator().manual_seed(seed)
    shape = (2, batch, channels, height, width)
    real, fake = torch.randn(shape, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (batch, height, width), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = 255
    return real, fake, labels, seed


def mix(real, fake, labels, seed, **options):
    generator = torch.Generator().manual_seed(seed)
    return label_mix(real, fake, labels, num_classes=CLASSES, generator=generator, **options)


class TestLabelMix:
    @given(problems())
    def test_every_class_is_wholly_real_or_wholly_fake(self, problem):
        real, fake, labels, _ = problem
        images, mask = mix(*problem)
        assert mask.shape == (len(labels), 1, *labels.shape[1:])
        for ids in labels.unique():
            assert len(mask[:, 0][labels == ids].unique()) == 1
        assert_equal(images, mask * real + (1 - mask) * fake)

    @given(problems())
    def test_swapping_the_sources_and_mixing_a_thing_with_itself(self, problem):
        real, fake, labels, seed = problem
        images, mask = mix(real, fake, labels, seed)
        swapped, same_mask = mix(fake, real, labels, seed)
        assert_equal(same_mask, mask)
        assert_equal(images + swapped, real + fake)
        assert_equal(mix(real, real, labels, seed).images, real)

    @given(problems(), st.sampled_from([torch.uint8, torch.int16, torch.int32]))
    def test_label_dtypes_agree(self, problem, dtype):
        real, fake, labels, seed = problem
        assert_equal(mix(real, fake, labels.to(dtype), seed).mask, mix(*problem).mask)

    @given(problems())
    def test_an_unchosen_source_does_not_leak(self, problem):
        real, fake, labels, seed = problem
        mask = mix(*problem).mask
        real = torch.where(mask == 1, real, torch.nan).requires_grad_()
        fake = torch.where(mask == 1, torch.inf, fake).requires_grad_()
        images = mix(real, fake, labels, seed).images
        assert bool(images.isfinite().all())
        real_grad, fake_grad = torch.autograd.grad(images.sum(), (real, fake))
        assert_equal(real_grad, mask.expand_as(real))
        assert_equal(fake_grad, 1 - mask.expand_as(fake))

    def test_coins_are_fair_and_independent(self):
        # five classes and the unlabelled pixels: 64 equally likely masks
        labels = torch.tensor([[[0, 1, 2, 3, 4, 255]]])
        pixels = torch.zeros(1, 1, 1, 6)
        generator = torch.Generator().manual_seed(0)
        draws = 3200
        counts = dict.fromkeys(itertools.product([0.0, 1.0], repeat=6), 0)
        for _ in range(draws):
            mixed = label_mix(pixels, pixels, labels, num_classes=CLASSES, generator=generator)
            counts[tuple(mixed.mask.flatten().tolist())] += 1
        # chi-square with 63 degrees of freedom exceeds 140 once in ten million seeds
        statistic = sum((count - draws / 64) ** 2 / (draws / 64) for count in counts.values())
        assert statistic < 140

    def test_an_ignored_class_has_a_coin_of_its_own(self):
        labels = torch.tensor([[[0, 1]]])
        pixels = torch.zeros(1, 1, 1, 2)
        masks = {
            tuple(
                label_mix(
                    pixels,
                    pixels,
                    labels,
                    num_classes=2,
                    ignore_index=0,
                    generator=torch.Generator().manual_seed(seed),
                )
                .mask.flatten()
                .tolist()
            )
            for seed in range(40)
        }
        assert len(masks) == 4

    def test_generator_alone_decides(self):
        real, fake = torch.randn(2, 2, 3, 8, 8)
        labels = torch.randint(CLASSES, (2, 8, 8))
        before = torch.get_rng_state()
        first = mix(real, fake, labels, 7)
        assert_equal(torch.get_rng_state(), before)
        assert_equal(mix(real, fake, labels, 7).images, first.images)
        torch.manual_seed(3)
        default = label_mix(real, fake, labels, num_classes=CLASSES).mask
        torch.manual_seed(3)
        assert_equal(label_mix(real, fake, labels, num_classes=CLASSES).mask, default)

    def test_dtypes_devices_and_empty_batches(self):
        labels = torch.randint(CLASSES, (2, 4, 4))
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            images, mask = mix(*torch.randn(2, 2, 3, 4, 4).to(dtype), labels, 0)
            assert images.dtype == mask.dtype == dtype
        wide = torch.randn(2, 2, 3, 4, 4)
        last = [image.to(memory_format=torch.channels_last) for image in wide]
        mixed = mix(*last, labels, 0).images
        assert_equal(mixed, mix(*wide, labels, 0).images)
        assert mixed.is_contiguous(memory_format=torch.channels_last)
        assert mix(*wide[:, :0], labels[:0], 0).images.shape == (0, 3, 4, 4)
        meta = mix(*wide.to("meta"), labels.to("meta"), 0)
        assert meta.images.shape == (2, 3, 4, 4)
        assert meta.mask.shape == (2, 1, 4, 4)

    def test_bad_ids_are_nan_where_they_cannot_raise(self):
        # under vmap, as on a GPU, values are not looked at
        labels = torch.tensor([[[[0, 1, 5, -1]]]])
        images = torch.zeros(1, 1, 3, 1, 4)

        def mixed(real, fake, labels):
            return label_mix(real, fake, labels, num_classes=CLASSES).images

        vmapped = torch.func.vmap(mixed, randomness="same")
        bad = vmapped(images, images, labels).isnan()[0, 0, :, 0]
        assert bad.tolist() == [[False, False, True, True]] * 3


class TestLoss:
    @given(problems())
    def test_mean_of_squares(self, problem):
        real, fake, _, _ = problem
        mask = mix(*problem).mask
        mixed = torch.randn(real.shape, dtype=real.dtype)
        loss = label_mix_loss(mixed, real, fake, mask)
        assert_close64(loss, (mixed - mask * real - (1 - mask) * fake).square().mean())
        assert_close64(label_mix_loss(mixed, fake, real, 1 - mask), loss)
        assert_close64(label_mix_loss(3 * mixed, 3 * real, 3 * fake, mask), 9 * loss)
        assert label_mix_loss(torch.where(mask == 1, real, fake), real, fake, mask) == 0

    def test_gradcheck(self):
        logits = torch.randn(3, 2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
        mask = torch.randint(2, (2, 1, 2, 2)).double()

        def loss(logits):
            return label_mix_loss(*logits, mask)

        assert torch.autograd.gradcheck(loss, logits, fast_mode=False)
        assert torch.autograd.gradgradcheck(loss, logits, fast_mode=False)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_is_summed_in_float32(self, dtype):
        # squares of 300 overflow float16, and sums of 1 in bfloat16 stop at 256
        mixed = torch.full((1, 4, 32, 32), 300.0, dtype=dtype, requires_grad=True)
        zero = torch.zeros(1, 4, 32, 32, dtype=dtype)
        mask = torch.ones(1, 1, 32, 32)
        loss = label_mix_loss(mixed, zero, zero, mask)
        torch.testing.assert_close(loss.detach(), torch.tensor(9e4), rtol=1e-6, atol=0)
        loss.backward()
        assert mixed.grad.dtype == dtype

    def test_nan_and_empty(self):
        zero, mask = torch.zeros(1, 2, 1, 2), torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
        junk = torch.full_like(zero, torch.nan)
        assert label_mix_loss(zero, torch.where(mask == 1, zero, junk), zero, mask) == 0
        for arguments in ((junk, zero, zero), (zero, junk, zero), (zero, zero, junk)):
            assert label_mix_loss(*arguments, mask).isnan()
        assert label_mix_loss(zero, zero, zero, mask * torch.nan).isnan()
        empty = zero[:0].requires_grad_()
        loss = label_mix_loss(empty, empty, empty, mask[:0])
        assert loss == 0
        loss.backward()


IMAGES, LABELS = torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 5, dtype=torch.long)
BAD_MIX = {
    "real-list": ({"real": [0]}, DTypeError, ["real", "torch.Tensor", "list"]),
    "real-integer": ({"real": IMAGES.long()}, DTypeError, ["real", "floating", "int64"]),
    "real-rank": ({"real": IMAGES[0]}, InputError, ["real", "(B, C, H, W)", "(3, 4, 5)"]),
    "fake-shape": ({"fake": IMAGES[:, :1]}, InputError, ["fake", "C=3", "(2, 1, 4, 5)"]),
    "fake-dtype": ({"fake": IMAGES.double()}, DTypeError, ["fake", "float32", "float64"]),
    "fake-device": ({"fake": IMAGES.to("meta")}, InputError, ["fake", "cpu", "meta"]),
    "labels-float": ({"labels": LABELS.float()}, DTypeError, ["labels", "integer", "float32"]),
    "labels-one-hot": ({"labels": IMAGES.long()}, InputError, ["labels", "(2, 3, 4, 5)"]),
    "labels-size": ({"labels": LABELS.mT}, InputError, ["labels", "H=4", "(2, 5, 4)"]),
    "label-is-k": ({"labels": LABELS + 5}, InputError, ["[0, 5)", "5 at (0, 0, 0)"]),
    "label-255-counts": (
        {"labels": LABELS + 255, "ignore_index": None},
        InputError,
        ["[0, 5)", "255 at"],
    ),
    "classes-zero": ({"num_classes": 0}, InputError, ["num_classes", "at least 1"]),
    "ignore-float": ({"ignore_index": 2.5}, DTypeError, ["ignore_index", "2.5"]),
    "generator-seed": ({"generator": 0}, DTypeError, ["generator", "torch.Generator", "int"]),
}
MASK = torch.ones(2, 1, 4, 5)
BAD_LOSS = {
    "mixed-none": ({"mixed_logits": None}, DTypeError, ["mixed_logits", "NoneType"]),
    "real-shape": ({"real_logits": IMAGES[:1]}, InputError, ["real_logits", "B=2"]),
    "fake-size": ({"fake_logits": IMAGES.mT}, InputError, ["fake_logits", "H=4"]),
    "fake-device": ({"fake_logits": IMAGES.to("meta")}, InputError, ["fake_logits", "meta"]),
    "mask-channels": ({"mask": IMAGES}, InputError, ["mask", "C=1", "(2, 3, 4, 5)"]),
    "mask-rank": ({"mask": MASK[:, 0]}, InputError, ["mask", "(2, 4, 5)"]),
    "mask-bool": ({"mask": MASK > 0}, DTypeError, ["mask", "floating", "bool"]),
    "mask-soft": ({"mask": MASK / 2}, InputError, ["mask", "0 and 1", "[0.5, 0.5]"]),
}


@pytest.mark.parametrize("case", BAD_MIX)
def test_bad_mix(case):
    options, error, parts = BAD_MIX[case]
    arguments = {"real": IMAGES, "fake": IMAGES, "labels": LABELS, "num_classes": CLASSES}
    with pytest.raises(error) as caught:
        label_mix(**(arguments | options))
    assert_message(caught.value, "label_mix: ", *parts)


@pytest.mark.parametrize("case", BAD_LOSS)
def test_bad_loss(case):
    options, error, parts = BAD_LOSS[case]
    arguments = dict.fromkeys(("mixed_logits", "real_logits", "fake_logits"), IMAGES)
    with pytest.raises(error) as caught:
        label_mix_loss(**(arguments | {"mask": MASK} | options))
    assert_message(caught.value, "label_mix_loss: ", *parts)


@pytest.mark.parametrize("case", golden_cases("a_labelmix"))
def test_golden(case):
    golden = Golden(case)
    mask = golden.f64("mask")
    real, fake = golden.f64("real"), golden.f64("fake")
    # the stored mask stands for a label map of two classes whose coins fell 0 and 1
    generator, labels = torch.Generator(), mask[:, 0].long()
    for seed in range(100):
        mixed = label_mix(real, fake, labels, num_classes=2, generator=generator.manual_seed(seed))
        if torch.equal(mixed.mask, mask):
            break
    assert_equal(mixed.mask, mask)
    assert_golden64(mixed.images, golden, "mixed")
    logits = [golden.f64(f"D_{name}").requires_grad_() for name in ("mixed", "real", "fake")]
    loss = label_mix_loss(*logits, mask)
    assert_golden64(loss, golden, "loss_labelmix")
    for name, grad in zip(
        ("mixed", "real", "fake"), torch.autograd.grad(loss, logits), strict=True
    ):
        assert_golden64(grad, golden, f"grad_D_{name}")
