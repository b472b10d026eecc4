"""The residual blocks of OASIS's discriminator."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

LEAKY_SLOPE = 0.2


class DownBlock(nn.Module):
    """Two convolutions around a shortcut, then half the size."""

    def __init__(self, in_channels: int, out_channels: int, *, activated: bool) -> None:
        super().__init__()
        self.activated = activated
        self.conv_0 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv_1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_s = _shortcut(in_channels, out_channels)

    def forward(self, features: Tensor) -> Tensor:
        """Maps of half the size."""
        # there is no activation on the image itself
        hidden = F.leaky_relu(features, LEAKY_SLOPE) if self.activated else features
        hidden = self.conv_1(F.leaky_relu(self.conv_0(hidden), LEAKY_SLOPE))
        return self.conv_s(F.avg_pool2d(features, 2)) + F.avg_pool2d(hidden, 2)


class UpBlock(nn.Module):
    """Twice the size, then two convolutions around a shortcut."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv_0 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv_1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_s = _shortcut(in_channels, out_channels)

    def forward(self, features: Tensor) -> Tensor:
        """Maps of twice the size."""
        features = F.interpolate(features, scale_factor=2, mode="nearest")
        hidden = self.conv_0(F.leaky_relu(features, LEAKY_SLOPE))
        return self.conv_s(features) + self.conv_1(F.leaky_relu(hidden, LEAKY_SLOPE))


def _shortcut(in_channels: int, out_channels: int) -> nn.Module:
    if in_channels == out_channels:
        return nn.Identity()
    return nn.Conv2d(in_channels, out_channels, 1)
