"""The images that an evaluation looks at: every one a function of the seed and its position."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dpsims.errors import InputError, NonFiniteError
from dpsims_reference.batches import Batch, collate
from dpsims_reference.data.sample import ImageDataset, Sample
from dpsims_reference.prepared import prepare_generator
from dpsims_reference.randomness import derive_generator
from dpsims_reference.sampling import TrainedGenerator

_WARM_UP, _TIMED = 3, 10


def spread(length: int, count: int | None, *, owner: str = "evaluate") -> list[int]:
    """``count`` positions of a data set, evenly spread; all of them for ``None``.

    Raises:
        InputError: There are fewer than ``count``.
    """
    if count is None:
        return list(range(length))
    if not 1 <= count <= length:
        msg = f"{owner}: num_images must be from 1 to the {length} there are; got {count}"
        raise InputError(msg)
    return [index * length // count for index in range(count)]


class _Views(Dataset[Sample]):
    """The data set as loader workers see it during an evaluation."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, position: int) -> Sample:
        return self.dataset.view(position)


def load_batches(
    dataset: ImageDataset,
    positions: Sequence[int],
    *,
    batch_size: int,
    instances: bool,
    workers: int = 0,
) -> Iterator[tuple[list[int], Batch]]:
    """The samples at ``positions``, without any randomness."""
    chunks = [
        list(positions[start : start + batch_size])
        for start in range(0, len(positions), batch_size)
    ]
    loader = DataLoader(
        _Views(dataset),
        batch_sampler=chunks,
        num_workers=workers,
        collate_fn=functools.partial(collate, instances=instances),
        # or the loader would draw from the global generator
        generator=torch.Generator(),
    )
    yield from zip(chunks, loader, strict=True)


@torch.no_grad()
def draw_images(
    trained: TrainedGenerator,
    labels: Integer[Tensor, "B H W"],
    extra: Float[Tensor, "B 2 H W"] | None,
    draws: Sequence[tuple[int, int]],
    *,
    seed: int,
) -> Float[Tensor, "B 3 H W"]:
    """Images in [-1, 1] with 8 bits per channel, as a PNG of them would hold.

    Args:
        trained: What generates.
        labels: Label maps.
        extra: Instance offsets, where the model takes them.
        draws: For each map its position and the number of the sample. They decide the latent, so
            no image depends on the batch or the process that it is made in.
        seed: Decides the latents, too.

    Raises:
        NonFiniteError: A pixel is NaN or infinite; names the position.
    """
    model, size = trained.generator, labels.shape[-2:]
    latents, noises = [], []
    for draw in draws:
        latents.append(
            model.sample_latents(1, generator=derive_generator(seed, "evaluation-latents", *draw))
        )
        rng = derive_generator(seed, "evaluation-noise", *draw)
        noises.append(model.sample_noise(1, size, generator=rng))
    given = [noise for noise in noises if noise is not None]
    device = latents[0].device
    images = model(
        labels.to(device),
        torch.cat(latents),
        None if extra is None else extra.to(device),
        torch.cat(given) if given else None,
    ).images
    return as_8_bit(images, [position for position, _ in draws])


def as_8_bit(images: Float[Tensor, "B 3 H W"], positions: Sequence[int]) -> Tensor:
    """Images clamped to [-1, 1] and rounded to the 256 values of a PNG.

    Raises:
        NonFiniteError: A pixel is NaN or infinite; names the position.
    """
    bad = (~images.isfinite().flatten(1).all(dim=1)).nonzero().flatten().tolist()
    if bad:
        msg = (
            "evaluate: images must be finite; got NaN or infinite pixels in the image at "
            f"position {positions[bad[0]]}"
        )
        raise NonFiniteError(msg)
    return images.float().clamp(-1, 1).add(1).mul(127.5).round().div(127.5).sub(1)


class Speed(NamedTuple):
    """How fast images come out of the generator."""

    images_per_second: float
    batch_size: int
    image_size: tuple[int, int]
    device: str
    threads: int
    warm_up: int
    timed: int


@torch.no_grad()
def time_generator(trained: TrainedGenerator, batch: Batch, *, device: str, seed: int) -> Speed:
    """Median time of a forward pass on the maps of ``batch``, after a warm-up.

    The generator is prepared for inference (:func:`dpsims.nn.prepare_for_inference`). Label maps
    and latents are on the device already; nothing is copied back.
    """
    model, size = prepare_generator(trained.generator), batch.labels.shape[-2:]
    rng = derive_generator(seed, "evaluation-speed")
    latents = model.sample_latents(len(batch.labels), generator=rng)
    noise = model.sample_noise(len(batch.labels), size, generator=rng)
    batch = batch.to(latents.device)
    times = []
    for _ in range(_WARM_UP + _TIMED):
        started = time.perf_counter()
        model(batch.labels, latents, batch.extra, noise)
        if latents.is_cuda:
            torch.cuda.synchronize(latents.device)
        times.append(time.perf_counter() - started)
    return Speed(
        len(batch.labels) / statistics.median(times[_WARM_UP:]),
        len(batch.labels),
        (size[0], size[1]),
        device,
        torch.get_num_threads(),
        _WARM_UP,
        _TIMED,
    )
