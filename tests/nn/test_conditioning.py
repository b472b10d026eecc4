"""FeatureConditioner: batch statistics in training, a fixed elementwise map in evaluation."""

import copy

import pytest
import torch
from hypothesis import given, strategies as st
from support import assert_close64, assert_equal, assert_message
from torch import nn

from dpsims.errors import DTypeError, InputError
from dpsims.nn.conditioning import FeatureConditioner

NONLINEARITIES = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "identity": lambda x: x}
seeds = st.integers(0, 2**20)
sizes = st.integers(1, 5)


def features(seed, *shape, dtype=torch.float64, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def trained(channels=3, **options):
    module = FeatureConditioner(channels, **options).double()
    for seed in range(3):
        module(features(seed, 4, channels, 5, 6))
    return module


# relations


@given(seeds, sizes, sizes, sizes, st.sampled_from(sorted(NONLINEARITIES)))
def test_training_gives_every_channel_mean_0_and_variance_at_most_1(
    seed, batch, channels, h, name
):
    out = FeatureConditioner(channels, nonlinearity=name).double()(
        features(seed, batch, channels, h, 4)
    )
    assert_close64(out.mean((0, 2, 3)), torch.zeros(channels).double(), scale=100)
    # below 1 only by the constant that the norm adds to the variance
    assert bool((out.var((0, 2, 3), correction=0) <= 1).all())


@given(seeds, st.sampled_from(sorted(NONLINEARITIES)))
def test_evaluation_is_a_fixed_elementwise_map(seed, name):
    module = trained(nonlinearity=name).eval()
    maps = features(seed, 2, 3, 4, 5)
    before = copy.deepcopy(module.state_dict())
    order = torch.randperm(20, generator=torch.Generator().manual_seed(seed))
    shuffled = maps.flatten(2)[:, :, order].view(2, 3, 4, 5)
    assert_close64(module(shuffled), module(maps).flatten(2)[:, :, order].view(2, 3, 4, 5))
    # vector and scalar loops of the CPU kernel round differently, so values are not bit-equal
    # each image by itself, even one pixel by itself
    assert_close64(module(maps)[:1, :, 2:3, 1:2], module(maps[:1, :, 2:3, 1:2]))
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


@given(seeds, st.sampled_from(["batch", "instance", "none"]))
def test_permuting_channels_commutes(seed, norm):
    maps = features(seed, 3, 4, 3, 5)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    module = FeatureConditioner(4, norm=norm).double()
    assert_close64(module(maps[:, order]), module(maps)[:, order])


@given(seeds)
def test_without_nonlinearity_scale_and_shift_of_a_channel_do_not_matter(seed):
    maps = features(seed, 3, 2, 4, 4)
    module = FeatureConditioner(2, nonlinearity="identity").double()
    # the norm's constant of 1e-5 against a variance of about 9, and 100 times that
    torch.testing.assert_close(module(maps * 10 + 5), module(maps), rtol=1e-4, atol=1e-4)


def test_the_nonlinearity_bounds_outliers():
    maps = features(0, 2, 1, 4, 4)
    wild = maps.clone()
    wild[0, 0, 0, 0] = 1e6
    squashed = FeatureConditioner(1).double()(wild)
    plain = FeatureConditioner(1, nonlinearity="identity").double()(wild)
    assert squashed[0, 0, 1:].std() > 0.5
    assert plain[0, 0, 1:].std() < 1e-3


# oracle


@pytest.mark.parametrize("name", sorted(NONLINEARITIES))
def test_equals_the_formula_in_training_and_evaluation(name):
    maps = features(1, 3, 2, 4, 5)
    squashed = NONLINEARITIES[name](maps)
    module = FeatureConditioner(2, nonlinearity=name).double()
    mean, var = squashed.mean((0, 2, 3)), squashed.var((0, 2, 3), correction=0)
    expected = (squashed - mean.view(-1, 1, 1)) / (var.view(-1, 1, 1) + 1e-5).sqrt()
    assert_close64(module(maps), expected)
    running_mean, running_var = 0.1 * mean, 0.9 + 0.1 * var * 60 / 59
    expected = (squashed - running_mean.view(-1, 1, 1)) / (
        running_var.view(-1, 1, 1) + 1e-5
    ).sqrt()
    assert_close64(module.eval()(maps), expected)


def test_none_leaves_the_nonlinearity_alone():
    maps = features(2, 2, 3, 4, 5)
    module = FeatureConditioner(3, norm="none").double()
    assert_equal(module(maps), torch.sigmoid(maps))
    assert not module.state_dict()


def test_any_callable_is_a_nonlinearity():
    maps = features(3, 2, 3, 4, 5)
    asinh = FeatureConditioner(3, nonlinearity=torch.asinh, norm="none").double()
    assert_equal(asinh(maps), torch.asinh(maps))
    named = FeatureConditioner(3, nonlinearity="tanh").double()
    assert_equal(FeatureConditioner(3, nonlinearity=nn.Tanh()).double()(maps), named(maps))


@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
@pytest.mark.parametrize("training", [True, False])
def test_gradients(name, training):
    module = trained(2, nonlinearity=name).train(training)
    maps = features(4, 2, 2, 2, 3, scale=1.0).requires_grad_()
    assert torch.autograd.gradcheck(module, (maps,), fast_mode=False)
    assert torch.autograd.gradgradcheck(module, (maps,), fast_mode=False)


# numbers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", ["batch", "instance", "none"])
def test_half_inputs_are_computed_in_float32(dtype, norm):
    maps = features(5, 4, 3, 6, 7, dtype=dtype)
    module = FeatureConditioner(3, norm=norm)
    out = module(maps)
    assert out.dtype == dtype
    # the only rounding is that of the result
    assert_equal(out, FeatureConditioner(3, norm=norm)(maps.float()).to(dtype))
    for name, buffer in module.named_buffers():
        assert buffer.dtype != dtype, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(dtype):
    maps = features(6, 4, 3, 6, 7, dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        out = FeatureConditioner(3)(maps)
    assert_equal(out, FeatureConditioner(3)(maps))


@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_a_saturated_channel_comes_out_as_zero(name):
    maps = torch.full((2, 1, 3, 3), 100.0, requires_grad=True)
    out = FeatureConditioner(1, nonlinearity=name)(maps)
    assert_equal(out, torch.zeros(2, 1, 3, 3))
    out.sum().backward()
    assert bool(maps.grad.isfinite().all())


def test_nan_shows_in_the_output_but_does_not_enter_the_records():
    maps = features(7, 2, 2, 3, 3)
    maps[0, 1, 0, 0] = torch.nan
    module = trained(2)
    before = copy.deepcopy(module.state_dict())
    assert bool(module(maps)[:, 1].isnan().all())
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


# state and formats


def test_learns_nothing_and_saves_its_records():
    module = trained()
    assert not list(module.parameters())
    keys = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert set(module.state_dict()) == keys
    fresh = FeatureConditioner(3).double()
    fresh.load_state_dict(module.state_dict())
    maps = features(8, 2, 3, 4, 4)
    assert_equal(fresh.eval()(maps), module.eval()(maps))
    assert_equal(copy.deepcopy(module)(maps), module(maps))


def test_memory_formats_agree_and_inputs_are_left_alone():
    maps = features(9, 2, 3, 4, 5)
    version, module = maps._version, trained()
    expected = module.eval()(maps)
    last = module(maps.contiguous(memory_format=torch.channels_last))
    assert_equal(last, expected)
    assert last.is_contiguous(memory_format=torch.channels_last)
    # rounding differs where the memory order sends the CPU kernel down another path
    assert_close64(module(maps.mT.contiguous().mT), expected)
    assert_close64(module(maps[:, :, :1].expand(2, 3, 4, 5))[:, :, 2:3], expected[:, :, :1])
    assert maps._version == version


def test_an_empty_batch_passes_in_evaluation():
    assert FeatureConditioner(3).eval()(torch.zeros(0, 3, 4, 5)).shape == (0, 3, 4, 5)


def test_meta_tensors():
    module = FeatureConditioner(3).to("meta")
    assert module(torch.empty(2, 3, 4, 5, device="meta")).shape == (2, 3, 4, 5)


# bad arguments


@pytest.mark.parametrize(
    ("kind", "arguments", "error", "parts"),
    [
        ("channels-zero", {"channels": 0}, InputError, ("channels", "at least 1", "0")),
        ("channels-float", {"channels": 2.0}, DTypeError, ("channels", "int", "2.0")),
        (
            "unknown-nonlinearity",
            {"channels": 2, "nonlinearity": "relu6"},
            InputError,
            ("nonlinearity", "'sigmoid', 'tanh', 'identity'", "'relu6'"),
        ),
        (
            "nonlinearity-number",
            {"channels": 2, "nonlinearity": 1},
            DTypeError,
            ("nonlinearity", "callable", "int"),
        ),
        (
            "unknown-norm",
            {"channels": 2, "norm": "layer"},
            InputError,
            ("norm", "'batch'", "'layer'"),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments(kind, arguments, error, parts):
    with pytest.raises(error) as caught:
        FeatureConditioner(**arguments)
    assert_message(caught.value, "FeatureConditioner: ", *parts)


@pytest.mark.parametrize(
    ("kind", "value", "error", "parts"),
    [
        ("not-a-tensor", [1.0], DTypeError, ("torch.Tensor", "list")),
        ("three-axes", torch.zeros(3, 4, 4), InputError, ("(B, C=3, h, w)", "(3, 4, 4)")),
        ("other-width", torch.zeros(2, 4, 4, 4), InputError, ("C=3", "(2, 4, 4, 4)")),
        ("empty-height", torch.zeros(2, 3, 0, 4), InputError, ("empty", "(2, 3, 0, 4)")),
        ("integers", torch.zeros(2, 3, 4, 4, dtype=torch.int64), DTypeError, ("int64",)),
        (
            "one-value",
            torch.zeros(1, 3, 1, 1),
            InputError,
            ("two values", "instance", "(1, 3, 1, 1)"),
        ),
        ("empty-batch-in-training", torch.zeros(0, 3, 4, 4), InputError, ("(0, 3, 4, 4)",)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_features(kind, value, error, parts):
    with pytest.raises(error) as caught:
        FeatureConditioner(3)(value)
    assert_message(caught.value, "FeatureConditioner: features must", *parts)
