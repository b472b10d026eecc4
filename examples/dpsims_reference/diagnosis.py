"""A look inside both networks of a run: does G hear its noise, and what does D see?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dpsims.errors import InputError
from dpsims.metrics import (
    ConditioningReport,
    NoiseSensitivity,
    conditioning_report,
    noise_sensitivity,
)
from dpsims_reference.batches import view_batches
from dpsims_reference.checkpoints import load_module_
from dpsims_reference.config import Config
from dpsims_reference.data.sample import ImageDataset
from dpsims_reference.datasets import build_dataset
from dpsims_reference.discriminator import Discriminator, build_discriminator
from dpsims_reference.generator import Generator
from dpsims_reference.networks import ImageGenerator, PixelDiscriminator
from dpsims_reference.randomness import build_seeded, derive_generator
from dpsims_reference.runs import read_run
from dpsims_reference.sampling import load_generator


class Diagnosis(NamedTuple):
    """Both reports, and the step they belong to if it is known."""

    noise: NoiseSensitivity
    conditioning: ConditioningReport
    step: int | None = None

    def numbers(self) -> dict[str, float]:
        """Every figure by a name that suits a log."""
        return self.noise.numbers() | self.conditioning.numbers()

    def table(self) -> str:
        """Everything as aligned text."""
        heading = "features of D's backbone, before -> after conditioning"
        parts = [self.noise.table(), f"{heading}\n{self.conditioning.table()}"]
        if self.step is not None:
            parts.insert(0, f"step {self.step}")
        return "\n\n".join(parts)


def diagnose_networks(
    generator: ImageGenerator,
    discriminator: PixelDiscriminator,
    dataset: ImageDataset,
    config: Config,
    *,
    num_maps: int = 4,
    num_noises: int = 4,
) -> Diagnosis:
    """Diagnose both networks on the first images of ``dataset``.

    The generator runs in evaluation mode and is put back; nothing of either network changes, and
    no random number of the run is used up.

    Raises:
        InputError: The networks are not of this paper, so they have nothing to look into.
    """
    if not (isinstance(generator, Generator) and isinstance(discriminator, Discriminator)):
        got = f"{type(generator).__name__} and {type(discriminator).__name__}"
        msg = f"diagnose: the networks must be a Generator and a Discriminator; got {got}"
        raise InputError(msg)
    batch = next(view_batches(dataset, config, batch_size=num_maps)).to(generator.device)
    count, size = len(batch.labels), batch.labels.shape[-2:]
    rng = derive_generator(config.seed, "diagnosis-latents")
    latents = generator.sample_latents(num_noises * count, generator=rng).chunk(num_noises)
    # z alone differs: that is the noise that a model may ignore
    noise = generator.sample_noise(
        count, size, generator=derive_generator(config.seed, "diagnosis-noise")
    )

    def render(index: int) -> Tensor:
        images: Tensor = generator(batch.labels, latents[index], batch.extra, noise).images
        return images

    layers = [f"pyramid.blocks.{i}" for i in range(len(generator.pyramid.blocks))]
    layers += [f"blocks.{i}" for i in range(len(generator.blocks))]
    with _evaluation(generator):
        found = noise_sensitivity(generator, render, num_noises=num_noises, layers=layers)
    return Diagnosis(found, conditioning_report(discriminator.backbone, batch.images))


@contextmanager
def _evaluation(module: nn.Module) -> Iterator[None]:
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def diagnose_run(
    run: str | Path, *, num_maps: int = 4, num_noises: int = 4, device: str = "cpu"
) -> Diagnosis:
    """Diagnose the averaged generator and the discriminator of a run's newest checkpoint.

    Raises:
        CheckpointError: The folder holds no checkpoint.
        InputError: The networks are not of this paper.
    """
    checkpoint = read_run("diagnose_run", run)
    trained = load_generator(run, device=device)
    generator, config = trained.generator, trained.config
    discriminator = build_seeded(
        config.seed,
        "discriminator",
        lambda: build_discriminator(config),
        torch.device(device),
    )
    load_module_(discriminator, checkpoint.tensors["discriminator"], name="discriminator")
    found = diagnose_networks(
        generator,
        discriminator,
        build_dataset(config.data),
        config,
        num_maps=num_maps,
        num_noises=num_noises,
    )
    return found._replace(step=checkpoint.step)
