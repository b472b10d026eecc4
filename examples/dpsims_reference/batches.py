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

from dpsims._checks import check_int
from dpsims.data import ClassBalancedSampler, image_sampling_weights, instance_offsets
from dpsims.errors import InputError
from dpsims_reference.config import Config
from dpsims_reference.data.sample import ImageDataset, Sample
from dpsims_reference.parallel import Shard
from dpsims_reference.randomness import derive_generator
from dpsims_reference.signals import spare_worker

_WHOLE = Shard()


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

    def part(self, shard: Shard) -> Batch:
        """The rows of ``shard``."""
        extra = None if self.extra is None else shard.rows(self.extra)
        return Batch(shard.rows(self.images), shard.rows(self.labels), extra)


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
    """Endless batches of draws, from a given step on; of every batch one process's rows.

    The sampler is that of one process: its own split would make an epoch longer by the number of
    processes, and so change the order.
    """

    def __init__(
        self,
        sampler: ClassBalancedSampler,
        batch_size: int,
        first_step: int,
        shard: Shard = _WHOLE,
    ) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self.first_step = first_step
        self.shard = shard

    def __iter__(self) -> Iterator[list[Draw]]:
        draws = self._draws(self.first_step * self.batch_size)
        while True:
            batch = list(itertools.islice(draws, self.batch_size))
            yield batch[self.shard.first :: self.shard.stride]

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
    dataset: ImageDataset, config: Config, *, first_step: int = 0, shard: Shard = _WHOLE
) -> Generator[Batch, None, None]:
    """Endless training batches; step ``n`` is the same batch in every run of this configuration.

    Args:
        dataset: What to draw from.
        config: The run.
        first_step: The step whose batch comes first.
        shard: Which rows of every batch to load; the images do not depend on the split.
    """
    weights = torch.ones(len(dataset), dtype=torch.float64)
    if config.optim.balanced_sampling:
        weights = image_sampling_weights(dataset.presence())
    sampler = ClassBalancedSampler(weights, seed=config.seed, rank=0, world_size=1)
    loader = DataLoader(
        _Draws(dataset, config.seed),
        batch_sampler=_DrawOrder(sampler, config.optim.batch_size, first_step, shard),
        num_workers=config.data.workers,
        collate_fn=functools.partial(collate, instances=config.data.instances),
        persistent_workers=False,
        worker_init_fn=spare_worker,
        # by default the loader draws a seed from the global generator
        generator=derive_generator(config.seed, "loader"),
    )
    yield from loader


def local_batch_size(config: Config, world_size: int) -> int:
    """Images of one process in one of its parts of a step.

    Raises:
        InputError: The images of a step cannot be dealt out evenly.
    """
    optim = config.optim
    check_int("local_batch_size", "optim.accumulate", optim.accumulate)
    parts = world_size * optim.accumulate
    # both images of a pair must lie in the same part
    unit = 2 * parts if optim.pairs == "split_batch" and parts > 1 else parts
    if optim.batch_size % unit:
        msg = (
            f"local_batch_size: optim.batch_size must be a multiple of {unit} (processes x "
            'optim.accumulate, and twice that with optim.pairs="split_batch"); '
            f"got {optim.batch_size}"
        )
        raise InputError(msg)
    return optim.batch_size // parts


def norm_images(config: Config, world_size: int) -> int:
    """Images that a batch norm takes its moments over in a step."""
    own = local_batch_size(config, world_size)
    alone = "batch" in (config.generator.norm, config.discriminator.norm)
    return own if alone else own * world_size


def view_batches(dataset: ImageDataset, config: Config, *, batch_size: int) -> Iterator[Batch]:
    """Every image of ``dataset`` once, in order, without any randomness."""
    for start in range(0, len(dataset), batch_size):
        indices = range(start, min(start + batch_size, len(dataset)))
        samples = [dataset.view(index) for index in indices]
        yield collate(samples, instances=config.data.instances)
