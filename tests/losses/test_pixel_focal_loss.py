"""PixelFocalLoss: what both players minimise, against its parts and against reference vectors."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
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
from dpsims.losses.focal import PixelFocalLoss, pixel_focal_loss


@st.composite
def problems(draw):
    """float64 logits of both kinds, labels with some pixels ignored."""
    sizes = st.integers(1, 4)
    batch, classes, height, width = draw(st.tuples(sizes, st.integers(1, 6), sizes, sizes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    shape = (2, batch, classes + 1, height, width)
    real, fake = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (batch, height, width), generator=generator)
    share = draw(st.sampled_from([0.0, 0.4, 1.0]))
    labels[torch.rand(labels.shape, generator=generator) < share] = 255
    return real, fake, labels, classes


def weigh(labels, classes):
    """Balanced class weights, with 1 for the fake class."""
    return F.pad(class_balance_weights(labels, classes, dtype=torch.float64), (0, 1), value=1.0)


class TestRelations:
    @given(problems(), st.sampled_from([0.0, 2.0]), st.booleans())
    def test_discriminator_is_two_focal_losses(self, problem, gamma, balanced):
        real, fake, labels, classes = problem
        loss = PixelFocalLoss(classes, gamma=gamma, balanced=balanced, label_smoothing=0.1)
        weights = weigh(labels, classes) if balanced else None
        terms = loss.discriminator_terms(real, fake, labels)
        assert_close64(
            terms.real,
            pixel_focal_loss(
                real, labels, gamma=gamma, class_weights=weights, label_smoothing=0.1
            ),
        )
        everywhere = torch.full_like(labels, classes)
        assert_close64(
            terms.fake, pixel_focal_loss(fake, everywhere, gamma=gamma, ignore_index=None)
        )
        assert_equal(loss.discriminator(real, fake, labels), terms.real + terms.fake)

    @given(problems(), st.sampled_from([0.0, 2.0]), st.booleans())
    def test_generator_is_never_smoothed(self, problem, gamma, balanced):
        _, fake, labels, classes = problem
        loss = PixelFocalLoss(classes, gamma=gamma, balanced=balanced, label_smoothing=0.1)
        weights = weigh(labels, classes) if balanced else None
        expected = pixel_focal_loss(fake, labels, gamma=gamma, class_weights=weights)
        assert_close64(loss.generator(fake, labels), expected)

    @given(problems(), st.sampled_from(["mean", "valid_mean", "sum"]))
    def test_mask_fake_leaves_unlabelled_fakes_out(self, problem, reduction):
        real, fake, labels, classes = problem
        fake = torch.where((labels == 255)[:, None], torch.nan, fake).requires_grad_()
        loss = PixelFocalLoss(classes, mask_fake=True, reduction=reduction)
        term = loss.discriminator_terms(real, fake, labels).fake
        everywhere = torch.where(labels == 255, 255, classes)
        assert_close64(term, pixel_focal_loss(fake, everywhere, reduction=reduction))
        (grad,) = torch.autograd.grad(term, fake)
        assert bool((grad.movedim(1, -1)[labels == 255] == 0).all())

    @given(problems())
    def test_repeating_the_batch_changes_nothing(self, problem):
        real, fake, labels, classes = problem
        loss = PixelFocalLoss(classes, label_smoothing=0.1)
        once = (real, fake, labels)
        twice = [torch.cat([tensor, tensor]) for tensor in once]
        assert_close64(loss.discriminator(*twice), loss.discriminator(*once))
        assert_close64(loss.generator(*twice[1:]), loss.generator(*once[1:]))

    @given(problems())
    def test_an_ignored_class_is_as_good_as_255(self, problem):
        real, fake, labels, classes = problem
        labels = labels.clamp(max=classes - 1)
        masked = torch.where(labels == 0, 255, labels)
        for options in ({}, {"mask_fake": True}, {"balanced": False}):
            inside = PixelFocalLoss(classes, ignore_index=0, **options)
            outside = PixelFocalLoss(classes, **options)
            assert_equal(
                inside.discriminator(real, fake, labels),
                outside.discriminator(real, fake, masked),
            )
            assert_equal(inside.generator(fake, labels), outside.generator(fake, masked))
        beyond = PixelFocalLoss(classes, ignore_index=classes)
        masked = torch.where(labels == 0, classes, labels)
        assert_equal(
            beyond.generator(fake, masked),
            PixelFocalLoss(classes, ignore_index=0).generator(fake, labels),
        )


class TestUse:
    def test_float32_out_of_half_and_float64_kept(self):
        labels = torch.randint(3, (2, 4, 4))
        loss = PixelFocalLoss(3)
        for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
            real, fake = torch.randn(2, 2, 4, 4, 4).to(dtype)
            assert loss.discriminator(real, fake, labels).dtype == expected
            assert loss.generator(fake, labels).dtype == expected

    @pytest.mark.parametrize("reduction", ["mean", "valid_mean", "sum"])
    def test_no_label_at_all_is_zero(self, reduction):
        logits = torch.full((2, 4, 3, 3), torch.nan, requires_grad=True)
        labels = torch.full((2, 3, 3), 255, dtype=torch.uint8)
        loss = PixelFocalLoss(3, reduction=reduction, mask_fake=True)
        for value in (
            loss.generator(logits, labels),
            loss.discriminator(logits, logits, labels),
        ):
            assert value == 0
            (grad,) = torch.autograd.grad(value, logits)
            assert_equal(grad, torch.zeros_like(grad))

    @pytest.mark.parametrize("balanced", [True, False])
    def test_the_fake_id_as_a_label_is_nan_where_it_cannot_raise(self, balanced):
        # under vmap, as on a GPU, values are not looked at; K must not pass for the fake class
        labels = torch.full((1, 1, 2, 2), 3)
        loss = torch.func.vmap(PixelFocalLoss(3, balanced=balanced).generator)
        assert bool(loss(torch.randn(1, 1, 4, 2, 2), labels).isnan().all())

    def test_copies_and_says_its_options(self):
        loss = PixelFocalLoss(3, label_smoothing=0.1, mask_fake=True)
        text = repr(loss)
        assert text.startswith("PixelFocalLoss(num_classes=3, gamma=2.0")
        assert "label_smoothing=0.1" in text
        for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
            assert repr(twin) == text


LOGITS, LABELS = torch.zeros(2, 4, 3, 3), torch.zeros(2, 3, 3, dtype=torch.long)
BAD_OPTIONS = {
    "classes-zero": ({"num_classes": 0}, InputError, ["num_classes", "at least 1", "0"]),
    "classes-float": ({"num_classes": 3.0}, DTypeError, ["num_classes", "int", "float"]),
    "gamma-negative": ({"gamma": -1}, InputError, ["gamma", ">= 0", "-1"]),
    "gamma-inf": ({"gamma": torch.inf}, InputError, ["gamma", "finite", "inf"]),
    "smoothing-one": ({"label_smoothing": 1}, InputError, ["label_smoothing", "< 1"]),
    "smoothing-str": ({"label_smoothing": "0"}, DTypeError, ["label_smoothing", "str"]),
    "ignore-bool": ({"ignore_index": True}, DTypeError, ["ignore_index", "int", "True"]),
    "balanced-int": ({"balanced": 1}, DTypeError, ["balanced", "bool", "int"]),
    "mask-none": ({"mask_fake": None}, DTypeError, ["mask_fake", "bool", "NoneType"]),
    "sync-str": ({"sync": "yes"}, DTypeError, ["sync", "bool", "str"]),
    "reduction-none": ({"reduction": "none"}, InputError, ["reduction", "'sum'", "'none'"]),
}
BAD_INPUTS = {
    "logits-list": ([[1.0], LABELS], DTypeError, ["fake_logits", "Tensor", "list"]),
    "logits-channels": ([LOGITS[:, :3], LABELS], InputError, ["num_classes + 1 = 4", "got 3"]),
    "logits-rank": ([LOGITS[0], LABELS], InputError, ["fake_logits", "(4, 3, 3)"]),
    "logits-integer": ([LOGITS.long(), LABELS], DTypeError, ["fake_logits", "int64"]),
    "labels-float": ([LOGITS, LABELS.float()], DTypeError, ["labels", "integer", "float32"]),
    "labels-size": ([LOGITS, LABELS[:, 1:]], InputError, ["labels", "H=3", "(2, 2, 3)"]),
    "labels-channel": ([LOGITS, LABELS[:, None]], InputError, ["labels", "squeeze dim 1"]),
    "labels-device": ([LOGITS, LABELS.to("meta")], InputError, ["labels", "cpu", "meta"]),
    "label-is-the-fake-id": ([LOGITS, LABELS + 3], InputError, ["[0, 3)", "3 at (0, 0, 0)"]),
    "label-negative": ([LOGITS, LABELS - 1], InputError, ["[0, 3)", "-1 at (0, 0, 0)"]),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_option(case):
    options, error, parts = BAD_OPTIONS[case]
    with pytest.raises(error) as caught:
        PixelFocalLoss(**({"num_classes": 3} | options))
    assert_message(caught.value, "PixelFocalLoss: ", *parts)


@pytest.mark.parametrize("case", BAD_INPUTS)
@pytest.mark.parametrize("balanced", [True, False])
def test_bad_input(case, balanced):
    arguments, error, parts = BAD_INPUTS[case]
    loss = PixelFocalLoss(3, balanced=balanced)
    with pytest.raises(error) as caught:
        loss.generator(*arguments)
    assert_message(caught.value, "PixelFocalLoss.generator: ", *parts)
    with pytest.raises(error) as caught:
        loss.discriminator(LOGITS, *arguments)
    assert_message(caught.value, "PixelFocalLoss.discriminator: ", *parts)


def test_real_and_fake_must_be_alike():
    with pytest.raises(InputError) as caught:
        PixelFocalLoss(3).discriminator(LOGITS[:, :3], LOGITS, LABELS)
    assert_message(caught.value, "real_logits", "4 channels", "got 3")
    with pytest.raises(InputError) as caught:
        PixelFocalLoss(3).discriminator(LOGITS, LOGITS[:1], LABELS)
    assert_message(caught.value, "PixelFocalLoss.discriminator: labels", "B=1", "(2, 3, 3)")


def grad_of(function, logits, *arguments):
    logits = logits.clone().requires_grad_()
    loss = function(logits, *arguments)
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def fake_term(loss, real_logits, labels):
    return lambda logits: loss.discriminator_terms(real_logits, logits, labels).fake


class TestGolden:
    @pytest.mark.parametrize("case", golden_cases("a_oasis_loss"))
    def test_cross_entropy_of_oasis(self, case):
        golden = Golden(case)
        options = golden.options
        logits, labels = golden.f64("logits_fl"), golden.tensor("label")
        balanced = not options["no_balancing_inloss"]
        loss = PixelFocalLoss(
            logits.shape[1] - 1,
            gamma=0.0,
            balanced=balanced,
            ignore_index=0 if balanced and options["contain_dontcare_label"] else None,
        )
        for function in (
            loss.generator,
            lambda x, labels: loss.discriminator_terms(x, logits, labels).real,
        ):
            value, grad = grad_of(function, logits, labels)
            assert_golden64(value, golden, "loss_real")
            assert_golden64(grad, golden, "grad_real_fl")
        value, grad = grad_of(fake_term(loss, logits, labels), logits)
        assert_golden64(value, golden, "loss_fake")
        assert_golden64(grad, golden, "grad_fake_fl")

    @pytest.mark.parametrize("case", golden_cases("b_focal_paper_eq"))
    def test_paper(self, case):
        golden = Golden(case)
        real, fake = golden.f64("logits_real"), golden.f64("logits_fake")
        labels, ignore_index = golden.tensor("label"), int(golden.tensor("dontcare"))
        smoothings = golden.tensor("epss").tolist()
        sharp = smoothings.index(0.0)
        results = {}

        def collect(key, value):
            results.setdefault(key, []).append(value)

        for gamma in golden.tensor("gammas").tolist():
            options = {"gamma": gamma, "ignore_index": ignore_index}
            for smoothing in smoothings:
                loss = PixelFocalLoss(4, label_smoothing=smoothing, **options)
                collect("D_real_uniform_mean", loss.discriminator_terms(real, fake, labels).real)
            loss = PixelFocalLoss(4, **options)
            collect("LD_mean", loss.discriminator(real, fake, labels))
            value, grad = grad_of(fake_term(loss, real, labels), fake)
            collect("D_fake_scale_mean", value)
            collect("grad_D_fake_scale_mean", grad)
            value, grad = grad_of(loss.generator, fake, labels)
            collect("G_mean", value)
            collect("grad_G_mean", grad)
            total = PixelFocalLoss(4, reduction="sum", **options).generator(fake, labels)
            collect("G_sum", total / len(labels))
            flat = PixelFocalLoss(4, balanced=False, **options).generator(fake, labels)
            collect("G_unweighted_mean", flat)
        for key, entries in results.items():
            expected = golden.f64(key)
            if key in ("LD_mean", "D_fake_scale_mean", "grad_D_fake_scale_mean"):
                golden.arrays[f"sharp_{key}"] = expected[:, sharp].numpy()
                key = f"sharp_{key}"
            assert_golden64(torch.stack(entries).view(golden.f64(key).shape), golden, key)


def test_weights_of_the_whole_batch_make_the_mean_of_its_parts():
    source = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (4, 5, 6), generator=source)
    real, fake = torch.randn(2, 4, 4, 5, 6, generator=source, dtype=torch.float64)
    loss = PixelFocalLoss(3, label_smoothing=0.1)
    weights = class_balance_weights(labels, 3, dtype=torch.float64)
    parts = [slice(index, None, 2) for index in range(2)]
    terms = [
        loss.discriminator_terms(real[p], fake[p], labels[p], class_weights=weights) for p in parts
    ]
    whole = loss.discriminator_terms(real, fake, labels)
    assert_close64(torch.stack([t.real for t in terms]).mean(), whole.real)
    assert_close64(torch.stack([t.fake for t in terms]).mean(), whole.fake)
    values = [loss.generator(fake[p], labels[p], class_weights=weights) for p in parts]
    assert_close64(torch.stack(values).mean(), loss.generator(fake, labels))
    with pytest.raises(InputError, match="class_weights"):
        loss.generator(fake, labels, class_weights=weights[:2])
