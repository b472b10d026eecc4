"""The DP-SIMS discriminator, composed of public parts of dpsims (Fig. 2, Table S3)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from dpsims.nn import ConditionedBackbone, UNetDecoder, spectral_normalize_
from dpsims_reference.config import Config


class Discriminator(nn.Module):
    """Tell every pixel's class, or that it is fake.

    A frozen backbone with conditioned features, and a trained UNet decoder with a path at full
    resolution. :meth:`encode` and :meth:`decode` are apart so that the features of a fake image
    can serve both halves of a training step.

    Args:
        backbone: The conditioned backbone.
        num_classes: Number ``K`` of classes.
        widths: Decoder widths, fine to coarse; ``None`` takes the backbone's channels.
        full_res_channels: Width of the full-resolution path.
        head_channels: Width before the last convolution.
        spectral_norm: Spectral normalisation of every trained convolution.
        checkpoint_decoder: Compute the decoder twice instead of keeping its activations.

    Shape:
        - images ``(B, 3, H, W)`` in [-1, 1]; logits ``(B, K + 1, H, W)``, the fake class last

    Source:
        Berrada et al., CVPR 2024, Sec. 3.1, Fig. 2, Table S3.
    """

    def __init__(
        self,
        backbone: ConditionedBackbone,
        num_classes: int,
        *,
        widths: tuple[int, ...] | None = None,
        full_res_channels: int = 128,
        head_channels: int = 256,
        spectral_norm: bool = True,
        checkpoint_decoder: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.decoder = UNetDecoder(
            backbone.channels,
            backbone.reductions,
            num_classes + 1,
            full_res_channels=full_res_channels,
            head_channels=head_channels,
            widths=widths,
            checkpoint=checkpoint_decoder,
        )
        if spectral_norm:
            spectral_normalize_(self.decoder)

    def encode(self, images: Float[Tensor, "B 3 H W"]) -> list[Tensor]:
        """The conditioned features of ``images``, fine to coarse."""
        features: list[Tensor] = self.backbone(images)
        return features

    def decode(
        self, images: Float[Tensor, "B 3 H W"], features: list[Tensor]
    ) -> Float[Tensor, "B K+1 H W"]:
        """The logits of ``images`` whose features are known."""
        logits: Tensor = self.decoder(images, features)
        return logits

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B K+1 H W"]:
        """The logits of ``images``."""
        return self.decode(images, self.encode(images))


def build_discriminator(config: Config) -> Discriminator:
    """The discriminator of a configuration, with its backbone's weights."""
    part = config.discriminator
    backbone = ConditionedBackbone(
        part.backbone,
        pretrained=part.pretrained,
        weights=part.weights,
        nonlinearity=part.nonlinearity,
        norm=part.norm,
    )
    return Discriminator(
        backbone,
        config.data.num_classes,
        widths=part.widths,
        full_res_channels=part.full_res_channels,
        head_channels=part.head_channels,
        spectral_norm=part.spectral_norm,
        checkpoint_decoder=part.checkpoint_decoder,
    )
