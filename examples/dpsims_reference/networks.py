"""What the trainer asks of a generator and of a discriminator, whatever they are made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn


class GeneratorOutput(NamedTuple):
    """Images and the feature map they are made from (G^f of Eq. 6)."""

    images: Float[Tensor, "B 3 H W"]
    features: Float[Tensor, "B C H W"]


class ImageGenerator(nn.Module, ABC):
    """From label maps and latents to images; the base class of the generators.

    Attributes:
        latent_dim: Width ``Z`` of a latent.
        spatial_noise: Channels of per-pixel noise beside the label map, 0 for none.
        to_rgb: The last convolution.
    """

    latent_dim: int
    spatial_noise: int
    to_rgb: nn.Conv2d

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        # not the weight's: in training, looking at it takes a step of its spectral norm
        assert self.to_rgb.bias is not None
        return self.to_rgb.bias.device

    @abstractmethod
    def forward(
        self,
        labels: Integer[Tensor, "B H W"],
        latents: Float[Tensor, "B Z"],
        extra: Float[Tensor, "B E H W"] | None = None,
        noise: Float[Tensor, "B S H W"] | None = None,
    ) -> GeneratorOutput:
        """Images, and the features before the last convolution."""

    def sample_latents(self, count: int, *, generator: torch.Generator) -> Float[Tensor, "B Z"]:
        """``count`` standard normal latents from ``generator``, on the model's device."""
        drawn = torch.randn(count, self.latent_dim, generator=generator, device=generator.device)
        return drawn.to(self.device)

    def sample_noise(
        self, count: int, size: Sequence[int], *, generator: torch.Generator
    ) -> Float[Tensor, "B S H W"] | None:
        """Per-pixel noise for ``count`` maps of ``size``; ``None`` if the model takes none."""
        if not self.spatial_noise:
            return None
        shape = (count, self.spatial_noise, *size)
        drawn = torch.randn(shape, generator=generator, device=generator.device)
        return drawn.to(self.device)


class PixelDiscriminator(nn.Module, ABC):
    """From images to one vector of logits per pixel; the base class of the discriminators.

    :meth:`encode` runs what is frozen and :meth:`decode` what is trained. The frozen features of a
    fake image serve both halves of a training step, while everything trained runs again after its
    update.
    """

    @property
    @abstractmethod
    def identity(self) -> dict[str, str | None]:
        """What a checkpoint needs to name the frozen network, as plain strings for JSON."""

    @property
    @abstractmethod
    def frozen_channels(self) -> tuple[int, ...]:
        """Widths of the maps that :meth:`encode` returns, fine to coarse."""

    @property
    def frozen_part(self) -> Callable[[Tensor], list[Tensor]]:
        """What :meth:`encode` runs."""
        return self.encode

    @property
    def trained_part(self) -> nn.Module:
        """What :meth:`decode` runs: a module of images and frozen features."""
        return self

    @abstractmethod
    def encode(self, images: Float[Tensor, "B 3 H W"]) -> list[Tensor]:
        """The features of ``images`` that no weight changes, fine to coarse; maybe none."""

    @abstractmethod
    def decode(
        self, images: Float[Tensor, "B 3 H W"], features: list[Tensor]
    ) -> Float[Tensor, "B K+1 H W"]:
        """The logits of ``images`` whose frozen features are known."""

    def forward(
        self, images: Float[Tensor, "B 3 H W"], features: list[Tensor] | None = None
    ) -> Float[Tensor, "B K+1 H W"]:
        """The logits of ``images``, whose frozen features may be known."""
        return self.decode(images, self.encode(images) if features is None else features)
