"""Gated attention modules: closed gate, symmetries, the equation, layouts."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, strategies as st
from support import assert_close64, assert_equal, assert_message
from torch import nn

from dpsims.errors import DTypeError, InputError
from dpsims.nn.attention import CrossAttentionNoiseInjector, SelfAttention2d

CHANNELS, TOKEN_DIM = 4, 3
IMPLS = ("reference", "sdpa")
KINDS = ("inject", "attend")
CASES = [(kind, impl) for kind in KINDS for impl in IMPLS] + [("inject", "folded")]
SHAPES = {
    "batch": st.integers(1, 3),
    "height": st.integers(1, 6),
    "width": st.integers(1, 6),
    "num_tokens": st.integers(1, 5),
    "seed": st.integers(0, 99),
}


def make(kind, *, gate=0.7, impl="auto", attn_dim=None):
    """A module in float64; ``gate=None`` leaves it as it starts."""
    torch.manual_seed(0)
    options = {"attn_dim": attn_dim, "impl": impl}
    if kind == "inject":
        module = CrossAttentionNoiseInjector(CHANNELS, TOKEN_DIM, **options)
    else:
        module = SelfAttention2d(CHANNELS, **options)
    module.double()
    if gate is not None:
        nn.init.constant_(module.gate, gate)
    return module


def draw(kind, batch=2, height=3, width=5, num_tokens=4, seed=0):
    """The arguments of a module's forward."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, CHANNELS, height, width), (batch, num_tokens, TOKEN_DIM)]
    shapes = shapes if kind == "inject" else shapes[:1]
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def oracle(module, features, tokens=None):
    """Eq. 1-2 for one sample and one pixel at a time."""
    out = features.clone()
    for b in range(features.shape[0]):
        pixels = features[b].flatten(1).T
        if tokens is None:
            q, k, v = (pixels @ module.qkv.weight[:, :, 0, 0].T).chunk(3, dim=1)
        else:
            q = pixels @ module.query.weight[:, :, 0, 0].T + module.query.bias
            k, v = tokens[b] @ module.key.weight.T, tokens[b] @ module.value.weight.T
        for n in range(len(pixels)):
            weights = torch.exp((k * q[n]).sum(1) / math.sqrt(q.shape[1]))
            read = (weights[:, None] * v).sum(0) / weights.sum()
            update = module.output.weight[:, :, 0, 0] @ read + module.output.bias
            out[b, :, n // features.shape[3], n % features.shape[3]] += module.gate * update
    return out


@pytest.mark.parametrize("kind", KINDS)
@given(**SHAPES)
def test_a_new_module_is_the_identity(kind, **shape):
    args = draw(kind, **shape)
    assert_equal(make(kind, gate=None)(*args), args[0])


@pytest.mark.parametrize(("kind", "impl"), CASES)
@given(**SHAPES)
def test_equals_the_equations_computed_pixel_by_pixel(kind, impl, **shape):
    module, args = make(kind, impl=impl), draw(kind, **shape)
    assert_close64(module(*args), oracle(module, *args))


@pytest.mark.parametrize("kind", KINDS)
@given(**SHAPES, factor=st.floats(-3, 3))
def test_update_is_linear_in_the_gate(kind, factor, **shape):
    args = draw(kind, **shape)
    update = make(kind, gate=1.0)(*args) - args[0]
    assert_close64(make(kind, gate=factor)(*args), args[0] + factor * update)


@given(**SHAPES)
def test_order_and_repetition_of_tokens_do_not_matter(num_tokens, seed, **shape):
    features, tokens = draw("inject", num_tokens=num_tokens, seed=seed, **shape)
    order = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(seed)).repeat(2)
    module = make("inject")
    assert_close64(module(features, tokens[:, order]), module(features, tokens))


@pytest.mark.parametrize("kind", KINDS)
@given(**SHAPES)
def test_moving_pixels_moves_the_output(kind, **shape):
    module, (features, *rest) = make(kind), draw(kind, **shape)
    out = module(features, *rest)
    for dims in ([2], [3], [2, 3]):
        assert_close64(module(features.flip(dims), *rest), out.flip(dims))
    order = torch.randperm(
        out.shape[2] * out.shape[3], generator=torch.Generator().manual_seed(shape["seed"])
    )
    moved = features.flatten(2)[:, :, order].view_as(features)
    assert_close64(module(moved, *rest), out.flatten(2)[:, :, order].view_as(features))


@pytest.mark.parametrize("kind", KINDS)
@given(**SHAPES)
def test_samples_are_independent(kind, batch, **shape):
    module, args = make(kind), draw(kind, batch, **shape)
    whole = module(*args)
    for b in range(batch):
        assert_close64(module(*(x[b : b + 1] for x in args)), whole[b : b + 1])


@given(**SHAPES)
def test_one_token_gives_every_pixel_the_same_update(**shape):
    features, tokens = draw("inject", **(shape | {"num_tokens": 1}))
    update = make("inject")(features, tokens) - features
    assert_close64(update, update[:, :, :1, :1].expand_as(update))


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_gate_learns_while_it_is_closed(kind):
    module = make(kind, gate=None)
    module(*draw(kind)).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()) == (name == "gate"), name


@pytest.mark.parametrize(("kind", "impl"), [case for case in CASES if case[1] != "sdpa"])
def test_gradients(kind, impl):
    module = make(kind, impl=impl)
    names, parameters = zip(*module.named_parameters(), strict=True)
    args = [x.requires_grad_() for x in draw(kind, 1, 2, 2, 3)]

    def call(*values):
        state = dict(zip(names, values[len(args) :], strict=True))
        return torch.func.functional_call(module, state, values[: len(args)])

    assert torch.autograd.gradcheck(call, (*args, *parameters), fast_mode=False)


@pytest.mark.parametrize(("kind", "impl"), CASES)
def test_memory_formats_and_strides(kind, impl):
    module, (features, *rest) = make(kind, impl=impl), draw(kind)
    expected = module(features, *rest)
    channels_last = module(features.to(memory_format=torch.channels_last), *rest)
    assert expected.is_contiguous()
    assert channels_last.is_contiguous(memory_format=torch.channels_last)
    assert_close64(channels_last, expected)
    transposed = features.mT.contiguous().mT
    assert_close64(module(transposed, *(x.mT.contiguous().mT for x in rest)), expected)
    one_row = features[:, :, :1].expand_as(features)
    assert_close64(module(one_row, *rest), module(one_row.contiguous(), *rest))


@pytest.mark.parametrize("size", [(1, 1), (64, 64), (65, 63)])
def test_map_sizes(size):
    for kind in KINDS:
        features, *rest = draw(kind, 1, *size)
        out = make(kind)(features, *rest)
        assert out.shape == features.shape
        assert out.isfinite().all()


@pytest.mark.parametrize(("kind", "impl"), CASES)
def test_closed_gate_is_the_identity_for_huge_float16_features(kind, impl):
    module = make(kind, gate=0.0, impl=impl).to(torch.float16)
    args = [torch.full_like(x, 3e4, dtype=torch.float16) for x in draw(kind)]
    with torch.no_grad():
        # as the identity, so that the logits and not the projections are huge
        for layer in module.children():
            layer.weight.fill_(1e-2)
    assert_equal(module(*args), args[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_and_autocast(kind, dtype):
    module, args = make(kind), draw(kind)
    exact = module(*args)
    half = make(kind).to(dtype)(*(x.to(dtype) for x in args))
    with torch.autocast("cpu", dtype):
        mixed = make(kind).float()(*(x.float() for x in args))
        # as behind a convolution, whose output is in half precision
        assert make(kind).float()(args[0].to(dtype), *(x.float() for x in args[1:])).dtype == dtype
    assert half.dtype == dtype
    assert mixed.dtype == torch.float32
    for out in (half, mixed):
        # five roundings of values below 4, in a sum of CHANNELS terms
        assert (out.double() - exact).abs().max() <= 20 * torch.finfo(dtype).eps


def test_nan_reaches_the_output():
    features, tokens = draw("inject")
    tokens[0, 0, 0] = math.nan
    out = make("inject")(features, tokens)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()
    features[1, 0, 0, 0] = math.nan
    assert make("attend")(features)[1].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_deepcopy_train_meta_and_empty_batch(kind):
    module, args = make(kind), draw(kind)
    expected = module(*args)
    torch.manual_seed(1)
    other = make(kind, gate=0.1)
    other.load_state_dict(module.state_dict())
    for same in (other, copy.deepcopy(module), copy.deepcopy(module).eval()):
        assert_equal(same(*args), expected)
    assert all(x._version == 0 for x in args)
    meta = make(kind).to("meta")(*(x.to("meta") for x in args))
    assert meta.shape == args[0].shape
    assert module(*(x[:0] for x in args)).shape == (0, *args[0].shape[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_default_width_is_half_the_channels(kind):
    assert make(kind).attn_dim == CHANNELS // 2
    assert make(kind, attn_dim=5).output.weight.shape == (CHANNELS, 5, 1, 1)
    assert SelfAttention2d(1).attn_dim == 1
    assert f"attn_dim={CHANNELS // 2}" in repr(make(kind))


@given(**SHAPES)
def test_the_implementations_of_the_injection_agree(**shape):
    args = [x.requires_grad_() for x in draw("inject", **shape)]
    results = []
    for impl in ("reference", "sdpa", "folded", "auto"):
        module = make("inject", impl=impl)
        out = module(*args)
        results.append([out, *torch.autograd.grad(out.sin().sum(), [*args, *module.parameters()])])
    for result in results[1:]:
        for got, expected in zip(result, results[0], strict=True):
            assert_close64(got, expected, scale=10)


def test_folding_has_second_order_gradients():
    module = make("inject", impl="folded")
    args = [x.requires_grad_() for x in draw("inject", 1, 2, 2, 3)]
    assert torch.autograd.gradgradcheck(module, args)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_self_attention_hands_over_what_the_fast_kernels_take(layout, monkeypatch):
    seen = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def noted(*qkv):
        seen.extend(qkv)
        return attend(*qkv)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    make("attend")(draw("attend")[0].to(memory_format=layout))
    dim = CHANNELS // 2
    for x in seen:
        assert x.shape == (2, 1, 15, dim)
        # entries side by side, pixels at one step, and nothing copied: one product made all three
        assert x.stride()[2:] == (3 * dim, 1)
        assert x.untyped_storage().data_ptr() == seen[0].untyped_storage().data_ptr()


def bad(kind, index, change):
    args = draw(kind)
    args[index] = change(args[index])
    return kind, args


@pytest.mark.parametrize(
    ("case", "error", "parts"),
    [
        pytest.param(bad("inject", 0, lambda x: x[0]), InputError, ["features"], id="rank"),
        pytest.param(bad("inject", 0, lambda x: x[:, :3]), InputError, ["C=4", "(2, 3"], id="C"),
        pytest.param(bad("inject", 0, lambda x: x[:, :, :0]), InputError, ["empty"], id="no-rows"),
        pytest.param(bad("inject", 0, lambda x: x.int()), DTypeError, ["features"], id="integer"),
        pytest.param(bad("inject", 1, lambda x: x[:1]), InputError, ["tokens", "B=2"], id="batch"),
        pytest.param(bad("inject", 1, lambda x: x[..., :2]), InputError, ["D=3"], id="D"),
        pytest.param(bad("inject", 1, lambda x: x[:, :0]), InputError, ["tokens"], id="no-token"),
        pytest.param(bad("inject", 1, lambda x: x.bool()), DTypeError, ["tokens"], id="bool"),
        pytest.param(bad("inject", 1, lambda x: x.to("meta")), InputError, ["meta"], id="device"),
        pytest.param(bad("inject", 1, lambda x: None), DTypeError, ["NoneType"], id="none"),
        pytest.param(bad("attend", 0, lambda x: x[:, :3]), InputError, ["C=4"], id="self-C"),
        pytest.param(bad("attend", 0, lambda x: x.long()), DTypeError, ["int64"], id="self-int"),
    ],
)
def test_bad_inputs(case, error, parts):
    kind, args = case
    module = make(kind)
    with pytest.raises(error) as caught:
        module(*args)
    assert_message(caught.value, f"{type(module).__name__}: ", "must", *parts)


@pytest.mark.parametrize(
    ("kind", "options", "error", "part"),
    [
        pytest.param("inject", {"channels": 0}, InputError, "channels must", id="channels"),
        pytest.param("inject", {"token_dim": 0}, InputError, "token_dim must", id="token-dim"),
        pytest.param("inject", {"attn_dim": 0}, InputError, "attn_dim must", id="attn-dim"),
        pytest.param("inject", {"impl": "fast"}, InputError, "impl must", id="impl"),
        pytest.param("attend", {"impl": "fused"}, InputError, "no fused kernel", id="fused"),
        pytest.param("attend", {"channels": 2.0}, DTypeError, "channels must", id="float"),
        pytest.param("attend", {"attn_dim": True}, DTypeError, "attn_dim must", id="bool"),
        pytest.param("attend", {"impl": None}, InputError, "impl must", id="self-impl"),
    ],
)
def test_bad_settings(kind, options, error, part):
    cls = CrossAttentionNoiseInjector if kind == "inject" else SelfAttention2d
    sizes = {"channels": 4} | ({"token_dim": 3} if kind == "inject" else {})
    with pytest.raises(error) as caught:
        cls(**(sizes | options))
    assert_message(caught.value, part)
