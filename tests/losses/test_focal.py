"""pixel_focal_loss: relations, an oracle in numpy, gradients, reference vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from support import (
    Golden,
    assert_close64,
    assert_equal,
    assert_golden64,
    golden_cases,
)

from dpsims.losses.focal import pixel_focal_loss

GAMMAS = st.sampled_from([0.0, 0.3, 1.0, 2.0, 5.0])
SMOOTHINGS = st.sampled_from([0.0, 0.1])
IMPLS = ("auto", "reference")


@st.composite
def problems(draw, ignored=True):
    """float64 logits of any spread, labels with absent classes and ignored pixels, weights."""
    sizes = st.integers(1, 5)
    batch, channels, height, width = draw(st.tuples(sizes, st.integers(1, 9), sizes, sizes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    logits = torch.randn(batch, channels, height, width, generator=generator, dtype=torch.float64)
    logits = logits * draw(st.sampled_from([0.0, 1.0, 8.0, 60.0]))
    labels = torch.randint(channels, (batch, height, width), generator=generator)
    if ignored:
        share = draw(st.sampled_from([0.0, 0.5, 1.0]))
        labels[torch.rand(labels.shape, generator=generator) < share] = 255
    weights = torch.rand(channels, generator=generator, dtype=torch.float64) * 3
    return logits, labels, weights


def value_and_grad(logits, labels, **options):
    logits = logits.detach().clone().requires_grad_()
    loss = pixel_focal_loss(logits, labels, **options)
    loss.sum().backward()
    return loss.detach(), logits.grad


class TestRelations:
    @given(problems(), st.booleans())
    def test_gamma_zero_is_weighted_cross_entropy(self, problem, weighted):
        logits, labels, weights = problem
        weights = weights if weighted else None
        loss, grad = value_and_grad(logits, labels, gamma=0.0, class_weights=weights)
        logits = logits.requires_grad_()
        expected = F.cross_entropy(
            logits, labels, weight=weights, ignore_index=255, reduction="sum"
        )
        expected = expected / labels.numel()
        expected.backward()
        assert_close64(loss, expected.detach())
        assert_close64(grad, logits.grad)

    @given(problems())
    def test_gamma_zero_with_smoothing_is_smoothed_cross_entropy(self, problem):
        # torch weighs each class of a smoothed target apart, so only the unweighted forms agree
        logits, labels, _ = problem
        loss, grad = value_and_grad(logits, labels, gamma=0.0, label_smoothing=0.2)
        logits = logits.requires_grad_()
        expected = F.cross_entropy(
            logits, labels, ignore_index=255, reduction="sum", label_smoothing=0.2
        )
        expected = expected / labels.numel()
        expected.backward()
        assert_close64(loss, expected.detach())
        assert_close64(grad, logits.grad)

    @given(problems(), GAMMAS, GAMMAS)
    def test_never_negative_and_decreasing_in_gamma(self, problem, gamma, other):
        logits, labels, weights = problem
        low, high = sorted((gamma, other))
        options = {"class_weights": weights, "reduction": "none"}
        larger = pixel_focal_loss(logits, labels, gamma=low, **options)
        smaller = pixel_focal_loss(logits, labels, gamma=high, **options)
        assert bool((smaller >= 0).all())
        # (1 - p) ** gamma falls with gamma; pow may be off by one unit in the last place
        assert bool((smaller <= larger * (1 + 1e-14)).all())

    @given(GAMMAS, st.integers(2, 6), st.integers(0, 99))
    def test_decreasing_in_the_probability_of_the_label(self, gamma, channels, seed):
        generator = torch.Generator().manual_seed(seed)
        base = torch.randn(1, channels, 1, 1, generator=generator, dtype=torch.float64)
        logits = base.expand(-1, -1, 1, 50).clone()
        logits[:, 0] += torch.linspace(-30, 30, 50, dtype=torch.float64)
        labels = torch.zeros(1, 1, 50, dtype=torch.long)
        losses = pixel_focal_loss(logits, labels, gamma=gamma, reduction="none").flatten()
        assert bool((losses.diff() < 0).all())

    @given(problems(), GAMMAS, SMOOTHINGS)
    def test_linear_in_the_weights(self, problem, gamma, smoothing):
        logits, labels, weights = problem
        options = {"gamma": gamma, "label_smoothing": smoothing}
        other = weights.flip(0)
        parts = [
            value_and_grad(logits, labels, class_weights=w, **options)
            for w in (weights, other, 2 * weights + 3 * other)
        ]
        for first, second, combined in zip(*parts, strict=True):
            assert_close64(combined, 2 * first + 3 * second, scale=10)

    @given(problems(), GAMMAS, SMOOTHINGS, st.randoms(use_true_random=False))
    def test_permuting_classes_changes_nothing(self, problem, gamma, smoothing, random):
        logits, labels, weights = problem
        order = list(range(logits.shape[1]))
        random.shuffle(order)
        options = {"gamma": gamma, "label_smoothing": smoothing}
        loss, grad = value_and_grad(logits, labels, class_weights=weights, **options)
        rank = torch.tensor(order).argsort()
        renamed = torch.where(labels == 255, 255, rank[labels.clamp(max=len(order) - 1)])
        permuted, permuted_grad = value_and_grad(
            logits[:, order], renamed, class_weights=weights[order], **options
        )
        assert_close64(permuted, loss)
        assert_close64(permuted_grad, grad[:, order])

    @given(problems(), GAMMAS, SMOOTHINGS)
    def test_pixels_are_independent_and_equal(self, problem, gamma, smoothing):
        logits, labels, weights = problem
        options = {"gamma": gamma, "label_smoothing": smoothing, "class_weights": weights}
        loss, grad = value_and_grad(logits, labels, reduction="none", **options)
        turned, turned_grad = value_and_grad(
            logits.mT.flip(0), labels.mT.flip(0), reduction="none", **options
        )
        assert_close64(turned, loss.mT.flip(0))
        assert_close64(turned_grad, grad.mT.flip(0))

    @given(problems(), GAMMAS, SMOOTHINGS, st.floats(-100, 100))
    def test_adding_a_constant_to_a_pixel_changes_nothing(self, problem, gamma, smoothing, shift):
        logits, labels, _ = problem
        options = {"gamma": gamma, "label_smoothing": smoothing}
        # the shift itself rounds the logits by 1e-14, which a gradient of slope 1 passes on
        torch.testing.assert_close(
            value_and_grad(logits + shift, labels, **options),
            value_and_grad(logits, labels, **options),
            rtol=1e-10,
            atol=1e-11,
        )

    @given(problems(), GAMMAS, SMOOTHINGS, st.integers(1, 4))
    def test_mean_over_a_batch_is_the_mean_over_its_parts(self, problem, gamma, smoothing, cut):
        logits, labels, weights = problem
        options = {"gamma": gamma, "label_smoothing": smoothing, "class_weights": weights}
        cut = min(cut, len(labels))
        whole = pixel_focal_loss(logits, labels, **options)
        parts = sum(
            len(part) * pixel_focal_loss(logits[part], labels[part], **options)
            for part in (range(cut), range(cut, len(labels)))
            if len(part)
        )
        assert_close64(parts / len(labels), whole)

    @given(
        problems(), GAMMAS, SMOOTHINGS, st.sampled_from([0.0, torch.nan, torch.inf, -torch.inf])
    )
    def test_ignored_pixels_are_as_good_as_absent(self, problem, gamma, smoothing, junk):
        logits, labels, weights = problem
        options = {"gamma": gamma, "label_smoothing": smoothing, "class_weights": weights}
        options["reduction"] = "sum"
        keep = labels != 255
        logits = torch.where(keep[:, None], logits, junk)
        for impl in IMPLS:
            loss, grad = value_and_grad(logits, labels, impl=impl, **options)
            assert bool((grad.movedim(1, -1)[~keep] == 0).all())
            if bool(keep.any()):
                # the pixels that count, as one image of one row
                few = logits.movedim(1, -1)[keep].T[None, :, None]
                alone, alone_grad = value_and_grad(few, labels[keep][None, None], **options)
                assert_close64(loss, alone)
                # the plain form is NaN where p is 1 and gamma below 1
                if impl == "auto" or gamma != 0.3:
                    assert_close64(grad.movedim(1, -1)[keep], alone_grad[0, :, 0].T)
            else:
                assert loss == 0

    @given(problems(), GAMMAS, SMOOTHINGS)
    def test_gradient_sums_to_zero_and_is_bounded(self, problem, gamma, smoothing):
        logits, labels, weights = problem
        _, grad = value_and_grad(
            logits,
            labels,
            gamma=gamma,
            label_smoothing=smoothing,
            class_weights=weights,
            reduction="sum",
        )
        assert_close64(grad.sum(1), torch.zeros_like(grad[:, 0]))
        # the largest slope of -(1 - p) ** gamma log p by the logit of its class, over all p
        bound = weights.max() * (1 + gamma / np.e)
        assert bool((grad.abs() <= bound * (1 + 1e-12)).all())

    @given(problems(), st.sampled_from([0.0, 1.0, 2.0, 2.5]), SMOOTHINGS)
    def test_impls_agree(self, problem, gamma, smoothing):
        logits, labels, weights = problem
        options = {"gamma": gamma, "label_smoothing": smoothing, "class_weights": weights}
        closed, plain = (value_and_grad(logits, labels, impl=i, **options) for i in IMPLS)
        # the plain form takes 1 - p by subtraction, which costs it up to 1e-16 / (1 - p)
        torch.testing.assert_close(closed, plain, rtol=1e-7, atol=1e-12)

    @given(problems(), st.sampled_from([torch.uint8, torch.int16, torch.int32]))
    def test_label_dtypes_agree(self, problem, dtype):
        logits, labels, weights = problem
        for gamma in (0.0, 2.0):
            options = {"gamma": gamma, "class_weights": weights}
            expected = pixel_focal_loss(logits, labels, **options)
            assert_equal(pixel_focal_loss(logits, labels.to(dtype), **options), expected)

    @given(problems())
    def test_reductions_agree(self, problem):
        logits, labels, weights = problem
        pixels = pixel_focal_loss(logits, labels, class_weights=weights, reduction="none")
        valid = int((labels != 255).sum())
        for reduction, divisor in (("sum", 1), ("mean", labels.numel()), ("valid_mean", valid)):
            loss = pixel_focal_loss(logits, labels, class_weights=weights, reduction=reduction)
            assert_close64(loss, pixels.sum() / max(1, divisor))

    @given(problems(ignored=False), st.integers(0, 8))
    def test_an_ignored_class_is_as_good_as_255(self, problem, chosen):
        logits, labels, weights = problem
        chosen = chosen % logits.shape[1]
        masked = torch.where(labels == chosen, 255, labels)
        assert_equal(
            pixel_focal_loss(logits, labels, class_weights=weights, ignore_index=chosen),
            pixel_focal_loss(logits, masked, class_weights=weights),
        )


def oracle(logits, labels, weights, gamma, smoothing):
    """The paper's sum, pixel by pixel, in numpy."""
    batch, channels, height, width = logits.shape
    losses = np.zeros((batch, height, width))
    for b, y, x in np.ndindex(batch, height, width):
        label = labels[b, y, x]
        if label == 255:
            continue
        scores = np.exp(logits[b, :, y, x] - logits[b, :, y, x].max())
        p = scores / scores.sum()
        target = np.full(channels, smoothing / channels)
        target[label] += 1 - smoothing
        losses[b, y, x] = -weights[label] * (target * (1 - p) ** gamma * np.log(p)).sum()
    return losses


class TestOracle:
    @given(problems(), GAMMAS, SMOOTHINGS)
    def test_values(self, problem, gamma, smoothing):
        logits, labels, weights = problem
        # numpy's log(p) and 1 - p need p well inside (0, 1)
        logits = logits.clamp(-10, 10)
        expected = oracle(logits.numpy(), labels.numpy(), weights.numpy(), gamma, smoothing)
        for impl in IMPLS:
            loss = pixel_focal_loss(
                logits,
                labels,
                gamma=gamma,
                label_smoothing=smoothing,
                class_weights=weights,
                reduction="none",
                impl=impl,
            )
            # 1 - p loses up to 1e-16 / (1 - p) = 1e-7 to the oracle's subtraction, at loss 1e-9
            torch.testing.assert_close(loss, torch.from_numpy(expected), rtol=1e-7, atol=1e-12)

    @given(st.floats(-40, 0), st.sampled_from([0.3, 1.0, 2.0]))
    def test_gradient_of_one_pixel(self, gap, gamma):
        # two classes with logits (0, gap): written from the chain rule, with 1 - p as a sigmoid
        logits = torch.tensor([0.0, gap], dtype=torch.float64).view(1, 2, 1, 1)
        _, grad = value_and_grad(logits, torch.zeros(1, 1, 1, dtype=torch.long), gamma=gamma)
        rest = 1 / (1 + np.exp(-gap))
        p, log_p = 1 - rest, -np.log1p(np.exp(gap))
        expected = gamma * rest**gamma * p * log_p - rest ** (gamma + 1)
        expected = torch.tensor([expected, -expected], dtype=torch.float64)
        # the sum of exponentials rounds to 1e-16 beside 1, which moves rest by as much
        atol = (1 + gamma) ** 2 * rest**gamma * 3e-16
        torch.testing.assert_close(grad.flatten(), expected, rtol=1e-12, atol=atol)

    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    @pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.0, 5.0])
    @pytest.mark.parametrize("impl", IMPLS)
    def test_gradcheck(self, gamma, smoothing, impl):
        logits = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
        labels = torch.tensor([[[0, 1], [2, 255]], [[0, 0], [255, 1]]])
        weights = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)

        def loss(logits):
            return pixel_focal_loss(
                logits,
                labels,
                gamma=gamma,
                label_smoothing=smoothing,
                class_weights=weights,
                reduction="none",
                impl=impl,
            )

        assert torch.autograd.gradcheck(loss, logits, fast_mode=False)
        assert torch.autograd.gradgradcheck(loss, logits, fast_mode=False)


class TestGolden:
    @pytest.mark.parametrize("case", golden_cases("b_focal_paper_eq"))
    def test_paper(self, case):
        golden = Golden(case)
        logits, labels = golden.f64("logits_real"), golden.tensor("label")
        ignore_index = int(golden.tensor("dontcare"))
        weights = F.pad(golden.f64("alpha"), (0, 1), value=1.0)
        grads, values = [], {}
        for gamma in golden.tensor("gammas").tolist():
            for smoothing in golden.tensor("epss").tolist():
                options = {"gamma": gamma, "class_weights": weights}
                options["ignore_index"] = ignore_index
                values.setdefault("D_real_uniform_mean", []).append(
                    pixel_focal_loss(logits, labels, label_smoothing=smoothing, **options)
                )
                loss, grad = value_and_grad(logits, labels, **options)
                # a target of 1 - eps with nothing elsewhere only scales the sharp loss
                values.setdefault("D_real_scale_mean", []).append((1 - smoothing) * loss)
                values.setdefault("D_real_scale_sum", []).append(
                    (1 - smoothing)
                    * pixel_focal_loss(logits, labels, reduction="sum", **options)
                    / len(labels)
                )
                grads.append((1 - smoothing) * grad)
            values.setdefault("pixel_focal_real", []).append(
                pixel_focal_loss(logits, labels, gamma=gamma, ignore_index=None, reduction="none")
            )
        for key, entries in values.items():
            stacked = torch.stack(entries)
            assert_golden64(stacked.view(golden.f64(key).shape), golden, key)
        grads = torch.stack(grads).view(golden.f64("grad_D_real_scale_mean").shape)
        assert_golden64(grads, golden, "grad_D_real_scale_mean")
