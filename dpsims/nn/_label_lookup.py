"""Sums of table rows picked by the ids under a kernel: the work behind ``LabelConv2d``."""

from __future__ import annotations

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F


def label_table(weight: Tensor, bias: Tensor | None) -> Tensor:
    """The kernel ``(C, K, kh, kw)`` as rows ``(taps, K + 2, C)`` for :func:`sum_of_taps`.

    Row ``K`` contributes nothing and row ``K + 1`` is NaN.
    """
    table = rearrange(autocast_like_conv(weight), "C K kh kw -> (kh kw) K C")
    nothing = torch.zeros_like(table[:, :1])
    table = torch.cat([table, nothing, torch.full_like(nothing, math.nan)], dim=1)
    if bias is None:
        return table
    # every output pixel reads exactly one row of each tap: the first tap brings the bias
    first, others = table[:1] + bias.to(table.dtype), table[1:]
    return torch.cat([first, others])


def label_codes(
    labels: Tensor, num_classes: int, ignore_index: int | None, padding: int
) -> Tensor:
    """Rows of the table: the id, K for nothing (ignored, padding), K + 1 for out of range."""
    # compared as int64: 255 and -1 must not wrap around in uint8
    ids = labels.long()
    codes = torch.where((ids >= 0) & (ids < num_classes), ids, num_classes + 1)
    if ignore_index is not None:
        codes = torch.where(ids == ignore_index, num_classes, codes)
    # onnxruntime pads no int16
    dtype = torch.int64 if torch.compiler.is_exporting() else torch.int16
    return F.pad(codes.to(dtype), (padding,) * 4, value=num_classes)


def code_table(
    num_classes: int, ignore_index: int | None, device: torch.device
) -> tuple[Tensor, int, int]:
    """The codes of all ids from the one number to the other; beyond, codes are as at these two.

    Those of negative ids stand at the end, where negative indices find them.
    """
    ignored = 0 if ignore_index is None else ignore_index
    low, high = min(-1, ignored - 1), max(num_classes, ignored + 1)
    ids = torch.arange(low, high + 1, device=device).view(1, 1, -1)
    codes = label_codes(ids, num_classes, ignore_index, 0)
    return codes.flatten().roll(low).to(torch.int32), low, high


def autocast_like_conv(weight: Tensor) -> Tensor:
    """Cast as a convolution would cast its weight."""
    device = weight.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return weight
    return weight if weight.dtype == torch.float64 else weight.to(torch.get_autocast_dtype(device))


def sum_of_taps(codes: Tensor, table: Tensor, kernel_size: int, stride: int) -> Tensor:
    """Sum, at every output pixel, the rows that the codes under the kernel pick.

    ``codes`` is a padded map ``(B, Hp, Wp)``, ``table`` is ``(taps, rows, C)``; ``(B, H, W, C)``.
    """
    if codes.device.type == "cpu" and not torch.compiler.is_compiling():
        # torch's own backward is two to three times slower here
        return _TapSum.apply(codes, table, kernel_size, stride)
    if torch.compiler.is_exporting():
        return _plain_gather(codes, table, kernel_size, stride)
    if codes.device.type == "cpu" and table.dtype in (torch.float16, torch.bfloat16):
        # torch's backward adds up thousands of pixels in the table's dtype here
        return _gather(codes, table.float(), kernel_size, stride).to(table.dtype)
    return _gather(codes, table, kernel_size, stride)


def _taps(codes: Tensor, kernel_size: int, stride: int) -> list[Tensor]:
    """The map under each tap of the kernel, for all output pixels ``(B, H, W)``."""
    height, width = (size - kernel_size + 1 for size in codes.shape[1:])
    return [
        codes[:, i : i + height : stride, j : j + width : stride]
        for i in range(kernel_size)
        for j in range(kernel_size)
    ]


def _gather(codes: Tensor, table: Tensor, kernel_size: int, stride: int) -> Tensor:
    rows = table.shape[1]
    taps = _taps(codes, kernel_size, stride)
    # int32 halves the traffic; embedding_bag counts the entries of `picks` in this type too
    small = taps[0].numel() * len(taps) < 2**31
    dtype = torch.int32 if small else torch.int64
    starts = torch.arange(0, rows * len(taps), rows, dtype=dtype, device=codes.device)
    picks = torch.stack(taps, dim=-1).to(dtype) + starts
    summed = F.embedding_bag(picks.flatten(0, 2), table.flatten(0, 1), mode="sum")
    return summed.unflatten(0, taps[0].shape)


def _plain_gather(codes: Tensor, table: Tensor, kernel_size: int, stride: int) -> Tensor:
    """``_gather`` in operators that every exporter knows; ONNX has no ``embedding_bag``."""
    taps = _taps(codes, kernel_size, stride)
    hidden = F.embedding(taps[0].long(), table[0])
    for tap, rows in zip(taps[1:], table[1:], strict=True):
        hidden = hidden + F.embedding(tap.long(), rows)
    return hidden


def _scatter(codes: Tensor, grad: Tensor, rows: int, kernel_size: int, stride: int) -> Tensor:
    """Sum, for every row of every tap, the gradients of the pixels that picked it."""
    grad = _pixel_rows(grad)
    ends = torch.arange(rows, device=codes.device, dtype=codes.dtype)
    sums = []
    for tap in _taps(codes, kernel_size, stride):
        picks, pixels = tap.flatten().sort(stable=True)
        starts = torch.searchsorted(picks, ends)
        sums.append(F.embedding_bag(pixels, grad, starts, mode="sum"))
    return torch.stack(sums)


def _pixel_rows(maps: Tensor) -> Tensor:
    """``(B, H, W, C)`` as contiguous rows ``(B H W, C)``, which ``embedding_bag`` wants."""
    if maps.is_contiguous():
        return maps.flatten(0, 2)
    rows = torch.empty_like(maps, memory_format=torch.contiguous_format)
    # torch transposes matrices about twice as fast as it permutes a 4-D tensor
    for image_rows, image in zip(rows, maps, strict=True):
        image_rows.flatten(0, 1).copy_(image.flatten(0, 1))
    return rows.flatten(0, 2)


class _TapSum(torch.autograd.Function):
    """``_gather``, whose backward sorts the pixels by id and sums runs: linear in the table."""

    @staticmethod
    def forward(codes: Tensor, table: Tensor, kernel_size: int, stride: int) -> Tensor:
        return _gather(codes, table, kernel_size, stride)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        codes, table, ctx.kernel_size, ctx.stride = inputs
        ctx.rows = table.shape[1]
        ctx.save_for_backward(codes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (codes,) = ctx.saved_tensors
        args = codes, grads[0], ctx.rows, ctx.kernel_size, ctx.stride
        return None, _TapScatter.apply(*args), None, None


class _TapScatter(torch.autograd.Function):
    """The transpose of ``_TapSum``: linear in the gradient, and ``_TapSum`` is its backward."""

    @staticmethod
    def forward(codes: Tensor, grad: Tensor, rows: int, kernel_size: int, stride: int) -> Tensor:
        return _scatter(codes, grad, rows, kernel_size, stride)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        codes, _, _, ctx.kernel_size, ctx.stride = inputs
        ctx.save_for_backward(codes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (codes,) = ctx.saved_tensors
        return None, _TapSum.apply(codes, grads[0], ctx.kernel_size, ctx.stride), None, None, None
