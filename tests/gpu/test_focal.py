"""The fused focal loss on a GPU: paper sizes, memory, graphs, and no hidden wait."""

from __future__ import annotations

import pytest
import torch

from dpsims.losses.focal import PixelFocalLoss, pixel_focal_loss
from dpsims.ops.focal import resolve_focal_impl

pytestmark = pytest.mark.gpu

# ADE-20K, COCO-Stuff and Cityscapes, with the fake class
PAPER = {"ade": (2, 152, 256, 256), "coco": (2, 183, 256, 256), "city": (1, 36, 256, 512)}


def problem(sizes, dtype=torch.float32, memory_format=torch.contiguous_format):
    batch, channels, height, width = sizes
    logits = 5 * torch.randn(sizes, device="cuda")
    labels = torch.randint(channels - 1, (batch, height, width), device="cuda")
    labels[torch.rand(labels.shape, device="cuda") < 0.1] = 255
    weights = torch.rand(channels, device="cuda") + 0.5
    return logits.to(dtype).to(memory_format=memory_format), labels, weights


def value_and_grad(logits, labels, weights, **options):
    leaf = logits.detach().requires_grad_()
    loss = pixel_focal_loss(leaf, labels, class_weights=weights, **options)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", PAPER.values(), ids=PAPER)
def test_paper_sizes(sizes, dtype, memory_format, smoothing):
    logits, labels, weights = problem(sizes, dtype, memory_format)
    assert resolve_focal_impl(device="cuda", dtype=dtype, num_channels=sizes[1]).impl == "fused"
    options = {"label_smoothing": smoothing, "reduction": "sum"}
    loss, grad = value_and_grad(logits, labels, weights, **options)
    exact = value_and_grad(logits.double(), labels, weights, **options)
    assert grad.stride() == logits.stride()
    torch.testing.assert_close(loss.double(), exact[0], rtol=1e-5, atol=0)
    # float32 arithmetic on values up to 10, then one rounding
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(grad.double(), exact[1], rtol=eps + 4e-6, atol=4e-5)


@pytest.mark.parametrize("inplace", [False, True])
def test_extra_memory(inplace):
    logits, labels, weights = problem(PAPER["ade"], torch.bfloat16)
    leaf = logits.requires_grad_()
    for _ in range(2):
        hidden = leaf.view_as(leaf) if not inplace else leaf * 1
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = pixel_focal_loss(hidden, labels, class_weights=weights, inplace=inplace)
        extra = torch.cuda.max_memory_allocated() - before
        loss.backward()
        leaf.grad = None
    # the sums of the programs are the only other map
    assert extra <= (0.02 if inplace else 1.05) * logits.nbytes


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_a_captured_step_replays_and_nothing_waits(factor, inplace):
    logits, labels, weights = problem((2, 35, 64, 64), torch.bfloat16)
    leaf = logits.requires_grad_()

    def step():
        loss = pixel_focal_loss(leaf * 1, labels, class_weights=weights, inplace=inplace)
        return loss, torch.autograd.grad(factor * loss, leaf)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaf.copy_(leaf.flip(2))
    graph.replay()
    for replayed, expected in zip(captured, step(), strict=True):
        torch.testing.assert_close(replayed, expected, rtol=0, atol=0)


def test_runs_are_bit_equal():
    logits, labels, weights = problem(PAPER["city"])
    first, second = (value_and_grad(logits, labels, weights) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_a_label_out_of_range_is_nan_and_reads_nothing_else():
    logits, labels, weights = problem((2, 5, 8, 8))
    labels[0, 0, 0], labels[1, 2, 3] = 2**40, -7
    loss = pixel_focal_loss(logits, labels, class_weights=weights, reduction="none")
    bad = torch.zeros_like(labels, dtype=torch.bool)
    bad[0, 0, 0] = bad[1, 2, 3] = True
    assert torch.equal(loss.isnan(), bad)


def test_logits_beyond_32_bits():
    logits = torch.zeros(1, 1025, 1500, 1500, device="cuda", dtype=torch.bfloat16)
    logits[0, 7] = 1
    labels = torch.full((1, 1500, 1500), 7, device="cuda", dtype=torch.uint8)
    whole = value_and_grad(logits, labels, None, reduction="sum")
    part = value_and_grad(logits[:, :, :1, :1], labels[:, :1, :1], None, reduction="sum")
    torch.testing.assert_close(whole[0], part[0] * labels.numel(), rtol=1e-5, atol=0)
    assert torch.equal(whole[1][:, :, -1:, -1:], part[1])


@pytest.mark.compile
def test_compiled_step():
    logits, labels, _ = problem((2, 20, 32, 32), torch.bfloat16)
    labels = torch.where(labels == 19, 0, labels)
    loss = PixelFocalLoss(19, label_smoothing=0.1)

    def step(leaf):
        return loss.discriminator(leaf * 1, leaf * 2, labels)

    leaf = logits.requires_grad_()
    for function in (step, torch.compile(step, fullgraph=True)):
        value = function(leaf)
        (grad,) = torch.autograd.grad(value, leaf)
        if function is step:
            expected = value.detach(), grad
    torch.testing.assert_close(value.detach(), expected[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(grad, expected[1], rtol=2e-2, atol=1e-7)
