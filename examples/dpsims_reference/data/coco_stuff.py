"""COCO-Stuff (164k) from its official folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from dpsims.data import LabelSpec
from dpsims.errors import DataError
from dpsims_reference.data.class_names import COCO_STUFF_NAMES
from dpsims_reference.data.coco_objects import CocoObjects
from dpsims_reference.data.files import MAX_PIXELS, shown
from dpsims_reference.data.official import (
    CUT_256_OF_286,
    Kind,
    OfficialDataset,
    Release,
    Split,
    split_of,
)
from dpsims_reference.data.paired import Pair

_PAGES = "https://cocodataset.org/#download and https://github.com/nightrome/cocostuff#downloads"
_COUNTS = {"train2017": 118_287, "val2017": 5_000}


def coco_stuff_spec() -> LabelSpec:
    """The 183 classes of COCO-Stuff.

    Class ids are COCO's category ids: 1 to 91 things, 92 to 182 stuff, 0 unlabelled. The maps hold
    them less one, and 255 for unlabelled. There is no official palette.

    Source:
        Caesar et al., "COCO-Stuff: Thing and Stuff Classes in Context", CVPR 2018; 183 classes:
        Berrada et al., CVPR 2024, Sec. 4.1.
    """
    ids = {**{file_id: file_id + 1 for file_id in range(182)}, 255: 0}
    return LabelSpec(183, ignore_index=0, id_map=ids, names=COCO_STUFF_NAMES)


class COCOStuff(OfficialDataset):
    """COCO-Stuff, 118 287 training and 5 000 validation images.

    ``root`` holds ``train2017/``, ``val2017/``, ``stuffthingmaps/train2017/``,
    ``stuffthingmaps/val2017/`` and, for instances, ``annotations/instances_*.json``.

    Args:
        root: The folder.
        split: ``"train"`` or ``"heldout"``, which is the validation split.
        image_size: Height and width of every sample.
        instances: Read the objects' outlines as instance maps. Groups have no instance.
        flip: Mirror half of the training samples.
        partial: Accept a download with images missing.
        max_pixels: Largest file that is unpacked.

    Shape:
        - image ``(3, H, W)`` float32 in [-1, 1]; labels ``(H, W)`` uint8; instances ``(H, W)``
          int32, or ``None``

    Raises:
        DataError: Files are missing or damaged.
        InputError: An argument is out of range.

    Source:
        Berrada et al., CVPR 2024, Sec. 4.1: 256x256, instance offsets. Resizing to 286, random
        cut and flip: OASIS, ICLR 2021.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        split: Split = "train",
        image_size: Sequence[int] = (256, 256),
        instances: bool = False,
        flip: bool = True,
        partial: bool = False,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        part = split_of("COCOStuff", split, "train2017", "val2017")
        release = Release(
            title=f"COCO-Stuff {part}",
            page=_PAGES,
            num_images=_COUNTS[part],
            images=Kind(part, ".jpg"),
            labels=Kind(f"stuffthingmaps/{part}", ".png"),
        )
        super().__init__(
            root,
            release,
            coco_stuff_spec(),
            image_size=image_size,
            load_scale=CUT_256_OF_286,
            flip=flip,
            partial=partial,
            max_pixels=max_pixels,
        )
        self._objects: CocoObjects | None = None
        if instances:
            self._objects = CocoObjects(self.root / "annotations" / f"instances_{part}.json")

    def settings(self) -> tuple[object, ...]:
        """Release, classes, sizes, and whether there are instances."""
        return *super().settings(), self._objects is not None

    def instances(self, index: int, pair: Pair, labels: Tensor) -> npt.NDArray[np.int32] | None:
        """Object ids of sample ``index``, painted from the outlines."""
        del index
        if self._objects is None:
            return None
        try:
            number = int(pair.image.stem)
        except ValueError as error:
            msg = f"{shown(pair.image)}: has a name that is not COCO's number of an image"
            raise DataError(msg) from error
        return self._objects.paint(number, labels.numpy())
