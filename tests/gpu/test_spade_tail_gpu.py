"""The fused SPADE tail on a CUDA device: paper sizes, no waiting, graphs and compilation."""

from __future__ import annotations

import pytest
import torch
from spade_tail_parts import EPS, make_case, oracle

from dpsims.nn.spade_block import SPADEResBlock
from dpsims.ops.spade_tail.api import ChannelStatistics, channel_moments, spade_tail

pytestmark = pytest.mark.gpu

FORMATS = (torch.contiguous_format, torch.channels_last)
# channels and sides of the blocks at 256x256
PAPER = [(1024, 8), (1024, 16), (512, 32), (256, 64), (128, 128), (64, 256)]


def on_device(case, memory_format=torch.contiguous_format):
    return case._make(v.to("cuda", memory_format=memory_format) for v in case)


def run(case, slope=0.2, upsample=1, impl="fused"):
    leaves = [value.detach().requires_grad_() for value in case[:2]]
    count = leaves[0].numel() // leaves[0].shape[1]
    found = ChannelStatistics(*channel_moments(leaves[0], impl=impl), EPS, count)
    out = spade_tail(*leaves, found, slope=slope, upsample=upsample, impl=impl)
    return out, *torch.autograd.grad(out, leaves, case.grad)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("channels", "side"), PAPER)
@pytest.mark.parametrize("upsample", [1, 2])
def test_paper_sizes(channels, side, dtype, memory_format, upsample):
    size = (2, channels, side // upsample, side // upsample)
    case = make_case(size, upsample=upsample, dtype=dtype)
    answer = oracle(case, mode="batch", slope=0.2, upsample=upsample)
    out, to_features, to_modulation = run(on_device(case, memory_format), upsample=upsample)
    assert out.is_contiguous(memory_format=memory_format)
    # values near the kink may fall on its other side: their gradients differ by design
    sure = answer.margin > 1e-3
    both = torch.cat((sure, sure), 1)
    error = torch.finfo(dtype).eps
    for found, expected, keep in (
        (out, answer.out, torch.ones_like(sure)),
        (to_modulation, answer.to_modulation, both),
    ):
        gap = (found.double().cpu() - expected)[keep].abs()
        # one rounding to the dtype, and 100 to float32 at values below 30
        assert bool((gap <= error * expected[keep].abs() + 100 * 2**-24 * 30).all())
    # a flipped sign moves one feature's gradient: their share is tiny
    gap = (to_features.double().cpu() - answer.to_features).abs()
    bound = error * answer.to_features.abs() + 100 * 2**-24 * 30 * upsample**2
    assert (gap > bound).double().mean() < 1e-3


def test_no_waiting_and_graphs():
    case = on_device(make_case((4, 64, 32, 32), dtype=torch.bfloat16), torch.channels_last)
    expected = run(case)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(case)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(case)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = run(case)
    graph.replay()
    torch.cuda.synchronize()
    for one, other in zip(replayed, expected, strict=True):
        # no sum depends on the order in which programs run
        assert torch.equal(one, other)


@pytest.mark.compile
def test_blocks_take_the_kernels_and_compile_whole():
    torch.manual_seed(0)
    block = SPADEResBlock(32, 16, 8, hidden_channels=16).cuda()
    x, cond = torch.randn(2, 32, 16, 16).cuda(), torch.randn(2, 8, 16, 16).cuda()
    expected = block(x, cond)
    whole = torch.compile(block, fullgraph=True)
    torch.testing.assert_close(whole(x, cond), expected, rtol=1e-3, atol=1e-3)
    wide = block.double()(x.double(), cond.double())
    torch.testing.assert_close(expected.double(), wide, rtol=1e-2, atol=1e-2)


def test_peak_memory_of_a_step():
    case = on_device(make_case((8, 64, 128, 128)))
    one = case.features.numel() * 4
    run(case)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(case)
    peak = torch.cuda.max_memory_allocated() - before
    # output, bits, and the gradients of features and modulation
    assert peak < 4.3 * one
