"""Cityscapes with fine annotations, from its official folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from dpsims.data import LabelSpec
from dpsims_reference.data.class_names import CITYSCAPES_NAMES, CITYSCAPES_PALETTE
from dpsims_reference.data.files import MAX_PIXELS
from dpsims_reference.data.official import Kind, OfficialDataset, Release, Split, split_of
from dpsims_reference.data.paired import Pair

_COUNTS = {"train": 2_975, "val": 500}
# an object's id is its class times 1000 plus a number; smaller ids are a class or a group
_FIRST_OBJECT = 1000


def cityscapes_spec() -> LabelSpec:
    """The 35 classes of Cityscapes: ids 0 to 33 as they are, and the licence plate, 34.

    Id 0 is unlabelled. The licence plate's official id is -1, which no label map holds: its pixels
    carry the id of what is behind. Class 34 therefore never occurs in the official maps. 255
    is refused: it marks maps of train ids, which are not these.

    Source:
        Cordts et al., "The Cityscapes Dataset for Semantic Urban Scene Understanding", CVPR 2016,
        with the ids and colours of https://github.com/mcordts/cityscapesScripts; 35 classes:
        Berrada et al., CVPR 2024, Sec. 4.1.
    """
    ids = {**{class_id: class_id for class_id in range(34)}, -1: 34}
    return LabelSpec(
        35, ignore_index=0, id_map=ids, names=CITYSCAPES_NAMES, palette=CITYSCAPES_PALETTE
    )


class Cityscapes(OfficialDataset):
    """Cityscapes, 2 975 training and 500 validation images.

    ``root`` holds ``leftImg8bit/`` and ``gtFine/``, each with ``train/`` and ``val/`` and a folder
    for every city. Only ``*_labelIds.png`` and, for instances, ``*_instanceIds.png`` are read.

    Args:
        root: The folder.
        split: ``"train"`` or ``"heldout"``, which is the validation split.
        image_size: Height and width of every sample.
        instances: Read the instance maps. Groups have no instance.
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
        Berrada et al., CVPR 2024, Sec. 4.1: 256x512, instance offsets. Resizing without a cut,
        and flip: OASIS, ICLR 2021.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        split: Split = "train",
        image_size: Sequence[int] = (256, 512),
        instances: bool = False,
        flip: bool = True,
        partial: bool = False,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        part = split_of("Cityscapes", split, "train", "val")
        maps = Kind(f"gtFine/{part}", "_gtFine_instanceIds.png")
        release = Release(
            title=f"Cityscapes {part}",
            page="https://www.cityscapes-dataset.com/downloads/",
            num_images=_COUNTS[part],
            images=Kind(f"leftImg8bit/{part}", "_leftImg8bit.png"),
            labels=Kind(f"gtFine/{part}", "_gtFine_labelIds.png"),
            instances=maps if instances else None,
            by_city=True,
        )
        super().__init__(
            root,
            release,
            cityscapes_spec(),
            image_size=image_size,
            load_scale=1,
            flip=flip,
            partial=partial,
            max_pixels=max_pixels,
        )

    def instances(self, index: int, pair: Pair, labels: Tensor) -> npt.NDArray[np.int32] | None:
        """Object ids of sample ``index``, 0 where a pixel belongs to no single object."""
        ids = super().instances(index, pair, labels)
        return None if ids is None else np.where(ids >= _FIRST_OBJECT, ids, np.int32(0))
