"""The equations in plain torch, in float32 or better: any order of gradients."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which no operation changes its dtype."""
    # autocast would send float32 logits to float16, where 300 * 300 * 64 / 8 is infinite
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention over the last two axes."""
    compute = torch.promote_types(q.dtype, torch.float32)
    logits = (q.to(compute) * q.shape[-1] ** -0.5) @ k.to(compute).mT
    return (logits.softmax(-1) @ v.to(compute)).to(q.dtype)


def inject(
    features: Tensor,
    keys: Tensor,
    biases: Tensor,
    values: Tensor,
    scale: Tensor | None = None,
) -> Tensor:
    """Add to every pixel the values of the tokens, weighted by how well their keys match.

    A ``scale`` per channel is that of the pixel, once its weights are known.
    """
    compute = injection_dtype(features, keys, biases, values)
    keys, biases, values = (x.to(compute) for x in (keys, biases, values))
    if pixels_come_first(features):
        pixels = features.flatten(2).mT
        wide = pixels.to(compute)
        weights = torch.baddbmm(biases.unsqueeze(1), wide, keys.mT).softmax(2)
        base = wide if scale is None else wide * scale.to(compute)
        out = torch.baddbmm(base, weights, values).mT
    else:
        wide = features.flatten(2).to(compute)
        weights = torch.baddbmm(biases.unsqueeze(2), keys, wide).softmax(1)
        base = wide if scale is None else wide * scale.to(compute).unsqueeze(1)
        out = torch.baddbmm(base, values.mT, weights)
    return out.to(features.dtype).unflatten(2, features.shape[2:])


def inject_gradients(
    grad: Tensor, features: Tensor, keys: Tensor, biases: Tensor, values: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of :func:`inject` in closed form, itself differentiable.

    Returns:
        Those of the features, keys, biases and values, in the dtypes of these.
    """
    compute = injection_dtype(features, keys, biases, values)
    wide, slope = (x.to(compute).flatten(2) for x in (features, grad))
    k, b, v = (x.to(compute) for x in (keys, biases, values))
    weights = torch.baddbmm(b.unsqueeze(2), k, wide).softmax(1)
    read = v @ slope
    logits = weights * (read - (weights * read).sum(1, keepdim=True))
    return (
        (slope + k.mT @ logits).view(features.shape).to(features.dtype),
        (logits @ wide.mT).to(keys.dtype),
        logits.sum(2).to(biases.dtype),
        (weights @ slope.mT).to(values.dtype),
    )


def injection_dtype(*tensors: Tensor) -> torch.dtype:
    """Float32, or the widest dtype among the tensors."""
    compute = torch.float32
    for x in tensors:
        compute = torch.promote_types(compute, x.dtype)
    return compute


def pixels_come_first(features: Tensor) -> bool:
    """Whether the channels of a pixel lie side by side, and those of its neighbour follow."""
    return features.stride(1) == 1 and not features.is_contiguous()
