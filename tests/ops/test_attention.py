"""Attention: the equation, its symmetries, and that the implementations agree."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, strategies as st
from support import assert_close64, assert_equal, assert_message

from dpsims.errors import DTypeError, InputError
from dpsims.ops.attention import attention, resolve_attention_impl

IMPLS = ("reference", "sdpa")
SIZES = st.tuples(*(st.integers(1, n) for n in (3, 9, 6, 8)))


def qkv(sizes, seed, dtype=torch.float64):
    batch, pixels, tokens, dim = sizes
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, pixels, dim), (batch, tokens, dim), (batch, tokens, dim)
    return [torch.randn(s, generator=generator, dtype=dtype) for s in shapes]


def oracle(q, k, v):
    """One pixel at a time, in Python floats."""
    out = torch.empty_like(q)
    for b in range(q.shape[0]):
        for n in range(q.shape[1]):
            logits = [float(q[b, n] @ key) / math.sqrt(q.shape[2]) for key in k[b]]
            weights = [math.exp(x - max(logits)) for x in logits]
            mean = sum(w * value for w, value in zip(weights, v[b], strict=True))
            out[b, n] = mean / sum(weights)
    return out


@pytest.mark.parametrize("impl", IMPLS)
@given(sizes=SIZES, seed=st.integers(0, 99))
def test_equals_the_equation_computed_pixel_by_pixel(impl, sizes, seed):
    q, k, v = qkv(sizes, seed)
    assert_close64(attention(q, k, v, impl=impl), oracle(q, k, v))


@pytest.mark.parametrize("impl", IMPLS)
@given(sizes=SIZES, seed=st.integers(0, 99))
def test_order_and_repetition_of_tokens_do_not_matter(impl, sizes, seed):
    q, k, v = qkv(sizes, seed)
    order = torch.randperm(sizes[2], generator=torch.Generator().manual_seed(seed)).repeat(3)
    assert_close64(
        attention(q, k[:, order], v[:, order], impl=impl), attention(q, k, v, impl=impl)
    )


@pytest.mark.parametrize("impl", IMPLS)
@given(sizes=SIZES, seed=st.integers(0, 99))
def test_pixels_and_samples_are_independent(impl, sizes, seed):
    q, k, v = qkv(sizes, seed)
    whole = attention(q, k, v, impl=impl)
    order = torch.randperm(sizes[1], generator=torch.Generator().manual_seed(seed))
    assert_close64(attention(q[:, order], k, v, impl=impl), whole[:, order])
    for b in range(sizes[0]):
        one = slice(b, b + 1)
        assert_close64(attention(q[one], k[one], v[one], impl=impl), whole[one])


@pytest.mark.parametrize("impl", IMPLS)
@given(sizes=SIZES, seed=st.integers(0, 99), scale=st.sampled_from([0.1, 1.0, 100.0]))
def test_reads_lie_between_the_smallest_and_the_largest_value(impl, sizes, seed, scale):
    q, k, v = qkv(sizes, seed)
    out = attention(q * scale, k, v, impl=impl)
    low, high = v.amin(1, keepdim=True), v.amax(1, keepdim=True)
    assert ((out >= low - 1e-12) & (out <= high + 1e-12)).all()


@pytest.mark.parametrize("impl", IMPLS)
@given(sizes=SIZES, seed=st.integers(0, 99))
def test_limits_of_the_logits(impl, sizes, seed):
    q, k, v = qkv(sizes, seed)
    mean = v.mean(1, keepdim=True).expand_as(q)
    assert_close64(attention(0 * q, k, v, impl=impl), mean)
    # a shift of all keys moves all logits of a pixel alike
    assert_close64(attention(q, k + 1, v, impl=impl), attention(q, k, v, impl=impl), scale=10)
    best = (q @ k.mT).argmax(2)
    picked = torch.gather(v, 1, best.unsqueeze(2).expand(-1, -1, sizes[3]))
    assert_close64(attention(q * 1e9, k, v, impl=impl), picked)


@pytest.mark.parametrize("impl", IMPLS)
def test_heads_are_separate(impl):
    q, k, v = qkv((6, 5, 4, 3), 0)
    with_heads = attention(*(x.unflatten(0, (2, 3)) for x in (q, k, v)), impl=impl)
    assert_close64(with_heads, attention(q, k, v, impl=impl).unflatten(0, (2, 3)))


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_inputs_give_the_same_result(impl):
    q, k, v = qkv((2, 6, 4, 8), 0)
    strided = [x.mT.contiguous().mT for x in (q, k, v)]
    assert not strided[0].is_contiguous()
    assert_close64(attention(*strided, impl=impl), attention(q, k, v, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients(impl):
    args = [x.requires_grad_() for x in qkv((2, 3, 4, 2), 0)]
    assert torch.autograd.gradcheck(lambda *a: attention(*a, impl=impl), args, fast_mode=False)


def test_reference_has_second_order_gradients():
    args = [x.requires_grad_() for x in qkv((1, 2, 3, 2), 0)]
    assert torch.autograd.gradgradcheck(lambda *a: attention(*a, impl="reference"), args)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_queries_stay_finite(impl, dtype, autocast):
    q, k = torch.full((1, 2, 64), 300.0, dtype=dtype), torch.full((1, 3, 64), 300.0, dtype=dtype)
    v = torch.randn(1, 3, 64).to(dtype)
    # logits are 720000, beyond float16
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        out = attention(q, k, v, impl=impl)
    assert out.dtype == dtype
    # equal logits: the plain mean, rounded once
    error = (out.double() - v.double().mean(1, keepdim=True)).abs().max()
    assert error <= torch.finfo(dtype).eps * v.double().abs().max()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_close_to_float64(impl, dtype):
    q, k, v = qkv((2, 16, 8, 16), 0, dtype)
    out = attention(q, k, v, impl=impl)
    assert out.dtype == dtype
    error = (out.double() - oracle(q.double(), k.double(), v.double())).abs().max()
    # sdpa rounds the weights, which are at most 1, to v's dtype before they meet values below 4
    assert error <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_reaches_the_pixels_that_read_it_and_no_others(impl):
    q, k, v = qkv((2, 3, 4, 2), 0)
    q[0, 1, 0] = math.nan
    bad = attention(q, k, v, impl=impl).isnan().any(2)
    assert bad.tolist() == [[False, True, False], [False] * 3]


@pytest.mark.parametrize("impl", IMPLS)
def test_empty_batch_and_meta_tensors(impl):
    assert attention(*qkv((0, 3, 4, 2), 0), impl=impl).shape == (0, 3, 2)
    meta = [x.to("meta") for x in qkv((2, 3, 4, 2), 0)]
    assert attention(*meta, impl=impl).shape == (2, 3, 2)


@pytest.mark.parametrize("impl", IMPLS)
def test_inputs_are_not_touched(impl):
    args = qkv((2, 3, 4, 2), 0)
    before = [x.clone() for x in args]
    attention(*args, impl=impl)
    for x, old in zip(args, before, strict=True):
        assert_equal(x, old)
        assert x._version == 0


def bad(index, change):
    args = qkv((2, 3, 4, 5), 0)
    args[index] = change(args[index])
    return args


@pytest.mark.parametrize(
    ("args", "error", "parts"),
    [
        pytest.param(
            bad(0, lambda x: x[0]), InputError, ["q", "(B, N, d)", "(3, 5)"], id="rank-q"
        ),
        pytest.param(bad(1, lambda x: x[0]), InputError, ["k", "(B=2, T, d=5)"], id="rank-k"),
        pytest.param(bad(1, lambda x: x[:1]), InputError, ["k", "B=2", "(1, 4, 5)"], id="batch"),
        pytest.param(bad(1, lambda x: x[..., :4]), InputError, ["k", "d=5"], id="width"),
        pytest.param(bad(2, lambda x: x[:, :3]), InputError, ["v", "T=4"], id="tokens-differ"),
        pytest.param(bad(1, lambda x: x[:, :0]), InputError, ["k", "empty"], id="no-token"),
        pytest.param(bad(1, lambda x: x.long()), DTypeError, ["k", "int64"], id="integer"),
        pytest.param(bad(2, lambda x: x.float()), DTypeError, ["v", "float32"], id="mixed-dtype"),
        pytest.param(bad(1, lambda x: x.to("meta")), InputError, ["k", "meta"], id="device"),
        pytest.param(bad(0, lambda x: [1]), DTypeError, ["q", "list"], id="not-a-tensor"),
    ],
)
def test_bad_inputs(args, error, parts):
    with pytest.raises(error) as caught:
        attention(*args)
    assert_message(caught.value, "attention: ", "must", *parts)


def test_heads_must_match():
    q, k, v = (x.unflatten(0, (2, 3)) for x in qkv((6, 5, 4, 3), 0))
    with pytest.raises(InputError) as caught:
        attention(q, k[:, :2], v)
    assert_message(caught.value, "k must have shape (B=2, heads=3, T, d=3)")


def test_choice_of_implementation():
    assert resolve_attention_impl("auto").impl in IMPLS
    for impl in IMPLS:
        assert resolve_attention_impl(impl) == (impl, "asked for")
    for impl, part in (("fused", "no fused kernel"), ("flash", "one of")):
        with pytest.raises(InputError) as caught:
            resolve_attention_impl(impl)
        assert_message(caught.value, "attention: impl must", part, repr(impl))


@pytest.mark.compile
@pytest.mark.parametrize("impl", IMPLS)
def test_compiled_equals_eager(impl):
    args = qkv((2, 3, 4, 5), 0)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(*args, impl=impl), attention(*args, impl=impl))
