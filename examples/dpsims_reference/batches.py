"""From a data set to batches on the device, in an order that depends on the step number alone."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Generator, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dpsims.data import ClassBalancedSampler, image_sampling_weights, instance_offsets
from dpsims.errors import InputError
from dpsims_reference.config import Config
from dpsims_reference.data.sample import ImageDataset, Sample
from dpsims_reference.randomness import derive_generator
from dpsims_reference.signals import spare_worker


class Batch(NamedTuple):
    """Images with their maps. ``extra`` holds the instance offsets where they are used."""

    images: Float[Tensor, "B 3 H W"]
    labels: Integer[Tensor, "B H W"]
    extra: Float[Tensor, "B 2 H W"] | None

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``."""
        extra = None if self.extra is None else self.extra.to(device, non_blocking=True)
        return Batch(
            self.images.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            extra,
        )


class Draw(NamedTuple):
    """The ``position``-th draw of a run takes image ``image``."""

    image: int
    position: int


class _Draws(Dataset[Sample]):
    """The data set seen by loader workers: a draw in, a randomly cropped sample out."""

    def __init__(self, dataset: ImageDataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, draw: Draw) -> Sample:
        generator = derive_generator(self.seed, "augment", draw.position)
        return self.dataset.draw(draw.image, generator)


class _DrawOrder:
    """Endless batches of draws, from a given step on."""

    def __init__(self, sampler: ClassBalancedSampler, batch_size: int, first_step: int) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self.first_step = first_step

    def __iter__(self) -> Iterator[list[Draw]]:
        draws = self._draws(self.first_step * self.batch_size)
        while True:
            yield list(itertools.islice(draws, self.batch_size))

    def _draws(self, position: int) -> Iterator[Draw]:
        length = len(self.sampler)
        for epoch in itertools.count(position // length):
            self.sampler.set_epoch(epoch)
            start = position - epoch * length
            for index in itertools.islice(iter(self.sampler), start, None):
                yield Draw(index, position)
                position += 1


def collate(samples: list[Sample], *, instances: bool) -> Batch:
    """Stack samples; turn instance maps into offsets when the model uses them.

    Raises:
        InputError: Instance maps are wanted and a sample has none.
    """
    extra = None
    if instances:
        maps = [sample.instances for sample in samples if sample.instances is not None]
        if len(maps) != len(samples):
            msg = "collate: samples must have instance maps when data.instances is set; got none"
            raise InputError(msg)
        extra = instance_offsets(torch.stack(maps))
    return Batch(
        torch.stack([sample.image for sample in samples]),
        torch.stack([sample.labels for sample in samples]),
        extra,
    )


def train_batches(
    dataset: ImageDataset, config: Config, *, first_step: int = 0
) -> Generator[Batch, None, None]:
    """Endless training batches; step ``n`` is the same batch in every run of this configuration.

    Args:
        dataset: What to draw from.
        config: The run.
        first_step: The step whose batch comes first.
    """
    weights = torch.ones(len(dataset), dtype=torch.float64)
    if config.optim.balanced_sampling:
        weights = image_sampling_weights(dataset.presence())
    sampler = ClassBalancedSampler(weights, seed=config.seed, rank=0, world_size=1)
    loader = DataLoader(
        _Draws(dataset, config.seed),
        batch_sampler=_DrawOrder(sampler, config.optim.batch_size, first_step),
        num_workers=config.data.workers,
        collate_fn=functools.partial(collate, instances=config.data.instances),
        persistent_workers=False,
        worker_init_fn=spare_worker,
        # by default the loader draws a seed from the global generator
        generator=derive_generator(config.seed, "loader"),
    )
    yield from loader


def view_batches(dataset: ImageDataset, config: Config, *, batch_size: int) -> Iterator[Batch]:
    """Every image of ``dataset`` once, in order, without any randomness."""
    for start in range(0, len(dataset), batch_size):
        indices = range(start, min(start + batch_size, len(dataset)))
        samples = [dataset.view(index) for index in indices]
        yield collate(samples, instances=config.data.instances)
