"""Pictures: sample grids and loss curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Integer
from numpy.typing import NDArray
from torch import Tensor

from dpsims.data import LabelSpec
from dpsims.errors import NonFiniteError

_GAP = 4
_CAPTION_WIDTH = 92
_BACKGROUND = 255


def to_uint8(images: Float[Tensor, "*B 3 H W"]) -> NDArray[np.uint8]:
    """Images in [-1, 1] as ``(*B, H, W, 3)`` bytes; values outside are clamped.

    Raises:
        NonFiniteError: A pixel is NaN or infinite: it has no byte.
    """
    if not bool(torch.isfinite(images).all()):
        msg = "to_uint8: images must be finite; got NaN or infinite pixels"
        raise NonFiniteError(msg)
    scaled = images.detach().float().clamp(-1, 1).add(1).mul(127.5).round()
    return scaled.to(torch.uint8).movedim(-3, -1).cpu().numpy()


def save_image(path: Path, pixels: NDArray[np.uint8]) -> None:
    """Write ``(H, W, 3)`` bytes as PNG."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def label_pictures(spec: LabelSpec, labels: Integer[Tensor, "B H W"]) -> list[NDArray[np.uint8]]:
    """Each map in the colours of ``spec``."""
    return [spec.colorize(label_map).cpu().numpy() for label_map in labels]


def captioned_grid(
    rows: Sequence[tuple[str, Sequence[NDArray[np.uint8] | None]]], *, scale: int = 2
) -> NDArray[np.uint8]:
    """Rows of pictures, each with its caption at the left.

    Args:
        rows: Caption and pictures ``(H, W, 3)`` of one size; ``None`` leaves a cell empty.
        scale: Enlargement; label maps stay sharp, photographs are smoothed.
    """
    from PIL import Image, ImageDraw, ImageFont

    first = next(cell for _, cells in rows for cell in cells if cell is not None)
    height, width = first.shape[0] * scale, first.shape[1] * scale
    columns = max(len(cells) for _, cells in rows)
    page = Image.new(
        "RGB",
        (_CAPTION_WIDTH + columns * (width + _GAP), len(rows) * (height + _GAP) + _GAP),
        (_BACKGROUND,) * 3,
    )
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=13)
    for row, (caption, cells) in enumerate(rows):
        top = _GAP + row * (height + _GAP)
        pen.multiline_text(
            (8, top + height // 2), caption, fill=(40, 40, 40), font=font, anchor="lm"
        )
        for column, cell in enumerate(cells):
            if cell is None:
                continue
            few_colours = len(np.unique(cell.reshape(-1, 3), axis=0)) <= 256
            smooth = Image.Resampling.NEAREST if few_colours else Image.Resampling.BICUBIC
            picture = Image.fromarray(cell).resize((width, height), smooth)
            page.paste(picture, (_CAPTION_WIDTH + column * (width + _GAP), top))
    return np.asarray(page)


def plot_curves(path: Path, records: Sequence[dict[str, float]]) -> None:
    """One panel per loss term over the steps: every step faint, a running mean on top."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    names = [key for key in records[0] if key.startswith(("d_", "g_"))]
    figure = Figure(figsize=(3.2 * len(names), 2.6), layout="constrained")
    steps = np.array([record["step"] for record in records])
    colours = mpl.colormaps["tab10"](range(10))
    for index, (axis, name) in enumerate(
        zip(np.atleast_1d(figure.subplots(1, len(names))), names, strict=True)
    ):
        values = np.array([record[name] for record in records])
        window = max(len(values) // 40, 1)
        smooth = np.convolve(values, np.ones(window) / window, mode="valid")
        axis.plot(steps, values, color=colours[index], alpha=0.2, linewidth=0.6)
        axis.plot(steps[window - 1 :], smooth, color=colours[index], linewidth=1.6)
        axis.set_title(name.replace("_", " "), fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        top = np.quantile(values, 0.995)
        axis.set_ylim(0, 1.1 * top if top > 0 else 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
