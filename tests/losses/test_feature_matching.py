"""feature_matching_loss: a distance of feature maps, level by level."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from support import assert_close64, assert_message

from dpsims.errors import InputError
from dpsims.losses import feature_matching_loss


@st.composite
def pairs(draw):
    """Two lists of float64 maps of the same shapes."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    batch = draw(st.integers(1, 3))
    sizes = st.tuples(*[st.integers(1, 4)] * 3)
    shapes = draw(st.lists(sizes, min_size=1, max_size=3))
    return [
        [torch.randn(batch, *shape, generator=generator, dtype=torch.float64) for shape in shapes]
        for _ in range(2)
    ]


def oracle(fake, real, paired):
    costs = []
    for x, y in zip(fake, real, strict=True):
        x, y = x.numpy(), y.numpy()
        costs.append(np.abs(x - y).mean() if paired else ((x.mean(0) - y.mean(0)) ** 2).mean())
    return costs


@given(pairs(), st.booleans())
def test_equals_numpy(maps, paired):
    expected = oracle(*maps, paired)
    assert_close64(feature_matching_loss(*maps, paired=paired), torch.tensor(np.mean(expected)))
    weights = [0.5 * level for level in range(len(expected))]
    weighted = feature_matching_loss(*maps, paired=paired, level_weights=weights)
    assert_close64(weighted, torch.tensor(np.dot(weights, expected)))


@given(pairs(), st.booleans())
def test_a_distance(maps, paired):
    fake, real = maps
    assert feature_matching_loss(fake, fake, paired=paired).item() == 0
    forth = feature_matching_loss(fake, real, paired=paired)
    back = feature_matching_loss(real, fake, paired=paired)
    assert_close64(forth, back)
    doubled = feature_matching_loss([2 * x for x in fake], [2 * x for x in real], paired=paired)
    assert_close64(doubled, forth * (2 if paired else 4))


@given(pairs(), st.integers(0, 2**20))
def test_only_pairs_care_for_the_order_of_images(maps, seed):
    fake, real = maps
    order = torch.randperm(len(fake[0]), generator=torch.Generator().manual_seed(seed))
    shuffled = [x[order] for x in fake]
    assert_close64(
        feature_matching_loss(shuffled, real, paired=False),
        feature_matching_loss(fake, real, paired=False),
    )
    both = feature_matching_loss(shuffled, [x[order] for x in real])
    assert_close64(both, feature_matching_loss(fake, real))


@given(pairs(), st.booleans())
def test_real_features_are_constants(maps, paired):
    fake, real = ([x.requires_grad_() for x in maps[0]], [x.requires_grad_() for x in maps[1]])
    feature_matching_loss(fake, real, paired=paired).backward()
    assert all(x.grad is None for x in real)
    assert all(x.grad.abs().max() > 0 for x in fake)


@pytest.mark.parametrize("paired", [True, False])
def test_gradcheck(paired):
    real = [torch.zeros(2, 1, 2, 2, dtype=torch.float64)]
    # away from the corner of the absolute value
    fake = torch.linspace(0.5, 2, 8, dtype=torch.float64).view(2, 1, 2, 2).requires_grad_()
    run = lambda x: feature_matching_loss([x], real, paired=paired)  # noqa: E731
    assert torch.autograd.gradcheck(run, (fake,), fast_mode=False)


def test_half_precision_is_summed_in_float32():
    fake = [torch.full((1, 1, 64, 64), 60000.0, dtype=torch.float16)]
    loss = feature_matching_loss(fake, [-fake[0]], paired=False)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(float(2 * fake[0][0, 0, 0, 0].float()) ** 2)


@pytest.mark.parametrize(
    ("parts", "change"),
    [
        pytest.param(["fake_features", "2 maps", "got 1"], lambda f, r: (f[:1], r), id="fewer"),
        pytest.param(
            ["real_features", "2 maps", "got 1"], lambda f, r: (f, r[:1]), id="fewer-real"
        ),
        pytest.param(["fake_features", "1 maps", "got 0"], lambda f, r: ([], []), id="none"),
        pytest.param(
            ["real_features[1]", "H=2"], lambda f, r: (f, [r[0], r[1][:, :, :1]]), id="size"
        ),
        pytest.param(
            ["real_features[0]", "C=4"], lambda f, r: (f, [r[0][:, :1], r[1]]), id="width"
        ),
    ],
)
def test_bad_maps(parts, change):
    fake = [torch.zeros(2, 4, 4, 3), torch.zeros(2, 3, 2, 2)]
    with pytest.raises(InputError) as caught:
        feature_matching_loss(*change(fake, list(fake)))
    assert_message(caught.value, "feature_matching_loss: ", "; got ", *parts)


@pytest.mark.compile
def test_compiled_equals_eager():
    fake = [torch.randn(2, 4, 4, 3), torch.randn(2, 3, 2, 2)]
    real = [torch.randn_like(x) for x in fake]
    compiled = torch.compile(feature_matching_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(fake, real), feature_matching_loss(fake, real))
