import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from support import assert_message
from torch import nn

from dpsims.errors import DTypeError, InputError
from dpsims.metrics import ConditioningReport, conditioning_report
from dpsims.nn import ConditionedBackbone, FeatureConditioner


class Maps(nn.Module):
    """A backbone whose maps are given."""

    def __init__(self, maps, **options):
        super().__init__()
        self.maps = maps
        self.conditioners = nn.ModuleList(
            FeatureConditioner(value.shape[1], **options) for value in maps
        )

    def forward(self, images):  # noqa: ARG002
        return [condition(m) for condition, m in zip(self.conditioners, self.maps, strict=True)]


def report(maps, **options):
    return conditioning_report(Maps(maps, **options), torch.zeros(1, 3, 8, 8))


def drawn(seed, *size):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(seed=st.integers(0, 99), channels=st.integers(1, 6))
def test_figures_lie_where_they_must(seed, channels):
    level = report([drawn(seed, 2, channels, 4, 5).exp()]).levels[0]
    for found in (level.before, level.after):
        assert 1 - 1e-9 <= found.effective_rank <= channels + 1e-9
        # a fourth moment is at least the square of the second
        assert found.kurtosis >= 1 - 1e-9
    assert level.after.mean == pytest.approx(0, abs=1e-6)


@given(seed=st.integers(0, 99), factor=st.floats(0.01, 100), shift=st.floats(-100, 100))
def test_kurtosis_and_rank_do_not_depend_on_scale_and_shift(seed, factor, shift):
    maps = drawn(seed, 2, 4, 4, 4)
    one, other = (report([m]).levels[0].before for m in (maps, factor * maps + shift))
    assert other.kurtosis == pytest.approx(one.kurtosis, rel=1e-6)
    assert other.effective_rank == pytest.approx(one.effective_rank, rel=1e-6)
    assert other.std == pytest.approx(factor * one.std, rel=1e-6)


def test_the_rank_is_the_number_of_directions():
    basis = torch.linalg.qr(drawn(0, 6, 6)).Q
    for count in (1, 2, 5):
        # orthonormal coefficients: exactly equal eigenvalues
        pixels = torch.linalg.qr(drawn(1, 64, count) - drawn(1, 64, count).mean(0)).Q
        maps = (basis[:, :count] @ pixels.T).reshape(1, 6, 8, 8)
        assert report([maps]).levels[0].before.effective_rank == pytest.approx(count, rel=1e-6)


def test_oracle_in_numpy():
    maps = drawn(3, 2, 5, 4, 3).exp()
    level = report([maps], nonlinearity="identity", norm="none").levels[0]
    assert level.before == level.after
    values = maps.numpy()
    flat = values.reshape(-1)
    centred = flat - flat.mean()
    assert level.before.mean == pytest.approx(flat.mean())
    assert level.before.std == pytest.approx(flat.std())
    assert level.before.kurtosis == pytest.approx((centred**4).mean() / (centred**2).mean() ** 2)
    pixels = values.transpose(1, 0, 2, 3).reshape(5, -1)
    singular = torch.linalg.svdvals(torch.from_numpy(pixels - pixels.mean(1, keepdims=True))) ** 2
    share = singular / singular.sum()
    rank = math.exp(-float((share * share.log()).sum()))
    assert level.before.effective_rank == pytest.approx(rank)


def test_a_normal_distribution_has_kurtosis_3():
    found = report([drawn(0, 4, 8, 32, 32)]).levels[0].before
    # its standard error is sqrt(24 / 32768) = 0.027
    assert found.kurtosis == pytest.approx(3, abs=0.12)
    assert found.effective_rank == pytest.approx(8, rel=1e-2)


def test_a_constant_map_has_no_direction_and_no_kurtosis():
    found = report([torch.ones(1, 3, 4, 4)]).levels[0].before
    assert (found.mean, found.std, found.effective_rank) == (1, 0, 0)
    assert math.isnan(found.kurtosis)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows(bad):
    maps = drawn(0, 1, 3, 4, 4)
    maps[0, 0, 0, 0] = bad
    found = report([maps]).levels[0].before
    assert not math.isfinite(found.mean)
    assert math.isnan(found.effective_rank)


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return ConditionedBackbone("test_efficientnet", pretrained=False)


IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_batch_norm_gives_mean_0_and_std_1(backbone):
    found = conditioning_report(backbone, IMAGES)
    assert isinstance(found, ConditioningReport)
    assert [level.channels for level in found.levels] == list(backbone.channels)
    assert found.levels[0].size == (16, 16)
    for level in found.levels:
        assert level.after.mean == pytest.approx(0, abs=1e-5)
        # the norm's epsilon of 1e-5 shows where the sigmoid leaves little variance
        assert 0.5 < level.after.std < 1 + 1e-5


def test_evaluation_mode_uses_the_recorded_statistics(backbone):
    backbone.eval()
    found = conditioning_report(backbone, IMAGES)
    backbone.train()
    # nothing has been recorded: the maps are the plain sigmoid
    assert 0 < found.levels[0].after.mean < 1


def test_nothing_of_the_module_changes(backbone):
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    images = IMAGES.clone()
    first = conditioning_report(backbone, images)
    second = conditioning_report(backbone, images)
    assert first == second
    assert torch.equal(images, IMAGES)
    assert backbone.training
    assert all(module.training for module in backbone.conditioners)
    assert not any(module._forward_pre_hooks for module in backbone.conditioners)
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name])


@settings(max_examples=5)
@given(dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_any_precision_is_measured_in_float64(dtype):
    maps = drawn(0, 1, 4, 8, 8).to(dtype)
    found = report([maps]).levels[0].before
    assert found.std == pytest.approx(float(maps.double().std(correction=0)), rel=1e-12)


def test_table_and_numbers_show_every_level(backbone):
    found = conditioning_report(backbone, IMAGES)
    lines = found.table().splitlines()
    assert len(lines) == 2 + len(found.levels)
    assert "effective rank" in lines[0]
    assert all("->" in line for line in lines[2:])
    numbers = found.numbers()
    assert len(numbers) == 8 * len(found.levels)
    assert numbers["features_after/level1_kurtosis"] == found.levels[1].after.kurtosis


@pytest.mark.parametrize(
    ("backbone_like", "images", "error", "parts"),
    [
        pytest.param(nn.Identity(), IMAGES, DTypeError, ["backbone", "Identity"], id="no-levels"),
        pytest.param("resnet", IMAGES, DTypeError, ["backbone", "str"], id="a-name"),
        pytest.param(Maps([]), IMAGES[0], InputError, ["images", "(3, 64, 64)"], id="rank"),
        pytest.param(Maps([]), IMAGES[:0], InputError, ["images", "(0, 3"], id="empty"),
        pytest.param(Maps([]), IMAGES.byte(), DTypeError, ["images", "uint8"], id="bytes"),
    ],
)
def test_bad_arguments(backbone_like, images, error, parts):
    with pytest.raises(error) as caught:
        conditioning_report(backbone_like, images)
    assert_message(caught.value, "conditioning_report", *parts)
