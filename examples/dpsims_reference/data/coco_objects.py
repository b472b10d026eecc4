"""The objects of COCO's ``instances_*.json``, painted where the label map agrees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dpsims.errors import DataError
from dpsims_reference.data.files import shown

Points = npt.NDArray[np.float32]


class _Outline(NamedTuple):
    image: int
    category: int
    rings: list[Points]


class CocoObjects:
    """Outlines of all objects, in a few flat arrays that loader processes share.

    Args:
        path: ``instances_train2017.json`` or ``instances_val2017.json``.

    Raises:
        DataError: The file cannot be read.

    Note:
        Groups (``iscrowd``) are left out: they are no single object. A pixel belongs to an object
        when its centre lies inside the outline.

    Source:
        Not from the paper: the format is described at https://cocodataset.org/#format-data.
    """

    def __init__(self, path: Path) -> None:
        outlines = _read_outlines(path)
        rings = [ring for outline in outlines for ring in outline.rings]
        self._points: Points = np.concatenate([*rings, np.zeros((0, 2), np.float32)])
        if not np.isfinite(self._points).all():
            raise _damaged(path, "points that are not finite")
        self._first_ring = _starts([len(outline.rings) for outline in outlines])
        self._first_point = _starts([len(ring) for ring in rings])
        self._categories = np.array([outline.category for outline in outlines], np.int64)
        images = np.array([outline.image for outline in outlines], np.int64)
        # larger objects come first, smaller ones are painted over them
        firsts = self._first_point[self._first_ring[:-1]]
        spans = np.maximum.reduceat(self._points, firsts) - np.minimum.reduceat(
            self._points, firsts
        )
        self._order = np.lexsort((-spans.prod(1), images))
        self._images = images[self._order]

    def paint(self, image: int, labels: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
        """Object ids of an image, 0 where there is none.

        Args:
            image: COCO's number of the image.
            labels: Its label map ``(H, W)``. An object is painted only on pixels of its category.
        """
        ids = np.zeros(labels.shape, np.int32)
        first, last = np.searchsorted(self._images, [image, image + 1])
        for number, outline in enumerate(self._order[first:last], start=1):
            rings = [
                self._points[self._first_point[ring] : self._first_point[ring + 1]]
                for ring in range(self._first_ring[outline], self._first_ring[outline + 1])
            ]
            _paint_one(ids, labels, rings, int(self._categories[outline]), number)
        return ids


def _paint_one(
    ids: npt.NDArray[np.int32],
    labels: npt.NDArray[Any],
    rings: list[Points],
    category: int,
    number: int,
) -> None:
    size = np.array(labels.shape[::-1])
    corners = np.concatenate(rings)
    low = np.clip(np.floor(corners.min(0)), 0, size).astype(int)
    high = np.clip(np.ceil(corners.max(0)), 0, size).astype(int)
    if (high <= low).any():
        return
    part = slice(low[1], high[1]), slice(low[0], high[0])
    inside = labels[part] == category
    inside &= np.any([_enclosed(ring - low, inside.shape) for ring in rings], axis=0)
    ids[part][inside] = number


def _enclosed(ring: Points, shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """Pixels whose centre lies inside a closed line, by the even-odd rule."""
    height, width = shape
    start = ring.astype(np.float64)
    end = np.roll(start, -1, axis=0)
    centers = np.arange(height) + 0.5
    edge, row = np.nonzero((start[:, 1:] > centers) != (end[:, 1:] > centers))
    (x, y), (run, rise) = start[edge].T, (end - start)[edge].T
    crossing = x + (centers[row] - y) * run / rise
    column = np.clip(np.ceil(crossing - 0.5), 0, width).astype(np.int64)
    turns = np.bincount(row * (width + 1) + column, minlength=height * (width + 1))
    return (turns.reshape(height, width + 1).cumsum(1)[:, :-1] & 1).astype(np.bool_)


def _read_outlines(path: Path) -> list[_Outline]:
    try:
        # each record is packed as it is read: as Python numbers the file would fill the memory
        content = json.loads(path.read_bytes(), object_hook=_packed)
        outlines = content["annotations"]
    except FileNotFoundError as error:
        msg = f"{shown(path)}: no such file; download: https://cocodataset.org/#download"
        raise DataError(msg) from error
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error!s:.100}") from error
    if not isinstance(outlines, list) or not all(isinstance(o, _Outline) for o in outlines):
        raise _damaged(path, "not all annotations have outlines")
    return [outline for outline in outlines if outline.rings]


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(f"{shown(path)}: is not a readable file of COCO instances ({reason})")


def _packed(record: dict[str, Any]) -> Any:
    if "segmentation" not in record:
        return record
    rings = list[Points]()
    if not record["iscrowd"]:
        rings = [np.array(ring, np.float32).reshape(-1, 2) for ring in record["segmentation"]]
    # np.int64 refuses numbers that the arrays cannot hold
    image, category = int(np.int64(record["image_id"])), int(np.int64(record["category_id"]))
    # fewer than three points enclose nothing
    return _Outline(image, category, [ring for ring in rings if len(ring) >= 3])


def _starts(counts: list[int]) -> npt.NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(np.array(counts, np.int64))]).astype(np.int64)
