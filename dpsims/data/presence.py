"""Which classes occur in which images: one scan over a data set, kept in a file."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sized
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from dpsims._checks import check_int
from dpsims.data._presence_cache import CorruptCacheError, ScanKey, read_scan, write_scan
from dpsims.data._presence_rows import PresenceRows
from dpsims.errors import DTypeError, InputError


def class_presence(
    dataset: Sized,
    *,
    num_classes: int,
    ignore_index: int = 255,
    labels_of: Callable[[int], object] | None = None,
    cache: str | PathLike[str] | None = None,
    fingerprint: str | None = None,
    save_every: int = 1000,
    progress: Callable[[int, int], object] | None = None,
    workers: int = 0,
) -> Bool[Tensor, "I K"]:
    """Find the classes that have at least one pixel in each image of a data set.

    The scan runs in this process, or in ``workers`` others, and gives the same rows either way.
    With ``cache`` it is written to a file as it goes: a scan that was killed continues from there,
    a finished one is read back.

    Args:
        dataset: What has a length and gives, for an index, an integer label map ``(H, W)`` as a
            tensor or NumPy array.
        num_classes: Number ``K`` of classes.
        ignore_index: Id of unlabelled pixels; it never counts as a class.
        labels_of: Gives the label map of an index, for data sets whose items hold more than that,
            or that would read the image too. ``dataset`` then only needs a length.
        cache: File that keeps the result. It is replaced in one step, so that it is sound after a
            crash and may be shared by processes. ``None`` keeps nothing.
        fingerprint: Text that changes whenever the label maps do, such as a hash of the list of
            files; required with ``cache``. A file with another fingerprint, length,
            ``num_classes`` or ``ignore_index`` is scanned anew and replaced.
        save_every: Number of images between two writes of an unfinished scan.
        progress: Called as ``progress(done, total)`` after every image, in this process.
        workers: Number of processes that read label maps; 0 reads them here. Where processes are
            not forked (Windows, macOS), ``dataset`` and ``labels_of`` must be picklable.

    Shape:
        - output ``(I, K)``, bool, for ``I`` images

    Raises:
        InputError: The data set is empty, a number is out of range, or ``cache`` comes without
            ``fingerprint``.
        DTypeError: An argument has another type.
        DataError: An item is no integer map ``(H, W)``, or holds an id that is neither a class nor
            ``ignore_index``; the message names its index.

    Warns:
        RuntimeWarning: The cache file is damaged; the scan starts anew.

    Note:
        Units: none. Cost: reading every label map once, plus ``I * K / 8`` bytes of cache. Where
        ``labels_of`` can tell the distinct ids faster than the map, it may return those, as
        ``(1, n)``. The file holds numbers and a checksum, never pickled objects. Several processes
        that share a ``cache`` do no harm, but each of them scans.

    Source:
        Berrada et al., CVPR 2024, Sec. 4.1, which needs the fraction of training images where a
        class appears. That one pixel is enough is our reading.

    Example:
        >>> maps = [torch.tensor([[0, 0]]), torch.tensor([[2, 255]])]
        >>> class_presence(maps, num_classes=3)
        tensor([[ True, False, False],
                [False, False,  True]])
    """
    check_int("class_presence", "num_classes", num_classes)
    check_int("class_presence", "ignore_index", ignore_index, minimum=None)
    check_int("class_presence", "save_every", save_every)
    check_int("class_presence", "workers", workers, minimum=0)
    num_images = _checked_length(dataset)
    path = _checked_cache(cache, fingerprint)
    read = _checked_reader(dataset, labels_of)
    if progress is not None and not callable(progress):
        msg = f"class_presence: progress must be callable; got {type(progress).__name__}"
        raise DTypeError(msg)
    key = ScanKey(fingerprint or "", num_images, num_classes, ignore_index)
    presence, done = _started(path, key)
    rows = PresenceRows(read, num_images, num_classes, ignore_index)
    for finished, row in enumerate(rows.after(done, workers=workers), start=done + 1):
        presence[finished - 1] = row
        if path is not None and (finished % save_every == 0 or finished == num_images):
            write_scan(path, key, presence[:finished])
        if progress is not None:
            progress(finished, num_images)
    return torch.from_numpy(presence)


def _checked_length(dataset: object) -> int:
    if not isinstance(dataset, Sized):
        msg = f"class_presence: dataset must have a length; got {type(dataset).__name__}"
        raise DTypeError(msg)
    if len(dataset) == 0:
        msg = "class_presence: dataset must not be empty; got length 0"
        raise InputError(msg)
    return len(dataset)


def _checked_cache(cache: str | PathLike[str] | None, fingerprint: str | None) -> Path | None:
    if fingerprint is not None and not isinstance(fingerprint, str):
        msg = f"class_presence: fingerprint must be a str; got {type(fingerprint).__name__}"
        raise DTypeError(msg)
    if cache is None:
        return None
    if not isinstance(cache, str | PathLike):
        msg = f"class_presence: cache must be a path; got {type(cache).__name__}"
        raise DTypeError(msg)
    if fingerprint is None:
        msg = "class_presence: fingerprint must be given together with cache; got None"
        raise InputError(msg)
    path = Path(cache)
    # said before the scan: hours later it would be lost
    if path.is_dir() or not path.parent.is_dir():
        msg = f"class_presence: cache must be a file in a folder that exists; got {path}"
        raise InputError(msg)
    return path


def _checked_reader(
    dataset: object, labels_of: Callable[[int], object] | None
) -> Callable[[int], object]:
    read = getattr(dataset, "__getitem__", None) if labels_of is None else labels_of
    if not callable(read):
        msg = (
            "class_presence: dataset must give label maps by index, or labels_of must be a "
            f"callable; got {type(dataset).__name__} and {type(labels_of).__name__}"
        )
        raise DTypeError(msg)
    return read


def _started(path: Path | None, key: ScanKey) -> tuple[np.ndarray, int]:
    """The table to fill, and how many of its rows are known already."""
    presence = np.zeros((key.num_images, key.num_classes), dtype=np.bool_)
    if path is None:
        return presence, 0
    try:
        known = read_scan(path, key)
    except CorruptCacheError as error:
        msg = f"class_presence: the cache {path} is damaged ({error}); scanning anew"
        warnings.warn(msg, RuntimeWarning, stacklevel=3)
        return presence, 0
    presence[: len(known)] = known
    return presence, len(known)
