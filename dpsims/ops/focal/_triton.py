"""The focal loss and its gradient in Triton: one read and one write of the logits.

A program owns a block of pixels and holds all of their channels: a head of the largest power of
two of them, and a tail for the rest. Nothing is ever read twice, whatever the memory format.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpsims.ops._launch import ceil_div, is_flat, map_strides, on, power_of_two, reach
from dpsims.ops.focal._targets import FocalSpec, divisor

# numbers that a program holds: with 8 warps at most 48 registers of every thread
_TILE = 12288
_SMALL_TILE = 4096
_MAX_PIXELS = 1024
_INT32 = 2**31
_GENERAL = -1


@triton.jit
def _log1p(x):
    # near 1 the log of a GPU has no digits left
    series = x * (1.0 - x * (0.5 - x * (0.33333333 - x * 0.25)))
    return tl.where(x < 0.03125, series, tl.log(1.0 + x))


@triton.jit
def _power(rest, gamma, GAMMA: tl.constexpr):
    if GAMMA == 0:
        power = tl.where(rest == rest, 1.0, rest)
    elif GAMMA == 1:
        power = rest
    elif GAMMA == 2:
        power = rest * rest
    else:
        safe = tl.where(rest > 0, rest, 1.0)
        power = tl.where(rest > 0, tl.exp2(gamma * tl.log2(safe)), 0.0)
    return power


@triton.jit
def _slope(log_p, p, rest, gamma, GAMMA: tl.constexpr):
    # the focal term's derivative by log_p; p * log_p is 0 far below, where log_p may be -inf
    low = tl.where(log_p < -1000.0, -1000.0, log_p)
    if GAMMA == 0:
        slope = tl.where(low == low, -1.0, low)
    elif GAMMA == 1:
        slope = p * low - rest
    elif GAMMA == 2:
        slope = (2.0 * p * low - rest) * rest
    else:
        # at rest = 0 the quotient's limit is -1
        quotient = tl.where(rest > 0, low / tl.where(rest > 0, rest, 1.0), -1.0)
        slope = _power(rest, gamma, GAMMA) * (gamma * p * quotient - 1.0)
    return slope


@triton.jit
def _sharp(head, tail, at, at_tail, ids, factor, gamma, GAMMA: tl.constexpr, TAIL: tl.constexpr):
    """Loss and gradients of pixels with one target each, which the gradients end on."""
    mine = at[:, None] == ids[None, :]
    mine_tail = at_tail[:, None] == ids[None, :]
    peak = tl.max(head, 0)
    own = tl.sum(tl.where(mine, head, 0.0), 0)
    if TAIL:
        peak = tl.maximum(peak, tl.max(tail, 0))
        own += tl.sum(tl.where(mine_tail, tail, 0.0), 0)
    head = tl.exp(head - peak[None, :])
    # without the target's own term the sum gives 1 - p with all its digits
    others = tl.sum(tl.where(mine, 0.0, head), 0)
    if TAIL:
        tail = tl.exp(tail - peak[None, :])
        others += tl.sum(tl.where(mine_tail, 0.0, tail), 0)
    gap = own - peak
    mass = tl.exp(gap)
    total = others + mass
    log_p = gap - tl.where(gap == 0, _log1p(others), tl.log(total))
    rest = others / total
    slope = _slope(log_p, mass / total, rest, gamma, GAMMA) * factor
    share = -slope / total
    head = tl.where(mine, (slope * rest)[None, :], head * share[None, :])
    if TAIL:
        tail = tl.where(mine_tail, (slope * rest)[None, :], tail * share[None, :])
    return -log_p * _power(rest, gamma, GAMMA), head, tail


@triton.jit
def _smooth_part(p, gap, log_total, real, mine, sharp, spread, gamma, GAMMA: tl.constexpr):
    """Of some channels: their share of the loss, and their slopes times their target."""
    log_p = gap - log_total[None, :]
    # with a share of every channel in the target, the digits that 1 - p loses do not count
    rest = 1.0 - p
    target = tl.where(mine, sharp + spread, spread)
    value = tl.where(real, -log_p * _power(rest, gamma, GAMMA) * target, 0.0)
    slope = tl.where(real, _slope(log_p, p, rest, gamma, GAMMA) * target, 0.0)
    return tl.sum(value, 0), slope


@triton.jit
def _smooth(
    head, tail, at, at_tail, ids, factor, smoothing, gamma,
    CHANNELS: tl.constexpr, GAMMA: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """:func:`_sharp` for targets with a share of every channel."""
    sharp = 1.0 - smoothing
    spread = smoothing / CHANNELS
    peak = tl.max(head, 0)
    if TAIL:
        peak = tl.maximum(peak, tl.max(tail, 0))
    head -= peak[None, :]
    p = tl.exp(head)
    total = tl.sum(p, 0)
    if TAIL:
        tail -= peak[None, :]
        p_tail = tl.exp(tail)
        total += tl.sum(p_tail, 0)
    log_total = tl.log(total)
    p = p / total[None, :]
    value, head = _smooth_part(
        p, head, log_total, (at < CHANNELS)[:, None], at[:, None] == ids[None, :],
        sharp, spread, gamma, GAMMA,
    )  # fmt: skip
    pull = tl.sum(head, 0)
    if TAIL:
        p_tail = p_tail / total[None, :]
        value_tail, tail = _smooth_part(
            p_tail, tail, log_total, (at_tail < CHANNELS)[:, None],
            at_tail[:, None] == ids[None, :], sharp, spread, gamma, GAMMA,
        )  # fmt: skip
        value += value_tail
        pull += tl.sum(tail, 0)
        tail = (tail - p_tail * pull[None, :]) * factor[None, :]
    # the chain rule of softmax: every channel's slope, less p times the sum of all slopes
    head = (head - p * pull[None, :]) * factor[None, :]
    return value, head, tail


@triton.jit
def _pixel_targets(
    labels, class_weights, inside, ignore_index, num_classes, target,
    HAS_IGNORE: tl.constexpr, HAS_TARGET: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Ids that are safe to compare with, and weights: 0 where ignored, NaN where out of range."""
    weight = tl.where(inside, 1.0, 0.0)
    if HAS_TARGET:
        ids = tl.where(inside, target, target)
        if HAS_IGNORE:
            label = tl.load(labels, mask=inside, other=0).to(tl.int64)
            weight = tl.where(label == ignore_index, 0.0, weight)
    else:
        label = tl.load(labels, mask=inside, other=0).to(tl.int64)
        good = (label >= 0) & (label < num_classes)
        ids = tl.where(good, label, 0).to(tl.int32)
        if HAS_WEIGHTS:
            weight = tl.load(class_weights + ids, mask=inside, other=0).to(tl.float32)
        weight = tl.where(good, weight, float("nan"))
        if HAS_IGNORE:
            weight = tl.where(label == ignore_index, 0.0, weight)
    return ids, weight


@triton.jit
def _pixel_offsets(
    row, column, step_h, step_w, FLAT: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr
):  # fmt: skip
    """Where pixels lie, all at multiples of a number: Triton by itself sees only those of 16."""
    offset = column * step_w if FLAT and not WIDE else row * step_h + column * step_w
    # a hint is lost on what compilers simplify: not on a sum with a row of 0
    if ALIGN > 1:
        offset = tl.multiple_of(offset, ALIGN)
    return offset


@triton.jit(do_not_specialize=["ignore_index", "num_classes", "target"])
def _focal_kernel(
    logits, labels, class_weights, counted, upstream, grad, loss,
    logits_b, logits_c, logits_h, logits_w, labels_b, labels_h, labels_w,
    upstream_b, upstream_h, upstream_w, grad_b, grad_c, grad_h, grad_w,
    pixels, width, blocks,
    gamma, smoothing, scale, ignore_index, num_classes, target,
    GAMMA: tl.constexpr, SMOOTH: tl.constexpr, HAS_IGNORE: tl.constexpr,
    HAS_TARGET: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_COUNT: tl.constexpr,
    HAS_UPSTREAM: tl.constexpr, HAS_GRAD: tl.constexpr, LOSS: tl.constexpr,
    FLAT: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr, CHANNELS: tl.constexpr,
    HEAD: tl.constexpr, TAIL: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    image = (program // blocks).to(tl.int64)
    pixel = (program % blocks) * PIXELS + tl.arange(0, PIXELS)
    at = tl.arange(0, HEAD)
    at_tail = HEAD + tl.arange(0, TAIL if TAIL > 0 else 1)
    inside = pixel < pixels
    if WIDE:
        row = (pixel // width).to(tl.int64)
        column = (pixel % width).to(tl.int64)
        step, step_tail = at.to(tl.int64)[:, None], at_tail.to(tl.int64)[:, None]
    elif FLAT:
        # rows follow each other without a gap: no division keeps the loads wide
        row, column = 0, pixel
        step, step_tail = at[:, None], at_tail[:, None]
    else:
        row, column = pixel // width, pixel % width
        step, step_tail = at[:, None], at_tail[:, None]

    ids, weight = _pixel_targets(
        labels + image * labels_b + row * labels_h + column * labels_w, class_weights, inside,
        ignore_index, num_classes, target, HAS_IGNORE, HAS_TARGET, HAS_WEIGHTS,
    )  # fmt: skip
    if HAS_COUNT:
        scale = scale / tl.load(counted).to(tl.float32)
    factor = weight * scale
    if HAS_UPSTREAM:
        where = upstream + image * upstream_b + row * upstream_h + column * upstream_w
        factor *= tl.load(where, mask=inside, other=0.0).to(tl.float32)

    offset = _pixel_offsets(row, column, logits_h, logits_w, FLAT, WIDE, ALIGN)
    source = logits + image * logits_b + offset[None, :]
    head = tl.load(source + step * logits_c, mask=inside[None, :], other=0.0).to(tl.float32)
    tail = head
    real_tail = inside[None, :] & (at_tail < CHANNELS)[:, None]
    if TAIL:
        tail = tl.load(source + step_tail * logits_c, mask=real_tail, other=float("-inf"))
        tail = tail.to(tl.float32)
    if SMOOTH:
        value, head, tail = _smooth(
            head, tail, at, at_tail, ids, factor, smoothing, gamma, CHANNELS, GAMMA, TAIL
        )
    else:
        value, head, tail = _sharp(head, tail, at, at_tail, ids, factor, gamma, GAMMA, TAIL)

    if HAS_GRAD:
        kept = (weight != 0)[None, :]
        offset = _pixel_offsets(row, column, grad_h, grad_w, FLAT, WIDE, ALIGN)
        drain = grad + image * grad_b + offset[None, :]
        head = tl.where(kept, head, 0.0).to(grad.dtype.element_ty)
        tl.store(drain + step * grad_c, head, mask=inside[None, :])
        if TAIL:
            tail = tl.where(kept, tail, 0.0).to(grad.dtype.element_ty)
            tl.store(drain + step_tail * grad_c, tail, mask=real_tail)
    value = tl.where(weight == 0, 0.0, value * weight)
    if LOSS == 1:
        tl.store(loss + image * pixels + pixel, value, mask=inside)
    elif LOSS == 2:
        tl.store(loss + program, tl.sum(value, 0) * scale)


@triton.jit
def _scale_kernel(values, factor, count, BLOCK: tl.constexpr):
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        start = tl.program_id(0).to(tl.int64) * BLOCK
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for first in range(start, count, step):
            at = first + tl.arange(0, BLOCK)
            inside = at < count
            value = tl.load(values + at, mask=inside).to(tl.float32) * by
            tl.store(values + at, value.to(values.dtype.element_ty), mask=inside)


def forward(
    logits: Tensor,
    labels: Tensor,
    class_weights: Tensor | None,
    spec: FocalSpec,
    grad: Tensor | None = None,
) -> Tensor:
    """The reduced loss. Its gradient is written to ``grad``, which may be ``logits`` itself."""
    batch, _, height, width = logits.shape
    count = _programs(logits)
    each = spec.reduction == "none"
    size = (batch, height, width) if each else (count,)
    loss = torch.empty(size, dtype=torch.float32, device=logits.device)
    _launch(logits, labels, class_weights, spec, grad=grad, loss=loss)
    return loss if each else loss.sum()


def backward(
    upstream: Tensor,
    logits: Tensor,
    labels: Tensor,
    class_weights: Tensor | None,
    spec: FocalSpec,
    grad: Tensor,
) -> None:
    """Write to ``grad`` the gradient for ``upstream``, that of the reduced loss."""
    _launch(logits, labels, class_weights, spec, grad=grad, upstream=upstream)


def scale_(grad: Tensor, upstream: Tensor) -> None:
    """Multiply ``grad`` by the scalar ``upstream``; a factor of 1 touches nothing.

    Nothing waits to learn the factor: the kernel looks at it.
    """
    dense = grad.is_contiguous() or grad.is_contiguous(memory_format=torch.channels_last)
    if not dense:
        grad.mul_(upstream)
        return
    block = 4096
    programs = min(ceil_div(grad.numel(), block), 4096)
    if programs:
        with on(grad.device):
            _scale_kernel[(programs,)](
                grad, upstream, grad.numel(), BLOCK=block, num_warps=4, enable_fp_fusion=True
            )


def tile(channels: int) -> tuple[int, int, int]:
    """Channels of a program's head and tail, powers of two, and its number of pixels."""
    head = 1 << (channels.bit_length() - 1)
    tail = power_of_two(channels - head) if channels > head else 0
    most = max(1, _TILE // (head + tail))
    return head, tail, min(_MAX_PIXELS, 1 << (most.bit_length() - 1))


def _programs(logits: Tensor) -> int:
    batch, channels, height, width = logits.shape
    return batch * ceil_div(height * width, tile(channels)[2])


def _launch(
    logits: Tensor,
    labels: Tensor,
    class_weights: Tensor | None,
    spec: FocalSpec,
    *,
    grad: Tensor | None = None,
    upstream: Tensor | None = None,
    loss: Tensor | None = None,
) -> None:
    batch, channels, height, width = logits.shape
    if batch == 0:
        return
    head, tail, pixels = tile(channels)
    if upstream is not None:
        upstream = upstream.expand(batch, height, width)
    if class_weights is not None:
        class_weights = class_weights.contiguous()
    counted, scale = _count(labels, spec)
    maps = [m for m in (logits, labels, grad, upstream) if m is not None]
    sizes = (height * width, width, ceil_div(height * width, pixels))
    ignore, target = spec.ignore_index, spec.target
    numbers = (spec.gamma, spec.smoothing, scale, ignore or 0, spec.num_classes, target or 0)
    with on(logits.device):
        _focal_kernel[(_programs(logits),)](
            logits, labels, class_weights, counted, upstream, grad, loss,
            *map_strides(logits), *map_strides(labels), *_strides(upstream, 3), *_strides(grad, 4),
            *sizes, *numbers,
            GAMMA=int(spec.gamma) if spec.gamma in (0, 1, 2) else _GENERAL,
            SMOOTH=spec.smoothing > 0, HAS_IGNORE=ignore is not None,
            HAS_TARGET=target is not None, HAS_WEIGHTS=class_weights is not None,
            HAS_COUNT=counted is not None, HAS_UPSTREAM=upstream is not None,
            HAS_GRAD=grad is not None,
            LOSS=0 if loss is None else 1 if spec.reduction == "none" else 2,
            FLAT=all(is_flat(m) for m in maps), WIDE=any(reach(m) >= _INT32 for m in maps),
            ALIGN=_alignment(logits, grad), CHANNELS=channels,
            HEAD=head, TAIL=tail, PIXELS=pixels,
            num_warps=8 if (head + tail) * pixels > _SMALL_TILE else 4,
            # stated, for Triton is about to change what it does unless told
            enable_fp_fusion=True,
        )  # fmt: skip


def _count(labels: Tensor, spec: FocalSpec) -> tuple[Tensor | None, float]:
    """What every pixel is multiplied by: ``scale``, divided by a number on the device if any."""
    if spec.reduction == "valid_mean" and spec.ignore_index is not None:
        counted = divisor(labels.long() != spec.ignore_index, spec.reduction)
        assert isinstance(counted, Tensor)
        return counted, 1.0
    mean = spec.reduction in ("mean", "valid_mean")
    return None, 1.0 / max(1, labels.numel()) if mean else 1.0


def _alignment(*maps: Tensor | None) -> int:
    """The largest power of two, up to 16, that divides every step between pixels."""
    steps = [step for m in maps if m is not None for step in map_strides(m)[-2:]]
    return math.gcd(16, *steps)


def _strides(tensor: Tensor | None, rank: int) -> tuple[int, ...]:
    return (0,) * rank if tensor is None else map_strides(tensor)
