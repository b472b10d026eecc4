"""r1_penalty: the squared slope of a discriminator, against closed forms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st
from support import assert_close64, assert_message
from torch import nn

from dpsims.errors import DTypeError, InputError
from dpsims.losses import r1_penalty
from dpsims.nn import ConditionedBackbone, ProjectedDiscriminator


def pictures(seed, batch=2, size=4):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64)
    return images.requires_grad_()


seeds = st.integers(0, 2**20)


@given(seeds, st.integers(1, 4), st.floats(0, 5))
def test_a_linear_discriminator_has_its_own_norm(seed, batch, weight):
    images = pictures(seed, batch)
    direction = pictures(seed + 1, 1).detach()
    logits = (images * direction).sum((1, 2, 3))
    expected = weight / 2 * direction.square().sum()
    assert_close64(r1_penalty(logits, images, weight=weight), expected)


@given(seeds)
def test_a_quadratic_discriminator_has_the_norm_of_the_image(seed):
    images = pictures(seed, 3)
    logits = images.square().sum((1, 2, 3)) / 2
    expected = images.detach().square().sum((1, 2, 3)).mean() / 2
    assert_close64(r1_penalty(logits, images), expected)


@given(seeds)
def test_more_patches_of_one_opinion_are_no_larger_penalty(seed):
    images = pictures(seed)
    logits = images.sin().sum((1, 2, 3))
    patches = logits.view(2, 1, 1, 1).expand(2, 1, 5, 7)
    expected = r1_penalty(logits, images)
    assert_close64(r1_penalty(patches, images), expected)
    assert_close64(r1_penalty([logits, patches, logits[:, None]], images), expected)


@given(seeds)
def test_images_are_judged_one_by_one(seed):
    images = pictures(seed, 3)
    whole = r1_penalty(images.sin().sum((1, 2, 3)), images)
    alone = []
    for image in images.detach().split(1):
        image = image.requires_grad_()
        alone.append(r1_penalty(image.sin().sum((1, 2, 3)), image))
    assert_close64(whole, torch.stack(alone).mean())


def test_a_head_that_ignores_the_image_is_flat():
    images = pictures(0)
    logits = images.sin().sum((1, 2, 3))
    flat = torch.zeros(2, 1, dtype=torch.float64)
    # the score is the mean of two heads, so its slope is half of the first one's
    assert_close64(r1_penalty([logits, flat], images), r1_penalty(logits, images) / 4)


def test_equals_finite_differences_and_goes_twice():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Tanh(), nn.Conv2d(2, 1, 2)).double()
    images = pictures(1, 2)
    penalty = r1_penalty(net(images), images)
    step, total = 1e-5, 0.0
    with torch.no_grad():
        for index in range(2):
            for place in range(images[0].numel()):
                nudge = torch.zeros_like(images)
                nudge[index].view(-1)[place] = step
                ends = [net(images + sign * nudge)[index].mean() for sign in (1, -1)]
                total += ((ends[0] - ends[1]) / (2 * step)).square().item()
    # central differences: an error of step squared
    assert penalty.item() == pytest.approx(total / 2 / 2, rel=1e-6)

    def with_weight(weight):
        logits = torch.func.functional_call(net, {"0.weight": weight}, (images,))
        return r1_penalty(logits, images)

    weight = net[0].weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(with_weight, (weight,), fast_mode=False)


def test_goes_through_a_frozen_backbone_and_spectral_norm():
    torch.manual_seed(0)
    backbone = ConditionedBackbone("test_resnet", pretrained=False, num_levels=2)
    model = ProjectedDiscriminator(backbone, head_channels=4)
    images = torch.randn(2, 3, 64, 64, requires_grad=True)
    penalty = r1_penalty(model(images), images, weight=10.0)
    slopes = torch.autograd.grad(penalty, [p for p in model.parameters() if p.ndim > 1])
    assert penalty.item() > 0
    assert all(slope.isfinite().all() for slope in slopes)
    assert any(slope.abs().max() > 0 for slope in slopes)


def test_half_precision_squares_in_float32():
    images = torch.full((1, 3, 8, 8), 100.0, dtype=torch.float16, requires_grad=True)
    logits = (images.float().square().sum((1, 2, 3)) / 2).float()
    penalty = r1_penalty(logits, images)
    # 192 squares of 100 are 1.92e6: too large for float16
    assert penalty.dtype == torch.float32
    assert penalty.item() == pytest.approx(192 * 100**2 / 2)


@pytest.mark.parametrize(
    ("error", "parts", "make"),
    [
        pytest.param(
            InputError,
            ["images must require a gradient", "requires_grad_()"],
            lambda x: (x.sum((1, 2, 3)), x.detach()),
            id="constant-images",
        ),
        pytest.param(
            InputError,
            ["logits must depend on images"],
            lambda x: (x.detach().sum((1, 2, 3)), x),
            id="detached-logits",
        ),
        pytest.param(
            InputError,
            ["logits must depend on images"],
            lambda x: ((x.detach().requires_grad_() * 2).sum((1, 2, 3)), x),
            id="logits-of-a-copy",
        ),
        pytest.param(
            InputError,
            ["logits must have shape (B=2, ...)", "(6,)"],
            lambda x: (x.sum((2, 3)).flatten(), x),
            id="batch-size",
        ),
        pytest.param(
            InputError, ["images must have shape"], lambda x: (x.sum((1, 2, 3)), x[0]), id="rank"
        ),
        pytest.param(
            InputError,
            ["images must be on device"],
            lambda x: (x.sum((1, 2, 3)), x.detach().to("meta").requires_grad_()),
            id="device",
        ),
        pytest.param(DTypeError, ["images must"], lambda x: (x.sum((1, 2, 3)), None), id="none"),
        pytest.param(
            DTypeError, ["logits must"], lambda x: (x.sum((1, 2, 3)).long(), x), id="integers"
        ),
    ],
)
def test_bad_inputs(error, parts, make):
    with pytest.raises(error) as caught:
        r1_penalty(*make(pictures(0)))
    assert_message(caught.value, "r1_penalty: ", "; got ", *parts)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_needs_gradients(mode):
    images = pictures(0)
    logits = images.sum((1, 2, 3))
    with mode(), pytest.raises(InputError) as caught:
        r1_penalty(logits, images)
    assert_message(caught.value, "gradients switched on", "switched off")
