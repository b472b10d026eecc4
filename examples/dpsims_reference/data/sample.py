"""What every data set of the reference package hands out, and what it must be able to do."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from dpsims.data.label_spec import LabelSpec


class Sample(NamedTuple):
    """One image with its maps.

    Attributes:
        image: RGB in [-1, 1].
        labels: Class ids, ``ignore_index`` where a pixel has none.
        instances: Object ids, 0 where a pixel belongs to no object; ``None`` without such a map.

    Source:
        Not from the paper: the package's own protocol.
    """

    image: Float[Tensor, "3 H W"]
    labels: UInt8[Tensor, "H W"]
    instances: Int[Tensor, "H W"] | None = None


@runtime_checkable
class ImageDataset(Protocol):
    """Labelled images for training and evaluation.

    ``draw`` is random and takes every random number from its generator; ``view`` never is.

    Attributes:
        spec: Classes and their names and colours.
        image_size: Height and width of every sample.

    Source:
        Not from the paper: the package's own protocol.
    """

    spec: LabelSpec
    image_size: tuple[int, int]

    def __len__(self) -> int:
        """Number of samples to choose from."""
        ...

    def draw(self, index: int, generator: torch.Generator) -> Sample:
        """A random crop, flip or look of sample ``index``, for training."""
        ...

    def view(self, index: int) -> Sample:
        """Sample ``index``, always the same, for evaluation."""
        ...

    def presence(self) -> Bool[Tensor, "num_images K"]:
        """Which classes each sample holds, for class-balanced sampling."""
        ...

    def fingerprint(self) -> str:
        """A name of the content: two data sets with one fingerprint hold the same samples."""
        ...


def flip_sample(sample: Sample) -> Sample:
    """Mirror image and maps together, left to right."""
    instances = None if sample.instances is None else sample.instances.flip(-1)
    return Sample(sample.image.flip(-1), sample.labels.flip(-1), instances)


def random_below(limit: int, generator: torch.Generator) -> int:
    """A random integer in ``[0, limit)`` from ``generator``."""
    drawn = torch.randint(limit, (), generator=generator, device=generator.device)
    return int(drawn)


def check_index(owner: str, index: int, length: int) -> int:
    """Return ``index`` as a non-negative position; negative ones count from the end.

    Raises:
        IndexError: Outside the data set, so that plain iteration ends.
    """
    if not -length <= index < length:
        msg = f"{owner}: index must be in [{-length}, {length}); got {index}"
        raise IndexError(msg)
    return index % length
