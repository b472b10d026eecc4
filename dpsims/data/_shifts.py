"""Moving and masking maps by another amount for every image of a batch."""

from __future__ import annotations

import torch
from torch import Tensor


def steps(draws: Tensor, reach: int) -> Tensor:
    """Uniform draws in [0, 1) as whole numbers from ``-reach`` to ``reach``, all as likely."""
    # the clamp is for a product that rounds up to the end
    return (draws * (2 * reach + 1)).long().clamp(max=2 * reach) - reach


def sources(size: int, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Where every place along an axis comes from, ``(B, size)``, and whether that is inside."""
    place = torch.arange(size, device=shift.device) - shift[:, None]
    return place.clamp(0, size - 1), (place >= 0) & (place < size)


def hole(size: int, ratio: float, draws: Tensor) -> Tensor:
    """Places along an axis, ``(B, size)``, inside a window with a random centre."""
    length = int(size * ratio + 0.5)
    start = (draws * size).long().clamp(max=size - 1) - length // 2
    place = torch.arange(size, device=draws.device) - start[:, None]
    return (place >= 0) & (place < length)


def pick(maps: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``maps[b, c, rows[b, y], columns[b, x]]``."""
    # two gathers along one axis each: their backward has a deterministic form on every device
    batch, channels, height, width = maps.shape
    maps = maps.gather(2, rows.view(batch, 1, height, 1).expand(batch, channels, height, width))
    return maps.gather(3, columns.view(batch, 1, 1, width).expand(batch, channels, height, width))
