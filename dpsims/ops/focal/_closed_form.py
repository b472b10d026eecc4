"""The focal loss of every pixel with its gradient in closed form.

Autograd through ``(1 - p) ** gamma`` gives NaN once ``p`` rounds to 1 and ``gamma < 1``. Here the
derivative is written down instead. It is made of differentiable operations on the logits, so that
it can be differentiated again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpsims.ops._impl import is_transformed

# one block of float32 logits and its few temporaries stay in a core's cache
_CPU_BLOCK = 2**18
# enough to fill a GPU, little beside a full map of logits
_OTHER_BLOCK = 2**24


def pixel_focal(
    logits: Tensor, targets: Tensor, weights: Tensor, gamma: float, smoothing: float
) -> Tensor:
    """Weighted focal loss of every pixel, ``(B, 1, H, W)`` in the dtype of ``weights``.

    Args:
        logits: ``(B, C, H, W)``.
        targets: int64 ``(B, 1, H, W)``, every id in ``[0, C)``.
        weights: ``(B, 1, H, W)``, float32 or float64. A pixel of weight 0 is left out: neither
            its loss nor its gradient sees its logits.
        gamma: Focusing exponent.
        smoothing: Target mass that is spread evenly over all channels.
    """
    with torch.no_grad():
        peak, log_total = _normalizer(logits, weights.dtype)
    loss: Tensor = _PixelFocal.apply(logits, targets, weights, peak, log_total, gamma, smoothing)
    return loss


class _PixelFocal(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        logits: Tensor,
        targets: Tensor,
        weights: Tensor,
        peak: Tensor,
        log_total: Tensor,
        gamma: float,
        smoothing: float,
    ) -> Tensor:
        def loss(*block: Tensor) -> Tensor:
            return _loss(*block, gamma=gamma, smoothing=smoothing)

        return _by_rows(loss, weights, logits, targets, weights, peak, log_total)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        *tensors, ctx.gamma, ctx.smoothing = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, weights, peak, log_total = ctx.saved_tensors
        if torch.is_grad_enabled():
            # a second derivative is wanted: the normaliser is a function of the logits too
            peak, log_total = _normalizer(logits, weights.dtype)
        grad = _gradient_map(
            logits, targets, weights, upstream, peak, log_total, ctx.gamma, ctx.smoothing
        )
        return grad, None, None, None, None, None, None


def pixel_focal_gradient(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    upstream: Tensor,
    gamma: float,
    smoothing: float,
) -> Tensor:
    """The gradient of :func:`pixel_focal` by the logits, itself differentiable.

    ``upstream`` is the gradient ``(B, 1, H, W)`` of every pixel's loss.
    """
    normalizer = _normalizer(logits, weights.dtype)
    return _gradient_map(logits, targets, weights, upstream, *normalizer, gamma, smoothing)


def _gradient_map(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    upstream: Tensor,
    peak: Tensor,
    log_total: Tensor,
    gamma: float,
    smoothing: float,
) -> Tensor:
    def gradient(*block: Tensor) -> Tensor:
        rule = _smooth_gradient if smoothing else _gradient
        return rule(*block, gamma=gamma, smoothing=smoothing)

    grad = _by_rows(gradient, logits, logits, targets, weights, upstream, peak, log_total)
    return grad.to(logits.dtype)


def _normalizer(logits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The largest logit and ``log sum exp(logit - largest)``; added up, they would round."""
    peak = logits.detach().amax(1, keepdim=True).to(dtype)

    def log_total(logits: Tensor, peak: Tensor) -> Tensor:
        gap = logits - peak
        return torch.exp(gap, out=_reuse(gap)).sum(1, keepdim=True).log()

    return peak, _by_rows(log_total, peak, logits, peak)


def _log_probabilities(logits: Tensor, peak: Tensor, log_total: Tensor) -> Tensor:
    gap = logits - peak
    return torch.sub(gap, log_total, out=_reuse(gap))


def _focal(log_p: Tensor, gamma: float) -> Tensor:
    rest = -torch.expm1(log_p)
    power = torch.pow(rest, gamma, out=_reuse(rest))
    return torch.mul(power, -log_p, out=_reuse(power))


def _slope(log_p: Tensor, gamma: float) -> tuple[Tensor, Tensor, Tensor]:
    """Derivative of the focal term by ``log_p``, then ``p``, then ``1 - p``.

    ``(1 - p) ** gamma * (gamma * p * log_p / (1 - p) - 1)``, finite for every ``log_p <= 0``.
    """
    # below, p * log_p is 0 in float64 too; above, log_p / (1 - p) is -1 without a 0/0
    log_p = torch.clamp(log_p, -1000.0, -torch.finfo(log_p.dtype).tiny, out=_reuse(log_p))
    p = log_p.exp()
    rest = -torch.expm1(log_p)
    slope = torch.mul(p, log_p, out=_reuse(log_p))
    slope = torch.div(slope, rest, out=_reuse(slope))
    slope = torch.mul(slope, gamma, out=_reuse(slope))
    slope = torch.sub(slope, 1.0, out=_reuse(slope))
    return torch.mul(slope, rest**gamma, out=_reuse(slope)), p, rest


def _loss(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    peak: Tensor,
    log_total: Tensor,
    *,
    gamma: float,
    smoothing: float,
) -> Tensor:
    value = _focal(logits.gather(1, targets) - peak - log_total, gamma)
    if smoothing:
        spread = _focal(_log_probabilities(logits, peak, log_total), gamma).mean(1, keepdim=True)
        value = (1 - smoothing) * value + smoothing * spread
    return torch.where(weights == 0, 0.0, weights * value)


def _gradient(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    upstream: Tensor,
    peak: Tensor,
    log_total: Tensor,
    *,
    gamma: float,
    smoothing: float,  # noqa: ARG001  the two rules are called alike
) -> Tensor:
    gap = logits - peak
    slope, _, rest = _slope(logits.gather(1, targets) - peak - log_total, gamma)
    slope = slope * (weights * upstream)
    grad = torch.exp(gap, out=_reuse(gap))
    grad = torch.mul(grad, -slope * (-log_total).exp(), out=_reuse(grad))
    # the target's own entry is written from 1 - p: subtracting p from 1 would cancel
    grad = torch.scatter(grad, 1, targets, slope * rest, out=_reuse(grad))
    return grad.masked_fill_(weights == 0, 0.0)


def _smooth_gradient(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    upstream: Tensor,
    peak: Tensor,
    log_total: Tensor,
    *,
    gamma: float,
    smoothing: float,
) -> Tensor:
    slope, p, _ = _slope(_log_probabilities(logits, peak, log_total), gamma)
    scale = weights * upstream
    own = slope.gather(1, targets) * ((1 - smoothing) * scale)
    spread = torch.mul(slope, smoothing / logits.shape[1] * scale, out=_reuse(slope))
    # the chain rule of softmax: every channel's slope, less p times the sum of all slopes
    total = spread.sum(1, keepdim=True) + own
    grad = torch.scatter_add(spread, 1, targets, own, out=_reuse(spread))
    grad = torch.sub(grad, torch.mul(p, total, out=_reuse(p)), out=_reuse(grad))
    return grad.masked_fill_(weights == 0, 0.0)


def _by_rows(function: Callable[..., Tensor], like: Tensor, *maps: Tensor) -> Tensor:
    """``function(*maps)``, computed a few rows at a time where nothing has to be recorded.

    Every map is ``(B, *, H, W)``, the widest first; the result is shaped and typed like ``like``.
    """
    rows = _rows_per_block(maps[0])
    if rows >= maps[0].shape[2]:
        return function(*maps)
    result = torch.empty_like(like)
    blocks = zip(*(tensor.split(rows, dim=2) for tensor in (result, *maps)), strict=True)
    for part, *block in blocks:
        part.copy_(function(*block))
    return result


def _rows_per_block(logits: Tensor) -> int:
    batch, channels, height, width = logits.shape
    if logits.is_meta or _reuse(logits) is None:
        return height
    block = _CPU_BLOCK if logits.device.type == "cpu" else _OTHER_BLOCK
    return max(1, block // max(1, batch * channels * width))


def _reuse(scratch: Tensor) -> Tensor | None:
    """For ``out=``: ``scratch`` where nothing can notice that it is overwritten, else ``None``."""
    seen = (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or is_transformed(scratch)
        or type(scratch) not in (Tensor, torch.nn.Parameter)
    )
    return None if seen else scratch
