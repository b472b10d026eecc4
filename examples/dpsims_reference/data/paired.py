"""What all data sets of image files with label maps share: reading, checking, scanning."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool
from torch import Tensor

from dpsims._checks import check_bool, check_int, check_ints
from dpsims.data import LabelSpec, class_presence
from dpsims.errors import DataError, DTypeError, InputError
from dpsims_reference.data.files import (
    MAX_PIXELS,
    Pixels,
    distinct_ids,
    read_ids,
    read_image,
    shown,
)
from dpsims_reference.data.sample import Sample, check_index


class Pair(NamedTuple):
    """The files of one sample."""

    image: Path
    labels: Path
    instances: Path | None


class Arrays(NamedTuple):
    """The files of one sample, read."""

    image: Pixels
    labels: Tensor
    instances: npt.NDArray[np.int32] | None


@dataclass(frozen=True)
class PresenceScan:
    """How a data set finds out which classes its label maps hold.

    Attributes:
        cache: File that keeps the result and a half-finished scan; ``None`` keeps nothing.
        workers: Processes that read the maps; 0 reads them here.
        progress: Called as ``progress(done, total)`` after every map.

    Source:
        Not from the paper: the options of :func:`dpsims.data.class_presence`.
    """

    cache: Path | None = None
    workers: int = 0
    progress: Callable[[int, int], object] | None = None


class PairedDataset(ABC):
    """Images and label maps in files. Subclasses say which files, and how samples are cut.

    Args:
        spec: What the ids in the files mean.
        image_size: Height and width of every sample.
        flip: Mirror half of the training samples.
        max_pixels: Largest file that is unpacked.

    Attributes:
        scan: How :meth:`presence` works; set it before the first call.

    Source:
        Not from the paper: the package's own base class.
    """

    def __init__(
        self,
        spec: LabelSpec,
        *,
        image_size: Sequence[int],
        flip: bool = True,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self._owner = owner = type(self).__name__
        if not isinstance(spec, LabelSpec):
            msg = f"{owner}: spec must be a LabelSpec; got {type(spec).__name__}"
            raise DTypeError(msg)
        check_ints(owner, "image_size", image_size)
        if len(image_size) != 2:
            msg = f"{owner}: image_size must be (height, width); got {tuple(image_size)}"
            raise InputError(msg)
        check_bool(owner, "flip", flip)
        check_int(owner, "max_pixels", max_pixels)
        self.spec, self.flip, self.max_pixels = spec, flip, max_pixels
        self.image_size = (image_size[0], image_size[1])
        self.scan = PresenceScan()
        self._presence: Tensor | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def pair(self, index: int) -> Pair:
        """The files of sample ``index``, which is not negative."""

    @abstractmethod
    def settings(self) -> tuple[object, ...]:
        """What decides a sample besides the files."""

    @abstractmethod
    def draw(self, index: int, generator: torch.Generator) -> Sample:
        """A random cut of sample ``index``."""

    @abstractmethod
    def view(self, index: int) -> Sample:
        """Sample ``index``, always the same."""

    def presence(self) -> Bool[Tensor, "num_images K"]:
        """Which classes each map holds; read once, then kept."""
        if self._presence is None:
            if self.scan.cache is not None:
                self.scan.cache.parent.mkdir(parents=True, exist_ok=True)
            self._presence = class_presence(
                self,
                num_classes=self.spec.num_classes,
                ignore_index=self.spec.ignore_index,
                labels_of=self._classes,
                cache=self.scan.cache,
                fingerprint=None if self.scan.cache is None else self._labels_fingerprint(),
                progress=self.scan.progress,
                workers=self.scan.workers,
            )
        return self._presence.clone()

    def fingerprint(self) -> str:
        """A hash of file names, file sizes and settings; the files are not read."""
        pairs = map(self.pair, range(len(self)))
        return _hash_of(self.settings(), (path for pair in pairs for path in pair))

    def _labels_fingerprint(self) -> str:
        """What the presence of classes depends on: the label files and the meaning of ids."""
        ids = self.spec.id_map and sorted(self.spec.id_map.items())
        return _hash_of((ids,), (self.pair(index).labels for index in range(len(self))))

    def read(self, index: int) -> Arrays:
        """The files of sample ``index``, checked against each other.

        Raises:
            DataError: A file is damaged or too large, sizes differ, or an id is unknown.
        """
        pair = self.pair(check_index(self._owner, index, len(self)))
        labels = self._labels(pair.labels)
        size = (labels.shape[0], labels.shape[1])
        image = read_image(pair.image, fits=size, max_pixels=self.max_pixels)
        self._check_size(pair.image, image, size, pair.labels)
        instances = self.instances(index, pair, labels)
        if instances is not None:
            self._check_size(pair.instances, instances, size, pair.labels)
        return Arrays(image, labels, instances)

    def instances(self, index: int, pair: Pair, labels: Tensor) -> npt.NDArray[np.int32] | None:
        """Object ids of sample ``index``, 0 for none; here those of the instance file."""
        del index, labels
        if pair.instances is None:
            return None
        return read_ids(pair.instances, max_pixels=self.max_pixels).astype(np.int32)

    def _labels(self, path: Path) -> Tensor:
        """The class map of a file. Every id is looked up once, not once per pixel."""
        ids = read_ids(path, max_pixels=self.max_pixels)
        if ids.dtype != np.uint8:
            return self._mapped(path, ids)
        known = np.flatnonzero(np.bincount(ids.ravel(), minlength=256))
        classes = self._mapped(path, known).numpy()
        table = np.zeros(256, dtype=classes.dtype)
        table[known] = classes
        return torch.from_numpy(table[ids])

    def _classes(self, index: int) -> Tensor:
        """The classes of a map as a small map ``(1, n)``."""
        path = self.pair(index).labels
        return self._mapped(path, distinct_ids(path, max_pixels=self.max_pixels))[None]

    def _mapped(self, path: Path, ids: npt.NDArray[Any]) -> Tensor:
        try:
            return self.spec.map_ids(ids)
        except InputError as error:
            msg = f"{shown(path)}: {error}"
            raise DataError(msg) from error

    def _check_size(
        self, path: Path | None, found: npt.NDArray[Any], size: tuple[int, int], labels: Path
    ) -> None:
        if found.shape[:2] != size:
            height, width = found.shape[:2]
            msg = (
                f"{shown(path or '')}: is {height} x {width} pixels (height x width), but "
                f"{shown(Path(labels.parent.name) / labels.name)} is {size[0]} x {size[1]}"
            )
            raise DataError(msg)


def _hash_of(settings: tuple[object, ...], paths: Iterable[Path | None]) -> str:
    digest = hashlib.sha256(repr(settings).encode())
    for path in paths:
        size = 0 if path is None else path.stat().st_size
        digest.update(repr((path and path.name, size)).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def nearest(low: float, high: float, count: int, limit: int) -> Tensor:
    """Source pixels under the centres of ``count`` equal parts of [low, high)."""
    centers = low + (torch.arange(count, dtype=torch.float64) + 0.5) * ((high - low) / count)
    return centers.long().clamp_(0, limit - 1)
