"""The fakes of a step: each one's latents depend on its place in the whole batch alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor

from dpsims_reference.batches import Batch
from dpsims_reference.config import Config
from dpsims_reference.networks import GeneratorOutput, ImageGenerator
from dpsims_reference.objective import NoisePair
from dpsims_reference.parallel import Shard
from dpsims_reference.randomness import derive_generator


class Fake(NamedTuple):
    """Generated images, where their maps stand in the real batch, and the pair of Eq. 6."""

    output: GeneratorOutput
    labels: Tensor
    sources: Tensor
    pair: NoisePair


class FakeSource:
    """Draw latents for a batch's maps and run the generator on them.

    Args:
        generator: Draws latents and noise.
        generate: What to call for images: the generator, or what wraps it.
        config: The run.
    """

    def __init__(
        self, generator: ImageGenerator, generate: Callable[..., GeneratorOutput], config: Config
    ) -> None:
        self.generator, self.generate, self.config = generator, generate, config

    def __call__(self, batch: Batch, shard: Shard, step: int, *, phase: int) -> Fake:
        """Fakes for the batch's maps, and a second image of every map for Eq. 6.

        Args:
            batch: Some rows of the step's batch.
            shard: Which rows.
            step: Number of the step.
            phase: 0 in D's half of the step, 1 in G's.
        """
        rng = derive_generator(self.config.seed, "latents", step, phase)
        count = len(batch.labels)
        if self.config.optim.pairs == "split_batch":
            noise = self._noise(batch, count // 2, shard, step, phase)
            return self._split(batch, shard, noise, rng)
        sources = torch.arange(count, device=batch.labels.device)
        noise = self._noise(batch, count, shard, step, phase)
        latents, others = self._latents(count, shard, rng), self._latents(count, shard, rng)
        output = self.generate(batch.labels, latents, batch.extra, noise)
        # D's half needs no second image unless G's half will use these very fakes
        needed = torch.is_grad_enabled() and self.config.objective.diversity_weight > 0
        second = self.generate(batch.labels, others, batch.extra, noise) if needed else output
        return Fake(output, batch.labels, sources, NoisePair(output, second, latents, others))

    def _split(
        self, batch: Batch, shard: Shard, noise: Tensor | None, rng: torch.Generator
    ) -> Fake:
        half = len(batch.labels) // 2
        sources = torch.arange(half, device=batch.labels.device).repeat(2)
        labels = batch.labels[sources]
        extra = None if batch.extra is None else batch.extra[sources]
        # both images of a pair share the per-pixel noise: z alone must make them differ
        noise = None if noise is None else noise[sources]
        latents = self._latents(2 * half, shard, rng)
        output = self.generate(labels, latents, extra, noise)
        first = GeneratorOutput(output.images[:half], output.features[:half])
        second = GeneratorOutput(output.images[half:], output.features[half:])
        return Fake(
            output, labels, sources, NoisePair(first, second, latents[:half], latents[half:])
        )

    def _latents(self, count: int, shard: Shard, rng: torch.Generator) -> Tensor:
        """This shard's rows of the whole batch's latents."""
        return shard.rows(self.generator.sample_latents(count * shard.stride, generator=rng))

    def _noise(
        self, batch: Batch, count: int, shard: Shard, step: int, phase: int
    ) -> Tensor | None:
        """Per-pixel noise, one generator per image: the whole batch's would be slow to draw."""
        if not self.generator.spatial_noise:
            return None
        size = batch.labels.shape[-2:]
        drawn = []
        for row in range(count):
            place = shard.first + shard.stride * row
            rng = derive_generator(self.config.seed, "noise", step, phase, place)
            drawn.append(cast("Tensor", self.generator.sample_noise(1, size, generator=rng)))
        return torch.cat(drawn)
