from __future__ import annotations

import copy
import multiprocessing
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from scipy import linalg
from support import assert_equal, assert_message
from torch import nn

from dpsims.errors import DTypeError, InputError, NonFiniteError
from dpsims.metrics import FrechetFeatureDistance, frechet_distance


def features(count, width, *, seed=0, scale=1.0, dtype=torch.float64):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(count, width)) @ rng.normal(size=(width, width))
    return torch.from_numpy(values * scale).to(dtype)


def frechet_by_scipy(a, b):
    """The printed formula, with a matrix square root."""
    a, b = a.double().numpy(), b.double().numpy()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    cov_a, cov_b = np.atleast_2d(cov_a), np.atleast_2d(cov_b)
    root = linalg.sqrtm(cov_a @ cov_b).real
    means = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return means + np.trace(cov_a + cov_b - 2 * root)


SIZES = st.tuples(st.integers(2, 30), st.integers(2, 30), st.integers(1, 8))
SEEDS = st.integers(0, 2**31)


# the function


@given(SIZES, SEEDS)
def test_distance_to_itself_is_zero(sizes, seed):
    values = features(sizes[0], sizes[2], seed=seed)
    scale = values.var(dim=0).sum().item()
    assert frechet_distance(values, values, warn_rank=False) <= 1e-13 * scale
    # order does not matter
    assert frechet_distance(values, values.flip(0), warn_rank=False) <= 1e-13 * scale


@given(SIZES, SEEDS)
def test_symmetric_and_not_negative(sizes, seed):
    a, b = features(sizes[0], sizes[2], seed=seed), features(sizes[1], sizes[2], seed=seed + 1)
    there = frechet_distance(a, b, warn_rank=False)
    assert there >= 0
    assert frechet_distance(b, a, warn_rank=False) == pytest.approx(there, rel=1e-11, abs=1e-11)


@given(SIZES, SEEDS)
def test_translation_adds_its_square(sizes, seed):
    values = features(sizes[0], sizes[2], seed=seed)
    shift = features(2, sizes[2], seed=seed + 1)[0]
    distance = frechet_distance(values, values + shift, warn_rank=False)
    expected = shift.square().sum().item()
    scale = values.var(dim=0).sum().item()
    assert distance == pytest.approx(expected, rel=1e-11, abs=1e-12 * scale)


@given(SIZES, SEEDS)
def test_orthogonal_maps_keep_and_scales_square(sizes, seed):
    a, b = features(sizes[0], sizes[2], seed=seed), features(sizes[1], sizes[2], seed=seed + 1)
    turn = torch.linalg.qr(features(sizes[2], sizes[2], seed=seed + 2)).Q
    there = frechet_distance(a, b, warn_rank=False)
    scale = (a.var(dim=0) + b.var(dim=0)).sum().item()
    close = {"rel": 1e-11, "abs": 1e-11 * scale}
    assert frechet_distance(a @ turn, b @ turn, warn_rank=False) == pytest.approx(there, **close)
    assert frechet_distance(4 * a, 4 * b, warn_rank=False) == pytest.approx(16 * there, **close)


@pytest.mark.parametrize("width", [1, 3, 10])
def test_closed_form_for_diagonal_covariances(width):
    rng = np.random.default_rng(5)
    # columns that are exactly uncorrelated: rows of an orthogonal matrix without the constant
    basis = np.linalg.qr(np.column_stack([np.ones(40), rng.normal(size=(40, width))]))[0][:, 1:]
    basis = torch.from_numpy(basis) * 39**0.5
    means = torch.from_numpy(rng.normal(size=(2, width)))
    deviations = torch.from_numpy(rng.random((2, width)) + 0.1)
    a, b = basis * deviations[0] + means[0], basis * deviations[1] + means[1]
    expected = (means[0] - means[1]).square().sum() + (
        deviations[0] - deviations[1]
    ).square().sum()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-12)


@given(st.integers(20, 40), st.integers(1, 8), SEEDS)
def test_equals_scipys_square_root(count, width, seed):
    a, b = features(count, width, seed=seed), features(count + 3, width, seed=seed + 1)
    # sqrtm of an ill-conditioned product keeps half the digits
    scale = (a.var(dim=0) + b.var(dim=0)).sum().item()
    assert frechet_distance(a, b) == pytest.approx(frechet_by_scipy(a, b), abs=1e-6 * scale)


@given(st.integers(2, 12), st.integers(2, 12), SEEDS)
def test_rows_repeated_change_covariance_only(count, width, seed):
    # fewer rows than columns: the same formula, without a square root of a singular matrix
    a, b = features(count, width, seed=seed), features(count, width, seed=seed + 1)
    once = frechet_distance(a, b, warn_rank=False)
    padded = torch.cat([a, torch.zeros(count, 3)], 1), torch.cat([b, torch.zeros(count, 3)], 1)
    scale = (a.var(dim=0) + b.var(dim=0)).sum().item()
    assert frechet_distance(*padded, warn_rank=False) == pytest.approx(once, abs=1e-11 * scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_features_are_computed_in_float64(dtype):
    a, b = features(20, 4, dtype=dtype), features(20, 4, seed=1, dtype=dtype)
    assert frechet_distance(a, b) == frechet_distance(a.double(), b.double())


def test_large_means_do_not_drown_the_spread():
    a, b = features(50, 3), features(50, 3, seed=1)
    far = frechet_distance(a + 1e6, b + 1e6)
    # the shift costs its size in rounding units: 1e6 * 2^-52
    assert far == pytest.approx(frechet_distance(a, b), rel=1e-7)


def test_input_stays_and_strides_do_not_matter():
    a, b = features(4, 12), features(4, 12, seed=1)
    before = a.clone()
    plain = frechet_distance(a.t().contiguous(), b.t().contiguous())
    assert frechet_distance(a.t(), b.t()) == plain
    assert_equal(a, before)


def test_too_few_rows_for_the_width_warn():
    with pytest.warns(UserWarning, match="4 for 4 features: rank deficient") as caught:
        frechet_distance(features(4, 4), features(5, 4))
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("a", "b", "error", "parts"),
    [
        ([[1.0]], features(3, 1), DTypeError, ["features_a", "torch.Tensor", "list"]),
        (features(3, 2), None, DTypeError, ["features_b", "torch.Tensor", "NoneType"]),
        (features(3, 2).long(), features(3, 2), DTypeError, ["features_a", "floating-point"]),
        (features(3, 2)[0], features(3, 2), InputError, ["features_a", "(N, D)", "got (2,)"]),
        (features(3, 2), features(3, 4), InputError, ["features_b", "D=2", "got (3, 4)"]),
        (features(1, 2), features(3, 2), InputError, ["features_a", "at least 2", "got 1"]),
        (features(3, 2), features(1, 2), InputError, ["features_b", "at least 2", "got 1"]),
    ],
    ids=["list", "none", "integers", "rank-1", "other-width", "one-row", "one-row-in-b"],
)
def test_refuses(a, b, error, parts):
    with pytest.raises(error) as caught:
        frechet_distance(a, b, warn_rank=False)
    assert_message(caught.value, "frechet_distance: ", *parts)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_refuses_values_that_are_not_finite_by_row(value):
    bad = features(9, 3)
    bad[6, 1] = value
    with pytest.raises(InputError, match=r"features_b must be finite; got .* in row 6"):
        frechet_distance(features(9, 3), bad)


def test_overflow_is_told():
    huge = features(9, 2) * 1e200
    with pytest.raises(NonFiniteError, match="overflow float64"):
        frechet_distance(huge, -huge)


# the metric


class Extractor(nn.Module):
    """Tiny random features whose batch norm and dropout would show a wrong mode."""

    num_features = 5

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 2)
        self.norm = nn.BatchNorm2d(5)
        self.drop = nn.Dropout(0.5)

    def forward(self, images):
        return self.drop(self.norm(self.conv(images)).relu()).mean(dim=(2, 3))


def images(count, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.random((count, 3, 4, 4)) * 2 - 1).float()


def metric(**arguments):
    torch.manual_seed(3)
    return FrechetFeatureDistance(Extractor(), name="tiny", **arguments)


def test_metric_equals_the_function_on_its_features():
    tested = metric()
    real, fake = images(20), images(24, seed=1)
    tested.update(real, real=True)
    tested.update(fake, real=False)
    extractor = copy.deepcopy(tested.extractor).eval()
    with torch.no_grad():
        expected = frechet_distance(extractor(real), extractor(fake))
    # sums of products lose the square of mean over deviation, about 1e4 here, in float64
    assert tested.compute() == pytest.approx(expected, rel=1e-9)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), SEEDS)
def test_batches_and_their_order_do_not_matter(sizes, seed):
    whole = images(sum(sizes) + 8, seed=seed)
    parts = whole.split([8, *sizes])
    fake = images(9, seed=seed + 1)
    first, second = metric(), metric()
    first.update(whole, real=True)
    first.update(fake, real=False)
    for part in reversed(parts):
        second.update(part, real=True)
    second.update(fake[:4], real=False)
    second.update(fake[4:], real=False)
    # features of a batch of another size differ by float32 rounding
    assert second.compute() == pytest.approx(first.compute(), rel=1e-4, abs=1e-7)


def test_same_images_on_both_sides_are_at_zero():
    tested = metric()
    for real in (True, False):
        tested.update(images(30), real=real)
    assert tested.compute() < 1e-12


def test_equals_torchmetrics_own_result():
    tested = metric()
    tested.update(images(40), real=True)
    tested.update(images(40, seed=1), real=False)
    assert tested.compute() == pytest.approx(float(tested.moments.compute()), rel=1e-8)


def test_result_names_the_features():
    tested = metric()
    for real in (True, False):
        tested.update(images(8), real=real)
    assert tested.result() == {"frechet_distance/tiny": tested.compute()}


def test_extractor_runs_frozen_and_keeps_its_mode_and_state():
    tested = metric()
    extractor = tested.extractor.train()
    extractor.drop.eval()
    before = copy.deepcopy(extractor.state_dict())
    state = torch.get_rng_state()
    batch = images(8).requires_grad_()
    tested.update(batch, real=True)
    assert not tested.moments.real_features_sum.requires_grad
    assert [extractor.training, extractor.norm.training, extractor.drop.training] == [1, 1, 0]
    for name, value in extractor.state_dict().items():
        assert_equal(value, before[name])
    assert_equal(torch.get_rng_state(), state)
    eval_metric = metric()
    eval_metric.extractor.eval()
    eval_metric.update(batch, real=True)
    assert_equal(tested.moments.real_features_sum, eval_metric.moments.real_features_sum)


def test_mode_is_restored_when_the_extractor_fails():
    tested = FrechetFeatureDistance(nn.Linear(7, 2), name="broken", num_features=2)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        tested.update(images(2), real=True)
    assert tested.extractor.training


def test_reset_forgets():
    tested, fresh = metric(), metric()
    tested.update(images(9, seed=5), real=True)
    tested.update(images(9, seed=6), real=False)
    tested.reset()
    for each in (tested, fresh):
        each.update(images(9), real=True)
        each.update(images(9, seed=1), real=False)
    assert tested.compute() == fresh.compute()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_keep_what_was_collected(clone):
    tested = metric()
    tested.update(images(9), real=True)
    again = clone(tested)
    for each in (tested, again):
        each.update(images(9, seed=1), real=False)
    assert again.compute() == tested.compute()


def test_few_images_warn_unless_told_not_to():
    for tested, expected in ((metric(), 2), (metric(warn_rank=False), 0)):
        for real in (True, False):
            tested.update(images(5), real=real)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tested.compute()
        assert len(caught) == expected


@pytest.mark.parametrize(
    ("arguments", "error", "parts"),
    [
        ({"extractor": torch.relu}, DTypeError, ["extractor", "Module"]),
        ({"name": 3}, DTypeError, ["name", "str", "int"]),
        ({"name": ""}, InputError, ["name", "which features"]),
        ({"extractor": nn.Identity()}, InputError, ["num_features", "None"]),
        ({"num_features": 0}, InputError, ["num_features", "at least 1", "got 0"]),
    ],
    ids=["function", "number", "no-name", "unknown-width", "width-zero"],
)
def test_construction_refuses(arguments, error, parts):
    arguments = {"extractor": Extractor(), "name": "tiny", **arguments}
    with pytest.raises(error) as caught:
        FrechetFeatureDistance(arguments.pop("extractor"), **arguments)
    assert_message(caught.value, "FrechetFeatureDistance: ", *parts)


@pytest.mark.parametrize(
    ("batch", "error", "parts"),
    [
        (None, DTypeError, ["images", "NoneType"]),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), DTypeError, ["images", "uint8"]),
        (torch.zeros(2, 1, 4, 4), InputError, ["images", "C=3", "got (2, 1, 4, 4)"]),
        (torch.zeros(3, 4, 4), InputError, ["images", "(B, C=3, H, W)"]),
        (images(2) * 3, InputError, ["images", "[-1, 1]", "clamp"]),
        (images(2) * float("nan"), InputError, ["images", "finite", "row 0"]),
    ],
    ids=["none", "uint8", "one-channel", "rank-3", "out-of-range", "nan"],
)
def test_update_refuses_and_collects_nothing(batch, error, parts):
    tested = metric()
    with pytest.raises(error) as caught:
        tested.update(batch, real=True)
    assert_message(caught.value, "FrechetFeatureDistance.update: ", *parts)
    assert tested.moments.real_features_num_samples == 0


def test_update_refuses_a_side_that_is_no_bool():
    with pytest.raises(DTypeError, match="real must be a bool; got int"):
        metric().update(images(2), real=1)


class Broken(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, batch):
        return self.change(batch.mean(dim=(2, 3)))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda f: f[:, :2], ["D=3", "got (4, 2)"]),
        (lambda f: f[:2], ["B=4", "got (2, 3)"]),
        (lambda f: f.flatten(), ["(B, D=3)", "got (12,)"]),
        (lambda f: torch.where(torch.arange(4)[:, None] == 2, torch.nan, f), ["finite", "row 2"]),
    ],
    ids=["narrow", "rows-missing", "flat", "nan"],
)
def test_update_refuses_wrong_features(change, parts):
    tested = FrechetFeatureDistance(Broken(change), name="broken", num_features=3)
    with pytest.raises(InputError) as caught:
        tested.update(images(4), real=False)
    assert_message(caught.value, "the extractor's features must", *parts)


def test_compute_needs_two_images_on_each_side():
    tested = metric(warn_rank=False)
    with pytest.raises(InputError, match="the real images must be at least 2; got 0"):
        tested.compute()
    tested.update(images(2), real=True)
    tested.update(images(1), real=False)
    with pytest.raises(InputError, match="the fake images must be at least 2; got 1"):
        tested.compute()
    tested.update(images(1, seed=1), real=False)
    assert tested.compute() >= 0


def test_overflowing_sums_are_told():
    tested = FrechetFeatureDistance(
        Broken(lambda f: f.double() * 1e200), name="huge", num_features=3
    )
    for real in (True, False):
        tested.update(images(5), real=real)
    with pytest.raises(NonFiniteError, match=r"FrechetFeatureDistance\.compute.*overflow"):
        tested.compute()


def _rank(rank, store, results):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    tested = metric()
    # rank 1 sees few real images and no generated one
    tested.update(images(20)[rank * 17 : 17 + rank * 3], real=True)
    if rank == 0:
        tested.update(images(24, seed=1), real=False)
    results.put(tested.compute())
    torch.distributed.destroy_process_group()


def test_two_processes_with_uneven_shares_equal_one(tmp_path):
    # forked: a new Python would import torch again
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [
        context.Process(target=_rank, args=(rank, tmp_path / "store", results))
        for rank in range(2)
    ]
    with warnings.catch_warnings():
        # Python 3.12 warns about forking a process with threads; these do not use them
        warnings.simplefilter("ignore", DeprecationWarning)
        for process in processes:
            process.start()
    try:
        values = [results.get(timeout=60) for _ in processes]
    finally:
        for process in processes:
            process.join(timeout=60)
            process.kill()
    alone = metric()
    alone.update(images(20), real=True)
    alone.update(images(24, seed=1), real=False)
    # features of a batch of another size differ by float32 rounding
    assert values == pytest.approx([alone.compute()] * 2, rel=1e-4)
