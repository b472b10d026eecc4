"""The focal loss and its gradient on CPU: every block of logits is read while it is in cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dpsims.ops.focal._targets import (
    FocalSpec,
    Targets,
    focal_targets,
    loss_dtype,
    pixel_upstream,
    reduce_pixels,
)

# logits per thread and block: few enough to stay in cache, enough to hide the calls
_BLOCK = 2**18
# smoothing holds several maps of a block
_SMOOTH_BLOCK = 2**17
# p * log_p is 0 in float64 too
_LOWEST = -1000.0


def forward(
    logits: Tensor,
    labels: Tensor,
    class_weights: Tensor | None,
    spec: FocalSpec,
    grad: Tensor | None = None,
) -> Tensor:
    """The reduced loss. Its gradient is written to ``grad``, which may be ``logits`` itself."""
    targets = focal_targets(labels, class_weights, spec, logits.dtype)
    loss = torch.empty_like(targets.weights)
    one = torch.ones((), dtype=loss.dtype)
    if spec.reduction == "none":
        one = one.expand(labels.shape)
    _run(logits, targets, spec, pixel_upstream(one, targets.valid, spec.reduction), grad, loss)
    return reduce_pixels(loss, targets.valid, spec.reduction)


def backward(
    upstream: Tensor,
    logits: Tensor,
    labels: Tensor,
    class_weights: Tensor | None,
    spec: FocalSpec,
    grad: Tensor,
) -> None:
    """Write to ``grad`` the gradient for ``upstream``, that of the reduced loss."""
    targets = focal_targets(labels, class_weights, spec, logits.dtype)
    loss = torch.empty_like(targets.weights)
    _run(
        logits, targets, spec, pixel_upstream(upstream, targets.valid, spec.reduction), grad, loss
    )


def scale_(grad: Tensor, upstream: Tensor) -> None:
    """Multiply ``grad`` by the scalar ``upstream``; a factor of 1 costs nothing."""
    if float(upstream) != 1.0:
        grad.mul_(upstream)


def _run(
    logits: Tensor,
    targets: Targets,
    spec: FocalSpec,
    upstream: Tensor,
    grad: Tensor | None,
    loss: Tensor,
) -> None:
    compute = loss_dtype(logits.dtype)
    # the exponentials of a block go where its gradient goes, if that can hold them
    direct = grad is not None and grad.dtype is compute
    for images, rows in _blocks(logits, _SMOOTH_BLOCK if spec.smoothing else _BLOCK):
        x, ids, weights = (m[images, :, rows] for m in (logits, targets.ids, targets.weights))
        part = grad[images, :, rows] if grad is not None else None
        scratch = part if direct and part is not None else torch.empty_like(x, dtype=compute)
        factor = weights * upstream[images, :, rows]
        rule = _smooth if spec.smoothing else _sharp
        value = rule(x, ids, factor, spec, scratch, grad is not None)
        ignored = weights == 0
        loss[images, :, rows] = (value * weights).masked_fill_(ignored, 0.0)
        if part is not None:
            if bool(ignored.any()):
                scratch.masked_fill_(ignored, 0.0)
            if part is not scratch:
                part.copy_(scratch)


def _blocks(logits: Tensor, block: int) -> Iterator[tuple[slice, slice]]:
    """Slices of images and rows that cover the map a block at a time."""
    batch, channels, height, width = logits.shape
    block *= torch.get_num_threads()
    rows = min(height, max(1, block // (channels * width)))
    images = max(1, block // (channels * width * height))
    for image in range(0, batch, images):
        for row in range(0, height, rows):
            yield slice(image, image + images), slice(row, row + rows)


def _sharp(
    x: Tensor, ids: Tensor, factor: Tensor, spec: FocalSpec, out: Tensor, with_grad: bool
) -> Tensor:
    """The unweighted loss of pixels with one target each; ``factor`` times its gradient in out.

    ``out`` may be ``x``.
    """
    peak = x.amax(1, keepdim=True).to(out.dtype)
    own_gap = x.gather(1, ids).to(out.dtype) - peak
    torch.sub(x, peak, out=out).exp_()
    # without the target's own term the sum gives 1 - p with all its digits
    others = out.scatter_(1, ids, 0.0).sum(1, keepdim=True)
    own = own_gap.exp()
    total = others + own
    log_p = own_gap - torch.where(own_gap == 0, others.log1p(), total.log())
    rest = others / total
    power = _power(rest, spec.gamma)
    if with_grad:
        slope = _slope(log_p, own / total, rest, power, spec.gamma).mul_(factor)
        out.mul_(-slope / total).scatter_(1, ids, slope * rest)
    return power * -log_p


def _smooth(
    x: Tensor, ids: Tensor, factor: Tensor, spec: FocalSpec, out: Tensor, with_grad: bool
) -> Tensor:
    """:func:`_sharp` for targets with a share of every channel."""
    gap = torch.sub(x, x.amax(1, keepdim=True).to(out.dtype), out=out)
    p = gap.exp()
    total = p.sum(1, keepdim=True)
    p /= total
    log_p = gap.sub_(total.log())
    rest = 1 - p
    power = _power(rest, spec.gamma)
    value = power * log_p
    sharp, spread = 1 - spec.smoothing, spec.smoothing / x.shape[1]
    loss = -sharp * value.gather(1, ids) - spread * value.sum(1, keepdim=True)
    del value
    if with_grad:
        slope = _slope(log_p, p, rest, power, spec.gamma)
        own = slope.gather(1, ids).mul_(sharp * factor)
        slope.mul_(spread * factor).scatter_add_(1, ids, own)
        # the chain rule of softmax: every channel's slope, less p times the sum of all slopes
        torch.addcmul(slope, p, slope.sum(1, keepdim=True), value=-1, out=out)
    return loss


def _power(rest: Tensor, gamma: float) -> Tensor:
    if gamma == 0:
        return torch.ones_like(rest)
    if gamma == 1:
        return rest
    return rest * rest if gamma == 2 else rest**gamma


def _slope(log_p: Tensor, p: Tensor, rest: Tensor, power: Tensor, gamma: float) -> Tensor:
    """The focal term's derivative by ``log_p``: ``power * (gamma * p * log_p / rest - 1)``."""
    if gamma == 0:
        return torch.full_like(log_p, -1.0)
    if gamma == 1:
        return (p * log_p.clamp(min=_LOWEST)).sub_(rest)
    if gamma == 2:
        return (p * log_p.clamp(min=_LOWEST)).mul_(2.0).sub_(rest).mul_(rest)
    # at rest = 0 the quotient's limit is -1
    quotient = torch.where(rest > 0, log_p.clamp(min=_LOWEST) / rest, -1.0)
    return quotient.mul_(p).mul_(gamma).sub_(1.0).mul_(power)
