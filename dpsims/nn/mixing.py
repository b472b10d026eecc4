"""Projected GAN's random projections: the baseline that feature conditioning is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dpsims._checks import check_bool, check_int, check_ints
from dpsims._levels import check_levels


class _FrozenConv1x1(nn.Module):
    """A 1x1 convolution with random weights that nothing can train."""

    weight: Tensor
    bias: Tensor

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        conv = nn.Conv2d(in_channels, out_channels, 1)
        # buffers: saved and moved like parameters, but out of reach of optimisers, of spectral
        # normalisation and of requires_grad_(True) on a parent
        self.register_buffer("weight", conv.weight.detach())
        self.register_buffer("bias", conv.bias.detach() if conv.bias is not None else None)

    def forward(self, features: Tensor) -> Tensor:
        return F.conv2d(features, self.weight, self.bias)


class CrossChannelMixing(nn.Module):
    """Mix the channels of every backbone map by a random, frozen 1x1 convolution.

    Args:
        channels: Widths of the backbone maps, fine to coarse.
        out_channels: Width of the finest result.
        expand: Whether the width doubles from level to level; if not, all have ``out_channels``.

    Attributes:
        channels: Widths of the results, fine to coarse.

    Shape:
        - features: one ``(B, C_l, h_l, w_l)`` per level; output: ``(B, channels[l], h_l, w_l)``
          each

    Raises:
        InputError: A count below 1, another number of maps, a wrong width, batch size or device.
        DTypeError: Not ints, ``expand`` not a bool, not a list of floating-point maps.

    Note:
        Units: those of the features; PyTorch's default Kaiming-uniform initialisation, no
        activation. The weights are buffers: in the state dict, because they are random, and never
        trained. Cost: one 1x1 convolution per level. Gradients: any order, to the features.

    Source:
        Sauer et al., "Projected GANs Converge Faster", NeurIPS 2021, Sec. 3.2 (CCM); half of the
        "CCM + CSM" baseline of Berrada et al., CVPR 2024, Sec. 3.1 and Table 5.

    Example:
        >>> import torch
        >>> mix = CrossChannelMixing([3, 5], out_channels=4)
        >>> maps = mix([torch.randn(2, 3, 8, 8), torch.randn(2, 5, 4, 4)])
        >>> [tuple(mixed.shape) for mixed in maps], list(mix.parameters())
        ([(2, 4, 8, 8), (2, 8, 4, 4)], [])
    """

    def __init__(
        self, channels: Sequence[int], *, out_channels: int = 64, expand: bool = True
    ) -> None:
        super().__init__()
        check_ints("CrossChannelMixing", "channels", channels)
        check_int("CrossChannelMixing", "out_channels", out_channels)
        check_bool("CrossChannelMixing", "expand", expand)
        self.in_channels = list(channels)
        self.channels = [
            out_channels * 2**level if expand else out_channels for level in range(len(channels))
        ]
        self.convs = nn.ModuleList(map(_FrozenConv1x1, self.in_channels, self.channels))

    def forward(
        self, features: Sequence[Float[Tensor, "B _ _ _"]]
    ) -> list[Float[Tensor, "B _ _ _"]]:
        """One mixed map per level, sizes unchanged."""
        check_levels("CrossChannelMixing", "features", features, self.in_channels)
        return [conv(level) for conv, level in zip(self.convs, features, strict=True)]


class CrossScaleMixing(nn.Module):
    """Add coarse maps to finer ones through random, frozen 1x1 convolutions.

    From coarse to fine, each level joins its map with the result of the level below, doubles the
    size and projects to the width of the next finer level.

    Args:
        channels: Widths of the maps, fine to coarse (``CrossChannelMixing.channels``).

    Attributes:
        channels: Widths of the results, fine to coarse: the finest keeps its own, every other
            level has the width of the next finer map.

    Shape:
        - features: one ``(B, C_l, h_l, w_l)`` per level; output: level 0 ``(B, channels[0], 2 h_0,
          2 w_0)``, level l ``(B, channels[l], h_{l-1}, w_{l-1})``

    Raises:
        InputError: A count below 1, another number of maps, a wrong width, batch size, device or
            order.
        DTypeError: Not ints, not a list of floating-point maps.

    Note:
        Units: those of the features; PyTorch's default Kaiming-uniform initialisation, no
        activation. The weights are buffers, as in :class:`CrossChannelMixing`. With strides that
        halve, every result has twice its level's size; in general it has the size of the next
        finer map, so odd sizes work. Cost: one bilinear resize and one 1x1 convolution per level.
        Gradients: any order, to the features.

    Source:
        Sauer et al., "Projected GANs Converge Faster", NeurIPS 2021, Sec. 3.2 (CSM), with the
        authors' choices: bilinear with aligned corners, after the sum and before the convolution,
        coarsest level included; 1x1 kernels. With :class:`CrossChannelMixing` before it, the "CCM
        + CSM" baseline of Berrada et al., CVPR 2024, Sec. 3.1 and Table 5.

    Example:
        >>> import torch
        >>> mix = CrossScaleMixing([4, 8])
        >>> maps = mix([torch.randn(2, 4, 8, 8), torch.randn(2, 8, 4, 4)])
        >>> [tuple(mixed.shape) for mixed in maps]
        [(2, 4, 16, 16), (2, 4, 8, 8)]
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        check_ints("CrossScaleMixing", "channels", channels)
        self.in_channels = list(channels)
        self.channels = [channels[0], *channels[:-1]]
        self.convs = nn.ModuleList(map(_FrozenConv1x1, self.in_channels, self.channels))

    def forward(
        self, features: Sequence[Float[Tensor, "B _ _ _"]]
    ) -> list[Float[Tensor, "B _ _ _"]]:
        """One mixed map per level, each as large as the next finer input."""
        check_levels("CrossScaleMixing", "features", features, self.in_channels, ordered=True)
        height, width = features[0].shape[-2:]
        sizes = [(2 * height, 2 * width), *(level.shape[-2:] for level in features[:-1])]
        mixed: list[Tensor] = []
        for level in reversed(range(len(features))):
            total = features[level] + mixed[0] if mixed else features[level]
            resized = F.interpolate(total, size=sizes[level], mode="bilinear", align_corners=True)
            mixed.insert(0, self.convs[level](resized))
        return mixed
