"""The sheet that shows what the pseudo-labeller found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpsims._optional import require
from dpsims.data import LabelSpec
from dpsims_reference.data.files import Pixels, shown

_PANEL, _GAP, _TITLE = 300, 14, 22
_INK, _FAINT, _PAPER = (32, 33, 38), (120, 122, 130), (255, 255, 255)


class Panel(NamedTuple):
    """One row of the overview."""

    title: str
    image: Pixels
    labels: Tensor


def draw_sheet(panels: Sequence[Panel], spec: LabelSpec, path: Path) -> None:
    """Write a sheet: photo, map, and the map's borders on the photo; below, the classes."""
    pillow = require("PIL.Image", extra="train", purpose="drawing the overview")
    tools: tuple[Any, Any] = (
        require("PIL.ImageDraw", extra="train", purpose="drawing the overview"),
        require("PIL.ImageFont", extra="train", purpose="drawing the overview"),
    )
    font = tools[1].load_default(size=13)
    blocks = [_drawn(panel, spec) for panel in panels]
    counts = torch.zeros(spec.num_classes, dtype=torch.long)
    for panel in panels:
        counts += torch.bincount(panel.labels.flatten().long(), minlength=spec.num_classes)
    columns = max(1, (3 * _PANEL + 2 * _GAP) // 116)
    legend = 8 + 26 * -(-spec.num_classes // columns)
    height = sum(block[0].shape[0] + _TITLE + _GAP for block in blocks) + legend + _GAP
    sheet = pillow.new("RGB", (3 * _PANEL + 4 * _GAP, height), _PAPER)
    pen = tools[0].Draw(sheet)
    top = _GAP
    for panel, block in zip(panels, blocks, strict=True):
        titles = (shown(panel.title, length=38), "pseudo-labels", "borders")
        for n, (title, picture) in enumerate(zip(titles, block, strict=True)):
            left = _GAP + n * (_PANEL + _GAP)
            pen.text((left, top), title, fill=_FAINT if n else _INK, font=font)
            sheet.paste(pillow.fromarray(picture), (left, top + _TITLE))
        top += block[0].shape[0] + _TITLE + _GAP
    shares = (100 * counts / counts.sum().clamp(min=1)).tolist()
    for n, (name, color, share) in enumerate(zip(spec.names, spec.palette, shares, strict=True)):
        left, line = _GAP + 116 * (n % columns), top + 8 + 26 * (n // columns)
        pen.rounded_rectangle((left, line, left + 20, line + 16), radius=3, fill=tuple(color))
        text = f"{name.removeprefix('class ')}  {share:.1f} %"
        pen.text((left + 27, line), text, fill=_INK, font=font)
    sheet.save(path)


def _drawn(panel: Panel, spec: LabelSpec) -> tuple[Pixels, Pixels, Pixels]:
    """Photo, map and borders, all ``_PANEL`` wide."""
    pillow = require("PIL.Image", extra="train", purpose="drawing the overview")
    rows, cols = panel.labels.shape
    size = (_PANEL, max(1, round(rows * _PANEL / cols)))
    photo = np.array(pillow.fromarray(panel.image).resize(size, pillow.Resampling.LANCZOS))
    ids = np.array(pillow.fromarray(panel.labels.numpy()).resize(size, pillow.Resampling.NEAREST))
    colors = spec.colorize(torch.from_numpy(ids)).numpy()
    border = np.zeros(ids.shape, np.bool_)
    across, down = ids[:, 1:] != ids[:, :-1], ids[1:] != ids[:-1]
    border[:, 1:] |= across
    border[:, :-1] |= across
    border[1:] |= down
    border[:-1] |= down
    washed = (0.72 * photo + 0.28 * colors).astype(np.uint8)
    washed[border] = (255, 255, 255)
    return photo, colors, washed
