"""Your own images with label maps, from a folder."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from dpsims._checks import check_choice
from dpsims._optional import require
from dpsims.data import LabelSpec
from dpsims.errors import DataError
from dpsims_reference.data.files import (
    IMAGE_SUFFIXES,
    LABEL_SUFFIXES,
    MAX_PIXELS,
    files_by_stem,
    shown,
)
from dpsims_reference.data.folder_report import (
    FolderReport as FolderReport,
    check_folder as check_folder,
    format_report as format_report,
)
from dpsims_reference.data.label_file import (
    labeller_path,
    read_label_spec as read_label_spec,
)
from dpsims_reference.data.labeller import PseudoLabeller
from dpsims_reference.data.paired import Arrays, Pair, PairedDataset, nearest
from dpsims_reference.data.sample import Sample, check_index, flip_sample, random_below

_LARGEST_ZOOM = 1.25


class FolderDataset(PairedDataset):
    r"""Images of ``root/images`` with the ids of ``root/labels``, matched by file name.

    ``instances/`` beside them, where it exists, holds one object id per pixel (0: none).

    Args:
        root: The folder. Links that lead out of it are refused.
        spec: What the ids in the files mean.
        image_size: Height and width of every sample.
        crop: ``"random"`` keeps the aspect: the image is scaled to cover ``image_size`` (up to
            1.25 times that) and cut at a random place. ``"resize"`` squeezes it whole.
        flip: Mirror half of the training samples.
        max_pixels: Largest file that is unpacked.

    Shape:
        - image ``(3, H, W)`` float32 in [-1, 1]; labels ``(H, W)`` uint8 (int64 where the spec
          needs it); instances ``(H, W)`` int32, or ``None``

    Raises:
        DataError: The folder is empty, files lack their partner (the first ten are listed), or
            one is empty or a link out of ``root``. When a sample is read: its file is damaged or
            too large, image and map differ in size, or an id is unknown; the message names it.
        InputError: An argument is out of range.

    Note:
        Images: PNG, JPEG, WebP, BMP. Maps: PNG of one integer channel or a palette, whose indices
        count, never its colours. Images are resized with an antialiasing filter, maps to the
        nearest pixel, so no id is ever invented. ``presence`` reads every map once.

    Source:
        Not from the paper. Its crops: Sec. 4.1.
    """

    def __init__(
        self,
        root: str | Path,
        spec: LabelSpec,
        *,
        image_size: Sequence[int],
        crop: Literal["random", "resize"] = "random",
        flip: bool = True,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        super().__init__(spec, image_size=image_size, flip=flip, max_pixels=max_pixels)
        check_choice("FolderDataset", "crop", crop, ("random", "resize"))
        self.root, self.crop = Path(root), crop
        self._pairs = _pairs(self.root)

    def __len__(self) -> int:
        return len(self._pairs)

    def pair(self, index: int) -> Pair:
        """The files of sample ``index``."""
        return self._pairs[index]

    def settings(self) -> tuple[object, ...]:
        """Classes, size and crop."""
        return self.spec.to_dict(), self.image_size, self.crop

    def name(self, index: int) -> str:
        """File name of sample ``index``, without folder and suffix."""
        return self._pairs[check_index("FolderDataset", index, len(self))].image.stem

    @functools.cached_property
    def labeller(self) -> PseudoLabeller | None:
        """The labeller that made the maps, where ``labels.json`` names its file."""
        path = labeller_path(self.root)
        return None if path is None else PseudoLabeller.load(path)

    def draw(self, index: int, generator: torch.Generator) -> Sample:
        """Sample ``index``, randomly scaled, cut and mirrored."""
        arrays = self.read(index)
        zoom, *place = torch.rand(3, generator=generator, device=generator.device).tolist()
        mirrored = self.flip and random_below(2, generator) == 1
        box = self._box(arrays, 1 + zoom * (_LARGEST_ZOOM - 1), place)
        sample = self._resample(arrays, box)
        return flip_sample(sample) if mirrored else sample

    def view(self, index: int) -> Sample:
        """Sample ``index``, cut at the centre."""
        arrays = self.read(index)
        return self._resample(arrays, self._box(arrays, 1.0, [0.5, 0.5]))

    def _box(self, arrays: Arrays, zoom: float, place: list[float]) -> tuple[float, ...]:
        """Left, top, right and bottom of the part of the image that becomes the sample."""
        rows, cols = arrays.image.shape[:2]
        if self.crop == "resize":
            return 0.0, 0.0, float(cols), float(rows)
        height, width = self.image_size
        scale = min(rows / height, cols / width) / zoom
        top = place[0] * (rows - height * scale)
        left = place[1] * (cols - width * scale)
        return left, top, left + width * scale, top + height * scale

    def _resample(self, arrays: Arrays, box: tuple[float, ...]) -> Sample:
        """Image through an antialiasing filter, maps to the nearest pixel, from the same box."""
        left, top, right, bottom = box
        height, width = self.image_size
        pillow = require("PIL.Image", extra="train", purpose="reading images")
        picture = pillow.fromarray(arrays.image).resize(
            (width, height),
            pillow.Resampling.BICUBIC,
            box=(left, top, min(right, arrays.image.shape[1]), min(bottom, arrays.image.shape[0])),
        )
        image = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
        rows = nearest(top, bottom, height, arrays.image.shape[0])
        cols = nearest(left, right, width, arrays.image.shape[1])
        labels = arrays.labels[rows][:, cols]
        instances = None
        if arrays.instances is not None:
            instances = torch.from_numpy(arrays.instances)[rows][:, cols]
        return Sample(image.float() / 127.5 - 1, labels, instances)


def _pairs(root: Path) -> list[Pair]:
    list_files = functools.partial(files_by_stem, root)
    images = list_files(root / "images", IMAGE_SUFFIXES)
    labels = list_files(root / "labels", LABEL_SUFFIXES)
    if not images:
        msg = f"{shown(root / 'images')}: holds no images (subfolders are not read)"
        raise DataError(msg)
    partners = {"labels": labels}
    if (root / "instances").is_dir():
        partners["instances"] = list_files(root / "instances", LABEL_SUFFIXES)
    lonely = [f"images/{images[name].name}" for name in images if name not in labels]
    for kind, files in partners.items():
        lonely += [f"{kind}/{files[name].name}" for name in files if name not in images]
        lonely += [
            f"images/{images[n].name}" for n in images if n not in files and kind != "labels"
        ]
    if lonely:
        first = ", ".join(shown(name, length=40) for name in lonely[:10])
        count = f"{len(lonely)} files have no partner of the same name"
        msg = f"{shown(root, length=60)}: {count}: {first}"
        raise DataError(msg)
    instances = partners.get("instances", {})
    return [Pair(images[name], labels[name], instances.get(name)) for name in images]
