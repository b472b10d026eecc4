import math

import pytest
import torch
from hypothesis import given, strategies as st
from support import assert_message
from torch import nn

from dpsims.errors import DTypeError, InputError
from dpsims.metrics import NoiseSensitivity, noise_sensitivity
from dpsims.nn import CrossAttentionNoiseInjector, LabelMapPyramid, SelfAttention2d

SIZES = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 6), st.integers(1, 6))
FACTORS = st.floats(-50, 50).filter(lambda value: abs(value) > 1e-3)


class Additive(nn.Module):
    """Adds noise to a map that never changes; its layers are a list of two steps."""

    def __init__(self, content, scale=1.0):
        super().__init__()
        self.content, self.scale = content, scale
        self.layers = nn.ModuleList([nn.Identity(), nn.Identity()])

    def forward(self, noise):
        self.layers[0](self.content)
        total = self.layers[1](self.scale * (self.content + noise))
        return total.mean(1, keepdim=True).expand(-1, 3, -1, -1)


def look(model, noises, **options):
    return noise_sensitivity(model, lambda i: model(noises[i]), num_noises=len(noises), **options)


def drawn(size, seed, *lead):
    return torch.randn(*lead, *size, generator=torch.Generator().manual_seed(seed))


@given(size=SIZES, seed=st.integers(0, 99))
def test_equal_noises_give_zero_everywhere(size, seed):
    model = Additive(drawn(size, seed))
    found = look(model, drawn(size, seed + 1)[None].expand(3, *size))
    assert found.diversity == 0
    assert [scale.distance for scale in found.scales] == [0, 0]
    assert [scale.share for scale in found.scales] == [0, 0]


@given(size=SIZES, seed=st.integers(0, 99), count=st.integers(2, 4))
def test_shares_lie_between_0_and_1(size, seed, count):
    found = look(Additive(drawn(size, seed)), drawn(size, seed + 1, count))
    assert found.scales[0].share == 0
    assert 0 < found.scales[1].share <= 1
    assert found.scales[1].distance > 0


@given(size=SIZES, seed=st.integers(0, 99), factor=FACTORS)
def test_scaling_a_map_scales_the_distance_and_not_the_share(size, seed, factor):
    content, noises = drawn(size, seed), drawn(size, seed + 1, 3)
    one = look(Additive(content), noises).scales[1]
    other = look(Additive(content, factor), noises).scales[1]
    assert other.distance == pytest.approx(abs(factor) * one.distance, rel=1e-4)
    assert other.share == pytest.approx(one.share, rel=1e-3, abs=1e-6)


@given(seed=st.integers(0, 99))
def test_the_order_of_the_noises_does_not_matter(seed):
    noises = drawn((2, 3, 4, 4), seed, 4)
    model = Additive(drawn((2, 3, 4, 4), seed + 1))
    one, other = look(model, noises), look(model, noises.flip(0))
    assert one.diversity == pytest.approx(other.diversity, rel=1e-5)
    assert one.scales[1].share == pytest.approx(other.scales[1].share, rel=1e-5)


def test_without_content_everything_comes_from_the_noise():
    # constant over images and pixels, different for every noise
    noises = torch.tensor([-1.0, 0.5, 2.0]).view(3, 1, 1, 1, 1).expand(3, 2, 4, 3, 3)
    found = look(Additive(torch.zeros(2, 4, 3, 3)), noises)
    assert found.scales[1].share == pytest.approx(1)


def test_hand_computed_figures():
    # one channel, one image, two pixels: content 0 and 2, noises -1 and +1 on both
    content = torch.tensor([0.0, 2.0]).view(1, 1, 1, 2)
    found = look(Additive(content), torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1, 1))
    # variance over noises 1; over everything, values -1, 1, 1, 3 have mean 1 and variance 2
    assert found.scales[1].share == pytest.approx(0.5)
    assert found.scales[1].distance == pytest.approx(2)
    assert found.diversity == pytest.approx(2)
    assert found.scales[1].size == (1, 2)
    assert found.scales[1].channels == 1


def test_a_map_of_zeros_has_share_0():
    model = Additive(torch.zeros(1, 2, 3, 3))
    assert look(model, torch.zeros(2, 1, 2, 3, 3)).scales[1].share == 0


def test_nan_propagates():
    noises = drawn((1, 2, 3, 3), 0, 2)
    noises[1, 0, 0, 0, 0] = math.nan
    found = look(Additive(torch.zeros(1, 2, 3, 3)), noises)
    assert math.isnan(found.scales[1].share)
    assert math.isnan(found.scales[1].distance)
    assert math.isnan(found.diversity)


def test_half_precision_is_measured_in_float32():
    # a sum of squares of these overflows float16
    noises = 300 * drawn((1, 2, 8, 8), 0, 3).half()
    found = look(Additive(torch.zeros(1, 2, 8, 8).half()), noises)
    assert math.isfinite(found.scales[1].share)


@pytest.fixture
def pyramid():
    model = LabelMapPyramid(
        3, channels=3, token_dim=4, num_levels=3, attention_size=8, image_size=16
    )
    return model.eval()


def rendered(model):
    labels = torch.randint(0, 3, (2, 16, 16), generator=torch.Generator().manual_seed(1))
    tokens = drawn((2, 5, 4), 2, 3)
    return lambda i: model(labels, tokens[i])[0]


def test_gates_are_found_by_name_and_noise_enters_below_an_open_one(pyramid):
    found = noise_sensitivity(pyramid, rendered(pyramid), num_noises=3)
    assert {gate.kind for gate in found.gates} == {
        "CrossAttentionNoiseInjector",
        "SelfAttention2d",
    }
    assert {gate.value for gate in found.gates} == {0.0}
    assert all(scale.share == 0 for scale in found.scales)
    with torch.no_grad():
        pyramid.blocks[1].inject.gate.fill_(0.5)
    opened = noise_sensitivity(pyramid, rendered(pyramid), num_noises=3)
    shares = {scale.name: scale.share for scale in opened.scales}
    assert shares["blocks.0"] == 0
    assert min(shares["blocks.1"], shares["blocks.2"]) > 0
    assert {g.name: g.value for g in opened.gates}["blocks.1.inject"] == 0.5


def test_layers_can_be_named(pyramid):
    found = noise_sensitivity(pyramid, rendered(pyramid), num_noises=2, layers=["blocks.2"])
    assert [scale.name for scale in found.scales] == ["blocks.2"]


def test_the_weights_of_parametrizations_are_no_feature_maps():
    model = nn.ModuleDict({"conv": nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 3, 1))})
    images = drawn((1, 3, 4, 4), 0, 2)
    found = noise_sensitivity(model, lambda i: model["conv"](images[i]), num_noises=2)
    assert found.scales == ()


def test_hooks_are_removed_even_after_an_error(pyramid):
    def broken(index):
        rendered(pyramid)(index)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        noise_sensitivity(pyramid, broken)
    assert not any(module._forward_hooks for module in pyramid.modules())


def test_nothing_of_the_model_changes_in_evaluation_mode(pyramid):
    before = {name: value.clone() for name, value in pyramid.state_dict().items()}
    noise_sensitivity(pyramid, rendered(pyramid), num_noises=3)
    assert all(torch.equal(value, before[name]) for name, value in pyramid.state_dict().items())
    assert not pyramid.training


def test_table_and_numbers_show_everything():
    inject, attend = CrossAttentionNoiseInjector(3, 4), SelfAttention2d(3)
    model = nn.ModuleDict({"list": nn.ModuleList([inject, attend])})
    features, tokens = torch.randn(2, 3, 4, 6), torch.randn(2, 2, 5, 4)
    found = noise_sensitivity(model, lambda i: attend(inject(features, tokens[i])), num_noises=2)
    assert isinstance(found, NoiseSensitivity)
    text = found.table()
    for part in ("list.0", "list.1", "CrossAttentionNoiseInjector", "3x4x6", "0.00%"):
        assert part in text
    assert found.numbers() == {
        "gate/list.0": 0.0,
        "gate/list.1": 0.0,
        "noise_share/list.0": 0.0,
        "noise_distance/list.0": 0.0,
        "noise_share/list.1": 0.0,
        "noise_distance/list.1": 0.0,
        "noise_diversity": 0.0,
    }


@pytest.mark.parametrize(
    ("change", "error", "parts"),
    [
        pytest.param({"generator": 3}, DTypeError, ["generator", "int"], id="no-module"),
        pytest.param({"render": 3}, DTypeError, ["render", "callable"], id="no-callable"),
        pytest.param({"distance": 3}, DTypeError, ["distance", "callable"], id="no-distance"),
        pytest.param({"num_noises": 1}, InputError, ["num_noises", "at least 2"], id="one-noise"),
        pytest.param({"num_noises": 2.0}, DTypeError, ["num_noises", "int"], id="float-count"),
        pytest.param({"layers": ["no"]}, InputError, ["layers", "['no']"], id="unknown-layer"),
        pytest.param(
            {"render": lambda i: torch.zeros(3, 4, 4)}, InputError, ["render's result"], id="rank"
        ),
    ],
)
def test_bad_arguments(change, error, parts):
    model = nn.Identity()
    options = {"generator": model, "render": lambda i: model(torch.zeros(1, 3, 4, 4))} | change
    with pytest.raises(error) as caught:
        noise_sensitivity(**options)
    assert_message(caught.value, "noise_sensitivity", *parts)
