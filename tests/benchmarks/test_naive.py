"""The plain forms compute the same functions as the library."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings, strategies as st
from support import assert_close64
from torch.nn import functional as F

from benchmarks.models import SMOKE, built
from benchmarks.naive import NaiveOasisGenerator, naive_generator, one_hot
from benchmarks.naive_losses import (
    balanced_cross_entropy,
    gathered_focal,
    looped_nce,
    one_hot_focal,
)
from dpsims.errors import InputError
from dpsims.losses import info_nce, pixel_focal_loss
from dpsims.nn import fold_spectral_norm_
from dpsims_reference.generator import Generator


def drawn(model, batch=2):
    labels = torch.randint(0, model.num_classes, (batch, model.height, model.width))
    return labels, torch.randn(batch, model.latent_dim, dtype=torch.float64)


# in training, DP-SIMS's modulations share one norm, which the naive halves cannot follow
@pytest.mark.parametrize(
    ("model", "training"),
    [(SMOKE[0], False), (SMOKE[0], True), (SMOKE[1], False)],
    ids=["oasis", "oasis-training", "dp_sims"],
)
def test_a_naive_generator_computes_the_same_function(model, training):
    reference = built(model).double().train(training)
    naive = naive_generator(reference)
    labels, latents = drawn(model)
    for _ in range(2):
        ours, theirs = naive(labels, latents), reference(labels, latents)
        assert_close64(ours.images, theirs.images, scale=10)
        assert_close64(ours.features, theirs.features, scale=10)


@pytest.mark.parametrize("model", SMOKE, ids=lambda model: model.architecture)
def test_folding_the_norms_first_changes_nothing(model):
    reference = built(model).double()
    folded = naive_generator(fold_spectral_norm_(built(model).double()))
    labels, latents = drawn(model)
    assert_close64(folded(labels, latents).images, reference(labels, latents).images, scale=10)


def test_the_naive_generator_leaves_the_reference_alone():
    reference = built(SMOKE[1])
    before = {name: value.clone() for name, value in reference.state_dict().items()}
    naive = naive_generator(reference)
    with torch.no_grad():
        for parameter in naive.parameters():
            parameter.zero_()
    after = reference.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_models_are_the_same_every_time_and_copies():
    first, second = built(SMOKE[0]), built(SMOKE[0])
    assert first is not second
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    means = [v for n, v in first.state_dict().items() if n.endswith("running_mean")]
    assert all(bool((mean != 0).all()) for mean in means)


def test_a_generator_of_another_kind_or_norm_is_refused():
    with pytest.raises(InputError, match="generator must be one of the two"):
        naive_generator(
            Generator(3, image_size=(8, 8), channels=(4, 4), injection="concatenation")
        )
    model = dataclasses.replace(SMOKE[0])
    other = built(model)
    other.blocks[0].norm_0 = torch.nn.Identity()
    with pytest.raises(InputError, match="must have batch norms; got Identity"):
        NaiveOasisGenerator(other)


@settings(max_examples=10)
@given(st.integers(2, 6), st.integers(0, 2**32 - 1))
def test_the_focal_losses_are_one_function(channels, seed):
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, channels, 3, 4, generator=rng, dtype=torch.float64)
    labels = torch.randint(0, channels, (2, 3, 4), generator=rng)
    weights = torch.rand(channels, generator=rng, dtype=torch.float64)
    expected = pixel_focal_loss(logits, labels, class_weights=weights)
    assert_close64(one_hot_focal(logits, labels, weights), expected)
    assert_close64(gathered_focal(logits, labels, weights), expected)
    plain = pixel_focal_loss(logits, labels, class_weights=weights, gamma=0.0)
    assert_close64(balanced_cross_entropy(logits, labels, weights), plain)


def test_the_loop_is_the_mean_over_images_and_the_sum_over_levels():
    levels = [tuple(torch.randn(2, 3, 4, dtype=torch.float64) for _ in "qp") for _ in range(2)]
    expected = 0.0
    for queries, positives in levels:
        for query, positive in zip(queries, positives, strict=True):
            others = torch.stack([positive[[j for j in range(3) if j != i]] for i in range(3)])
            expected += info_nce(query, positive, others, temperature=0.3) / 2
    assert_close64(looped_nce(levels, 0.3), expected)


def test_one_hot_maps():
    labels = torch.tensor([[[0, 2]]], dtype=torch.uint8)
    expected = F.one_hot(labels.long(), 3).permute(0, 3, 1, 2).double()
    assert torch.equal(one_hot(labels, 3, torch.float64), expected)
