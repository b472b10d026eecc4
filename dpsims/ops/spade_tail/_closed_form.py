"""The SPADE tail with few temporaries: torch's own kernels, in place, and a gradient by formula.

Only features, modulation and output are held for the backward, where autograd would hold three
more maps.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dpsims.ops.spade_tail._reference import AllReduce, per_channel, summed, upsampled

# below, torch's one-pass kernel wins over two passes of vectorised sums
_TWO_PASSES = 2**15


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel, without a gradient."""
    wide = features.detach().to(torch.promote_types(features.dtype, torch.float32))
    num_values = wide.numel() // wide.shape[1]
    if wide.is_contiguous() and wide.numel() > _TWO_PASSES:
        mean = _sum(wide) / num_values
        return mean, _sum((wide - per_channel(mean)).square_()) / num_values
    mean, var = torch.batch_norm_update_stats(wide, None, None, 0.0)
    return mean, var


def apply(
    features: Tensor,
    modulation: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    slope: float,
    upsample: int,
) -> Tensor:
    """The tail's output; features and modulation have one dtype, float32 or float64."""
    gamma, beta = modulation.chunk(2, dim=1)
    if mean is not None and var is not None:
        features = upsampled(_normalize(features, mean, var, eps), upsample)
        out = features.addcmul_(features, gamma)
    else:
        features = upsampled(features, upsample)
        out = torch.addcmul(features, features, gamma)
    out.add_(beta)
    return out if slope == 1 else F.leaky_relu_(out, slope)


def gradients(
    grad: Tensor,
    features: Tensor,
    modulation: Tensor,
    out: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    num_values: int | Tensor | None,
    all_reduce: AllReduce | None,
    eps: float,
    slope: float,
    upsample: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of features and modulation, also through moments over ``num_values`` features."""
    normalized = features
    if mean is not None and var is not None:
        normalized = _normalize(features, mean, var, eps)
    repeated = upsampled(normalized, upsample)
    to_modulation = torch.empty_like(modulation)
    to_gamma, to_beta = to_modulation.chunk(2, dim=1)
    if slope == 1:
        to_beta.copy_(grad)
    else:
        # the sign of what comes out of a LeakyReLU is that of what goes in
        torch.ops.aten.leaky_relu_backward(grad, out, slope, True, grad_input=to_beta)
    torch.mul(to_beta, repeated, out=to_gamma)
    inner = summed(torch.addcmul(to_beta, to_beta, modulation[:, : features.shape[1]]), upsample)
    if mean is None or var is None:
        return inner, to_modulation
    rstd = torch.rsqrt(var + eps)
    if num_values is None:
        return inner.mul_(per_channel(rstd)), to_modulation
    if all_reduce is None:
        inner = torch.ops.aten.native_batch_norm_backward(
            inner, features, None, None, None, mean, rstd, True, eps, [True, False, False]
        )[0]
        return inner, to_modulation
    sums = torch.stack((_sum(inner), _sum(inner * normalized)))
    shares = all_reduce(sums) / num_values
    inner.sub_(per_channel(shares[0])).addcmul_(normalized, per_channel(shares[1]), value=-1)
    return inner.mul_(per_channel(rstd)), to_modulation


def _normalize(features: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    return F.batch_norm(features, mean, var, eps=eps)


def _sum(maps: Tensor) -> Tensor:
    # torch sums contiguous planes faster than scattered ones
    return maps.sum((2, 3)).sum(0) if maps.is_contiguous() else maps.sum((0, 2, 3))
