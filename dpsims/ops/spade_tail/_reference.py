"""The SPADE tail in plain torch: any device, dtype, layout and order of gradients.

The gradient is written down too, of differentiable operations, so that the other implementations
can be differentiated a second time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import reduce, repeat
from torch import Tensor
from torch.nn import functional as F

from dpsims.ops.spade_tail._layout import memory_format

AllReduce = Callable[[Tensor], Tensor]


def per_channel(values: Tensor) -> Tensor:
    """One value per channel, as a map ``(C, H, W)`` broadcasts it."""
    return values.view(-1, 1, 1)


def moments(
    features: Tensor, num_values: int | Tensor | None = None, all_reduce: AllReduce | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel, over all processes if they can be summed over."""
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    if all_reduce is None or num_values is None:
        var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
        return mean, var
    mean = all_reduce(wide.sum((0, 2, 3))) / num_values
    deviation = wide - per_channel(mean)
    return mean, all_reduce(deviation.square().sum((0, 2, 3))) / num_values


def normalize(features: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """Features with mean 0 and variance 1 in every channel."""
    return (features - per_channel(mean)) * per_channel(torch.rsqrt(var + eps))


def apply(
    features: Tensor,
    modulation: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    slope: float,
    upsample: int,
) -> Tensor:
    """``leaky_relu((x - mean) / sqrt(var + eps) * (1 + gamma) + beta)``, x upsampled."""
    normalized = features
    if mean is not None and var is not None:
        normalized = normalize(features, mean, var, eps)
    dtype = torch.promote_types(normalized.dtype, modulation.dtype)
    gamma, beta = modulation.to(dtype).chunk(2, dim=1)
    out = torch.addcmul(beta, upsampled(normalized, upsample), 1 + gamma)
    if slope != 1:
        out = F.leaky_relu(out, slope)
    return out.to(features.dtype)


def gradients(
    grad: Tensor,
    features: Tensor,
    modulation: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    num_values: int | Tensor | None,
    all_reduce: AllReduce | None,
    eps: float,
    slope: float,
    upsample: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`apply` by features and modulation, themselves differentiable.

    With a ``num_values``, mean and variance are the moments of the features of all processes.
    """
    dtype = torch.promote_types(features.dtype, torch.float32)
    wide, grad = features.to(dtype), grad.to(dtype)
    gamma, beta = modulation.to(dtype).chunk(2, dim=1)
    normalized, scale = wide, None
    if mean is not None and var is not None:
        if num_values is not None:
            # a second derivative sees that the moments are functions of the features
            mean, var = moments(wide, num_values, all_reduce)
        normalized, scale = normalize(wide, mean, var, eps), per_channel(torch.rsqrt(var + eps))
    repeated = upsampled(normalized, upsample)
    if slope != 1:
        positive = torch.addcmul(beta, repeated, 1 + gamma) > 0
        grad = torch.where(positive, grad, grad * slope)
    to_modulation = torch.cat((grad * repeated, grad), dim=1).to(modulation.dtype)
    inner = summed(grad * (1 + gamma), upsample)
    if scale is None:
        return inner.to(features.dtype), to_modulation
    if num_values is not None:
        sums = torch.stack((inner.sum((0, 2, 3)), (inner * normalized).sum((0, 2, 3))))
        shares = (sums if all_reduce is None else all_reduce(sums)) / num_values
        inner = inner - per_channel(shares[0]) - normalized * per_channel(shares[1])
    return (inner * scale).to(features.dtype), to_modulation


def upsampled(features: Tensor, factor: int) -> Tensor:
    """Every pixel repeated to a square, in the memory format of the features."""
    if factor == 1:
        return features
    out = repeat(features, "b c h w -> b c (h i) (w j)", i=factor, j=factor)
    return out.contiguous(memory_format=memory_format(features))


def summed(fine: Tensor, factor: int) -> Tensor:
    """The transpose of :func:`upsampled`."""
    if factor == 1:
        return fine
    return reduce(fine, "b c (h i) (w j) -> b c h w", "sum", i=factor, j=factor)
