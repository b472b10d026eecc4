"""The DP-SIMS generator, composed of public parts of dpsims (Fig. 3, Table S2)."""

from __future__ import annotations

import itertools
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor, nn

from dpsims.nn import (
    LabelConv2d,
    LabelMapPyramid,
    NoiseMapper,
    SPADEResBlock,
    spectral_normalize_,
    sphere_normalize,
)
from dpsims.nn.labels import resize_labels
from dpsims_reference.config import Config
from dpsims_reference.networks import GeneratorOutput, ImageGenerator
from dpsims_reference.oasis import OasisGenerator

LEAKY_SLOPE = 0.2


class Generator(ImageGenerator):
    r"""Synthesise images from label maps and latents.

    A label pyramid, into which the noise is injected, modulates an image branch of SPADE residual
    blocks that starts from the label map at low resolution. There is no tanh: images are meant to
    lie in [-1, 1] but may exceed it.

    Args:
        num_classes: Number ``K`` of classes.
        image_size: Training height and width; the height decides which levels carry attention.
        extra_channels: Maps fed beside the labels (2 for instance offsets).
        channels: Width of the first features, then of each residual block's output.
        pyramid_channels: Width of the label pyramid.
        attention_size: Largest map height that carries attention.
        latent_dim: Width ``Z`` of a latent.
        token_dim: Width of a noise token.
        num_tokens: Noise tokens per image.
        latent_radius: Length that latents are scaled to; ``None`` means ``sqrt(Z)``.
        spade_hidden: Width of SPADE's hidden convolution, ``None`` for none.
        spade_kernel: Kernel size of SPADE's convolutions.
        norm: Normalisation inside SPADE and the pyramid.
        self_attention: Whether attention levels also attend over themselves.
        injection: How the latent enters: as tokens through cross-attention, or spread over the
            label map and joined to it.
        spatial_noise: Channels of standard normal noise per pixel beside the label map.
        spectral_norm: Spectral normalisation of every convolution and linear layer.

    Shape:
        - labels ``(B, H, W)`` integers; latents ``(B, Z)``; extra ``(B, extra_channels, H, W)``;
          noise ``(B, spatial_noise, H, W)``
        - images ``(B, 3, H, W)``; features ``(B, channels[-1], H, W)``; H and W divisible by
          ``2 ** (len(channels) - 2)``

    Source:
        Berrada et al., CVPR 2024, Sec. 3.2, Fig. 3, Table S2; residual blocks of OASIS (A.1).
    """

    def __init__(
        self,
        num_classes: int,
        *,
        image_size: tuple[int, int] = (256, 256),
        extra_channels: int = 0,
        channels: tuple[int, ...] = (1024, 1024, 1024, 512, 256, 128, 64),
        pyramid_channels: int = 64,
        attention_size: int = 64,
        latent_dim: int = 64,
        token_dim: int = 256,
        num_tokens: int = 8,
        latent_radius: float | None = None,
        spade_hidden: int | None = 128,
        spade_kernel: int = 3,
        norm: str = "batch",
        self_attention: bool = True,
        injection: Literal["cross_attention", "concatenation"] = "cross_attention",
        spatial_noise: int = 0,
        spectral_norm: bool = True,
    ) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.spatial_noise = spatial_noise
        self.latent_radius = latent_radius
        self.image_size = image_size
        self.mapper: NoiseMapper | None = None
        if injection == "cross_attention":
            self.mapper = NoiseMapper(
                latent_dim, token_dim, num_tokens=num_tokens, radius=latent_radius
            )
        spread = 0 if self.mapper is not None else latent_dim
        self.pyramid = LabelMapPyramid(
            num_classes,
            channels=pyramid_channels,
            token_dim=token_dim,
            num_levels=len(channels) - 1,
            image_size=image_size[0],
            attention_size=attention_size,
            extra_channels=extra_channels + spatial_noise + spread,
            norm=norm,
            self_attention=self_attention,
            cross_attention=self.mapper is not None,
        )
        self.stem = LabelConv2d(num_classes, channels[0], extra_channels=extra_channels)
        self.blocks = nn.ModuleList(
            SPADEResBlock(
                wide,
                narrow,
                2 * pyramid_channels,
                hidden_channels=spade_hidden,
                kernel_size=spade_kernel,
                norm=norm,
            )
            for wide, narrow in itertools.pairwise(channels)
        )
        self.to_rgb = nn.Conv2d(channels[-1], 3, 3, padding=1)
        if spectral_norm:
            spectral_normalize_(self)

    def forward(
        self,
        labels: Integer[Tensor, "B H W"],
        latents: Float[Tensor, "B Z"],
        extra: Float[Tensor, "B E H W"] | None = None,
        noise: Float[Tensor, "B S H W"] | None = None,
    ) -> GeneratorOutput:
        """Images, and the features before the last convolution; see the class."""
        beside = [maps for maps in (extra, noise) if maps is not None]
        tokens = None if self.mapper is None else self.mapper(latents)
        if self.mapper is None:
            latents = sphere_normalize(latents, radius=self.latent_radius)
            beside.append(latents[:, :, None, None].expand(-1, -1, *labels.shape[1:]))
        levels = self.pyramid(labels, tokens, torch.cat(beside, 1) if beside else None)
        coarsest = levels[-1]
        size = coarsest.shape[-2:]
        small = None if extra is None else F.adaptive_avg_pool2d(extra, size)
        features = self.stem(resize_labels(labels, size), small)
        for block, level in zip(self.blocks, reversed(levels), strict=True):
            times = level.shape[-2] // features.shape[-2]
            features = block(features, (level, coarsest), upsample=times)
        features = F.leaky_relu(features, LEAKY_SLOPE)
        return GeneratorOutput(self.to_rgb(features), features)


def build_generator(config: Config) -> ImageGenerator:
    """The generator of a configuration."""
    part = config.generator
    if part.architecture == "oasis":
        return OasisGenerator(
            config.data.num_classes,
            extra_channels=2 if config.data.instances else 0,
            channels=part.channels,
            latent_dim=part.latent_dim,
            spade_hidden=part.spade_hidden,
            spade_kernel=part.spade_kernel,
            norm=part.norm,
            spectral_norm=part.spectral_norm,
        )
    return Generator(
        config.data.num_classes,
        image_size=config.data.image_size,
        extra_channels=2 if config.data.instances else 0,
        channels=part.channels,
        pyramid_channels=part.pyramid_channels,
        attention_size=part.attention_size,
        latent_dim=part.latent_dim,
        token_dim=part.token_dim,
        num_tokens=part.num_tokens,
        latent_radius=part.latent_radius,
        spade_hidden=part.spade_hidden,
        spade_kernel=part.spade_kernel,
        norm=part.norm,
        self_attention=part.self_attention,
        injection=part.injection,
        spatial_noise=part.spatial_noise,
        spectral_norm=part.spectral_norm,
    )
