"""The pictures of an evaluation: a sheet of samples, IoU by class, confusion matrix."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Integer
from numpy.typing import NDArray
from torch import Tensor

from dpsims.data import LabelSpec
from dpsims_reference.data.sample import ImageDataset
from dpsims_reference.evaluation.consistency import Scores
from dpsims_reference.evaluation.images import as_8_bit, draw_images, load_batches, spread
from dpsims_reference.figures import captioned_grid, label_pictures, save_image, to_uint8
from dpsims_reference.sampling import TrainedGenerator

_SHEET_MAPS, _SHEET_SAMPLES, _CELL = 6, 4, 192
_CLASSES_PER_COLUMN = 45
_NUMBERED_CLASSES = 20
_INK, _PALE = "#303030", "#d8d8d8"


def write_sheet(
    path: Path, trained: TrainedGenerator, dataset: ImageDataset, *, seed: int
) -> None:
    """Label map, real image and samples of a few maps, and the names of their classes.

    The first sample of a map is the image that the figures are of.
    """
    instances = trained.config.data.instances
    positions = spread(len(dataset), min(_SHEET_MAPS, len(dataset)))
    ((_, batch),) = load_batches(
        dataset, positions, batch_size=len(positions), instances=instances
    )
    rows: list[tuple[str, Any]] = [
        ("label map", label_pictures(dataset.spec, batch.labels)),
        ("real", list(to_uint8(as_8_bit(batch.images, positions)))),
    ]
    for number in range(_SHEET_SAMPLES):
        draws = [(position, number) for position in positions]
        images = draw_images(trained, batch.labels, batch.extra, draws, seed=seed)
        rows.append((f"sample {number + 1}", list(to_uint8(images))))
    scale = max(1, round(_CELL / dataset.image_size[0]))
    save_image(path, _with_legend(captioned_grid(rows, scale=scale), dataset.spec, batch.labels))


def _with_legend(
    grid: NDArray[np.uint8], spec: LabelSpec, labels: Integer[Tensor, "B H W"]
) -> NDArray[np.uint8]:
    """The grid with swatches and names of the shown classes below, most frequent first."""
    from PIL import Image, ImageDraw, ImageFont

    inside = labels[labels != spec.ignore_index].long()
    counts = torch.bincount(inside.flatten(), minlength=spec.num_classes)
    shown = [index for index in counts.argsort(descending=True).tolist() if counts[index] > 0]
    font, swatch, gap, line = ImageFont.load_default(size=13), 13, 6, 24
    left, right = 92, grid.shape[1] - 8
    places, x, y = [], left, 10
    for index in shown:
        width = swatch + gap + round(font.getlength(spec.names[index])) + 3 * gap
        if x + width > right and x > left:
            x, y = left, y + line
        places.append((index, x, y))
        x += width
    strip = Image.new("RGB", (grid.shape[1], y + line + 2), (255, 255, 255))
    pen = ImageDraw.Draw(strip)
    for index, x, y in places:
        pen.rounded_rectangle((x, y, x + swatch, y + swatch), 3, fill=spec.palette[index])
        middle = (x + swatch + gap, y + swatch // 2)
        pen.text(middle, spec.names[index], fill=(40, 40, 40), font=font, anchor="lm")
    return np.concatenate([grid, np.asarray(strip)])


def plot_class_iou(
    path: Path, spec: LabelSpec, fake: Scores, real: Scores, *, segmenter: str
) -> None:
    """Bars of the generated images' IoU by class, best first; a tick marks the real images'.

    Classes that occur nowhere are left out.
    """
    from matplotlib.figure import Figure

    ious, ceilings = fake.per_class_iou.numpy(), real.per_class_iou.numpy()
    order = [index for index in np.argsort(-np.nan_to_num(ious)) if not np.isnan(ious[index])]
    columns = max(1, math.ceil(len(order) / _CLASSES_PER_COLUMN))
    length = max(1, math.ceil(len(order) / columns))
    figure = Figure(figsize=(5.2 * columns, 0.24 * length + 1.1), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, columns, sharex=True))
    for number, axis in enumerate(axes):
        part = order[number * length : (number + 1) * length]
        _bars(axis, part, spec, ious, ceilings)
        axis.set_ylim(length - 0.4, -0.6)
    means = f"mean: generated {fake.miou:.3f} (bars), real {real.miou:.3f} (ticks)"
    figure.suptitle(f"IoU by class, {segmenter}\n{means}", fontsize=10, color=_INK)
    _save(figure, path)


def _bars(
    axis: Any,
    classes: Sequence[int],
    spec: LabelSpec,
    ious: NDArray[np.float64],
    ceilings: NDArray[np.float64],
) -> None:
    rows = np.arange(len(classes))
    colours = [tuple(channel / 255 for channel in spec.palette[index]) for index in classes]
    axis.barh(rows, ious[classes], color=colours, height=0.72, edgecolor=_PALE, linewidth=0.5)
    axis.vlines(ceilings[classes], rows - 0.42, rows + 0.42, color=_INK, linewidth=1.4)
    for row, index in enumerate(classes):
        axis.text(1.09, row, f"{ious[index]:.2f}", va="center", ha="right", fontsize=7.5)
    axis.set_yticks(rows, [spec.names[index] for index in classes], fontsize=8, color=_INK)
    axis.set_xlim(0, 1.1)
    axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"], fontsize=8)
    axis.set_axisbelow(True)
    axis.grid(axis="x", color=_PALE, linewidth=0.6)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def plot_confusion(path: Path, spec: LabelSpec, scores: Scores, *, segmenter: str) -> None:
    """The confusion matrix as shares of each row: where the pixels of a class went.

    Classes that occur nowhere are left out; few classes get numbers.
    """
    from matplotlib.figure import Figure

    counts = scores.confusion.numpy().astype(np.float64)
    present = np.flatnonzero(counts.sum(0) + counts.sum(1))
    counts = counts[np.ix_(present, present)]
    totals = counts.sum(1, keepdims=True)
    shares = np.divide(counts, totals, out=np.full_like(counts, np.nan), where=totals > 0)
    size = min(max(0.3 * len(present) + 2.2, 4.2), 16)
    figure = Figure(figsize=(size + 0.6, size), layout="constrained")
    axis = figure.subplots()
    drawn = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    bar = figure.colorbar(drawn, shrink=0.7, ticks=[0, 0.5, 1])
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    names = [spec.names[index] for index in present]
    letters = 8 if len(names) <= 2 * _NUMBERED_CLASSES else 5
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=letters)
    axis.set_yticks(range(len(names)), names, fontsize=letters)
    if len(names) <= _NUMBERED_CLASSES:
        for (row, column), share in np.ndenumerate(shares):
            if share >= 0.005:
                ink = "white" if share > 0.6 else _INK
                text = "1" if share >= 0.995 else f"{share:.2f}"[1:]
                axis.text(column, row, text, ha="center", va="center", fontsize=6.5, color=ink)
    axis.set_xlabel("found in the generated image", fontsize=9)
    axis.set_ylabel("label map", fontsize=9)
    axis.set_title(f"Where the pixels went, {segmenter}", fontsize=10, color=_INK)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    _save(figure, path)


def write_confusion(path: Path, spec: LabelSpec, scores: Scores) -> None:
    """The confusion matrix in pixels as CSV: rows by label map, columns as found."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["label map", *spec.names])
        for name, row in zip(spec.names, scores.confusion.tolist(), strict=True):
            writer.writerow([name, *row])


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
