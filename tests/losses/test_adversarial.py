"""AdversarialLoss: three kinds, many heads, and the penalty inside it."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from support import assert_close64, assert_equal, assert_message

from dpsims.errors import DTypeError, InputError
from dpsims.losses import AdversarialLoss, PixelFocalLoss, r1_penalty

KINDS = ("hinge", "softplus")


@st.composite
def heads(draw, count=None):
    """float64 logits of one to three heads of any rank."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    shapes = draw(
        st.lists(
            st.lists(st.integers(1, 4), min_size=1, max_size=4),
            min_size=count or 1,
            max_size=count or 3,
        )
    )
    scale = draw(st.sampled_from([0.3, 3.0, 60.0]))
    return [
        scale * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    ]


def oracle(kind, real, fake, smoothing=0.0):
    """Both players' losses in numpy."""

    def plus(x):
        return np.logaddexp(0, x)

    if kind == "hinge":
        costs = (lambda x: np.maximum(0, 1 - x), lambda x: np.maximum(0, 1 + x), lambda x: -x)
    else:
        costs = (
            lambda x: (1 - smoothing) * plus(-x) + smoothing * plus(x),
            plus,
            lambda x: plus(-x),
        )

    def mean(cost, logits):
        return torch.tensor(np.mean([cost(x.numpy()).mean() for x in logits]))

    return mean(costs[0], real), mean(costs[1], fake), mean(costs[2], fake)


class TestRelations:
    @given(heads(2), heads(2), st.sampled_from(KINDS))
    def test_equals_numpy(self, real, fake, kind):
        loss = AdversarialLoss(kind)
        expected = oracle(kind, real, fake)
        terms = loss.discriminator_terms(real, fake)
        for actual, wanted in zip((*terms[:2], loss.generator(fake)), expected, strict=True):
            assert_close64(actual, wanted)
        assert_close64(loss.discriminator(real, fake), expected[0] + expected[1])

    @given(heads(), st.floats(0.01, 0.99))
    def test_smoothing_mixes_the_two_targets(self, real, smoothing):
        terms = AdversarialLoss("softplus", label_smoothing=smoothing).discriminator_terms(
            real, real
        )
        expected = oracle("softplus", real, real, smoothing)
        assert_close64(terms.real, expected[0])
        assert_close64(terms.fake, expected[1])

    @given(heads(1), st.sampled_from(KINDS))
    def test_one_head_is_its_tensor(self, logits, kind):
        loss = AdversarialLoss(kind)
        for one, other in ((logits[0], logits), (tuple(logits), logits)):
            assert_equal(loss.generator(one), loss.generator(other))
            assert_equal(loss.discriminator(one, other), loss.discriminator(other, one))

    @given(heads(), st.sampled_from(KINDS))
    def test_every_head_counts_the_same_whatever_its_size(self, logits, kind):
        loss = AdversarialLoss(kind)
        alone = torch.stack([loss.generator(head) for head in logits])
        assert_close64(loss.generator(logits), alone.mean())
        assert_close64(loss.generator(logits[::-1]), alone.mean())
        # a head seen twice as finely is no more important
        grown = [logits[0].repeat_interleave(3, 0), *logits[1:]]
        assert_close64(loss.generator(grown), loss.generator(logits))

    @given(heads(2), st.sampled_from(KINDS))
    def test_real_and_fake_change_roles_with_the_sign(self, logits, kind):
        loss = AdversarialLoss(kind)
        terms = loss.discriminator_terms(logits[:1], logits[1:])
        mirrored = loss.discriminator_terms([-logits[1]], [-logits[0]])
        assert_close64(terms.real, mirrored.fake)
        assert_close64(terms.fake, mirrored.real)

    @given(heads(1), st.sampled_from(KINDS))
    def test_better_fakes_cost_the_generator_less(self, logits, kind):
        loss = AdversarialLoss(kind)
        assert loss.generator([logits[0] + 1]) < loss.generator(logits)
        assert loss.discriminator_terms(logits, [logits[0] + 1]).fake >= (
            loss.discriminator_terms(logits, logits).fake
        )

    def test_a_perfect_hinge_discriminator_pays_nothing_and_learns_nothing(self):
        real = torch.full((3,), 1.5, requires_grad=True)
        loss = AdversarialLoss("hinge").discriminator(real, -real)
        assert loss.item() == 0
        (slope,) = torch.autograd.grad(loss, real)
        assert not slope.any()

    def test_an_undecided_softplus_discriminator_pays_two_bits(self):
        zeros = torch.zeros(2, 1, 4, 4, dtype=torch.float64)
        loss = AdversarialLoss("softplus")
        assert_close64(loss.discriminator(zeros, zeros), torch.tensor(2 * np.log(2)))

    def test_large_logits_stay_finite_and_keep_their_gradient(self):
        logits = torch.tensor([-1e30, -90.0, 30.0, 90.0, 1e30], requires_grad=True)
        for loss in (AdversarialLoss(kind) for kind in KINDS):
            total = loss.discriminator(logits, logits) + loss.generator(logits)
            (slope,) = torch.autograd.grad(total, logits)
            assert slope.isfinite().all()
            assert total.isfinite()
        # torch's softplus is linear beyond 20, with a slope of exactly 1 and no curvature
        far = torch.tensor([-21.0], dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(
            AdversarialLoss("softplus").generator(far), far, create_graph=True
        )
        assert slope.item() == pytest.approx(-1 / (1 + np.exp(-21.0)), rel=1e-13)
        (bend,) = torch.autograd.grad(slope, far)
        assert bend.item() == pytest.approx(np.exp(-21.0), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    # away from the hinge's corners at 1 and -1
    logits = torch.tensor([[-2.0, -0.4], [0.3, 1.8]], dtype=torch.float64, requires_grad=True)
    other = torch.tensor([0.7, -1.7, 2.1], dtype=torch.float64, requires_grad=True)
    loss = AdversarialLoss(kind)
    assert torch.autograd.gradcheck(
        lambda a, b: loss.discriminator([a, b], [b, a]) + loss.generator([a, b]),
        (logits, other),
        fast_mode=False,
    )
    assert torch.autograd.gradgradcheck(lambda a: loss.generator(a), (logits,), fast_mode=False)


class TestPixel:
    def test_is_the_pixel_focal_loss(self):
        inner = PixelFocalLoss(3, label_smoothing=0.1)
        loss = AdversarialLoss("pixel", pixel_loss=inner)
        real, fake = torch.randn(2, 2, 4, 5, 6)
        labels = torch.randint(0, 3, (2, 5, 6))
        expected = inner.discriminator_terms(real, fake, labels)
        terms = loss.discriminator_terms(real, fake, labels=labels)
        assert_equal(terms.real, expected.real)
        assert_equal(terms.fake, expected.fake)
        assert terms.r1.item() == 0
        assert_equal(loss.discriminator(real, fake, labels=labels), expected.real + expected.fake)
        assert_equal(loss.generator(fake, labels=labels), inner.generator(fake, labels))

    @pytest.mark.parametrize("method", ["discriminator", "generator"])
    def test_labels_belong_to_pixel_alone(self, method):
        logits, labels = torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2, dtype=torch.long)
        given = (logits, logits) if method == "discriminator" else (logits,)
        pixel = AdversarialLoss("pixel", pixel_loss=PixelFocalLoss(2))
        with pytest.raises(InputError) as caught:
            getattr(pixel, method)(*given)
        assert_message(caught.value, f"AdversarialLoss.{method}: labels must be given", "got None")
        with pytest.raises(InputError) as caught:
            getattr(AdversarialLoss("hinge"), method)(*given, labels=labels)
        assert_message(caught.value, f"AdversarialLoss.{method}: labels must be None", "Tensor")


class TestPenalty:
    def judged(self):
        torch.manual_seed(3)
        net = torch.nn.Conv2d(3, 1, 3).double()
        images = torch.randn(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)
        return net, images, net(images)

    def test_is_r1_with_its_weight_and_interval(self):
        _, images, logits = self.judged()
        loss = AdversarialLoss("softplus", r1_weight=0.5, r1_interval=16)
        terms = loss.discriminator_terms(logits, logits, real_images=images)
        assert_close64(terms.r1, r1_penalty(logits, images, weight=8.0))
        total = loss.discriminator(logits, logits, real_images=images)
        assert_close64(total, terms.real + terms.fake + terms.r1)

    def test_reaches_the_discriminators_weights(self):
        net, images, logits = self.judged()
        loss = AdversarialLoss("hinge", r1_weight=1.0)
        terms = loss.discriminator_terms(logits, logits, real_images=images)
        (slope,) = torch.autograd.grad(terms.r1, net.weight)
        assert slope.abs().max() > 0

    def test_between_two_penalties_there_is_none(self):
        _, _, logits = self.judged()
        loss = AdversarialLoss("hinge", r1_weight=0.5, r1_interval=16)
        assert loss.discriminator_terms(logits, logits).r1.item() == 0
        every = AdversarialLoss("hinge", r1_weight=0.5)
        with pytest.raises(InputError) as caught:
            every.discriminator(logits, logits)
        assert_message(caught.value, "real_images must be given on every step", "got None")

    def test_without_weight_the_images_do_not_matter(self):
        _, images, logits = self.judged()
        loss = AdversarialLoss("hinge")
        assert_equal(
            loss.discriminator(logits, logits, real_images=images),
            loss.discriminator(logits, logits),
        )


@pytest.mark.parametrize(
    ("error", "parts", "options"),
    [
        pytest.param(InputError, ["pixel_loss", "None"], {"kind": "pixel"}, id="pixel-without"),
        pytest.param(
            InputError,
            ["label_smoothing", "pixel_loss", "0.1"],
            {"kind": "pixel", "pixel_loss": PixelFocalLoss(2), "label_smoothing": 0.1},
            id="smoothing-of-pixel",
        ),
        pytest.param(
            InputError,
            ["r1_weight", "0 with kind='pixel'", "2.0"],
            {"kind": "pixel", "pixel_loss": PixelFocalLoss(2), "r1_weight": 2.0},
            id="penalty-of-pixel",
        ),
        pytest.param(
            InputError,
            ["label_smoothing", "hinge", "0.2"],
            {"kind": "hinge", "label_smoothing": 0.2},
            id="smoothing-of-hinge",
        ),
    ],
)
def test_options_of_another_kind(error, parts, options):
    with pytest.raises(error) as caught:
        AdversarialLoss(**options)
    assert_message(caught.value, "AdversarialLoss: ", "; got ", *parts)


@pytest.mark.parametrize(
    ("error", "parts", "real", "fake"),
    [
        pytest.param(
            InputError, ["fake_logits", "2 heads", "got 1"], [2, 3], [2], id="number-of-heads"
        ),
        pytest.param(InputError, ["real_logits", "at least one"], [], [2], id="no-heads"),
        pytest.param(
            InputError, ["fake_logits[1]", "empty"], [2, 3], [2, (2, 0)], id="empty-axis"
        ),
        pytest.param(DTypeError, ["real_logits[0]", "str"], ["x"], [2], id="text"),
        pytest.param(DTypeError, ["fake_logits", "dict"], [2], {}, id="dictionary"),
    ],
)
def test_bad_heads(error, parts, real, fake):
    def tensors(value):
        made = [torch.zeros(x) if isinstance(x, int | tuple) else x for x in value]
        return made if isinstance(value, list) else value

    with pytest.raises(error) as caught:
        AdversarialLoss("hinge").discriminator(tensors(real), tensors(fake))
    assert_message(caught.value, "AdversarialLoss.discriminator: ", "; got ", *parts)


def test_a_scalar_logit_is_a_head():
    loss = AdversarialLoss("hinge")
    assert loss.discriminator(torch.tensor(0.0), torch.tensor(0.0)).item() == 2


def test_copies_and_repr():
    loss = AdversarialLoss("softplus", label_smoothing=0.1, r1_weight=2.0, r1_interval=8)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert repr(other) == repr(loss)
        assert vars(other) == vars(loss)
    assert "r1_interval=8" in repr(loss)


@pytest.mark.compile
def test_compiled_equals_eager():
    def both(a, b):
        loss = AdversarialLoss("softplus", label_smoothing=0.1)
        return loss.discriminator([a, b], [b, a]) + loss.generator(a)

    a, b = torch.randn(2, 3, 1, 4, 4)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(a, b), both(a, b))
