"""The injection of tokens: the equation, the folding, the operator, the choice."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, strategies as st
from injection_cases import draw, layouts
from support import assert_close64, assert_equal, assert_message

from dpsims.errors import DTypeError, InputError
from dpsims.nn import CrossAttentionNoiseInjector
from dpsims.ops.attention import (
    _library,
    _reference,
    fold_injector_weights,
    fold_tokens,
    inject_tokens,
    project_tokens,
    resolve_injection_impl,
    resolve_injector_impl,
)

SIZES = st.tuples(*(st.integers(1, n) for n in (3, 5, 4, 4, 6)))
SEEDS = st.integers(0, 99)
# where the fused kernel runs
PAPER = {
    "device_type": "cuda",
    "dtype": torch.bfloat16,
    "channels": 64,
    "num_tokens": 8,
    "has_triton": True,
}


def oracle(features, keys, biases, values):
    """One pixel at a time, in Python floats."""
    out = features.clone()
    for b in range(features.shape[0]):
        for y in range(features.shape[2]):
            for x in range(features.shape[3]):
                pixel = features[b, :, y, x]
                logits = [float(pixel @ k + a) for k, a in zip(keys[b], biases[b], strict=True)]
                weights = [math.exp(z - max(logits)) for z in logits]
                read = sum(w * v for w, v in zip(weights, values[b], strict=True))
                out[b, :, y, x] += read / sum(weights)
    return out


def injector(*, gate=0.7, impl="auto", channels=4, attn_dim=None):
    torch.manual_seed(0)
    made = CrossAttentionNoiseInjector(channels, 3, impl=impl, attn_dim=attn_dim).double()
    torch.nn.init.constant_(made.gate, gate)
    return made


@given(sizes=SIZES, seed=SEEDS)
def test_equals_the_equation_computed_pixel_by_pixel(sizes, seed):
    args = draw(sizes, seed)
    assert_close64(inject_tokens(*args), oracle(*args))


@given(sizes=SIZES, seed=SEEDS)
def test_values_of_zero_return_the_features(sizes, seed):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        features, keys, biases, values = draw(sizes, seed, dtype)
        assert_equal(inject_tokens(features, keys, biases, 0 * values), features)
        assert_equal(_library.inject(features, keys, biases, 0 * values), features)


@given(sizes=SIZES, seed=SEEDS, shift=st.floats(-50, 50))
def test_symmetries(sizes, seed, shift):
    features, keys, biases, values = draw(sizes, seed)
    out = inject_tokens(features, keys, biases, values)
    # order and repetition of tokens, and a shift of all logits, do not matter
    order = torch.randperm(sizes[4], generator=torch.Generator().manual_seed(seed)).repeat(2)
    moved = inject_tokens(features, keys[:, order], biases[:, order] + shift, values[:, order])
    assert_close64(moved, out, scale=100)
    # a pixel and a sample know nothing of the others
    assert_close64(inject_tokens(features.flip(2, 3), keys, biases, values), out.flip(2, 3))
    for b in range(sizes[0]):
        one = slice(b, b + 1)
        assert_close64(inject_tokens(features[one], keys[one], biases[one], values[one]), out[one])


@given(sizes=SIZES, seed=SEEDS)
def test_layouts(sizes, seed):
    features, *tokens = draw(sizes, seed)
    out = inject_tokens(features, *tokens)
    for name, other in layouts(features).items():
        got = inject_tokens(other, *tokens)
        assert_close64(got, out)
        if name == "contiguous":
            assert got.is_contiguous()
        if name == "channels-last":
            assert got.is_contiguous(memory_format=torch.channels_last)


def test_strided_tokens_give_the_same():
    features, keys, biases, values = draw((2, 3, 2, 5, 4))
    packed = torch.cat([keys, values, biases.unsqueeze(2)], 2)
    views = packed[..., :3], packed[..., 6], packed[..., 3:6]
    expected = inject_tokens(features, keys, biases, values)
    assert_close64(inject_tokens(features, *views), expected)
    assert_close64(_library.inject(features, *views), expected)


# --- gradients


@pytest.mark.parametrize("run", [inject_tokens, _library.inject], ids=["reference", "operator"])
def test_gradients_of_first_and_second_order(run):
    args = [x.requires_grad_() for x in draw((2, 2, 1, 3, 3))]
    assert torch.autograd.gradcheck(run, args, fast_mode=False)
    assert torch.autograd.gradgradcheck(run, args, fast_mode=False)


@given(sizes=SIZES, seed=SEEDS)
def test_the_closed_form_equals_autograd(sizes, seed):
    args = [x.requires_grad_() for x in draw(sizes, seed)]
    out = inject_tokens(*args)
    slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).double()
    wanted = torch.autograd.grad(out, args, slope)
    for got, expected in zip(_reference.inject_gradients(slope, *args), wanted, strict=True):
        assert_close64(got, expected, scale=10)


@pytest.mark.parametrize("token_dtype", [torch.float32, torch.bfloat16])
def test_gradients_have_the_dtypes_of_their_inputs(token_dtype):
    features, *tokens = draw((2, 3, 2, 2, 3), dtype=torch.bfloat16)
    args = [x.requires_grad_() for x in (features, *(x.to(token_dtype) for x in tokens))]
    for run in (inject_tokens, _library.inject):
        for create_graph in (False, True):
            out = run(*args)
            assert out.dtype == torch.bfloat16
            for x, grad in zip(
                args, torch.autograd.grad(out.sum(), args, create_graph=create_graph), strict=True
            ):
                assert (grad.dtype, grad.shape) == (x.dtype, x.shape)


# --- folding


@pytest.mark.parametrize("attn_dim", [None, 1, 7])
@given(seed=SEEDS, num_tokens=st.integers(1, 9))
def test_folded_weights_equal_the_layers(attn_dim, seed, num_tokens):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2, 4, 3, 2, generator=generator).double()
    tokens = torch.randn(2, num_tokens, 3, generator=generator).double()
    module = injector(impl="reference", attn_dim=attn_dim)
    expected = module(features, tokens)
    assert_close64(inject_tokens(features, *fold_tokens(module, tokens)), expected)
    folded = fold_injector_weights(module)
    assert not folded.weight.requires_grad
    assert_close64(inject_tokens(features, *project_tokens(folded, tokens)), expected)
    module.query.bias = module.output.bias = None
    expected = module(features, tokens)
    assert_close64(inject_tokens(features, *fold_tokens(module, tokens)), expected)


def test_folding_reads_each_weight_once():
    # each reading of a spectrally normalised weight is a step of its power iteration
    module, reads = injector(), []

    class Counted(torch.nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, weight):
            reads.append(self.name)
            return weight

    for name in ("query", "key", "value", "output"):
        torch.nn.utils.parametrize.register_parametrization(
            getattr(module, name), "weight", Counted(name), unsafe=True
        )
    for run in (
        lambda: module(torch.randn(1, 4, 2, 2).double(), torch.randn(1, 2, 3).double()),
        lambda: fold_injector_weights(module),
    ):
        reads.clear()
        run()
        assert sorted(reads) == ["key", "output", "query", "value"]


def test_folding_is_in_float32_under_autocast_and_in_half_precision():
    module, tokens = injector().float(), torch.randn(2, 5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        for folded in (
            fold_tokens(module, tokens),
            project_tokens(fold_injector_weights(module), tokens),
        ):
            assert {x.dtype for x in folded} == {torch.float32}
    half = fold_tokens(module.half(), tokens.half())
    assert {x.dtype for x in half} == {torch.float32}
    assert fold_injector_weights(module).weight.dtype == torch.float16


@pytest.mark.parametrize(
    ("fold", "error", "parts"),
    [
        (lambda tokens: fold_tokens(injector(), tokens[0]), InputError, ["B, T, D=3"]),
        (lambda tokens: fold_tokens(injector(), tokens[..., :2]), InputError, ["D=3"]),
        (lambda tokens: fold_tokens(injector(), tokens.int()), DTypeError, ["int32"]),
        (
            lambda tokens: project_tokens(fold_injector_weights(injector()), tokens[..., :2]),
            InputError,
            ["D=3"],
        ),
    ],
)
def test_bad_tokens(fold, error, parts):
    with pytest.raises(error) as caught:
        fold(torch.zeros(2, 5, 3, dtype=torch.float64))
    assert_message(caught.value, "tokens: tokens must", *parts)


# --- the operator


# the check looks at .grad of a tensor that has none
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "transposed", "gaps"])
def test_operator_keeps_its_contract(dtype, layout):
    features, *tokens = draw((2, 3, 2, 3, 4), dtype=dtype)
    features = layouts(features)[layout].detach().requires_grad_()
    tokens = [x.float().requires_grad_() for x in tokens]
    torch.library.opcheck(_library.inject, (features, *tokens), rtol=1e-2, atol=1e-2)
    with torch.no_grad():
        grad = torch.ones_like(features)
        torch.library.opcheck(
            _library.inject_gradients, (grad, features, *tokens), test_utils="test_schema"
        )
        torch.library.opcheck(
            _library.inject_gradients, (grad, features, *tokens), test_utils="test_faketensor"
        )


def test_operator_ignores_autocast():
    args = [x.requires_grad_() for x in draw((2, 3, 4, 4, 3), dtype=torch.float32)]
    (expected,) = torch.autograd.grad(_library.inject(*args).sum(), args[:1])
    with torch.autocast("cpu", torch.bfloat16):
        out = _library.inject(*args)
        (got,) = torch.autograd.grad(out.sum(), args[:1])
    assert_equal(out, _library.inject(*args))
    assert_equal(got, expected)


@pytest.mark.compile
@pytest.mark.parametrize("run", [inject_tokens, _library.inject], ids=["reference", "operator"])
def test_compiled_equals_eager(run):
    args = [x.requires_grad_() for x in draw((2, 3, 4, 5, 3))]
    results = []
    for call in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        out = call(*args)
        results.append([out, *torch.autograd.grad(out.square().sum(), args)])
    for got, expected in zip(*results, strict=True):
        assert_close64(got, expected)


# --- the choice


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"device_type": "cpu"}, "'cuda'"),
        ({"has_triton": False}, "triton"),
        ({"dtype": torch.float64}, "float16"),
        ({"channels": 257}, "256 channels"),
        ({"num_tokens": 65}, "64 tokens"),
        ({"num_tokens": 33, "channels": 65}, "33 tokens of 65 channels"),
        ({"num_tokens": 33, "dtype": torch.float16}, "33 tokens of 64 channels in torch.float16"),
    ],
    ids=["device", "triton", "dtype", "channels", "tokens", "tile", "wide-tile"],
)
def test_what_keeps_the_fused_kernel_from_running(change, part):
    assert resolve_injection_impl(**PAPER).impl == "fused"
    assert resolve_injection_impl("fused", **PAPER) == ("fused", "asked for")
    # the bounds themselves still fit
    for fits in (
        {"num_tokens": 64},
        {"num_tokens": 16, "channels": 256},
        {"num_tokens": 32, "dtype": torch.float16},
    ):
        assert resolve_injection_impl(**(PAPER | fits)).impl == "fused"
    chosen = resolve_injection_impl(**(PAPER | change))
    assert chosen.impl == "reference"
    assert part in chosen.reason
    for resolve, more in ((resolve_injection_impl, {}), (resolve_injector_impl, {"attn_dim": 32})):
        with pytest.raises(InputError) as caught:
            resolve("fused", **(PAPER | change), **more)
        assert_message(caught.value, "impl must", part, "'fused'")


@pytest.mark.parametrize(
    ("change", "impl"),
    [
        ({}, "fused"),
        ({"dtype": torch.float64}, "folded"),
        ({"has_triton": False}, "sdpa"),
        ({"has_triton": False, "dtype": torch.float32}, "folded"),
        ({"device_type": "cpu"}, "folded"),
        ({"device_type": "meta"}, "folded"),
        ({"device_type": "cpu", "num_tokens": 96}, "folded"),
        ({"device_type": "cpu", "num_tokens": 97}, "sdpa"),
        ({"device_type": "cpu", "num_tokens": 97, "attn_dim": 64}, "folded"),
    ],
)
def test_choice_of_an_injector(change, impl):
    options = PAPER | {"attn_dim": 32} | change
    assert resolve_injector_impl(**options).impl == impl
    for asked in ("reference", "sdpa", "folded"):
        assert resolve_injector_impl(asked, **options) == (asked, "asked for")


def test_unknown_choices():
    for resolve, more in ((resolve_injection_impl, {}), (resolve_injector_impl, {"attn_dim": 32})):
        with pytest.raises(InputError) as caught:
            resolve("flash", **PAPER, **more)
        assert_message(caught.value, "impl must be one of", "'flash'")


def test_fused_raises_where_it_cannot_run():
    args = draw((2, 4, 2, 2, 3))
    with pytest.raises(InputError, match=r"inject_tokens: impl must .* 'cuda'.*; got 'fused'"):
        inject_tokens(*args, impl="fused")
    with pytest.raises(InputError, match=r"Injector: impl must .* 'cuda'.*; got 'fused'"):
        injector(impl="fused")(args[0], torch.zeros(2, 2, 3).double())
