"""Label maps without labels, for a whole folder of photographs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dpsims._optional import require
from dpsims.data import LabelSpec
from dpsims.errors import DataError
from dpsims_reference.data.files import IMAGE_SUFFIXES, Pixels, files_by_stem, read_image, shown
from dpsims_reference.data.label_sheet import Panel, draw_sheet
from dpsims_reference.data.labeller import PseudoLabeller as PseudoLabeller, to_working_size

LABELLER_FILE = "labeller.safetensors"
_MOST_FITTED, _MOST_SHOWN = 64, 8


def pseudo_label_folder(
    folder: str | Path, out_folder: str | Path, num_classes: int, *, seed: int = 0
) -> list[Path]:
    """Label a folder of photographs, so that ``out_folder`` can be trained on.

    Writes ``labels/NAME.png`` (ids), ``labels.json`` (the classes, and the labeller's file name),
    ``labeller.safetensors`` with its ``.json``, and ``overview.png``, which shows up to eight
    photos with their maps. Photos that are not in ``out_folder/images`` yet are copied there.

    Args:
        folder: Holds PNG, JPEG, WebP or BMP files, itself or in ``images/``.
        out_folder: Where to write; may be ``folder``.
        num_classes: Number of classes to find.
        seed: Seed of the clustering.

    Returns:
        The label files, in the order of their names.

    Raises:
        DataError: There are no images, one cannot be read or is too small, they hold too few
            different colours, or ``labels/`` holds maps that this function has not made.
        InputError: ``num_classes`` is out of range.

    Note:
        Classes are found on at most 64 of the photos, evenly spread over the names. Maps are made
        on a copy of at most 512 pixels and enlarged to the photo's size.

    Source:
        Not from the paper: the function behind ``python -m dpsims_reference pseudo-labels``.
    """
    root, out = Path(folder), Path(out_folder)
    source = root / "images" if (root / "images").is_dir() else root
    photos = _photos(root, source, out)
    labeller = PseudoLabeller(num_classes, seed=seed)
    fitted = [_working_copy(path)[1] for path in photos[:: -(-len(photos) // _MOST_FITTED)]]
    try:
        labeller.fit(fitted)
    except DataError as error:
        msg = f"{shown(source)}: {error}"
        raise DataError(msg) from error
    spec = LabelSpec(num_classes)
    written, panels = list[Path](), list[Panel]()
    (out / "labels").mkdir(parents=True, exist_ok=True)
    for path in photos:
        pixels, small = _working_copy(path)
        labels = _write_labels(
            labeller.predict(small), pixels, out / "labels" / f"{path.stem}.png"
        )
        written.append(out / "labels" / f"{path.stem}.png")
        if len(panels) < _MOST_SHOWN:
            panels.append(Panel(path.name, pixels, labels))
    _copy_photos(photos, source, out / "images")
    labeller.save(out / LABELLER_FILE)
    settings = {**spec.to_dict(), "labeller": LABELLER_FILE}
    (out / "labels.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    draw_sheet(panels, spec, out / "overview.png")
    return written


def _photos(root: Path, source: Path, out: Path) -> list[Path]:
    photos = list(files_by_stem(root, source, IMAGE_SUFFIXES).values())
    if source == out:
        # a sheet from an earlier run is no photograph
        photos = [path for path in photos if path.name != "overview.png"]
    if not photos:
        msg = f"{shown(source)}: holds no images (subfolders are not read)"
        raise DataError(msg)
    foreign = (out / "labels").is_dir() and any((out / "labels").iterdir())
    if foreign and not (out / LABELLER_FILE).exists():
        msg = f"{shown(out / 'labels')}: holds label maps already; choose another out_folder"
        raise DataError(msg)
    return photos


def _working_copy(path: Path) -> tuple[Pixels, Tensor]:
    pixels = read_image(path)
    try:
        return pixels, to_working_size(pixels)
    except ValueError as error:
        msg = f"{shown(path)}: {error}"
        raise DataError(msg) from error


def _write_labels(labels: Tensor, pixels: Pixels, path: Path) -> Tensor:
    """Enlarge a map to its photo, nearest pixel, and write it."""
    pillow = require("PIL.Image", extra="train", purpose="writing label maps")
    size = (pixels.shape[1], pixels.shape[0])
    picture = pillow.fromarray(labels.numpy()).resize(size, pillow.Resampling.NEAREST)
    picture.save(path)
    return torch.from_numpy(np.array(picture))


def _copy_photos(photos: list[Path], source: Path, target: Path) -> None:
    if source.resolve() == target.resolve():
        return
    target.mkdir(parents=True, exist_ok=True)
    for path in photos:
        shutil.copyfile(path, target / path.name)
