"""The rows of a scan, one after the other, read here or by other processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dpsims._checks import check_tensor
from dpsims.data._label_checks import shortened
from dpsims.errors import DataError, DTypeError, InputError

# ids up to here are counted in a table, larger ones are sorted
_TABLE_SIZE = 1 << 16
# images per message from a worker: few enough that little is lost when a scan is killed
_CHUNK = 16


class PresenceRows(Dataset[np.ndarray | DataError]):
    """Which classes each image holds; an image that cannot be read is its error.

    Args:
        read: Gives the label map of an index.
        num_images: Number of images.
        num_classes: Number of classes.
        ignore_index: Id of unlabelled pixels.
    """

    def __init__(
        self,
        read: Callable[[int], object],
        num_images: int,
        num_classes: int,
        ignore_index: int,
    ) -> None:
        self.read = read
        self.num_images = num_images
        self.num_classes = num_classes
        self.ignore_index = ignore_index

    def __getitem__(self, index: int) -> np.ndarray | DataError:
        # returned, not raised: a loader would wrap the message into a traceback
        try:
            return classes_of(self.read(index), index, self.num_classes, self.ignore_index)
        except DataError as error:
            return error

    def after(self, first: int, *, workers: int) -> Iterator[np.ndarray]:
        """The rows from ``first`` on, in order; the first image with an error raises it."""
        indices = range(first, self.num_images)
        chunks: Iterable[list[np.ndarray | DataError]] = ([self[index]] for index in indices)
        if workers > 0 and indices:
            chunks = self._loader(indices, workers)
        for row in chain.from_iterable(chunks):
            if isinstance(row, DataError):
                raise row
            yield row

    def _loader(self, indices: range, workers: int) -> DataLoader[np.ndarray | DataError]:
        return DataLoader(
            self,
            batch_size=_CHUNK,
            sampler=indices,
            num_workers=min(workers, -(-len(indices) // _CHUNK)),
            collate_fn=list,
            # without one, the loader draws from the global generator
            generator=torch.Generator(),
        )


def classes_of(labels: object, index: int, num_classes: int, ignore_index: int) -> np.ndarray:
    """Row of one image: whether its map holds each class."""
    if isinstance(labels, np.ndarray) and labels.dtype.kind in "iu":
        # uint16 has few operations in torch
        labels = torch.from_numpy(labels.astype(np.int64))
    try:
        check_tensor("class_presence", f"labels of image {index}", labels, "H W", kind="integer")
    except (InputError, DTypeError) as error:
        hint = "; labels_of says how to get the label map of an index"
        raise DataError(f"{error}{hint}") from error
    assert isinstance(labels, Tensor)
    ids = _distinct(labels)
    ids = ids[ids != ignore_index]
    wrong = ids[(ids < 0) | (ids >= num_classes)]
    if wrong.size:
        msg = (
            f"class_presence: labels of image {index} must be in [0, {num_classes}) or the "
            f"ignored id {ignore_index}; got {shortened(wrong.tolist())}"
        )
        raise DataError(msg)
    present = np.zeros(num_classes, dtype=np.bool_)
    present[ids] = True
    return present


def _distinct(labels: Tensor) -> np.ndarray:
    flat = labels.detach().reshape(-1).cpu()
    low, high = (int(end) for end in flat.aminmax())
    if low >= 0 and high < _TABLE_SIZE:
        return np.flatnonzero(torch.bincount(flat).numpy())
    return torch.unique(flat).long().numpy()
