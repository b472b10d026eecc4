"""Looks through a folder of images and label maps before anyone trains on it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dpsims._checks import check_int
from dpsims.errors import DataError
from dpsims_reference.data.files import (
    IMAGE_SUFFIXES,
    LABEL_SUFFIXES,
    files_by_stem,
    read_ids,
    read_image,
    shown,
)

_LISTED = 5


@dataclass
class IdCount:
    """How often one id occurs."""

    pixels: int = 0
    files: list[str] = field(default_factory=list)


@dataclass
class FolderReport:
    """What :func:`check_folder` found.

    Attributes:
        root: The folder.
        num_pairs: Images that have a label map.
        num_pixels: Pixels of all readable label maps.
        ids: Every id that occurs, with its pixels and the maps that hold it.
        num_classes: The number of classes asked for, or ``None``.
        ignore_index: The id of unlabelled pixels.
        unmatched: Files without a partner of the same name.
        unreadable: One sentence for each file that cannot be read.
        sizes_differ: One sentence for each image that does not fit its map.
        fatal: Why the folder could not be looked through at all.

    Source:
        Not from the paper: the check behind ``python -m dpsims_reference check-data``.
    """

    root: Path
    num_classes: int | None
    ignore_index: int
    num_pairs: int = 0
    num_pixels: int = 0
    ids: dict[int, IdCount] = field(default_factory=dict)
    unmatched: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    sizes_differ: list[str] = field(default_factory=list)
    fatal: list[str] = field(default_factory=list)

    @property
    def classes(self) -> list[int]:
        """The ids that occur, without the ignored one, in order."""
        return sorted(i for i in self.ids if i != self.ignore_index)

    @property
    def out_of_range(self) -> dict[int, IdCount]:
        """Ids that are neither below ``num_classes`` nor ignored; empty when it is ``None``."""
        if self.num_classes is None:
            return {}
        return {i: self.ids[i] for i in self.classes if not 0 <= i < self.num_classes}

    @property
    def problems(self) -> list[str]:
        """One sentence for everything that would stop or spoil a training run."""
        found = list(self.fatal)
        if not self.fatal and self.num_pairs == 0:
            found.append("There is not a single image with a label map of the same name.")
        if self.unmatched:
            found.append(f"{_many(self.unmatched, 'file has', 'files have')} no partner of the "
                         f"same name: {_listed(self.unmatched)}.")  # fmt: skip
        found += [f"{sentence}." for sentence in [*self.unreadable, *self.sizes_differ]]
        found += [
            f"Id {i} is not below num_classes={self.num_classes}: {count.pixels} pixels in "
            f"{_many(count.files, 'file', 'files')}: {_listed(count.files)}."
            for i, count in self.out_of_range.items()
        ]
        if self.num_pairs and not self.unreadable and not self.classes:
            found.append(f"Every pixel of every map is unlabelled (id {self.ignore_index}).")
        return found


def check_folder(
    root: str | Path, *, num_classes: int | None = None, ignore_index: int = 255
) -> FolderReport:
    """Read every image and map of a folder and collect what is wrong, instead of stopping.

    Args:
        root: Folder with ``images/`` and ``labels/``.
        num_classes: Number of classes you mean to train; ``None`` accepts any ids.
        ignore_index: Id of unlabelled pixels.

    Raises:
        InputError: An argument is out of range. Nothing is raised for what is in the folder.

    Source:
        Not from the paper: the check behind ``python -m dpsims_reference check-data``.
    """
    check_int("check_folder", "ignore_index", ignore_index, minimum=None)
    if num_classes is not None:
        check_int("check_folder", "num_classes", num_classes)
    report = FolderReport(Path(root), num_classes, ignore_index)
    try:
        images = files_by_stem(report.root, report.root / "images", IMAGE_SUFFIXES)
        labels = files_by_stem(report.root, report.root / "labels", LABEL_SUFFIXES)
    except DataError as error:
        report.fatal.append(f"{error}.")
        return report
    report.unmatched += [f"images/{images[n].name}" for n in images if n not in labels]
    report.unmatched += [f"labels/{labels[n].name}" for n in labels if n not in images]
    ids: defaultdict[int, IdCount] = defaultdict(IdCount)
    for name in images:
        if name in labels:
            report.num_pairs += 1
            _check_pair(report, ids, images[name], labels[name])
    report.ids = dict(sorted(ids.items()))
    return report


def _check_pair(
    report: FolderReport, ids: defaultdict[int, IdCount], image: Path, labels: Path
) -> None:
    size = None
    try:
        found = read_ids(labels)
    except DataError as error:
        report.unreadable.append(str(error))
    else:
        size = (found.shape[0], found.shape[1])
        report.num_pixels += found.size
        for value, pixels in zip(*np.unique(found, return_counts=True), strict=True):
            ids[int(value)].pixels += int(pixels)
            ids[int(value)].files.append(labels.name)
    try:
        picture = read_image(image, fits=size)
    except DataError as error:
        report.unreadable.append(str(error))
        return
    if size is not None and picture.shape[:2] != size:
        height, width = picture.shape[:2]
        report.sizes_differ.append(
            f"images/{shown(image.name)} is {height} x {width} pixels (height x width), but its "
            f"map is {size[0]} x {size[1]}"
        )


def format_report(report: FolderReport) -> str:
    """The report as text: problems, a table of ids, and what to put in the configuration.

    Source:
        Not from the paper: printed by ``python -m dpsims_reference check-data``.
    """
    problems = report.problems
    lines = [f"{shown(report.root)}: {report.num_pairs} images with label maps"]
    lines += [f"  problem: {problem}" for problem in problems] or ["  no problems found"]
    if report.ids:
        lines += ["", f"{'id':>8} {'% of pixels':>12} {'% of images':>12}"]
        maps = len({name for count in report.ids.values() for name in count.files})
        for i, count in report.ids.items():
            note = "  (ignored)" if i == report.ignore_index else ""
            share, spread = count.pixels / report.num_pixels, len(count.files) / maps
            lines.append(f"{i:>8} {100 * share:>12.3f} {100 * spread:>12.1f}{note}")
        lines += ["", *_suggestion(report)]
    return "\n".join(lines)


def _suggestion(report: FolderReport) -> list[str]:
    classes = report.classes
    if not classes:
        return ["For the configuration: nothing to suggest, no pixel has a class."]
    dense = classes == list(range(classes[0], classes[-1] + 1)) and classes[0] == 0
    lines = ["For the configuration:"]
    if report.num_classes is not None and not report.out_of_range:
        lines.append(f"  num_classes = {report.num_classes}")
    elif dense:
        lines.append(f"  num_classes = {len(classes)}")
    else:
        pairs = ", ".join(f"{i}: {n}" for n, i in enumerate(classes))
        lines.append(f"  num_classes = {len(classes)}   (the ids have gaps, so map them)")
        lines.append(f"  id_map = {{{pairs}, {report.ignore_index}: {report.ignore_index}}}")
    lines.append(f"  ignore_index = {report.ignore_index}")
    if 255 in classes:
        lines.append("  id 255 occurs and is usually 'unlabelled': consider ignore_index = 255")
    return lines


def _many(items: list[str], one: str, more: str) -> str:
    return f"{len(items)} {one if len(items) == 1 else more}"


def _listed(names: list[str]) -> str:
    more = "" if len(names) <= _LISTED else f" and {len(names) - _LISTED} more"
    return ", ".join(shown(name, length=60) for name in names[:_LISTED]) + more
