"""Inputs of the injection, and how far a kernel may be off: shared by its CPU and GPU tests."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dpsims.ops.attention import _reference


def draw(sizes: Any, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Features, keys, biases and values."""
    batch, channels, height, width, tokens = sizes
    generator = torch.Generator().manual_seed(seed)
    shapes = (
        (batch, channels, height, width),
        (batch, tokens, channels),
        (batch, tokens),
        (batch, tokens, channels),
    )
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def layouts(features: Tensor) -> dict[str, Tensor]:
    """The same map contiguous, channels last, transposed and with gaps."""
    gaps = torch.full((*features.shape[:3], 2 * features.shape[3]), math.nan).to(features)
    gaps[..., ::2] = features
    return {
        "contiguous": features,
        "channels-last": features.to(memory_format=torch.channels_last),
        "transposed": features.mT.contiguous().mT,
        "gaps": gaps[..., ::2],
    }


def exact(
    grad: Tensor, features: Tensor, keys: Tensor, biases: Tensor, values: Tensor
) -> list[Tensor]:
    """In float64: the output, the features' gradient, and the tokens' side by side."""
    args = [x.double() for x in (features, keys, biases, values)]
    to_features, *tokens = _reference.inject_gradients(grad.double(), *args)
    return [_reference.inject(*args), to_features, _packed(*tokens)]


def bounds(
    grad: Tensor, features: Tensor, keys: Tensor, biases: Tensor, values: Tensor
) -> list[Tensor]:
    """By how much a kernel may miss each entry of :func:`exact`.

    What is summed counts with its absolute value, times the roundings on its way. Roundings to
    bfloat16 and float16 count in full, for Triton's interpreter cuts off what a GPU rounds.
    """
    dtype = features.dtype
    h, k, b, v, slope = (x.double() for x in (features, keys, biases, values, grad))
    h, slope = h.flatten(2), slope.flatten(2)
    weights = torch.baddbmm(b.unsqueeze(2), k, h).softmax(1)
    size = (k.abs() @ h.abs() + b.abs().unsqueeze(2)).amax(1, keepdim=True)
    channels, pixels = h.shape[1:]
    single = torch.finfo(torch.float32).eps
    # of the logits, which the softmax turns into a relative error, thrice that of the largest
    unit = single * (2 * (channels + 4) * size + 2 * k.shape[1] + 16)
    if dtype == torch.bfloat16:
        half = torch.finfo(dtype).eps
        # the part of a key that is left after two roundings; the two operands of a product
        unit = unit + 2 * half**2 * size + 2 * half
    out = _reference.inject(*(x.double() for x in (features, keys, biases, values)))
    final = torch.finfo(dtype).eps
    read = v.abs() @ slope.abs()
    logits = weights * (read + (weights * read).sum(1, keepdim=True))
    # weights and reads are each off by a unit, and both are rounded again as operands
    thrice = 3 * unit
    to_h = k.abs().mT @ (logits * thrice)
    sums = 1 + pixels * single
    tokens = (
        (logits * thrice) @ h.abs().mT * sums,
        (logits * thrice).sum(2) * sums,
        (weights * thrice) @ slope.abs().mT * sums,
    )
    exact_h = exact(grad, features, keys, biases, values)[1]
    return [
        (v.abs().mT @ (weights * unit)).view_as(out) + final * out.abs(),
        to_h.view_as(out) + final * exact_h.abs() + single * slope.abs().view_as(out),
        _packed(*tokens) + pixels * single,
    ]


def _packed(keys: Tensor, biases: Tensor, values: Tensor) -> Tensor:
    return torch.cat([keys, values, biases.unsqueeze(2)], 2)
