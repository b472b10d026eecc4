"""The whole evaluation of a trained generator: every figure of the paper, over any processes."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from dpsims.errors import InputError
from dpsims_reference.batches import Batch
from dpsims_reference.data.sample import ImageDataset
from dpsims_reference.evaluation.consistency import ConsistencyPair, Scores
from dpsims_reference.evaluation.diversity import NamedDistance
from dpsims_reference.evaluation.extractors import FeatureExtractor
from dpsims_reference.evaluation.features import FeatureSets, kernel_subsets
from dpsims_reference.evaluation.images import (
    Speed,
    as_8_bit,
    draw_images,
    load_batches,
    spread,
    time_generator,
)
from dpsims_reference.evaluation.processes import Process
from dpsims_reference.evaluation.segmenters import Segmenter
from dpsims_reference.evaluation_options import Protocol as Protocol
from dpsims_reference.sampling import TrainedGenerator


class Instruments(NamedTuple):
    """What measures. All are made, and their weights read, before the first image."""

    extractors: tuple[FeatureExtractor, ...] = ()
    segmenters: tuple[Segmenter, ...] = ()
    distances: tuple[NamedDistance, ...] = ()


@dataclass(frozen=True)
class Measurement:
    """What an evaluation found."""

    figures: dict[str, float]
    """One number by name; the name ends with that of the network behind it."""
    num_images: int
    num_diversity_maps: int
    scores: dict[str, Scores] = field(default_factory=dict)
    """Scores of the generated images by segmenter."""
    real_scores: dict[str, Scores] = field(default_factory=dict)
    """Scores of the real images by segmenter: the ceiling."""
    speed: Speed | None = None


def measure(
    trained: TrainedGenerator,
    dataset: ImageDataset,
    instruments: Instruments,
    protocol: Protocol | None = None,
    *,
    process: Process | None = None,
    device: str = "cpu",
) -> Measurement:
    """Measure a generator on the images of a data set.

    Every process of a distributed run calls it as itself, and all get the same figures,
    which are those of one process.

    Args:
        trained: The generator, on ``device``.
        dataset: The real images and their label maps.
        instruments: What measures; moved to ``device``.
        protocol: On how much; ``None`` takes the defaults.
        process: This process; ``None`` asks torch.distributed.
        device: Where the networks run.

    Raises:
        InputError: The sizes do not fit the data set, or two instruments share a name.
        NonFiniteError: The generator gives NaN or infinite pixels; names the position.
        DistributedError: Another process failed.

    Warns:
        UserWarning: There are no more images than features.
    """
    protocol = Protocol() if protocol is None else protocol
    process = Process.current() if process is None else process
    _check_names(instruments)
    run = _Run(trained, dataset, instruments, protocol, process, device)
    with process.together():
        run.compare()
    figures = run.compared()
    if run.maps:
        with process.together():
            rows = run.diversities()
        means = process.gather(*rows).mean(dim=0).tolist()
        names = [f"diversity/{distance.name}" for distance in instruments.distances]
        figures |= dict(zip(names, means, strict=True))
    return Measurement(
        figures,
        len(run.positions),
        len(run.maps),
        run.scores[False],
        run.scores[True],
        run.speed() if protocol.speed else None,
    )


def _check_names(instruments: Instruments) -> None:
    for kind in instruments:
        names = [instrument.name for instrument in kind]
        if len(set(names)) < len(names):
            msg = f"measure: instruments must have names of their own; got {names}"
            raise InputError(msg)


class _Run:
    """One evaluation under way."""

    def __init__(
        self,
        trained: TrainedGenerator,
        dataset: ImageDataset,
        instruments: Instruments,
        protocol: Protocol,
        process: Process,
        device: str,
    ) -> None:
        self.trained, self.dataset, self.protocol = trained, dataset, protocol
        self.process, self.device, self.distances = process, device, instruments.distances
        self.positions = spread(len(dataset), protocol.num_images)
        _check_count(instruments, protocol, len(self.positions))
        self.maps: list[int] = []
        if instruments.distances and protocol.diversity_maps != 0:
            most = protocol.diversity_maps or len(dataset)
            self.maps = spread(len(dataset), min(most, len(dataset)))
        self.features = [FeatureSets(each.to(device)) for each in instruments.extractors]
        self.pairs = [
            ConsistencyPair(each, dataset.spec, device=device) for each in instruments.segmenters
        ]
        self.scores: dict[bool, dict[str, Scores]] = {True: {}, False: {}}

    def batches(self, positions: list[int], size: int) -> Iterator[tuple[list[int], Batch]]:
        data = self.trained.config.data
        return load_batches(
            self.dataset,
            positions,
            batch_size=size,
            instances=data.instances,
            workers=data.workers,
        )

    def compare(self) -> None:
        """Show this process's real and generated images to the extractors and segmenters."""
        mine = list(self.process.part(self.positions))
        for positions, batch in self.batches(mine, self.protocol.batch_size):
            draws = [(position, 0) for position in positions]
            fake = draw_images(
                self.trained, batch.labels, batch.extra, draws, seed=self.protocol.seed
            )
            real = as_8_bit(batch.images.to(fake.device), positions)
            for images, which in ((real, True), (fake, False)):
                for features in self.features:
                    features.add(positions, images, real=which)
                for pair in self.pairs:
                    pair.add(images, batch.labels, real=which)

    def compared(self) -> dict[str, float]:
        """The figures of the images that all processes have shown."""
        found: dict[str, float] = {}
        for features in self.features:
            found |= features.figures(
                self.process,
                seed=self.protocol.seed,
                subset_size=self.protocol.kernel_subset_size,
                kernel=self.protocol.kernel_distance,
            )
        for pair in self.pairs:
            real, fake = (pair.scores(real=which) for which in (True, False))
            found |= pair.figures(fake, real)
            self.scores[True][pair.segmenter.name] = real
            self.scores[False][pair.segmenter.name] = fake
        return found

    def diversities(self) -> tuple[Tensor, Tensor]:
        """Positions of this process's maps, and a row of diversities for each."""
        rows, count = [], self.protocol.samples_per_map
        mine = list(self.process.part(self.maps))
        for (position,), batch in self.batches(mine, 1):
            samples = []
            for numbers in torch.arange(count).split(self.protocol.batch_size):
                extra = batch.extra
                samples.append(
                    draw_images(
                        self.trained,
                        batch.labels.expand(len(numbers), -1, -1),
                        None if extra is None else extra.expand(len(numbers), -1, -1, -1),
                        [(position, number) for number in numbers.tolist()],
                        seed=self.protocol.seed,
                    )
                )
            together = torch.cat(samples)
            rows.append([distance.diversity(together) for distance in self.distances])
        values = torch.tensor(rows, dtype=torch.float64).reshape(-1, len(self.distances))
        return torch.tensor(mine, dtype=torch.int64), values

    def speed(self) -> Speed:
        """Images per second of this process, on the first maps."""
        first = spread(len(self.dataset), min(self.protocol.batch_size, len(self.dataset)))
        ((_, batch),) = self.batches(first, len(first))
        return time_generator(
            self.trained, batch, device=device_name(self.device), seed=self.protocol.seed
        )


def _check_count(instruments: Instruments, protocol: Protocol, count: int) -> None:
    """Find out before the first image what would fail after the last one."""
    if instruments.extractors and count < 2:
        msg = f"measure: num_images must be at least 2 for a distance of features; got {count}"
        raise InputError(msg)
    if instruments.extractors and protocol.kernel_distance:
        kernel_subsets(count, protocol.kernel_subset_size)


def device_name(device: str) -> str:
    """The model of a device, for people who compare speeds."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()})"
