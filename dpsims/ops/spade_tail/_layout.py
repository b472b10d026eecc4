"""Memory formats of the results, and the layout of the signs that the forward leaves.

The gradient of a LeakyReLU needs the sign of what went in. To compute it again takes a read of
beta in both kernels of the backward; one bit per value, written by the forward, takes a sixteenth
of that in half precision.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F


def memory_format(features: Tensor) -> torch.memory_format:
    last = features.is_contiguous(memory_format=torch.channels_last)
    if last and not features.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def empty_result(features: Tensor, upsample: int) -> Tensor:
    """Where the result goes: in the memory format of the features."""
    if upsample == 1:
        return torch.empty_like(features)
    b, c, h, w = features.shape
    return torch.empty(
        (b, c, h * upsample, w * upsample),
        dtype=features.dtype,
        device=features.device,
        memory_format=memory_format(features),
    )


def signs_are_by_channel(features: Tensor) -> bool:
    """Whether neighbouring bits are neighbouring channels, not pixels."""
    return features.shape[1] > 1 and features.stride(1) == 1


def signs_sizes(features: Tensor) -> tuple[int, int]:
    """Bytes of a row of bits, and of all rows of an image.

    A row holds the channels of a pixel or the pixels of a channel. Of upsampled features, every
    place in the square of a pixel has rows of its own.
    """
    _, channels, height, width = features.shape
    pixels = height * width
    if signs_are_by_channel(features):
        row = (channels + 7) // 8
        return row, row * pixels
    row = (pixels + 7) // 8
    return row, row * channels


def empty_signs(features: Tensor, upsample: int) -> Tensor:
    size = features.shape[0] * upsample**2 * signs_sizes(features)[1]
    return torch.empty(size, dtype=torch.uint8, device=features.device)


def pack_signs(positive: Tensor, features: Tensor, upsample: int) -> Tensor:
    """The bits of a map of the output's size."""
    pattern = "b (i j) (h w) c" if signs_are_by_channel(features) else "b (i j) c (h w)"
    rows = rearrange(positive, f"b c (h i) (w j) -> {pattern}", i=upsample, j=upsample)
    groups = F.pad(rows.to(torch.uint8), (0, -rows.shape[-1] % 8)).unflatten(-1, (-1, 8))
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=positive.device)
    return (groups * weights).sum(-1, dtype=torch.uint8).flatten()


def unpack_signs(signs: Tensor, features: Tensor, upsample: int) -> Tensor:
    """The map that :func:`pack_signs` took."""
    batch, channels, height, width = features.shape
    last = signs_are_by_channel(features)
    bits = (signs.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=signs.device)) & 1
    length = channels if last else height * width
    rows = bits.view(batch, upsample**2, height * width if last else channels, -1)[..., :length]
    pattern = "b (i j) (h w) c" if last else "b (i j) c (h w)"
    return rearrange(
        rows.bool(), f"{pattern} -> b c (h i) (w j)", h=height, w=width, i=upsample, j=upsample
    )
