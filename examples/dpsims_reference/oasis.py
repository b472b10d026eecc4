"""OASIS's generator and discriminator, which Table 6 puts in place of the paper's own."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor, nn

from dpsims._checks import check_int, check_tensor
from dpsims.errors import InputError
from dpsims.nn import SPADE, LabelConv2d, SPADEResBlock, spectral_normalize_
from dpsims_reference.networks import GeneratorOutput, ImageGenerator, PixelDiscriminator
from dpsims_reference.oasis_blocks import LEAKY_SLOPE, DownBlock, UpBlock

# outputs of the discriminator's blocks, in units of the narrowest: fine to coarse, and back
_ENCODER_FACTORS = (2, 2, 4, 4, 8, 8)
_DECODER_FACTORS = (8, 4, 4, 2, 2, 1)


class OasisGenerator(ImageGenerator):
    r"""Synthesise images by SPADE blocks that read the label map and the latent directly.

    The latent stands at every pixel beside the one-hot label map ("3D noise"); every block sees
    both, at its own size. Images go through a hyperbolic tangent.

    Args:
        num_classes: Number ``K`` of classes.
        extra_channels: Maps fed beside the labels (2 for instance offsets).
        channels: Width of the first features, then of each residual block's output.
        latent_dim: Width ``Z`` of a latent, used as it is. 0 means no noise.
        spade_hidden: Width of SPADE's hidden convolution, ``None`` for none.
        spade_kernel: Kernel size of SPADE's convolutions.
        norm: Normalisation inside SPADE.
        spectral_norm: Spectral normalisation of the blocks' own convolutions.

    Shape:
        - labels ``(B, H, W)`` integers; latents ``(B, Z)``; extra ``(B, extra_channels, H, W)``;
          noise must be ``None``
        - images ``(B, 3, H, W)``; features ``(B, channels[-1], H, W)``; H and W divisible by
          ``2 ** (len(channels) - 2)``

    Raises:
        InputError: A size that cannot be halved often enough; latents of another shape; noise.

    Source:
        Schönfeld et al., ICLR 2021 (OASIS), Sec. 3.3, App. A. Maps are made smaller by taking the
        first pixel of every square. As there, SPADE's convolutions, the first and the last layer
        have no spectral normalisation.

    Example:
        >>> generator = OasisGenerator(5, channels=(8, 8, 4), latent_dim=2)
        >>> generator(torch.zeros(2, 4, 8, dtype=torch.uint8), torch.randn(2, 2)).images.shape
        torch.Size([2, 3, 4, 8])
    """

    def __init__(
        self,
        num_classes: int,
        *,
        extra_channels: int = 0,
        channels: tuple[int, ...] = (1024, 1024, 1024, 512, 256, 128, 64),
        latent_dim: int = 64,
        spade_hidden: int | None = 128,
        spade_kernel: int = 3,
        norm: str = "batch",
        spectral_norm: bool = True,
    ) -> None:
        super().__init__()
        self.num_classes, self.latent_dim, self.spatial_noise = num_classes, latent_dim, 0
        beside = latent_dim + extra_channels
        self.stem = LabelConv2d(num_classes, channels[0], extra_channels=beside)
        self.blocks = nn.ModuleList(
            SPADEResBlock(
                wide,
                narrow,
                beside + num_classes,
                hidden_channels=spade_hidden,
                kernel_size=spade_kernel,
                norm=norm,
            )
            for wide, narrow in pairwise(channels)
        )
        self.to_rgb = nn.Conv2d(channels[-1], 3, 3, padding=1)
        if spectral_norm:
            spades = [module for module in self.modules() if isinstance(module, SPADE)]
            spectral_normalize_(self, skip=[*spades, self.stem, self.to_rgb])

    def forward(
        self,
        labels: Integer[Tensor, "B H W"],
        latents: Float[Tensor, "B Z"],
        extra: Float[Tensor, "B E H W"] | None = None,
        noise: Float[Tensor, "B S H W"] | None = None,
    ) -> GeneratorOutput:
        """Images, and the features before the last convolution; see the class."""
        step = 2 ** (len(self.blocks) - 1)
        self._check(labels, latents, noise, step)
        spread = latents[:, :, None, None]
        small = spread.expand(-1, -1, *labels[:, ::step, ::step].shape[1:])
        if extra is not None:
            small = torch.cat((small, extra[:, :, ::step, ::step]), 1)
        features = self.stem(labels[:, ::step, ::step], small if small.shape[1] else None)
        for block in self.blocks:
            maps = [labels[:, ::step, ::step]]
            if extra is not None:
                maps.insert(0, extra[:, :, ::step, ::step])
            if self.latent_dim:
                maps.insert(0, spread)
            times = maps[-1].shape[-1] // features.shape[-1]
            features = block(features, maps, upsample=times)
            step //= 2
        features = F.leaky_relu(features, LEAKY_SLOPE)
        return GeneratorOutput(torch.tanh(self.to_rgb(features)), features)

    def _check(self, labels: Tensor, latents: Tensor, noise: Tensor | None, step: int) -> None:
        owner = "OasisGenerator"
        check_tensor(owner, "labels", labels, "B H W", kind="integer")
        # not len(labels), which would bind an exported program to one batch size
        shape = (labels.shape[0], self.latent_dim)
        if latents.shape != shape:
            msg = f"{owner}: latents must have shape {shape}; got {tuple(latents.shape)}"
            raise InputError(msg)
        _check_divisible(owner, "labels", labels, step)
        if noise is not None:
            msg = f"{owner}: noise must be None; got {tuple(noise.shape)}"
            raise InputError(msg)


class OasisDiscriminator(PixelDiscriminator):
    """Tell every pixel's class, or that it is fake, by a UNet of residual blocks.

    Nothing in it is frozen, so everything runs in :meth:`decode`.

    Args:
        num_classes: Number ``K`` of classes.
        channels: Width of the narrowest block; the widest is eight times as wide.
        spectral_norm: Spectral normalisation of the blocks' convolutions.

    Shape:
        - images ``(B, 3, H, W)``, H and W divisible by 64; logits ``(B, K + 1, H, W)``, the fake
          class last

    Raises:
        InputError: A height or width that is not divisible by 64; a count below 1.

    Source:
        Schönfeld et al., ICLR 2021 (OASIS), Sec. 3.1, App. A: six blocks down, six up, with skip
        connections. As there, the last layer has no spectral normalisation. OASIS puts the fake
        class first.

    Example:
        >>> OasisDiscriminator(5, channels=2)(torch.randn(1, 3, 64, 128)).shape
        torch.Size([1, 6, 64, 128])
    """

    def __init__(
        self, num_classes: int, *, channels: int = 64, spectral_norm: bool = True
    ) -> None:
        super().__init__()
        check_int("OasisDiscriminator", "num_classes", num_classes)
        check_int("OasisDiscriminator", "channels", channels)
        down = [channels * factor for factor in _ENCODER_FACTORS]
        up = [channels * factor for factor in _DECODER_FACTORS]
        self.encoder = nn.ModuleList(
            DownBlock(wide, narrow, activated=level > 0)
            for level, (wide, narrow) in enumerate(pairwise([3, *down]))
        )
        # every block but the deepest also reads the encoder's map of its size
        skips = zip(up[:-1], down[-2::-1], strict=True)
        inputs = [down[-1], *(below + skip for below, skip in skips)]
        self.decoder = nn.ModuleList(map(UpBlock, inputs, up))
        self.head = nn.Conv2d(up[-1], num_classes + 1, 1)
        if spectral_norm:
            spectral_normalize_(self, skip=[self.head])

    @property
    def identity(self) -> dict[str, str | None]:
        """There is no frozen network, only the discriminator's name."""
        return {"model": "oasis", "weights_source": None, "weights_sha256": None}

    @property
    def frozen_channels(self) -> tuple[int, ...]:
        """Nothing is frozen."""
        return ()

    def encode(self, images: Float[Tensor, "B 3 H W"]) -> list[Tensor]:  # noqa: ARG002
        """Nothing is frozen, so there are no features to keep."""
        return []

    def decode(
        self,
        images: Float[Tensor, "B 3 H W"],
        features: list[Tensor],  # noqa: ARG002
    ) -> Float[Tensor, "B K+1 H W"]:
        """The logits of ``images``."""
        check_tensor("OasisDiscriminator", "images", images, "B C H W", C=3)
        _check_divisible("OasisDiscriminator", "images", images, 2 ** len(self.encoder))
        downs: list[Tensor] = []
        for block in self.encoder:
            downs.append(block(downs[-1] if downs else images))
        hidden = self.decoder[0](downs.pop())
        for block, skip in zip(self.decoder[1:], reversed(downs), strict=True):
            hidden = block(torch.cat((skip, hidden), 1))
        logits: Tensor = self.head(hidden)
        return logits


def _check_divisible(owner: str, name: str, maps: Tensor, step: int) -> None:
    height, width = maps.shape[-2:]
    if height % step or width % step:
        msg = f"{owner}: {name} must have height and width divisible by {step}; got "
        raise InputError(f"{msg}{height}x{width}")
