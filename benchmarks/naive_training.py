"""A training step in the plain way: naive generator and loss, D never frozen, fakes made twice."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.naive import naive_generator
from benchmarks.naive_losses import one_hot_focal
from dpsims.losses import class_balance_weights
from dpsims_reference.batches import Batch
from dpsims_reference.config import Config
from dpsims_reference.fakes import FakeSource
from dpsims_reference.networks import GeneratorOutput, ImageGenerator, PixelDiscriminator
from dpsims_reference.parallel import Shard

_WHOLE = Shard()


class NaiveStep:
    """D's update, then G's, of a model without frozen networks and with the pixel loss alone.

    D's half and G's half each make their fakes, and G's half also computes the gradients of D's
    weights, which nobody uses.

    Args:
        generator: Draws the latents; its naive twin is trained.
        discriminator: D, which is trained.
        config: The run.
        same_fakes: G's half makes the fakes of D's half again, as a step that reuses them would.
    """

    def __init__(
        self,
        generator: ImageGenerator,
        discriminator: PixelDiscriminator,
        config: Config,
        *,
        same_fakes: bool = False,
    ) -> None:
        self.twin = naive_generator(generator).to(generator.device)
        self.discriminator, self.config = discriminator, config
        self._fakes = FakeSource(generator, self._generate, config)
        self._phase = 0 if same_fakes else 1
        self._optimizers = [_adam(network, config) for network in (discriminator, self.twin)]

    def __call__(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Update both networks once; the terms of both losses."""
        classes = self.config.data.num_classes
        weights = class_balance_weights(batch.labels, classes, dtype=batch.images.dtype)
        weights = F.pad(weights, (0, 1))
        ones, fake_ids = torch.ones_like(weights), torch.full_like(batch.labels, classes)
        with torch.no_grad():
            images = self._fakes(batch, _WHOLE, step, phase=0).output.images
        # both decoder calls come before both losses, as in the reference step
        real_logits, fake_logits = (self.discriminator(x) for x in (batch.images, images))
        real = self._loss(real_logits, batch.labels, weights)
        fake = self._loss(fake_logits, fake_ids, ones)
        self._descend(0, real + fake)
        images = self._fakes(batch, _WHOLE, step, phase=self._phase).output.images
        pixel = self._loss(self.discriminator(images), batch.labels, weights)
        self._descend(1, pixel)
        return {"d_real": real.detach(), "d_fake": fake.detach(), "g_pixel": pixel.detach()}

    def _loss(self, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        return one_hot_focal(logits, labels, weights, self.config.objective.focal_gamma)

    def _generate(
        self, labels: Tensor, latents: Tensor, *others: Tensor | None
    ) -> GeneratorOutput:
        made: GeneratorOutput = self.twin(labels, latents.to(self._dtype), *others)
        return made

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.twin.parameters()).dtype

    def _descend(self, which: int, loss: Tensor) -> None:
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizers[which].step()


def through_discriminator(
    discriminator: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], *, frozen: bool
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """G's phase up to its images: the loss, and the gradient of the images.

    Args:
        discriminator: D; its parameters are frozen here, or not.
        loss: Of logits and labels.
        frozen: Whether D's weights ask for no gradient, as they should.
    """
    parameters = list(discriminator.parameters())
    for parameter in parameters:
        parameter.requires_grad_(not frozen)

    def phase(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        leaf = images.detach().requires_grad_()
        value = loss(discriminator(leaf), labels)
        wanted = [leaf] if frozen else [leaf, *parameters]
        return value.detach(), torch.autograd.grad(value, wanted)[0]

    return phase


def _adam(network: nn.Module, config: Config) -> torch.optim.Adam:
    betas = (float(config.optim.betas[0]), float(config.optim.betas[1]))
    return torch.optim.Adam(network.parameters(), lr=config.optim.lr, betas=betas)
