"""What a trainer makes with its generators beside the steps: Eq. 7, statistics, sample grids."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from dpsims_reference.batches import Batch, train_batches, view_batches
from dpsims_reference.config import Config
from dpsims_reference.data.sample import ImageDataset
from dpsims_reference.figures import captioned_grid, label_pictures, to_uint8
from dpsims_reference.networks import GeneratorOutput, ImageGenerator
from dpsims_reference.objective import Objective
from dpsims_reference.parallel import Parallel, Shard
from dpsims_reference.randomness import derive_generator
from dpsims_reference.recalibration import recalibrate_batch_norm_

# maps for Eq. 7, for the averaged generator's batch-norm statistics, and in a sample grid
CALIBRATION_MAPS = 64
RECALIBRATION_MAPS = 144
GRID_MAPS, GRID_NOISES = 8, 3
_WHOLE = Shard()


def scan_labels(dataset: ImageDataset, config: Config, parallel: Parallel) -> None:
    """Let the first process read the labels of a new data set, and the others its cache."""
    if config.optim.balanced_sampling and parallel.world_size > 1:
        if parallel.rank == 0:
            dataset.presence()
        parallel.barrier()


@torch.no_grad()
def calibrate_(
    objective: Objective,
    generator: ImageGenerator,
    dataset: ImageDataset,
    config: Config,
    parallel: Parallel,
) -> None:
    """Eq. 7 on the untrained generator, over batches of different maps."""
    rng = derive_generator(config.seed, "calibration")
    outputs = []
    for batch in _first_batches(CALIBRATION_MAPS, dataset, config, parallel):
        output, latents = _generated(generator, batch, rng, parallel.shard)
        # every pair of the whole batch counts
        whole = GeneratorOutput(*map(parallel.gather, output))
        outputs.append((whole, parallel.gather(latents)))
    objective.calibrate(outputs)


def recalibrate_(
    model: ImageGenerator, dataset: ImageDataset, config: Config, parallel: Parallel
) -> None:
    """Measure the batch-norm statistics of an averaged generator on training maps."""
    rng = derive_generator(config.seed, "recalibration")
    recalibrate_batch_norm_(
        model,
        _first_batches(RECALIBRATION_MAPS, dataset, config, parallel),
        lambda batch: _generated(model, batch, rng, parallel.shard),
    )


@torch.no_grad()
def sample_grid(model: ImageGenerator, dataset: ImageDataset, config: Config) -> Any:
    """Maps, real images and samples as one ``(H, W, 3)`` picture."""
    batch = next(view_batches(dataset, config, batch_size=GRID_MAPS))
    rows = [
        ("labels", label_pictures(dataset.spec, batch.labels)),
        ("real", list(to_uint8(batch.images))),
    ]
    rng = derive_generator(config.seed, "picture")
    for index in range(GRID_NOISES):
        output, _ = _generated(model, batch, rng)
        rows.append((f"noise {index + 1}", list(to_uint8(output.images))))
    return captioned_grid(rows)


def _first_batches(
    count: int, dataset: ImageDataset, config: Config, parallel: Parallel
) -> itertools.islice[Batch]:
    """This process's rows of the batches that hold a run's first ``count`` maps or a few more."""
    batches = train_batches(dataset, config, shard=parallel.shard)
    return itertools.islice(batches, -(-count // config.optim.batch_size))


def _generated(
    model: ImageGenerator, batch: Batch, rng: torch.Generator, shard: Shard = _WHOLE
) -> tuple[GeneratorOutput, Tensor]:
    """What ``model`` makes of the maps, and the latents, of these rows of a whole batch."""
    batch = batch.to(model.device)
    count = len(batch.labels) * shard.stride
    latents = shard.rows(model.sample_latents(count, generator=rng))
    noise = model.sample_noise(count, batch.labels.shape[-2:], generator=rng)
    noise = None if noise is None else shard.rows(noise)
    return model(batch.labels, latents, batch.extra, noise), latents
