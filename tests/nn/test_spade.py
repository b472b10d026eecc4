from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from support import (
    Golden,
    assert_close64,
    assert_equal,
    assert_golden64,
    assert_message,
    golden_cases,
)
from torch import nn
from torch.nn import functional as F

from dpsims.errors import DTypeError, InputError
from dpsims.nn.norm import make_norm
from dpsims.nn.spade import SPADE, spade_modulate
from dpsims.nn.spade_block import SPADEResBlock

seeds = st.integers(0, 2**16)
sizes = st.tuples(st.integers(2, 3), st.integers(1, 4), st.integers(2, 6), st.integers(2, 6))
norms = st.sampled_from(["batch", "sync_batch", "instance", "none"])


def maps(size, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)


def convolve(image, weight, bias):
    """A zero-padded cross-correlation, written as a loop over the kernel in numpy."""
    pad = weight.shape[-1] // 2
    height, width = image.shape[2:]
    padded = np.pad(image, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    out = np.zeros((image.shape[0], weight.shape[0], height, width))
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]):
            window = padded[:, :, i : i + height, j : j + width]
            out += np.einsum("bchw,oc->bohw", window, weight[:, :, i, j])
    return out if bias is None else out + bias.reshape(1, -1, 1, 1)


def oracle_conv(layer, image):
    arrays = {name: value.detach().numpy() for name, value in layer.named_parameters()}
    return convolve(image, arrays["weight"], arrays.get("bias"))


def oracle_normalize(image):
    mean, var = image.mean((0, 2, 3), keepdims=True), image.var((0, 2, 3), keepdims=True)
    return (image - mean) / np.sqrt(var + 1e-5)


def oracle_spade(spade, normalized, cond):
    if spade.hidden is not None:
        cond = np.maximum(oracle_conv(spade.hidden, cond), 0)
    maps = oracle_conv(spade.modulation, cond)
    gamma, beta = maps[:, : spade.channels], maps[:, spade.channels :]
    return normalized * (1 + gamma) + beta


# relations


@given(size=sizes, norm=norms, seed=seeds, hidden=st.sampled_from([None, 3]))
def test_zero_modulation_is_the_plain_norm(size, norm, seed, hidden):
    spade = SPADE(size[1], 2, hidden_channels=hidden, norm=norm).double()
    nn.init.zeros_(spade.modulation.weight)
    nn.init.zeros_(spade.modulation.bias)
    features, cond = maps(size, seed), maps((size[0], 2, *size[2:]), seed + 1)
    plain = make_norm("Block", size[1], norm).double()
    assert_equal(spade(features, cond), plain(features))


@given(size=sizes, seed=seeds, kernel=st.sampled_from([1, 3]))
def test_constant_map_modulates_alike_away_from_the_border(size, seed, kernel):
    # two convolutions of side 3 see two pixels beyond the border
    size = (*size[:2], 7, 6)
    spade = SPADE(size[1], 2, hidden_channels=3, kernel_size=kernel, norm="none").double()
    cond = maps((1, 2, 1, 1), seed).expand(size[0], 2, 7, 6)
    gamma, beta = spade(torch.ones(size).double(), cond), spade(torch.zeros(size).double(), cond)
    border = 2 * (kernel // 2)
    inside = (slice(None), slice(None), slice(border, 7 - border), slice(border, 6 - border))
    for effect in (gamma - beta, beta):
        assert_close64(effect[inside], effect[:1, :, 3:4, 3:4].expand_as(effect[inside]), scale=10)


@given(size=sizes, norm=norms, seed=seeds)
def test_order_of_the_batch_does_not_matter(size, norm, seed):
    block = SPADEResBlock(size[1], 2, 2, hidden_channels=3, norm=norm).double()
    features, cond = maps(size, seed), maps((size[0], 2, *size[2:]), seed + 1)
    order = torch.randperm(size[0])
    out = block(features, cond)
    assert out.shape == (size[0], 2, *size[2:])
    torch.testing.assert_close(block(features[order], cond[order]), out[order])


@given(size=sizes, seed=seeds, norm=norms)
def test_images_are_independent_in_evaluation(size, seed, norm):
    block = SPADEResBlock(size[1], 3, 2, hidden_channels=3, norm=norm).double().eval()
    features, cond = maps(size, seed), maps((size[0], 2, *size[2:]), seed + 1)
    out = block(features, cond)
    assert_close64(block(features[:1], cond[:1]), out[:1], scale=1000)
    assert block(features[:0], cond[:0]).shape == (0, 3, *size[2:])


def test_gamma_of_minus_one_leaves_beta():
    features, beta = maps((2, 3, 4, 4)) * 1e8, maps((2, 3, 4, 4), 1)
    assert_equal(spade_modulate(features, torch.full_like(features, -1), beta), beta)


def test_equal_widths_have_no_shortcut_layers():
    names = {name.split(".")[0] for name, _ in SPADEResBlock(4, 4, 2).named_parameters()}
    assert names == {"spade_0", "conv_0", "spade_1", "conv_1"}
    block = SPADEResBlock(4, 4, 2).double()
    nn.init.zeros_(block.conv_1.weight)
    nn.init.zeros_(block.conv_1.bias)
    features = maps((2, 4, 3, 3))
    assert_equal(block(features, maps((2, 2, 3, 3))), features)


def test_shortcut_normalises_with_the_same_statistics():
    block = SPADEResBlock(4, 3, 2)
    block(maps((2, 4, 3, 3), dtype=torch.float32), maps((2, 2, 3, 3), dtype=torch.float32))
    counts = {name: value for name, value in block.named_buffers() if "num_batches" in name}
    assert set(counts) == {"norm_0.num_batches_tracked", "norm_1.num_batches_tracked"}
    assert all(value == 1 for value in counts.values())


# oracle and gradients


@given(size=sizes, seed=seeds, hidden=st.sampled_from([None, 3]), kernel=st.sampled_from([1, 3]))
def test_spade_oracle(size, seed, hidden, kernel):
    spade = SPADE(size[1], 2, hidden_channels=hidden, kernel_size=kernel).double()
    features, cond = maps(size, seed), maps((size[0], 2, *size[2:]), seed + 1)
    expected = oracle_spade(spade, oracle_normalize(features.numpy()), cond.numpy())
    torch.testing.assert_close(spade(features, cond), torch.from_numpy(expected))


@pytest.mark.parametrize(("width", "out_width"), [(3, 3), (4, 2), (2, 3)])
def test_block_oracle(width, out_width):
    block = SPADEResBlock(width, out_width, 2, hidden_channels=3).double()
    features, cond = maps((2, width, 5, 4)), maps((2, 2, 5, 4), 1)
    image, labels = features.numpy(), cond.numpy()
    normalized = oracle_normalize(image)
    shortcut = image
    if width != out_width:
        shortcut = oracle_conv(block.conv_s, oracle_spade(block.spade_s, normalized, labels))
        assert block.conv_s.bias is None
    hidden = oracle_spade(block.spade_0, normalized, labels)
    hidden = oracle_conv(block.conv_0, np.where(hidden > 0, hidden, 0.2 * hidden))
    assert hidden.shape[1] == min(width, out_width)
    hidden = oracle_spade(block.spade_1, oracle_normalize(hidden), labels)
    hidden = oracle_conv(block.conv_1, np.where(hidden > 0, hidden, 0.2 * hidden))
    torch.testing.assert_close(block(features, cond), torch.from_numpy(shortcut + hidden))


def test_spade_gradients():
    spade = SPADE(2, 1, hidden_channels=2, kernel_size=1).double()
    inputs = [maps((2, 2, 2, 2)).requires_grad_(), maps((2, 1, 2, 2), 1).requires_grad_()]
    parameters = list(spade.parameters())
    assert torch.autograd.gradcheck(lambda x, m, *_: spade(x, m), [*inputs, *parameters])
    assert torch.autograd.gradgradcheck(spade, inputs)


def test_block_gradients():
    block = SPADEResBlock(2, 1, 1, hidden_channels=2, kernel_size=1).double()
    inputs = [maps((2, 2, 2, 2)).requires_grad_(), maps((2, 1, 2, 2), 1).requires_grad_()]
    assert torch.autograd.gradcheck(block, inputs)


def test_every_parameter_gets_a_gradient():
    block = SPADEResBlock(4, 3, 2)
    block(torch.randn(2, 4, 3, 3), torch.randn(2, 2, 3, 3)).square().sum().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


# dtypes, layouts, copies, compilation


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_modules_are_finite_and_near(dtype):
    block = SPADEResBlock(4, 3, 2, hidden_channels=8)
    features, cond = maps((2, 4, 6, 6), dtype=torch.float32), maps((2, 2, 6, 6), 1, torch.float32)
    expected = block(features, cond)
    half = copy.deepcopy(block).to(dtype)
    out = half(features.to(dtype), cond.to(dtype))
    assert out.dtype == dtype
    # six roundings on the way, of values below 4
    assert (out.float() - expected).abs().max() < 6 * 4 * torch.finfo(dtype).eps
    out.float().square().sum().backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in half.parameters())


def test_autocast_keeps_the_dtype_of_the_features():
    spade = SPADE(4, 2, hidden_channels=8)
    features, cond = maps((2, 4, 6, 6), dtype=torch.float32), maps((2, 2, 6, 6), 1, torch.float32)
    expected = spade(features, cond)
    with torch.autocast("cpu", torch.bfloat16):
        out = spade(features, cond)
        assert spade(features.bfloat16(), cond).dtype == torch.bfloat16
    assert out.dtype == torch.float32
    # gamma and beta are rounded to bfloat16 twice
    assert (out - expected).abs().max() < 8 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_memory_layouts_agree(norm):
    block = SPADEResBlock(4, 3, 2, norm=norm).double()
    features, cond = maps((2, 4, 5, 6)), maps((2, 2, 5, 6), 1)
    expected = block(features, cond)
    last = [value.to(memory_format=torch.channels_last) for value in (features, cond)]
    out = block(*last)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(block(features.mT.contiguous().mT, cond), expected)
    torch.testing.assert_close(block(features, torch.cat([cond, cond], 1)[:, 2:]), expected)


def test_inputs_are_not_written_to():
    features, cond = maps((2, 4, 5, 6)), maps((2, 2, 5, 6), 1)
    before = features.clone(), cond.clone()
    SPADEResBlock(4, 3, 2).double()(features, cond)
    assert_equal(features, before[0])
    assert_equal(cond, before[1])


@pytest.mark.parametrize("norm", ["batch", "instance", "none"])
def test_state_and_copies_round_trip(norm):
    block = SPADEResBlock(4, 3, 2, norm=norm)
    features, cond = torch.randn(2, 4, 3, 3), torch.randn(2, 2, 3, 3)
    block(features, cond)
    twin = SPADEResBlock(4, 3, 2, norm=norm)
    twin.load_state_dict(block.state_dict())
    for other in (twin, copy.deepcopy(block)):
        assert_equal(other.eval()(features, cond), copy.deepcopy(block).eval()(features, cond))


def test_meta_shapes():
    block = SPADEResBlock(4, 3, 2).to("meta")
    features, cond = torch.empty(2, 4, 5, 6, device="meta"), torch.empty(2, 2, 5, 6, device="meta")
    assert block(features, cond).shape == (2, 3, 5, 6)


# bad inputs


@pytest.mark.parametrize("owner", [SPADE, SPADEResBlock])
@pytest.mark.parametrize(
    ("cond", "error", "parts"),
    [
        pytest.param(None, DTypeError, ("torch.Tensor", "NoneType"), id="none"),
        pytest.param(np.ones((2, 3, 4, 4)), DTypeError, ("ndarray",), id="numpy"),
        pytest.param(
            torch.ones(2, 3, 8, 10), InputError, ("H=4, W=5", "(2, 3, 8, 10)"), id="another-size"
        ),
        pytest.param(torch.ones(1, 3, 4, 5), InputError, ("B=2", "(1, 3, 4, 5)"), id="batch-of-1"),
        pytest.param(torch.ones(2, 4, 4, 5), InputError, ("C=3", "(2, 4, 4, 5)"), id="channels"),
        pytest.param(torch.ones(2, 4, 5), InputError, ("C=3", "(2, 4, 5)"), id="rank-3"),
        pytest.param(torch.ones(2, 3, 4, 5).long(), DTypeError, ("int64",), id="integer"),
        pytest.param(
            torch.ones(2, 3, 4, 5, device="meta"), InputError, ("cpu", "meta"), id="device"
        ),
    ],
)
def test_bad_cond(owner, cond, error, parts):
    block = SPADE(2, 3) if owner is SPADE else SPADEResBlock(2, 2, 3)
    with pytest.raises(error) as caught:
        block(torch.ones(2, 2, 4, 5), cond)
    assert_message(caught.value, f"{owner.__name__}: cond must", *parts)


@pytest.mark.parametrize("owner", [SPADE, SPADEResBlock])
@pytest.mark.parametrize(
    ("features", "error", "parts"),
    [
        pytest.param("map", DTypeError, ("torch.Tensor", "str"), id="str"),
        pytest.param(torch.ones(2, 3, 4, 5), InputError, ("C=2", "(2, 3, 4, 5)"), id="channels"),
        pytest.param(torch.ones(2, 4, 5), InputError, ("(2, 4, 5)",), id="rank-3"),
        pytest.param(torch.ones(2, 2, 0, 5), InputError, ("empty",), id="no-rows"),
        pytest.param(torch.ones(2, 2, 4, 5).bool(), DTypeError, ("torch.bool",), id="bool"),
    ],
)
def test_bad_features(owner, features, error, parts):
    block = SPADE(2, 3) if owner is SPADE else SPADEResBlock(2, 2, 3)
    with pytest.raises(error) as caught:
        block(features, torch.ones(2, 3, 4, 5))
    assert_message(caught.value, f"{owner.__name__}: features must", *parts)


@pytest.mark.parametrize("owner", [SPADE, SPADEResBlock])
@pytest.mark.parametrize(
    ("norm", "size", "parts"),
    [
        pytest.param("batch", (1, 2, 1, 1), ("two values", 'norm="instance"'), id="one-value"),
        pytest.param("batch", (0, 2, 4, 4), ("two values", "(0, 2, 4, 4)"), id="empty-batch"),
        pytest.param("instance", (3, 2, 1, 1), ("two pixels", 'norm="batch"'), id="one-pixel"),
    ],
)
def test_too_little_to_normalise(owner, norm, size, parts):
    block = SPADE(2, 3, norm=norm) if owner is SPADE else SPADEResBlock(2, 2, 3, norm=norm)
    cond = torch.ones(size[0], 3, *size[2:])
    with pytest.raises(InputError) as caught:
        block(torch.ones(size), cond)
    assert_message(caught.value, f"{owner.__name__}: features must hold at least", *parts)
    assert block.eval()(torch.ones(size), cond).shape == size


@pytest.mark.parametrize(
    ("settings", "error", "parts"),
    [
        pytest.param({"cond_channels": 0}, InputError, ("cond_channels", "got 0"), id="no-cond"),
        pytest.param({"hidden_channels": 0}, InputError, ("hidden_channels",), id="no-hidden"),
        pytest.param({"kernel_size": 2}, InputError, ("odd", "got 2"), id="even-kernel"),
        pytest.param({"kernel_size": True}, DTypeError, ("kernel_size",), id="bool-kernel"),
        pytest.param({"norm": "layer"}, InputError, ("norm", "'layer'"), id="norm"),
    ],
)
def test_bad_settings(settings, error, parts):
    settings = {"cond_channels": 3, **settings}
    with pytest.raises(error) as caught:
        SPADE(2, **settings)
    assert_message(caught.value, "SPADE: ", *parts)
    with pytest.raises(error) as caught:
        SPADEResBlock(2, 2, **settings)
    assert_message(caught.value, *parts)


def test_bad_widths():
    with pytest.raises(InputError) as caught:
        SPADE(0, 3)
    assert_message(caught.value, "SPADE: channels must be at least 1; got 0")
    with pytest.raises(InputError) as caught:
        SPADEResBlock(0, 2, 3)
    assert_message(caught.value, "SPADEResBlock: in_channels")
    with pytest.raises(InputError) as caught:
        SPADEResBlock(2, 0, 3)
    assert_message(caught.value, "SPADEResBlock: out_channels")


@pytest.mark.parametrize("name", ["gamma", "beta"])
def test_modulation_maps_are_not_broadcast(name):
    maps = {key: torch.ones(2, 3, 4, 4) for key in ("normalized", "gamma", "beta")}
    maps[name] = torch.ones(2, 3, 1, 1)
    with pytest.raises(InputError) as caught:
        spade_modulate(**maps)
    assert_message(caught.value, f"spade_modulate: {name} must", "H=4", "(2, 3, 1, 1)")


# golden vectors


def load_spade(spade, golden, prefix):
    """Fill a SPADE from the peer's three convolutions."""
    peer = {
        (layer, kind): golden.tensor(f"{prefix}mlp_{layer}.{kind}")
        for layer in ("shared.0", "gamma", "beta")
        for kind in ("weight", "bias")
    }
    with torch.no_grad():
        for kind in ("weight", "bias"):
            getattr(spade.hidden, kind).copy_(peer["shared.0", kind])
            both = torch.cat([peer["gamma", kind], peer["beta", kind]])
            getattr(spade.modulation, kind).copy_(both)


def resized_cond(golden, key, size):
    """The peer's full-size map, and what the peer makes of it."""
    full = golden.tensor(key, torch.float64).requires_grad_()
    return full, F.interpolate(full, size=size, mode="nearest")


def assert_golden32(actual, golden, key):
    # the peer's own float32 result, as far as float32 goes
    expected = golden.tensor(key, torch.float64)
    assert (actual - expected).abs().max() <= 3e-5 * expected.abs().max() + 1e-8, key


@pytest.mark.parametrize("case", golden_cases("c_spade_nvlabs") + golden_cases("c_spade_oasis"))
def test_golden_spade(case):
    golden = Golden(case)
    options = golden.options
    channels = options["norm_nc"]
    spade = SPADE(
        channels,
        options["label_nc"],
        hidden_channels=options["nhidden"],
        kernel_size=options["spade_ks"],
        norm=options["param_free_norm"],
    ).double()
    load_spade(spade, golden, "param_")
    if options["param_free_norm"] == "batch":
        spade.norm.running_mean.copy_(golden.tensor("running_mean_before"))
        spade.norm.running_var.copy_(golden.tensor("running_var_before"))
    spade.train(options["train"])
    features = golden.tensor("x", torch.float64).requires_grad_()
    full, cond = resized_cond(golden, "segmap", features.shape[2:])
    out = spade(features, cond)
    (out * golden.tensor("gout")).sum().backward()
    assert_golden64(out, golden, "out")
    assert_golden64(features.grad, golden, "grad_x")
    assert_golden64(full.grad, golden, "grad_segmap")
    assert_golden64(spade.modulation.bias.grad[:channels], golden, "grad_gamma_b")
    assert_golden32(spade.hidden.weight.grad, golden, "grad_shared_w")
    assert_golden32(spade.modulation.weight.grad[channels:].sum(0), golden, "grad_beta_w_sum")
    if options["param_free_norm"] == "batch":
        assert_golden64(spade.norm.running_mean, golden, "running_mean_after")
        assert_golden64(spade.norm.running_var, golden, "running_var_after")


def golden_block(golden):
    options = golden.options
    block = SPADEResBlock(
        options["fin"],
        options["fout"],
        options["semantic_nc"],
        kernel_size=options["spade_ks"],
        norm=options["param_free_norm"],
    ).double()
    for name in block_convs(golden):
        load_spade(getattr(block, f"spade_{name[-1]}"), golden, f"param_norm_{name[-1]}.")
        conv = getattr(block, name)
        conv.load_state_dict(
            {key: golden.tensor(f"param_{name}.{key}") for key in conv.state_dict()}
        )
    return block


def block_convs(golden):
    return [name for name in ("conv_0", "conv_1", "conv_s") if f"param_{name}.weight" in golden]


@pytest.mark.parametrize("case", golden_cases("d_oasis_resblock"))
def test_golden_block(case):
    golden = Golden(case)
    block = golden_block(golden)
    features = golden.tensor("x", torch.float64).requires_grad_()
    full, cond = resized_cond(golden, "seg", features.shape[2:])
    out = block(features, cond)
    (out * golden.tensor("gout")).sum().backward()
    assert_golden64(out, golden, "out")
    assert_golden64(features.grad, golden, "grad_x")
    assert_golden64(full.grad, golden, "grad_seg")
    for name in block_convs(golden):
        assert_golden64(getattr(block, name).weight.grad, golden, f"grad_{name}_weight")


@pytest.mark.parametrize("case", golden_cases("d_oasis_resblock"))
def test_golden_block_statistics(case):
    golden = Golden(case)
    block = golden_block(golden)
    features = golden.tensor("x", torch.float64)
    _, cond = resized_cond(golden, "seg", features.shape[2:])
    # the peer normalises the shortcut apart: ours does so once, with the same result
    pairs = {"0": block.norm_0, "1": block.norm_1, "s": block.norm_0}
    for name, norm in pairs.items():
        prefix = f"norm_{name}.first_norm"
        if f"buffer_{prefix}.running_mean" not in golden:
            continue
        for statistic in ("running_mean", "running_var"):
            getattr(norm, statistic).copy_(golden.tensor(f"buffer_{prefix}.{statistic}"))
        block(features, cond)
        for statistic in ("running_mean", "running_var"):
            assert_golden64(getattr(norm, statistic), golden, f"after_{prefix}.{statistic}")
