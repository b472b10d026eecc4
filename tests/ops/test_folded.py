"""The operators of folded weights: which one runs, and what it computes."""

import pytest
import torch
from folded_parts import take_fused
from injection_cases import draw, layouts
from support import assert_equal
from torch.nn import functional as F

from dpsims.ops.attention import _library as injection
from dpsims.ops.attention.folded import inject_folded
from dpsims.ops.spade_tail import _library as tail
from dpsims.ops.spade_tail.folded import is_fused, modulate_folded

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def injected(features, keys, biases, values, scale, gelu):
    """In float64, pixel by pixel."""
    pixels = features.double().flatten(2).mT
    weights = (pixels @ keys.double().mT + biases.double()[:, None]).softmax(2)
    base = pixels if scale is None else pixels * scale.double()
    out = (base + weights @ values.double()).mT.unflatten(2, features.shape[2:])
    return F.gelu(out) if gelu else out


@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "transposed", "gaps"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("scaled", "gelu"), [(True, True), (True, False), (False, True)])
def test_the_injection_kernel(layout, dtype, scaled, gelu):
    pytest.importorskip("triton")
    from dpsims.ops.attention import _triton

    features, keys, biases, values = draw((2, 12, 3, 7, 5))
    features = layouts(features.to(dtype))[layout]
    # as they come: views of one product, in the dtype of the map
    packed = torch.cat([keys, biases.unsqueeze(2), values], 2).to(dtype)
    keys, biases, values = packed.split([12, 1, 12], 2)
    scale = torch.rand(12).to(dtype) + 0.5 if scaled else None
    args = features, keys, biases.squeeze(2), values, scale, gelu
    expected = injected(*args)
    # bfloat16 rounds the weights, the values and the result; the others the result alone
    bound = {torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 4e-3}[dtype]
    for operator in (_triton.inject, injection.inject_folded):
        found = operator(*args)
        assert found.dtype == dtype
        assert found.stride() == torch.empty_like(features).stride()
        assert (found.double() - expected).abs().max() < bound


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_gelu_is_exact_far_out():
    pytest.importorskip("triton")
    from dpsims.ops.attention import _triton

    features = torch.tensor([-30.0, -5.0, -1e-3, 0.0, 1e-3, 5.0, 30.0, torch.inf, torch.nan])
    features = features.view(1, 1, 3, 3)
    zeros = torch.zeros(1, 1, 1)
    found = _triton.inject(features, zeros, zeros[0], zeros, None, True)
    # an infinite feature meets a key of 0: no logit
    expected = F.gelu(features)
    expected[0, 0, 2, 1] = torch.nan
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fused_and_plain_agree(monkeypatch, layout, dtype):
    features, *tokens = draw((2, 6, 4, 5, 3), dtype=dtype)
    features = features.to(memory_format=layout)
    modulation = torch.randn(2, 12, 4, 5, dtype=dtype).to(memory_format=layout)
    scale = torch.rand(6, dtype=dtype)

    def run():
        return (
            inject_folded(features, *tokens, scale, gelu=True),
            inject_folded(features, *tokens),
            modulate_folded(features, modulation, slope=0.2),
            modulate_folded(features, modulation[:, :6]),
        )

    plain = run()
    calls = take_fused(monkeypatch)
    for one, other in zip(run(), plain, strict=True):
        torch.testing.assert_close(one, other)
    assert calls == ["inject_folded", "inject_folded", "modulate", "modulate"]


def test_what_needs_a_gradient_goes_the_plain_way(monkeypatch):
    calls = take_fused(monkeypatch)
    features, *tokens = draw((1, 4, 2, 3, 2))
    modulation = torch.randn(1, 8, 2, 3).double()
    leaf = features.clone().requires_grad_()
    assert not is_fused(leaf)
    modulate_folded(leaf, modulation, slope=0.2).sum().backward()
    inject_folded(leaf, *tokens, gelu=True).sum().backward()
    assert leaf.grad.abs().sum() > 0
    assert calls == []
    with torch.no_grad():
        assert is_fused(leaf)
        modulate_folded(leaf, modulation)
        inject_folded(leaf, *tokens)
    assert calls == ["modulate", "inject_folded"]


def test_on_a_cpu_nothing_is_fused():
    features, *tokens = draw((1, 4, 2, 3, 2), dtype=torch.float32)
    modulation = torch.randn(1, 8, 2, 3)
    assert not is_fused(features, modulation)
    before = features.clone(), modulation.clone()
    modulate_folded(features, modulation, slope=0.2)
    inject_folded(features, *tokens, gelu=True)
    assert_equal(features, before[0])
    assert_equal(modulation, before[1])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_opcheck(layout):
    features, *tokens = draw((2, 6, 4, 5, 3), dtype=torch.float32)
    features = features.to(memory_format=layout)
    fine = torch.randn(2, 12, 8, 10).to(memory_format=layout)
    # they have no gradient
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for args in ((features, *tokens, torch.rand(6), True), (features, *tokens, None, False)):
        torch.library.opcheck(injection.inject_folded, args, test_utils=tests)
    torch.library.opcheck(tail.modulate, (features, fine, 0.2, 2), test_utils=tests)
    torch.library.opcheck(tail.modulate, (features, fine[:, :6], 1.0, 2), test_utils=tests)
