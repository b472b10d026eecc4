"""The residual block made of SPADEs."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from dpsims._checks import check_int
from dpsims.nn._spade_inputs import check_spade_inputs, enlarged, modulation_inputs
from dpsims.nn._spade_tail import normalize_lazily
from dpsims.nn.norm import make_norm
from dpsims.nn.spade import SPADE

_SLOPE = 0.2


class SPADEResBlock(nn.Module):
    r"""Two convolutions, each behind a SPADE and a LeakyReLU, around a shortcut.

    Where the widths differ, the shortcut is a 1x1 convolution without bias behind a SPADE of its
    own, without activation; otherwise it is the identity.

    Args:
        in_channels: Width ``C`` of the input.
        out_channels: Width ``C'`` of the output. Between the convolutions the width is the smaller
            of the two.
        cond_channels: Width ``Cc`` of the conditioning map.
        hidden_channels: As in :class:`SPADE`.
        kernel_size: Side of the convolutions inside the SPADEs; those of the block are 3x3.
        norm: As in :class:`SPADE`.
        ignore_index: As in :class:`SPADE`.

    Shape:
        - features ``(B, C, H, W)``; cond ``(B, Cc, H, W)``; output ``(B, C', H, W)``
        - cond as a tuple, and ``upsample``, as in :class:`SPADE`

    Raises:
        InputError: As :class:`SPADE`; in training a map with one value per channel.
        DTypeError: Not a floating-point tensor.

    Note:
        Units: as the input's. The first SPADE and the shortcut's normalise the same features
        without parameters, so this is done once, and before they are enlarged. Gradients: any
        order.

    Source:
        OASIS's generator block (Schönfeld et al., ICLR 2021), kept by DP-SIMS (Berrada et al.,
        CVPR 2024, Sec. A.1, Table S2). Theirs -> ours: fin -> in_channels, fout -> out_channels,
        conv_s -> shortcut.

    Example:
        >>> import torch
        >>> block = SPADEResBlock(8, 4, 5)
        >>> features, cond = torch.randn(2, 8, 6, 12), torch.randn(2, 5, 6, 12)
        >>> block(features, cond).shape
        torch.Size([2, 4, 6, 12])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        cond_channels: int,
        *,
        hidden_channels: int | None = 128,
        kernel_size: int = 3,
        norm: str = "batch",
        ignore_index: int | None = 255,
    ) -> None:
        super().__init__()
        check_int("SPADEResBlock", "in_channels", in_channels)
        check_int("SPADEResBlock", "out_channels", out_channels)
        self.in_channels, self.cond_channels = in_channels, cond_channels
        self.ignore_index = ignore_index
        middle = min(in_channels, out_channels)

        def spade(channels: int) -> SPADE:
            return SPADE(
                channels,
                cond_channels,
                hidden_channels=hidden_channels,
                kernel_size=kernel_size,
                norm="none",
                ignore_index=ignore_index,
            )

        self.norm_0 = make_norm("SPADEResBlock", in_channels, norm)
        self.spade_0 = spade(in_channels)
        self.conv_0 = nn.Conv2d(in_channels, middle, 3, padding=1)
        self.norm_1 = make_norm("SPADEResBlock", middle, norm)
        self.spade_1 = spade(middle)
        self.conv_1 = nn.Conv2d(middle, out_channels, 3, padding=1)
        self.spade_s: SPADE | None = None
        self.conv_s: nn.Conv2d | None = None
        if in_channels != out_channels:
            self.spade_s = spade(in_channels)
            self.conv_s = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(
        self,
        features: Float[Tensor, "B C _ _"],
        cond: Float[Tensor, "B Cc H W"] | Sequence[Tensor],
        *,
        upsample: int = 1,
    ) -> Float[Tensor, "B Cout H W"]:
        """Run the block; see the class."""
        check_spade_inputs(self, "SPADEResBlock", features, self.in_channels, cond, upsample)
        spades = [s for s in (self.spade_0, self.spade_1, self.spade_s) if s is not None]
        first, second, *last = modulation_inputs(spades, cond, self.ignore_index)
        maps = normalize_lazily(self.norm_0, features, upsample)
        hidden = self.conv_0(self.spade_0._modulate(maps, first, _SLOPE))
        if self.spade_s is not None and self.conv_s is not None:
            shortcut = self.conv_s(self.spade_s._modulate(maps, last[0]))
        else:
            shortcut = enlarged(features, upsample)
        hidden = self.spade_1._modulate(normalize_lazily(self.norm_1, hidden), second, _SLOPE)
        return shortcut + self.conv_1(hidden)
