"""The trainable half of the discriminator: a UNet decoder with a full-resolution path."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dpsims._checks import check_bool, check_int, check_ints, check_tensor
from dpsims._levels import check_levels
from dpsims.errors import InputError
from dpsims.nn._checkpointing import checkpointed

_SLOPE = 0.2


class _ResidualBlock(nn.Module):
    """Conv3x3, LeakyReLU, Conv1x1, LeakyReLU, added to the (projected) input."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        # in place: each activation is kept once for the backward, which matters at full resolution
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
            nn.LeakyReLU(_SLOPE, inplace=True),
            nn.Conv2d(out_channels, out_channels, 1),
            nn.LeakyReLU(_SLOPE, inplace=True),
        )
        same = in_channels == out_channels
        self.shortcut = (
            nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1, bias=False)
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.shortcut(features) + self.body(features)


class UNetDecoder(nn.Module):
    r"""Turn an image and its backbone features into one vector of logits per pixel.

    From coarse to fine, every scale joins its backbone map with the result of the scale below and
    runs one residual block. Two shallow residual blocks look at the image itself, so that detail
    which the backbone drops still counts. A last block joins both at full resolution, and a 1x1
    convolution predicts the logits. Maps are resized to the actual size of what they join, never
    by a factor: any image size works, odd ones too.

    Args:
        channels: Widths of the backbone maps, fine to coarse (``ConditionedBackbone.channels``).
            Any number of levels from one on.
        reductions: Nominal strides of the same maps, which must not decrease. They only guard the
            order; sizes are taken from the maps.
        num_outputs: Number of logits per pixel: ``K + 1`` for the pixel loss, fake class last.
        full_res_channels: Width of the path that looks at the image (paper: 128).
        head_channels: Width of the last block, before the logits (paper: 256).
        widths: Widths of the blocks, fine to coarse. ``None`` means ``channels``, as in the paper.
        checkpoint: Keep only what goes into each block, and compute the rest again in the backward
            pass: less memory for about a third more time. Outputs, gradients and spectral norms
            stay the same bit for bit. Cannot be compiled.

    Shape:
        - images ``(B, 3, H, W)``; features: one ``(B, channels[l], h_l, w_l)`` per level, no map
          larger than the one before; output ``(B, num_outputs, H, W)``

    Raises:
        InputError: Sequences of different lengths, reductions that decrease, a count below 1, a
            map of the wrong width, batch size or order, an empty axis.
        DTypeError: Not an int, not a list of maps, or a dtype that is not floating-point.

    Note:
        Units: logits in nats, unbounded. Images in [-1, 1], RGB.
        Cost: ``O(B H W)``; the last block's 3x3 convolution at full resolution dominates. Memory
        is linear in the pixels. Gradients: any order, to the images and to the features.
        Logits keep the memory format of the inputs. Apply :func:`dpsims.nn.spectral_normalize_` to
        the decoder for the paper's spectral norm.

    Source:
        Berrada et al., CVPR 2024, Sec. 3.1, Fig. 2, App. A.1, Table S3 ("number of residual blocks
        5": one per scale and the one at full resolution; "penultimate channel dimension 256").
        Theirs -> ours: C_l -> channels[l], C + 1 -> num_outputs. Not in the paper: where the
        residual is added (after the last LeakyReLU), its 1x1 projection without bias when widths
        differ, nearest upsampling, and the 1x1 kernel of the last convolution.

    Example:
        >>> decoder = UNetDecoder([4, 8], [4, 8], 3, full_res_channels=4, head_channels=8)
        >>> images = torch.randn(2, 3, 33, 30)
        >>> features = [torch.randn(2, 4, 9, 8), torch.randn(2, 8, 5, 4)]
        >>> decoder(images, features).shape
        torch.Size([2, 3, 33, 30])
    """

    def __init__(
        self,
        channels: Sequence[int],
        reductions: Sequence[int],
        num_outputs: int,
        *,
        full_res_channels: int = 128,
        head_channels: int = 256,
        widths: Sequence[int] | None = None,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        widths = channels if widths is None else widths
        for name, values in (
            ("channels", channels),
            ("reductions", reductions),
            ("widths", widths),
        ):
            check_ints("UNetDecoder", name, values)
            if len(values) != len(channels):
                msg = (
                    f"UNetDecoder: {name} must have one entry per level ({len(channels)}, as "
                    f"channels); got {len(values)}"
                )
                raise InputError(msg)
        if list(reductions) != sorted(reductions):
            msg = f"UNetDecoder: reductions must run from fine to coarse; got {list(reductions)}"
            raise InputError(msg)
        check_int("UNetDecoder", "num_outputs", num_outputs)
        check_int("UNetDecoder", "full_res_channels", full_res_channels)
        check_int("UNetDecoder", "head_channels", head_channels)
        check_bool("UNetDecoder", "checkpoint", checkpoint)
        self.checkpoint = checkpoint
        self.channels = list(channels)
        self.reductions = list(reductions)
        self.num_outputs = num_outputs
        from_below = [*widths[1:], 0]
        self.blocks = nn.ModuleList(
            _ResidualBlock(skip + below, width)
            for skip, below, width in zip(channels, from_below, widths, strict=True)
        )
        self.full_res = nn.Sequential(
            _ResidualBlock(3, full_res_channels),
            _ResidualBlock(full_res_channels, full_res_channels),
        )
        self.fuse = _ResidualBlock(widths[0] + full_res_channels, head_channels)
        self.head = nn.Conv2d(head_channels, num_outputs, 1)

    def forward(
        self,
        images: Float[Tensor, "B 3 H W"],
        features: Sequence[Float[Tensor, "B _ _ _"]],
    ) -> Float[Tensor, "B num_outputs H W"]:
        """Logits at the resolution of ``images``."""
        check_tensor("UNetDecoder", "images", images, "B C H W", C=3)
        check_levels("UNetDecoder", "features", features, self.channels, like=images, ordered=True)
        state = self._run([self.blocks[-1]], features[-1])
        for block, skip in zip(self.blocks[-2::-1], features[-2::-1], strict=True):
            state = self._run([block], skip, state)
        for block in self.full_res:
            images = self._run([block], images)
        return self._run([self.fuse, self.head], images, state)

    def _run(self, layers: list[nn.Module], *maps: Tensor) -> Tensor:
        """The layers, one after the other, on the joined maps."""

        def run(*maps: Tensor) -> Tensor:
            state = _join(*maps) if len(maps) > 1 else maps[0]
            for layer in layers:
                state = layer(state)
            return state

        return checkpointed(layers, run, *maps) if self.checkpoint else run(*maps)


def _join(skip: Tensor, coarse: Tensor) -> Tensor:
    # "nearest-exact" commutes with flips at odd sizes too; at integer factors it is "nearest"
    size = skip.shape[-2:]
    if coarse.shape[-2:] != size:
        coarse = F.interpolate(coarse, size=size, mode="nearest-exact")
    return torch.cat([skip, coarse], dim=1)
