"""One training step: D, then G (Sec. 3.3). Plain torch, no loop, no logging."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dpsims_reference.batches import Batch
from dpsims_reference.config import Config, OptimConfig
from dpsims_reference.discriminator import Discriminator
from dpsims_reference.finite import check_finite_gradients, check_finite_loss
from dpsims_reference.generator import Generator, GeneratorOutput
from dpsims_reference.objective import Loss, NoisePair, Objective
from dpsims_reference.randomness import derive_generator


class Fake(NamedTuple):
    """Generated images, where their maps stand in the real batch, and the pair of Eq. 6."""

    output: GeneratorOutput
    labels: Tensor
    sources: Tensor
    pair: NoisePair


def learning_rate(optim: OptimConfig, step: int) -> float:
    """The rate at ``step``: constant, or along a half cosine to ``final_lr`` times ``lr``."""
    done = min(step / max(optim.steps, 1), 1.0)
    share = 0.5 * (1 + math.cos(math.pi * done))
    return optim.lr * (optim.final_lr + (1 - optim.final_lr) * share)


class TrainingStep:
    """Both halves of a step, with the optimisers.

    D is updated first, on one batch of fakes; G follows, on the same fakes through the updated D
    (``reuse_fake``) or on new ones. Only the trained half receives gradients.

    Args:
        generator: G.
        discriminator: D.
        objective: The losses.
        config: The run.
    """

    def __init__(
        self,
        generator: Generator,
        discriminator: Discriminator,
        objective: Objective,
        config: Config,
    ) -> None:
        self.generator, self.discriminator = generator, discriminator
        self.objective, self.config = objective, config
        self.generator_parameters = [
            p for module in (generator, objective) for p in module.parameters() if p.requires_grad
        ]
        self.discriminator_parameters = [p for p in discriminator.parameters() if p.requires_grad]
        self.generator_optimizer = self._adam(self.generator_parameters)
        self.discriminator_optimizer = self._adam(self.discriminator_parameters)

    def _adam(self, parameters: list[torch.nn.Parameter]) -> torch.optim.Adam:
        optim = self.config.optim
        # torch refuses an int beside a float
        betas = (float(optim.betas[0]), float(optim.betas[1]))
        return torch.optim.Adam(parameters, lr=optim.lr, betas=betas, fused=True)

    def __call__(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Update both networks once.

        Returns:
            The unweighted terms of both losses, detached.

        Raises:
            NonFiniteError: A loss or a gradient is NaN or infinite; names the terms, and no weight
                has been changed by that loss.
        """
        optim = self.config.optim
        for optimizer in (self.generator_optimizer, self.discriminator_optimizer):
            optimizer.param_groups[0]["lr"] = learning_rate(optim, step)
        with torch.no_grad(), self._autocast():
            real_features = self.discriminator.encode(batch.images)
            real_maps = self.objective.contrastive_maps(batch.images, real_features)
        with torch.set_grad_enabled(optim.reuse_fake), self._autocast():
            fake = self._fake(batch, step, phase=0)
            fake_features = self.discriminator.encode(fake.output.images)
        terms = self._update_discriminator(batch, real_features, fake, fake_features)
        if not optim.reuse_fake:
            with self._autocast():
                fake = self._fake(batch, step, phase=1)
                fake_features = self.discriminator.encode(fake.output.images)
        return terms | self._update_generator(fake, fake_features, real_maps, step)

    def _update_discriminator(
        self, batch: Batch, real_features: list[Tensor], fake: Fake, fake_features: list[Tensor]
    ) -> dict[str, Tensor]:
        images = fake.output.images.detach()
        with self._autocast():
            real_logits = self.discriminator.decode(batch.images, real_features)
            fake_logits = self.discriminator.decode(images, [f.detach() for f in fake_features])
            loss = self.objective.discriminator_loss(real_logits, fake_logits, batch.labels)
        self._descend(loss, self.discriminator_optimizer, self.discriminator_parameters)
        return loss.terms

    def _update_generator(
        self, fake: Fake, fake_features: list[Tensor], real_maps: list[Tensor], step: int
    ) -> dict[str, Tensor]:
        rng = derive_generator(self.config.seed, "patches", step)
        images = fake.output.images
        with self._autocast():
            logits = self.discriminator.decode(images, fake_features)
            loss = self.objective.generator_loss(
                logits,
                fake.labels,
                self.objective.contrastive_maps(images, fake_features),
                [level[fake.sources] for level in real_maps],
                fake.pair,
                generator=rng,
            )
        self._descend(loss, self.generator_optimizer, self.generator_parameters)
        return loss.terms

    def _descend(
        self, loss: Loss, optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter]
    ) -> None:
        check_finite_loss(loss)
        optimizer.zero_grad(set_to_none=True)
        # with inputs named, the other network's weights get no gradient and cost nothing
        loss.total.backward(inputs=parameters)
        check_finite_gradients(parameters)
        if self.config.optim.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(parameters, self.config.optim.clip_grad)
        optimizer.step()

    def _fake(self, batch: Batch, step: int, *, phase: int) -> Fake:
        """Fakes for the batch's maps, and a second image of every map for Eq. 6."""
        rng = derive_generator(self.config.seed, "latents", step, phase)
        count = len(batch.labels)
        if self.config.optim.pairs == "split_batch":
            return self._split_fake(batch, count // 2, rng)
        sources = torch.arange(count, device=batch.labels.device)
        noise = self.generator.sample_noise(count, batch.labels.shape[-2:], generator=rng)
        latents = self.generator.sample_latents(count, generator=rng)
        others = self.generator.sample_latents(count, generator=rng)
        output = self.generator(batch.labels, latents, batch.extra, noise)
        # D's half needs no second image unless G's half will use these very fakes
        needed = torch.is_grad_enabled() and self.config.objective.diversity_weight > 0
        second = self.generator(batch.labels, others, batch.extra, noise) if needed else output
        return Fake(output, batch.labels, sources, NoisePair(output, second, latents, others))

    def _split_fake(self, batch: Batch, half: int, rng: torch.Generator) -> Fake:
        sources = torch.arange(half, device=batch.labels.device).repeat(2)
        labels = batch.labels[sources]
        extra = None if batch.extra is None else batch.extra[sources]
        noise = self.generator.sample_noise(half, labels.shape[-2:], generator=rng)
        # both images of a pair share the per-pixel noise: z alone must make them differ
        noise = None if noise is None else noise[sources]
        latents = self.generator.sample_latents(2 * half, generator=rng)
        output = self.generator(labels, latents, extra, noise)
        first = GeneratorOutput(output.images[:half], output.features[:half])
        second = GeneratorOutput(output.images[half:], output.features[half:])
        return Fake(
            output, labels, sources, NoisePair(first, second, latents[:half], latents[half:])
        )

    def _autocast(self) -> torch.autocast:
        device = self.generator.to_rgb.weight.device
        enabled = device.type == "cuda" and self.config.optim.precision == "bf16"
        return torch.autocast(device.type, torch.bfloat16, enabled=enabled)
