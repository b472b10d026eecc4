"""Latents on the sphere, and the MLP that makes tokens of them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, strategies as st
from support import assert_close64, assert_equal, assert_message
from torch import nn

from dpsims.errors import DTypeError, InputError
from dpsims.nn.noise import NoiseMapper, sphere_normalize

SIZES = {"batch": st.integers(0, 4), "width": st.integers(1, 9), "seed": st.integers(0, 99)}


def draw(batch, width, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, width, generator=generator, dtype=dtype)


def mapper(**options):
    torch.manual_seed(0)
    return NoiseMapper(5, 6, **({"num_tokens": 3} | options)).double()


@given(**SIZES, radius=st.sampled_from([None, 1.0, 0.25, 7.0]))
def test_every_vector_has_the_length_asked_for(batch, width, seed, radius):
    out = sphere_normalize(draw(batch, width, seed), radius=radius)
    length = math.sqrt(width) if radius is None else radius
    assert_close64(out.norm(dim=1), torch.full((batch,), length, dtype=torch.float64))


@given(**SIZES, power=st.integers(-900, 900))
def test_only_the_direction_counts(batch, width, seed, power):
    latents = draw(batch, width, seed)
    # a power of two scales exactly, and its square is far outside of float64
    assert_equal(sphere_normalize(latents * 2.0**power), sphere_normalize(latents))
    assert_equal(sphere_normalize(-latents), -sphere_normalize(latents))
    assert_close64(sphere_normalize(sphere_normalize(latents)), sphere_normalize(latents))


def test_equals_the_printed_formula():
    latents = draw(4, 64, 0)
    assert_close64(sphere_normalize(latents, radius=1.0), latents / latents.norm(dim=1)[:, None])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", ["zero", "tiny", "largest"])
def test_extreme_vectors_are_finite(dtype, scale):
    info = torch.finfo(dtype)
    value = {"zero": 0.0, "tiny": info.tiny, "largest": info.max}[scale]
    latents = torch.full((2, 3), value, dtype=dtype, requires_grad=True)
    out = sphere_normalize(latents)
    assert out.dtype == dtype
    # three equal entries on the sphere of radius sqrt(3), up to the rounding of that root
    assert ((out - float(value > 0)).abs() <= info.eps).all()
    if scale != "tiny":
        # the true gradient goes with 1 / length: it overflows for tiny vectors
        (grad,) = torch.autograd.grad(out[:, 0].sum(), latents)
        assert grad.isfinite().all()


def test_half_precision_is_rounded_once():
    latents = draw(8, 64, 0, torch.bfloat16)
    exact = sphere_normalize(latents.double())
    assert_equal(sphere_normalize(latents), exact.float().to(torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        assert sphere_normalize(latents.float()).dtype == torch.float32


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_are_not_hidden(value):
    latents = draw(3, 4, 0)
    latents[1, 2] = value
    assert sphere_normalize(latents).isnan().any(1).tolist() == [False, True, False]
    assert mapper().forward(torch.full((1, 5), value).double()).isnan().all()


def test_gradients():
    latents = draw(2, 4, 0).requires_grad_()
    assert torch.autograd.gradcheck(sphere_normalize, [latents], fast_mode=False)
    assert torch.autograd.gradgradcheck(sphere_normalize, [latents])
    (grad,) = torch.autograd.grad(sphere_normalize(latents)[:, 0].sum(), latents)
    # the length does not matter, so nothing changes along the vector itself
    assert_close64((grad * latents).sum(1), torch.zeros(2, dtype=torch.float64))
    module = mapper()
    assert torch.autograd.gradcheck(module, [draw(2, 5, 1).requires_grad_()], fast_mode=False)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("radius", [None, 1.0])
def test_mapper_equals_an_mlp_written_out(depth, radius):
    module = mapper(depth=depth, radius=radius)
    latents = draw(4, 5, 0)
    hidden = sphere_normalize(latents, radius=radius)
    linears = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    assert len(linears) == depth
    for index, layer in enumerate(linears):
        if index:
            # gelu(x) = x * Phi(x)
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        hidden = hidden @ layer.weight.T + layer.bias
    assert_close64(module(latents), hidden.reshape(4, 3, 6))


@given(batch=st.integers(0, 4), seed=st.integers(0, 99), scale=st.floats(1e-3, 1e3))
def test_mapper_ignores_the_length_and_the_rest_of_the_batch(batch, seed, scale):
    module, latents = mapper(), draw(batch, 5, seed)
    tokens = module(latents)
    assert tokens.shape == (batch, 3, 6)
    assert_close64(module(latents * scale), tokens)
    for b in range(batch):
        assert_close64(module(latents[b : b + 1]), tokens[b : b + 1])


def test_tokens_of_the_default_mapper_vary_with_the_latent():
    tokens = NoiseMapper()(draw(32, 64, 0, torch.float32))
    assert tokens.shape == (32, 8, 256)
    # on a sphere of radius 1 this share is below a tenth
    assert (tokens.std(0).mean() / tokens.abs().mean()) > 0.3


def test_state_dict_deepcopy_train_and_strides():
    torch.manual_seed(1)
    other, module, latents = NoiseMapper(5, 6, num_tokens=3).double(), mapper(), draw(2, 5, 0)
    other.load_state_dict(module.state_dict())
    expected = module(latents)
    for same in (other, copy.deepcopy(module), copy.deepcopy(module).eval()):
        assert_equal(same(latents), expected)
    assert_close64(module(latents.T.contiguous().T), expected)
    assert_equal(sphere_normalize(latents.T.contiguous().T), sphere_normalize(latents))
    assert latents._version == 0


def test_meta_and_half_precision_modules():
    meta = NoiseMapper(4, 6, num_tokens=2).to("meta")
    assert meta(torch.empty(3, 4, device="meta")).shape == (3, 2, 6)
    latents = draw(2, 5, 0, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert mapper().float()(latents).isfinite().all()
    half = mapper().to(torch.bfloat16)(latents.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert half.isfinite().all()


@pytest.mark.parametrize(
    ("latents", "error", "parts"),
    [
        pytest.param(torch.ones(2, 4), InputError, ["(B, Z=5)", "(2, 4)"], id="width"),
        pytest.param(torch.ones(5), InputError, ["(B, Z=5)", "(5,)"], id="rank"),
        pytest.param(torch.ones(2, 5).long(), DTypeError, ["floating", "int64"], id="integer"),
        pytest.param(None, DTypeError, ["Tensor", "NoneType"], id="none"),
    ],
)
def test_mapper_refuses_bad_latents(latents, error, parts):
    with pytest.raises(error) as caught:
        mapper()(latents)
    assert_message(caught.value, "NoiseMapper: latents must", *parts)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        pytest.param({"latent_dim": 0}, InputError, id="latent-dim-0"),
        pytest.param({"token_dim": 0}, InputError, id="token-dim-0"),
        pytest.param({"num_tokens": 0}, InputError, id="no-token"),
        pytest.param({"depth": 0}, InputError, id="depth-0"),
        pytest.param({"depth": True}, DTypeError, id="depth-bool"),
        pytest.param({"num_tokens": 2.0}, DTypeError, id="tokens-float"),
        pytest.param({"radius": 0.0}, InputError, id="radius-0"),
        pytest.param({"radius": math.nan}, InputError, id="radius-nan"),
        pytest.param({"radius": "1"}, DTypeError, id="radius-text"),
    ],
)
def test_mapper_refuses_bad_settings(options, error):
    (name,) = options
    with pytest.raises(error) as caught:
        NoiseMapper(**options)
    assert_message(caught.value, f"NoiseMapper: {name} must")


def test_sphere_normalize_refuses_bad_arguments():
    cases = [
        (torch.ones(3), {}, InputError, "latents must have shape (B, Z)"),
        (torch.ones(3, 0), {}, InputError, "latents must have shape (B, Z)"),
        (torch.ones(3, 2).int(), {}, DTypeError, "latents must have a floating-point dtype"),
        (torch.ones(3, 2), {"radius": -1.0}, InputError, "radius must be finite and > 0"),
    ]
    for latents, options, error, part in cases:
        with pytest.raises(error) as caught:
            sphere_normalize(latents, **options)
        assert_message(caught.value, f"sphere_normalize: {part}")
