"""Spatially-adaptive normalisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dpsims._checks import check_int, check_tensor
from dpsims.errors import InputError
from dpsims.nn._spade_inputs import check_spade_inputs, modulation_inputs
from dpsims.nn._spade_tail import Unmodulated, modulate, normalize_lazily
from dpsims.nn.norm import make_norm
from dpsims.ops.spade_tail.api import ChannelStatistics


def spade_modulate(
    normalized: Float[Tensor, "B C H W"],
    gamma: Float[Tensor, "B C H W"],
    beta: Float[Tensor, "B C H W"],
) -> Float[Tensor, "B C H W"]:
    r"""Scale by one plus ``gamma`` and shift by ``beta``, pixel by pixel.

    Args:
        normalized: Features after a normalisation without learned scale.
        gamma: Scale minus one, so that 0 changes nothing.
        beta: Shift.

    Shape:
        - normalized, gamma, beta ``(B, C, H, W)``; output the same, in the dtype of ``normalized``

    Raises:
        InputError: The shapes differ.
        DTypeError: Not floating-point tensors.

    Note:
        Units: ``gamma`` and ``beta`` are in standard deviations of a channel, if ``normalized`` is
        what it says. Cost: ``O(B C H W)``. Gradients: any order.

    Source:
        Park et al., CVPR 2019, Eq. 1, with the ``1 +`` of its published code.

    Example:
        >>> features = torch.randn(2, 3, 4, 4)
        >>> zeros = torch.zeros_like(features)
        >>> torch.equal(spade_modulate(features, zeros, zeros), features)
        True
    """
    check_tensor("spade_modulate", "normalized", normalized, "B C H W")
    b, c, h, w = normalized.shape
    for name, value in (("gamma", gamma), ("beta", beta)):
        check_tensor("spade_modulate", name, value, "B C H W", like=normalized, B=b, C=c, H=h, W=w)
    return torch.addcmul(beta, normalized, 1 + gamma).to(normalized.dtype)


class SPADE(nn.Module):
    r"""Normalise features, then scale and shift every pixel as a conditioning map says.

    A convolution and a ReLU turn the map into a hidden one; one more convolution turns that into
    ``gamma`` and ``beta``, and the output is ``norm(features) * (1 + gamma) + beta``.

    Args:
        channels: Width ``C`` of the features.
        cond_channels: Width ``Cc`` of the conditioning map.
        hidden_channels: Width of the hidden map. ``None`` leaves it out.
        kernel_size: Side of both convolutions, odd.
        norm: ``"batch"``, ``"sync_batch"`` (statistics over all processes), ``"instance"`` or
            ``"none"``; never with a learned scale.
        ignore_index: Id of unlabelled pixels, where ``cond`` holds a label map.

    Shape:
        - features ``(B, C, H, W)``; cond ``(B, Cc, H, W)``; output ``(B, C, H, W)``
        - cond may be a tuple of maps to join, small ones and a label map among them, as in
          :func:`dpsims.nn.joined_conv2d`
        - with ``upsample=n`` in the call, features are first enlarged n times by nearest
          neighbours; cond and output have the enlarged size

    Raises:
        InputError: A size out of range; ``cond`` of another height, width or batch size than
            ``features`` (resize it first: nearest for class maps, bilinear for features).
        DTypeError: Not a floating-point tensor.

    Note:
        Units: ``gamma`` and ``beta`` are in standard deviations of a channel. Cost:
        ``O(B H W k^2 h (Cc + 2 C))`` for hidden width ``h``. Gradients: any order. Weights start
        as those of :class:`torch.nn.Conv2d`. The first ``C`` outputs of ``modulation`` are
        ``gamma``, the others ``beta``.

    Source:
        Park et al., CVPR 2019, Eq. 1-2; hidden width and placement as in OASIS (Schönfeld et al.,
        ICLR 2021), which DP-SIMS keeps (Berrada et al., CVPR 2024, Sec. A.1).
        Theirs -> ours: segmap -> cond, nhidden -> hidden_channels, mlp_shared -> hidden,
        mlp_gamma and mlp_beta -> the two halves of modulation.

    Example:
        >>> spade = SPADE(8, 5, hidden_channels=16)
        >>> features, cond = torch.randn(2, 8, 6, 12), torch.randn(2, 5, 6, 12)
        >>> spade(features, cond).shape
        torch.Size([2, 8, 6, 12])
    """

    def __init__(
        self,
        channels: int,
        cond_channels: int,
        *,
        hidden_channels: int | None = 128,
        kernel_size: int = 3,
        norm: str = "batch",
        ignore_index: int | None = 255,
    ) -> None:
        super().__init__()
        check_int("SPADE", "channels", channels)
        check_int("SPADE", "cond_channels", cond_channels)
        if hidden_channels is not None:
            check_int("SPADE", "hidden_channels", hidden_channels)
        check_int("SPADE", "kernel_size", kernel_size)
        if kernel_size % 2 == 0:
            msg = f"SPADE: kernel_size must be odd, to keep the size of the map; got {kernel_size}"
            raise InputError(msg)
        if ignore_index is not None:
            check_int("SPADE", "ignore_index", ignore_index, minimum=None)
        self.channels, self.cond_channels = channels, cond_channels
        self.ignore_index = ignore_index
        self.norm = make_norm("SPADE", channels, norm)
        width, padding = cond_channels, kernel_size // 2
        self.hidden: nn.Conv2d | None = None
        if hidden_channels is not None:
            self.hidden = nn.Conv2d(cond_channels, hidden_channels, kernel_size, padding=padding)
            width = hidden_channels
        # gamma and beta read the same map: one convolution is one pass over it
        self.modulation = nn.Conv2d(width, 2 * channels, kernel_size, padding=padding)

    def forward(
        self,
        features: Float[Tensor, "B C _ _"],
        cond: Float[Tensor, "B Cc H W"] | Sequence[Tensor],
        *,
        upsample: int = 1,
        statistics: ChannelStatistics | None = None,
        slope: float = 1.0,
    ) -> Float[Tensor, "B C H W"]:
        """Normalise and modulate the features; see the class.

        Args:
            features: Maps to normalise.
            cond: Conditioning map or maps.
            upsample: How often rows and columns of the features are repeated.
            statistics: Moments to normalise by instead of the module's own norm, as by
                :meth:`BatchNorm2d.statistics`, for several SPADEs of the same features.
            slope: Slope below 0 of a LeakyReLU behind the modulation; 1 means none.
        """
        check_spade_inputs(self, "SPADE", features, self.channels, cond, upsample)
        (read,) = modulation_inputs([self], cond, self.ignore_index)
        if statistics is None:
            maps = normalize_lazily(self.norm, features, upsample)
        else:
            maps = Unmodulated(features, statistics, upsample)
        return self._modulate(maps, read, slope)

    def _modulate(self, maps: Unmodulated, read: Tensor, slope: float = 1.0) -> Tensor:
        """Modulate maps by what ``modulation`` reads or, if it was first, gives; activate."""
        return modulate(maps, read if self.hidden is None else self.modulation(read), slope)
