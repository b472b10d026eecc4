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
    """That of the features; the usual one where they have both."""
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


def joined_columns(features: Tensor, upsample: int) -> int:
    """How many columns of a pixel's square stand beside each other in a row of bits.

    Kernels take as many at a time, in runs of a power of two.
    """
    power_of_two = upsample & (upsample - 1) == 0
    return 1 if signs_are_by_channel(features) or not power_of_two else upsample


def signs_sizes(features: Tensor, upsample: int) -> tuple[int, int]:
    """Bytes of a row of bits, and of all rows of an image for one place in a pixel's square.

    A row holds the channels of a pixel or the pixels of a channel. Of upsampled features, every
    place in the square of a pixel has rows of its own, but for the columns that are joined.
    """
    _, channels, height, width = features.shape
    pixels = height * width
    if signs_are_by_channel(features):
        row = (channels + 7) // 8
        return row, row * pixels
    row = (pixels * joined_columns(features, upsample) + 7) // 8
    return row, row * channels


def empty_signs(features: Tensor, upsample: int) -> Tensor:
    """Room for the bits of all places in a batch."""
    places = upsample**2 // joined_columns(features, upsample)
    size = features.shape[0] * places * signs_sizes(features, upsample)[1]
    return torch.empty(size, dtype=torch.uint8, device=features.device)


def pack_signs(positive: Tensor, features: Tensor, upsample: int) -> Tensor:
    """The bits of a map of the output's size."""
    pattern = _pattern(features, upsample)
    rows = rearrange(positive, f"b c (h i) (w j) -> {pattern}", i=upsample, j=upsample)
    groups = F.pad(rows.to(torch.uint8), (0, -rows.shape[-1] % 8)).unflatten(-1, (-1, 8))
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=positive.device)
    return (groups * weights).sum(-1, dtype=torch.uint8).flatten()


def unpack_signs(signs: Tensor, features: Tensor, upsample: int) -> Tensor:
    """The map that :func:`pack_signs` took."""
    batch, channels, height, width = features.shape
    last, columns = signs_are_by_channel(features), joined_columns(features, upsample)
    bits = (signs.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=signs.device)) & 1
    length = channels if last else height * width * columns
    lines = height * width if last else channels
    rows = bits.view(batch, upsample**2 // columns, lines, -1)[..., :length]
    sizes = {"h": height, "w": width, "i": upsample, "j": upsample}
    pattern = _pattern(features, upsample)
    return rearrange(rows.bool(), f"{pattern} -> b c (h i) (w j)", **sizes)


def _pattern(features: Tensor, upsample: int) -> str:
    if signs_are_by_channel(features):
        return "b (i j) (h w) c"
    joined = joined_columns(features, upsample) > 1
    return "b i c (h w j)" if joined else "b (i j) c (h w)"
