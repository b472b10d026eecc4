"""The three losses of DP-SIMS and their weights (Sec. 3.3, Sec. 4.1), without any loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from dpsims.errors import InputError
from dpsims.losses import (
    PatchInfoNCE,
    PixelFocalLoss,
    class_balance_weights,
    diversity_threshold,
    hinge_diversity_loss,
)
from dpsims.nn import ConditionedBackbone
from dpsims_reference.config import Config
from dpsims_reference.networks import GeneratorOutput, PixelDiscriminator
from dpsims_reference.parallel import Shard

# 1/4, 1/8 and 1/16 (Sec. 3.3)
_CONTRASTIVE_SCALES = 3
_WHOLE = Shard()


class Loss(NamedTuple):
    """A loss to minimise, and its unweighted terms for the log."""

    total: Float[Tensor, ""]
    terms: dict[str, Tensor]


class NoisePair(NamedTuple):
    """Two outputs of G for the same maps, with their latents."""

    first: GeneratorOutput
    second: GeneratorOutput
    first_latents: Float[Tensor, "B Z"]
    second_latents: Float[Tensor, "B Z"]


class Objective(nn.Module):
    """What the two networks minimise.

    Holds the contrastive projector, which trains with the generator, the frozen perceptual network
    and the hinge of the diversity loss.

    Args:
        config: The run.
        discriminator: The discriminator, whose features the contrastive loss may use.

    Source:
        Berrada et al., CVPR 2024, Eqs. (3)-(7), Sec. 4.1, Table S2.
    """

    def __init__(self, config: Config, discriminator: PixelDiscriminator) -> None:
        super().__init__()
        part = config.objective
        self.config = part
        self.pixel = PixelFocalLoss(
            config.data.num_classes,
            gamma=part.focal_gamma,
            balanced=part.balanced,
            label_smoothing=part.label_smoothing,
            sync=True,
            ignore_index=config.data.ignore_index,
        )
        self.perceptual: ConditionedBackbone | None = None
        self.contrastive: PatchInfoNCE | None = None
        if part.contrastive_weight > 0:
            self.perceptual, channels = self._contrastive_network(discriminator)
            self.contrastive = PatchInfoNCE(
                channels,
                embed_dim=part.embed_dim,
                num_patches=part.num_patches,
                num_negatives=part.num_patches,
                temperature=part.temperature,
                num_conv_blocks=part.projector_convs,
            )
        self.diversity_hinge = part.diversity_threshold

    def _contrastive_network(
        self, discriminator: PixelDiscriminator
    ) -> tuple[ConditionedBackbone | None, tuple[int, ...]]:
        if self.config.contrastive_features == "discriminator":
            channels = discriminator.frozen_channels[:_CONTRASTIVE_SCALES]
            if not channels:
                msg = (
                    "Objective: contrastive_features must name a perceptual network beside a "
                    "discriminator without a frozen backbone; got 'discriminator'"
                )
                raise InputError(msg)
            return None, channels
        network = ConditionedBackbone(
            self.config.contrastive_features,
            pretrained=self.config.contrastive_pretrained,
            out_indices=self.config.contrastive_levels,
            weights=self.config.contrastive_weights,
            nonlinearity="identity",
            norm="none",
        )
        return network, tuple(network.channels)

    def contrastive_maps(
        self, images: Tensor, discriminator_features: list[Tensor]
    ) -> list[Tensor]:
        """The maps that the contrastive loss compares, fine to coarse."""
        if self.contrastive is None:
            return []
        if self.perceptual is None:
            return discriminator_features[:_CONTRASTIVE_SCALES]
        maps: list[Tensor] = self.perceptual(images)
        return maps

    def class_weights(self, labels: Integer[Tensor, "B H W"]) -> Float[Tensor, " K"] | None:
        """The weights of a whole step's labels, counted over all processes."""
        if not self.pixel.balanced:
            return None
        return class_balance_weights(labels, self.pixel.num_classes, sync=True)

    def discriminator_loss(
        self,
        real_logits: Float[Tensor, "B K+1 H W"],
        fake_logits: Float[Tensor, "B K+1 H W"],
        labels: Integer[Tensor, "B H W"],
        *,
        class_weights: Float[Tensor, " K"] | None = None,
    ) -> Loss:
        """Eq. 3; ``class_weights`` replace those of ``labels``."""
        real, fake = self.pixel.discriminator_terms(
            real_logits, fake_logits, labels, class_weights=class_weights
        )
        return Loss(real + fake, {"d_real": real.detach(), "d_fake": fake.detach()})

    def generator_loss(
        self,
        fake_logits: Float[Tensor, "B K+1 H W"],
        labels: Integer[Tensor, "B H W"],
        fake_maps: list[Tensor],
        real_maps: list[Tensor],
        pair: NoisePair,
        *,
        generator: torch.Generator,
        class_weights: Float[Tensor, " K"] | None = None,
        contrastive: Callable[..., Tensor] | None = None,
        shard: Shard = _WHOLE,
    ) -> Loss:
        """Eqs. 4 to 6 with the weights of Sec. 4.1.

        Args:
            fake_logits: What D says of the fakes.
            labels: Their maps.
            fake_maps: Their perceptual features.
            real_maps: Those of the real images of the same maps.
            pair: For Eq. 6.
            generator: Draws the patches of Eq. 5.
            class_weights: As in :meth:`discriminator_loss`.
            contrastive: What to call instead of ``self.contrastive``.
            shard: Which rows of the step's batch these are.
        """
        part = self.config
        pixel = self.pixel.generator(fake_logits, labels, class_weights=class_weights)
        total = part.gan_weight * pixel
        terms = {"g_pixel": pixel.detach()}
        contrastive = self.contrastive if contrastive is None else contrastive
        if contrastive is not None:
            term = contrastive(fake_maps, real_maps, generator=generator, shard=shard)
            total = total + part.contrastive_weight * term
            terms["g_contrastive"] = term.detach()
        if part.diversity_weight > 0:
            if self.diversity_hinge is None:
                msg = "Objective: diversity_hinge must be set by calibrate() first; got None"
                raise InputError(msg)
            diversity = hinge_diversity_loss(
                *self._diversity_maps(pair),
                pair.first_latents,
                pair.second_latents,
                threshold=self.diversity_hinge,
            )
            total = total + part.diversity_weight * diversity
            terms["g_diversity"] = diversity.detach()
        return Loss(total, terms)

    def _diversity_maps(self, pair: NoisePair) -> tuple[Tensor, Tensor]:
        if self.config.diversity_space == "image":
            return pair.first.images, pair.second.images
        return pair.first.features, pair.second.features

    @torch.no_grad()
    def calibrate(self, outputs: list[tuple[GeneratorOutput, Tensor]]) -> float:
        """Set the hinge by Eq. 7: the mean over batches of (output, latents).

        Returns:
            The threshold that was set.
        """
        in_image = self.config.diversity_space == "image"
        found = [
            diversity_threshold(output.images if in_image else output.features, latents)
            for output, latents in outputs
        ]
        self.diversity_hinge = self.config.threshold_scale * float(torch.stack(found).mean())
        return self.diversity_hinge
