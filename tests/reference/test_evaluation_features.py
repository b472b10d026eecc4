from itertools import pairwise

import numpy as np
import pytest
import torch
from evaluation_parts import Colours, colour_extractor
from hypothesis import given, settings, strategies as st
from support import assert_message

from dpsims.errors import DTypeError, InputError
from dpsims.metrics import l1_distance, pairwise_diversity
from dpsims_reference.evaluation import FeatureExtractor, Process, feature_diversity
from dpsims_reference.evaluation.features import FeatureSets, kernel_distance

SEEDS = st.integers(0, 2**31 - 1)


def rows(count, width, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64)


def images(count, seed=0):
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def filled(batches, *, real_images, fake_images):
    """Feature sets that saw the images in the given batches of positions."""
    features = FeatureSets(colour_extractor())
    for positions in batches:
        for which, source in ((True, real_images), (False, fake_images)):
            features.add(positions, source[positions], real=which)
    return features


def figures(features, **options):
    return features.figures(Process(), **{"seed": 0, "subset_size": None, **options})


# --- relations


@given(count=st.integers(13, 40), seed=SEEDS)
@settings(max_examples=15)
def test_identical_sets_are_at_distance_zero(count, seed):
    same = images(count, seed)
    found = figures(filled([list(range(count))], real_images=same, fake_images=same))
    # twice the trace (below 2 * 12, pixels lie in [-1, 1]) minus as much, over 12 terms
    assert 0 <= found["frechet/colours"] <= 12 * 24 * 1e-14


@given(seed=SEEDS, cuts=st.lists(st.integers(1, 19), unique=True, max_size=4))
@settings(max_examples=15)
def test_order_and_batches_change_nothing(seed, cuts):
    real, fake = images(20, seed), images(20, seed + 1)
    whole = filled([list(range(20))], real_images=real, fake_images=fake)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(seed)).tolist()
    ends = [0, *sorted(cuts), 20]
    parts = [order[start:end] for start, end in pairwise(ends)]
    shuffled = filled(parts, real_images=real, fake_images=fake)
    # means over few pixels in float32: their last bit may depend on the batch
    for name, value in figures(whole).items():
        assert figures(shuffled)[name] == pytest.approx(value, rel=1e-5, abs=1e-6)


@given(count=st.integers(2, 30), seed=SEEDS)
@settings(max_examples=15)
def test_kernel_distance_is_symmetric_and_ignores_the_order(count, seed):
    a, b = rows(count, 4, seed), rows(count, 4, seed + 1)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    value = kernel_distance(a, b).mean
    assert kernel_distance(b, a).mean == pytest.approx(value, rel=1e-9, abs=1e-9)
    assert kernel_distance(a[order], b).mean == pytest.approx(value, rel=1e-9, abs=1e-9)


def test_the_seed_decides_the_subsets_and_no_global_state_changes():
    a, b = rows(30, 4, 0), rows(30, 4, 1)
    state = torch.get_rng_state()
    first, again, other = (kernel_distance(a, b, seed=s, subset_size=10) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert first == again
    assert first != other
    assert (first.subsets, first.subset_size) == (100, 10)
    assert first.std > 0


# --- independent references


def mmd_oracle(a, b):
    """Two sums over pairs and one over all couples, term by term."""
    a, b = a.numpy(), b.numpy()

    def kernel(x, y):
        return (np.dot(x, y) / len(x) + 1) ** 3

    within = sum(
        kernel(s[i], s[j]) for s in (a, b) for i in range(len(s)) for j in range(len(s)) if i != j
    )
    between = sum(kernel(x, y) for x in a for y in b)
    count = len(a)
    return within / (count * (count - 1)) - 2 * between / count**2


def test_kernel_distance_equals_its_definition():
    a, b = rows(9, 5, 2), 1 + rows(9, 5, 3)
    found = kernel_distance(a, b)
    assert found.mean == pytest.approx(mmd_oracle(a, b), rel=1e-10)
    assert (found.std, found.subsets, found.subset_size) == (0, 1, 9)


def test_kernel_distance_of_a_set_to_itself_is_its_small_bias():
    """The cross term counts a row against itself, the others do not."""
    a = rows(200, 5, 4)
    assert kernel_distance(a, a).mean == pytest.approx(mmd_oracle(a, a), rel=1e-8)
    # of the order of the mean of k(x, x) over the number of rows
    assert -2 * ((a.square().mean(1) + 1) ** 3).mean() / 199 < kernel_distance(a, a).mean < 0


def test_mean_and_deviation_are_over_the_subsets():
    a, b = rows(12, 3, 5), rows(12, 3, 6)
    values = []
    for number in range(60):
        order = torch.randperm(12, generator=torch.Generator().manual_seed(number))
        other = torch.randperm(12, generator=torch.Generator().manual_seed(1000 + number))
        values.append(mmd_oracle(a[order[:6]], b[other[:6]]))
    found = kernel_distance(a, b, subset_size=6)
    # six standard errors of a mean of 100 against one of 60
    bound = 6 * np.std(values) * (1 / 100 + 1 / 60) ** 0.5
    assert abs(found.mean - np.mean(values)) < bound
    assert found.std == pytest.approx(np.std(values), rel=0.5)


@given(count=st.integers(2, 8), seed=SEEDS)
@settings(max_examples=15)
def test_feature_diversity_is_the_mean_over_all_pairs(count, seed):
    embedded = rows(count, 6, seed)
    pairs = [(embedded[i] - embedded[j]).square().sum() for i in range(count) for j in range(i)]
    expected = float(torch.stack(pairs).mean())
    assert feature_diversity(embedded) == pytest.approx(expected, rel=1e-10)


def test_pixel_diversity_needs_no_network():
    from dpsims_reference.evaluation import diversity

    samples = images(4)
    expected = float(pairwise_diversity(samples[:, None], l1_distance))
    assert diversity.pixels().diversity(samples) == expected


# --- names


def test_only_inception_is_called_fid_and_kid():
    batch = [list(range(14))]
    found = figures(filled(batch, real_images=images(14), fake_images=images(14, 1)))
    assert set(found) == {"frechet/colours", "kernel_distance/colours"}
    features = FeatureSets(
        FeatureExtractor(Colours(), name="incept", num_features=12, resize="x", kind="fid")
    )
    for which in (True, False):
        features.add(batch[0], images(14, int(which)), real=which)
    found = figures(features, subset_size=5)
    assert set(found) == {"fid/incept", "kid/incept", "kid_std/incept"}
    assert set(figures(features, kernel=False)) == {"fid/incept"}


# --- bad inputs


@pytest.mark.parametrize(
    ("change", "error", "parts"),
    [
        pytest.param({"name": "two words"}, InputError, ["name", "two words"], id="blank-in-name"),
        pytest.param({"name": ""}, InputError, ["name"], id="no-name"),
        pytest.param({"network": len}, DTypeError, ["network"], id="network-is-no-module"),
        pytest.param({"num_features": 0}, InputError, ["num_features"], id="no-features"),
        pytest.param({"kind": "kid"}, InputError, ["kind", "'fid'"], id="unknown-kind"),
    ],
)
def test_extractor_arguments_are_checked(change, error, parts):
    options = {"network": Colours(), "name": "x", "num_features": 12, "resize": "", **change}
    with pytest.raises(error) as caught:
        FeatureExtractor(options.pop("network"), **options)
    assert_message(caught.value, "FeatureExtractor", *parts)


def test_features_of_another_width_are_an_error():
    extractor = FeatureExtractor(Colours(), name="narrow", num_features=11, resize="")
    with pytest.raises(InputError) as caught:
        extractor(images(2))
    assert_message(caught.value, "narrow", "11", "12")


def test_few_images_warn_that_the_distance_only_ranks():
    features = filled([[0, 1, 2]], real_images=images(3), fake_images=images(3, 1))
    with pytest.warns(UserWarning, match="rank deficient"):
        figures(features)


@pytest.mark.parametrize(
    ("size", "counts", "part"),
    [
        pytest.param(11, (10, 12), "at most the 10", id="larger-than-a-set"),
        pytest.param(1, (10, 10), "at least 2", id="single-image"),
        pytest.param(None, (1, 9), "at least 2", id="set-of-one"),
    ],
)
def test_kernel_subsets_are_checked(size, counts, part):
    with pytest.raises(InputError) as caught:
        kernel_distance(rows(counts[0], 3, 0), rows(counts[1], 3, 1), subset_size=size)
    assert_message(caught.value, "kernel_distance", "subset_size", part)


def test_one_sample_has_no_diversity():
    with pytest.raises(InputError) as caught:
        feature_diversity(rows(1, 3, 0))
    assert_message(caught.value, "embedded", "1")


def test_an_extractor_stays_frozen():
    extractor = FeatureExtractor(torch.nn.BatchNorm2d(3), name="n", num_features=3, resize="")
    extractor.train()
    assert not extractor.training
    assert not extractor.network.training
    assert not any(p.requires_grad for p in extractor.parameters())
