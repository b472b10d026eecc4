"""The injection's kernels on a CUDA device."""

from __future__ import annotations

import pytest
import torch
from injection_cases import bounds, draw, exact, layouts
from support import assert_equal
from torch.nn.attention import SDPBackend, sdpa_kernel

from dpsims.nn import CrossAttentionNoiseInjector, SelfAttention2d
from dpsims.ops.attention import _library, inject_tokens, resolve_injector_impl
from dpsims.ops.attention.injection import has_triton_for

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# batch, channels, height, width, tokens
SIZES = (
    (2, 1, 1, 1, 1),
    (2, 3, 7, 5, 3),
    (3, 64, 64, 64, 8),
    (2, 64, 16, 16, 1),
    (2, 64, 5, 7, 32),
    (2, 100, 7, 5, 8),
    (64, 64, 8, 8, 8),
)


def on_cuda(size, dtype, layout="contiguous"):
    """A gradient and the arguments of the injection, as leaves."""
    features, *tokens = draw(size, dtype=dtype)
    features = layouts(features.cuda())[layout]
    grad = draw(size, seed=1, dtype=dtype)[0].cuda()
    return grad, [x.requires_grad_() for x in (features, *(x.float().cuda() for x in tokens))]


@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "transposed", "gaps"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_fused_equals_the_equation(size, dtype, layout):
    grad, args = on_cuda(size, dtype, layout)
    out = inject_tokens(*args, impl="fused")
    keys, biases, values = torch.autograd.grad(out, args, grad)[1:]
    packed = torch.cat([keys, values, biases.unsqueeze(2)], 2)
    got = out, torch.autograd.grad(inject_tokens(*args, impl="fused"), args[0], grad)[0], packed
    plain = [x.detach() for x in args]
    for value, wanted, bound in zip(got, exact(grad, *plain), bounds(grad, *plain), strict=True):
        assert ((value.double() - wanted).abs() <= bound).all()
    if layout == "channels-last":
        assert out.is_contiguous(memory_format=torch.channels_last)


def test_gradients_are_the_same_bits_each_time():
    grad, args = on_cuda(SIZES[2], torch.bfloat16)
    first, second = (
        torch.autograd.grad(inject_tokens(*args, impl="fused"), args, grad) for _ in range(2)
    )
    for one, other in zip(first, second, strict=True):
        assert_equal(one, other)


def test_second_order_gradients():
    args = [x.detach().requires_grad_() for x in on_cuda((2, 3, 2, 3, 3), torch.float32)[1]]
    results = []
    for impl in ("reference", "fused"):
        out = inject_tokens(*args, impl=impl)
        first = torch.autograd.grad(out.square().sum(), args, create_graph=True)
        total = sum(x.square().sum() for x in first)
        results.append(torch.autograd.grad(total, args))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_operator_keeps_its_contract():
    _, args = on_cuda((2, 16, 4, 6, 3), torch.float32)
    torch.library.opcheck(_library.inject, args, rtol=1e-3, atol=1e-3)


def make(dtype=torch.bfloat16):
    torch.manual_seed(0)
    module = CrossAttentionNoiseInjector(64, 256).cuda().to(dtype)
    torch.nn.init.constant_(module.gate, 0.5)
    return module, [torch.randn(s).cuda().to(dtype) for s in ((4, 64, 32, 32), (4, 8, 256))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_auto_is_fused_and_a_closed_gate_is_the_identity(dtype):
    module, args = make(dtype)
    options = {"device_type": "cuda", "dtype": dtype, "has_triton": has_triton_for("cuda")}
    assert resolve_injector_impl(channels=64, attn_dim=32, num_tokens=8, **options).impl == "fused"
    out = module(*args)
    module.impl = "reference"
    # each pixel's logits differ by the roundings of its projections to the dtype
    scale = 16 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-2
    torch.testing.assert_close(out, module(*args), rtol=scale, atol=scale)
    module.impl = "auto"
    torch.nn.init.zeros_(module.gate)
    assert_equal(module(*args), args[0])


def test_no_wait_and_cuda_graph():
    module, args = make()
    with torch.no_grad():
        wanted = module(*args)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            module(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = module(*args)
        args[0].mul_(2)
        graph.replay()
        assert_equal(out, module(*args))
    assert not torch.equal(out, wanted)


@pytest.mark.compile
def test_compiled_equals_eager():
    module, args = make()
    compiled = torch.compile(module, fullgraph=True)
    torch.testing.assert_close(compiled(*args), module(*args))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_self_attention_takes_the_flash_kernel(dtype, layout):
    torch.manual_seed(0)
    module = SelfAttention2d(64).cuda().to(dtype)
    features = torch.randn(2, 64, 32, 32).cuda().to(dtype).to(memory_format=layout)
    features.requires_grad_()
    # raises where no other kernel could run
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        module(features).sum().backward()
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        module.float()(features.detach().float()).sum().backward()
    assert features.grad is not None
    assert bool(features.grad.isfinite().all())
