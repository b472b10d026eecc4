"""The DP-SIMS discriminator, composed of public parts of dpsims (Fig. 2, Table S3)."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

from dpsims.nn import (
    ConditionedBackbone,
    CrossChannelMixing,
    CrossScaleMixing,
    UNetDecoder,
    spectral_normalize_,
)
from dpsims_reference.config import Config
from dpsims_reference.networks import PixelDiscriminator
from dpsims_reference.oasis import OasisDiscriminator


class Discriminator(PixelDiscriminator):
    """Tell every pixel's class, or that it is fake.

    A backbone with conditioned features, and a trained UNet decoder with a path at full
    resolution. The frozen backbone runs in :meth:`encode`, a fine-tuned one in :meth:`decode`.

    Args:
        backbone: The conditioned backbone, frozen or not.
        num_classes: Number ``K`` of classes.
        mixing_channels: Width of the finest map behind Projected GAN's random mixing of channels
            and scales; ``None`` leaves the mixing out.
        widths: Decoder widths, fine to coarse; ``None`` takes the backbone's channels.
        full_res_channels: Width of the full-resolution path.
        head_channels: Width before the last convolution.
        spectral_norm: Spectral normalisation of every convolution of the decoder.
        checkpoint_decoder: Compute the decoder twice instead of keeping its activations.

    Shape:
        - images ``(B, 3, H, W)`` in [-1, 1]; logits ``(B, K + 1, H, W)``, the fake class last

    Source:
        Berrada et al., CVPR 2024, Sec. 3.1, Fig. 2, Table S3; mixing: Table 5; fine-tuned
        backbones: Table S6.
    """

    def __init__(
        self,
        backbone: ConditionedBackbone,
        num_classes: int,
        *,
        mixing_channels: int | None = None,
        widths: tuple[int, ...] | None = None,
        full_res_channels: int = 128,
        head_channels: int = 256,
        spectral_norm: bool = True,
        checkpoint_decoder: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.mixing: nn.Sequential | None = None
        channels, reductions = list(backbone.channels), list(backbone.reductions)
        if mixing_channels is not None:
            across_channels = CrossChannelMixing(channels, out_channels=mixing_channels)
            across_scales = CrossScaleMixing(across_channels.channels)
            self.mixing = nn.Sequential(across_channels, across_scales)
            # every level takes the size of the next finer one, the finest doubles its own
            channels = across_scales.channels
            reductions = [max(reductions[0] // 2, 1), *reductions[:-1]]
        self.decoder = UNetDecoder(
            channels,
            reductions,
            num_classes + 1,
            full_res_channels=full_res_channels,
            head_channels=head_channels,
            widths=widths,
            checkpoint=checkpoint_decoder,
        )
        if spectral_norm:
            spectral_normalize_(self.decoder)

    @property
    def identity(self) -> dict[str, str | None]:
        """The backbone's name and the hash of its first weights."""
        return self.backbone.identity

    @property
    def frozen_channels(self) -> tuple[int, ...]:
        """Widths of the maps of a frozen backbone; none of a fine-tuned one."""
        return tuple(self.backbone.channels) if self.backbone.frozen else ()

    @property
    def frozen_part(self) -> Callable[[Tensor], list[Tensor]]:
        """The frozen backbone itself, which can be compiled alone."""
        return self.backbone if self.backbone.frozen else self.encode

    @property
    def trained_part(self) -> nn.Module:
        """The decoder where nothing else is trained, so that the rest may be sharded."""
        return self.decoder if self.backbone.frozen and self.mixing is None else self

    def encode(self, images: Float[Tensor, "B 3 H W"]) -> list[Tensor]:
        """The maps of a frozen backbone, fine to coarse; none of a fine-tuned one."""
        if not self.backbone.frozen:
            return []
        features: list[Tensor] = self.backbone(images)
        return features

    def decode(
        self, images: Float[Tensor, "B 3 H W"], features: list[Tensor]
    ) -> Float[Tensor, "B K+1 H W"]:
        """The logits of ``images`` whose frozen features are known."""
        if not self.backbone.frozen:
            features = self.backbone(images)
        if self.mixing is not None:
            features = self.mixing(features)
        logits: Tensor = self.decoder(images, features)
        return logits


def build_discriminator(config: Config) -> PixelDiscriminator:
    """The discriminator of a configuration, with its backbone's weights."""
    part = config.discriminator
    if part.architecture == "oasis":
        return OasisDiscriminator(
            config.data.num_classes,
            channels=part.oasis_channels,
            spectral_norm=part.spectral_norm,
        )
    backbone = ConditionedBackbone(
        part.backbone,
        pretrained=part.pretrained,
        weights=part.weights,
        nonlinearity=part.nonlinearity,
        norm=part.norm,
        frozen=part.frozen,
    )
    return Discriminator(
        backbone,
        config.data.num_classes,
        mixing_channels=part.mixing_channels,
        widths=part.widths,
        full_res_channels=part.full_res_channels,
        head_channels=part.head_channels,
        spectral_norm=part.spectral_norm,
        checkpoint_decoder=part.checkpoint_decoder,
    )
