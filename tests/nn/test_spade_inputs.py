"""SPADE's condition in parts, and its features before they are enlarged."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, strategies as st
from support import assert_close64, assert_equal, assert_message
from torch.nn import functional as F

from dpsims.errors import DTypeError, InputError
from dpsims.nn import SPADE, BatchNorm2d, SPADEResBlock, spectral_normalize_

seeds = st.integers(0, 2**16)
norms = st.sampled_from(["batch", "sync_batch", "instance", "none"])


def maps(*size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64)


def assert_same_gradients(one, other):
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-10, msg=name)


@given(
    owner=st.sampled_from([SPADE, SPADEResBlock]),
    times=st.sampled_from([1, 2, 3, 5]),
    size=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    norm=norms,
    training=st.booleans(),
    seed=seeds,
    out_channels=st.sampled_from([2, 3]),
)
def test_features_may_be_enlarged_inside(owner, times, size, norm, training, seed, out_channels):
    batch, height, width = size
    if training and batch * height * width * times == 1:
        height = 2
    if training and norm == "instance" and height * width * times == 1:
        height = 2
    outputs = (out_channels,) if owner is SPADEResBlock else ()
    inside = owner(2, *outputs, 3, hidden_channels=4, norm=norm).double().train(training)
    for name, value in inside.named_buffers():
        if "running" in name:
            value.add_(0.3)
    outside = copy.deepcopy(inside)
    features = maps(batch, 2, height, width, seed=seed).requires_grad_()
    twin = features.detach().clone().requires_grad_()
    cond = maps(batch, 3, height * times, width * times, seed=seed + 1)
    found = inside(features, cond, upsample=times)
    whole = twin.repeat_interleave(times, 2).repeat_interleave(times, 3)
    expected = outside(whole, cond)
    # one value and its copies have no spread: rounding is magnified by 1 / sqrt(eps)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
    # the recorded statistics, too
    for (name, value), other in zip(inside.named_buffers(), outside.buffers(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-10, msg=name)
    sign = maps(*found.shape, seed=seed + 2)
    (found * sign).sum().backward()
    (expected * sign).sum().backward()
    torch.testing.assert_close(features.grad, twin.grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("hidden", [None, 4])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("owner", [SPADE, SPADEResBlock])
def test_a_condition_in_parts_is_the_joined_one(owner, hidden, kernel):
    outputs = (3,) if owner is SPADEResBlock else ()
    parts = owner(2, *outputs, 17, hidden_channels=hidden, kernel_size=kernel).double()
    whole = copy.deepcopy(parts)
    features, fine, coarse = maps(2, 2, 12, 8), maps(2, 2, 12, 8), maps(2, 12, 3, 2)
    labels = torch.randint(0, 3, (2, 12, 8))
    labels[:, 2] = 255
    onehot = (labels[:, None] == torch.arange(3).view(-1, 1, 1)).double()
    enlarged = F.interpolate(coarse, size=(12, 8), mode="bilinear")
    found = parts(features, (fine, coarse, labels))
    expected = whole(features, torch.cat((fine, enlarged, onehot), 1))
    assert_close64(found, expected, scale=100)
    found.square().sum().backward()
    expected.square().sum().backward()
    assert_same_gradients(parts, whole)


def test_a_normalised_weight_takes_one_step_a_call():
    block = spectral_normalize_(SPADEResBlock(2, 3, 7, hidden_channels=4))
    twin = copy.deepcopy(block)
    features, fine, coarse = (
        torch.randn(2, 2, 8, 8),
        torch.randn(2, 3, 8, 8),
        torch.randn(2, 4, 2, 2),
    )
    block(features, (fine, coarse))
    # every layer by itself
    for module in twin.modules():
        if hasattr(module, "parametrizations"):
            _ = module.weight
    for name, value in block.named_buffers():
        if name.endswith((".u", ".v")):
            assert_equal(value, dict(twin.named_buffers())[name])


def test_ignored_ids_follow_the_setting():
    spade = SPADE(2, 3, hidden_channels=4, ignore_index=7).double()
    labels = torch.full((1, 4, 4), 7)
    found = spade(maps(1, 2, 4, 4), (labels,))
    expected = spade(maps(1, 2, 4, 4), torch.zeros(1, 3, 4, 4).double())
    assert_close64(found, expected)
    with pytest.raises(InputError, match="cond must be in"):
        SPADE(2, 3, ignore_index=None)(maps(1, 2, 4, 4).float(), (labels,))
    with pytest.raises(DTypeError, match="SPADE: ignore_index must be an int"):
        SPADE(2, 3, ignore_index="7")


@given(repeats=st.integers(1, 9), seed=seeds, training=st.booleans())
def test_repeats_record_the_statistics_of_repeated_values(repeats, seed, training):
    short, long = BatchNorm2d(2).double().train(training), BatchNorm2d(2).double().train(training)
    features = maps(2, 2, 3, 2, seed=seed)
    found = short(features, repeats)
    expected = long(features.repeat(1, 1, repeats, 1))
    assert_close64(found, expected[:, :, :3], scale=10)
    for name, value in short.state_dict().items():
        assert_close64(value.double(), long.state_dict()[name].double())


@pytest.mark.parametrize("owner", [SPADE, SPADEResBlock])
@pytest.mark.parametrize(
    ("cond", "upsample", "error", "words"),
    [
        pytest.param((torch.ones(2, 2, 4, 5),), 1, InputError, ("3 channels",), id="channels"),
        pytest.param((torch.ones(2, 3, 8, 10),), 1, InputError, ("(2, 4, 5",), id="size"),
        pytest.param((torch.ones(1, 3, 4, 5),), 1, InputError, ("(1, 4, 5",), id="batch"),
        pytest.param((torch.ones(2, 3, 4, 5).to("meta"),), 1, InputError, ("meta",), id="device"),
        pytest.param((), 1, InputError, ("at least one",), id="empty"),
        pytest.param((None,), 1, DTypeError, ("cond[0]", "NoneType"), id="none"),
        pytest.param(torch.ones(2, 3, 4, 5), 2, InputError, ("H=8, W=10",), id="upsample"),
    ],
)
def test_bad_conditions(owner, cond, upsample, error, words):
    block = SPADE(2, 3) if owner is SPADE else SPADEResBlock(2, 2, 3)
    with pytest.raises(error) as caught:
        block(torch.ones(2, 2, 4, 5), cond, upsample=upsample)
    assert_message(caught.value, f"{owner.__name__}: cond", "must", *words)


@pytest.mark.parametrize("owner", [SPADE, SPADEResBlock])
@pytest.mark.parametrize(
    ("upsample", "error"), [(0, InputError), (2.0, DTypeError), (True, DTypeError)]
)
def test_bad_upsample(owner, upsample, error):
    block = SPADE(2, 3) if owner is SPADE else SPADEResBlock(2, 2, 3)
    with pytest.raises(error, match=f"{owner.__name__}: upsample must"):
        block(torch.ones(2, 2, 4, 5), torch.ones(2, 3, 4, 5), upsample=upsample)


@pytest.mark.compile
def test_compiles_whole_and_equal():
    torch._dynamo.reset()
    eager = SPADEResBlock(4, 3, 11, hidden_channels=4)
    compiled = copy.deepcopy(eager)
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    features = torch.randn(2, 4, 3, 5)
    cond = torch.randn(2, 3, 6, 10), torch.randn(2, 8, 2, 2)
    actual, expected = run(features, cond, upsample=2), eager(features, cond, upsample=2)
    torch.testing.assert_close(actual, expected)
    actual.square().sum().backward()
    expected.square().sum().backward()
    for (name, one), other in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)
